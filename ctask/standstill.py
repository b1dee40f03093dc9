# SPDX-License-Identifier: Apache-2.0
"""Times in which this process stood still: it was stopped (SIGSTOP), frozen or suspended, or something held it.

Nodes and children go on meanwhile, and what they say lies in sockets and pipes: a limit that passed in such a time says
nothing about them. There is no signal to go by. Threads that wait for deadlines look at the clock every `TICK` seconds
as long as they do, and each of them can then see that none has looked for longer; so the first that wakes knows.
Any thread; one small lock guards the numbers.
"""

from __future__ import annotations

import os
import threading
import time

__all__ = ["LATE", "TICK", "Standstills", "awake", "standstills"]

#: Seconds between two looks of a thread that waits for deadlines.
TICK = 0.5
#: Seconds by which a look may be late before that counts as a standstill: a busy machine is no stopped one.
LATE = 0.25


class Standstills:
    """Counts the seconds that were lost.

    Thread safety: any thread may call anything.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lookers = 0
        self._seen = 0.0
        self._lost = 0.0

    def begin(self, now: float) -> None:
        """Note a thread that looks every `TICK` seconds from `now` (monotonic seconds) on, until it says `end`."""
        with self._lock:
            if not self._lookers:
                self._seen = now
            self._lookers += 1

    def end(self) -> None:
        """Note that a thread that said `begin` looks no more."""
        with self._lock:
            self._lookers -= 1

    def look(self, now: float) -> float:
        """Return how many seconds were lost until `now` (monotonic seconds), ever."""
        with self._lock:
            if now > self._seen:
                if self._lookers and now - self._seen > TICK + LATE:
                    self._lost += now - self._seen
                self._seen = now
            return self._lost


standstills = Standstills()


def awake() -> float:
    """Return a monotonic time in seconds that stands while the process does. Any thread.

    For waits by which a node's word is to come: they may end early by the wall clock's measure, so look again.
    """
    now = time.monotonic()
    return now - standstills.look(now)


def _forked() -> None:
    # The lock may be held by a thread that the child has not; and none of the parent's threads looks in here.
    standstills._lock = threading.Lock()  # noqa: SLF001 (its own module)
    standstills._lookers = 0  # noqa: SLF001


os.register_at_fork(after_in_child=_forked)
