# SPDX-License-Identifier: Apache-2.0
"""The reader: the one thread that carries all SSH connections of the process once they are logged in.

A thread per connection costs a switch of threads, and a fight for the interpreter's lock, for each packet that comes;
the reader takes the packets of many connections in one go. (Two of them were slower than one, for commands and for
floods.) `add`, `arm` and `close` may be called in other threads; the rest runs in the reader's, which alone removes a
connection and closes its descriptor.
"""

from __future__ import annotations

import logging
import os
import select
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from ctask.threads import start

__all__ = ["Readable", "Reader"]

log = logging.getLogger("ctask.ssh")

#: Seconds that `close` waits for the thread. Nothing holds it for as long; a defect must not hold an exit.
_LAST_TURN = 1.0
#: Seconds for which the reader lets other threads run after a turn that was used up; the interpreter's own 5 ms for
#: each change of threads would make a healthy node wait for a flooding one at every step.
_BREATH = 0.00005


class Readable(Protocol):
    """What a reader looks after."""

    def adopted(self, reader: Reader) -> None:
        """From now on this reader's thread reads; called before it does."""

    def readable(self) -> bool:
        """Take what has come, for a short turn; True: more of it waits for another turn."""

    def writable(self) -> None:
        """Send what waited for room."""

    def hung_up(self) -> None:
        """The connection is gone while it is paused."""

    def abandon(self) -> None:
        """End here and now: it will not be read any more."""


class Reader:
    """One thread and the connections that it carries.

    Guarantees: the calls of one connection are made one at a time; an exception in one ends no other.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        try:
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except BaseException:
            self._epoll.close()
            raise
        self._epoll.register(self._wake, select.EPOLLIN)
        self._links: dict[int, Readable] = {}
        #: those that have more to be taken than fits in a turn, in the order of their turns
        self._behind: dict[int, Readable] = {}
        self._paused: set[int] = set()
        self._calls: deque[Callable[[], None]] = deque()
        self._closed = False
        try:
            self._thread = start("ctask/reader", self._run)
        except BaseException:
            self.abandon()
            raise

    def add(self, fd: int, link: Readable) -> None:
        """Look after a connection from now on. Any thread: the one that had it until now."""
        link.adopted(self)
        self._links[fd] = link
        self._epoll.register(fd, select.EPOLLIN)

    def arm(self, fd: int, *, out: bool) -> None:
        """Have `writable` called as soon as there is room, or no more. Any thread; never waits."""
        if fd not in self._paused:
            self._watch(fd, select.EPOLLIN | (select.EPOLLOUT if out else 0))

    def pause(self, fd: int) -> None:
        """Read a connection no more until `resume`; `hung_up` is called once if it ends. The reader's thread."""
        self._paused.add(fd)
        self._behind.pop(fd, None)
        # An end is reported whether it is asked for or not; once, this way, and not as often as the reader looks.
        self._watch(fd, select.EPOLLONESHOT)

    def resume(self, fd: int, link: Readable, *, behind: bool) -> None:
        """Read a connection again. The reader's thread.

        Args:
            fd: its descriptor.
            link: the connection.
            behind: some of what it has read waits for a turn.
        """
        self._paused.discard(fd)
        if behind:
            self._behind[fd] = link
        self._watch(fd, select.EPOLLIN)

    def call(self, what: Callable[[], None]) -> None:
        """Have `what` called in the reader's thread, soon. Any thread; never waits."""
        self._calls.append(what)
        try:
            os.eventfd_write(self._wake, 1)
        except (OSError, ValueError):
            pass  # it is closed: so are the connections

    def _watch(self, fd: int, events: int) -> None:
        try:
            self._epoll.modify(fd, events)
        except (OSError, ValueError):
            pass  # it is not registered any more: its end is on its way

    def ready(self) -> set[int]:
        """Return the descriptors of which there is, or may be, something to take. The reader's thread."""
        seen = self._epoll.poll(0, len(self._links) + 2)
        ready = {fd for fd, events in seen if fd != self._wake and events & ~select.EPOLLOUT}
        for fd in ready & self._paused:
            self._watch(fd, select.EPOLLONESHOT)  # the end of one that is paused is reported once, and not to this
        return ready | self._behind.keys() | self._paused

    def remove(self, fd: int) -> None:
        """Look no more, since the descriptor is about to be closed. The reader's thread."""
        self._links.pop(fd, None)
        self._behind.pop(fd, None)
        self._paused.discard(fd)
        try:
            self._epoll.unregister(fd)
        except (OSError, ValueError):
            pass  # as above

    def close(self) -> bool:
        """End the thread, whatever it carries; False: it did not end in time, and is left. Not from the thread."""
        self._closed = True
        os.eventfd_write(self._wake, 1)
        self._thread.join(_LAST_TURN)
        if self._thread.is_alive():
            return False
        self.abandon()
        return True

    def abandon(self) -> None:
        """Close the descriptors; the thread has ended, or is none of this process (after a fork)."""
        self._closed = True
        self._epoll.close()
        wake, self._wake = self._wake, -1  # a late `call` is not to write to the number's next owner
        os.close(wake)

    def _run(self) -> None:
        try:
            self._serve()
        finally:
            if not self._closed:  # by what no node can cause (SystemExit, …): nobody is left waiting
                for link in list(self._links.values()):
                    link.abandon()

    def _serve(self) -> None:
        while not self._closed:
            # Those who have something new come first, each for one turn; then one of those who have more than fits in a
            # turn. So a node waits for one turn of a flood, however many nodes flood.
            link = None  # what it holds is not to live until the next event
            for fd, events in self._epoll.poll(0 if self._behind else None):
                if fd == self._wake:
                    os.eventfd_read(fd)
                    continue
                # One that was added a moment ago can get an event of the number's former owner: there is nothing
                # to read then, which does no harm.
                link = self._links.get(fd)
                if link is not None:
                    self._serve_one(fd, link, events)
            while self._calls:
                self._guarded(self._calls.popleft(), None)
            if self._behind:
                fd, link = next(iter(self._behind.items()))
                del self._behind[fd]
                self._take_turn(fd, link)
                time.sleep(_BREATH)

    def _serve_one(self, fd: int, link: Readable, events: int) -> None:
        if events & select.EPOLLOUT:
            self._guarded(link.writable, link)
        if fd in self._paused and events & (select.EPOLLHUP | select.EPOLLERR):
            self._guarded(link.hung_up, link)
        elif events & ~select.EPOLLOUT and fd not in self._behind:
            self._take_turn(fd, link)

    def _take_turn(self, fd: int, link: Readable) -> None:
        if self._guarded(link.readable, link) and self._links.get(fd) is link:
            self._behind[fd] = link

    def _guarded(self, step: Callable[[], bool | None], link: Readable | None) -> bool | None:
        """Carry out a step; what it raises is a defect, and ends this connection alone."""
        try:
            return step()
        except Exception:  # noqa: BLE001 (it is logged below, where a log handler of the program may raise as well)
            try:
                log.exception("a connection could not be read")
            except Exception:  # noqa: BLE001, S110 (a program's log handler ends no connections)
                pass
            if link is not None:
                link.abandon()
            return None
