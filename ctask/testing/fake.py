# SPDX-License-Identifier: Apache-2.0
"""A transport without a network, for tests of programs that use ctask, and for ctask's own.

A script says what each node does; nothing is dialed and no process is made. Its "connection's thread" is one thread
of the transport, which carries out what sessions do in the order of their times.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from socket import socket
from types import TracebackType
from typing import Any, NoReturn, Self

from ctask import transports
from ctask.errors import NodeError
from ctask.options import Command, Stop, Target
from ctask.result import Ending
from ctask.transports.base import Session, Sink

__all__ = ["FakeConnection", "FakeSession", "FakeTransport", "Step"]


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that a session does, `after` seconds after the one before.

    Attributes:
        do: `running`, `out`, `err`, `exit` (with `status`), `signal` (with `text` as its name), `lost` (with
            `error`), `end`, or `call` (with `call`, for what a test does at that moment).
    """

    do: str
    text: bytes = b""
    status: int = 0
    error: NodeError | None = None
    call: Callable[[], object] | None = None
    after: float = 0.0


Script = Callable[[str, Command], Iterable[Step]]


class FakeSession:
    """One scripted command. Its steps run in the transport's thread."""

    def __init__(self, connection: FakeConnection, command: Command, sink: Sink) -> None:
        self.connection = connection
        self.command = command
        self.sink = sink
        self.written = bytearray()
        self.stdin_closed = False
        self.sent = False
        self.over = False
        self._dropped = False
        self._lock = threading.Lock()
        self._given = threading.Event()
        self._given.set()

    def start(self) -> None:
        """See `Session`."""
        self.connection.transport.begin(self)

    def try_start(self) -> bool:
        """See `Session`."""
        self.start()
        return True

    def write(self, view: memoryview) -> int:
        """See `Session`."""
        self.written += view
        return len(view)

    def close_stdin(self) -> None:
        """See `Session`."""
        self.stdin_closed = True

    def give(self) -> None:
        """See `Session`."""
        self._given.set()

    def drop(self) -> bool:
        """See `Session`."""
        with self._lock:
            if not self.sent:
                self._dropped = True
            return self._dropped

    def close(self) -> None:
        """See `Session`."""
        self.connection.transport.finish(self, None)

    # -- the transport's thread ------------------------------------------------------------------------------

    def send(self) -> bool:
        """The command leaves, unless the session was dropped."""
        with self._lock:
            if self._dropped:
                return False
            self.sent = True
        self.sink.phase("exec")
        return True

    def take(self, step: Step) -> None:
        """Carry out one step."""
        if self.over:
            return
        if step.do == "running":
            self.sink.phase("running")
        elif step.do in ("out", "err"):
            self.sink.data(1 if step.do == "out" else 2, step.text)
        elif step.do == "exit":
            self.sink.exited(step.status, None)
        elif step.do == "signal":
            self.sink.exited(None, step.text.decode())
        elif step.do == "call" and step.call is not None:
            step.call()
        else:
            self.end(step.error)
            return
        self.sink.flush()

    def end(self, error: NodeError | None) -> None:
        """The one end."""
        if not self.over:
            self.over = True
            self.sink.ended(error)
            self.sink.flush()


class FakeConnection:
    """A way to one fake node."""

    def __init__(self, transport: FakeTransport, target: Target) -> None:
        self.transport = transport
        self.target = target
        self.places = 0
        self.retired = False

    def prepare(self, command: Command, sink: Sink) -> FakeSession:
        """See `Connection`."""
        session = FakeSession(self, command, sink)
        self.transport.sessions.append(session)
        return session

    def end(self, sessions: Sequence[Session], stop: Stop, within: float) -> dict[Session, Ending]:
        """See `Connection`; answers what the transport was told to answer."""
        for session in sessions:
            session.close()
        return dict.fromkeys(sessions, Ending(self.transport.end_state))

    def retire(self) -> None:
        """See `Connection`."""
        self.retired = True


class FakeTransport:
    """Nodes that do what a script says.

    Args:
        script: given the node's address and the command, returns the steps of its session; they begin after the
            command was sent. A session that does not end by itself gets `end` after its last step.
        delay: seconds between the start of a session and the sending of its command.

    Attributes:
        sessions: all that were prepared, in order.
        end_state: what `Connection.end` answers.

    Use it as a context manager: it stands in place of `ssh` in this process until it is left.
    """

    dials = False

    def __init__(self, script: Script, *, delay: float = 0.0, end_state: str = "gone") -> None:
        self._script = script
        self._delay = delay
        self.end_state = end_state
        self.sessions: list[FakeSession] = []
        self._connections: dict[Target, FakeConnection] = {}
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="ctask/fake", daemon=True)

    def __enter__(self) -> Self:
        transports.register("ssh", self)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        transports.register("ssh", None)
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    # -- the Protocol ----------------------------------------------------------------------------------------

    def check(self, target: Target) -> None:
        """See `Transport`."""

    def take(self, target: Target) -> FakeConnection:
        """See `Transport`: there is always room."""
        connection = self._connections.get(target)
        if connection is None or connection.retired:
            connection = self._connections[target] = FakeConnection(self, target)
        connection.places += 1
        return connection

    def give_back(self, connection: FakeConnection) -> None:
        """See `Transport`."""
        connection.places -= 1

    def connect(self, target: Target, sock: socket, on_phase: Callable[[str], None]) -> NoReturn:
        """Never called: `take` always succeeds, so nothing is dialed."""
        raise RuntimeError("a fake node is not dialed")

    def keep(self, connection: Any, *, alone: bool = False) -> None:
        """See `Transport`."""

    def reserve(self) -> bool:
        """See `Transport`."""
        return True

    def unreserve(self) -> None:
        """See `Transport`."""

    def when_room(self, call: Callable[[], None]) -> None:
        """See `Transport`."""

    def unreachable(self, target: Target, now: float) -> None:
        """See `Transport`."""

    def shunned(self, target: Target, now: float) -> bool:
        """See `Transport`."""
        return False

    # -- sessions --------------------------------------------------------------------------------------------

    def begin(self, session: FakeSession) -> None:
        """Carry out a session's script. Any thread."""
        self._at(time.monotonic() + self._delay, lambda: self._send(session))

    def finish(self, session: FakeSession, error: NodeError | None) -> None:
        """End a session. Any thread."""
        self._at(time.monotonic(), lambda: session.end(error))

    def _send(self, session: FakeSession) -> None:
        if session.over or not session.send():
            session.end(None)
            return
        when = time.monotonic()
        steps = list(self._script(session.connection.target.address, session.command))
        if not steps or steps[-1].do not in ("end", "lost"):
            steps.append(Step("end"))
        for step in steps:
            when += step.after
            self._at(when, lambda step=step: session.take(step))  # type: ignore[misc]

    def _at(self, when: float, call: Callable[[], None]) -> None:
        with self._changed:
            heapq.heappush(self._due, (when, next(self._count), call))
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._stopped and (not self._due or self._due[0][0] > time.monotonic()):
                    self._changed.wait(self._due[0][0] - time.monotonic() if self._due else None)
                if self._stopped:
                    return
                call = heapq.heappop(self._due)[2]
            call()
