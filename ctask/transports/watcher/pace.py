# SPDX-License-Identifier: Apache-2.0
"""The pace of dials to one place (an address and its port): as many at a time as are answered in good time.

A server takes connections out of a queue of the kernel's. Where it is slow and many come at once, the queue is full,
and the kernel drops what else comes: a client is heard again when its own kernel repeats itself, after 1, 3 and 7 s. So
a place that answers late gets few dials at a time and the next one with each answer, and what was dropped is taken back
and dialed in its turn. A place that answers quickly, and one of which nothing is known, is hardly paced. Places have
nothing to do with each other.

Everything runs in the watcher's thread; no state is shared.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable
from typing import Protocol

__all__ = ["Pace", "Paced", "place_of"]

#: Dials that are on their way at a time to an address that has not answered yet; and to this machine, each of whose
#: addresses (127.0.0.0/8) may be a node of its own, or all of them one.
FIRST, FIRST_HERE = 10, 64
#: The same at least, to a place that answers late: it is never without one that waits for it.
LEAST = 2
#: Seconds within which an answer is in good time; else within twice the shortest time that one has taken.
PROMPT = 0.25
#: Seconds for which dials are to wait in the queue of a place: by this and its rate their number is measured.
QUEUED = 0.3
#: Seconds after which a dial without an answer is not counted any more; later, four times the longest of the last ones.
PATIENCE, PATIENCE_HERE = 1.0, 0.1
#: Seconds without an answer after which a place has fallen silent; later, four times the longest of the last ones, but
#: not more than the second.
SILENT, SILENT_AT_MOST = 3.0, 15.0
#: Answers by which a place is judged: so many at least, the last of so many.
ENOUGH, ANSWERS = 4, 16
#: Seconds after which a connection that is not made was dropped, beyond four times the shortest that one has taken; and
#: seconds between two looks for such.
DROPPED = 0.05


class Paced(Protocol):
    """A dial, as far as its pace is concerned. All calls may call back at once."""

    def go(self) -> None:
        """Connect: your turn has come."""

    def dropped(self) -> bool:
        """Whether our kernel still waits for a first word from the other side's, or repeats what it has sent."""

    def take_back(self) -> None:
        """Undo the connect, and wait for `go`."""

    def stands(self, waits: bool) -> None:
        """Whether others are being answered while this dial waits for its turn: then that is none of its own time."""


