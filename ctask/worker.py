# SPDX-License-Identifier: Apache-2.0
"""One submitted command on a set of nodes: its futures, its events, its standard input, its results.

Made in the thread that submits. Its jobs and their ends are the dispatcher's; `_closed` and the line that is being
delivered are the owner's; everything else is read by anybody.
"""

from __future__ import annotations

import concurrent.futures
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType, TracebackType
from typing import Any, Protocol, Self

from ctask import gather
from ctask.buffers import BufferStore, Output
from ctask.ending import ABORT_WITHIN
from ctask.errors import Aborted, OptionError, TaskError
from ctask.failures import named
from ctask.feed import Feed
from ctask.future import Admission, Future
from ctask.handler import Handlers
from ctask.job import Job
from ctask.nodes import NodeSet
from ctask.numeric import patience
from ctask.result import Group, NodeResult
from ctask.runtime import Jobs, Runtime
from ctask.states import Outcome

__all__ = ["Owner", "Worker"]

log = logging.getLogger("ctask.worker")


class Owner(Protocol):
    """The task, as far as its workers need it."""

    def let_go(self, worker: Worker) -> None:
        """It has ended, and its events are delivered: it lives as long as the program holds it."""

    def wait_for(
        self,
        done: Callable[[], bool],
        until: float | None,
        heard: Callable[[], bool] | None = None,
        *,
        begun: bool = True,
    ) -> bool | None: ...


