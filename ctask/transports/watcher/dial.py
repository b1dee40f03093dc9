# SPDX-License-Identifier: Apache-2.0
"""A dial: from a name to a socket on which a server has spoken.

What our side says first is sent as soon as the connection stands. Some servers, and what stands before some, wait for
it; and where the queue of a slow server is full, the kernel forgets a client that says nothing.

Everything but `take`, `drop` and `where` runs in the watcher's thread; the dispatcher calls those. One small lock
per dial guards the stage and the socket; what is done under it never waits, and no listener is called under it.
"""

from __future__ import annotations

import enum
import errno
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

from ctask.errors import (
    BannerError,
    ConnectError,
    ConnectRefused,
    ConnectTimeout,
    Curable,
    LocalResource,
    NodeError,
    ResolveError,
)
from ctask.options import Target
from ctask.threads import NoThread
from ctask.transports.watcher.pace import Pace, place_of
from ctask.transports.watcher.resolver import Address, Found, Lookup, Resolver

__all__ = ["PROMPT", "Dial", "Listener"]

#: Seconds after its first byte within which a server that hangs up refuses (it is full, it does not want us);
#: later, it is tired of waiting for us (LoginGraceTime).
PROMPT = 0.5

_HUNG = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
#: What a connect says that was done, and undone by the server before we looked.
_RESET = (errno.ECONNRESET, errno.EPIPE)
#: of `struct tcp_info`: the state, its first byte; the third is how often the kernel has repeated itself
_SYN_SENT = 2
_DROPPED = "connection dropped by the server"


class _Stage(enum.Enum):
    WAITING = enum.auto()
    RESOLVE = enum.auto()
    HELD = enum.auto()
    TCP = enum.auto()
    BANNER = enum.auto()
    SPOKE = enum.auto()
    OVER = enum.auto()


class Listener(Protocol):
    """Who asked for a dial; called from the watcher's thread, so it only posts."""

    def phase(self, name: str) -> None:
        """`resolve` (not for an address), `tcp`, `banner`, as they begin."""

    def spoke(self) -> None:
        """The server's first byte is there: the dial waits to be taken."""

    def failed(self, error: NodeError) -> None:
        """It came to nothing; the last call. `node` is the listener's to fill in."""

    def hung_up(self) -> None:
        """The server had spoken, and did not wait for us; the last call."""

    def held(self, waits: bool) -> None:
        """Whether it waits for its turn at a place that answers others: that is none of its time to connect."""


class Loop(Protocol):
    """What a dial needs of the watcher."""

    def call(self, fn: Callable[[], None]) -> None: ...
    def watch(self, fd: int, events: int, callback: Callable[[int], None]) -> None: ...
    def modify(self, fd: int, events: int) -> None: ...
    def unwatch(self, fd: int) -> None: ...


