# SPDX-License-Identifier: Apache-2.0
"""The socket under one SSH connection: reads ahead, never blocks a sender, and knows when it runs dry.

Runs in every thread that sends, and for reading in one thread only: the one that connects until the login is done,
which may wait for the node, then a reader's, which never does.

Guards: what is read belongs to the reading thread; `_backlog`, `_corked`, `_armed` and the closing of the descriptor
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
from collections.abc import Callable
from typing import Protocol

__all__ = ["Flushable", "NoVersion", "Wire", "forget_all"]

#: Bytes asked of the kernel at a time; a read is one system call however many packets it holds.
READ_AHEAD = 65_536
#: The same of a flood, once a read was filled. Not always: a buffer of this size costs more than a small read.
READ_FLOOD = 262_144
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

    `send` takes everything: what the kernel has no room for waits here, and is sent by the reader once there is room
    (before there is one: by the thread that connects, before it reads on). So no lock above this is ever held while
    a node makes us wait, and nobody waits for a thread that waits for a node.

    Attributes:
        ahead: what was read and not taken yet, from `at` on; the reading thread's.
        received: bytes read, ever; the reading thread's.
        pushed: bytes sent of what had to wait, ever; under `_out`.
    """

    def __init__(self, sock: socket.socket) -> None:
        # A socket with a timeout makes a poll() before each recv and send; it is woken by shut() instead.
        sock.settimeout(None)
        with contextlib.suppress(OSError):  # a socket pair of a test knows no such option
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self.ahead = b""
        self.at = 0
        self.received = 0
        self.pushed = 0
        self._want = READ_AHEAD  # the reading thread's
        self._marked: list[Flushable] = []
        self._out = threading.Lock()
        self._backlog = bytearray()
        self._corked = False
        # Has the reader call `push` when there is room, or no more; None before there is a reader.
        self._arm: Callable[[bool], None] | None = None
        self._armed = False
        #: of `writable` alone, under `_out`: it is asked once per command
        self._poller: select.poll | None = None
        #: paramiko looks at it as it would at a socket's
        self._closed = False
        _wires.add(self)

    # --- reading: one thread

    def read_version(self) -> bytes:
        """Return the server's version line without its end; what follows it is kept in `ahead`.

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
                    self.ahead = bytes(seen[end + 1 :])
                    return line.removesuffix(b"\r")
                if line.startswith(b"HTTP/"):  # a web server waits for us; whoever else greets has more to say
                    raise NoVersion("other", bytes(seen))
                start = end + 1
            if len(seen) >= VERSION_LIMIT:
                raise NoVersion("limit", bytes(seen[:VERSION_LIMIT]))

    def fill(self) -> None:
        """Wait for bytes and add them to `ahead`. The thread that connects.

        Raises:
            EOFError: the connection ended.
            OSError: it broke.
        """
        if self._backlog:
            self._push_until_readable()
        self._take_in(self._sock.recv(READ_AHEAD))

    def fill_now(self) -> bool:
        """Add to `ahead` what has come; False: nothing. A reader.

        Raises:
            EOFError: the connection ended.
            OSError: it broke.
        """
        try:
            chunk = self._sock.recv(self._want, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        self._want = READ_FLOOD if len(chunk) >= READ_AHEAD else READ_AHEAD
        self._take_in(chunk)
        return True

    def _take_in(self, chunk: bytes) -> None:
        if not chunk:
            raise EOFError("the connection was closed")
        self.received += len(chunk)
        at = self.at
        self.ahead = self.ahead[at:] + chunk if at < len(self.ahead) else chunk
        self.at = 0

    def mark(self, session: Flushable) -> None:
        """Note that `session` has something to hand on; once until it was flushed."""
        self._marked.append(session)

    def dry(self) -> None:
        """Flush everything that was marked: all packets that came have been taken."""
        if self.at == len(self.ahead):
            self.ahead, self.at = b"", 0  # a connection that rests keeps no 64 KiB of the past
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
            self._look_for_room()
            if len(self._backlog) > BACKLOG_LIMIT:
                self.shut()
                raise OSError(errno.ENOBUFS, "the node does not read what is sent to it")
        return len(data)

    def attend(self, arm: Callable[[bool], None]) -> None:
        """Have `arm(True)` called, under the lock, when something waits for room, `arm(False)` when nothing does."""
        with self._out:
            if not self._closed:
                self._arm = arm
                self._look_for_room()

    def _look_for_room(self) -> None:
        """Under `_out`."""
        waits = bool(self._backlog) and not self._corked and not self._closed
        if self._arm is not None and waits != self._armed:
            self._armed = waits
            self._arm(waits)

    def rearm(self) -> None:
        """Say again whether something waits: the reader may not have listened."""
        with self._out:
            if self._arm is not None:
                self._arm(self._armed)

    def push(self) -> None:
        """Send what waits, as far as there is room."""
        with self._out:
            self._push()

    @property
    def waiting(self) -> int:
        """How many bytes wait for room. Any thread; of a moment ago."""
        return len(self._backlog)

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
                sent = self._send(self._backlog)
                self.pushed += sent
                del self._backlog[:sent]
            except OSError:
                # The reading thread will find the connection gone and tells everybody.
                self._backlog.clear()
        self._look_for_room()

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
            self._arm = None
            self._backlog.clear()
            self._sock.close()

    def fileno(self) -> int:
        """Return the descriptor's number."""
        return self._sock.fileno()

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
