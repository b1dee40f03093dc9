# SPDX-License-Identifier: Apache-2.0
"""The thread of a task that has one of its own, and the runs that other threads have asked it for.

`OwnThread` is used by any thread; `_asked` is a deque, whose single steps are atomic, and `_idle` guards the count of
runs that are not over and what they have raised. The thread holds its task only while it runs something: a task that
the program drops is freed. It ends when it is closed, or by an error that is no `Exception` (`sys.exit()` in a
handler): that ends the task, and every thread that waits for it, or asks it for anything, is told.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from ctask.errors import HandlerError, TaskError
from ctask.mailbox import Mailbox

__all__ = ["OwnThread"]

log = logging.getLogger("ctask.task")

#: Errors of runs that are kept until a `join()` raises them; more are only logged, and counted.
MOST_ERRORS = 100
#: Seconds within which a dispatcher has ended that was told to end by an error.
DEAD_WITHIN = 2.0

W = TypeVar("W")


class Runner(Protocol[W]):
    """The task, as far as its thread is concerned."""

    def execute(self, limit: float | None, scheduled: list[W]) -> None:
        """One run. In its thread."""

    def refuse(self, scheduled: list[W]) -> None:
        """End what no run will begin any more. Any thread."""


class OwnThread(Generic[W]):
    """Runs what it is asked to run, and the handlers of what was submitted, until it is closed.

    Args:
        name: of the thread.
        task: the one that it belongs to.
        mailbox: the task's.
        begin: called first, in the thread.
        fail: ends the task by an error that is no `Exception`.
    """

    def __init__(
        self,
        name: str,
        task: Runner[W],
        mailbox: Mailbox,
        begin: Callable[[], object],
        fail: Callable[[BaseException], object],
    ) -> None:
        self._task = weakref.ref(task)
        self._mailbox = mailbox
        self._begin = begin
        self._fail = fail
        self._asked: deque[tuple[float | None, list[W]]] = deque()
        self._idle = threading.Condition()
        # Under the condition: runs that are not over, what was raised and not yet told, and how much more there was.
        self._unfinished = 0
        self._raised: list[Exception] = []
        self._untold = 0
        # Appended to and removed from by the threads that join; the thread looks through it.
        self._joins: list[_Join] = []
        self._over = False
        self._ended = False
        self.thread = threading.Thread(target=self._serve, name=name, daemon=True)

    def ask(self, limit: float | None, scheduled: list[W]) -> None:
        """Have these workers run. Any thread; never waits."""
        with self._idle:
            self._unfinished += 1
        self._asked.append((limit, scheduled))
        self._mailbox.wake()
        if self._ended:  # looked at *after* asking: this thread or that one finds what was asked for
            self._refuse_asked()

    def wait(self, done: Callable[[], bool], timeout: float | None) -> bool:
        """Wait until every run that was asked for is over, and `done()` besides; or until the thread has ended.

        Args:
            done: looked at in the thread, whenever it has called a handler.
            timeout: seconds; False is returned then.
        """
        join = _Join(done)
        self._joins.append(join)
        self._mailbox.wake()
        try:
            with self._idle:
                return self._idle.wait_for(lambda: self._ended or (not self._unfinished and join.over), timeout)
        finally:
            self._joins.remove(join)

    def raise_error(self) -> None:
        """Raise what runs and handlers have raised since the last time, as one error. Any thread."""
        error = self._take_error()
        try:
            if error is not None:
                raise error
        finally:
            del error  # it holds this frame

    def _take_error(self) -> Exception | None:
        with self._idle:
            raised, self._raised = self._raised, []
            untold, self._untold = self._untold, 0
        handlers = [error for one in raised if isinstance(one, HandlerError) for error in one.exceptions]
        others = [one for one in raised if not isinstance(one, HandlerError)]
        handled = HandlerError("handlers raised; the runs went on to their ends", handlers) if handlers else None
        if not others:
            return handled
        first = others[0]
        if handled is not None:
            first.__cause__ = handled
        if len(others) + untold > 1:
            first.add_note(f"{len(others) + untold - 1} more runs have ended by an error, see the log")
        return first

    def close(self) -> None:
        """End the thread. Any thread, signal handlers and the garbage collector; never waits."""
        self._over = True
        self._mailbox.wake()

    # -- the thread ------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            self._begin()
            while not self._over:
                self._mailbox.pump(self._wanted)
                while self._asked and not self._over:
                    self._run(*self._asked.popleft())
        except TaskError:
            log.debug("%s ends: its task has failed", self.thread.name, exc_info=True)
        except BaseException as error:  # noqa: BLE001 (a handler wants out: this is the top of the thread, and all waits are told)
            self._die(error)
        finally:
            self._ended = True
            self._refuse_asked()
            with self._idle:
                self._unfinished = 0
                self._idle.notify_all()

    def _wanted(self) -> bool:
        """Whether there is more to do than to call handlers; tells those that wait for these."""
        if self._joins:
            self._look()
        return bool(self._asked) or self._over

    def _look(self) -> None:
        for join in tuple(self._joins):
            if not join.over and join.done():
                self._collect(self._mailbox.take_errors())
                with self._idle:
                    join.over = True
                    self._idle.notify_all()

    def _run(self, limit: float | None, scheduled: list[W]) -> None:
        task = self._task()
        self._collect(self._mailbox.take_errors())  # of handlers that were called outside of runs
        try:
            if task is not None:
                task.execute(limit, scheduled)
        except TaskError as error:  # what handlers raise was logged there, each with its traceback
            log.error("a run of %s ended with an error: %s", self.thread.name, error)  # noqa: TRY400 (see above)
            self._collect(error)
        except Exception as error:
            log.exception("a run of %s ended with an error", self.thread.name)
            self._collect(error)
        finally:
            with self._idle:
                self._unfinished -= 1
                self._idle.notify_all()

    def _collect(self, error: Exception | None) -> None:
        """Keep an error for who joins: its frames as text, since what they hold is not to live until then."""
        if error is None:
            return
        for one in (error, *(error.exceptions if isinstance(error, HandlerError) else ())):
            frames = traceback.format_tb(one.__traceback__)
            if frames and not isinstance(one, TaskError):
                one.add_note(f"Raised in {self.thread.name}:\n{''.join(frames).rstrip()}")
            one.__traceback__ = None
        with self._idle:
            if len(self._raised) < MOST_ERRORS:
                self._raised.append(error)
            else:
                self._untold += 1

    def _die(self, error: BaseException) -> None:
        """End the task by an error, and return when that is known."""
        self._fail(error)
        until = time.monotonic() + DEAD_WITHIN
        while self._mailbox.failure is None:
            try:
                if not self._mailbox.pump(lambda: self._mailbox.failure is not None, until):
                    self._mailbox.fail(error)  # the dispatcher had ended before
            except BaseException:  # another handler that wants out
                log.exception("%s: a handler raised as well", self.thread.name)

    def _refuse_asked(self) -> None:
        """End what was asked for and will not be run. In the thread at its end, later in the one that asks."""
        while True:
            try:
                _, scheduled = self._asked.popleft()
            except IndexError:
                return
            task = self._task()
            if task is not None:
                task.refuse(scheduled)


class _Join:
    """A thread that waits."""

    __slots__ = ("done", "over")

    def __init__(self, done: Callable[[], bool]) -> None:
        self.done = done
        self.over = False
