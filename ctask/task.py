# SPDX-License-Identifier: Apache-2.0
"""The Task: the object of one thread, with its dispatcher, its pool, its mailbox and the workers of its run.

Its public methods may be called in any thread; those that wait pump in the owner's only.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import os
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import Any, overload

from ctask import gather
from ctask.buffers import MemoryBudget
from ctask.dispatcher import LATE
from ctask.ending import ABORT_WITHIN, DEADLINE_WITHIN
from ctask.engine import CLOSED, Engine
from ctask.errors import (
    Aborted,
    AlreadyRunningError,
    CommandTimeout,
    Curable,
    NodeError,
    OptionError,
    TaskError,
    TaskTimeout,
    WrongThread,
)
from ctask.job import Job
from ctask.nodes import NodesLike
from ctask.numeric import limit, patience
from ctask.options import Options, Target
from ctask.ownthread import OwnThread
from ctask.roster import Roster, all_closed
from ctask.states import Outcome
from ctask.submission import GIVEN_NOT, CommandLike, Stdin, Submitter, node_set, read_once
from ctask.threads import begin as begin_thread
from ctask.transports import in_use
from ctask.worker import Worker

__all__ = ["Task", "task_self"]

#: Seconds after which a run returns when its deadline has passed, or after Ctrl-C.
RETURN_WITHIN = 1.0

_numbers = itertools.count(1)
_local = threading.local()
_tasks: weakref.WeakSet[Task] = weakref.WeakSet()
#: what the ends of threads call
_endings: set[weakref.finalize[[], _Sentinel]] = set()


def task_self() -> Task:
    """Return the task of the calling thread, made at the first call."""
    ref: weakref.ref[Task] | None = getattr(_local, "task", None)
    task = ref() if ref is not None else None
    if task is None or task.failed:
        task = _local.kept = Task(_thread=threading.current_thread())
        _local.task = weakref.ref(task)
        # The thread's end drops what is local to it: then the task ends what still runs, and its threads.
        _local.sentinel = sentinel = _Sentinel()
        ending = weakref.finalize(sentinel, task.close, deliver=False)
        ending.atexit = False
        _endings.difference_update([one for one in list(_endings) if not one.alive])
        _endings.add(ending)
    return task


class _Sentinel:
    """Lives as long as a thread."""


class Task(gather.Gathered):
    """Runs commands on many nodes, for the thread that it belongs to; `task_self()` returns it.

    `Task()` makes one with a thread of its own: `run()` and `resume()` then return at once, and `join()` waits.
    Results are those of the current run: of the workers that `resume()` or `run()` began or took in. Dropping a task
    that has nothing to run any more ends its threads.

    Attributes:
        thread: the thread that owns it: handlers run there.

    Thread safety: every method may be called in any thread; `run`, `resume` and `join` say what they do elsewhere than
    in the owner's.
    """

    def __init__(self, *, _thread: threading.Thread | None = None) -> None:
        self._number = next(_numbers)
        self._name = f"ctask-{self._number}"
        self._options = Options()
        self._budget = MemoryBudget(self._options.get("output_memory"))
        self._engine = Engine(self._name, self._options.get("fanout"), self._options.get("queue_limit"))
        self._mailbox = self._engine.mailbox
        self._submitter = Submitter(self._engine.run, self._options, self._budget)
        self._roster = Roster()
        self._engine.scheduled = partial(_scheduled, weakref.ref(self._roster))
        self._closed = False
        # It is the parent's, and this process was forked.
        self._foreign = False
        self._unsettled: list[Worker] = []
        self._own: OwnThread[Worker] | None = None
        if _thread is None:
            begin = partial(setattr, _local, "task", weakref.ref(self))
            self._own = OwnThread(self._name, self, self._mailbox, begin, self._engine.fail)
            _thread = self._own.thread
        self.thread = _thread
        _tasks.add(self)
        weakref.finalize(self, _dropped, self._engine, self._own).atexit = False
        if self._own is not None:
            begin_thread(self._own.thread)

    # -- options ---------------------------------------------------------------------------------------------

    def info(self, name: str, default: Any = None) -> Any:
        """Return an option of the task: what was set, else ctask's default, else `default`."""
        return self._options.get(name, default)

    def set_info(self, name: str, value: Any) -> None:
        """Set an option of the task: `fanout`, the timeouts, `user`, `identity` and so on.

        Names that begin with `USER_` are the program's own. Takes effect for what is submitted from now on; the
        fan-out at once.

        Raises:
            OptionError: no such option, or no such value.
        """
        own, parsed = self._options.set(name, value)
        if own == "fanout":
            self._engine.set_fanout(parsed)
        elif own == "queue_limit":
            self._engine.gate.limit = parsed
        elif own == "output_memory":
            self._budget.limit = parsed

    default = info  # ClusterShell keeps two tables; here they are one
    set_default = set_info

    def node_options(self, nodes: NodesLike, **options: object) -> None:
        """Set options of single nodes; later calls win, option by option, and an option of a call wins over it.

        Args:
            nodes: a node set, or names.
            options: `user port address identity known_hosts host_key_policy connect_timeout timeout
                drain_timeout stop stop_grace stop_by keep alive_interval fresh transport`.

        Raises:
            OptionError: no such option of a node, or no such value.
        """
        self._options.set_nodes(node_set(nodes), options)

    # -- submitting ------------------------------------------------------------------------------------------

    def shell(
        self,
        command: CommandLike,
        *,
        nodes: NodesLike = GIVEN_NOT,
        key: Hashable = None,
        handler: object = None,
        stdin: Stdin = GIVEN_NOT,
        expect: int | None = None,
        allow_empty: bool = False,
        **options: object,
    ) -> Worker:
        """Schedule a command; `resume()` runs it. While a run is under way it starts at once, as a part of it.

        Args:
            command: text or bytes for a shell, or a list of words.
            nodes: a node set, or names; left out altogether, the command is a local one.
            key: label of a local command.
            handler: an object with `ev_…` methods; functions go as `on_read=…`, see `Callbacks`.
            stdin: True: open until `set_write_eof()`; False: at its end from the start; or bytes, a path, a file
                object (read now), a function of the node that returns one of these. Left out: closed when the job
                starts, unless `write()` or `set_write_eof()` was called before, or there is a handler or callback,
                which may write. (In a handler, `shell()` starts at once: there it is closed when the handler returns
                or waits, unless it has written.)
            expect: refuse any other number of nodes.
            allow_empty: an empty node set is no error.
            options: of this call; they win over `node_options` and `set_info`.

        Raises:
            UsageError: something in it cannot be right; nothing was sent.
        """
        worker = self._make(command, nodes, key, handler, stdin, expect, allow_empty, options)
        try:
            if not self._roster.running:
                self._roster.schedule(worker)
                if self._closed or self._engine.dispatcher.error is not None:
                    self._start_scheduled()  # meanwhile: nobody would take it from there
            elif stdin is GIVEN_NOT and self._mailbox.busy and threading.current_thread() is self.thread:
                self._unsettled.append(worker)
                self._start(worker, may_write=True)
                self._mailbox.after(self._settle)
            else:
                self._start(worker)
            return worker
        except BaseException:
            self._take_back([worker])
            raise

    def _settle(self) -> None:
        """The handler has returned, or waits: what it has not written to by now, it leaves closed. Owner."""
        while self._unsettled:
            self._unsettled.pop().settle()

    def submit(
        self,
        command: CommandLike,
        *,
        nodes: NodesLike = GIVEN_NOT,
        key: Hashable = None,
        handler: object = None,
        stdin: Stdin = False,
        expect: int | None = None,
        allow_empty: bool = False,
        **options: object,
    ) -> Worker:
        """Start a command at once, whether anybody pumps or not; arguments as for `shell`.

        Standard input is closed unless it is asked for. Never waits.
        """
        worker = self._make(command, nodes, key, handler, stdin, expect, allow_empty, options)
        try:
            self._start(worker)
            return worker
        except BaseException:
            self._take_back([worker])
            raise

    @overload
    def run(self, command: None = None, *, deadline: float | None = None, timeout: float | None = None) -> None: ...
    @overload
    def run(
        self, command: CommandLike, *, deadline: float | None = None, check: bool = False, **arguments: Any
    ) -> Worker: ...
    def run(
        self,
        command: CommandLike | None = None,
        *,
        deadline: float | None = None,
        check: bool = False,
        **arguments: Any,
    ) -> Worker | None:
        """Schedule a command, if one is given, and run all that is scheduled: `shell()` and `resume()`.

        Args:
            deadline: seconds for the whole run.
            check: raise `JobsFailed` at the end if a job of this command was not ok.
            arguments: as for `shell`; `timeout` is of the command, without one it is the deadline.

        Raises:
            UsageError: something in it cannot be right; nothing was sent.
            TaskTimeout: the deadline has passed.
            HandlerError: handlers raised; the run went on to its end.
        """
        if command is None:
            if "timeout" in arguments:
                deadline = arguments.pop("timeout")
            if arguments:
                raise OptionError(f"without a command there is no {', '.join(arguments)}")
            self.resume(deadline)
            return None
        limit("deadline", deadline)
        self._may_run("run")
        worker = self._make_for_shell(command, **arguments)
        self._resume(deadline, worker)
        if check:
            worker.check()
        return worker

    def _make_for_shell(
        self,
        command: CommandLike,
        *,
        nodes: NodesLike = GIVEN_NOT,
        key: Hashable = None,
        handler: object = None,
        stdin: Stdin = GIVEN_NOT,
        expect: int | None = None,
        allow_empty: bool = False,
        **options: object,
    ) -> Worker:
        return self._make(command, nodes, key, handler, stdin, expect, allow_empty, options)

    def _make(
        self,
        command: CommandLike,
        nodes: NodesLike,
        key: Hashable,
        handler: object,
        stdin: Stdin,
        expect: int | None,
        allow_empty: bool,
        options: dict[str, object],
    ) -> Worker:
        self._mailbox.check()
        if self._closed:
            raise TaskError(CLOSED)
        return self._submitter.make(
            self,
            command,
            nodes=nodes,
            key=key,
            handler=handler,
            stdin=read_once(stdin),
            expect=expect,
            allow_empty=allow_empty,
            arguments=options,
        )

    def _start(self, worker: Worker, *, may_write: bool = False) -> None:
        self._roster.started(worker, may_write=may_write)
        self._launch(worker)

    def _launch(self, worker: Worker) -> None:
        if worker.jobs:
            self._engine.submit(worker.jobs)
        else:
            worker.nothing()

    def _take_back(self, workers: Iterable[Worker]) -> None:
        """Ctrl-C, or what else a signal handler raises, came while they were started: they are never run, or ended."""
        for worker in workers:
            self._roster.unschedule(worker)
            worker.interrupt()

    def _start_scheduled(self) -> None:
        for worker in self._roster.scheduled():
            self._start(worker)
            self._roster.unschedule(worker)

    def refuse(self, scheduled: list[Worker]) -> None:
        """Begin what no run will begin: a task that has failed, or was closed, gives it its end. Any thread."""
        for worker in scheduled:
            self._start(worker)

    def let_go(self, worker: Worker) -> None:
        """See `ctask.worker.Owner`. Any thread."""
        self._roster.let_go(worker)

    # -- running ---------------------------------------------------------------------------------------------

    def resume(self, deadline: float | None = None) -> None:
        """Run what is scheduled, and wait for it and for what was submitted and has not ended.

        In another thread than the task's own: start it, wake the owner, and return.

        Args:
            deadline: seconds after which all that has not ended is ended, with the outcome `TIMEOUT`.

        Raises:
            TaskTimeout: the deadline has passed; results are kept.
            HandlerError: handlers raised; the run went on to its end.
            TaskError: the task itself has failed; every node has its result all the same.
            AlreadyRunningError: inside a handler of this task.
        """
        self._resume(deadline)

    def _resume(self, deadline: float | None, *workers: Worker) -> None:
        try:
            seconds = limit("deadline", deadline)
            self._mailbox.check()
            self._may_run("resume")
            if threading.current_thread() is self.thread:
                self.execute(seconds, [*self._roster.scheduled(), *workers])
            else:
                self._ask(seconds, [*self._roster.scheduled(), *workers])
        except Exception:
            raise
        except BaseException:  # Ctrl-C, wherever it came: what was to run now does not run later
            left = [*self._roster.scheduled(), *workers]
            if threading.current_thread() is self.thread and not self._mailbox.busy:
                self._interrupted(left)
            else:
                self._take_back(left)
            raise

    def join(self, deadline: float | None = None) -> bool:
        """Wait until all that was started has ended; its workers are a run as well.

        Returns False when `deadline` seconds have passed before: nothing is ended then, and the next `join()` goes on
        with the same run. 0 only looks; None and infinity wait as long as it takes. Of a task with a thread of its own
        it raises what its runs have raised since the last `join()`, when all of them are over.

        Raises:
            TaskError: the task itself has failed.
            TaskTimeout: the deadline of a run that was asked for has passed.
            HandlerError: handlers raised.
        """
        seconds = patience("deadline", deadline)
        until = None if seconds is None else time.monotonic() + seconds
        if threading.current_thread() is self.thread and not self._mailbox.busy:
            try:
                self._roster.begin(goes_on=True)
                done = self._mailbox.pump(self._roster.all_closed(), until)
                self._roster.end(joined=done)
            except BaseException:
                self._roster.end(joined=False)
                raise
            self._mailbox.raise_errors()
            return done
        workers = self._roster.unfinished()
        waiting = [future for worker in workers for future in worker.futures.values()]
        waited = self.wait_for(lambda: all(future.done() for future in waiting), until)
        if waited is not None:
            return waited
        left = None if until is None else max(0.0, until - time.monotonic())
        if self._own is not None and not self._own.wait(all_closed(workers), left):
            return False
        left = None if until is None else max(0.0, until - time.monotonic())
        done = not concurrent.futures.wait(waiting, left).not_done
        self._mailbox.check()
        if self._own is not None:
            self._own.raise_error()
        return done

    def abort(self) -> None:
        """End all that runs, and all that is scheduled: within 2 s every job has its outcome, `ABORTED`.

        What runs on the nodes is ended by the option `stop`. Never waits; safe in any thread, in handlers, and in
        signal handlers. The task can be used again.
        """
        self._abort(ABORT_WITHIN)

    def _abort(self, within: float) -> None:
        self._start_scheduled()
        self._engine.stop(Outcome.ABORTED, Aborted(), within)

    def _may_run(self, what: str) -> None:
        if threading.get_ident() == self._engine.dispatcher.ident:
            raise WrongThread(f"{what}() in a done-callback, which may not wait")
        if threading.current_thread() is self.thread and (self._mailbox.busy or self._roster.running):
            raise AlreadyRunningError(
                f"{what}() inside a handler: this task is already running. Use task.shell() or task.submit() here."
            )

    def execute(self, limit: float | None, workers: list[Worker]) -> None:
        """One run. Owner."""
        self._mailbox.errors = []
        try:
            finished = self._performed(limit, workers)
        except BaseException:
            # Ctrl-C, or a handler that wants out, wherever in the run it came: all is ended, and who waits is told.
            try:
                self._interrupted(workers)
            finally:
                self._roster.end()
            raise
        if not finished:
            text = f"the run's deadline of {limit:g} s has passed; results so far are kept"
            raise TaskTimeout(text) from self._mailbox.take_errors()
        self._mailbox.raise_errors()

    def _performed(self, limit: float | None, workers: list[Worker]) -> bool:
        until = None if limit is None else time.monotonic() + limit
        for worker in self._roster.begin(workers):
            self._launch(worker)
        done = self._roster.all_closed()
        finished = self._mailbox.pump(done, until) or self._finished_before(until, done)
        if not finished:
            error = CommandTimeout(f"deadline of {limit:g} s passed", curable=Curable.NEVER)
            self._end_run(error, Outcome.TIMEOUT, done)
        self._roster.end()
        return finished

    def _interrupted(self, workers: list[Worker]) -> None:
        """End all, and have the ends told; what handlers start on being told of them is taken back."""
        left = [one for one in (*self._roster.unfinished(), *workers) if not one.closed]
        # What was sent is ended by this. Firmware is not killed for it.
        self._engine.stop(Outcome.ABORTED, Aborted("interrupted"), DEADLINE_WITHIN, "term")
        self._take_back(left)
        self._mailbox.pump(lambda: all(one.closed for one in left), time.monotonic() + RETURN_WITHIN)
        self._take_back([*self._roster.scheduled(), *self._roster.unfinished()])

    def _finished_before(self, until: float | None, done: Callable[[], bool]) -> bool:
        """Whether it turns out, where a deadline is noticed late, that all had ended before."""
        now = time.monotonic()
        if until is None or now - until <= LATE:
            return False
        self._mailbox.pump(self._engine.settle(), now + RETURN_WITHIN)
        self._mailbox.turn(LATE)
        return done()

    def _end_run(self, error: NodeError, outcome: Outcome, done: Callable[[], bool]) -> None:
        self._engine.stop(outcome, error, DEADLINE_WITHIN)
        self._mailbox.pump(done, time.monotonic() + RETURN_WITHIN)

    def wait_for(
        self,
        done: Callable[[], bool],
        until: float | None,
        heard: Callable[[], bool] | None = None,
        *,
        begun: bool = True,
    ) -> bool | None:
        """See `ctask.future.Waiting`; where handlers can run meanwhile, wait for `heard()` in place of `done()`."""
        looks = until is not None and until <= time.monotonic()
        if threading.get_ident() == self._engine.dispatcher.ident:
            if looks:
                return done()
            raise WrongThread("this would wait in a done-callback, which runs in the dispatcher")
        if threading.current_thread() is not self.thread:
            if self._foreign and not done():
                self._mailbox.check()  # nothing would ever come
            return None
        if not (begun or looks or done()):
            raise TaskError("this is scheduled and does not run yet, so its end would never come: call resume()")
        if self._unsettled:
            self._settle()
        mailbox = self._mailbox
        if heard is None or mailbox.busy:
            return mailbox.pump(done, until)
        # What has ended by the deadline is heard as well: all that is left are calls of handlers.
        return mailbox.pump(heard, until) or (done() and mailbox.pump(heard))

    def _ask(self, limit: float | None, workers: list[Worker]) -> None:
        """Have the owner run these workers; where its thread is not ours, start them."""
        try:
            for worker in workers:
                self._roster.unschedule(worker)
                if self._own is None:
                    self._start(worker)
            if self._own is not None:
                self._own.ask(limit, workers)
        except BaseException:
            self._take_back(workers)
            raise
        self._mailbox.wake()

    def _sources(self) -> Sequence[gather.Source]:
        return self._roster.view()

    @property
    def workers(self) -> list[Worker]:
        """The workers of the current run that the program or the task still holds."""
        return self._roster.view()

    def unfinished(self) -> list[Worker]:
        """Return what was started and has not ended, or not been delivered. Any thread."""
        return self._roster.unfinished()

    def running(self) -> bool:
        """Whether a run is under way."""
        return self._roster.running

    @property
    def failed(self) -> bool:
        """Whether the task itself has ended by an error; `task_self()` makes a new one then."""
        return self._mailbox.failure is not None

    def disconnect(self, nodes: NodesLike | None = None) -> None:
        """Close the kept connections to these nodes, or all; one that is in use is closed after its last job.

        Whatever user and other options they were made with; a node is its address and port here.
        """
        targets: list[Target] | None = None
        if nodes is not None:
            call = self._options.call({})
            targets = [call.resolve(node)[0] for node in node_set(nodes)]
        for name, way in in_use().items():
            disconnect = getattr(way, "disconnect", None)
            if disconnect is not None:
                disconnect(None if targets is None else {one for one in targets if one.transport == name})

    def close(self, *, deliver: bool = True, within: float = ABORT_WITHIN) -> None:
        """End everything and the task's threads. Any thread; at the end of the owner's nothing is delivered.

        Args:
            within: seconds after which every job has its outcome.
        """
        self._closed = True
        if not deliver:
            self._mailbox.silence()
        self._abort(within)
        _dropped(self._engine, self._own)

    def disown(self, error: BaseException) -> None:
        """Refuse everything from now on: none of its threads lives in this process."""
        self._closed = self._foreign = True
        self._mailbox.silence()
        self._mailbox.fail(error)

    def closing(self, timeout: float) -> bool:
        """Wait for the threads after `close()`; return whether they have ended."""
        until = time.monotonic() + timeout
        ended = self._engine.closing(timeout)
        if self._own is not None and threading.current_thread() is not self.thread:
            self.thread.join(max(0.0, until - time.monotonic()))
        return ended

    def __repr__(self) -> str:
        workers = self.workers
        left = sum(1 for worker in workers if not worker.done())
        state, plan = "running" if self._roster.running else "idle", self._engine.plan
        return (
            f"<Task {self._number} of {self.thread.name}: {state}, {len(workers)} workers ({left} not ended), "
            f"fan-out {plan.fanout}, {plan.slots} slots taken, {plan.dialing} dialing>"
        )


def _dropped(engine: Engine, own: OwnThread[Worker] | None) -> None:
    """End a task's threads. Any thread, the garbage collector too: it only posts."""
    engine.close()  # first: what its thread has not begun by then is refused
    if own is not None:
        own.close()


def _scheduled(roster: weakref.ref[Roster]) -> list[Sequence[Job]]:
    """Take the jobs of what is only scheduled. The engine asks, which must not hold the task."""
    found = roster()
    return [worker.jobs for worker in found.take_scheduled()] if found is not None else []


def all_tasks() -> list[Task]:
    """Return the tasks of this process."""
    return list(_tasks)


def forget_tasks() -> None:
    """Let `task_self()` make new ones; the threads of the old ones have ended."""
    for ending in _endings:
        ending.detach()
    _endings.clear()
    _tasks.clear()
    _local.__dict__.clear()


def _forked() -> None:
    # The child has none of the threads, and begins with no task. Who waits here for the parent's would wait for ever.
    for one in all_tasks():
        one.disown(TaskError("what it runs is the parent's: this process was forked"))
    forget_tasks()


os.register_at_fork(after_in_child=_forked)
