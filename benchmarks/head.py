# SPDX-License-Identifier: Apache-2.0
"""What a job costs before and after its network: many jobs over a transport that has none.

The transport answers at once. `ctask.testing.FakeTransport` would cost three times what is to be measured: it keeps a
timetable.

Runs in the main thread of a peer's process; sessions are answered in the transport's own thread, which is reached by a
queue.
"""

from __future__ import annotations

import threading
import time
from queue import SimpleQueue
from socket import socket
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, Self

from benchmarks.contest import Program
from benchmarks.measure import BenchmarkError, Sample, Setup, measured
from benchmarks.report import Figure

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ctask.options import Command, Stop, Target
    from ctask.result import Ending
    from ctask.transports.base import Connection, Session, Sink

__all__ = ["PROGRAM"]


def sample(setup: Setup) -> Sample:
    """Submit a command for all nodes and wait for their results."""
    from ctask import NodeSet, task_self

    nodes = NodeSet(f"n[1-{setup.sizes['jobs']}]")
    task = task_self()
    task.set_info("fanout", setup.sizes["fanout"])

    submitted = 0.0

    def work() -> int:
        nonlocal submitted
        began = time.perf_counter()
        worker = task.shell("true", nodes=nodes, stdin=False)
        submitted = time.perf_counter() - began
        task.resume()
        return len(worker.ok)

    with Instant():
        ended, cost = measured(work)
    if ended != setup.sizes["jobs"]:
        raise BenchmarkError(f"{ended} of {setup.sizes['jobs']} jobs are ok")
    scale = 1e6 / ended
    return {"submit": submitted * scale, "CPU": cost.cpu * scale, "wall": cost.wall * scale}


class Instant:
    """A transport, and its only connection, on which every command exits with 0 at once; see `Transport`."""

    dials = False

    def __init__(self) -> None:
        self.target: Target
        self.begun: SimpleQueue[Sink | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._answer, name="instant")

    def __enter__(self) -> Self:
        from ctask import transports

        transports.register("ssh", self)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        from ctask import transports

        transports.register("ssh", None)
        self.begun.put(None)
        self._thread.join()

    def _answer(self) -> None:
        while (sink := self.begun.get()) is not None:
            sink.phase("exec")
            sink.phase("running")
            sink.exited(0, None)
            sink.ended(None)
            sink.flush()

    # The transport.

    def check(self, target: Target) -> None:
        return

    def take(self, target: Target) -> Instant:
        return self

    def give_back(self, connection: Connection) -> None:
        return

    def connect(self, target: Target, sock: socket, on_phase: Callable[[str], None]) -> NoReturn:
        raise RuntimeError("`take` always has a connection, so nothing is dialed")

    def keep(self, connection: Connection, *, alone: bool = False) -> None:
        return

    def reserve(self) -> bool:
        return True

    def unreserve(self) -> None:
        return

    def when_room(self, call: Callable[[], None]) -> None:
        return

    def unreachable(self, target: Target, now: float) -> None:
        return

    def shunned(self, target: Target, now: float) -> bool:
        return False

    # The connection.

    def prepare(self, command: Command, sink: Sink) -> Answered:
        return Answered(self, sink)

    def end(self, sessions: Sequence[Session], stop: Stop, within: float) -> dict[Session, Ending]:
        return {}

    def retire(self) -> None:
        return


class Answered:
    """One command; see `Session`."""

    def __init__(self, transport: Instant, sink: Sink) -> None:
        self._transport = transport
        self._sink = sink

    def start(self) -> None:
        self.try_start()

    def try_start(self) -> bool:
        self._transport.begun.put(self._sink)
        return True

    def write(self, view: memoryview) -> int:
        return len(view)

    def close_stdin(self) -> None:
        return

    def give(self) -> None:
        return

    def drop(self) -> bool:
        return False

    def close(self) -> None:
        return


PROGRAM = Program(
    name="head",
    title="what a job costs without a network (no target)",
    heading="{jobs} jobs over a transport that answers at once, fan-out {fanout}",
    figures=[Figure("submit", "us/job", 1), Figure("CPU", "us/job", 1), Figure("wall", "us/job", 1)],
    targets=[],
    peers={"ctask": sample},
    full={"jobs": 20_000, "fanout": 64, "rounds": 5},
    quick={"jobs": 2_000, "fanout": 64, "rounds": 1},
)