class Dial:
    """One connection on its way; made by `Watcher.dial`. It has no deadline: that is its owner's business."""

    def __init__(
        self,
        address: str,
        port: int,
        listener: Listener,
        *,
        loop: Loop,
        resolver: Resolver,
        pace: Pace,
        hello: bytes,
        over: Callable[[Dial], None],
    ) -> None:
        self._loop = loop
        self._resolver = resolver
        self._pace = pace
        self._hello = hello
        self._address = address
        self._port = port
        self._listener = listener
        self._report_over = over
        self._lock = threading.Lock()
        # Guarded by the lock.
        self._stage = _Stage.WAITING
        self._sock: socket.socket | None = None
        self._lookup: Lookup | None = None
        self._trying = address
        # The watcher's thread only.
        self._left: list[Address] = []
        self._now: Address | None = None
        self._held = False
        self._error: NodeError | None = None
        self._spoken = 0.0

    def where(self) -> str:
        """Return the `address:port` that is being tried, or the name while it has none. Any thread."""
        return _where(self._trying, self._port)

    def take(self) -> socket.socket | None:
        """Take the socket of a server that spoke: blocking, no longer watched, the caller's to close.

        Dispatcher; never waits. None where there is none to take: `hung_up` has been called or is about to be, or
        the server has not spoken. After a socket was taken nothing is called any more.
        """
        with self._lock:
            if self._stage != _Stage.SPOKE or self._sock is None:
                return None
            self._stage = _Stage.OVER
            sock, self._sock = self._sock, None
            self._loop.unwatch(sock.fileno())
        sock.setblocking(True)
        self._report_over(self)
        return sock

    def drop(self) -> None:
        """Give up, from any stage, and close the socket.

        Dispatcher; never waits. No listener is called any more, but for a call that is under way at this moment.
        Harmless when the dial is over.
        """
        with self._lock:
            if self._stage == _Stage.OVER:
                return
            paced = self._stage in (_Stage.HELD, _Stage.TCP, _Stage.BANNER)
            self._stage = _Stage.OVER
            self._shut()
            lookup, self._lookup = self._lookup, None
        if lookup is not None:
            self._resolver.cancel(lookup, self._found)
        if paced:
            self._loop.call(partial(self._pace.left, self))
        self._report_over(self)

    def abandon(self) -> None:
        """Close the socket that a forked child got with its parent's memory; takes no lock."""
        self._stage = _Stage.OVER
        if self._sock is not None:
            self._sock.close()

    def begin(self) -> None:
        """Look the name up, or connect at once where it is an address."""
        address = _literal(self._address)
        with self._lock:
            if self._stage != _Stage.WAITING:
                return
            self._stage = _Stage.TCP if address else _Stage.RESOLVE
        if address:
            self._left = [address]
            self._connect()
            return
        self._listener.phase("resolve")
        lookup = self._resolver.resolve(self._address, self._found)
        with self._lock:
            self._lookup = lookup

    def _found(self, found: Found) -> None:
        # In a resolver's thread.
        self._loop.call(partial(self._resolved, found))

    def _resolved(self, found: Found) -> None:
        with self._lock:
            if self._stage != _Stage.RESOLVE:
                return
            self._lookup = None
            if isinstance(found, list):
                self._stage = _Stage.TCP
        if isinstance(found, list):
            self._left = list(dict.fromkeys(found))
            self._connect()
        else:
            self._fail(_unresolved(found))

    def _connect(self) -> None:
        self._listener.phase("tcp")
        self._next()

    def _next(self) -> None:
        """Begin to connect to the next address; fail after the last one, with the most telling error."""
        while self._left:
            self._now = self._left.pop(0)
            place, here = place_of(str(self._now[1][0]), self._port)
            with self._lock:
                if self._stage != _Stage.TCP:
                    return
                self._trying = str(self._now[1][0])
                self._stage = _Stage.HELD
            if not self._pace.ask(place, self, here=here) or self._begun():
                return
        self._fail(self._error or ResolveError(phase="resolve"))

    def _begun(self) -> bool:
        """Connect to the address whose turn it is; False: that failed at once."""
        assert self._now is not None
        family, address = self._now
        with self._lock:
            if self._stage != _Stage.HELD:
                return True
            self._stage = _Stage.TCP
            try:
                self._sock = _connecting(family, (address[0], self._port, *address[2:]))
                self._loop.watch(self._sock.fileno(), select.EPOLLOUT, self._event)
                return True
            except OSError as error:
                self._shut()
                failure = error.errno or 0
        self._pace.left(self)
        self._note(failure)
        return False

    # -- the pace of its place -------------------------------------------------------------------------------

    def go(self) -> None:
        """See `Paced`."""
        if not self._begun():
            self._next()

    def dropped(self) -> bool:
        """See `Paced`."""
        with self._lock:
            return self._stage in (_Stage.TCP, _Stage.BANNER) and self._sock is not None and _dropped(self._sock)

    def take_back(self) -> None:
        """See `Paced`."""
        with self._lock:
            if self._stage not in (_Stage.TCP, _Stage.BANNER) or self._sock is None:
                return
            self._stage = _Stage.HELD
            # With a reset: what is left of it in the other kernel must not become a connection without an owner.
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._shut()

    def stands(self, waits: bool) -> None:
        """See `Paced`."""
        if waits != self._held:
            self._held = waits
            self._listener.held(waits)

    def _note(self, failure: int) -> None:
        error = _unconnected(failure, self._trying, self._port)
        # An address that answered says more than one to which there is no way.
        if self._error is None or isinstance(error, ConnectRefused):
            self._error = error

    def _event(self, events: int) -> None:
        if self._stage == _Stage.TCP:
            self._connected(events)
        elif self._stage == _Stage.BANNER:
            self._heard(events)
        elif self._stage == _Stage.SPOKE:
            self._hung()

    def _connected(self, events: int) -> None:
        with self._lock:
            if self._stage != _Stage.TCP or self._sock is None:
                return
            failure = _outcome(self._sock, events)
            if failure is None:
                return
            if failure == 0 and not self._greeted(self._sock):
                failure = errno.ECONNRESET
            if failure == 0:
                self._stage = _Stage.BANNER
                self._loop.modify(self._sock.fileno(), select.EPOLLIN | select.EPOLLRDHUP)
            elif failure in _RESET:
                self._stage = _Stage.BANNER  # it was connected, and is reset already
            else:
                self._shut()
        if failure == 0:
            self._pace.connected(self)
            self._listener.phase("banner")
        elif failure in _RESET:
            self._listener.phase("banner")
            self._fail(BannerError(_DROPPED, phase="banner", curable=Curable.BUSY))
        else:
            self._pace.left(self)
            self._note(failure)
            self._next()

    def _greeted(self, sock: socket.socket) -> bool:
        # It is short, and nothing was sent before: the kernel has room for it.
        try:
            return sock.send(self._hello, socket.MSG_NOSIGNAL) == len(self._hello)
        except OSError:
            return False

    def _heard(self, events: int) -> None:
        with self._lock:
            if self._stage != _Stage.BANNER or self._sock is None:
                return
            try:
                first = self._sock.recv(1, socket.MSG_PEEK)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                first = b""
            if first:
                self._stage = _Stage.SPOKE
                self._spoken = time.monotonic()
                if events & _HUNG:
                    self._loop.unwatch(self._sock.fileno())
                else:
                    self._loop.modify(self._sock.fileno(), select.EPOLLRDHUP)
        if first:
            self._pace.answered(self)
            self._listener.spoke()
        else:
            self._fail(BannerError(_DROPPED, phase="banner", curable=Curable.BUSY))

    def _hung(self) -> None:
        with self._lock:
            if self._stage != _Stage.SPOKE or self._sock is None or not _hangs(self._sock):
                return
            if time.monotonic() - self._spoken < PROMPT:
                # That was a refusal: the handshake, in its turn, finds the reason. Told as a hang-up, which is
                # no try, the node would be dialed again at once, and again.
                self._loop.unwatch(self._sock.fileno())
                return
            self._stage = _Stage.OVER
            self._shut()
        self._report_over(self)
        self._listener.hung_up()

    def _fail(self, error: NodeError) -> None:
        with self._lock:
            if self._stage == _Stage.OVER:
                return
            self._stage = _Stage.OVER
            self._shut()
        self._pace.left(self)
        self._report_over(self)
        self._listener.failed(error)

    def _shut(self) -> None:
        """Close the socket. Under the lock."""
        sock, self._sock = self._sock, None
        if sock is not None:
            self._loop.unwatch(sock.fileno())
            sock.close()


