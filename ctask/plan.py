# SPDX-License-Identifier: Apache-2.0
"""Who dials, who waits, who starts: the slots of the fan-out, the queue, the pace of dials, backoffs and batches.

A pure object: facts go in, `step` gives actions; it has no thread, no lock and no clock of its own. The dispatcher
tells it and carries out what it says.

The rules (docs/design.md, "Slots and dials"):

* A job holds a slot from its start on a connection to its outcome; a connection in the making holds one from its
  handshake to its end. There are never more than `fanout`.
* Dialing takes no slot, so that dead nodes delay nobody. It is paced: a new dial starts while slots, servers that
  spoke and wait, and nodes dialed less than `PACE` ago and not yet heard are fewer than `fanout`.
* One connection is in the making per target; jobs that come meanwhile join it.
"""

from __future__ import annotations

import enum
import heapq
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, NamedTuple, Protocol, TypeVar

from ctask.options import Target

__all__ = ["PACE", "Dial", "Join", "Making", "Plan", "PlannedJob", "Shake", "Stage", "Start"]

#: Seconds after which a dialed node that has not been heard counts as silent. Healthy nodes on a LAN answer in
#: less; with it, they are not left waiting unauthenticated behind a full fan-out.
PACE = 0.020


class PlannedJob(Protocol):
    """What the plan needs to know of a job."""

    @property
    def target(self) -> Target: ...

    @property
    def fresh(self) -> bool:
        """Whether it wants a connection that is made from now on."""


J = TypeVar("J", bound=PlannedJob)


class Stage(enum.Enum):
    """How far a connection in the making has come, as the plan counts it."""

    DIALING = enum.auto()
    SPOKE = enum.auto()
    SHAKING = enum.auto()
    OVER = enum.auto()


