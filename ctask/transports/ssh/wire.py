# SPDX-License-Identifier: Apache-2.0
"""The socket under one SSH connection: reads ahead, never blocks a sender, and knows when it runs dry.

Runs in every thread that sends, and for reading in one thread only: the one that connects until the version
line was read, then the connection's.

Guards: what is read belongs to the reading thread; `_backlog`, `_corked` and the closing of the descriptor
are under `_out`, which is held for as long as one `send` that does not block.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import threading
import weakref
from typing import Protocol

__all__ = ["Flushable", "NoVersion", "Wire", "forget_all"]

#: Bytes asked of the kernel at a time; a read is one system call however many packets it holds.
READ_AHEAD = 65_536
#: Bytes that a server may say before its version line is complete.
VERSION_LIMIT = 8_192
#: What may wait for a node that does not read. Standard input waits before it is sent, so these are answers
#: and credits: a node that makes us say a megabyte and reads none of it is hostile.
BACKLOG_LIMIT = 1 << 20
#: Milliseconds of one wait for room; only a bound for the case that the descriptor is closed meanwhile.
_LOOK_AGAIN = 1_000

_wires: weakref.WeakSet[Wire] = weakref.WeakSet()


class Flushable(Protocol):
    """What is told when the socket runs dry."""

    def flush_sink(self) -> None:
        """Hand on what has come since the last time."""


class NoVersion(Exception):
    """The server's version line did not come.

    Attributes:
        said: what came in its place, at most `VERSION_LIMIT` bytes.
        why: `closed`, `reset`, `limit`, `error`, or `other` for a protocol that is not SSH.
    """

    def __init__(self, why: str, said: bytes) -> None:
        super().__init__(why)
        self.why = why
        self.said = said


class Wire:
    """A connected socket in the form that paramiko's `Transport` takes.

    `send` takes everything: what the kernel has no room for waits here. Whoever left something waiting looks
    after it: the connection's thread before it reads on, every other one by `flush`. So no lock above this is
    ever held while a node makes us wait, and nobody waits for a thread that waits for a node.
    """

    def __init__(self, sock: socket.socket) -> None:
        # A socket with a timeout makes a poll() before each recv and send; it is woken by shut() instead.
        sock.settimeout(None)
        with contextlib.suppress(OSError):  # a socket pair of a test knows no such option
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self._ahead = b""
        self._at = 0
        self._marked: list[Flushable] = []
        self._out = threading.Lock()
        self._backlog = bytearray()
        self._corked = False
        #: of `writable` alone, under `_out`: it is asked once per command
        self._poller: select.poll | None = None
        #: paramiko looks at it as it would at a socket's
        self._closed = False
        _wires.add(self)

    # --- reading: one thread

    def read_version(self) -> bytes:
        """Return the server's version line without its end; what follows it is kept for `read`.

        Raises:
            NoVersion: it did not come.
        """
        seen = bytearray()
        start = 0
        while True:
            try:
                chunk = self._sock.recv(VERSION_LIMIT)
            except ConnectionResetError as error:
                raise NoVersion("reset", bytes(seen)) from error
            except OSError as error:
                raise NoVersion("error", bytes(seen)) from error
            if not chunk:
                raise NoVersion("closed", bytes(seen))
            seen += chunk
            while (end := seen.find(b"\n", start)) >= 0:
                line = bytes(seen[start:end])
                # Counted to the line's end: packets that came with it do not count.
                if line.startswith(b"SSH-") and end < VERSION_LIMIT:
                    self._ahead = bytes(seen[end + 1 :])
                    return line.removesuffix(b"\r")
                if line.startswith(b"HTTP/"):  # a web server waits for us; whoever else greets has more to say
                    raise NoVersion("other", bytes(seen))
                start = end + 1
            if len(seen) >= VERSION_LIMIT:
                raise NoVersion("limit", bytes(seen[:VERSION_LIMIT]))

    def read(self, size: int) -> bytes:
        """Return exactly `size` bytes.

        Raises:
            EOFError: the connection ended before.
            OSError: it broke.
        """
        at = self._at
        end = at + size
        if end <= len(self._ahead):
            self._at = end
            return self._ahead[at:end]
        parts = [self._ahead[at:]]
        missing = end - len(self._ahead)
        self._ahead, self._at = b"", 0  # a connection that rests keeps no 64 KiB of the past
        while missing > 0:
            chunk = self._receive(max(missing, READ_AHEAD))
            parts.append(chunk[:missing])
            self._ahead, self._at = chunk, missing
            missing -= len(chunk)
        return b"".join(parts)

    def _receive(self, size: int) -> bytes:
        # From here on the thread may block: the moment to hand on what has come.
        if self._marked:
            self.dry()
        if self._backlog:
            self._push_until_readable()
        chunk = self._sock.recv(size)
        if not chunk:
            raise EOFError("the connection was closed")
        return chunk

    def mark(self, session: Flushable) -> None:
        """Note that `session` has something to hand on; once until it was flushed."""
        self._marked.append(session)

    def dry(self) -> None:
        """Flush everything that was marked."""
        marked, self._marked = self._marked, []
        for session in marked:
            session.flush_sink()

    def _push_until_readable(self) -> None:
        """Send what waits, until there is something to read; else both ends could wait for one another."""
        poller = select.poll()
        poller.register(self._sock.fileno(), select.POLLIN | select.POLLOUT)
        while self._backlog:
            for _, events in poller.poll(_LOOK_AGAIN):
                if events & select.POLLOUT:
                    with self._out:
                        self._push()
                if events & ~select.POLLOUT:
                    return

    # --- sending: any thread

    def send(self, data: bytes) -> int:
        """Send all of `data`, or keep what there is no room for; never blocks.

        Raises:
            OSError: the connection is gone, or the node reads nothing of what it asks for.
        """
        with self._out:
            if self._closed:
                raise OSError(errno.EPIPE, "the connection is closed")
            if not self._backlog and not self._corked:
                sent = self._send(data)
                if sent == len(data):
                    return sent
                self._backlog += memoryview(data)[sent:]
            else:
                self._backlog += data
            if len(self._backlog) > BACKLOG_LIMIT:
                self.shut()
                raise OSError(errno.ENOBUFS, "the node does not read what is sent to it")
        return len(data)

    def cork(self) -> None:
        """Keep what is sent until `uncork`, so that it leaves in one piece."""
        with self._out:
            self._corked = True

    def uncork(self) -> None:
        """Send what was kept."""
        with self._out:
            self._corked = False
            self._push()

    def flush(self, within: float | None = None) -> bool:
        """Wait until nothing waits to be sent; at most `within` seconds. Not in the connection's thread.

        Returns False when the time was not enough. A connection that is gone has nothing that waits.
        """
        if not self._backlog:
            return True
        waits = max(1, round(within)) if within is not None else None
        while waits is None or waits > 0:
            with self._out:
                if self._closed:
                    return True
                # A cork is drawn by its own thread, in the next moment; the poll below ends at once
                # meanwhile.
                if not self._corked:
                    self._push()
                if not self._backlog:
                    return True
                poller = select.poll()
                poller.register(self._sock.fileno(), select.POLLOUT)
            poller.poll(_LOOK_AGAIN)
            waits = waits - 1 if waits is not None else None
        return False

    def writable(self, *, idle: bool = False) -> bool:
        """Whether a small packet can be sent now, without anything left to wait.

        Args:
            idle: nothing runs on the connection, so that the node has taken all that was sent: the kernel is not asked.
        """
        with self._out:
            if self._closed or self._backlog or self._corked:
                return False
            if idle:
                return True
            if self._poller is None:
                self._poller = select.poll()
                self._poller.register(self._sock.fileno(), select.POLLOUT)
            events = self._poller.poll(0)
        return bool(events) and events[0][1] == select.POLLOUT

    def _push(self) -> None:
        """Send of the backlog what goes; under `_out`."""
        if self._backlog and not self._closed:
            try:
                del self._backlog[: self._send(self._backlog)]
            except OSError:
                # The reading thread will find the connection gone and tells everybody.
                self._backlog.clear()

    def _send(self, data: bytes | bytearray) -> int:
        try:
            return self._sock.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0
        except OSError:
            self.shut()  # so that the reading thread wakes, whatever half of the connection broke
            raise

    # --- ending: any thread

    def shut(self) -> None:
        """End the connection: whoever reads or writes wakes. Never waits; the descriptor is its thread's."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the descriptor; for the thread that reads, since its number is given away at once."""
        self.shut()
        with self._out:
            self._closed = True
            self._backlog.clear()
            self._sock.close()

    def forget(self) -> None:
        """Close this process's copy of the descriptor and nothing else; after a fork, in the child."""
        self._closed = True
        with contextlib.suppress(OSError):
            os.close(self._sock.detach())

    # --- what else paramiko may ask of a socket

    def settimeout(self, value: float | None) -> None:
        """Nothing: a timeout would bring back paramiko's ten polls a second."""

    def getpeername(self) -> object:
        """Return the address of the other end."""
        return self._sock.getpeername()


def forget_all() -> None:
    """Forget the wires of the parent, without a word to their nodes; after a fork, in the child."""
    for wire in list(_wires):
        wire.forget()
    _wires.clear()
