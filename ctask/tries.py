# SPDX-License-Identifier: Apache-2.0
"""The tries of one job that are over, and whether there is to be another one.

Runs in the dispatcher; a job's own.
"""

from __future__ import annotations

from typing import Any

from ctask.attempt import ConnectClock, Inbox, rc_of, whether_ran
from ctask.buffers import Capture
from ctask.errors import CommandFailed, NodeError
from ctask.result import Account, Attempt, Ending, NodeResult, Timings, status_text
from ctask.retry import BUSY, Retry, Tries
from ctask.states import Outcome, Timeline

__all__ = ["TriesSoFar"]


class TriesSoFar:
    """What a job has tried.

    Args:
        node: whose job it is.
        policy: when it is tried again; None: never.
        ok_codes: exit statuses that are a success.

    Attributes:
        done: an `Attempt` for each try.
        failure: what the last one has failed by; None: it is ok, and its status asks for nothing.
    """

    __slots__ = ("_error", "_node", "_ok_codes", "_outcome", "_policy", "_ran", "_rc", "_signal", "done", "failure")

    def __init__(self, node: Any, policy: Retry | None, ok_codes: frozenset[int]) -> None:
        self._node = node
        self._policy = policy
        self._ok_codes = ok_codes
        self._ran: bool | None = False
        self.done: tuple[Attempt, ...] = ()
        self.failure: NodeError | None = None

    @property
    def _name(self) -> str:
        return self._node if isinstance(self._node, str) else ""

    @property
    def own_clock(self) -> bool:
        """Whether each try has a `connect_timeout` of its own: all but those that nobody has asked for."""
        return self._policy is not BUSY

    def over(
        self, timeline: Timeline, outcome: Outcome, inbox: Inbox | None, error: NodeError | None, now: float
    ) -> None:
        """One more has ended."""
        phase = timeline.phase
        spent = timeline.close(outcome, now)
        first = inbox.first_at - timeline.began if inbox is not None and inbox.first_at is not None else None
        status, signal = (inbox.status if inbox is not None else None) or (None, None)
        if error is not None:
            error.node, error.phase = self._name, error.phase or phase
        self._outcome, self._rc, self._error = outcome, rc_of(outcome, status, signal), error
        self._signal = signal if outcome is Outcome.SIGNALED else None
        self._add(Attempt(phase, error, Timings(spent, first), self._rc), whether_ran(outcome, inbox))
        self.failure = error
        if error is None and self._policy is not None and self._asks_again(self._policy, self._rc):
            self.failure = CommandFailed(status_text(outcome, self._rc, signal), node=self._name, phase="running")

    def broken_off(self, phase: str, outcome: Outcome, inbox: Inbox | None, error: NodeError) -> None:
        """The end of one has itself raised: nothing is known but that."""
        self._outcome, self._rc, self._signal, self._error = outcome, None, None, error
        self._add(Attempt(phase, error, Timings({}, None)), whether_ran(outcome, inbox))

    def no_more(self) -> None:
        """There is not to be another one: the job is taken back while one is being ended."""
        self._policy = None

    def again(self, clock: ConnectClock, now: float) -> float | None:
        """Return in how many seconds there is another one; None: there is none."""
        policy, failure = self._policy, self.failure
        if policy is None or failure is None or self._outcome is Outcome.ABORTED:
            return None
        sent = self._ran is not False
        delay = policy.delay(Tries(failure, self._rc, sent, len(self.done), now - self._seconds(), now))
        if policy is BUSY and delay is not None and not clock.spend(delay, now):
            return None  # what is tried without being asked is tried within one `connect_timeout`
        return delay

    def result(self, capture: Capture | None, ending: Ending | None, **how: bool) -> NodeResult:
        """Return what it all came to: the last one's, and whether the command ran in any of them."""
        outcome, error = self._outcome, self._error
        fields = {
            "node": self._node,
            "outcome": outcome,
            "rc": self._rc,
            "signal": self._signal,
            "ran": self._ran,
            "ok": outcome is Outcome.EXITED and self._rc in self._ok_codes,
            "capture": capture,
            "ending": ending,
            **how,
        }
        if error is None:
            return NodeResult(error=None, attempts=self.done, **fields)
        error.node = self._name
        if len(self.done) > 1 and outcome is not Outcome.ABORTED:
            error.tried(len(self.done), self._seconds())
        return error.settle(Account(self.done, fields))

    def _add(self, attempt: Attempt, ran: bool | None) -> None:
        self.done += (attempt,)
        self._ran = True if self._ran or ran else ran if self._ran is False else None

    def _asks_again(self, policy: Retry, rc: int | None) -> bool:
        return rc not in self._ok_codes or rc in policy.statuses

    def _seconds(self) -> float:
        """How long they took, with what was between them."""
        return sum(one.timings.total for one in self.done)
