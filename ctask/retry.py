# SPDX-License-Identifier: Apache-2.0
"""Which failure of which phase is tried again, how often, and when.

`Retry` is a frozen record, made and checked in the caller's thread; the dispatcher asks it after each try. tenacity is
loaded at the first failure that is to be tried again: its `wait_*` and `stop_*` objects are used as functions of a
state, never its loop, since nothing here may sleep.
"""

from __future__ import annotations

import logging
import math
import numbers
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from ctask.errors import (
    AuthRejected,
    CommandFailed,
    CommandTimeout,
    ConnectionLost,
    Curable,
    HostKeyError,
    NoCredentials,
    NodeError,
    OptionError,
)
from ctask.numeric import duration, shown, statuses, whole
from ctask.states import PHASES

if TYPE_CHECKING:
    from tenacity import RetryCallState

__all__ = ["BUSY", "Retry", "Tries"]

log = logging.getLogger("ctask.retry")

#: Given the state of a job's tries, returns whether it gives up: tenacity's `stop_*` objects are such.
Stops: TypeAlias = "Callable[[RetryCallState], bool]"
#: Given the same, returns seconds until the next try: tenacity's `wait_*` objects are such.
Waits: TypeAlias = "Callable[[RetryCallState], float]"
#: Phases by name, classes of `NodeError`, or a function of the error.
On: TypeAlias = "str | type[NodeError] | Iterable[str | type[NodeError]] | Callable[[NodeError], bool]"

#: Seconds between two tries, without a `wait`: at random up to a bound that doubles, so that nodes that failed together
#: do not come back together.
_LEAST_WAIT, _MOST_WAIT = 0.2, 5.0

_NEVER = (HostKeyError, AuthRejected, NoCredentials)
#: What only happens once the command was sent.
_AFTER_EXEC = (ConnectionLost, CommandTimeout, CommandFailed)
_PHASES_AFTER_EXEC = frozenset(PHASES[PHASES.index("exec") :])


@dataclass(frozen=True, slots=True)
class Tries:
    """What a policy is asked about: a job whose try has just failed.

    Attributes:
        error: what the try ended by; for a command that exited, the `CommandFailed` of its status.
        rc: its exit status, None where there is none.
        sent: the command was sent in this try or an earlier one, so that it may have run.
        count: how many tries there were, this one included.
        began: when the first one began (monotonic seconds).
        now: the time.
    """

    error: NodeError
    rc: int | None
    sent: bool
    count: int
    began: float
    now: float