class Making(Generic[J]):
    """A connection in the making, and the jobs that wait for it in the order of their joining."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.stage = Stage.DIALING
        self.jobs: dict[J, None] = {}


M = TypeVar("M", bound=Making)  # type: ignore[type-arg]
C = TypeVar("C")


class Dial(NamedTuple, Generic[M]):
    """Begin to connect."""

    making: M


class Join(NamedTuple, Generic[M, J]):
    """The job now waits for this connection in the making."""

    job: J
    making: M


class Shake(NamedTuple, Generic[M]):
    """The server spoke and there is a slot: shake hands."""

    making: M


class Start(NamedTuple, Generic[J, C]):
    """Start the job on a kept connection on which it now has a place."""

    job: J
    connection: C


class Plan(Generic[J, M, C]):
    """The state of one task's jobs as far as their order is concerned. Dispatcher only.

    Args:
        fanout: how many slots there are; may be changed at any time.
        begin: makes the record of a connection in the making.
    """

    def __init__(self, fanout: int, begin: Callable[[Target], M]) -> None:
        self.fanout = fanout
        self._begin = begin
        self._queue: deque[J] = deque()
        # Who still waits in the queue or in a backoff: a job that is withdrawn leaves its place to be skipped.
        self._waiting: set[J] = set()
        self._holders: set[J] = set()
        self._makings: dict[Target, M] = {}
        self._joined: dict[J, M] = {}
        self._spoke: deque[M] = deque()
        self._young: deque[tuple[float, M]] = deque()
        self._unheard: set[M] = set()
        self._shaking = 0
        self._backoffs: list[tuple[float, int, J]] = []
        self._count = 0
        self._batches: dict[Hashable, list[J]] = {}
        #: a dial was wanted and there was no descriptor for it
        self.short = False

    # -- facts -----------------------------------------------------------------------------------------------

    def submitted(self, jobs: Iterable[J], batch: Hashable | None = None) -> None:
        """New jobs, in order; those of a batch wait until `opened(batch)`."""
        jobs = list(jobs)
        self._waiting.update(jobs)
        if batch is None:
            self._queue.extend(jobs)
        else:
            self._batches.setdefault(batch, []).extend(jobs)

    def opened(self, batch: Hashable) -> None:
        """The jobs of a batch may run."""
        self._queue.extend(self._batches.pop(batch, ()))

    def requeued(self, jobs: Iterable[J]) -> None:
        """Jobs that were on their way and begin anew, before all others."""
        jobs = list(jobs)
        self._waiting.update(jobs)
        self._queue.extendleft(reversed(jobs))

    def backoff(self, job: J, until: float) -> None:
        """A job that tries again at `until`; meanwhile it holds nothing."""
        self._waiting.add(job)
        self._count += 1
        heapq.heappush(self._backoffs, (until, self._count, job))

    def spoke(self, making: M) -> None:
        """The server's first byte has come; it waits for a slot."""
        self._heard(making)
        making.stage = Stage.SPOKE
        self._spoke.append(making)

    def hung_up(self, making: M) -> None:
        """The server went away while it waited for a slot: its jobs go back to the queue."""
        self.over(making)
        self._back(making)

    def made(self, making: M) -> None:
        """The connection stands, and is among those that are kept: its jobs go to the queue's head."""
        self.over(making)
        self._back(making)

    def over(self, making: M) -> None:
        """The making has ended, in whatever way; its jobs are the caller's."""
        if making.stage is Stage.OVER:
            return
        self._heard(making)
        if making.stage is Stage.SPOKE:
            self._spoke.remove(making)
        elif making.stage is Stage.SHAKING:
            self._shaking -= 1
        making.stage = Stage.OVER
        del self._makings[making.target]
        for job in making.jobs:
            self._joined.pop(job, None)

    def freed(self, job: J) -> None:
        """A job gave its slot back; none is fine."""
        self._holders.discard(job)

    def withdrawn(self, job: J) -> M | None:
        """A job has its outcome, wherever it was. Return the making that nobody waits for any more."""
        self._holders.discard(job)
        self._waiting.discard(job)
        making = self._joined.pop(job, None)
        if making is None:
            return None
        making.jobs.pop(job, None)
        if making.jobs:
            return None
        self.over(making)
        return making

    # -- actions ---------------------------------------------------------------------------------------------

    def step(
        self, now: float, take: Callable[[J], C | None], reserve: Callable[[J], bool]
    ) -> list[Dial[M] | Join[M, J] | Shake[M] | Start[J, C]]:
        """Return what is to be done now.

        Args:
            now: the dispatcher's time.
            take: takes a place on a kept connection for a job, or returns None.
            reserve: takes a descriptor for a dial, or returns False.
        """
        actions: list[Dial[M] | Join[M, J] | Shake[M] | Start[J, C]] = []
        self._wake(now)
        while self._spoke and self.slots < self.fanout:
            making = self._spoke.popleft()
            making.stage = Stage.SHAKING
            self._shaking += 1
            actions.append(Shake(making))
        self.short = False
        while self._queue and self.slots < self.fanout:
            job = self._queue[0]
            if job not in self._waiting:
                self._queue.popleft()
                continue
            action = self._next(job, now, take, reserve)
            if action is None:
                break
            self._queue.popleft()
            self._waiting.discard(job)
            actions.extend(action)
        return actions

    def _next(
        self, job: J, now: float, take: Callable[[J], C | None], reserve: Callable[[J], bool]
    ) -> list[Dial[M] | Join[M, J] | Shake[M] | Start[J, C]] | None:
        """Return what lets the head of the queue go on; None: it waits."""
        connection = None if job.fresh else take(job)
        if connection is not None:
            self._holders.add(job)
            return [Start(job, connection)]
        making = self._makings.get(job.target)
        dial = making is None
        if making is None:
            if self.slots + len(self._spoke) + len(self._unheard) >= self.fanout:
                return None
            if not reserve(job):
                self.short = True
                return None
            making = self._makings[job.target] = self._begin(job.target)
            self._young.append((now + PACE, making))
            self._unheard.add(making)
        making.jobs[job] = None
        self._joined[job] = making
        join: Join[M, J] = Join(job, making)
        return [join, Dial(making)] if dial else [join]

    def due(self) -> float | None:
        """Return when `step` wants to be called again though no fact has come; None: not before one."""
        times = [self._backoffs[0][0]] if self._backoffs else []
        if self._queue and self._young and self.slots < self.fanout:
            times.append(self._young[0][0])
        return min(times, default=None)

    @property
    def slots(self) -> int:
        """How many slots are taken."""
        return len(self._holders) + self._shaking

    @property
    def dialing(self) -> int:
        """How many connections are in the making without a slot."""
        return len(self._makings) - self._shaking

    # -- inside ----------------------------------------------------------------------------------------------

    def _wake(self, now: float) -> None:
        """Move on what only time moves."""
        while self._backoffs and self._backoffs[0][0] <= now:
            job = heapq.heappop(self._backoffs)[2]
            if job in self._waiting:
                self._queue.appendleft(job)
        while self._young and (self._young[0][0] <= now or self._young[0][1] not in self._unheard):
            self._unheard.discard(self._young.popleft()[1])

    def _heard(self, making: M) -> None:
        self._unheard.discard(making)

    def _back(self, making: M) -> None:
        self.requeued(making.jobs)
        making.jobs.clear()
