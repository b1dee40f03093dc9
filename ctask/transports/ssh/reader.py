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
import threading
from typing import Protocol

__all__ = ["Readable", "Reader"]

log = logging.getLogger("ctask.ssh")


class Readable(Protocol):
    """What a reader looks after."""

    def adopted(self, reader: Reader) -> None:
        """From now on this reader's thread reads; called before it does."""

    def readable(self) -> bool:
        """Take what has come; False: it is over, and its descriptor is closed."""

    def writable(self) -> None:
        """Send what waited for room."""

    def abandon(self) -> None:
        """End here and now: nobody will read any more."""


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
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="ctask/reader", daemon=True)
        try:
            self._thread.start()
        except BaseException:
            self.abandon()
            raise

    @property
    def ident(self) -> int | None:
        """Identifier of the thread."""
        return self._thread.ident

    def add(self, fd: int, link: Readable) -> None:
        """Look after a connection from now on. Any thread: the one that had it until now."""
        link.adopted(self)
        self._links[fd] = link
        self._epoll.register(fd, select.EPOLLIN)

    def arm(self, fd: int, *, out: bool) -> None:
        """Have `writable` called as soon as there is room, or no more. Any thread; never waits."""
        try:
            self._epoll.modify(fd, select.EPOLLIN | (select.EPOLLOUT if out else 0))
        except (OSError, ValueError):
            pass  # it is not registered any more: its end is on its way

    def remove(self, fd: int) -> None:
        """Look no more, since the descriptor is about to be closed. The reader's thread."""
        self._links.pop(fd, None)
        try:
            self._epoll.unregister(fd)
        except (OSError, ValueError):
            pass  # as above

    def close(self) -> None:
        """End the thread, whatever it carries. Not from the thread itself."""
        self._closed = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        self.abandon()

    def abandon(self) -> None:
        """Close the descriptors; the thread has ended, or is none of this process (after a fork)."""
        self._closed = True
        self._epoll.close()
        os.close(self._wake)

    def _run(self) -> None:
        try:
            self._serve()
        finally:
            if not self._closed:  # by what no node can cause (SystemExit, …): nobody is left waiting
                for link in list(self._links.values()):
                    link.abandon()

    def _serve(self) -> None:
        while not self._closed:
            # A connection is read once per turn, so that a flood of one holds up no other.
            link = None  # what it holds is not to live until the next event
            for fd, events in self._epoll.poll():
                # One that was added a moment ago can get an event of the number's former owner: there is nothing
                # to read then, which does no harm.
                link = self._links.get(fd)
                if link is None:
                    continue
                try:
                    if events & select.EPOLLOUT:
                        link.writable()
                    if events & ~select.EPOLLOUT:
                        link.readable()
                except Exception:
                    log.exception("a connection could not be read")
                    link.abandon()
