# SPDX-License-Identifier: Apache-2.0
"""The watcher: one thread per process that looks at descriptors and the clock for everybody, and dials.

`Watcher`'s methods run in any thread and never wait; what they are given runs in the thread `ctask/watcher`,
one call after the other, and must not wait either. One lock guards the tables; nothing is called under it.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial

from ctask import children
from ctask.threads import start
from ctask.transports.watcher.dial import Dial, Listener
from ctask.transports.watcher.pace import Pace
from ctask.transports.watcher.resolver import Resolver

__all__ = ["Timer", "Watcher", "close_watcher", "settle", "watcher"]

log = logging.getLogger("ctask.watcher")

#: Seconds that queued calls may take before descriptors are looked at again: a burst of processes to start must
#: not make servers look silent.
SLICE = 0.005
#: Rounds after which what has come counts as served, though some descriptor still has more.
ROUNDS = 32
#: Seconds that the thread sleeps at most; epoll takes milliseconds in an int.
LONGEST = 3600.0


class Timer:
    """A call at a time."""

    __slots__ = ("_watcher", "call")

    def __init__(self, owner: Watcher, call: Callable[[], None]) -> None:
        self._watcher = owner
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        """Forget the call. Any thread; one that is under way goes on, one that was made is no matter."""
        self._watcher.forget(self)


class _Watch:
    """What is to be called for a descriptor; `number` counts registrations: descriptors are used again."""

    __slots__ = ("callback", "number")

    def __init__(self, callback: Callable[[int], None], number: int) -> None:
        self.callback = callback
        self.number = number


class Watcher:
    """The thread and its tables; `watcher()` gives the process's own.

    Guarantees: calls are made one at a time, in the order of their coming; none is made after `close` has
    returned. An exception in a call is logged and ends nothing.
    """

    def __init__(self) -> None:
        # Reentrant, because a destructor may run inside any of these few lines, and may call in here.
        self._lock = threading.RLock()
        self._epoll = select.epoll()
        self._wake = -1
        try:
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._epoll.register(self._wake, select.EPOLLIN)
            self._watches: dict[int, _Watch] = {}
            self._numbers = itertools.count(1)
            self._last = 0
            self._calls: deque[Callable[[], None]] = deque()
            self._later: list[Callable[[], None]] = []
            self._timers: list[tuple[float, int, Timer]] = []
            self._cancelled = 0
            self._asleep = False
            self.closed = False
            self._dials: set[Dial] = set()
            self._resolver = Resolver(self.at)
            self._pace = Pace(self.at)
            self._thread = start("ctask/watcher", self._run)
        except BaseException:
            self._close_descriptors()
            raise

    def call(self, fn: Callable[[], None]) -> None:
        """Run `fn` soon in the watcher's thread. Any thread."""
        with self._lock:
            self._calls.append(fn)
            self._kick()

    def later(self, fn: Callable[[], None]) -> None:
        """Run `fn` once the descriptors that are ready now have been served. The watcher's thread only."""
        self._later.append(fn)

    def settle(self, fn: Callable[[], None]) -> None:
        """Run `fn` once all that had come by now has been served; not later than after a few rounds. Any thread.

        A descriptor is served once per round, and may have more than that: so it is looked at until none is ready.
        """
        self.call(partial(self._settle, fn, ROUNDS))

    def _settle(self, fn: Callable[[], None], rounds: int) -> None:
        if rounds and any(fd != self._wake for fd, _ in self._epoll.poll(0, len(self._watches) + 2)):
            # After the next round: what is called `later` from here runs at its end.
            self._calls.append(partial(self.later, partial(self._settle, fn, rounds - 1)))
        else:
            fn()

    def at(self, when: float, fn: Callable[[], None]) -> Timer:
        """Run `fn` at `when` (`time.monotonic()`), never earlier. Any thread."""
        timer = Timer(self, fn)
        with self._lock:
            entry = (when, next(self._numbers), timer)
            heapq.heappush(self._timers, entry)
            if self._timers[0] is entry:
                self._kick()
        return timer

    def forget(self, timer: Timer) -> None:
        """Take a timer back: what `Timer.cancel` does. Any thread."""
        with self._lock:
            if timer.call is None:
                return
            timer.call = None
            self._cancelled += 1
            if self._cancelled > 64 and self._cancelled * 2 > len(self._timers):
                self._timers = [entry for entry in self._timers if entry[2].call is not None]
                heapq.heapify(self._timers)
                self._cancelled = 0

    def watch(self, fd: int, events: int, callback: Callable[[int], None]) -> None:
        """Have `callback(events)` called while any of `events` holds (`select.EPOLL…`; HUP and ERR always).

        Any thread. The descriptor must be unwatched before it is closed. A callback may be called once too
        often (a descriptor's number is used again), so it has to bear that there is nothing to do.
        """
        with self._lock:
            if self.closed:
                return
            self._last = next(self._numbers)
            self._watches[fd] = _Watch(callback, self._last)
            try:
                self._epoll.register(fd, events)
            except BaseException:
                del self._watches[fd]
                raise

    def modify(self, fd: int, events: int) -> None:
        """Look for other events on a watched descriptor. Any thread."""
        with self._lock:
            if fd in self._watches and not self.closed:
                self._epoll.modify(fd, events)

    def unwatch(self, fd: int) -> None:
        """Look no more; a callback that is under way goes on. Any thread; harmless when it is not watched."""
        with self._lock:
            if self._watches.pop(fd, None) is not None and not self.closed:
                self._epoll.unregister(fd)

    def dial(self, address: str, port: int, listener: Listener, hello: bytes = b"") -> Dial:
        """Begin to connect; `listener` hears of it, perhaps before this has returned. Any thread.

        Args:
            hello: what is sent as soon as the connection stands; a few dozen bytes.
        """
        dial = Dial(
            address, port, listener, loop=self, resolver=self._resolver, pace=self._pace, hello=hello, over=self._over
        )
        with self._lock:
            self._dials.add(dial)
        self.call(dial.begin)
        return dial

    def close(self) -> None:
        """End the thread, drop all dials, close the descriptors. Not from a call of the watcher's own.

        What is asked of a closed watcher is forgotten.
        """
        with self._lock:
            if self.closed:
                return
            self.closed = True
            os.eventfd_write(self._wake, 1)
            dials = list(self._dials)
        self._thread.join()
        for dial in dials:
            dial.drop()
        self._resolver.close()
        self._close_descriptors()

    def abandon(self) -> None:
        """Close what a forked child has of this watcher: it has no thread, and locks may be held for ever."""
        self.closed = True
        for dial in self._dials:
            dial.abandon()
        self._close_descriptors()

    def _over(self, dial: Dial) -> None:
        with self._lock:
            self._dials.discard(dial)

    def _close_descriptors(self) -> None:
        self._epoll.close()
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1

    def _kick(self) -> None:
        """Wake the thread where it sleeps. Under the lock."""
        if self._asleep and not self.closed:
            self._asleep = False
            os.eventfd_write(self._wake, 1)

    def _run(self) -> None:
        while not self.closed:
            # Under the lock: a call is put either before the queue is looked at, or finds `_asleep` and kicks.
            with self._lock:
                timeout = self._rest()
                self._asleep = timeout != 0
            ready = self._epoll.poll(timeout)
            self._asleep = False
            self._serve(ready)
            self._ring()
            self._drain()

    def _rest(self) -> float:
        """Return how long there is nothing to do. Under the lock."""
        if self._calls or self._later:
            return 0
        while self._timers and self._timers[0][2].call is None:
            heapq.heappop(self._timers)
            self._cancelled -= 1
        if not self._timers:
            return LONGEST
        return min(max(0.0, self._timers[0][0] - time.monotonic()), LONGEST)

    def _serve(self, ready: list[tuple[int, int]]) -> None:
        # What is registered from here on has no event in `ready`: such a one is of the number's former owner.
        newest = self._last
        for fd, events in ready:
            if fd == self._wake:
                self._clear()
                continue
            watch = self._watches.get(fd)
            if watch is not None and watch.number <= newest:
                self._make(watch.callback, events)
        while self._later:
            later, self._later = self._later, []
            for fn in later:
                self._make(fn)

    def _clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)

    def _ring(self) -> None:
        now = time.monotonic()
        while True:
            with self._lock:
                if not self._timers or self._timers[0][0] > now:
                    return
                timer = heapq.heappop(self._timers)[2]
                call, timer.call = timer.call, None
                if call is None:
                    self._cancelled -= 1
            if call is not None:
                self._make(call)

    def _drain(self) -> None:
        until = time.monotonic() + SLICE
        while self._calls and not self.closed:
            self._make(self._calls.popleft())
            if time.monotonic() >= until:
                return

    def _make(self, fn: Callable[..., None], *args: int) -> None:
        if self.closed:
            return
        try:
            fn(*args)
        except Exception:
            log.exception("a call in the watcher failed: %r", fn)


