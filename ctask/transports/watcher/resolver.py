# SPDX-License-Identifier: Apache-2.0
"""Names to addresses, in daemon threads, since nothing can break `getaddrinfo` off.

`resolve` and `cancel` run in any thread and never wait; the threads `ctask/resolver-N` look up and call back.
One condition guards everything; no lookup and no callback runs under it.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from ctask.threads import NO_THREAD, NoThread, spares, start

__all__ = ["Address", "Found", "Lookup", "Resolver"]

#: A family and what `socket.connect` takes, with port 0.
Address = tuple[int, tuple[Any, ...]]
#: What a lookup gives: addresses in the order in which they are to be tried, or why there are none.
Found = list[Address] | OSError | UnicodeError | NoThread

#: Threads that look up at the same time; those that hang do not count.
THREADS = 8
#: Seconds after which a lookup hangs: its thread is left to it, and another may take its place.
STUCK = 1.0
#: Threads there are at most, hanging ones included.
CEILING = 64
#: Seconds that a thread waits for another name before it ends.
IDLE = 5.0
#: Seconds after which a thread is tried again where there is none, and those after which names are told so.
AGAIN, PATIENCE = 0.05, 5.0


class Lookup:
    """One name that is being looked up, for all who asked for it meanwhile. Guarded by the resolver."""

    __slots__ = ("asking", "began", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.asking: list[Callable[[Found], None]] = []
        self.began: float | None = None


class Resolver:
    """The threads that look names up, made on demand.

    Guarantees: a name is looked up once at a time, however many ask for it; a lookup that hangs holds its own
    name only. Nothing is remembered once it was told.

    Args:
        at: calls a function later, at a monotonic time.
    """

    def __init__(self, at: Callable[[float, Callable[[], None]], object]) -> None:
        self._at = at
        self._changed = threading.Condition(threading.Lock())
        self._queue: deque[Lookup] = deque()
        self._pending: dict[str, Lookup] = {}
        self._busy: set[Lookup] = set()
        self._threads = 0
        self._started = 0
        self._idle = 0
        self._leave = 0
        self._short_since = 0.0
        self._checking = False
        self._closed = False
        spares.add(self)

    def resolve(self, name: str, done: Callable[[Found], None]) -> Lookup:
        """Have `done(found)` called from a resolver's thread, or another one's; it must not wait."""
        with self._changed:
            lookup = self._pending.get(name)
            if lookup is None:
                lookup = self._pending[name] = Lookup(name)
                self._queue.append(lookup)
            lookup.asking.append(done)
            try:
                self._serve()
            except NoThread:
                self._wait_for_thread()
            return lookup

    def _wait_for_thread(self) -> None:
        """Try again soon, where no thread is there at all; one that is there takes the name. Under the condition."""
        now = time.monotonic()
        if self._threads:
            return
        self._short_since = self._short_since or now
        self._at(now + AGAIN, self._try_again)

    def _try_again(self) -> None:
        lost: list[Callable[[Found], None]] = []
        with self._changed:
            if self._threads or not self._queue:
                self._short_since = 0.0
                return
            try:
                self._serve()
                self._short_since = 0.0
            except NoThread:
                if time.monotonic() - self._short_since < PATIENCE:
                    self._wait_for_thread()
                else:
                    self._short_since = 0.0
                    for lookup in self._queue:
                        self._pending.pop(lookup.name, None)
                        lost += lookup.asking
                    self._queue.clear()
        for done in lost:
            done(NoThread(NO_THREAD))

    def let_go(self) -> None:
        """End idle threads: another part of this process needs one. Any thread; never waits."""
        # Not with the condition: it may be this resolver's own thread that could not be started.
        if self._changed.acquire(blocking=False):
            try:
                self._leave = self._idle
                self._changed.notify_all()
            finally:
                self._changed.release()

    def cancel(self, lookup: Lookup, done: Callable[[Found], None]) -> None:
        """Forget the call of `done`; one that is under way may still come."""
        with self._changed:
            if done in lookup.asking:
                lookup.asking.remove(done)

    def close(self) -> None:
        """End the threads: idle ones now, the others with their lookup."""
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify_all()

    def _serve(self) -> None:
        """See to it that somebody takes what is queued. Under the condition."""
        if self._idle:
            self._changed.notify()
            return
        now = time.monotonic()
        stuck = sum(1 for lookup in self._busy if lookup.began is not None and now - lookup.began >= STUCK)
        if self._threads - stuck < THREADS and self._threads < CEILING:
            self._started += 1
            start(f"ctask/resolver-{self._started}", self._run)
            self._threads += 1
        elif not self._checking:
            self._checking = True
            self._at(now + STUCK, self._check)

    def _check(self) -> None:
        """All threads were busy a while ago: those that still are hang."""
        with self._changed:
            self._checking = False
            # One thread for each waiting name, as far as there is room: `_serve` starts one at a time.
            with contextlib.suppress(NoThread):  # one that is there takes the names
                for _ in range(min(len(self._queue), THREADS)):
                    self._serve()

    def _run(self) -> None:
        while (lookup := self._take()) is not None:
            found = _look_up(lookup.name)
            with self._changed:
                self._busy.discard(lookup)
                self._pending.pop(lookup.name, None)
                asking, lookup.asking = lookup.asking, []
            for done in asking:
                done(found)

    def _take(self) -> Lookup | None:
        """Wait for a name; None ends the thread."""
        with self._changed:
            while True:
                while self._queue:
                    lookup = self._queue.popleft()
                    if lookup.asking:
                        lookup.began = time.monotonic()
                        self._busy.add(lookup)
                        return lookup
                    self._pending.pop(lookup.name, None)  # nobody asks any more
                if self._closed or not self._wait():
                    self._threads -= 1
                    return None

    def _wait(self) -> bool:
        """Wait under the condition; return whether there may be something to do."""
        self._idle += 1
        notified = self._changed.wait(IDLE)
        self._idle -= 1
        if self._leave:
            self._leave -= 1
            return bool(self._queue)
        return notified or bool(self._queue)


def _look_up(name: str) -> Found:
    try:
        # As bytes, else Python loads and runs its IDNA codec, which refuses some names that a resolver takes.
        asked = name.encode("ascii") if name.isascii() else name
        found = socket.getaddrinfo(asked, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        return error
    return [(family, address) for family, _, _, _, address in found]
