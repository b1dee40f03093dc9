# SPDX-License-Identifier: Apache-2.0
"""The credit of one task's nodes: whether they may send more, decided where three threads meet.

Connections' threads ask, the dispatcher and the owner count; one lock guards it, under which nobody waits or sends.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

__all__ = ["AFLOAT", "AWAY", "SHARE", "WIDER", "Gate"]

#: Bytes of a task that may be on their way from the connections' threads to the store.
AFLOAT = 4 << 20
#: Bytes of one node that may wait for handlers though the task's limit is passed: it is another that floods.
SHARE = 256 * 1024
#: Seconds that the owner may be away before credit is given again. A program that waits in a loop, a moment at a time,
#: is at it all the while; with none, each of its waits lets every node send a window more.
AWAY = 0.05
#: Bytes by which the windows of a task may be wider, all together, than they begin. A single node gets what a long way
#: needs; many at a time bring no more memory than this.
WIDER = 4 << 20


class Credited(Protocol):
    """A session whose credit can be withheld."""

    def give(self) -> None: ...


class Asker(Protocol):
    """Who asks for a session."""

    #: when credit was last given that had been withheld (monotonic seconds)
    given_at: float

    def waiting(self) -> int:
        """Return how much of this node waits for handlers."""


class Gate:
    """Decides whether nodes may send more.

    Credit is withheld while the owner *delivers* and more than `limit` bytes wait for handlers, from nodes of which
    more than `SHARE` waits; and from all while more than `AFLOAT` bytes wait to be stored. Once the owner has not
    delivered for `AWAY` it is given, so that no wait can deadlock.

    Guarantees: asking, withholding and giving happen under one lock, so that no pause is lost; who was refused is
    given credit once, by `give`, as soon as the reason is gone.

    `_stored` is written by the dispatcher and `_read` by the owner only; each reads the other's late by a moment,
    which makes the limit soft, not wrong.

    Args:
        limit: bytes that may wait for handlers.
        give: gives sessions the credit that was withheld.
        later: has a call made in so many seconds, by the dispatcher.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        limit: int,
        give: Callable[[list[Credited]], object],
        later: Callable[[float, Callable[[], None]], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limit = limit
        self._give = give
        self._later = later
        self._clock = clock
        self._lock = threading.Lock()
        # Under the lock: delivering, left, watched, shut, refused, afloat, wider.
        self._delivering = False
        self._left = 0.0
        self._watched = False
        self._shut = False
        self._refused: dict[Credited, Asker] = {}
        self._afloat = 0
        self._wider = 0
        self._stored = 0
        self._read = 0

    def ask(self, session: Credited, asker: Asker) -> bool:
        """May this session's node send more? Connection's thread."""
        with self._lock:
            if self._afloat <= AFLOAT and (not self._shut or asker.waiting() < SHARE):
                return True
            self._refused[session] = asker
            return False

    def widen(self, size: int) -> int:
        """Return by how much a window may grow, at most `size`; to be given back by `narrow`. Connection's thread."""
        with self._lock:
            size = min(size, WIDER - self._wider)
            self._wider += size
            return size

    def narrow(self, size: int) -> None:
        """Windows that had grown by `size` are no more. Connection's thread."""
        with self._lock:
            self._wider -= size

    def withholds(self, session: Credited) -> bool:
        """Whether this session waits for credit. Any thread."""
        with self._lock:
            return session in self._refused

    def posted(self, count: int) -> None:
        """Bytes are on their way to the store. Connection's thread."""
        with self._lock:
            self._afloat += count

    def landed(self, count: int) -> None:
        """They have arrived, or were thrown away. Dispatcher."""
        with self._lock:
            self._afloat -= count
            waiting = self._release()
        if waiting:
            self._give(waiting)

    def more(self, count: int) -> None:
        """So many bytes now wait for handlers. Dispatcher."""
        self._stored += count
        if self._stored - self._read > self.limit:
            with self._lock:
                # Where the owner is away, but not for long, it stays as it was.
                self._shut = self._shut or self._delivering

    def less(self, count: int) -> None:
        """Handlers have had so many bytes, or never will. Owner."""
        self._read += count
        if self._shut and self._stored - self._read <= self.limit // 2:
            self._open()
        elif self._refused:
            self._renew()

    def begin(self) -> None:
        """The owner delivers. Owner."""
        with self._lock:
            self._delivering = True
            self._shut = self._stored - self._read > self.limit

    def end(self) -> None:
        """The owner does something else. Owner."""
        with self._lock:
            self._delivering = False
            self._left = self._clock()
            watch = self._shut and not self._watched
            self._watched = self._watched or watch
        if watch:
            self._later(AWAY, self._look)

    def _look(self) -> None:
        """Is the owner still away? Dispatcher."""
        with self._lock:
            away = self._shut and not self._delivering
            left = self._left + AWAY - self._clock() if away else 0.0
            self._watched = left > 0
        if left > 0:  # it was here meanwhile
            self._later(left, self._look)
        elif away:
            self._open()

    def _open(self) -> None:
        with self._lock:
            self._shut = False
        self._renew()

    def _renew(self) -> None:
        with self._lock:
            waiting = self._release()
        if waiting:
            self._give(waiting)

    def _release(self) -> list[Credited]:
        """Return who may be given credit now; under the lock."""
        if self._afloat > AFLOAT // 2 or not self._refused:
            return []
        waiting = [one for one, asker in self._refused.items() if not self._shut or asker.waiting() < SHARE]
        for session in waiting:
            self._refused.pop(session).given_at = self._clock()
        return waiting
