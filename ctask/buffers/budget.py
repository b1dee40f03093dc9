# SPDX-License-Identifier: Apache-2.0
"""How much memory a task's output takes.

Charged by the dispatcher. What is freed comes back from destructors, which run in whichever thread drops the last
reference, through a queue that the dispatcher empties.
"""

from __future__ import annotations

from collections import deque

__all__ = ["RESERVE", "MemoryBudget"]

#: Bytes of a large limit that are left to what nobody charges, so that a process grows by no more than its limit: what
#: is on its way from the nodes (the windows of all that run), what the allocator keeps, and the jobs' own records.
#: Measured with 1,000 nodes.
RESERVE = 32 << 20


class MemoryBudget:
    """The ceiling of one task's stored output, over all that is held of it: of running jobs and of kept results.

    It refuses nothing: who stores asks `over`, and writes to a file while it says so.

    Attributes:
        limit: bytes; may be changed at any time, and holds for what is stored from then on.
    """

    __slots__ = ("_charged", "_returned", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._charged = 0
        self._returned: deque[int] = deque()

    @property
    def held(self) -> int:
        """Bytes that are held in memory now. Any thread; of a moment ago."""
        return self._charged - sum(self._returned.copy())

    def charge(self, count: int) -> None:
        """Account for `count` bytes more, or for fewer. Dispatcher."""
        self._charged += count

    def give_back(self, count: int) -> None:
        """Account for `count` bytes that are gone. Any thread, and destructors."""
        self._returned.append(count)

    def over(self) -> bool:
        """Whether more is held than the limit, less the reserve, allows. Dispatcher."""
        returned = self._returned
        while returned:
            self._charged -= returned.popleft()
        return self._charged > self.limit - min(RESERVE, max(0, self.limit - RESERVE))