class Worker(gather.Gathered):
    """One command on many nodes; made by `Task.shell`, `run` and `submit`.

    Iterating over it gives its futures. As a context manager it waits on leaving, and aborts when an exception leaves
    the block. Dropping it frees its output; results that the program keeps, keep their own.

    Under asyncio, `await worker` returns all results in the order of the nodes, and `async for result in worker` gives
    each as it ends; neither raises for a node. They leave the loop to others; where its thread is the task's own, the
    handlers run there meanwhile. Cancelling what awaits only stops the waiting; `async with worker:` is as `with`.

    Attributes:
        number: counts the workers of the task, from 1.
        command: what was submitted, as text.
        futures: node -> `Future`, in the order in which they start; read-only.
        task: the task.

    Thread safety: every method may be called in any thread; the waits pump in the owner's.
    """

    def __init__(
        self,
        task: Any,
        run: Runtime,
        number: int,
        command: str,
        *,
        remote: bool,
        apart: bool,
        ok_codes: frozenset[int],
        handlers: Handlers,
        store: BufferStore,
        may_open: bool = False,
    ) -> None:
        self.task = task
        self.number = number
        self.command = command
        self.remote = remote
        self.apart = apart
        self.ok_codes = ok_codes
        self.handlers = handlers
        self.store = store
        self._futures: dict[Any, Future] = {}
        # Read-only for the program: what it took out would be missing from every account.
        self.futures: Mapping[Any, Future] = MappingProxyType(self._futures)
        self.admission = Admission()
        self._nodes: Any = []
        self.last: tuple[Any, str, Output] = (None, "stdout", Output(b""))
        self.last_rc: int | None = None
        self._run = run
        # Standard input was not spoken of: it is opened by writing to it, or for handlers, until the jobs are admitted.
        self._may_open = may_open
        self._settled = False
        self._jobs: tuple[Job, ...] = ()
        self._future_of: dict[Job, Future] = {}
        # In the order of their ends; the dispatcher appends.
        self._ended: list[NodeResult] = []
        self._started = False
        self._closed = False
        self._watched = False
        # Called by the dispatcher after each end; put in and taken out by coroutines of other threads' loops.
        self._told: list[Callable[[], None]] = []
        self._began_at = time.monotonic()
        self._closed_at: float | None = None

    # -- made by the task ------------------------------------------------------------------------------------

    def assign(self, jobs: Sequence[Job], nodes: Any) -> None:
        """Take the jobs in the order in which they are to start. Once, before anything is submitted."""
        self._jobs = tuple(jobs)
        self._nodes = nodes
        for job in self._jobs:
            future = Future(self.task, job.node, partial(_cancel, job), self.admission)
            # By the job as well: what a program's keys do when they are compared is not for the dispatcher to bear.
            self._future_of[job] = self._futures[job.node] = future

    def admit(self, *, may_write: bool = False) -> None:
        """Its jobs are on their way: decide about the standard input that was not spoken of.

        It stays closed, unless it was written to or ended by now, or there are handlers, which may write.

        Args:
            may_write: a handler has just submitted it, and may write until it returns: `settle()` follows then.
        """
        with self.admission.lock:
            self.admission.given = True
            if self._may_open and (self.handlers or may_write):
                for job in self._jobs:
                    self._open(job)

    def settle(self) -> None:
        """End the standard input of all jobs that were admitted with `may_write` and not written to."""
        if self.handlers:  # they were registered since, and may write
            return
        with self.admission.lock:
            self._settled = True
            unused = [job for job in self._jobs if job.feed is not None and not job.feed.written]
        self._end_input(unused)

    def _end_input(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self._run.post(job, job.write, None)

    @staticmethod
    def _open(job: Job) -> Feed:
        if job.feed is None:
            retry = job.limits.retry
            job.open_stdin(Feed(again=retry is not None and retry.idempotent))
            assert job.feed is not None
        return job.feed

    @property
    def nodes(self) -> Any:
        """A copy of the NodeSet; for a local command a list with its key."""
        return self._nodes.copy()

    @property
    def jobs(self) -> Sequence[Job]:
        """Its jobs, in the order in which they start."""
        return self._jobs

    @property
    def cells(self) -> Sequence[gather.Cell]:
        """The same, as the views look at them."""
        return self._jobs

    def _sources(self) -> Sequence[gather.Source]:
        return (self,)

    def nothing(self) -> None:
        """It has no jobs: tell its start and its end, as of any other. Any thread."""
        self._run.post(None, self._nothing)

    def _nothing(self) -> None:
        self.starts()
        self._last_ended()
        self._run.mailbox.wake()

    def interrupt(self) -> None:
        """End what has not ended, also what was not submitted yet, as Ctrl-C does: with TERM at most. Never waits."""
        if not self.done():
            self._end(self._jobs, "term")

    # -- told by its jobs; dispatcher ------------------------------------------------------------------------

    def starts(self) -> None:
        """The first of its jobs is taken up, or ended while it waited."""
        if not self._started:
            self._started = True
            self._run.mailbox.started(self)

    def began(self, job: Job) -> None:
        """A job is taken up."""
        self.starts()
        self._run.mailbox.picked_up(self, job.node)
        self._future_of[job].set_running_or_notify_cancel()

    def ended(self, job: Job, result: NodeResult) -> None:
        """A job has its outcome."""
        last = len(self._ended) + 1 == len(self._jobs)
        try:
            if last:
                self._last_ended()
        finally:
            self._resolve(self._future_of[job], result, last=last)

    def _last_ended(self) -> None:
        self.store.close()
        # A worker that nobody listens to is closed now: a program that never pumps keeps nothing of it.
        if self.handlers:
            self._run.mailbox.closed(self, self._close)
        else:
            self._close()

    def _resolve(self, future: Future, result: NodeResult, *, last: bool) -> None:
        try:
            if not future.running():
                future.set_running_or_notify_cancel()
            if result.error is not None:
                future.set_exception(result.error)
            else:
                future.set_result(result)
        finally:
            # After the future: who was told of the result finds the future done. Also where a done-callback wants out.
            self._ended.append(result)
            for told in tuple(future.told):
                told(future)
            if last or future.watched or self._watched:
                self._run.mailbox.wake()
            for tell in tuple(self._told):
                tell()

    def _close(self) -> bool:
        self._closed = True
        self._closed_at = time.monotonic()
        self.task.let_go(self)
        return self.did_timeout()

    # -- waiting ---------------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether every job has its outcome and its events were delivered."""
        return (self._closed or self._run.mailbox.over or not (self._jobs or self.admission.given)) and self.done()

    def done(self) -> bool:
        """Whether every job has its outcome."""
        return len(self._ended) == len(self._jobs)

    def wait(self, deadline: float | None = None) -> bool:
        """Wait until every job has its outcome; return False when `deadline` seconds have passed before.

        In the task's own thread its handlers have been called by then, unless it is a handler that waits. Only
        waits: neither the deadline nor Ctrl-C ends a job. 0 only looks; None and infinity wait as long as it takes.

        Raises:
            TaskError: in the task's own thread, the command is only scheduled: call `resume()`.
        """
        limit = patience("deadline", deadline)
        until = None if limit is None else time.monotonic() + limit
        waited = self.task.wait_for(self.done, until, lambda: self.closed, begun=self._begun())
        if waited is None:
            # A future is done a moment before `done()` counts it.
            return not concurrent.futures.wait(self.futures.values(), limit).not_done
        return bool(waited)

    def _begun(self) -> bool:
        return self.admission.given or all(future.begun for future in self.futures.values())

    def check(self) -> None:
        """Wait until every job has its outcome; return if all have ended well.

        Raises:
            JobsFailed: the folded failures.
        """
        if not self.done():
            self.wait()
        super().check()

    def results(self, timeout: float | None = None) -> Iterator[NodeResult]:
        """Yield each node's `NodeResult` as it ends; never raises for a node.

        Args:
            timeout: seconds that each result may take after the one before was given, and the first from the first
                `next()`. 0 only looks; None and infinity wait as long as it takes.

        Raises:
            TimeoutError: while iterating: that time has passed. What runs goes on, and another call begins anew.
            TaskError: in the task's own thread, the command is only scheduled: call `resume()`.
        """
        return self._results(patience("timeout", timeout))

    def _results(self, limit: float | None) -> Iterator[NodeResult]:
        self._watched = True
        given = 0
        while given < len(self._jobs):
            until = None if limit is None else time.monotonic() + limit
            while given == len(self._ended):
                if not self._another(given, until):
                    left = len(self._jobs) - given
                    raise TimeoutError(f"no result within {limit:g} s; {left} jobs have not ended, and go on")
            yield self._ended[given]
            given += 1

    def _another(self, given: int, until: float | None) -> bool:
        """Wait until more than so many jobs have their outcome; False: not by then."""
        begun = self._begun()
        if self.task.wait_for(lambda: len(self._ended) > given, until, begun=begun) is None:
            left = None if until is None else max(0.0, until - time.monotonic())
            pending = [future for future in self.futures.values() if not future.done()]
            concurrent.futures.wait(pending, left, concurrent.futures.FIRST_COMPLETED)
        return len(self._ended) > given or until is None or time.monotonic() < until

    def result(self, node: Any, timeout: float | None = None) -> NodeResult:
        """Return a node's result, waiting for it at most `timeout` seconds (0 only looks).

        Raises:
            NodeError: the command could not be run to its end.
            TimeoutError: the time to wait is over; the job goes on.
            KeyError: the worker has no such node.
        """
        return self.futures[node].result(timeout)

    def __iter__(self) -> Iterator[Future]:
        return iter(self.futures.values())

    def __len__(self) -> int:
        return len(self.futures)

    def __bool__(self) -> bool:
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.wait()
        except BaseException as late:
            kind = type(late)
            raise
        finally:
            if kind is not None:
                self._left_by(kind)
                self.wait()

    def _left_by(self, kind: type[BaseException]) -> None:
        # As for a run: Ctrl-C, which asyncio makes a cancellation, sends no KILL.
        self._end(self._jobs, "kill" if issubclass(kind, Exception) else "term")

    # -- under asyncio ---------------------------------------------------------------------------------------

    def __await__(self) -> Generator[Any, None, list[NodeResult]]:
        return self._awaited().__await__()

    async def _awaited(self) -> list[NodeResult]:
        own = threading.current_thread() is self.task.thread
        await self._wait_until((lambda: self.closed) if own else self.done)
        return [cell.result for cell in gather.in_order(self) if cell.result is not None]

    async def __aiter__(self) -> AsyncIterator[NodeResult]:
        self._watched = True
        for given in range(len(self._jobs)):
            await self._wait_until(lambda: len(self._ended) > given)  # noqa: B023 (awaited here)
            yield self._ended[given]

    async def _wait_until(self, done: Callable[[], bool]) -> None:
        from ctask import aio

        own = threading.current_thread() is self.task.thread
        if own and not done() and not self._begun():
            raise TaskError("this is scheduled and does not run yet: submit() in place of shell() starts at once")
        await aio.wait_until(done, mailbox=self._run.mailbox, owner=self.task.thread, told=self._told)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                await self
        except BaseException as late:
            kind = type(late)
            raise
        finally:
            if kind is not None:
                self._left_by(kind)
            if kind is not None and not issubclass(kind, GeneratorExit):  # a coroutine that is closed may not wait
                await self

    # -- steering --------------------------------------------------------------------------------------------

    def on(self, event: str, callback: Callable[..., object]) -> Self:
        """Add a callback for `start`, `pickup`, `read`, `hup`, `done` or `close`; return the worker.

        It hears what is delivered from now on; `read` from the first line where output is gathered.

        Raises:
            OptionError: no such event, or a function that does not take its arguments.
        """
        self.handlers.add(event, callback)
        return self

    def abort(self, nodes: Any = None) -> None:
        """End the jobs of these nodes, or of all; their outcome is `ABORTED` within 2 s. Never waits.

        Raises:
            KeyError: the worker has no such node.
        """
        self._end(self._chosen(nodes), "kill")

    def _end(self, jobs: Sequence[Job], at_most: str) -> None:
        for job in jobs:
            self._future_of[job].take_back()
        # One post: between several, what waits would begin in the slots of what was ended.
        self._run.post(Jobs(jobs), _abort_each, jobs, at_most)

    def withdraw(self) -> None:
        """End the jobs that have not begun; what is on its way to a node, or runs there, goes on. Never waits."""
        for future in self:
            future.take_back()
        self._run.post(Jobs(self._jobs), self._withdraw)

    def _withdraw(self) -> None:
        waiting = [job for job, future in self._future_of.items() if not (future.running() or future.done())]
        _abort_each(waiting, "kill")

    def write(self, data: bytes | str, nodes: Any = None) -> None:
        """Add to the standard input of these nodes' commands, or of all. Never waits.

        After `set_write_eof()`, and where the command has ended, it is harmless.

        Raises:
            OptionError: the standard input of one of them was closed when it started; nothing was written.
        """
        encoded = data.encode() if isinstance(data, str) else bytes(data)
        jobs = self._chosen(nodes)
        with self.admission.lock:
            for job in jobs:
                self._check_open(job)
            for job in jobs:
                self._open(job).written = True
        for job in jobs:
            self._run.post(job, job.write, encoded)

    def _check_open(self, job: Job) -> None:
        written = job.feed is not None and job.feed.written
        if self._settled and not written:
            raise OptionError("standard input was closed when the handler returned: say stdin=True to keep it open")
        if job.feed is None and (self.admission.given or not self._may_open):
            hint = " after its start" if self._may_open else ""
            raise OptionError(f"standard input is closed: submit with stdin=True to write to it{hint}")

    def set_write_eof(self, nodes: Any = None) -> None:
        """End the standard input after what was written; again is harmless. Never waits."""
        jobs = self._chosen(nodes)
        with self.admission.lock:
            if self._may_open and not self.admission.given:
                for job in jobs:
                    self._open(job)
        self._end_input(jobs)

    def _chosen(self, nodes: Any) -> Sequence[Job]:
        if nodes is None:
            return self._jobs
        wanted = set(NodeSet(nodes)) if self.remote else {nodes}
        missing = wanted.difference(self.futures)
        if missing:
            raise KeyError(f"no such node in this worker: {', '.join(sorted(map(str, missing)))}")
        return [job for job in self._jobs if job.node in wanted]

    def last_read(self) -> tuple[Any, Output]:
        """Return (node, line) of the line that is being delivered. In `ev_read`."""
        return self.last[0], self.last[2]

    # What handlers of ClusterShell's older signature, which are given the worker alone, ask for.

    @property
    def current_node(self) -> Any:
        """Node of the event that is being delivered."""
        return self.last[0]

    @property
    def current_msg(self) -> Output:
        """Line that is being delivered."""
        return self.last[2]

    @property
    def current_sname(self) -> str:
        """Stream of the line that is being delivered."""
        return self.last[1]

    @property
    def current_rc(self) -> int | None:
        """Exit status that is being delivered."""
        return self.last_rc

    # -- results ---------------------------------------------------------------------------------------------

    def groups(self) -> list[Group]:
        """Return every node in exactly one group, also those that printed nothing or never ran; largest first."""
        return gather.groups(self)

    def exit_code(self) -> int:
        """Return 0: all ok; 1: some exited otherwise or by a signal; 3: some not run, timed out, lost, not ended."""
        return gather.exit_code(job.result for job in self._jobs)

    @property
    def ok(self) -> Any:
        """Nodes that exited with a status in `ok_codes`."""
        return self._those(lambda result: result.ok)

    @property
    def failed(self) -> Any:
        """Nodes that ended and are not ok."""
        return self._those(lambda result: not result.ok)

    @property
    def unreached(self) -> Any:
        """Nodes that could not be reached."""
        return self._those(lambda result: result.outcome is Outcome.UNREACHED)

    @property
    def timedout(self) -> Any:
        """Nodes that timed out."""
        return self._those(lambda result: result.outcome is Outcome.TIMEOUT)

    @property
    def not_run(self) -> Any:
        """Ended nodes to which the command was never sent: safe to repeat."""
        return self._those(lambda result: result.ran is False)

    @property
    def pending(self) -> Any:
        """Nodes that have not ended."""
        return named((job.node for job in self._jobs if job.result is None), self.remote)

    def did_timeout(self) -> bool:
        """Whether any node timed out."""
        return any(job.result is not None and job.result.outcome is Outcome.TIMEOUT for job in self._jobs)

    def _those(self, wanted: Callable[[NodeResult], bool]) -> Any:
        chosen = (job.node for job in self._jobs if job.result is not None and wanted(job.result))
        return named(chosen, self.remote)

    def counts(self) -> str:
        """Return how the jobs stand, in a few words: ``89 exit 0 · 1 exit 1 · 1 running · 5 in trouble``."""
        return gather.counts(job.result for job in self._jobs)

    @property
    def elapsed(self) -> float:
        """Seconds since it was submitted; until its end where it has ended."""
        return (self._closed_at or time.monotonic()) - self._began_at

    def __repr__(self) -> str:
        shown = self.command if len(self.command) <= 40 else self.command[:39] + "…"
        nodes = f" {self._nodes} ({len(self._nodes)})" if self.remote else ""
        return f"<Worker {self.number} {shown!r}{nodes}: {self.counts()}, {self.elapsed:.1f} s>"


def _cancel(job: Job) -> None:
    """End one job, as its future asks for it. Any thread."""
    within = job.limits.stop.grace + ABORT_WITHIN
    job.run.post(job, job.stop, Outcome.ABORTED, Aborted("cancelled"), within)


def _abort_each(jobs: Sequence[Job], at_most: str) -> None:
    """End these jobs. Dispatcher."""
    for job in jobs:
        try:
            job.stop(Outcome.ABORTED, Aborted(), ABORT_WITHIN, at_most)
        except Exception as error:
            log.exception("aborting %r failed", job)
            job.broken(error)
