# SPDX-License-Identifier: Apache-2.0
"""The life of an attempt as tables: its phases, what may follow each, and how each may end.

Pure data and one small record of time; an attempt's `Timeline` is written by the dispatcher only.
"""

from __future__ import annotations

import enum

__all__ = ["ENDS", "NEXT", "PHASES", "IllegalTransition", "Outcome", "Timeline"]

#: Where an attempt can be, in the order of a cold command.
PHASES = (
    "queued",  # waits for its turn, its slot, or the end of a backoff
    "resolve",  # the node's name is looked up
    "tcp",  # a connection is being made
    "banner",  # connected; the server has not named its SSH version yet
    "kex",  # key exchange
    "hostkey",  # the node's key is compared with known_hosts
    "auth",  # login
    "open",  # a session is being opened
    "exec",  # the command was sent, and not yet acknowledged
    "running",  # the command runs
    "closing",  # its status is known; the last output is awaited
)


class Outcome(enum.StrEnum):
    """How a job ended; exactly one for every job."""

    EXITED = "EXITED"
    """The command ran to its end, with any status."""
    SIGNALED = "SIGNALED"
    """The command was ended by a signal that ctask did not send."""
    TIMEOUT = "TIMEOUT"
    """`timeout` or the run's `deadline` passed."""
    UNREACHED = "UNREACHED"
    """Ended before the command was sent: it has not run."""
    LOST = "LOST"
    """The connection was lost, or `connect_timeout` passed, after the command was sent: nobody knows."""
    ABORTED = "ABORTED"
    """The caller took it back."""


#: Phase -> the phases that may follow. "queued" again: the server hung up while the job waited for its slot,
#: a kept connection turned out to be dead before exec was sent, or (a later room) a retry.
NEXT: dict[str, frozenset[str]] = {
    "queued": frozenset(("resolve", "tcp", "banner", "kex", "hostkey", "auth", "open")),
    "resolve": frozenset(("tcp", "queued")),
    "tcp": frozenset(("banner", "queued")),
    "banner": frozenset(("kex", "queued")),
    "kex": frozenset(("hostkey", "queued")),
    "hostkey": frozenset(("auth", "queued")),
    "auth": frozenset(("open", "queued")),
    "open": frozenset(("exec", "queued")),
    "exec": frozenset(("running", "closing")),
    "running": frozenset(("closing",)),
    "closing": frozenset(),
}

_BEFORE_EXEC = frozenset((Outcome.UNREACHED, Outcome.TIMEOUT, Outcome.ABORTED))
_AFTER_EXEC = frozenset((Outcome.EXITED, Outcome.SIGNALED, Outcome.LOST, Outcome.TIMEOUT, Outcome.ABORTED))

#: Phase -> the outcomes that may end an attempt there. "exec" allows UNREACHED for a command that the server
#: refused to run.
ENDS: dict[str, frozenset[Outcome]] = {
    **dict.fromkeys(PHASES[: PHASES.index("exec")], _BEFORE_EXEC),
    "exec": _AFTER_EXEC | {Outcome.UNREACHED},
    "running": _AFTER_EXEC,
    "closing": _AFTER_EXEC,
}


class IllegalTransition(RuntimeError):
    """An attempt was moved where the table does not let it go: a defect of ctask."""


class Timeline:
    """Where one attempt is, and how long it was in each phase; all times from one monotonic clock."""

    __slots__ = ("began", "entered", "phase", "spent")

    def __init__(self, now: float) -> None:
        self.began = now
        self.entered = now
        self.phase = "queued"
        self.spent: dict[str, float] = {}

    def enter(self, phase: str, now: float) -> None:
        """Move to `phase` at the time `now`; being there already changes nothing."""
        if phase == self.phase:
            return
        if phase not in NEXT[self.phase]:
            raise IllegalTransition(f"{self.phase} -> {phase}")
        self._account(now)
        self.phase = phase

    def close(self, outcome: Outcome, now: float) -> dict[str, float]:
        """End the attempt; return seconds by phase, which sum to the whole."""
        if outcome not in ENDS[self.phase]:
            raise IllegalTransition(f"{self.phase} -> {outcome}")
        self._account(now)
        return self.spent

    def _account(self, now: float) -> None:
        # The stamps of other threads can lie a moment behind the dispatcher's: never negative.
        now = max(now, self.entered)
        self.spent[self.phase] = self.spent.get(self.phase, 0.0) + now - self.entered
        self.entered = now
