# SPDX-License-Identifier: Apache-2.0
"""Programs in processes of their own, for what only a whole process shows: its signals, its end, its memory.

Runs in the thread of the test. A program's lines are read as they come; what it writes to standard error goes to
a file, so that no pipe fills up.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

__all__ = ["Child"]

ROOT = Path(__file__).resolve().parent.parent

#: What stands before every program. `say` writes a line that the test reads.
PRELUDE = """\
import os, sys, threading, time
from ctask import *
from ctask.testing import close_everything
GIVEN = {given!r}
def say(*words):
    # One piece, and not the end of the line after another thread's words, as print writes it.
    sys.stdout.write(" ".join(map(str, words)) + "\\n")
    sys.stdout.flush()
def wait_until(true):
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)
task = task_self()
"""


class Child:
    """A program that runs while the `with` block does, and is killed if it still does at its end.

    Args:
        program: its text; `GIVEN` in it are the keyword arguments.
    """

    def __init__(self, program: str, **given: Any) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the child)
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", PRELUDE.format(given=given) + program],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            start_new_session=True,  # Ctrl-C in the terminal is pytest's
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._errors.close()

    def line(self) -> str:
        """Read its next line, without the end; empty: there is none any more."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode().rstrip("\n")

    def expect(self, word: str) -> str:
        """Read its next line, which begins with `word`; return the rest."""
        line = self.line()
        assert line.startswith(word), f"{line!r} in place of {word!r}\n{self.errors()}"
        return line.removeprefix(word).strip()

    def interrupt(self) -> float:
        """Send a real SIGINT; return the time."""
        now = time.monotonic()
        self.process.send_signal(signal.SIGINT)
        return now

    def end(self, timeout: float = 15.0) -> int:
        """Wait for its end, and return its status."""
        return self.process.wait(timeout)

    def errors(self) -> str:
        """What it has written to standard error."""
        return os.pread(self._errors.fileno(), 1 << 20, 0).decode(errors="replace")
