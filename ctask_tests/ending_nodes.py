# SPDX-License-Identifier: Apache-2.0
"""Commands that run on the real sshd and are to be ended, and what lives of them.

Runs in the thread of the test. What lives is looked up in the process table, since all nodes are this machine.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from ctask.options import Command, Stop
from ctask_tests.fix_leaks import process_table, wait_until
from ctask_tests.fix_sshd import no_process_left
from ctask_tests.ssh_sink import RecordingSink, connected, started, target_for

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ctask.result import Ending
    from ctask.transports.ssh.channel import SshSession
    from ctask.transports.ssh.connection import SshConnection
    from ctask_tests.fix_sshd import Sshd

__all__ = ["KILL", "LONG", "STUBBORN", "TERM", "Running", "alive", "end", "logged_in", "needs_mounts"]

KILL = Stop("kill", 0.4)
TERM = Stop("term", 0.4)
#: Seconds that an ending may take here at most, however busy the machine is.
LONG = 8.0
#: A command that TERM does not end; it forks nothing while it waits.
STUBBORN = "trap '' TERM; echo $$; exec sleep 60"


class Running:
    """A command that runs, and the processes of which it printed the numbers."""

    def __init__(self, connection: SshConnection, line: str, *, pids: int = 1, pty: bool = False) -> None:
        self.sink = RecordingSink()
        self.session: SshSession = started(connection, Command(line=line.encode(), pty=pty), self.sink)
        wait_until(lambda: self.sink.stdout.count(b"\n") >= pids, what=f"{pids} pids of {line!r}")
        self.pids = [int(number) for number in self.sink.stdout.split()[:pids]]


@contextlib.contextmanager
def logged_in(sshd: Sshd, user: str) -> Iterator[SshConnection]:
    with connected(target_for(sshd.options(), sshd.address(1), user=user)) as made, no_process_left(sshd):
        made.places += 1  # of another job: else it is closed as soon as it is retired
        yield made


def alive(pids: Iterable[int]) -> set[int]:
    """Those of these processes that live."""
    table = process_table()
    return {pid for pid in pids if pid in table and table[pid].state != "Z"}


def end(connection: SshConnection, command: Running, stop: Stop = KILL, within: float = LONG) -> Ending:
    """End one command."""
    return connection.end([command.session], stop, within)[command.session]


def needs_mounts(*programs: str) -> None:
    """Skip the test where a server can have no mounts of its own, or one of these programs is missing."""
    if os.geteuid() != 0:
        pytest.skip("only root gives a server mounts of its own")
    if subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("this machine lets nobody unshare its mounts (a container without CAP_SYS_ADMIN?)")
    places = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    for program in programs:
        if shutil.which(program, path=places) is None:
            pytest.skip(f"no {program}: tools/setup-test.sh installs it, as root on Debian")
