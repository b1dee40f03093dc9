# SPDX-License-Identifier: Apache-2.0
"""SSH on paramiko: the only room of the library that imports it. `transport()` is the way in.

Its methods run where `base.Transport` says; the pool of connections guards itself, `_lock` the making of the
one object of the process.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterable
from typing import cast

from ctask.options import Target
from ctask.transports.base import Connection
from ctask.transports.ssh import _paramiko, hostkeys, keys, wire  # noqa: F401 (the first refuses a wrong paramiko)
from ctask.transports.ssh.connection import SshConnection, connect
from ctask.transports.ssh.exchange import HELLO
from ctask.transports.ssh.pool import ConnectionPool, Statistics

__all__ = ["SshTransport", "Statistics", "settle", "transport"]


class SshTransport:
    """The SSH way to nodes; `transport()` gives the process's own."""

    dials = True
    by_files = True
    hello = HELLO

    def __init__(self) -> None:
        self.pool = ConnectionPool()

    def __repr__(self) -> str:
        return f"<SshTransport, {self.pool!r}>"

    def prepare(self) -> None:
        """Have the reader's thread before others are started. Raises as making a thread and descriptors does."""
        self.pool.prepare()

    def check(self, target: Target) -> None:
        """Raise `OptionError` where a named key or known_hosts file can never do."""
        keys.check(target)
        hostkeys.check(target)

    def take(self, target: Target) -> SshConnection | None:
        """Take a place on a kept connection."""
        return self.pool.take(target)

    def give_back(self, connection: Connection) -> None:
        """Give a place back."""
        self.pool.give_back(cast("SshConnection", connection))

    def connect(self, target: Target, sock: socket.socket, on_phase: Callable[[str], None]) -> SshConnection:
        """Shake hands, verify the host key, log in."""
        return connect(self.pool, target, sock, on_phase)

    def keep(self, connection: Connection, *, alone: bool = False) -> None:
        """Add a connection to the pool; `alone` retires the older ones to its target."""
        self.pool.keep(cast("SshConnection", connection), alone=alone)

    def reserve(self) -> bool:
        """Count a dial in, if descriptors allow."""
        return self.pool.reserve()

    def unreserve(self) -> None:
        """Count a dial out that made no connection."""
        self.pool.unreserve()

    def when_room(self, call: Callable[[], None]) -> None:
        """Have `call` called once, when `reserve` may succeed again."""
        self.pool.when_room(call)

    def unreachable(self, target: Target, now: float) -> None:
        """Remember that `target` could not be reached."""
        self.pool.unreachable(target, now)

    def shunned(self, target: Target, now: float) -> bool:
        """Whether `target` could not be reached lately."""
        return self.pool.shunned(target, now)

    def disconnect(self, targets: Iterable[Target] | None = None) -> None:
        """Close the connections to these targets, or all; busy ones once their jobs are done. Any thread."""
        self.pool.disconnect(targets)

    def statistics(self) -> Statistics:
        """Return what the pool has, and what it has done. Any thread."""
        return self.pool.statistics()

    def close_all(self, within: float = 2.0) -> bool:
        """End every connection and wait for their threads; False: some are left."""
        return self.pool.close_all(within)


_lock = threading.Lock()
_transport: SshTransport | None = None


def transport() -> SshTransport:
    """Return the process's SSH transport."""
    global _transport  # noqa: PLW0603
    with _lock:
        if _transport is None:
            _transport = SshTransport()
        return _transport


def settle(call: Callable[[], None]) -> None:
    """Make a call once what had come by now from nodes was read; at once where there is nothing to read."""
    made = _transport
    if made is None:
        call()
    else:
        made.pool.settle(call)


def _forked() -> None:
    # The parent's connections are the parent's: whatever this process sent on one would be garbage to the
    # node.
    global _lock  # noqa: PLW0603
    _lock = threading.Lock()
    wire.forget_all()
    if _transport is not None:
        _transport.pool.forget()


os.register_at_fork(after_in_child=_forked)
