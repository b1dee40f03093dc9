# SPDX-License-Identifier: Apache-2.0
"""The Future of one node's job: the standard library's, written only by the dispatcher, awaited by anybody.

Where the owner waits on it, the owner's handlers run meanwhile.
"""

from __future__ import annotations

import concurrent.futures
import logging
import operator
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol, Self

from ctask.errors import Aborted, NodeError
from ctask.errors.text import printable
from ctask.numeric import patience
from ctask.result import NodeResult

__all__ = ["Admission", "Condition", "Future", "Waiting", "as_completed", "wait"]

log = logging.getLogger("ctask.future")

#: When a wait is over, in the words of `concurrent.futures`.
_WHEN = (concurrent.futures.FIRST_COMPLETED, concurrent.futures.FIRST_EXCEPTION, concurrent.futures.ALL_COMPLETED)


class Waiting(Protocol):
    """The task, as far as waiting for it is concerned."""

    def wait_for(self, done: Callable[[], bool], until: float | None, *, begun: bool = True) -> bool | None:
        """Wait in the owner, pumping, until `done()`: True; until `until`: False. In other threads: None, at once.

        Args:
            begun: what is waited for is on its way.

        Raises:
            WrongThread: in a done-callback.
            TaskError: it is only scheduled, and nobody but the owner, who waits, would begin it.
        """


class Condition(threading.Condition):
    """A condition of which Ctrl-C leaves no lock behind.

    The standard's `with` enters by a function of Python: an exception of a signal handler that comes as it returns
    leaves the lock taken for ever, and the dispatcher, which needs that of each future, would stand. Here the lock's
    own methods are called, between which and the block no handler runs.
    """

    __enter__ = property(operator.attrgetter("acquire"))
    __exit__ = property(operator.attrgetter("_lock.__exit__"))


class Admission:
    """Whether the jobs of a worker are on their way, or only scheduled.

    Written by the thread that submits them, under `lock`, which also guards what standard input is opened until then.
    The lock is reentrant: a signal handler may abort, which submits what is scheduled.
    """

    __slots__ = ("given", "lock")

    def __init__(self) -> None:
        self.given = False
        self.lock = threading.RLock()


class Future(concurrent.futures.Future[NodeResult]):
    """Resolves to the `NodeResult` of a command that ran, whatever its exit status.

    It raises a `NodeError` where the command could not be run to its end.

    `result()` and `exception()` run the task's handlers while the task's own thread waits in them; in other threads,
    and inside a handler, they wait only; in a done-callback, which runs in the dispatcher, they raise `WrongThread`
    unless the future is done. The standard library's `wait` and `as_completed` take it, without running handlers.
    Thread safety: every method may be called in any thread.
    """

    def __init__(self, task: Waiting, node: Any, cancel: Callable[[], None], admission: Admission) -> None:
        super().__init__()
        self._condition = Condition()
        self.task = task
        self._admission = admission
        self._taken_back = False
        self._ask_cancel = cancel
        self.node = node
        #: somebody pumps for it: the dispatcher wakes the owner when it resolves
        self.watched = False
        #: called by the dispatcher once it has resolved; put in and taken out by those who wait for several
        self.told: list[Callable[[Future], None]] = []

    def result(self, timeout: float | None = None) -> NodeResult:
        """Return the result, waiting at most `timeout` seconds: 0 only looks, None and infinity wait for ever.

        Raises:
            NodeError: the command could not be run to its end; `.result` has what is known.
            TimeoutError: the time to wait is over; the job goes on.
            TaskError: in the task's own thread, the command is only scheduled: call `resume()`.
        """
        self._await(timeout)
        error = super().exception(0)
        try:
            if error is None:
                return super().result(0)
            raise error.again() if isinstance(error, NodeError) else error
        finally:
            del self, error  # as in the standard's own: what is raised holds this frame

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return the `NodeError`, or None; waits as `result`."""
        self._await(timeout)
        return super().exception(0)

    def cancel(self) -> bool:
        """Ask for the end of the job, also while it runs; return False if it has ended already.

        The future then raises `Aborted`, which is a `CancelledError`; an end that came first stands.
        """
        if self.done():
            return False
        self.take_back()
        self._ask_cancel()
        return True

    def add_done_callback(self, fn: Callable[[Self], object]) -> None:
        """Have `fn(future)` called when it is done: in the dispatcher, or at once. What it raises is logged."""

        def call(future: Any) -> None:
            # The standard library logs what `fn` raises by a logger of its own: where a handler of that raises, the
            # callbacks behind it, among them those that wake coroutines, would never be called.
            try:
                fn(future)
            except Exception:
                log.exception("exception calling callback of the future of %s", future.node)

        super().add_done_callback(call)

    def take_back(self) -> None:
        """Note that its end was asked for: it comes, also to a job that is only scheduled."""
        self._taken_back = True

    @property
    def begun(self) -> bool:
        """Whether its end will come without a `resume()`."""
        return self._admission.given or self._taken_back

    def cancelled(self) -> bool:
        """Whether the job was aborted, by `cancel()` or otherwise."""
        return self.done() and isinstance(super().exception(0), Aborted)

    def _await(self, timeout: object) -> None:
        """Wait until the job has its outcome; in the task's own thread, handlers run meanwhile.

        Raises:
            TimeoutError: it has none after `timeout` seconds.
        """
        limit = patience("timeout", timeout, past=True)
        if self.done():
            return
        self.watched = True
        until = None if limit is None else time.monotonic() + limit
        waited = self.task.wait_for(self.done, until, begun=self.begun)
        if waited is None:
            waited = bool(concurrent.futures.wait([self], limit).done)
        if not waited:
            raise TimeoutError(f"{self.node}: not ended within {limit:g} s; the job goes on")

    def __repr__(self) -> str:
        node = printable(str(self.node))
        if not self.done():
            return f"<Future {node} {'running' if self.running() else 'queued'}>"
        error = super().exception(0)
        return f"<Future {node} {error!r}>" if error is not None else f"<Future {super().result(0)!r}>"


class DoneAndNotDone(NamedTuple):
    """What `wait` returns, as the standard's does."""

    done: set[Future]
    not_done: set[Future]


