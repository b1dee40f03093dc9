# SPDX-License-Identifier: Apache-2.0
"""A sink that records what a session tells, and the few steps that bring a test to a running command.

A sink is written by the connection's thread and read by the test after `wait`, or under `wait_until`.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ctask.options import Command, Target
from ctask.transports.base import STDERR, STDOUT
from ctask.transports.ssh import SshTransport
from ctask.transports.ssh.exchange import HELLO

if TYPE_CHECKING:
    from ctask.errors import NodeError
    from ctask.transports.base import Session
    from ctask.transports.ssh.channel import SshSession
    from ctask.transports.ssh.connection import SshConnection
    from ctask_tests.fix_sshd import SshdOptions

__all__ = ["RecordingSink", "connected", "dial", "open_connection", "run", "started", "target_for"]


class RecordingSink:
    """What one session told, in order; `problems` has what the Protocol does not allow."""

    def __init__(self, *, generous: bool = True, wide: bool = True) -> None:
        self.events: list[str] = []
        self.chunks: list[tuple[int, bytes]] = []
        self.status: int | None = None
        self.signal: str | None = None
        self.error: NodeError | None = None
        self.flushes = 0
        self.asked = 0
        self.generous = generous
        self.wide = wide
        self.problems: list[str] = []
        self.room = threading.Event()
        self._ended = False
        self._told = threading.Event()
        self._thread = 0

    def phase(self, name: str) -> None:
        self._note(name)

    def data(self, stream: int, chunk: bytes) -> None:
        if "running" not in self.events:
            self.problems.append("data before running")
        self._look()
        self.chunks.append((stream, chunk))

    def flush(self) -> None:
        self.flushes += 1
        if self._ended:
            self._told.set()

    def widen(self, size: int) -> int:
        return size if self.wide else 0

    def may(self, session: Session) -> bool:
        self.asked += 1
        return self.generous

    def writable(self) -> None:
        self._look()
        self.room.set()

    def exited(self, status: int | None, signal: str | None) -> None:
        self.status, self.signal = status, signal
        self._note("exited")

    def ended(self, error: NodeError | None) -> None:
        self.error = error
        self._note("ended")
        self._ended = True
        self.room.set()  # who waits to write waits no more

    def wait(self, timeout: float = 10.0) -> RecordingSink:
        """Return once the end was told and flushed."""
        assert self._told.wait(timeout), f"no end after {timeout} s: {self.events}, {len(self.chunks)} chunks"
        assert not self.problems, self.problems
        return self

    def bytes_of(self, stream: int) -> bytes:
        return b"".join(chunk for number, chunk in self.chunks if number == stream)

    def reached(self, event: str) -> bool:
        """Whether an event was told; "" always was."""
        return not event or event in self.events

    @property
    def stdout(self) -> bytes:
        return self.bytes_of(STDOUT)

    @property
    def stderr(self) -> bytes:
        return self.bytes_of(STDERR)

    @property
    def size(self) -> int:
        return sum(len(chunk) for _, chunk in self.chunks)

    def _note(self, name: str) -> None:
        self._look()
        self.events.append(name)

    def _look(self) -> None:
        here = threading.get_ident()
        if self._ended:
            self.problems.append("told after the end")
        if self._thread not in (0, here):
            self.problems.append("told by two threads")
        self._thread = here


def target_for(options: SshdOptions, address: str, **changes: object) -> Target:
    """The target of a node of a test's server."""
    fields: dict[str, object] = {
        "address": address,
        "port": options["port"],
        "user": options["user"],
        "identities": (options["identity"],),
        "named_identities": True,
        "known_hosts": (options["known_hosts"],),
        "named_known_hosts": True,
    }
    return Target(**{**fields, **changes})  # type: ignore[arg-type]


def dial(target: Target) -> socket.socket:
    """A connected socket, as a dial hands it over: our version line was sent."""
    sock = socket.create_connection((target.address, target.port), timeout=10)
    sock.sendall(HELLO)
    return sock


def open_connection(transport: SshTransport, target: Target) -> SshConnection:
    """Connect, and give the connection to the pool."""
    connection = transport.connect(target, dial(target), lambda name: None)
    transport.keep(connection)
    return connection


@contextlib.contextmanager
def connected(target: Target) -> Iterator[SshConnection]:
    """One connection of a transport of its own, closed afterwards; its thread ends with it."""
    transport = SshTransport()
    connection = open_connection(transport, target)
    try:
        yield connection
    finally:
        assert transport.close_all(5.0)


def run(connection: SshConnection, line: bytes, sink: RecordingSink | None = None) -> RecordingSink:
    """Run one command to its end."""
    sink = sink or RecordingSink()
    connection.prepare(Command(line=line), sink).start()
    return sink.wait()


def started(connection: SshConnection, command: Command, sink: RecordingSink, *, timeout: float = 5.0) -> SshSession:
    """Start a command and return once it runs."""
    session = connection.prepare(command, sink)
    session.start()
    deadline = time.monotonic() + timeout
    while "running" not in sink.events:
        assert time.monotonic() < deadline, sink.events
        time.sleep(0.002)
    return session