def _literal(address: str) -> Address | None:
    """Return an IP address as what `connect` takes; None for a name."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, address)
        except (OSError, UnicodeError, ValueError):
            continue
        return (family, (address, 0)) if family == socket.AF_INET else (family, (address, 0, 0, 0))
    if ":" in address and "%" in address:  # with a zone, which has to be looked up, but not in the network
        try:
            found = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        except (OSError, UnicodeError):
            return None
        return found[0][0], found[0][4]
    return None


def _connecting(family: int, address: tuple[object, ...]) -> socket.socket:
    """Return a socket that has begun to connect."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        failure = sock.connect_ex(address)
        if failure not in (0, errno.EINPROGRESS, errno.EINTR):
            raise OSError(failure, os.strerror(failure))
    except BaseException:
        sock.close()
        raise
    return sock


def _outcome(sock: socket.socket, events: int) -> int | None:
    """Return the errno of a connect, 0 when it is done, None while it is not."""
    failure = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if failure:
        return failure
    try:
        # A socket may connect to itself: on this machine, to a port that the kernel has just given to it.
        return errno.ECONNREFUSED if sock.getpeername() == sock.getsockname() else 0
    except OSError:
        return errno.ECONNRESET if events & (select.EPOLLHUP | select.EPOLLERR) else None