class _Process:
    """What this process has: its watcher. `lock` guards the making of it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.watcher: Watcher | None = None


_process = _Process()


def watcher() -> Watcher:
    """Return the process's watcher, made when it is first asked for, and anew after a `close` or a fork.

    Raises:
        RuntimeError: its thread could not be started.
        OSError: no descriptor was left for it.
    """
    with _process.lock:
        if _process.watcher is None or _process.watcher.closed:
            # Before the first socket of ours.
            children.hold_standard_descriptors()
            _process.watcher = Watcher()
        return _process.watcher


def settle(call: Callable[[], None]) -> None:
    """Make a call once the process's watcher has served all that had come by now; at once where there is none."""
    with _process.lock:
        current = _process.watcher
    if current is None or current.closed:
        call()
    else:
        current.settle(call)


def close_watcher() -> None:
    """Close the process's watcher, where there is one. Any thread but its own."""
    with _process.lock:
        current, _process.watcher = _process.watcher, None
    if current is not None:
        current.close()


def _forked() -> None:
    # The parent's sockets and its epoll are shared with it: here they are closed, and nothing else is done to them.
    current = _process.watcher
    _process.lock = threading.Lock()
    _process.watcher = None
    if current is not None:
        current.abandon()


os.register_at_fork(after_in_child=_forked)
