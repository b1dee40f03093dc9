# SPDX-License-Identifier: Apache-2.0
"""The owner's side of a task: what waits to be pumped, who is called with it, and the credit that handlers earn.

The dispatcher puts entries in; the owner takes them out and runs the handlers, in `Mailbox.pump` only. The mailbox
holds no bytes: of a job with new output it has one entry, and a reader over the store from which lines are cut.
`Gate` is the one place where three threads meet; its lock is small and nobody waits or sends under it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Literal, Protocol

from ctask.buffers import STDERR, Output, Reader
from ctask.handler import Handlers
from ctask.result import NodeResult

__all__ = ["Delivery", "Gate", "LineCutter", "Mailbox", "Subject"]

log = logging.getLogger("ctask.handler")

#: Bytes that are cut into lines at a time.
SLICE = 256 * 1024
#: Events split a line after so many bytes; the store never does.
LONGEST_LINE = 1024 * 1024
#: Bytes of a task that may be on their way from the connections' threads to the store.
AFLOAT = 16 << 20
#: Seconds after which the main thread looks for a signal whose moment was missed.
SIGNALS = 0.25


class Credited(Protocol):
    """A session whose credit can be withheld."""

    def give(self) -> None: ...


class Gate:
    """Decides whether nodes may send more.

    Credit is withheld while the owner *delivers* and more than `limit` bytes wait for handlers, and while more
    than `AFLOAT` bytes wait to be stored. While the owner does not deliver it is given, so that no wait can
    deadlock.

    Guarantees: asking, withholding and giving happen under one lock, so that no pause is lost; who was refused is
    given credit once, by `give`, as soon as the reason is gone.

    `_stored` is written by the dispatcher and `_read` by the owner only; each reads the other's late by a moment,
    which makes the limit soft, not wrong.
    """

    def __init__(self, limit: int, give: Callable[[list[Credited]], object]) -> None:
        self.limit = limit
        self._give = give
        self._lock = threading.Lock()
        # Under the lock: delivering, shut, refused, afloat.
        self._delivering = False
        self._shut = False
        self._refused: set[Credited] = set()
        self._afloat = 0
        self._stored = 0
        self._read = 0

    def ask(self, session: Credited) -> bool:
        """May this session's node send more? Connection's thread."""
        with self._lock:
            if not self._shut and self._afloat <= AFLOAT:
                return True
            self._refused.add(session)
            return False

    def withholds(self, session: Credited) -> bool:
        """Whether this session waits for credit. Any thread."""
        with self._lock:
            return session in self._refused

    def posted(self, count: int) -> None:
        """Bytes are on their way to the store. Connection's thread."""
        with self._lock:
            self._afloat += count

    def landed(self, count: int) -> None:
        """They have arrived, or were thrown away. Dispatcher."""
        with self._lock:
            self._afloat -= count
            waiting = self._release()
        if waiting:
            self._give(waiting)

    def more(self, count: int) -> None:
        """So many bytes now wait for handlers. Dispatcher."""
        self._stored += count
        if self._stored - self._read > self.limit:
            with self._lock:
                self._shut = self._delivering

    def less(self, count: int) -> None:
        """Handlers have had so many bytes, or never will. Owner."""
        self._read += count
        if self._shut and self._stored - self._read <= self.limit // 2:
            self._open()

    def begin(self) -> None:
        """The owner delivers. Owner."""
        with self._lock:
            self._delivering = True
            self._shut = self._stored - self._read > self.limit

    def end(self) -> None:
        """The owner does something else. Owner."""
        with self._lock:
            self._delivering = False
        if self._shut:
            self._open()

    def _open(self) -> None:
        with self._lock:
            self._shut = False
            waiting = self._release()
        if waiting:
            self._give(waiting)

    def _release(self) -> list[Credited]:
        """Return who may be given credit now; under the lock."""
        if self._shut or self._afloat > AFLOAT // 2 or not self._refused:
            return []
        waiting, self._refused = list(self._refused), set()
        return waiting


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
        "_cutters",
        "apart",
        "credited",
        "epoch",
        "left",
        "lines",
        "muted",
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
        #: what is left is not delivered: the job was ended by a deadline or an abort
        self.muted = False
        #: `Mailbox.epoch` when the job was submitted
        self.epoch = 0
        self.stored = 0
        self.taken = 0
        self.credited = 0
        #: what is to be delivered next of its end
        self.left: Literal["lines", "hup", "done"] = "lines"
        #: cut, and not delivered since the pump had to look elsewhere
        self.lines: deque[tuple[str, list[bytes]]] = deque()
        self._cutters: dict[str, LineCutter] = {}

    def cut(self, limit: int) -> None:
        """Take at most about `limit` bytes and cut them into `lines`."""
        if self.reader is None:
            return
        for number, data in self.reader.take(limit):
            self.taken += len(data)
            sname = "stderr" if self.apart and number == STDERR else "stdout"
            cutter = self._cutters.get(sname)
            if cutter is None:
                cutter = self._cutters[sname] = LineCutter()
            lines = cutter.cut(data)
            if lines:
                self.lines.append((sname, lines))

    def finish(self) -> None:
        """Cut the last lines, which have no end."""
        for sname, cutter in self._cutters.items():
            rest = cutter.rest()
            if rest:
                self.lines.append((sname, rest))


