# SPDX-License-Identifier: Apache-2.0
"""One node of one worker: its attempts, what a phase's end means, and what comes next.

All methods run in the dispatcher, but for those that say otherwise. There is no loop that sleeps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from ctask import errors
from ctask.attempt import ConnectClock, Inbox
from ctask.buffers import BufferStore, Capture, Loose
from ctask.dispatcher import Deadline
from ctask.errors import NodeError
from ctask.feed import Feed, Feeder
from ctask.handler import Handlers
from ctask.mailbox import Delivery
from ctask.options import Command, JobOptions, Target
from ctask.plan import Stage
from ctask.result import Attempt, NodeResult, Timings, signal_number
from ctask.runtime import Runtime
from ctask.states import Outcome, Timeline
from ctask.transports.base import Connection, Session

if TYPE_CHECKING:
    from ctask.making import ConnectionMaking

__all__ = ["ABORT_WITHIN", "Job", "Submission"]

#: Seconds after which an aborted job has its outcome, whatever its node says: callers are promised 2.
ABORT_WITHIN = 1.7
#: The same after a `timeout`, beyond the grace.
TIMEOUT_WITHIN = 2.0
#: Seconds before the promise at which the ending of a session has to say what it knows.
WORD_BEFORE = 0.1


class Submission(Protocol):
    """The worker, as far as its jobs are concerned."""

    handlers: Handlers
    last: tuple[str, str, Any]
    last_rc: int | None
    #: None: nothing is gathered
    store: BufferStore | None
    #: stderr is told apart from stdout
    apart: bool
    ok_codes: frozenset[int]

    def began(self, job: Job) -> None:
        """The job is taken up, for the first time. Dispatcher."""

    def ended(self, job: Job, result: NodeResult) -> None:
        """The job has its outcome, and its events are in the mailbox. Dispatcher."""


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
        self.remote_state: str | None = None
        #: set with the outcome
        self.result: NodeResult | None = None
        self._store: Capture | Loose = Capture(work.store) if work.store is not None else Loose()
        self._delivery = Delivery(work, node, apart=work.apart)
        self._feeder = Feeder(run, self, feed, self._unfed) if feed is not None else None
        self._begun = False
        self._replaced = False
        self._connection: Connection | None = None
        self._making: ConnectionMaking | None = None
        self._session: Session | None = None
        self._inbox: Inbox | None = None
        self._deadlines: list[Deadline] = []
        self._ending: tuple[Outcome, NodeError] | None = None
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
        self._connection = connection
        self.timeline.enter("open", now)
        self.clock.run(now)
        tell = self.limits.timeout is not None or (self._feeder is not None and self._feeder.waiting())
        inbox = self._inbox = Inbox(self, self.run.gate, tell=tell)
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

    def left_making(self, now: float) -> None:
        """The connection stands, or the server hung up before it began: back to the queue."""
        self._making = None
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
            self._keep(box, size)
            if self.outcome is not None:
                return
        if over:
            self._session_over(inbox.end)
        elif exited and self._ending is None:  # the status of what was told to end is no news
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
            if self.limits.timeout is not None and self._ending is None:
                self._at(inbox.running_at + self.limits.timeout, self.too_long)
            if self._feeder is not None and self._session is not None and self._ending is None:
                self._feeder.connect(self._session)

    def _keep(self, box: list[tuple[int, bytes]], size: int) -> None:
        """Store output, and tell the mailbox where somebody reads it."""
        store, listened = self._store, bool(self.work.handlers.read) and not self._delivery.muted
        try:
            if isinstance(store, Capture) or listened:
                for stream, chunk in box:
                    store.append(stream, chunk)
        except errors.LocalResource as error:
            self.stop(Outcome.ABORTED, error, ABORT_WITHIN)
            return
        if listened:
            if self._delivery.reader is None:
                # Whoever listens from now on hears from the start, as far as it is kept.
                self._delivery.reader = store.reader()
                size = store.total
            self.run.mailbox.readable(self._delivery, size)
        self._quiet_at = self.run.dispatcher.clock()

    def _session_over(self, error: NodeError | None) -> None:
        if self._ending is not None:
            return  # the end's own word, or the promise, decides
        assert self._inbox is not None
        if self._inbox.status is not None:
            self._exited(lingering=False)
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

    def _exited(self, *, lingering: bool) -> None:
        assert self._inbox is not None
        assert self._inbox.status is not None
        signal = self._inbox.status[1]
        self._finish(Outcome.SIGNALED if signal is not None else Outcome.EXITED, None, lingering=lingering)

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
        if self.outcome is not None or self._ending is not None or limit is None:
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
        if self.outcome is not None or self._ending is not None:
            return
        limit = self.limits.connect_timeout or 0.0
        if self._session is None:
            if self._making is not None:
                self._making.catch_up()
            self.run.transport(self.target.transport).unreachable(self.target, self.run.dispatcher.clock())
            self._finish(Outcome.UNREACHED, _silence(self.timeline.phase, self.target, limit))
            return
        assert self._inbox is not None
        assert self._connection is not None
        self._catch_up(self._inbox)
        if self._inbox.running_at is not None:
            return
        self._connection.retire()
        if self._session.drop():
            self._finish(Outcome.UNREACHED, _silence("open", self.target, limit))
        else:
            self.stop(Outcome.LOST, _silence("exec", self.target, limit), ABORT_WITHIN, mute=False)

    def too_long(self) -> None:
        """`timeout` has passed."""
        error = errors.CommandTimeout(f"timeout after {self.limits.timeout:g} s")
        self.stop(Outcome.TIMEOUT, error, self.limits.stop.grace + TIMEOUT_WITHIN, mute=False)

    def stop(self, outcome: Outcome, error: NodeError, within: float, *, mute: bool = True) -> None:
        """End the job from this side, wherever it is; it has its outcome after `within` seconds at the latest.

        A job that has ended, or is being ended, is left alone: what came first stands.

        Args:
            mute: lines that were not read yet are not given to handlers any more (abort, the run's deadline).
        """
        if mute:
            self._delivery.muted = True  # also of one that has ended: what was not read is not read any more
        if self.outcome is not None or self._ending is not None:
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
        self._ending = (outcome, error)
        self._at(self.run.dispatcher.clock() + within, self.promised)
        # Its word is to come before the promise: what is known by then is told.
        self.run.work(self._end_slowly, self._connection, session, max(0.0, within - WORD_BEFORE))

    def _end_slowly(self, connection: Connection, session: Session, within: float) -> None:
        """End the remote session. Pool."""
        try:
            state = connection.end((session,), self.limits.stop, within)[session].state
        except Exception as error:  # noqa: BLE001 (posted)
            self.run.post(self, self.end_failed, error)
        else:
            self.run.post(self, self.word, state)

    def word(self, state: str) -> None:
        """What became of the session that was to end."""
        if self.outcome is None and self._ending is not None:
            self.remote_state = state
            if state != "gone" and self._connection is not None:
                self._connection.retire()
            self._finish(*self._ending)

    def end_failed(self, error: Exception) -> None:
        """The ending itself raised: nothing is known of what it was to end."""
        self.word("unknown")
        raise error

    def promised(self) -> None:
        """The caller was promised the outcome by now."""
        self.word("unknown")

    def broken(self, error: Exception) -> None:
        """Something in ctask raised while it dealt with this job."""
        if self.outcome is None:
            if self._session is not None and not self._session.drop():
                self.run.work(self._session.close)
            failure = errors.LocalResource(f"ctask failed: {error!r}")
            failure.__cause__ = error
            sent = self._inbox is not None and self._inbox.exec_at is not None
            self._finish(Outcome.LOST if sent else Outcome.UNREACHED, failure)

    # -- the outcome -----------------------------------------------------------------------------------------

    def _finish(self, outcome: Outcome, error: NodeError | None, *, lingering: bool = False) -> None:
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
        rc = _rc(outcome, status, signal)
        result = self.result = NodeResult(
            node=self.node,
            outcome=outcome,
            rc=rc,
            signal=signal if outcome is Outcome.SIGNALED else None,
            error=error,
            ran=_ran(outcome, inbox),
            ok=outcome is Outcome.EXITED and rc in self.work.ok_codes,
            attempts=attempts,
            capture=self.capture,
            remote_state=self.remote_state,
            lingering=lingering,
        )
        if error is not None:
            error.node = self.node if isinstance(self.node, str) else ""
            error.phase = error.phase or phase
            error.attempts, error.result = attempts, result
        self.run.live.discard(self)
        self.run.mailbox.ended(self._delivery, rc, result)
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
        self._session = None

    def _at(self, when: float, call: Any) -> None:
        self._deadlines = [deadline for deadline in self._deadlines if deadline.call is not None]
        self._deadlines.append(self.run.dispatcher.at(when, self, call))


def _rc(outcome: Outcome, status: int | None, signal: str | None) -> int | None:
    if outcome is Outcome.EXITED:
        return status
    if outcome is Outcome.SIGNALED:
        return 128 + signal_number(signal or "")
    return 255 if outcome in (Outcome.UNREACHED, Outcome.LOST) else None


def _ran(outcome: Outcome, inbox: Inbox | None) -> bool | None:
    if outcome in (Outcome.EXITED, Outcome.SIGNALED):
        return True
    if outcome is Outcome.UNREACHED or inbox is None or inbox.exec_at is None:
        return False
    return True if outcome is not Outcome.LOST and inbox.running_at is not None else None


def _silence(phase: str, target: Target, limit: float) -> NodeError:
    """Return the error of a phase in which nothing came for `limit` seconds."""
    said = f"no answer for {limit:g} s"
    if phase == "resolve":
        return errors.ResolveError(f"no address for {target.address} within {limit:g} s", phase=phase, kind=said)
    if phase in ("tcp", "queued"):
        return errors.ConnectTimeout(
            f"no answer from {target.where()} for {limit:g} s", phase="tcp", kind=said
        )
    if phase == "banner":
        return errors.BannerError(said, phase=phase)
    if phase in ("kex", "hostkey"):
        return errors.HandshakeTimeout(said, phase=phase)
    if phase == "auth":
        hint = f"{said} after the key was offered. Often the home directory (NFS, Lustre) or PAM hangs on the node"
        return errors.AuthTimeout(hint, phase=phase, kind=said)
    return errors.SessionTimeout(said, phase=phase)
