# SPDX-License-Identifier: Apache-2.0
"""Standard input of the command line: to all nodes with `--stdin`, else left alone.

`Feeder` reads in a thread of its own and hands on by `worker.write`, which any thread may call. `unread` looks, and
neither takes anything nor waits.
"""

from __future__ import annotations

import fcntl
import os
import select
import stat
import sys
import termios
import threading
from typing import NamedTuple

from ctask.cli.terminal import Terminal
from ctask.worker import Worker

__all__ = ["Feeder", "Unread", "unread"]

#: Bytes that are read at a time.
SLICE = 64 * 1024
#: What is read is kept (once, for all nodes) until the last node has taken it, and a node that waits for its turn
#: takes nothing yet: so reading cannot go at the pace of the nodes, and ends here in place of filling the memory.
MOST = 512 << 20
#: Seconds between two looks whether anybody is left to be fed.
_EVERY = 0.2


class Feeder:
    """Hands standard input to all nodes of a worker, then its end.

    Input that could not be read to its end is not ended on the nodes: the command is aborted there, since half a
    file looks like a whole one.
    """

    def __init__(self, worker: Worker, terminal: Terminal, *, most: int = MOST) -> None:
        self._worker = worker
        self._terminal = terminal
        self._most = most
        # A daemon: at the end of the program it may still wait for somebody to type.
        self._thread = threading.Thread(target=self._feed, name="ctask-cli/stdin", daemon=True)

    def start(self) -> None:
        """Begin to read; returns at once."""
        try:
            self._thread.start()
        except RuntimeError as error:
            self._give_up(f"standard input cannot be read: {error} (ulimit -u)")

    def _feed(self) -> None:
        try:
            self._hand_on(sys.stdin.fileno())
        except (OSError, ValueError) as error:
            self._give_up(f"standard input cannot be read: {getattr(error, 'strerror', None) or error}")

    def _hand_on(self, fd: int) -> None:
        taken = 0
        while not self._worker.done():
            if not select.select([fd], [], [], _EVERY)[0]:
                continue
            data = os.read(fd, SLICE)
            if not data:
                self._worker.set_write_eof()
                return
            taken += len(data)
            if taken > self._most:
                self._give_up(f"standard input is longer than {self._most >> 20} MiB, which is kept for all nodes")
                return
            self._worker.write(data)

    def _give_up(self, why: str) -> None:
        self._terminal.say(f"ctask: {why}: the command is ended on all nodes")
        self._worker.abort()


class Unread(NamedTuple):
    """Standard input with something in it.

    Attributes:
        what: `a pipe`, `a socket`, `a file`.
        untouched: a file that nothing was read from yet, by no program that shares it.
    """

    what: str
    untouched: bool = False


def unread() -> Unread | None:
    """Return what standard input is where there is something in it; else None.

    A terminal and the devices of `/dev` are never meant; a pipe whose writer is slow has nothing in it yet.
    """
    try:
        fd = sys.stdin.fileno()
        about = os.fstat(fd)
        if stat.S_ISFIFO(about.st_mode) or stat.S_ISSOCK(about.st_mode):
            waiting = fcntl.ioctl(fd, termios.FIONREAD, b"\0" * 4)
            if not int.from_bytes(waiting, sys.byteorder):
                return None
            return Unread("a pipe" if stat.S_ISFIFO(about.st_mode) else "a socket")
        if stat.S_ISREG(about.st_mode):
            place = os.lseek(fd, 0, os.SEEK_CUR)
            # A look does not move the place. The size is no answer: files of /proc have none, and a file that was
            # opened for writing only cannot be read.
            return Unread("a file", place == 0) if os.pread(fd, 1, place) else None
    except (AttributeError, OSError, ValueError):  # closed, or not a file of the system
        pass
    return None
