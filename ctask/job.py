# SPDX-License-Identifier: Apache-2.0
"""One node of one worker: its attempts, what a phase's end means, and what comes next.

All methods run in the dispatcher, but for those that say otherwise. There is no loop that sleeps.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ctask import errors
from ctask.attempt import ConnectClock, Inbox, rc_of, silence, whether_ran
from ctask.buffers import Capture, Loose
from ctask.dispatcher import Deadline
from ctask.ending import ABORT_WITHIN, SILENT_WITHIN, TIMEOUT_WITHIN, WORD_BEFORE
from ctask.errors import NodeError
from ctask.feed import Feed, Feeder
from ctask.mailbox import Delivery
from ctask.options import Command, JobOptions, Target
from ctask.plan import Stage
from ctask.result import Attempt, Ending, NodeResult, Timings
from ctask.runtime import Runtime, Submission
from ctask.states import Outcome, Timeline
from ctask.transports.base import Connection, Session, Transport

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
        self.target = target
        self.command = command
        self.limits = limits
        #: wants a connection that is made from now on
        self.fresh = limits.fresh
        self.timeline = Timeline(now)
        self.clock = ConnectClock(self, run.dispatcher, limits.connect_timeout)
        self.outcome: Outcome | None = None
        #: what became of what was ended on the node
        self.ending: Ending | None = None
        #: set with the outcome
        self.result: NodeResult | None = None
        self._store: Capture | Loose = (Capture if work.store.gather else Loose)(work.store)
        self._delivery = Delivery(work, node, apart=work.apart)
        self._feeder = Feeder(run, self, feed, self._unfed) if feed is not None else None
        self._begun = False
        self._replaced = False
        self._connection: Connection | None = None
        #: the connection that was made for it, until it starts
        self._made: Connection | None = None
        self._making: ConnectionMaking | None = None
        self._session: Session | None = None
        self._inbox: Inbox | None = None
        self._deadlines: list[Deadline] = []
        #: what it will have come to, once its session is ended
        self._stopped: tuple[Outcome, NodeError] | None = None
        self._quiet_at = 0.0

    def __repr__(self) -> str:
        return f"<Job {self.node} {self.outcome or self.phase}>"

    @property
    def phase(self) -> str:
        """Where the attempt is. Any thread; of a moment ago."""
        phase, inbox, making = self.timeline.phase, self._inbox, self._making
        if making is not None:
            return making.now_in()
        if inbox is None or phase not in ("open", "exec"):
            return phase
        if inbox.running_at is not None:
            return "running"
        return "exec" if inbox.exec_at is not None else phase

    @property
    def capture(self) -> Capture | None:
        """What the node printed; None where nothing is gathered. Any thread."""
        return self._store if isinstance(self._store, Capture) else None

    # -- what the plan says ----------------------------------------------------------------------------------

    def submitted(self) -> None:
        """The job is on its way: only an abort from now on keeps its lines from its handlers."""
        self._delivery.epoch = self.run.mailbox.epoch

    def join(self, making: ConnectionMaking, now: float) -> None:
        """Wait for a connection in the making."""
        self._begin()
        making.catch_up()
        self._making = making
        self.timeline.enter(making.where, now)
        if making.stage is not Stage.SPOKE:  # else it waits for a slot
            self.clock.run(now)

    def start(self, connection: Connection, now: float) -> None:
        """Start on a connection on which the job has its place."""
        self._begin()
        # Only a kept connection may have died of old age; one that fails right after it was made is told as it is.
        self._replaced = self._replaced or connection is self._made
        self._connection, self._made = connection, None
        self.timeline.enter("open", now)
        self.clock.run(now)
        tell = self.limits.timeout is not None or (self._feeder is not None and self._feeder.waiting())
        inbox = self._inbox = Inbox(self, self.run.gate, self._delivery.waiting, tell=tell)
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
            self._keep(box)
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
            if self.limits.timeout is not None and self._stopped is None:
                self._at(inbox.running_at + self.limits.timeout, self.too_long)
            if self._feeder is not None and self._session is not None and self._stopped is None:
                self._feeder.connect(self._session)

    def _keep(self, box: list[tuple[int, bytes]]) -> None:
        """Store output, and tell the mailbox where somebody reads it."""
        store, listened = self._store, bool(self.work.handlers.read) and not self._delivery.muted
        before, failure = store.total, None
        try:
            if isinstance(store, Capture) or listened:
                for stream, chunk in box:
                    store.append(stream, chunk)
        except errors.LocalResource as error:
            failure = error.with_traceback(None)  # its frames hold what was stored, and this error
        if listened:
            if self._delivery.reader is None:
                # Whoever listens from now on hears from the start, as far as it is kept.
                self._delivery.reader = store.reader()
                before = 0
            self.run.mailbox.readable(self._delivery, store.total - before)
        if failure is not None:  # what came before it was stored, and is delivered
            self.stop(Outcome.ABORTED, failure, ABORT_WITHIN, mute=False)
        self._quiet_at = self.run.dispatcher.clock()

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
        self.run.transport(self.target.transport).give_back(self._connection)
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

    # -- the quiet end ---------------------------------------------------------------------------------------

    def _close_quietly(self, now: float) -> None:
        """The status is known; output may still come (an exit status overtakes it)."""
        if self.timeline.phase != "closing":
            self.timeline.enter("closing", now)
            self._quiet_at = now
            if self.limits.drain_timeout is not None:
                self._at(now + self.limits.drain_timeout, self.quiet)

    def quiet(self) -> None:
        """End the job if nothing has come for `drain_timeout`, though it could have."""
        limit = self.limits.drain_timeout
        if self.outcome is not None or self._stopped is not None or limit is None:
            return
        assert self._session is not None
        now = self.run.dispatcher.clock()
        if self.run.gate.withholds(self._session):
            self._quiet_at = now  # the node waits for us: its silence says nothing
        if now - self._quiet_at < limit:
            self._at(self._quiet_at + limit, self.quiet)
        else:
            self.run.work(self._session.close)
            self._exited(lingering=True)

    # -- standard input --------------------------------------------------------------------------------------

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
            self.run.transport(self.target.transport).unreachable(self.target, self.run.dispatcher.clock())
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
            self._delivery.muted = True  # also of one that has ended: what was not read is not read any more
        if self.outcome is not None:
            return
        if self._stopped is not None:
            self._at(self.run.dispatcher.clock() + within, self.promised)
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
        self._at(self.run.dispatcher.clock() + within, self.promised)
        self.run.endings.add(self, self._connection, session, self.limits.stop.at_most(at_most), within)

    def word(self, ending: Ending) -> None:
        """What became of the session that was to end."""
        if self.outcome is None and self._stopped is not None:
            self.ending = ending
            outcome, error = self._stopped
            if text := ending.told():
                error.add(text)
            self._finish(outcome, error)

    def seen(self, ending: Ending) -> None:
        """What is still there of the session that is to end, before its last word. After the outcome nobody asks."""
        self.ending = ending

    def unended(self, error: Exception) -> None:
        """The ending itself raised: nothing is known of what it was to end."""
        self.promised()
        raise error

    def promised(self) -> None:
        """The caller was promised the outcome by now, and the node has not said its last word."""
        if self.outcome is None and self._connection is not None:
            self._connection.retire()  # what is still being done there is no later job's business
        self.word(self.ending or Ending("unknown"))

    def broken(self, error: Exception) -> None:
        """Something in ctask raised while it dealt with this job."""
        if self.outcome is None:
            if self._session is not None and not self._session.drop():
                self.run.work(self._session.close)
            failure = errors.LocalResource(f"ctask failed: {error!r}")
            failure.__cause__ = error
            self._fail(failure)
        elif self in self.run.live:
            self._end_anyhow(errors.LocalResource(f"ctask failed: {error!r}"))

    def abandoned(self, error: NodeError) -> None:
        """The dispatcher ends under the job: the outcome now; what runs is ended by the pool, as far as that goes."""
        if self.outcome is not None:
            if self in self.run.live:
                self._end_anyhow(error)
            return
        try:
            connection, session = self._connection, self._session
            if connection is not None and session is not None and self._stopped is None and not session.drop():
                self._connection = None  # its place is given back once the session was told to end
                self.run.work(self._end_alone, self.run.transport(self.target.transport), connection, session)
            self._fail(error)
        except Exception:
            log.exception("%r could not be ended in order", self)
            self._end_anyhow(error)

    def _end_alone(self, way: Transport, connection: Connection, session: Session) -> None:
        """End the session of a job that has its outcome. Pool."""
        try:
            connection.end((session,), self.limits.stop, ABORT_WITHIN - WORD_BEFORE)
        finally:
            way.give_back(connection)

    def _fail(self, error: NodeError) -> None:
        sent = self._inbox is not None and self._inbox.exec_at is not None
        self._finish(Outcome.LOST if sent else Outcome.UNREACHED, error)

    def _end_anyhow(self, error: NodeError) -> None:
        """Its end itself has raised on the way: nobody would ever be told of it."""
        outcome = self.outcome = self.outcome or Outcome.LOST
        error.node = self.node if isinstance(self.node, str) else ""
        attempts = (Attempt(self.timeline.phase, error, Timings({}, None)),)
        self.result = error.result = NodeResult(
            node=self.node, outcome=outcome, rc=None, signal=None, error=error, ran=whether_ran(outcome, self._inbox),
            ok=False, attempts=attempts, capture=self.capture,
        )
        self._tell(None, self.result)

    # -- the outcome -----------------------------------------------------------------------------------------

    def _finish(
        self, outcome: Outcome, error: NodeError | None, *, lingering: bool = False, truncated: bool = False
    ) -> None:
        now = self.run.dispatcher.clock()
        inbox = self._inbox
        if inbox is not None:
            self._catch_up(inbox)
        elif self._making is not None:
            self._making.catch_up()
            self._making = None
        phase = self.timeline.phase
        spent = self.timeline.close(outcome, now)
        self.outcome = outcome
        self._release(now)
        if self.capture is not None:
            self.capture.seal()
        first = inbox.first_at - self.timeline.began if inbox is not None and inbox.first_at is not None else None
        attempts = (Attempt(phase, error, Timings(spent, first)),)
        status, signal = (inbox.status if inbox is not None else None) or (None, None)
        rc = rc_of(outcome, status, signal)
        result = self.result = NodeResult(
            node=self.node,
            outcome=outcome,
            rc=rc,
            signal=signal if outcome is Outcome.SIGNALED else None,
            error=error,
            ran=whether_ran(outcome, inbox),
            ok=outcome is Outcome.EXITED and rc in self.work.ok_codes,
            attempts=attempts,
            capture=self.capture,
            ending=self.ending,
            lingering=lingering,
            truncated=truncated,
        )
        if error is not None:
            error.node = self.node if isinstance(self.node, str) else ""
            error.phase = error.phase or phase
            error.attempts, error.result = attempts, result
        self._tell(rc, result)

    def _tell(self, rc: int | None, result: NodeResult) -> None:
        """Put the end into the mailbox, and resolve the future whatever becomes of that. Once."""
        try:
            self.work.starts()
            self.run.mailbox.ended(self._delivery, rc, result)
        finally:
            self.run.live.discard(self)
            self.work.ended(self, result)

    def _release(self, now: float) -> None:
        """Give back all that the job holds."""
        self.clock.pause(now)
        for deadline in self._deadlines:
            deadline.cancel()
        self._deadlines = []
        orphan = self.run.plan.withdrawn(self)
        if orphan is not None:
            orphan.cancel()
        if self._connection is not None:
            self.run.transport(self.target.transport).give_back(self._connection)
            self._connection = None
        if self._feeder is not None:
            self._feeder.stop()
        self._session = self._made = None

    def _at(self, when: float, call: Any) -> None:
        self._deadlines = [deadline for deadline in self._deadlines if deadline.call is not None]
        self._deadlines.append(self.run.dispatcher.at(when, self, call))