@dataclass(frozen=True)
class Retry:
    """When a job is tried again; the option `retry` of a call, a node or a task.

    A command that was sent may have run, and is tried again only with `idempotent=True`: nobody but the caller knows
    whether it may run twice. Between two tries a job holds no place of the fan-out; an abort, a cancellation and a
    deadline end it at once. Buffers and the result have what the last try printed, `ev_read` hears every try, and
    `ev_retry` comes between two of them. Each try has a `connect_timeout` of its own.

    Args:
        attempts: how many tries at most; or one of tenacity's `stop_*` objects.
        wait: seconds between two tries; or one of tenacity's `wait_*` objects. None: at random, up to 1 s before the
            second try, 2 s before the third, and so on to 5 s; at least 0.2 s (exponential, with full jitter).
        on: what is tried again: names of phases (``"banner"``), classes of `NodeError`, several of these; or a function
            that is given the error and says. None: what may pass by itself; a host key, a login that was refused and an
            unknown name do not, and a `timeout` is not asked again unless it is named. The function is asked about
            commands that exited as well (`CommandFailed`), and about nothing that is no use to try again.
        exit_codes: exit statuses with which the command asks for another try; 128 + n for a signal; 0 to 2^32 - 1.
        idempotent: the command may run more than once.
        budget: seconds after the first try began in which another one may begin; None: any time.

    Raises:
        OptionError: a value that cannot be right; what only happens after the command was sent, without
            `idempotent=True`; what no policy tries again.

    Thread safety: immutable. A function for `on`, and objects for `wait` and `attempts`, are called in the task's
    dispatcher: they must be quick, and may wait for nothing. What they raise is logged, and the job is not tried again.
    """

    attempts: int | Stops = 3
    wait: float | Waits | None = None
    on: On | None = None
    exit_codes: int | Iterable[int] = ()
    idempotent: bool = False
    budget: float | None = None

    def __post_init__(self) -> None:
        if not callable(self.attempts):
            object.__setattr__(self, "attempts", _parsed_attempts(self.attempts))
        if self.wait is not None and not callable(self.wait):
            object.__setattr__(self, "wait", duration("wait", self.wait))
        if self.budget is not None:
            object.__setattr__(self, "budget", duration("budget", self.budget))
        if not isinstance(self.idempotent, bool):
            raise OptionError(f"idempotent is True or False, not {shown(self.idempotent)}")
        object.__setattr__(self, "on", _parsed_on(self.on))
        object.__setattr__(self, "exit_codes", statuses("exit_codes", self.exit_codes))
        if not self.idempotent:
            self._check_once()

    @property
    def statuses(self) -> frozenset[int | None]:
        """The exit statuses that are tried again."""
        return self.exit_codes  # type: ignore[return-value]  # checked and frozen by now

    def delay(self, tries: Tries) -> float | None:
        """Return after how many seconds the job is tried again; None: it is not. Dispatcher.

        Args:
            tries: what has happened.
        """
        try:
            return self._delay(tries) if self._wants(tries) else None
        except Exception:
            log.exception("%s: a function of its Retry raised: not tried again", tries.error.node)
            return None

    def _wants(self, tries: Tries) -> bool:
        error, on = tries.error, self.on
        if error.curable is Curable.NEVER or (tries.sent and not self.idempotent):
            return False
        if tries.rc in self.statuses:
            return True
        if on is None:
            return error.curable >= Curable.MAYBE
        if isinstance(on, tuple):
            return any(error.phase == one if isinstance(one, str) else isinstance(error, one) for one in on)
        return bool(cast("Callable[[NodeError], bool]", on)(error))

    def _delay(self, tries: Tries) -> float | None:
        if isinstance(self.attempts, int) and tries.count >= self.attempts:
            return None
        state = _state(tries)
        wait = self.wait if self.wait is not None else _full_jitter()
        delay = float(wait(state) if callable(wait) else wait)
        if not 0 <= delay < math.inf:
            raise ValueError(f"a wait of {delay} s")
        state.upcoming_sleep = delay
        if callable(self.attempts) and self.attempts(state):
            return None
        if self.budget is not None and tries.now + delay - tries.began > self.budget:
            return None
        return delay

    def _check_once(self) -> None:
        """Refuse what would run a command twice though nobody said that it may."""
        what = ""
        if self.exit_codes:
            what = "exit_codes"
        elif isinstance(self.on, tuple):
            for one in self.on:
                if one in _PHASES_AFTER_EXEC if isinstance(one, str) else issubclass(one, _AFTER_EXEC):
                    what = f"on={one if isinstance(one, str) else one.__name__!r}"
        if what:
            raise OptionError(
                f"Retry({what}) would run a command a second time: say idempotent=True if that does no harm"
            )


def _busy(error: NodeError) -> bool:
    return error.curable is Curable.BUSY


def _parsed_attempts(attempts: object) -> int:
    if not isinstance(attempts, numbers.Integral):
        raise OptionError(
            f"attempts is a whole number, 1 or more, or a stop_… object of tenacity, not {shown(attempts)}"
        )
    return whole("attempts", attempts, 1)


def _parsed_on(on: Any) -> tuple[str | type[NodeError], ...] | Callable[[NodeError], bool] | None:
    if on is None or (callable(on) and not isinstance(on, type)):
        return on
    items = [on] if isinstance(on, (str, type)) else on
    if not isinstance(items, Iterable):
        raise OptionError(f"on is phases, classes of NodeError or a function of the error, not {shown(on)}")
    found = tuple(items)
    for one in found:
        if isinstance(one, str):
            if one not in PHASES:
                raise OptionError(f"on: no such phase: {one!r}; there are: {', '.join(PHASES)}")
        elif not isinstance(one, type) or not issubclass(one, NodeError):
            raise OptionError(f"on: {one!r} is neither a phase nor a class of NodeError")
        if one == "hostkey" or (isinstance(one, type) and issubclass(one, _NEVER)):
            raise OptionError(f"on: {one if isinstance(one, str) else one.__name__!r} is never tried again: "
                              "what was refused once is refused again")  # fmt: skip
    return found


def _full_jitter() -> Waits:
    from tenacity import wait_random_exponential

    return wait_random_exponential(min=_LEAST_WAIT, max=_MOST_WAIT)


def _state(tries: Tries) -> RetryCallState:
    """Return what tenacity's objects are functions of."""
    from tenacity import Future, RetryCallState

    state = RetryCallState(None, None, (), {})  # type: ignore[arg-type]  # there is no loop
    state.start_time = tries.began
    state.attempt_number = tries.count
    state.outcome = Future(tries.count)
    state.outcome.set_exception(tries.error)
    state.outcome_timestamp = tries.now
    return state


#: What is tried again without being asked, within one `connect_timeout`: the signs of a busy server.
BUSY = Retry(3, on=_busy)