def _dropped(sock: socket.socket) -> bool:
    """Whether the other side's kernel has not answered: not the connect, or not what was sent on it.

    The client's kernel takes a connection for made that the server's has dropped for want of room, and repeats what was
    sent on it. What is made, but not noticed yet, counts as made.
    """
    state, _, repeats = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)[:3]
    return state == _SYN_SENT or repeats > 0


def _hangs(sock: socket.socket) -> bool:
    """Look once more: an event may be one of another socket that had the same number."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return bool(poll.poll(0))


def _where(address: str, port: int) -> str:
    return Target(address=address, port=port).where()


def _caused(error: NodeError, cause: BaseException) -> NodeError:
    error.__cause__ = cause
    return error


def _unresolved(cause: OSError | UnicodeError | NoThread) -> NodeError:
    if isinstance(cause, NoThread):
        return _caused(LocalResource(str(cause), phase="resolve", curable=Curable.BUSY), cause)
    if isinstance(cause, socket.gaierror) and cause.errno in (socket.EAI_NONAME, socket.EAI_NODATA):
        return _caused(ResolveError(phase="resolve"), cause)
    if isinstance(cause, UnicodeError):
        return _caused(ResolveError("not a name that can be looked up", phase="resolve"), cause)
    text = cause.strerror or str(cause)
    curable = Curable.BUSY if cause.errno == socket.EAI_AGAIN else Curable.NAMED
    return _caused(ResolveError(text[:1].lower() + text[1:], phase="resolve", curable=curable), cause)


#: Failures of which this machine is short, not the way to the node.
_SHORT = {
    errno.EMFILE: "too many open files in this process (ulimit -n)",
    errno.ENFILE: "too many open files on this machine",
    errno.ENOBUFS: "no memory left for sockets",
    errno.ENOMEM: "no memory left for sockets",
    errno.ENOSPC: "too many watched files (fs.epoll.max_user_watches)",
    errno.EADDRNOTAVAIL: "no local port or address left",
}
_NO_WAY = {
    errno.EHOSTUNREACH: ("no route to {}", "no route"),
    errno.ENETUNREACH: ("network unreachable: {}", "network unreachable"),
    errno.ETIMEDOUT: ("no answer from {}", "no answer"),
}


def _unconnected(failure: int, address: str, port: int) -> NodeError:
    """Return the error for the errno of a connect."""
    cause = OSError(failure, os.strerror(failure))
    if failure == errno.ECONNREFUSED:
        return _caused(ConnectRefused("refused", phase="tcp", kind="refused"), cause)
    if failure == errno.EADDRNOTAVAIL and ":" in address:
        failure = errno.ENETUNREACH  # what a machine without IPv6 says of an IPv6 address
    if failure in _SHORT:
        return _caused(LocalResource(_SHORT[failure], phase="tcp", curable=Curable.BUSY), cause)
    where = _where(address, port)
    if failure in _NO_WAY:
        text, kind = _NO_WAY[failure]
        return _caused(ConnectTimeout(text.format(where), phase="tcp", kind=kind), cause)
    kind = os.strerror(failure).lower()
    return _caused(ConnectError(f"{kind}: {where}", phase="tcp", kind=kind), cause)
