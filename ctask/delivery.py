# SPDX-License-Identifier: Apache-2.0
"""What the owner is to hear of one try of a job: a reader over the store, and the lines that are cut from it.

Made by the dispatcher; lines are cut and taken in the owner's thread. Each attribute says whose it is.
"""

from __future__ import annotations

from collections import deque
from typing import Literal, Protocol

from ctask.buffers import STDERR, Output, Reader
from ctask.handler import Handlers

__all__ = ["Delivery", "LineCutter", "Subject"]

#: Events split a line after so many bytes; the store never does.
LONGEST_LINE = 1024 * 1024


class LineCutter:
    r"""Cuts bytes into lines at ``\n``, whatever the chunks they come in. Owner."""

    __slots__ = ("_held", "_parts")

    def __init__(self) -> None:
        # A line that has not ended is kept in parts: joining them anew for each chunk would be quadratic.
        self._parts: list[bytes] = []
        self._held = 0

    def cut(self, data: bytes) -> list[bytes]:
        """Return the lines that end in `data`, without their ends."""
        lines = data.split(b"\n")
        rest = lines.pop()
        carriage = b"\r" in data
        if lines and self._parts:
            lines[0] = b"".join((*self._parts, lines[0]))
            self._parts, self._held = [], 0
            carriage = True  # it may stand at the end of a part
        if carriage:
            lines = [line[:-1] if line[-1:] == b"\r" else line for line in lines]
        if rest:
            self._parts.append(rest)
            self._held += len(rest)
        if self._held >= LONGEST_LINE or (lines and len(max(lines, key=len)) > LONGEST_LINE):
            return self._split(lines)
        return lines

    def rest(self) -> list[bytes]:
        """Return the last line if it did not end, and forget it; its carriage return is data."""
        data, self._parts, self._held = b"".join(self._parts), [], 0
        return [data] if data else []

    def _split(self, lines: list[bytes]) -> list[bytes]:
        held = b"".join(self._parts)
        whole = len(held) // LONGEST_LINE * LONGEST_LINE
        self._parts, self._held = [held[whole:]] if held[whole:] else [], len(held) - whole
        return [
            line[start : start + LONGEST_LINE]
            for line in (*lines, *((held[:whole],) if whole else ()))
            for start in range(0, len(line) or 1, LONGEST_LINE)
        ]


class Subject(Protocol):
    """The worker, as far as its events are concerned."""

    handlers: Handlers
    #: (node, sname, line) of the line that is being delivered
    last: tuple[str, str, Output]
    #: exit status of the node whose end is being delivered
    last_rc: int | None


class Delivery:
    """What the owner is to hear of one job.

    `queued` is set by the dispatcher when it puts the entry in, and cleared by the owner *before* it reads: what
    is stored after that is queued again. `stored` is the dispatcher's; `taken` (out of the store) and `credited`
    (told to the gate as read) are the owner's.
    """

    __slots__ = (
        "__weakref__",
        "_cutters",
        "_muted",
        "apart",
        "credited",
        "epoch",
        "first",
        "left",
        "lines",
        "node",
        "queued",
        "reader",
        "stored",
        "subject",
        "taken",
    )

    def __init__(self, subject: Subject, node: str, *, apart: bool) -> None:
        self.subject = subject
        self.node = node
        self.apart = apart
        self.reader: Reader | None = None
        self.queued = False
        #: that of the job's first try; None: this is it
        self.first: Delivery | None = None
        # What is left is not delivered: the job was ended by a deadline or an abort.
        self._muted = False
        #: `Mailbox.epoch` when the job was submitted
        self.epoch = 0
        self.stored = 0
        self.taken = 0
        self.credited = 0
        #: what is to be delivered next of its end
        self.left: Literal["lines", "hup", "done"] = "lines"
        #: cut, and not delivered since the pump had to look elsewhere; a deque from the first line on, since an empty
        #: one takes 600 bytes, and most jobs have nobody who listens
        self.lines: deque[tuple[str, list[bytes]]] | None = None
        self._cutters: dict[str, LineCutter] = {}

    def again(self) -> Delivery:
        """Return what the owner is to hear of the job's next try. Dispatcher."""
        other = Delivery(self.subject, self.node, apart=self.apart)
        other.first, other.epoch = self.first or self, self.epoch
        return other

    @property
    def muted(self) -> bool:
        """Whether what is left is not delivered: the job was ended by a deadline or an abort, with all of its tries."""
        return self._muted if self.first is None else self.first.muted

    def mute(self) -> None:
        """Deliver no line any more. Dispatcher."""
        if self.first is None:
            self._muted = True
        else:
            self.first.mute()

    def waiting(self) -> int:
        """Return how many bytes wait for handlers. Any thread; of a moment ago."""
        return self.stored - self.credited

    def cut(self, limit: int) -> None:
        """Take at most about `limit` bytes and cut them into `lines`."""
        if self.reader is None:
            return
        for number, data in self.reader.take(limit):
            self.taken += len(data)
            if number != STDERR and self.apart and self.subject.handlers.errors_only:
                continue
            sname = "stderr" if self.apart and number == STDERR else "stdout"
            cutter = self._cutters.get(sname)
            if cutter is None:
                cutter = self._cutters[sname] = LineCutter()
            lines = cutter.cut(data)
            if lines:
                self._add(sname, lines)

    def finish(self) -> None:
        """Cut the last lines, which have no end."""
        for sname, cutter in self._cutters.items():
            rest = cutter.rest()
            if rest:
                self._add(sname, rest)

    def _add(self, sname: str, lines: list[bytes]) -> None:
        if self.lines is None:
            self.lines = deque()
        self.lines.append((sname, lines))
