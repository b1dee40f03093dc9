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
* The jobs of one way (SSH, local commands) start in their order. A job that has to wait holds up those of its own way
  only: a local command does not wait for a descriptor of a dial, nor a node for a local command.
"""

from __future__ import annotations

import enum
import heapq
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, NamedTuple, Protocol, TypeVar

from ctask.options import Target

__all__ = ["PACE", "Dial", "Join", "Making", "Plan", "PlannedJob", "Shake", "Stage", "Start"]

#: Seconds after which a dialed node that has not been heard counts as silent. Healthy nodes on a LAN answer in
#: less; with it, they are not left waiting unauthenticated behind a full fan-out.
PACE = 0.020


class Way(Protocol):
    """What the plan needs to know of a transport."""

    @property
    def dials(self) -> bool:
        """Whether a connection begins with a socket; where it does not, a job starts when `take` gives it a place."""


class PlannedJob(Protocol):
    """What the plan needs to know of a job."""

    @property
    def target(self) -> Target: ...

    @property
    def way(self) -> Way:
        """The transport that takes it to its node."""

    @property
    def fresh(self) -> bool:
        """Whether it wants a connection that is made from now on; of no meaning where nothing is dialed."""


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
        begin: makes the record of a connection in the making, for the first job that waits for it.
    """

    def __init__(self, fanout: int, begin: Callable[[J], M]) -> None:
        self.fanout = fanout
        self._begin = begin
        # Who waits, a queue for each way, each job with its place among all: no job outlives its withdrawal in here,
        # and with it its worker and output.
        self._queues: dict[int, OrderedDict[J, int]] = {}
        self._first = self._last = 0
        self._holders: set[J] = set()
        self._makings: dict[Target, M] = {}
        self._joined: dict[J, M] = {}
        self._spoke: deque[M] = deque()
        self._young: deque[tuple[float, M]] = deque()
        self._unheard: set[M] = set()
        self._shaking = 0
        self._backoffs: list[_Backoff[J]] = []
        self._backing: dict[J, _Backoff[J]] = {}
        self._count = 0
        self._batches: dict[Hashable, dict[J, None]] = {}
        #: a place or a dial was wanted and there was no descriptor for it
        self.short = False

    # -- facts -----------------------------------------------------------------------------------------------

    def submitted(self, jobs: Iterable[J], batch: Hashable | None = None) -> None:
        """New jobs, in order; those of a batch wait until `opened(batch)`."""
        if batch is not None:
            self._batches.setdefault(batch, {}).update(dict.fromkeys(jobs))
            return
        for job in jobs:
            self._last += 1
            self._queue(job)[job] = self._last

    def opened(self, batch: Hashable) -> None:
        """The jobs of a batch may run."""
        self.submitted(self._batches.pop(batch, ()))

    def requeued(self, jobs: Iterable[J]) -> None:
        """Jobs that were on their way and begin anew, before all others."""
        for job in reversed(list(jobs)):
            self._first -= 1
            queue = self._queue(job)
            queue[job] = self._first
            queue.move_to_end(job, last=False)

    def backoff(self, job: J, until: float) -> None:
        """A job that tries again at `until`; meanwhile it holds nothing."""
        self._count += 1
        entry = self._backing[job] = _Backoff(until, self._count, job)
        heapq.heappush(self._backoffs, entry)

    def spoke(self, making: M) -> None:
        """The server's first byte has come; it waits for a slot."""
        self._heard(making)
        making.stage = Stage.SPOKE
        self._spoke.append(making)

    def unshaken(self, making: M) -> None:
        """There was no thread for the handshake: it waits for its slot again, before all others."""
        if making.stage is Stage.SHAKING:
            making.stage = Stage.SPOKE
            self._shaking -= 1
            self._spoke.appendleft(making)

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
        making = self._joined.pop(job, None)
        if making is None:
            self._unqueue(job)
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
            reserve: takes a descriptor for a dial, or returns False and has `step` called when that may have changed.
                Where nothing is dialed it is asked as well, for the second.
        """
        actions: list[Dial[M] | Join[M, J] | Shake[M] | Start[J, C]] = []
        self._wake(now)
        while self._spoke and self.slots < self.fanout:
            making = self._spoke.popleft()
            making.stage = Stage.SHAKING
            self._shaking += 1
            actions.append(Shake(making))
        self.short = False
        waits: set[int] = set()
        while self.slots < self.fanout and (way := self._foremost(waits)) is not None:
            queue = self._queues[way]
            job = next(iter(queue))
            action = self._next(job, now, take, reserve)
            if action is None:
                waits.add(way)
                continue
            del queue[job]
            if not queue:
                del self._queues[way]
            actions.extend(action)
        return actions

    def _foremost(self, waits: set[int]) -> int | None:
        """Return the way whose queue has the first job of all, but for those that wait."""
        queues = self._queues
        if len(queues) == 1:
            way = next(iter(queues))
            return None if way in waits else way
        heads = ((next(iter(queue.values())), way) for way, queue in queues.items() if way not in waits)
        return min(heads, default=(0, None))[1]

    def _next(
        self, job: J, now: float, take: Callable[[J], C | None], reserve: Callable[[J], bool]
    ) -> list[Dial[M] | Join[M, J] | Shake[M] | Start[J, C]] | None:
        """Return what lets the head of a queue go on; None: it waits."""
        dials = job.way.dials
        connection = None if job.fresh and dials else take(job)
        if connection is not None:
            self._holders.add(job)
            return [Start(job, connection)]
        if not dials:
            reserve(job)  # so that it is seen to that `step` is called; there is nothing to dial, whatever it says
            self.short = True
            return None
        making = self._makings.get(job.target)
        dial = making is None
        if making is None:
            if self.slots + len(self._spoke) + len(self._unheard) >= self.fanout:
                return None
            if not reserve(job):
                self.short = True
                return None
            making = self._makings[job.target] = self._begin(job)
            self._young.append((now + PACE, making))
            self._unheard.add(making)
        making.jobs[job] = None
        self._joined[job] = making
        join: Join[M, J] = Join(job, making)
        return [join, Dial(making)] if dial else [join]

    def due(self) -> float | None:
        """Return when `step` wants to be called again though no fact has come; None: not before one."""
        backoffs = self._backoffs
        while backoffs and backoffs[0].job is None:
            heapq.heappop(backoffs)
        times = [backoffs[0].until] if backoffs else []
        if self._queues and self._young and self.slots < self.fanout:
            times.append(self._young[0][0])
        return min(times, default=None)

    def holds(self, job: J) -> bool:
        """Whether a job has a slot."""
        return job in self._holders

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
        due = []
        while self._backoffs and self._backoffs[0].until <= now:
            job = heapq.heappop(self._backoffs).job
            if job is not None:
                del self._backing[job]
                due.append(job)
        self.requeued(due)
        while self._young and (self._young[0][0] <= now or self._young[0][1] not in self._unheard):
            self._unheard.discard(self._young.popleft()[1])

    def _heard(self, making: M) -> None:
        self._unheard.discard(making)

    def _back(self, making: M) -> None:
        self.requeued(making.jobs)
        making.jobs.clear()

    def _queue(self, job: J) -> OrderedDict[J, int]:
        # By the identity of the way, which its jobs keep alive: a transport of a program's may be unhashable.
        queue = self._queues.get(id(job.way))
        if queue is None:
            queue = self._queues[id(job.way)] = OrderedDict()
        return queue

    def _unqueue(self, job: J) -> None:
        """Forget a job that waits, wherever it does."""
        way = id(job.way)
        queue = self._queues.get(way)
        if queue is not None and queue.pop(job, None) is not None:
            if not queue:
                del self._queues[way]
            return
        entry = self._backing.pop(job, None)
        if entry is not None:
            entry.job = None
            # Forgotten ones come up at their time, or go when they are the most of it.
            if len(self._backoffs) > 64 and len(self._backing) * 2 < len(self._backoffs):
                self._backoffs = [one for one in self._backoffs if one.job is not None]
                heapq.heapify(self._backoffs)
        for batch in self._batches.values():
            batch.pop(job, None)


class _Backoff(Generic[J]):
    """A job that waits for its next try, until it is withdrawn."""

    __slots__ = ("count", "job", "until")

    def __init__(self, until: float, count: int, job: J) -> None:
        self.until = until
        self.count = count
        self.job: J | None = job

    def __lt__(self, other: _Backoff[J]) -> bool:
        return (self.until, self.count) < (other.until, other.count)
