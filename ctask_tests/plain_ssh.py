# SPDX-License-Identifier: Apache-2.0
"""The ssh program as a client, for tests that must not depend on ours: no configuration, agent or home.

Runs in the thread of pytest, or in any other: nothing is kept here.
"""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ctask_tests.fix_sshd import SshdOptions

__all__ = ["Answer", "ssh", "ssh_command", "start_ssh"]


class Answer(NamedTuple):
    """What a command came to; 255 is ssh's own failure."""

    rc: int
    out: str
    err: str


def ssh_command(options: SshdOptions, address: str, command: str, *more: str) -> list[str]:
    """The argument vector; `more` are settings ("ConnectTimeout=1")."""
    settings = [
        "BatchMode=yes",
        "StrictHostKeyChecking=yes",
        "IdentitiesOnly=yes",
        "IdentityAgent=none",
        "GlobalKnownHostsFile=/dev/null",
        f"UserKnownHostsFile={options['known_hosts']}",
        *more,
    ]
    words = [word for setting in settings for word in ("-o", setting)]
    return [
        *("ssh", "-F", "/dev/null", *words, "-i", options["identity"]),
        *("-l", options["user"], "-p", str(options["port"]), "--", address, command),
    ]


def ssh(options: SshdOptions, address: str, command: str, *more: str) -> Answer:
    """Run a command to its end."""
    done = subprocess.run(
        ssh_command(options, address, command, *more),
        check=False,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=20,
    )
    return Answer(done.returncode, done.stdout, done.stderr)


def start_ssh(options: SshdOptions, address: str, command: str) -> subprocess.Popen[str]:
    """Start a command that prints a line, and return once that line is here."""
    program = ssh_command(options, address, f"echo; {command}")
    client = subprocess.Popen(
        program, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert client.stdout is not None
    assert client.stdout.readline() == "\n"
    return client
