# SPDX-License-Identifier: Apache-2.0
"""Threads where there may be no more of them: how they are started, and the pool of a task.

A process has as many threads as its account's limit (RLIMIT_NPROC) and its cgroup allow. Where one cannot be had, those
that are idle end, so that others can be started, and work waits for a thread that is there. One lock per pool guards
its queue and counts; nothing is called under it but the start of a thread.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

__all__ = ["NO_THREAD", "NoThread", "Pool", "Spare", "begin", "spare", "spares", "start"]

log = logging.getLogger("ctask.threads")

#: What is told of a job for which there was no thread.
NO_THREAD = "this machine has no more threads; lower the fan-out, or raise its limit (ulimit -u)"
#: Seconds that a thread waits for work before it ends.
IDLE = 20.0
#: Seconds after a thread could not be had in which no other one is tried.
PAUSE = 0.02
#: Seconds that are waited for a thread that there has to be, one after the other.
PAUSES = (0.01, 0.05, 0.2)


class NoThread(RuntimeError):
    """Raised when no thread can be started, or told where one was needed and has not come."""


class Spare(Protocol):
    """Has threads that may be idle."""

    def let_go(self) -> None:
        """End idle threads; never waits. Any thread."""


#: Who has threads that may be idle.
spares: weakref.WeakSet[Spare] = weakref.WeakSet()


def start(name: str, run: Callable[[], object]) -> threading.Thread:
    """Start a daemon thread. Any thread.

    Raises:
        NoThread: this process can have no more of them, for now.
    """
    thread = threading.Thread(target=run, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        spare()
        raise NoThread(str(error)) from error
    return thread


def begin(thread: threading.Thread) -> None:
    """Start a thread that there has to be, waiting a moment for idle ones to end. The caller's thread.

    Raises:
        NoThread: this process can have no more of them.
    """
    for pause in PAUSES:
        try:
            thread.start()
            return
        except RuntimeError:
            spare()
            time.sleep(pause)
    try:
        thread.start()
    except RuntimeError as error:
        raise NoThread(f"{error}: {NO_THREAD}") from error


def spare() -> None:
    """Have idle threads end: one is needed elsewhere, or a process, which counts like one. Any thread; never waits."""
    for one in list(spares):
        one.let_go()


class Pool:
    """Threads that are started on demand and carry out what they are given, in its order.

    Guarantees: an item is carried out once, or is handed back and never carried out. What it raises is logged.

    Args:
        name: what the threads are named after.
        most: threads there are at most.
        freed: called in a thread that has become idle after `ready` said that there was none.

    Thread safety: any thread may call anything.
    """

    def __init__(self, name: str, most: int, freed: Callable[[], object] = lambda: None) -> None:
        self._name = name
        self._most = most
        self._freed = freed
        self._changed = threading.Condition(threading.Lock())
        self._items: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._threads: set[threading.Thread] = set()
        self._count = 0
        self._born = 0
        # Those that wait for work, and those that were started and have not come to it.
        self._idle = 0
        self._leave = 0
        self._asked = False
        self._closed = False
        self._not_before = 0.0
        spares.add(self)

    @property
    def count(self) -> int:
        """How many threads there are."""
        return self._count

    def submit(self, call: Callable[..., object], *args: Any) -> bool:
        """Have a call carried out, as soon as a thread is there; False: there is none, and none can be had for now.

        Then the call stays here until there is one (`grow`), or it is handed back (`take_back`).

        Raises:
            RuntimeError: the pool is closed.
        """
        with self._changed:
            if self._closed:
                raise RuntimeError("the task's threads have ended")
            self._items.append((call, args))
            if self._idle:
                self._changed.notify()
            return self._grown() or self._count > 0

    def ready(self) -> bool:
        """Whether a thread is there for one more call; else `freed` is called when one is."""
        with self._changed:
            if self._closed or self._idle > len(self._items):
                return True
            self._items.append((_nothing, ()))  # `_grown` is about what is queued
            try:
                grown = self._grown()
            finally:
                self._items.pop()
            self._asked = not grown
            return grown

    def grow(self) -> bool:
        """Try again to have a thread for what waits; return whether there is one."""
        with self._changed:
            return self._grown() or self._count > 0

    def take_back(self) -> list[Callable[..., object]]:
        """Return what waits for a thread, where there is none; it will not be carried out."""
        with self._changed:
            if self._count:
                return []
            calls = [call for call, _ in self._items]
            self._items.clear()
            return calls

    def let_go(self) -> None:
        """See `Spare`."""
        # Not with the lock: a thread that could not be started may be one of this pool's, whose starter holds it.
        if self._changed.acquire(blocking=False):
            try:
                self._leave = max(0, self._idle - len(self._items))
                if self._leave:
                    self._changed.notify_all()
            finally:
                self._changed.release()

    def close(self) -> None:
        """Begin nothing any more; what was submitted is carried out."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def join(self, timeout: float) -> bool:
        """Wait for the end of the threads after `close`; return whether they have ended."""
        until = time.monotonic() + timeout
        for thread in list(self._threads):
            if thread is not threading.current_thread():
                thread.join(max(0.0, until - time.monotonic()))
        return not self._count

    def _grown(self) -> bool:
        """Have a thread for each item, as far as that goes; return whether there is one. Under the lock."""
        if self._idle >= len(self._items):
            return True
        now = time.monotonic()
        if self._count >= self._most or now < self._not_before:
            return False
        self._born += 1
        try:
            thread = start(f"{self._name}_{self._born - 1}", self._run)
        except NoThread:
            self._not_before = now + PAUSE
            return False
        self._threads.add(thread)
        self._count += 1
        self._idle += 1
        return True

    def _run(self) -> None:
        with self._changed:
            self._idle -= 1
        while (item := self._take()) is not None:
            try:
                item[0](*item[1])
            except Exception:
                log.exception("a work item failed: %r", item[0])
            del item  # what it holds is not to live until the next one

    def _take(self) -> tuple[Callable[..., object], tuple[Any, ...]] | None:
        """Wait for an item; None ends the thread."""
        while True:
            with self._changed:
                if self._items:
                    return self._items.popleft()
                freed, self._asked = self._asked, False
                if not freed and not self._wait():
                    self._threads.discard(threading.current_thread())
                    self._count -= 1
                    return None
            if freed:
                self._freed()

    def _wait(self) -> bool:
        """Wait under the lock; False: the thread is to end."""
        if self._closed:
            return False
        if self._leave:  # it was counted as idle before it came to wait
            self._leave -= 1
            return False
        self._idle += 1
        notified = self._changed.wait(IDLE)
        self._idle -= 1
        if self._leave:
            self._leave -= 1
            return bool(self._items)
        return notified or bool(self._items)


def _nothing() -> None:
    """Stand for a call that is about to come."""