class Pace:
    """The places that are being dialed.

    Args:
        at: calls a function at a time of `clock`.
        clock: monotonic seconds.
    """

    def __init__(
        self, at: Callable[[float, Callable[[], None]], object], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._at = at
        self._clock = clock
        self._places: dict[Hashable, _Place] = {}
        self._of: dict[Paced, _Place] = {}

    def ask(self, place: Hashable, dial: Paced, *, here: bool) -> bool:
        """Return whether a dial may connect now; else its `go` is called when it may.

        Args:
            here: the place is this machine, under any of its addresses.
        """
        found = self._places.get(place)
        if found is None:
            found = self._places[place] = _Place(self._at, self._clock, here=here)
        self._of[dial] = found
        return found.ask(dial, self._clock())

    def connected(self, dial: Paced) -> None:
        """The connection stands."""
        found = self._of.get(dial)
        if found is not None:
            found.connected(dial, self._clock())

    def answered(self, dial: Paced) -> None:
        """The server has spoken: the dial is none any more."""
        found = self._of.pop(dial, None)
        if found is not None:
            found.answered(dial, self._clock())
            self._clear(found)

    def left(self, dial: Paced) -> None:
        """The dial is over without an answer; harmless where it is none."""
        found = self._of.pop(dial, None)
        if found is not None:
            found.left(dial, self._clock())
            self._clear(found)

    def _clear(self, found: _Place) -> None:
        # What was seen is of use while dials wait. Later all may be otherwise.
        if found.idle:
            self._places = {place: one for place, one in self._places.items() if one is not found}


class _Place:
    """One place: who is on the way to it, who waits, and what its answers were like."""

    def __init__(
        self, at: Callable[[float, Callable[[], None]], object], clock: Callable[[], float], *, here: bool
    ) -> None:
        self._at = at
        self._clock = clock
        self._here = here
        self._waiting: deque[Paced] = deque()
        #: who is on the way, by the time of the connect; in its order
        self._young: dict[Paced, float] = {}
        #: those that are not counted any more
        self._old: dict[Paced, float] = {}
        #: more do not fit into its queue, as far as is known
        self._fits = float("inf")
        self._looked = 0.0
        self._at_times: deque[float] = deque(maxlen=ANSWERS)
        self._waits: deque[float] = deque(maxlen=ANSWERS)
        self._quickest = float("inf")
        self._nearest = float("inf")
        self._stands = False
        self._due = float("inf")
        self._going = False

    @property
    def idle(self) -> bool:
        return not (self._waiting or self._young or self._old)

    def ask(self, dial: Paced, now: float) -> bool:
        if not self._waiting and self._room(now):
            self._begin(dial, now)
            return True
        self._waiting.append(dial)
        if self._stands:
            dial.stands(True)
        self._look_later(now)
        return False

    def connected(self, dial: Paced, now: float) -> None:
        began = self._young.get(dial) or self._old.get(dial)
        if began is not None:
            self._nearest = min(self._nearest, now - began)

    def answered(self, dial: Paced, now: float) -> None:
        began = self._forget(dial)
        if began is None:
            return
        self._at_times.append(now)
        self._waits.append(now - began)
        self._quickest = min(self._quickest, now - began)
        if self._waiting and not self._stands:
            self._stand(True)
        self._fits += 1 / ANSWERS
        if now - self._looked >= DROPPED:
            self._looked = now
            self._take_back(now)
        self._go_on(now)

    def left(self, dial: Paced, now: float) -> None:
        if self._forget(dial) is None and dial in self._waiting:
            self._waiting.remove(dial)
        self._go_on(now)

    # -- what is known -------------------------------------------------------------------------------------------

    def _late(self) -> bool:
        return max(self._waits, default=0.0) > max(PROMPT, 2 * self._quickest)

    def _most(self) -> float:
        """Return how many may be on the way at a time."""
        most: float = FIRST_HERE if self._here else FIRST
        times = self._at_times
        if len(times) >= ENOUGH:
            rate = (len(times) - 1) / max(0.001, times[-1] - times[0])
            counted = rate * max(QUEUED, 2 * self._quickest)
            most = counted if self._late() else max(most, counted)
        return max(LEAST, min(most, self._fits))

    def _patience(self) -> float:
        least = PATIENCE_HERE if self._here else PATIENCE
        return max(least, 4 * max(self._waits, default=0.0))

    def _silence(self) -> float:
        return min(SILENT_AT_MOST, max(SILENT, 4 * max(self._waits, default=0.0)))

    def _room(self, now: float) -> bool:
        since = now - self._patience()
        while self._young:
            dial = next(iter(self._young))
            if self._young[dial] > since:
                break
            self._old[dial] = self._young.pop(dial)
        return len(self._young) < self._most()

    # -- what is done --------------------------------------------------------------------------------------------

    def _begin(self, dial: Paced, now: float) -> None:
        self._young[dial] = now

    def _forget(self, dial: Paced) -> float | None:
        began = self._young.pop(dial, None)
        return began if began is not None else self._old.pop(dial, None)

    def _take_back(self, now: float) -> None:
        """Have those wait that the place has dropped, and send it no more than it has taken."""
        since = now - DROPPED - 4 * self._nearest
        ways = [*self._old.items(), *self._young.items()]
        dropped = [dial for dial, began in ways if began < since and dial.dropped()]
        if not dropped:
            return
        self._fits = min(self._fits, max(LEAST, len(ways) - len(dropped)))
        for dial in reversed(dropped):
            self._forget(dial)
            self._waiting.appendleft(dial)
            dial.take_back()
            dial.stands(self._stands)

    def _stand(self, stands: bool) -> None:
        self._stands = stands
        for dial in list(self._waiting):
            dial.stands(stands)

    def _go_on(self, now: float) -> None:
        if self._going:
            return  # a dial that failed at once is over within its `go`
        self._going = True
        try:
            while self._waiting and self._room(now):
                dial = self._waiting.popleft()
                self._begin(dial, now)
                if self._stands:
                    dial.stands(False)
                dial.go()
        finally:
            self._going = False
        if self._waiting:
            self._look_later(now)
        else:
            self._stands = False

    def _look_later(self, now: float) -> None:
        """See to it that time alone moves what waits: one timer for all."""
        when = now + self._silence()
        if self._young:
            when = min(when, next(iter(self._young.values())) + self._patience())
        if self._due <= when and self._due > now:
            return
        self._due = when
        self._at(when, self._look)

    def _look(self) -> None:
        now = self._clock()
        if now < self._due:
            return  # of an earlier timer
        self._due = float("inf")
        if not self._waiting:
            return
        if self._stands and now - self._at_times[-1] >= self._silence():
            self._stand(False)
        self._go_on(now)


def place_of(address: str, port: int) -> tuple[Hashable, bool]:
    """Return what dials to this address share with others, and whether that is this machine."""
    here = address.startswith("127.")
    return ("127.0.0.0/8" if here else address, port), here
