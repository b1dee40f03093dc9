# SPDX-License-Identifier: Apache-2.0
"""The engine of one task: plan, gate, mailbox, dispatcher and pool put together, and the plan's actions carried out.

Made by the Task in the owner's thread. What is marked so runs in the dispatcher; the rest may be called anywhere and
never waits, but for `closing`.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import resource
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NoReturn

from ctask.dispatcher import Dispatcher, Post
from ctask.ending import Batch, Endings
from ctask.errors import NodeError, TaskError, TaskFailed
from ctask.errors.text import told
from ctask.gate import Gate
from ctask.interpreter import check_interpreter
from ctask.job import Job
from ctask.mailbox import Mailbox
from ctask.making import ConnectionMaking
from ctask.plan import Dial, Join, Plan, Shake, Stage, Start
from ctask.runtime import Jobs, Runtime
from ctask.states import Outcome
from ctask.threads import NO_THREAD, NoThread, Pool
from ctask.transports import settle, transport
from ctask.transports.base import Connection, Transport

__all__ = ["CLOSED", "Engine"]

log = logging.getLogger("ctask.engine")

#: What is said of a task that takes nothing any more.
CLOSED = "this task is closed: its thread has ended, or the interpreter ends"
#: Seconds between two looks for what no thread could be had for, at the exit.
_LOOK_AGAIN = 0.02
#: Seconds that the dispatcher which ends by an error waits for what is being ended on nodes.
_ENDINGS_FOR = 5.0
#: Threads that a task's pool may have; they are started on demand, and the plan bounds what it is handed.
POOL_THREADS = 1024
#: Where there is no thread: seconds until one is tried again, and those that work waits for one at all; a handshake,
#: which holds nothing meanwhile and has not begun, the last number.
_NO_THREAD, _NO_THREAD_FOR, _NO_SHAKE_FOR = 0.05, 0.5, 3.0
#: Seconds until a transport that said there was room, and had none, is asked again: twice as long each time, from the
#: first to the second. One that always says so costs some wake-ups, and not a core.
_ASK_AGAIN, _ASK_AT_LEAST = 0.01, 0.1


class Engine:
    """What turns submitted jobs into results.

    Args:
        name: of the task; its threads are named after it.
        fanout: slots.
        queue_limit: bytes that may wait for handlers while the owner delivers.

    Raises:
        TaskError: ctask does not run in this interpreter.
    """

    def __init__(self, name: str, fanout: int, queue_limit: int) -> None:
        check_interpreter()
        self._name = name
        self._pool = Pool(f"{name}/job", POOL_THREADS, self._thread_is_free)
        # Since when there has been no thread for what waits, and for handshakes; the dispatcher's.
        self._idle_since: float | None = None
        self._unshaken_since: float | None = None
        self._closing = False
        self._stranded: queue.SimpleQueue[Batch] = queue.SimpleQueue()
        # Transports that will say when they have room, and the pauses of those that said so and had none.
        self._short_of: dict[int, Transport] = {}
        self._pauses: dict[int, float] = {}
        self._told_short = False
        #: returns the jobs of workers that are only scheduled, and forgets them; set by the Task
        self.scheduled: Callable[[], Iterable[Sequence[Job]]] = tuple
        self.gate = Gate(queue_limit, self._give, self._later)
        self.mailbox = Mailbox(self.gate)
        self.plan: Plan[Job, ConnectionMaking, Connection]
        self.plan = Plan(fanout, lambda job: ConnectionMaking(self.run, job.way, job.target))
        self.dispatcher = Dispatcher(
            f"{name}/dispatcher",
            self._step,
            self.plan.due,
            died=self._died,
            dead=self._dead,
            returned=self._returned,
            settle=settle,
        )
        endings = Endings(self._work)
        self.run = Runtime(self.dispatcher, self.plan, self.gate, self.mailbox, self._work, transport, endings)
        self.dispatcher.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Have jobs run, in their order."""
        self.dispatcher.post(Jobs(jobs), self._submitted, jobs)

    def stop(self, outcome: Outcome, error: NodeError, within: float, at_most: str = "kill") -> None:
        """End every job that was submitted before; each has its outcome after `within` seconds.

        From now on their handlers get no lines any more, also of what has ended and was not read.

        Args:
            at_most: the harshest policy that is used on the nodes.
        """
        self.mailbox.hush()
        self.dispatcher.post(None, self._stop_all, outcome, error, within, at_most)

    def settle(self) -> Callable[[], bool]:
        """Have all that has come from nodes by now put into the mailbox; return whether it is, for a pump.

        A deadline that is noticed late (this process stood still) is judged after that.
        """
        settled = threading.Event()

        def tell() -> None:
            settled.set()
            self.mailbox.notify()

        self.dispatcher.post(None, self.dispatcher.behind, None, tell)
        return settled.is_set

    def set_fanout(self, fanout: int) -> None:
        """Change the number of slots; what runs goes on."""
        self.dispatcher.post(None, setattr, self.plan, "fanout", fanout)

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        """Have a call made in so many seconds, by the dispatcher."""
        self.dispatcher.post(None, self._at, seconds, call)

    def close(self) -> None:
        """End the threads once the last job has its outcome; what is submitted from now on is not begun."""
        self.dispatcher.post(None, self._close)

    def fail(self, error: BaseException) -> None:
        """End the task by an error of its owner's that is no `Exception`: every waiter is told of it. Any thread."""
        self.dispatcher.post(None, _raise, error)

    def closing(self, timeout: float) -> bool:
        """Wait for the dispatcher's end after `close()`; return whether it has ended.

        Meanwhile carry out endings for which no thread could be had: early Pythons 3.12 start none at the exit.
        """
        until = time.monotonic() + timeout
        while (left := until - time.monotonic()) > 0 and not self.dispatcher.join(min(left, _LOOK_AGAIN)):
            with contextlib.suppress(queue.Empty):
                self._stranded.get_nowait().end()
        self._pool.join(max(0.0, until - time.monotonic()) if self.dispatcher.join(0) else 0.0)
        return self.dispatcher.join(0)

    # -- dispatcher ----------------------------------------------------------------------------------------------

    def _submitted(self, jobs: Sequence[Job]) -> None:
        if self._closing:  # it was on its way while the task was closed: nothing is begun any more
            self._refuse(jobs, TaskError(CLOSED))
            return
        # The rest was taken back while it was scheduled; none is submitted twice, whatever an interrupt left half done.
        jobs = [job for job in jobs if job.outcome is None and job not in self.run.live]
        self.run.live.update(jobs)
        for job in jobs:
            job.submitted()
        self.plan.submitted(jobs)

    def _stop_all(self, outcome: Outcome, error: NodeError, within: float, at_most: str) -> None:
        for job in list(self.run.live):
            self.dispatcher.carry_out(job, job.stop, outcome, error.copy(), within, at_most)

    def _close(self) -> None:
        self._closing = True

    def _at(self, seconds: float, call: Callable[[], None]) -> None:
        self.dispatcher.at(self.dispatcher.clock() + seconds, None, call)

    def _step(self, now: float) -> None:
        carry_out = self.dispatcher.carry_out
        unshaken: list[ConnectionMaking] = []
        for action in self.plan.step(now, self._take, self._reserve):
            # An action that fails ends jobs, and with the last of them a making, of which there may be more behind it.
            match action:
                case Start(job, connection) if self.plan.holds(job):
                    carry_out(job, job.start, connection, now)
                case Start(job, connection):
                    carry_out(None, job.way.give_back, connection)
                case Join(job, making) if job in making.jobs:
                    carry_out(job, job.join, making, now)
                case Dial(making) if making.stage is not Stage.OVER:
                    carry_out(making, making.dial)
                case Shake(making) if making.stage is not Stage.OVER and (unshaken or not self._pool.ready()):
                    unshaken.append(making)
                case Shake(making) if making.stage is not Stage.OVER:
                    self._unshaken_since = None
                    carry_out(making, making.shake, now)
        if unshaken:
            self._not_shaken(unshaken, now)
        self.run.endings.flush()
        if self._closing and not self.run.live:
            self._wind_up()

    def _take(self, job: Job) -> Connection | None:
        try:
            connection: Connection | None = job.way.take(job.target)
        except Exception as error:  # noqa: BLE001 (told to the job)
            self._unplanned(job, error)
            return None
        if connection is not None and self._pauses:
            self._pauses.pop(id(job.way), None)
        return connection

    def _reserve(self, job: Job) -> bool:
        way = job.way
        try:
            if way.dials and way.reserve():
                self._pauses.pop(id(way), None)
                return True
        except Exception as error:  # noqa: BLE001 (told to the job)
            self._unplanned(job, error)
            return False
        if getattr(way, "by_files", False):
            self._tell_short()
        if id(way) not in self._short_of:
            self._short_of[id(way)] = way
            pause = self._pauses.get(id(way))
            self._pauses[id(way)] = _ASK_AGAIN if pause is None else min(2 * pause, _ASK_AT_LEAST)
            if pause is None:
                self._ask_for_room(way)
            else:
                self._at(pause, partial(self._ask_for_room, way))
        return False

    def _unplanned(self, job: Job, error: Exception) -> None:
        """A transport raised in the midst of the plan's step, which must not lose its way: the job ends after it."""
        log.error("no way could be looked for: %r", job, exc_info=error)
        self.dispatcher.post(job, job.broken, error)

    def _ask_for_room(self, way: Transport) -> None:
        # Told once; the plan is asked again after every post, so that a post is all that is needed then.
        roomy = partial(self.dispatcher.post, None, self._roomy, way)
        try:
            way.when_room(roomy)
        except Exception:
            log.exception("%r could not be asked for room", way)
            self._at(_ASK_AT_LEAST, roomy)

    def _roomy(self, way: Transport) -> None:
        self._short_of.pop(id(way), None)

    def _tell_short(self) -> None:
        """Say once that descriptors, and not the fan-out, bound what runs at once: the limit is the program's."""
        most = self.plan.slots + self.plan.dialing
        if most < self.plan.fanout and not self._told_short:
            self._told_short = True
            files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            logging.getLogger("ctask").warning(
                "fan-out lowered from %d to %d: this process may open %d files (ulimit -n)",
                self.plan.fanout, most, files,
            )

    def _wind_up(self, *, wait: float = 0.0) -> None:
        self._pool.close()
        if wait:
            self._pool.join(wait)
        self.dispatcher.stop()

    # -- the dispatcher's end by an error ------------------------------------------------------------------------

    def _died(self, error: BaseException) -> None:
        """Give every job its outcome. In the dispatcher's thread."""
        self.mailbox.silence()
        self.run.endings.flush()
        self._refuse(list(self.run.live), error)
        # What is only scheduled would wait for ever: nothing can begin it any more.
        for jobs in self.scheduled():
            self._refuse(jobs, error)

    def _dead(self, error: BaseException) -> None:
        """Wake the threads that wait. In the dispatcher's thread, its last act."""
        self.mailbox.fail(error)
        # Everybody is awake; what is being ended on the nodes has its time, as far as an exit gives it.
        self._wind_up(wait=_ENDINGS_FOR)

    def _returned(self, post: Post) -> None:
        """A post comes back that was not carried out: the jobs that it was about have their end all the same."""
        subject, call, args = post
        error = self.dispatcher.error
        if error is not None:
            self.mailbox.silence()
        if isinstance(subject, (Job, Jobs)):
            jobs = subject.jobs if isinstance(subject, Jobs) else (subject,)
            self._refuse(jobs, error or TaskError(CLOSED))
        elif isinstance(subject, ConnectionMaking):
            subject.returned(call, args)

    def _refuse(self, jobs: Sequence[Job], error: BaseException) -> None:
        """Give these jobs their end, as far as they have none. Where it is called, no other thread touches them."""
        for job in jobs:
            text = str(error) if isinstance(error, TaskError) else f"the task itself failed: {told(error)}"
            failure = TaskFailed(text)
            failure.__cause__ = error
            try:
                try:
                    job.abandoned(failure)
                except Exception:
                    log.exception("%r could not be ended in order", job)
                    job.end_anyhow(failure)
            except BaseException:  # also what a done-callback raises: the other jobs have theirs to come
                log.critical("%r could not be ended", job, exc_info=True)

    # -- the pool ------------------------------------------------------------------------------------------------

    def _give(self, sessions: list[Any]) -> None:
        def give() -> None:
            for session in sessions:
                session.give()

        self._work(give)

    def _work(self, call: Callable[..., None], *args: Any) -> None:
        """Have a thread of the pool do what may wait."""
        try:
            there = self._pool.submit(call, *args)
        except RuntimeError as error:
            self._unworked(call, error)
            return
        if not there:
            self.dispatcher.post(None, self._no_thread)

    def _thread_is_free(self) -> None:
        """A thread of the pool has nothing to do, and there was none for a handshake."""
        self.dispatcher.post(None, _step_again)

    def _no_thread(self) -> None:
        """There is not one thread for what waits: try again, for a while. Dispatcher."""
        now = self.dispatcher.clock()
        if self._pool.grow():
            self._idle_since = None
        elif self._closing:
            self._strand()
        elif self._idle_since is None or now - self._idle_since < _NO_THREAD_FOR:
            self._idle_since = self._idle_since or now
            self.dispatcher.at(now + _NO_THREAD, None, self._no_thread)
        else:
            self._idle_since = None
            for call in self._pool.take_back():
                self._unworked(call, NoThread(NO_THREAD))

    def _strand(self) -> None:
        for call in self._pool.take_back():
            self._unworked(call, NoThread(NO_THREAD))

    def _not_shaken(self, makings: Sequence[ConnectionMaking], now: float) -> None:
        """There is no thread for these handshakes: they wait for one, and hold no slot meanwhile. Dispatcher."""
        for making in reversed(makings):
            self.plan.unshaken(making)
        if self._pool.count:
            return  # it says when it is free
        if self._unshaken_since is None:
            self._unshaken_since = now
        if now - self._unshaken_since < _NO_SHAKE_FOR:
            self.dispatcher.at(now + _NO_THREAD, None, _step_again)
            return
        self._unshaken_since = None
        for making in makings:
            self.dispatcher.carry_out(making, making.broken, NoThread(NO_THREAD))

    def _unworked(self, call: Callable[..., object], error: RuntimeError) -> None:
        """No thread can be started, or the interpreter ends: whoever waits for this is told."""
        log.debug("%s: not begun: %r", self._name, call, exc_info=error)
        subject = getattr(call, "__self__", None)
        if isinstance(subject, Batch) and self._closing:
            self._stranded.put(subject)
        elif isinstance(subject, (Job, ConnectionMaking, Batch)):
            self.dispatcher.post(subject, subject.broken, error)


def _step_again() -> None:
    """Nothing: after each post the plan is asked for its next actions."""


def _raise(error: BaseException) -> NoReturn:
    raise error
