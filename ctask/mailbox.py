# SPDX-License-Identifier: Apache-2.0
"""The owner's side of a task: what waits to be pumped, and who is called with it.

The dispatcher puts entries in; the owner takes them out and runs the handlers, in `Mailbox.pump` only. The mailbox
holds no bytes: of a job with new output it has one entry, with a `Delivery` that cuts lines from the store.
The credit that handlers earn is counted by the `Gate`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial

from ctask.buffers import Output
from ctask.delivery import Delivery, Subject
from ctask.errors import HandlerError, NodeError, TaskError
from ctask.errors.text import told
from ctask.gate import Gate
from ctask.result import NodeResult

__all__ = ["Mailbox"]

log = logging.getLogger("ctask.handler")

#: Bytes that are cut into lines at a time.
SLICE = 256 * 1024
#: Seconds after which the lines of one node give way to what else is to be delivered.
TURN = 0.1
#: Errors of handlers that are kept for the run's end, and those of them that keep their frames: a frame holds its
#: worker, and with it all that was printed.
MOST_ERRORS = 1000
MOST_TRACEBACKS = 10
_NO_LINE = Output(b"")
#: Seconds after which the main thread looks for a signal whose moment was missed.
SIGNALS = 0.25


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
        # Taken out of the entries, and not begun: each entry begins by taking itself from here.
        self._taken: Callable[[Callable[[], bool], float | None], None] | None = None
        #: counts the ends of everything: what was submitted before the last of them is not read any more
        self.epoch = 0
        self.errors: list[Exception] = []
        self.notify: Callable[[], None] = self.ring
        # What has raised before, by its code: a function made anew for each worker is not to be kept for that.
        self._logged: set[object] = set()
        #: nothing is delivered any more: the task has failed
        self.over = False
        #: what the task has failed by, once every job has its outcome
        self.failure: BaseException | None = None

    # -- the dispatcher's ------------------------------------------------------------------------------------

    def ring(self) -> None:
        """Wake the owner where it waits. Any thread, and signal handlers."""
        try:
            self._bell.release()
        except RuntimeError:  # it has been told already
            pass

    def wake(self) -> None:
        """Call `notify`, whatever was put there: who posts must not have what it raises. Any thread."""
        try:
            self.notify()
        except Exception:
            log.exception("the owner of a task could not be woken by %r", self.notify)
            self.ring()

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
            self._put(lambda done, until: self._pickup(subject, node))

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

    def retried(self, delivery: Delivery, attempt: int, error: NodeError, delay: float) -> None:
        """A try of a job has ended by `error`, and the next begins in `delay` seconds."""
        if delivery.reader is not None or delivery.subject.handlers.retry:
            self._put(partial(self._retry, delivery, attempt, error, delay))

    def closed(self, subject: Subject, close: Callable[[], bool]) -> None:
        """A worker's last job has ended; `close` marks it as delivered and tells whether a job timed out."""
        if self.over:
            close()
        else:
            self._put(lambda done, until: self._each(subject.handlers.close, subject, close()))

    def silence(self) -> None:
        """Call no handler any more. Dispatcher, when it ends by an error."""
        self.over = True
        self.hush()
        self._entries.clear()

    def fail(self, error: BaseException) -> None:
        """Wake the owner, who is told that the task has failed, unless what it waits for has come."""
        self.failure = error
        self.wake()

    def check(self) -> None:
        """Raise `TaskError` where the task has failed. Any thread."""
        if self.failure is not None:
            text = f"this task has failed; task_self() makes a new one: {told(self.failure)}"
            raise TaskError(text) from self.failure

    def raise_errors(self) -> None:
        """Raise what a run has to raise at its end. Owner."""
        self.check()
        error = self.take_errors()
        try:
            if error is not None:
                raise error
        finally:
            del error  # it holds this frame, and the worker in frames of handlers

    def take_errors(self) -> HandlerError | None:
        """Return what handlers have raised since the last time. Owner."""
        raised, self.errors = self.errors, []
        return HandlerError("handlers raised; the run went on to its end", raised) if raised else None

    def after(self, call: Callable[[], None]) -> None:
        """Have a call made when the handler that runs now has returned. Owner."""
        self._entries.appendleft(lambda done, until: call())

    def _put(self, entry: Callable[[Callable[[], bool], float | None], None]) -> None:
        if not self.over:
            self._entries.append(entry)
            self.wake()

    # -- the owner's -----------------------------------------------------------------------------------------

    def pump(self, done: Callable[[], bool], until: float | None = None) -> bool:
        """Run handlers until `done()`; return False when `until` (monotonic) came first.

        Inside a handler it waits without pumping.

        Raises:
            TaskError: the task has failed, and what is waited for will never come.
        """
        if self.busy:
            return self._wait(done, until)
        try:
            return self._pumped(done, until)
        except BaseException:
            self._interrupted()
            raise

    def _pumped(self, done: Callable[[], bool], until: float | None) -> bool:
        entries = self._entries
        while True:
            if entries:
                self._deliver(done, until)
            if done():
                return True
            self.check()
            if not entries and not self._sleep(until):
                return False
            if until is not None and time.monotonic() >= until:
                return done()

    def turn(self, seconds: float) -> bool:
        """Run handlers of what waits, for about so many seconds, and never wait; return whether there is more."""
        if self._entries and not self.busy:
            try:
                self._deliver(lambda: False, time.monotonic() + seconds)
            except BaseException:
                self._interrupted()
                raise
        return bool(self._entries)

    def _interrupted(self) -> None:
        """Ctrl-C came, perhaps in between: no handler runs now, and what was taken up and not begun is not lost."""
        self.busy = False
        self._gate.end()
        taken, self._taken = self._taken, None
        if taken is not None and not (self._entries and self._entries[0] is taken):
            self._entries.appendleft(taken)

    def _wait(self, done: Callable[[], bool], until: float | None) -> bool:
        # The handler's own wait: credit flows meanwhile, else the job that it waits for could be held back by it.
        self._gate.end()
        try:
            while not done():
                self.check()
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
        try:
            self._gate.begin()
            self.busy = True
            while entries:
                self._taken = entries[0]
                entry = self._taken = entries.popleft()
                entry(done, until)
                if self.over or done() or (until is not None and time.monotonic() >= until):
                    break
        finally:
            self.busy = False
            self._gate.end()

    def _each(self, callbacks: tuple[Callable[..., object], ...], *args: object) -> None:
        self._taken = None
        for callback in callbacks:
            try:
                callback(*args)
            except Exception as error:  # noqa: BLE001 (the user's: a slip must not end other nodes' commands)
                self._raised(callback, error)

    def _raised(self, callback: object, error: Exception) -> None:
        code = _code(callback)
        if code in self._logged:
            log.error("%s raised again: %r", _name(callback), error)
        else:
            self._logged.add(code)
            log.error("%s raised; it is called again for the next event", _name(callback), exc_info=error)
        if len(self.errors) < MOST_ERRORS:
            self.errors.append(error if len(self.errors) < MOST_TRACEBACKS else error.with_traceback(None))

    def _pickup(self, subject: Subject, node: str) -> None:
        _turn_to(subject, node, None)
        self._each(subject.handlers.pickup, subject, node)

    def _read(self, delivery: Delivery, done: Callable[[], bool], until: float | None) -> None:
        gave_way = False
        try:
            delivery.queued = False
            if not delivery.lines and not self._silent(delivery):
                delivery.cut(SLICE)
            gave_way = self._lines(delivery, done, until)
        finally:  # also when an interrupt comes out of a handler
            self._taken = None
            more = delivery.lines or (delivery.reader is not None and delivery.reader.unread())
            if more and not delivery.queued and not self._silent(delivery):
                delivery.queued = True
                entry = partial(self._read, delivery)
                # The rest of a slice comes before everything, the next slice after the others' turn.
                first = delivery.lines and not gave_way
                (self._entries.appendleft if first else self._entries.append)(entry)

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
                    _turn_to(delivery.subject, delivery.node, rc)
                    self._each(handlers.hup, delivery.subject, delivery.node, rc)
            if delivery.left == "done":
                _turn_to(delivery.subject, delivery.node, rc)
                over = True
                self._each(handlers.done, delivery.subject, delivery.node, result)
        finally:
            self._taken = None
            if not over:
                self._entries.appendleft(partial(self._end, delivery, rc, result))

    def _retry(
        self,
        delivery: Delivery,
        attempt: int,
        error: NodeError,
        delay: float,
        done: Callable[[], bool],
        until: float | None,
    ) -> None:
        """Deliver what is left of a try's lines, then its end, before anything of the next one."""
        over = False
        try:
            over = self._last_lines(delivery, done, until)
            if over:
                _turn_to(delivery.subject, delivery.node, None)
                self._each(delivery.subject.handlers.retry, delivery.subject, delivery.node, attempt, error, delay)
        finally:
            self._taken = None
            if not over:
                self._entries.appendleft(partial(self._retry, delivery, attempt, error, delay))

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

    def _lines(self, delivery: Delivery, done: Callable[[], bool], until: float | None) -> bool:
        """Deliver the lines that are cut, as long as nothing else is due; return whether others' turn ended it.

        A slice of bytes is not a slice of time: after a stride of lines the clock is looked at, and the stride
        follows how slow the handlers are.
        """
        subject, node = delivery.subject, delivery.node
        subject.last_rc = None
        turn = time.monotonic() + TURN
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
                    if self._due(now, turn, until) or (now - began > 0.002 and done()):
                        break
            finally:
                # Also when a KeyboardInterrupt comes out of a handler: what was not delivered is not lost.
                if at < len(lines):
                    delivery.lines.appendleft((sname, lines[at:]))
                self._credit(delivery, min(size, delivery.taken - delivery.credited))
            if delivery.lines and (self._due(time.monotonic(), turn, until) or done()):
                return time.monotonic() >= turn
        if not self._silent(delivery):
            # Ends of lines, and a line that has not ended, are read as well.
            self._credit(delivery, delivery.taken - delivery.credited)
        return False

    def _due(self, now: float, turn: float, until: float | None) -> bool:
        """Whether the time is up, or this node's turn is and others wait."""
        return (until is not None and now >= until) or (now >= turn and bool(self._entries))

    def _silent(self, delivery: Delivery) -> bool:
        return delivery.muted or delivery.epoch < self.epoch

    def _credit(self, delivery: Delivery, count: int) -> None:
        delivery.credited += count
        self._gate.less(count)


def _turn_to(subject: Subject, node: str, rc: int | None) -> None:
    """Have the worker say whose event comes next, to handlers that ask it; another node's line is no part of that."""
    if subject.last[0] is not node:
        subject.last = (node, "stdout", _NO_LINE)
    subject.last_rc = rc


def _code(callback: object) -> object:
    """Return what all functions share that are made by the same lines of a program."""
    while isinstance(callback, partial):
        callback = callback.func
    try:
        return getattr(callback, "__code__", None) or type(callback)
    except Exception:  # noqa: BLE001 (an object of the program's may do anything when it is looked at)
        return type(callback)


def _name(callback: object) -> str:
    try:
        return str(getattr(callback, "__qualname__", None) or repr(callback))
    except Exception:  # noqa: BLE001 (as in _code)
        return type(callback).__qualname__
