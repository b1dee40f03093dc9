# SPDX-License-Identifier: Apache-2.0
"""A transport without a network, for tests of programs that use ctask, and for ctask's own.

A script says what each node does; nothing is dialed and no process is made. Its "connection's thread" is one thread
of the transport, which carries out what sessions do in the order of their times.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from socket import socket
from types import TracebackType
from typing import Any, NoReturn, Self

from ctask import transports
from ctask.errors import Aborted, ConnectError, LocalResource, NodeError
from ctask.errors.text import told
from ctask.options import Command, Stop, Target
from ctask.result import Ending
from ctask.states import Outcome
from ctask.task import all_tasks
from ctask.transports.base import Session, Sink

__all__ = ["End", "FakeConnection", "FakeSession", "FakeTransport", "Step"]

log = logging.getLogger("ctask.testing")

#: Seconds after which jobs have their outcome when the transport is left while they run.
LEAVE_WITHIN = 1.0


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


@dataclass(frozen=True, slots=True)
class End:
    """One call of `Connection.end`: on which node, of which sessions, how, and within how many seconds."""

    node: str
    sessions: tuple[FakeSession, ...]
    stop: Stop
    within: float


#: Those that stand in place of `ssh`, the last one in front of the others.
_standing: list[FakeTransport] = []

#: What a call of `Connection.end` answers for all of its sessions, or for each.
Endings = Callable[[End], "Ending | dict[FakeSession, Ending]"]


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
            # A script may give the same error to many nodes; each job fills in its own.
            self.sink.ended(error.copy() if error is not None else None)
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

    def end(
        self,
        sessions: Sequence[Session],
        stop: Stop,
        within: float,
        told: Callable[[Session, Ending], None] | None = None,
    ) -> dict[Session, Ending]:
        """See `Connection`; answers what the transport was told to answer."""
        own = tuple(session for session in sessions if isinstance(session, FakeSession))
        endings = self.transport.answer(End(self.target.address, own, stop, within))
        for session in own:
            session.close()
        if any(ending.state != "gone" for ending in endings.values()):
            self.retire()
        return {session: endings[session] for session in own}

    def retire(self) -> None:
        """See `Connection`."""
        self.retired = True


class FakeTransport:
    """Nodes that do what a script says.

    Args:
        script: given the node's address and the command, returns the steps of its session; they begin after the
            command was sent. A session that does not end by itself gets `end` after its last step.
        delay: seconds between the start of a session and the sending of its command.
        refuse: given the same, returns the error by which a session ends before its command is sent; None: it is sent.

    Attributes:
        sessions: all that were prepared, in order.
        end_state: what `Connection.end` answers, where `end` does not say.
        end: given each call of `Connection.end`, returns the answer; it may wait, and raise.
        end_after: seconds that `Connection.end` takes, whatever it was given.
        ends: the calls of `Connection.end`, in order.

    Use it as a context manager: it stands in place of `ssh` in this process until it is left, which aborts what
    still runs on it. Nothing that was submitted meanwhile is ever dialed: what is begun later ends with a
    `ConnectError`. Options that are about connections (`fresh`, `keep`, `port`) are taken and have no effect. What
    `script`, `refuse` or a step's `call` raises is logged, and ends its session with a `LocalResource`.
    """

    dials = False

    def __init__(
        self,
        script: Script,
        *,
        delay: float = 0.0,
        refuse: Callable[[str, Command], NodeError | None] = lambda node, command: None,
        end_state: str = "gone",
        end: Endings | None = None,
        end_after: float = 0.0,
    ) -> None:
        self._script = script
        self._delay = delay
        self._refuse = refuse
        self.end_state = end_state
        self.end = end
        self.end_after = end_after
        self.ends: list[End] = []
        self._left = threading.Event()
        self.sessions: list[FakeSession] = []
        self._connections: dict[Target, FakeConnection] = {}
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="ctask/fake", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        _standing.append(self)
        transports.register("ssh", self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._abort_jobs()
        self._left.set()
        _standing.remove(self)
        transports.register("ssh", _standing[-1] if _standing else None)
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def _abort_jobs(self) -> None:
        """End what still runs or waits: its places are ours, and nobody else can take them back."""
        begun = [job for task in all_tasks() for worker in task.unfinished() for job in worker.jobs]
        own: object = self
        jobs = [job for job in begun if job.result is None and job.way is own]
        for job in jobs:
            job.run.post(job, job.stop, Outcome.ABORTED, Aborted("the fake transport was left"), LEAVE_WITHIN)
        until = time.monotonic() + 2 * LEAVE_WITHIN
        while any(job.result is None for job in jobs) and time.monotonic() < until:
            time.sleep(0.001)

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
        """Never called: nothing is dialed (`dials` is False)."""
        raise RuntimeError("a fake node is not dialed")

    def keep(self, connection: Any, *, alone: bool = False) -> None:
        """See `Transport`."""

    def disconnect(self, targets: Iterable[Target] | None = None) -> None:
        """See `Transport`: the next command gets another connection."""
        wanted = {(target.address, target.port) for target in targets} if targets is not None else None
        for connection in list(self._connections.values()):
            if wanted is None or (connection.target.address, connection.target.port) in wanted:
                connection.retire()

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

    # -- endings ---------------------------------------------------------------------------------------------

    def answer(self, end: End) -> dict[FakeSession, Ending]:
        """Answer a call of `Connection.end`. The task's pool."""
        self.ends.append(end)
        if self.end_after:
            self._left.wait(min(self.end_after, threading.TIMEOUT_MAX))
        said = self.end(end) if self.end is not None else Ending(self.end_state)
        return said if isinstance(said, dict) else dict.fromkeys(end.sessions, said)

    # -- sessions --------------------------------------------------------------------------------------------

    def begin(self, session: FakeSession) -> None:
        """Carry out a session's script. Any thread."""
        if not self._at(time.monotonic() + self._delay, lambda: self._guarded(session, self._send, session)):
            session.end(ConnectError("the fake transport that it was submitted to was left", phase="open"))

    def finish(self, session: FakeSession, error: NodeError | None) -> None:
        """End a session. Any thread."""
        if not self._at(time.monotonic(), lambda: session.end(error)):
            session.end(error)

    def _send(self, session: FakeSession) -> None:
        if session.over:
            return
        refusal = self._refuse(session.connection.target.address, session.command)
        if refusal is not None or not session.send():
            session.end(refusal)
            return
        when = time.monotonic()
        steps = list(self._script(session.connection.target.address, session.command))
        if not steps or steps[-1].do not in ("end", "lost"):
            steps.append(Step("end"))
        for step in steps:
            when += step.after
            self._at(when, lambda step=step: self._guarded(session, session.take, step))  # type: ignore[misc]

    def _guarded(self, session: FakeSession, call: Callable[..., None], *args: object) -> None:
        """Carry out what calls the program's code: it must not end the thread that all nodes hang on."""
        try:
            call(*args)
        except Exception as error:
            log.exception("what the fake node %r was to do raised", session.connection.target.address)
            failure = LocalResource(f"the script of the fake node raised: {told(error)}")
            failure.__cause__ = error
            session.end(failure)

    def _at(self, when: float, call: Callable[[], None]) -> bool:
        """Have a call made in the transport's thread; False: it was left, and has none."""
        with self._changed:
            if self._stopped:
                return False
            heapq.heappush(self._due, (when, next(self._count), call))
            self._changed.notify()
        return True

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._stopped and (not self._due or self._due[0][0] > time.monotonic()):
                    left = self._due[0][0] - time.monotonic() if self._due else threading.TIMEOUT_MAX
                    self._changed.wait(min(left, threading.TIMEOUT_MAX))
                if self._stopped:
                    return
                call = heapq.heappop(self._due)[2]
            call()
            del call  # what it holds is not to live until the next one
