# SPDX-License-Identifier: Apache-2.0
"""The thread of a task that has one of its own, and the runs that other threads have asked it for.

`OwnThread` is used by any thread; `_asked` is a deque, whose single steps are atomic, and `_idle` guards the count of
runs that are not over. The thread holds its task only while it runs something: a task that the program drops is freed.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from ctask.errors import TaskError
from ctask.mailbox import Mailbox

__all__ = ["OwnThread"]

log = logging.getLogger("ctask.task")

W = TypeVar("W")


class Runner(Protocol[W]):
    """The task, as far as its thread is concerned."""

    def execute(self, limit: float | None, scheduled: list[W]) -> None:
        """One run. In its thread."""


class OwnThread(Generic[W]):
    """Runs what it is asked to run, and the handlers of what was submitted, until it is closed.

    Args:
        name: of the thread.
        task: the one that it belongs to.
        mailbox: the task's.
        begin: called first, in the thread.
    """

    def __init__(self, name: str, task: Runner[W], mailbox: Mailbox, begin: Callable[[], object]) -> None:
        self._task = weakref.ref(task)
        self._mailbox = mailbox
        self._begin = begin
        self._asked: deque[tuple[float | None, list[W]]] = deque()
        self._unfinished = 0
        self._idle = threading.Condition()
        self._over = False
        self.thread = threading.Thread(target=self._serve, name=name, daemon=True)

    def ask(self, limit: float | None, scheduled: list[W]) -> None:
        """Have these workers run. Any thread; never waits."""
        with self._idle:
            self._unfinished += 1
        self._asked.append((limit, scheduled))
        self._mailbox.notify()

    def wait(self, timeout: float | None) -> bool:
        """Wait until every run that was asked for is over, or none will be; False: not within `timeout` seconds."""
        with self._idle:
            return self._idle.wait_for(lambda: not self._unfinished or not self.thread.is_alive(), timeout)

    def close(self) -> None:
        """End the thread. Any thread, signal handlers and the garbage collector; never waits."""
        self._over = True
        self._mailbox.notify()

    def _serve(self) -> None:
        self._begin()
        try:
            while not self._over:
                self._mailbox.pump(lambda: bool(self._asked) or self._over)
                while self._asked and not self._over:
                    self._run(*self._asked.popleft())
        except TaskError:
            log.debug("%s ends: its task has failed", self.thread.name, exc_info=True)
        finally:
            with self._idle:
                self._unfinished = 0
                self._idle.notify_all()

    def _run(self, limit: float | None, scheduled: list[W]) -> None:
        task = self._task()
        try:
            if task is not None:
                task.execute(limit, scheduled)
        except Exception:
            log.exception("a run of %s ended with an error", self.thread.name)
        finally:
            with self._idle:
                self._unfinished -= 1
                self._idle.notify_all()
