# SPDX-License-Identifier: Apache-2.0
"""Standard input of one local command: a descriptor that is written to without waiting.

Runs in any thread (the pool writes, the watcher's thread says when there is room again); one lock per input guards
all of it, and nothing waits under it.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Callable

from ctask.transports.watcher import Watcher

__all__ = ["Input"]


class Input:
    """Standard input of one process; `room` is called when there is room again after a short write."""

    def __init__(self, room: Callable[[], None], *, terminal: bool) -> None:
        self._room = room
        self._terminal = terminal
        self._lock = threading.Lock()
        self._watcher: Watcher | None = None
        self._fd: int | None = None
        self._attached = False
        self._waiting = False  # somebody was told that there is no room
        self._finished = False
        self._line_start = True

    def attach(self, loop: Watcher, fd: int | None) -> bool:
        """Take the descriptor; return whether somebody waits for it."""
        with self._lock:
            self._watcher = loop
            self._fd = fd
            self._attached = True
            waiting, self._waiting = self._waiting, False
            if self._finished:
                self._send_end()
            return waiting

    def write(self, view: memoryview) -> int:
        with self._lock:
            if not self._attached and not self._finished:
                self._waiting = True
                return 0
            if self._fd is None or self._finished:
                return len(view)
            try:
                taken = _write(self._fd, view)
            except BlockingIOError:
                taken = 0
            except OSError:
                self._close()  # the command has closed its end: it does not want to know
                return len(view)
            if taken:
                self._line_start = view[taken - 1] == b"\n"[0]
            if taken < len(view):
                self._wait_for_room()
            return taken

    def finish(self) -> None:
        with self._lock:
            if not self._finished:
                self._finished = True
                self._send_end()

    def discard(self) -> None:
        with self._lock:
            self._attached = self._finished = True
            self._close()

    def surrender(self) -> int | None:
        """Return the descriptor and forget it; for a forked child, in which the lock may be held for ever."""
        fd, self._fd = self._fd, None
        return fd

    def _send_end(self) -> None:
        if self._fd is None:
            return
        if self._terminal:
            # What a person types: it ends a line first where one has begun. Our side stays open to be read.
            try:
                _write(self._fd, memoryview(b"\4" if self._line_start else b"\4\4"))
            except BlockingIOError:
                self._wait_for_room()
                return
            except OSError:
                pass
        self._close()

    def _wait_for_room(self) -> None:
        if not self._waiting and self._fd is not None and self._watcher is not None:
            self._waiting = True
            self._watcher.watch(self._fd, select.EPOLLOUT, self._has_room)

    def _has_room(self, events: int) -> None:
        del events
        with self._lock:
            if not self._waiting or self._fd is None or self._watcher is None:
                return
            self._waiting = False
            self._watcher.unwatch(self._fd)
            if self._finished:
                self._send_end()
                return
        self._room()

    def _close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            if self._watcher is not None:
                self._watcher.unwatch(fd)
            os.close(fd)


def _write(fd: int, view: memoryview) -> int:
    """Write without waiting, and without dying of SIGPIPE where a program has asked for its default action."""
    if signal.getsignal(signal.SIGPIPE) is not signal.SIG_DFL:
        return os.write(fd, view)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGPIPE,))
    try:
        return os.write(fd, view)
    except BrokenPipeError:
        if signal.SIGPIPE not in before:
            signal.sigtimedwait((signal.SIGPIPE,), 0)
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
