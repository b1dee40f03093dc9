# SPDX-License-Identifier: Apache-2.0
"""Nodes of the fake transport that print much, a piece at a time and no faster than their credit allows; and memory.

What they print is made when it is sent, in the transport's thread, so that what a process holds of it is ctask's.
"""

from __future__ import annotations

import time
from pathlib import Path

from ctask.testing import FakeTransport, Step
from ctask.testing.fake import FakeSession

__all__ = ["Flood", "forget_peak", "numbered", "status"]

#: Bytes of a packet, and after how many a node waits for an answer.
PIECE = 32_768
WINDOW = 131_072


def numbered(node: str, size: int, start: int = 0) -> bytes:
    """Return the bytes from `start` (in whole KiB) to `size` of a stream of lines that no other node prints."""
    lines = (b"%s %d " % (node.encode(), number) for number in range(start // 1024, (size + 1023) // 1024))
    return b"".join(line + b"." * (1023 - len(line)) + b"\n" for line in lines)[: size - start]


def status(name: str) -> int:
    """Return a size of this process in bytes: `VmRSS`, or `VmHWM` for the most that it ever was."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def forget_peak() -> int:
    """Let `VmHWM` begin anew; return `VmRSS`."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return status("VmRSS")


class Flood(FakeTransport):
    """Every node prints `size` bytes of `numbered`, and exits with 0.

    Args:
        same: whether all print the same.
    """

    def __init__(self, size: int, *, same: bool = False) -> None:
        super().__init__(lambda node, command: [])
        self._size = size
        self._same = same

    def _send(self, session: FakeSession) -> None:
        if session.over or not session.send():
            session.end(None)
            return
        session.take(Step("running"))
        self._more(session, 0)

    def _more(self, session: FakeSession, start: int) -> None:
        node = "same" if self._same else session.connection.target.address
        stop = min(start + WINDOW, self._size)
        for at in range(start, stop, PIECE):
            session.sink.data(1, numbered(node, min(at + PIECE, stop), at))
        session.sink.flush()
        if stop == self._size:
            session.take(Step("exit"))
            session.end(None)
        elif not session.over:

            def go_on() -> None:
                self._at(time.monotonic(), lambda: self._more(session, stop))

            session.give = go_on  # type: ignore[method-assign]
            if session.sink.may(session):
                go_on()
