# SPDX-License-Identifier: Apache-2.0
"""The command line as a process, on the nodes of a test's sshd."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from ctask_tests.fix_sshd import Sshd

__all__ = ["ROOT", "Cli"]

ROOT = Path(__file__).resolve().parent.parent


class Cli:
    """`python -m ctask`, told how the server's nodes are reached."""

    def __init__(self, server: Sshd) -> None:
        options = self.options = server.options()
        self.way = ["-l", options["user"], "-i", options["identity"]]
        self.way += ["-o", f"Port={options['port']}", "-o", f"UserKnownHostsFile {options['known_hosts']}"]

    def start(self, *words: str, **arguments: Any) -> subprocess.Popen[bytes]:
        # A locale that knows ASCII only must make no difference.
        environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "TERM": "xterm"}
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **arguments}
        command = [sys.executable, "-W", "error", "-m", "ctask", *self.way, *words]
        return subprocess.Popen(command, cwd=ROOT, env=environment, **streams)

    def __call__(self, *words: str, given: bytes | None = None, **arguments: Any) -> tuple[int, bytes, str]:
        if given is not None:
            arguments["stdin"] = subprocess.PIPE
        with self.start(*words, **arguments) as process:
            out, err = process.communicate(given, timeout=20)
        return process.returncode, out or b"", (err or b"").decode()
