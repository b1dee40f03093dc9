# SPDX-License-Identifier: Apache-2.0
"""What one attempt of a job has of its own: the inbox that its session pushes into, and its clock while it connects.

`Inbox` is the sink of the Protocol: its methods run in the connection's thread, collect, and post once when the
socket runs dry; its stamps are read by the dispatcher. `ConnectClock` is the dispatcher's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ctask import errors
from ctask.dispatcher import Deadline, Dispatcher
from ctask.errors import NodeError
from ctask.gate import Gate
from ctask.intake import Intake
from ctask.options import Target
from ctask.result import signal_number
from ctask.states import Outcome
from ctask.transports.base import Session

if TYPE_CHECKING:
    from ctask.job import Job

__all__ = ["ConnectClock", "Inbox", "rc_of", "silence", "whether_ran"]


class Inbox:
    """The sink of one attempt. Connection's thread; the stamps are read by the dispatcher."""

    __slots__ = (
        "_box",
        "_gate",
        "_intake",
        "_job",
        "_size",
        "_tell",
        "_told",
        "_wider",
        "end",
        "exec_at",
        "first_at",
        "given_at",
        "heard_at",
        "over",
        "running_at",
        "status",
    )

    def __init__(self, job: Job, gate: Gate, intake: Intake, *, tell: bool) -> None:
        # None once the try is over: what still comes belongs to no try.
        self._job: Job | None = job
        self._intake: Intake | None = intake
        self._gate = gate
        self._box: list[tuple[int, bytes]] = []
        self._size = 0
        # Whether the dispatcher wants to hear at once that the command runs.
        self._tell = tell
        self._told = True
        # By how much the node may send further ahead than at the beginning.
        self._wider = 0
        self.exec_at: float | None = None
        self.running_at: float | None = None
        self.first_at: float | None = None
        self.given_at = 0.0
        #: when something of it was last stored; the dispatcher's
        self.heard_at = 0.0
        #: (exit status, name of signal), as soon as it is known
        self.status: tuple[int | None, str | None] | None = None
        self.over = False
        self.end: NodeError | None = None

    def over_and_out(self) -> None:
        """The try is over: take nothing any more, and hold nothing of the job. Dispatcher."""
        self._job = self._intake = self.end = None

    def tell(self) -> None:
        """Post at once when the command runs. Dispatcher, which looks at `running_at` after it."""
        self._tell = True

    def now_in(self, phase: str) -> str:
        """Return where the attempt is that the dispatcher has seen in `phase`. Any thread; of a moment ago."""
        if phase not in ("open", "exec"):
            return phase
        if self.running_at is not None:
            return "running"
        return "exec" if self.exec_at is not None else phase

    def phase(self, name: str) -> None:
        """See `Sink`."""
        if name == "exec":
            self.exec_at = time.monotonic()
        elif name == "running":
            self.running_at = time.monotonic()
            self._told = self._told and not self._tell

    def data(self, stream: int, chunk: bytes) -> None:
        """See `Sink`."""
        if self.first_at is None:
            self.first_at = time.monotonic()
        self._box.append((stream, chunk))
        self._size += len(chunk)

    def exited(self, status: int | None, signal: str | None) -> None:
        """See `Sink`."""
        self.status = (status, signal)
        self._told = False

    def ended(self, error: NodeError | None) -> None:
        """See `Sink`."""
        if self._job is not None:
            self.end = error
        self.over = True
        if self._wider:
            self._gate.narrow(self._wider)
        self._told = False

    def flush(self) -> None:
        """See `Sink`."""
        box, size = self._box, self._size
        if not box and self._told:
            return
        self._told = True
        self._box, self._size = [], 0
        job = self._job
        if job is None:
            return
        if box:
            self._gate.posted(size)
        # What is known at this moment goes along: when the dispatcher comes to it, more may have been posted.
        job.run.post(job, job.arrived, self, box, size, self.status is not None, self.over)

    def may(self, session: Session) -> bool:
        """See `Sink`."""
        return self._gate.ask(session, self)

    def waiting(self) -> int:
        """See `ctask.gate.Asker`."""
        intake = self._intake
        return intake.waiting if intake is not None else 0

    def widen(self, size: int) -> int:
        """See `Sink`."""
        size = self._gate.widen(size)
        self._wider += size
        return size

    def writable(self) -> None:
        """See `Sink`."""
        job = self._job
        if job is not None:
            job.run.post(job, job.writable, self)


