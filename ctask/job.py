# SPDX-License-Identifier: Apache-2.0
"""One node of one worker: its attempts, what a phase's end means, and what comes next.

All methods run in the dispatcher, but for those that say otherwise. There is no loop that sleeps.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ctask import errors
from ctask.attempt import ConnectClock, Inbox, Silence, silence
from ctask.buffers import Capture
from ctask.dispatcher import Deadline
from ctask.ending import ABORT_WITHIN, DEADLINE_WITHIN, SILENT_WITHIN, TIMEOUT_WITHIN, end_alone
from ctask.errors import Curable, NodeError
from ctask.errors.text import told
from ctask.feed import Feed, Feeder
from ctask.intake import Intake
from ctask.options import Command, JobOptions, Target
from ctask.plan import Stage
from ctask.result import Ending, NodeResult
from ctask.runtime import Runtime, Submission
from ctask.states import Outcome, Timeline
from ctask.threads import NO_THREAD, NoThread
from ctask.transports.base import Connection, Session
from ctask.tries import TriesSoFar

if TYPE_CHECKING:
    from ctask.making import ConnectionMaking

__all__ = ["Job"]

log = logging.getLogger("ctask.job")


class Job:
    """One command on one node.

    Args:
        run: what the jobs of the task share.
        work: the worker.
        node: name of the node, or the key of a local command.
        now: the time of its submission.
        feed: its standard input, where it has one.
    """

    def __init__(
        self,
        run: Runtime,
        work: Submission,
        node: Any,
        target: Target,
        command: Command,
        limits: JobOptions,
        now: float,
        feed: Feed | None = None,
    ) -> None:
        self.run = run
        self.work = work
        self.node = node
        #: the transport of its target, the same from the submission to the outcome, whatever is registered meanwhile
        self.way = run.transport(target.transport)
        self.target = target
        self.command = command
        self.limits = limits
        self.outcome: Outcome | None = None
        #: set with the outcome
        self.result: NodeResult | None = None
        self._begun = False
        self._tries = TriesSoFar(node, limits.retry, work.ok_codes)
        self._overdue: Deadline | None = None
        self._intake = Intake(run, work, node)
        self.feed: Feed | None = None
        self._feeder: Feeder | None = None
        if feed is not None:
            self.open_stdin(feed)
        self.clock = ConnectClock(self, run.dispatcher, limits.connect_timeout)
        self._begin_try(now)

    def _begin_try(self, now: float) -> None:
        """Have all that one try has of its own, as it is before it begins."""
        #: wants a connection that is made from now on
        self.fresh = self.limits.fresh
        self.timeline = Timeline(now)
        #: what became of what was ended on the node
        self.ending: Ending | None = None
        self._replaced = not self.way.dials  # where nothing is dialed there is no other connection
        self._connection: Connection | None = None
        #: the connection that was made for it, until it starts
        self._made: Connection | None = None
        self._making: ConnectionMaking | None = None
        self._session: Session | None = None
        self._inbox: Inbox | None = None
        self._deadlines: list[Deadline] = []
        #: what it will have come to, once its session is ended
        self._stopped: tuple[Outcome, NodeError] | None = None
        self._silence: Silence | None = None

    def __repr__(self) -> str:
        return f"<Job {self.node} {self.outcome or self.phase}>"

    @property
    def phase(self) -> str:
        """Where the attempt is. Any thread; of a moment ago."""
        phase, inbox, making = self.timeline.phase, self._inbox, self._making
        if making is not None:
            return making.now_in()
        return phase if inbox is None else inbox.now_in(phase)

    @property
    def capture(self) -> Capture | None:
        """What the node printed; None where nothing is gathered. Any thread."""
        return self._intake.capture

    # -- what the plan says ----------------------------------------------------------------------------------

    def submitted(self) -> None:
        """The job is on its way: only an abort from now on keeps its lines from its handlers."""
        self._intake.submitted()
        if self.limits.deadline is not None:
            now = self.run.dispatcher.clock()
            self._overdue = self.run.dispatcher.at(now + self.limits.deadline, self, self.overdue)

    def join(self, making: ConnectionMaking, now: float) -> None:
        """Wait for a connection in the making."""
        self._begin()
        making.catch_up()
        self._making = making
        self.timeline.enter(making.where, now)
        if making.stage is not Stage.SPOKE and not making.held_back:  # else it waits for a slot, or for its turn
            self.clock.run(now)

    def start(self, connection: Connection, now: float) -> None:
        """Start on a connection on which the job has its place."""
        self._begin()
        # Only a kept connection may have died of old age; one that fails right after it was made is told as it is.
        self._replaced = self._replaced or connection is self._made
        self._connection, self._made = connection, None
        self.timeline.enter("open", now)
        self.clock.run(now)
        limits = self.limits
        timed = limits.timeout is not None or limits.idle_timeout is not None
        tell = timed or (self._feeder is not None and self._feeder.waiting())
        inbox = self._inbox = Inbox(self, self.run.gate, self._intake, tell=tell)
        session = self._session = connection.prepare(self.command, inbox)
        if not session.try_start():
            self.run.work(self._start_slowly, session, inbox)

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            self.work.began(self)

    def _start_slowly(self, session: Session, inbox: Inbox) -> None:
        """Start where that may have to wait. Pool."""
        try:
            session.start()
        except Exception as error:  # noqa: BLE001 (posted)
            self.run.post(self, self.unstarted, inbox, error)

    # -- what the connection in the making says --------------------------------------------------------------

    def left_making(self, now: float, made: Connection | None = None) -> None:
        """The connection stands, or the server hung up before it began: back to the queue."""
        self._making, self._made = None, made
        self.clock.pause(now)
        self.timeline.enter("queued", now)

    def not_connected(self, error: NodeError) -> None:
        """There is no connection."""
        self._finish(Outcome.UNREACHED, error)

    # -- what the session says -------------------------------------------------------------------------------

    def arrived(
        self, inbox: Inbox, box: list[tuple[int, bytes]], size: int, exited: bool, over: bool
    ) -> None:
        """The socket ran dry: output, and whether the inbox has a status and an end by now."""
        if box:
            self.run.gate.landed(size)
        if inbox is not self._inbox or self.outcome is not None:
            return  # of an attempt that is over
        now = self.run.dispatcher.clock()
        self._catch_up(inbox)
        if box:
            self._keep(box, now)
            if self.outcome is not None:
                return
        if over:
            self._session_over(inbox.end)
        elif exited and self._stopped is None:  # the status of what was told to end is no news
            self._close_quietly(now)

    def unstarted(self, inbox: Inbox, error: Exception) -> None:
        """Starting raised, which no session should do."""
        if inbox is self._inbox and self.outcome is None:
            self.broken(error)

    def writable(self, inbox: Inbox) -> None:
        """Standard input has room again."""
        if inbox is self._inbox and self._feeder is not None:
            self._feeder.writable()

    def _catch_up(self, inbox: Inbox) -> None:
        """Enter the phases that the connection's thread has stamped."""
        timeline = self.timeline
        if inbox.exec_at is not None and timeline.phase == "open":
            timeline.enter("exec", inbox.exec_at)
        if inbox.running_at is not None and timeline.phase == "exec":
            timeline.enter("running", inbox.running_at)
            self.clock.pause(inbox.running_at)
            if self._stopped is None:
                self._began_to_run(inbox.running_at)

    def _began_to_run(self, at: float) -> None:
        if self.limits.timeout is not None:
            self._at(at + self.limits.timeout, self.too_long)
        self._listen(self.limits.idle_timeout, at, self.idle)
        if self._feeder is not None and self._session is not None:
            self._feeder.connect(self._session)

    def _keep(self, box: list[tuple[int, bytes]], now: float) -> None:
        if self._inbox is not None:
            self._inbox.heard_at = now
        try:
            self._intake.keep(box)
        except errors.LocalResource as error:
            self.stop(Outcome.ABORTED, error.with_traceback(None), ABORT_WITHIN, mute=False)

    def _session_over(self, error: NodeError | None) -> None:
        if self._stopped is not None:
            return  # the end's own word, or the promise, decides
        assert self._inbox is not None
        if self._inbox.status is not None:
            self._exited(truncated=error is not None)
        elif self._inbox.exec_at is None and isinstance(error, errors.ConnectionLost) and not self._replaced:
            self._replace()
        elif self._inbox.exec_at is None or isinstance(error, errors.ExecRefused):
            self._finish(Outcome.UNREACHED, error or errors.SessionRefused("the session was closed"))
        else:
            self._finish(Outcome.LOST, error or errors.ConnectionLost("the session ended without an exit status"))

    def _replace(self) -> None:
        """A kept connection failed before the command was sent: make a new one, at once."""
        assert self._connection is not None
        self._replaced = True
        self.fresh = True
        self.way.give_back(self._connection)
        self._connection = self._session = self._inbox = None
        self.left_making(self.run.dispatcher.clock())
        self.run.plan.freed(self)
        self.run.plan.requeued((self,))

    def _exited(self, *, lingering: bool = False, truncated: bool = False) -> None:
        assert self._inbox is not None
        assert self._inbox.status is not None
        self.timeline.enter("closing", self.run.dispatcher.clock())
        signal = self._inbox.status[1]
        outcome = Outcome.SIGNALED if signal is not None else Outcome.EXITED
        self._finish(outcome, None, lingering=lingering, truncated=truncated)

    # -- silence ---------------------------------------------------------------------------------------------

    def _listen(self, limit: float | None, since: float, call: Callable[[], None]) -> None:
        """Have `call` made when nothing has come for `limit`, in place of what was to be called before."""
        if self._silence is not None:
            self._silence.cancel()
        if limit is not None and self._session is not None and self._inbox is not None:
            self._silence = Silence(self, self._session, self._inbox, limit, since, call)

    def _close_quietly(self, now: float) -> None:
        """The status is known; output may still come (an exit status overtakes it)."""
        if self.timeline.phase != "closing":
            self.timeline.enter("closing", now)
            self._listen(self.limits.drain_timeout, now, self.quiet)

    def quiet(self) -> None:
        """Nothing has come for `drain_timeout` since the status."""
        if self.outcome is None and self._stopped is None and self._session is not None:
            self.run.work(self._session.close)
            self._exited(lingering=True)

    def idle(self) -> None:
        """Nothing has come for `idle_timeout`."""
        error = errors.IdleTimeout(f"silent for {self.limits.idle_timeout:g} s")
        self.stop(Outcome.TIMEOUT, error, self.limits.stop.grace + TIMEOUT_WITHIN, mute=False)

    # -- standard input --------------------------------------------------------------------------------------

    def open_stdin(self, feed: Feed) -> None:
        """Give the command what feeds its standard input. Before the job is submitted, in the thread that does it."""
        if not self.command.stdin:
            self.command = dataclasses.replace(self.command, stdin=True)
        self.feed = feed
        self._feeder = Feeder(self.run, self, feed, self._unfed)

    def write(self, data: bytes | None) -> None:
        """Add to standard input; None: the end of it."""
        if self._feeder is not None and self.outcome is None:
            self._feeder.put(data)
            if self._inbox is not None:
                # Nobody has asked to be told that the command runs until now: it may run already.
                self._inbox.tell()
                self._catch_up(self._inbox)

    def _unfed(self, error: Exception) -> None:
        failure = errors.LocalResource(f"standard input could not be read: {error}")
        self.stop(Outcome.ABORTED, failure, ABORT_WITHIN)

    # -- ends ------------------------------------------------------------------------------------------------

    def not_answered(self) -> None:
        """`connect_timeout` has passed."""
        if self.outcome is not None or self._stopped is not None:
            return
        limit = self.limits.connect_timeout or 0.0
        if self._session is None:
            if self._making is not None:
                self._making.catch_up()
            self.way.unreachable(self.target, self.run.dispatcher.clock())
            self._finish(Outcome.UNREACHED, silence(self.timeline.phase, self.target, limit))
            return
        assert self._inbox is not None
        assert self._connection is not None
        self._catch_up(self._inbox)
        if self._inbox.running_at is not None:
            return
        self._connection.retire()
        if self._session.drop():
            self._finish(Outcome.UNREACHED, silence("open", self.target, limit))
        else:
            self.stop(Outcome.LOST, silence("exec", self.target, limit), SILENT_WITHIN, mute=False)

    def too_long(self) -> None:
        """`timeout` has passed."""
        error = errors.CommandTimeout(f"timeout after {self.limits.timeout:g} s")
        self.stop(Outcome.TIMEOUT, error, self.limits.stop.grace + TIMEOUT_WITHIN, mute=False)

    def overdue(self) -> None:
        """`deadline` has passed."""
        text = f"deadline of {self.limits.deadline:g} s passed"
        self.stop(Outcome.TIMEOUT, errors.CommandTimeout(text, curable=Curable.NEVER), DEADLINE_WITHIN)

    def stop(
        self, outcome: Outcome, error: NodeError, within: float, at_most: str = "kill", *, mute: bool = True
    ) -> None:
        """End the job from this side, wherever it is; it has its outcome after `within` seconds at the latest.

        Of a job that has ended, or is being ended, what came first stands; only the outcome may come sooner now.

        Args:
            at_most: the harshest policy that is used on the node.
            mute: lines that were not read yet are not given to handlers any more (abort, the run's deadline).
        """
        if mute:
            self._intake.mute()  # also of one that has ended: what was not read is not read any more
        if self.outcome is not None:
            return
        if self._stopped is not None:
            if error.curable is Curable.NEVER:
                self._tries.no_more()
            self._promise(within)
            return
        session, inbox = self._session, self._inbox
        if session is None or inbox is None or session.drop():
            self._finish(outcome, error)
            return
        self._catch_up(inbox)
        if self.timeline.phase == "closing":
            self.run.work(session.close)
            self._finish(outcome, error)
            return
        assert self._connection is not None
        self._stopped = (outcome, error)
        self._promise(within)
        self.run.endings.add(self, self._connection, session, self.limits.stop.at_most(at_most), within)

    def word(self, session: Session | None, ending: Ending) -> None:
        """What became of the session that was to end."""
        if self.outcome is None and self._stopped is not None and session is self._session:
            self.ending = ending
            outcome, error = self._stopped
            if text := ending.told():
                error.add(text)
            self._finish(outcome, error)

    def seen(self, session: Session, ending: Ending) -> None:
        """What is still there of the session that is to end, before its last word. After the outcome nobody asks."""
        if session is self._session:
            self.ending = ending

    def unended(self, session: Session, error: Exception) -> None:
        """The ending itself raised: nothing is known of what it was to end."""
        if session is self._session:
            self.promised()
        raise error

    def promised(self) -> None:
        """The caller was promised the outcome by now, and the node has not said its last word."""
        if self.outcome is None and self._connection is not None:
            self._connection.retire()  # what is still being done there is no later job's business
        self.word(self._session, self.ending or Ending("unknown"))

    def broken(self, error: Exception) -> None:
        """Something in ctask raised while it dealt with this job."""
        if self.outcome is None:
            try:
                if self._session is not None and not self._session.drop():
                    self.run.work(self._session.close)
            except Exception:  # of a transport of the program's: the job has its end all the same
                log.exception("%r: its session could not be dropped", self)
            text, curable = f"ctask failed: {told(error)}", Curable.NEVER
            if isinstance(error, NoThread):  # nothing was begun
                text, curable = NO_THREAD, Curable.BUSY
            failure = errors.LocalResource(text, curable=curable)
            failure.__cause__ = error
            self._fail(failure)
        elif self in self.run.live:
            self.end_anyhow(errors.LocalResource(f"ctask failed: {told(error)}"))

    def abandoned(self, error: NodeError) -> None:
        """The dispatcher ends under the job: the outcome now; what runs is ended by the pool, as far as that goes."""
        if self.outcome is not None:
            if self in self.run.live:
                self.end_anyhow(error)
            return
        connection, session = self._connection, self._session
        try:
            if connection is not None and session is not None and self._stopped is None and not session.drop():
                self._connection = None  # its place is given back once the session was told to end
                self.run.work(end_alone, self.way, connection, session, self.limits.stop)
        except Exception:
            log.exception("%r: its session could not be told to end", self)
        self._fail(error)

    def _fail(self, error: NodeError) -> None:
        sent = self._inbox is not None and self._inbox.exec_at is not None
        try:
            self._finish(Outcome.LOST if sent else Outcome.UNREACHED, error)
        except Exception:
            log.exception("%r could not be ended in order", self)
            self.end_anyhow(error)

    def end_anyhow(self, error: NodeError) -> None:
        """Its end itself has raised on the way: nobody would ever be told of it."""
        self._tries.broken_off(self.timeline.phase, self.outcome or Outcome.LOST, self._inbox, error)
        self._conclude()

    # -- the outcome -----------------------------------------------------------------------------------------

    def _finish(self, outcome: Outcome, error: NodeError | None, **how: bool) -> None:
        """The try has ended: try again, or have the outcome."""
        now = self.run.dispatcher.clock()
        inbox = self._inbox
        if inbox is not None:
            self._catch_up(inbox)
        elif self._making is not None:
            self._making.catch_up()
            self._making = None
        self._tries.over(self.timeline, outcome, inbox, error, now)
        delay = self._tries.again(self.clock, now)
        self._release(now)
        self._intake.seal()
        if delay is not None:
            self._try_again(delay, now)
        else:
            self._conclude(**how)

    def _try_again(self, delay: float, now: float) -> None:
        failure = self._tries.failure
        assert failure is not None
        self._intake.again(len(self._tries.done), failure, delay)
        if self._feeder is not None:
            self._feeder.again()
        if self._tries.own_clock:
            self.clock = ConnectClock(self, self.run.dispatcher, self.limits.connect_timeout)
        self._begin_try(now)
        if isinstance(failure, errors.SessionRefused):  # another connection may have room
            self.fresh = True
        self.run.plan.backoff(self, now + delay)

    def _conclude(self, **how: bool) -> None:
        """Have the outcome, and tell it."""
        result = self.result = self._tries.result(self.capture, self.ending, **how)
        self.outcome = result.outcome
        self._tell(result)

    def _tell(self, result: NodeResult) -> None:
        """Put the end into the mailbox, and resolve the future whatever becomes of that. Once."""
        if self._overdue is not None:
            self._overdue.cancel()
        if self._feeder is not None:
            self._feeder.stop()
        work = self.work
        try:
            work.starts()
            self._intake.ended(result)
        finally:
            self.run.live.discard(self)
            try:
                work.ended(self, result)
            finally:
                self._shed()

    def _shed(self) -> None:
        """Let go of all but the account. It leads back here: the worker holds its jobs, and frees them when dropped."""
        self._intake.over()
        if self._inbox is not None:
            self._inbox.over_and_out()
        self._inbox = self._session = self._made = self._making = self._silence = self._feeder = self._overdue = None
        self._deadlines = []
        del self.work, self.clock

    def _release(self, now: float) -> None:
        """Give back all that the try holds."""
        self.clock.pause(now)
        for deadline in self._deadlines:
            deadline.cancel()
        self._deadlines = []
        if self._silence is not None:
            self._silence.cancel()
        orphan = self.run.plan.withdrawn(self)
        if orphan is not None:
            orphan.cancel()
        if self._connection is not None:
            self.way.give_back(self._connection)
            self._connection = None
        if self._inbox is not None:
            self._inbox.over_and_out()
        self._session = self._made = None

    def _promise(self, within: float) -> None:
        self._deadlines.append(self.run.dispatcher.after(within, self, self.promised))

    def _at(self, when: float, call: Any) -> None:
        self._deadlines = [deadline for deadline in self._deadlines if deadline.call is not None]
        self._deadlines.append(self.run.dispatcher.at(when, self, call))