class Mailbox:
    """The entries of one task, and the pump.

    Args:
        gate: told when the owner delivers.

    Attributes:
        busy: a handler is running now (owner's thread only).
        errors: what handlers raised in the current run.
        notify: wakes the owner; an event loop or another process can put its own here.
    """

    def __init__(self, gate: Gate) -> None:
        self._entries: deque[Callable[[Callable[[], bool], float | None], None]] = deque()
        self._gate = gate
        # Held while nothing is to be seen: releasing it wakes the owner, and releasing it twice is refused.
        self._bell = threading.Lock()
        self._bell.acquire()
        self.busy = False
        #: counts the ends of everything: what was submitted before the last of them is not read any more
        self.epoch = 0
        self.errors: list[Exception] = []
        self.notify: Callable[[], None] = self.ring
        self._logged: set[object] = set()

    # -- the dispatcher's ------------------------------------------------------------------------------------

    def ring(self) -> None:
        """Wake the owner where it waits. Any thread, and signal handlers."""
        try:
            self._bell.release()
        except RuntimeError:  # it has been told already
            pass

    def hush(self) -> None:
        """Deliver no line any more of what was submitted until now. Any thread, and signal handlers."""
        # Two at once may count as one, which is all that is needed.
        self.epoch += 1

    def started(self, subject: Subject) -> None:
        """A worker's first job begins."""
        if subject.handlers.start:
            self._put(lambda done, until: self._each(subject.handlers.start, subject))

    def picked_up(self, subject: Subject, node: str) -> None:
        """A job begins."""
        if subject.handlers.pickup:
            self._put(lambda done, until: self._each(subject.handlers.pickup, subject, node))

    def readable(self, delivery: Delivery, count: int) -> None:
        """A job has stored so many bytes more."""
        delivery.stored += count
        self._gate.more(count)
        if not delivery.queued:
            delivery.queued = True
            self._put(partial(self._read, delivery))

    def ended(self, delivery: Delivery, rc: int | None, result: NodeResult) -> None:
        """A job has its outcome; `rc` is None where there is no `ev_hup`."""
        handlers = delivery.subject.handlers
        if delivery.reader is not None or handlers.hup or handlers.done:
            self._put(partial(self._end, delivery, rc, result))

    def closed(self, subject: Subject, close: Callable[[], bool]) -> None:
        """A worker's last job has ended; `close` marks it as delivered and tells whether a job timed out."""
        self._put(lambda done, until: self._each(subject.handlers.close, subject, close()))

    def _put(self, entry: Callable[[Callable[[], bool], float | None], None]) -> None:
        self._entries.append(entry)
        self.notify()

    # -- the owner's -----------------------------------------------------------------------------------------

    def pump(self, done: Callable[[], bool], until: float | None = None) -> bool:
        """Run handlers until `done()`; return False when `until` (monotonic) came first.

        Inside a handler it waits without pumping.
        """
        if self.busy:
            return self._wait(done, until)
        entries = self._entries
        while True:
            if entries:
                self._deliver(done, until)
            if done():
                return True
            if not entries and not self._sleep(until):
                return False
            if until is not None and time.monotonic() >= until:
                return done()

    def _wait(self, done: Callable[[], bool], until: float | None) -> bool:
        # The handler's own wait: credit flows meanwhile, else the job that it waits for could be held back by it.
        self._gate.end()
        try:
            while not done():
                if not self._sleep(until):
                    return done()
            return True
        finally:
            self._gate.begin()
            self.ring()  # what came meanwhile is for the pump outside

    def _sleep(self, until: float | None) -> bool:
        left = threading.TIMEOUT_MAX if until is None else until - time.monotonic()
        if left <= 0:
            return False
        # A signal breaks this wait, but not one that comes while the thread is on its way into it.
        main = threading.current_thread() is threading.main_thread()
        self._bell.acquire(True, min(left, SIGNALS if main else threading.TIMEOUT_MAX))
        return True

    def _deliver(self, done: Callable[[], bool], until: float | None) -> None:
        entries = self._entries
        self._gate.begin()
        self.busy = True
        try:
            while entries:
                entries.popleft()(done, until)
                if done() or (until is not None and time.monotonic() >= until):
                    break
        finally:
            self.busy = False
            self._gate.end()

    def _each(self, callbacks: tuple[Callable[..., object], ...], *args: object) -> None:
        for callback in callbacks:
            try:
                callback(*args)
            except Exception as error:  # noqa: BLE001 (the user's: a slip must not end other nodes' commands)
                self._raised(callback, error)

    def _raised(self, callback: object, error: Exception) -> None:
        self.errors.append(error)
        if callback in self._logged:
            log.error("%s raised again: %r", _name(callback), error)
        else:
            self._logged.add(callback)
            log.error("%s raised; it is called again for the next event", _name(callback), exc_info=error)

    def _read(self, delivery: Delivery, done: Callable[[], bool], until: float | None) -> None:
        delivery.queued = False
        try:
            if not delivery.lines and not self._silent(delivery):
                delivery.cut(SLICE)
            self._lines(delivery, done, until)
        finally:  # also when an interrupt comes out of a handler
            more = delivery.lines or (delivery.reader is not None and delivery.reader.unread())
            if more and not delivery.queued and not self._silent(delivery):
                delivery.queued = True
                entry = partial(self._read, delivery)
                # The rest of a slice comes before everything, the next slice after the others' turn.
                (self._entries.appendleft if delivery.lines else self._entries.append)(entry)

    def _end(
        self,
        delivery: Delivery,
        rc: int | None,
        result: NodeResult,
        done: Callable[[], bool],
        until: float | None,
    ) -> None:
        """Deliver what is left of a job's lines, then its end; each once, though it may take several turns."""
        handlers = delivery.subject.handlers
        over = False
        try:
            if delivery.left == "lines" and self._last_lines(delivery, done, until):
                delivery.left = "hup"
            if delivery.left == "hup":
                delivery.left = "done"
                if rc is not None and handlers.hup:
                    subject = delivery.subject
                    subject.last_rc, subject.last = rc, (delivery.node, *subject.last[1:])
                    self._each(handlers.hup, subject, delivery.node, rc)
            if delivery.left == "done":
                over = True
                self._each(handlers.done, delivery.subject, delivery.node, result)
        finally:
            if not over:
                self._entries.appendleft(partial(self._end, delivery, rc, result))

    def _last_lines(self, delivery: Delivery, done: Callable[[], bool], until: float | None) -> bool:
        """Deliver lines until there are none; False: something else is due before."""
        while not self._silent(delivery):
            if not delivery.lines:
                if delivery.reader is None:
                    return True
                delivery.cut(SLICE)
                if not delivery.reader.unread():
                    delivery.finish()
                    delivery.reader = None
            self._lines(delivery, done, until)
            if delivery.lines and not self._silent(delivery):
                return False
        self._credit(delivery, delivery.stored - delivery.credited)
        return True

    def _lines(self, delivery: Delivery, done: Callable[[], bool], until: float | None) -> None:
        """Deliver the lines that are cut, as long as nothing else is due.

        A slice of bytes is not a slice of time: after a stride of lines the clock is looked at, and the stride
        follows how slow the handlers are.
        """
        subject, node = delivery.subject, delivery.node
        stride = 1
        while delivery.lines and not self._silent(delivery):
            sname, lines = delivery.lines.popleft()
            at = size = 0
            try:
                while at < len(lines) and not self._silent(delivery):
                    began = time.monotonic()
                    for line in lines[at : at + stride]:
                        at += 1
                        size += len(line) + 1
                        message = Output(line)
                        subject.last = (node, sname, message)
                        for callback in subject.handlers.read:
                            try:
                                callback(subject, node, sname, message)
                            except Exception as error:  # noqa: BLE001 (as in _each)
                                self._raised(callback, error)
                    now = time.monotonic()
                    stride = min(stride * 2, 1024) if now - began < 0.002 else max(1, stride // 4)
                    if (until is not None and now >= until) or (now - began > 0.002 and done()):
                        break
            finally:
                # Also when a KeyboardInterrupt comes out of a handler: what was not delivered is not lost.
                if at < len(lines):
                    delivery.lines.appendleft((sname, lines[at:]))
                self._credit(delivery, min(size, delivery.taken - delivery.credited))
            if delivery.lines and ((until is not None and time.monotonic() >= until) or done()):
                return
        if not self._silent(delivery):
            # Ends of lines, and a line that has not ended, are read as well.
            self._credit(delivery, delivery.taken - delivery.credited)

    def _silent(self, delivery: Delivery) -> bool:
        return delivery.muted or delivery.epoch < self.epoch

    def _credit(self, delivery: Delivery, count: int) -> None:
        delivery.credited += count
        self._gate.less(count)


def _name(callback: object) -> str:
    return getattr(callback, "__qualname__", None) or repr(callback)
