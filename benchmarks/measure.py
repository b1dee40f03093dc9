# SPDX-License-Identifier: Apache-2.0
"""What the programs measure with: the clock, CPU time, memory; and the record of what is given to a peer.

Runs in the main thread of whoever measures; nothing here is shared.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

__all__ = ["BenchmarkError", "Cost", "Sample", "Setup", "Spread", "cpu", "measured", "memory"]

#: Seconds that a client is left alone after its last result: what its threads, or the processes that it forked,
#: still do for the work that was measured counts as CPU, and not as wall clock.
REST = 0.2

#: What one peer did in one round: figure -> value.
Sample = dict[str, float]

T = TypeVar("T")


class BenchmarkError(Exception):
    """A benchmark cannot go on; its text is for the user."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a peer is given.

    Attributes:
        sizes: the sizes of the program, by name.
        nodes: addresses, which stand in `known_hosts` together with `port`; none where there is no server.
        folder: what the program has put there for the peers lies in it.
    """

    sizes: Mapping[str, int]
    nodes: Sequence[str] = ()
    port: int = 0
    user: str = ""
    identity: str = ""
    known_hosts: str = ""
    folder: str = ""
    #: what else a program tells its peers
    more: Mapping[str, str] = field(default_factory=dict)


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


def measured(work: Callable[[], T], rest: Callable[[float], object] = time.sleep) -> tuple[T, Cost]:
    """Do some work; return what it returned, and what it took.

    Args:
        rest: waits so many seconds in the way in which the work goes on meanwhile (an event loop has to run).
    """
    before, began = cpu(), time.perf_counter()
    answer = work()
    wall = time.perf_counter() - began
    rest(REST)
    return answer, Cost(cpu=cpu() - before, wall=wall)


def cpu() -> float:
    """Seconds of user and system time of this process, all its threads, and the children that it has reaped."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def memory(what: str) -> int:
    """Bytes of memory of this process: `VmRSS` for what it has now, `VmHWM` for the most that it ever had."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == what:
            return int(value.split()[0]) * 1024
    raise BenchmarkError(f"the kernel does not tell {what}")