class ConnectClock:
    """The `connect_timeout` of one job: runs from its joining, and stands while the job waits for its turn.

    It stands while this process does as well: its side of a handshake was not carried on meanwhile.
    """

    __slots__ = ("_deadline", "_dispatcher", "_job", "_left", "_lost", "_since")

    def __init__(self, job: Job, dispatcher: Dispatcher, limit: float | None) -> None:
        self._job = job
        self._dispatcher = dispatcher
        self._left = limit
        self._since: float | None = None
        self._lost = 0.0
        self._deadline: Deadline | None = None

    def run(self, now: float) -> None:
        """Go on; running already is fine."""
        if self._left is not None and self._since is None:
            self._since, self._lost = now, self._dispatcher.lost
            self._deadline = self._dispatcher.after(self._left, self._job, self._job.not_answered)

    def pause(self, now: float) -> None:
        """Stand; standing already is fine."""
        if self._since is not None and self._left is not None:
            ran = now - self._since - (self._dispatcher.lost - self._lost)
            self._left = max(0.0, self._left - max(0.0, ran))
        self._since = None
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def spend(self, seconds: float, now: float) -> bool:
        """Take time off, and stand; False: there is not so much left. Without a limit there always is."""
        self.pause(now)
        if self._left is None:
            return True
        self._left -= seconds
        return self._left > 0


class Silence:
    """Calls when a session was silent for long though its node could have spoken. Dispatcher.

    It could not while credit was withheld from it, or while something of it waited to be stored.

    Args:
        job: whose deadlines these are.
        limit: seconds.
        call: what is called then, once.
    """

    __slots__ = ("_call", "_deadline", "_inbox", "_job", "_limit", "_session")

    def __init__(
        self, job: Job, session: Session, inbox: Inbox, limit: float, since: float, call: Callable[[], None]
    ) -> None:
        self._job = job
        self._session = session
        self._inbox = inbox
        self._limit = limit
        self._call = call
        inbox.heard_at = since
        self._deadline = job.run.dispatcher.at(since + limit, job, self._look)

    def cancel(self) -> None:
        """Listen no more."""
        self._deadline.cancel()

    def _look(self) -> None:
        run, inbox = self._job.run, self._inbox
        now = run.dispatcher.clock()
        if run.gate.withholds(self._session):
            inbox.heard_at = now  # it waits for us: its silence says nothing
        heard = max(inbox.heard_at, inbox.given_at)
        if now - heard >= self._limit:
            self._call()
        else:
            self._deadline = run.dispatcher.at(heard + self._limit, self._job, self._look)


def silence(phase: str, target: Target, limit: float) -> NodeError:
    """Return the error of a phase in which nothing came for `limit` seconds."""
    said = f"no answer for {limit:g} s"
    if phase == "resolve":
        text = f"no address for {target.address} within {limit:g} s"
        return errors.ResolveError(text, phase=phase, kind=said, curable=errors.Curable.MAYBE)
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


def rc_of(outcome: Outcome, status: int | None, signal: str | None) -> int | None:
    """Return what `NodeResult.rc` says of an outcome, and of a status or a signal where one is known."""
    if outcome is Outcome.EXITED:
        return status
    if outcome is Outcome.SIGNALED:
        return 128 + signal_number(signal or "")
    return 255 if outcome in (Outcome.UNREACHED, Outcome.LOST) else None


def whether_ran(outcome: Outcome, inbox: Inbox | None) -> bool | None:
    """Return what `NodeResult.ran` says of an attempt; None as its inbox: nothing was begun."""
    if outcome in (Outcome.EXITED, Outcome.SIGNALED):
        return True
    if outcome is Outcome.UNREACHED or inbox is None or inbox.exec_at is None:
        return False
    return True if outcome is not Outcome.LOST and inbox.running_at is not None else None