def wait(
    futures: Iterable[Future],
    timeout: float | None = None,
    return_when: str = concurrent.futures.ALL_COMPLETED,
) -> DoneAndNotDone:
    """As `concurrent.futures.wait`: return (done, not done); in the task's own thread, handlers run meanwhile.

    Args:
        futures: of one task; where they are of several, it waits without running handlers.
        timeout: seconds; 0 only looks, None and infinity wait as long as it takes.

    Raises:
        ValueError: `return_when` is none of the standard's three, or `timeout` no number.
    """
    limit = patience("timeout", timeout, past=True)
    if return_when not in _WHEN:
        raise ValueError(f"return_when is one of {', '.join(_WHEN)}, not {return_when!r}")
    fs = set(futures)
    ended = _Ended(fs)

    def enough() -> bool:
        if return_when == concurrent.futures.FIRST_COMPLETED and ended.futures:
            return True
        if return_when == concurrent.futures.FIRST_EXCEPTION and ended.failed:
            return True
        return len(ended.futures) == len(fs)

    with ended:
        waited = not fs or ended.wait_for(enough, limit, some=return_when == concurrent.futures.FIRST_COMPLETED)
    if waited is None:
        concurrent.futures.wait(fs, limit, return_when)
    done = {future for future in fs if future.done()}
    return DoneAndNotDone(done, fs - done)


def as_completed(futures: Iterable[Future], timeout: float | None = None) -> Iterator[Future]:
    """As `concurrent.futures.as_completed`; in the task's own thread, handlers run meanwhile.

    Args:
        futures: of one task; where they are of several, it waits without running handlers.
        timeout: seconds for all; 0 gives those that have ended.

    Raises:
        TimeoutError: not all have ended `timeout` seconds after the first call of `next()`.
    """
    return _as_completed(set(futures), patience("timeout", timeout, past=True))


def _as_completed(fs: set[Future], timeout: float | None) -> Iterator[Future]:
    ended = _Ended(fs)
    until = None if timeout is None else time.monotonic() + timeout
    with ended:
        for count in range(len(fs)):
            left = None if until is None else max(0.0, until - time.monotonic())
            waited = ended.wait_for(lambda: bool(ended.futures), left)
            if waited is None:
                for other in concurrent.futures.as_completed(fs.difference(ended.given), left):
                    assert isinstance(other, Future)
                    yield other
                return
            if not waited:
                raise TimeoutError(f"{len(fs) - count} jobs have not ended within {timeout:g} s; they go on")
            future = ended.futures.popleft()
            ended.given.add(future)
            yield future


class _Ended:
    """Counts the futures of a set as they end: looking at all of them for each would be quadratic.

    A context manager: it takes back what it has asked of futures, since a program may wait for them again and again.
    """

    def __init__(self, futures: set[Future]) -> None:
        #: in the order of their ends; appended to by the dispatcher, and for what has ended already by who waits
        self.futures: deque[Future] = deque()
        self.failed = False
        self.given: set[Future] = set()
        tasks = {id(future.task): future.task for future in futures}
        self._task = next(iter(tasks.values())) if len(tasks) == 1 else None
        self._all = futures
        self._seen: dict[Future, object] = {}
        self._begun: bool | None = None

    def __enter__(self) -> Self:
        for future in self._all:
            future.watched = True
            future.told.append(self._add)
            if future.done():
                self._add(future)
        return self

    def __exit__(self, *_: object) -> None:
        for future in self._all:
            future.told.remove(self._add)

    def _add(self, future: Future) -> None:
        # Both threads may come by with the same future; setdefault lets one of them through.
        mine = object()
        if self._seen.setdefault(future, mine) is mine:
            self.failed = self.failed or concurrent.futures.Future.exception(future, 0) is not None
            self.futures.append(future)

    def wait_for(self, done: Callable[[], bool], timeout: float | None, *, some: bool = False) -> bool | None:
        if self._task is None:
            return None if self._all else True
        until = None if timeout is None else time.monotonic() + timeout
        # Looked at once and not before each: 10,000 futures are not to be looked at 10,000 times.
        if self._begun is None:
            self._begun = (any if some else all)(future.begun for future in self._all)
        return self._task.wait_for(done, until, begun=self._begun)
