# SPDX-License-Identifier: Apache-2.0
"""What the programs measure with: the clock, the CPU of a process and of the children that it has waited for.

Runs in the main thread of whoever measures; nothing here is shared.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["BenchmarkError", "Cost", "Spread", "measured"]

#: Seconds that a client is left alone after its last result: what its threads, or the processes that it forked,
#: still do for the work that was measured counts as CPU, and not as wall clock.
REST = 0.2

T = TypeVar("T")


class BenchmarkError(Exception):
    """A benchmark cannot go on; its text is for the user."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one piece of work took, in seconds."""

    cpu: float
    wall: float


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some samples, the least and the greatest of them."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Return the spread of at least one sample."""
        return cls(statistics.median(samples), min(samples), max(samples))

    def scaled(self, factor: float) -> Spread:
        """Return the same in another unit."""
        return Spread(self.median * factor, self.least * factor, self.most * factor)


def measured(work: Callable[[], T], rest: Callable[[float], object] = time.sleep) -> tuple[T, Cost]:
    """Do some work; return what it returned, and what it took.

    Args:
        rest: waits so many seconds in the way in which the work goes on meanwhile (an event loop has to run).
    """
    before, began = _cpu(), time.perf_counter()
    answer = work()
    wall = time.perf_counter() - began
    rest(REST)
    return answer, Cost(cpu=_cpu() - before, wall=wall)


def _cpu() -> float:
    """Seconds of user and system time of this process, all its threads, and the children that it has reaped."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
