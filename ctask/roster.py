# SPDX-License-Identifier: Apache-2.0
"""Which workers a task has: scheduled, started, and those of its current run.

The owner begins and ends runs; workers may be added in any thread. One lock guards what is started and the view;
it is reentrant, since a signal handler may abort, which starts what is scheduled. `_scheduled` is a deque, whose
single steps are atomic.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence

from ctask.worker import Worker

__all__ = ["Roster", "all_closed"]


class Roster:
    """The workers of one task.

    It holds the workers of a run; of what is started while nobody waits on the task it holds what has not ended, and
    only looks at the rest as long as the program holds it. So a program that submits for a month does not grow.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._scheduled: deque[Worker] = deque()
        self._started: dict[Worker, None] = {}
        self._prune_at = 64
        self._view: list[weakref.ref[Worker]] = []
        self._held: list[Worker] = []
        self._view_over = False
        self._left = False
        #: a run is under way; the owner's
        self.running = False

    def schedule(self, worker: Worker) -> None:
        """Keep a worker for the next run."""
        self._scheduled.append(worker)

    def scheduled(self) -> list[Worker]:
        """Return what is scheduled."""
        return list(self._scheduled)

    def take_scheduled(self) -> list[Worker]:
        """Return what was scheduled, and forget it."""
        taken = []
        while self._scheduled:
            taken.append(self._scheduled.popleft())
        return taken

    def unschedule(self, worker: Worker) -> None:
        """Forget that a worker was scheduled, where it was."""
        with contextlib.suppress(ValueError):
            self._scheduled.remove(worker)

    def started(self, worker: Worker, *, may_write: bool = False) -> None:
        """Add a worker whose jobs begin now; during a run it is a part of it.

        Args:
            may_write: as `Worker.admit` has it.
        """
        with self._lock:
            if self._view_over and not self.running:
                self._view, self._held, self._view_over = [], [], False
            self._prune()
            worker.admit(may_write=may_write)
            self._started[worker] = None
            self._view.append(weakref.ref(worker))
            if self.running:
                self._held.append(worker)

    def begin(self, workers: Sequence[Worker] = (), *, goes_on: bool = False) -> list[Worker]:
        """Begin a run of what has not ended; return what must be started for it.

        An interrupt on its way loses no worker: each is scheduled until it is among what was started.

        Args:
            workers: what was scheduled, and is to begin.
            goes_on: where the last one was a `join()` that was left before its end, this one has its workers as well.
        """
        with self._lock:
            self._forget_closed()
            before = self._held if goes_on and self._left else []
            self._held = list(dict.fromkeys([*before, *self._started, *workers]))
            self._view = [weakref.ref(worker) for worker in self._held]
            self._view_over = False
            self.running = True
            for worker in workers:
                worker.admit()
            self._started.update(dict.fromkeys(workers))
            for worker in workers:
                self.unschedule(worker)
        return list(workers)

    def end(self, *, joined: bool = True) -> None:
        """The run is over; its view stays until the next one, or the next submission.

        Args:
            joined: False: it was a `join()` that did not wait for the end.
        """
        with self._lock:
            self.running = False
            self._left = not joined
            self._view_over = True

    def let_go(self, worker: Worker) -> None:
        """A worker has ended, and is delivered: the program alone holds it now, unless it is waited for. Any thread."""
        with self._lock:
            self._started.pop(worker, None)

    def unfinished(self) -> list[Worker]:
        """Return what was started and has not ended."""
        with self._lock:
            return [worker for worker in list(self._started) if not worker.closed]

    def view(self) -> list[Worker]:
        """Return the workers of the current run, as far as somebody holds them."""
        return [worker for ref in self._view if (worker := ref()) is not None]

    def all_closed(self) -> Callable[[], bool]:
        """Return a test for the end of the run, which also sees what joins it on the way."""
        return all_closed(self._held)

    def _prune(self) -> None:
        """Let go of what has ended unheard, and of what the program has dropped, when either has doubled."""
        if max(len(self._started), len(self._view)) >= self._prune_at:
            self._forget_closed()
            self._view = [ref for ref in self._view if ref() is not None]
            self._prune_at = max(64, 2 * len(self._started), 2 * len(self._view))

    def _forget_closed(self) -> None:
        for worker in list(self._started):
            if worker.closed:
                self._started.pop(worker, None)  # a signal handler may have done the same in between


def all_closed(workers: list[Worker]) -> Callable[[], bool]:
    """Return a test for the end of these workers, and of those that are added to the list meanwhile."""
    at = 0

    def done() -> bool:
        nonlocal at
        while at < len(workers) and workers[at].closed:
            at += 1
        return at == len(workers)

    return done
