# SPDX-License-Identifier: Apache-2.0
"""Nodes of the fake transport, in the words of the tests that use them, and handlers that remember.

Scripts run in the transport's thread; a `Recorder` is called in the task's own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from ctask import EventHandler, NodeResult, Output, Worker
from ctask.options import Command
from ctask.testing import FakeTransport, Step
from ctask.testing.fake import FakeSession

__all__ = ["HANGS", "Recorder", "act", "nodes", "says"]

#: A command that runs, and does not end by itself.
HANGS = [Step("running"), Step("end", after=600)]


def says(out: bytes = b"", rc: int = 0, *, err: bytes = b"", after: float = 0.0) -> list[Step]:
    """A command that prints and exits, `after` seconds after it began."""
    steps = [Step("running")]
    if err:
        steps.append(Step("err", err))
    if out:
        steps.append(Step("out", out))
    return [*steps, Step("exit", status=rc, after=after)]


def nodes(
    default: Iterable[Step] = tuple(says(b"ok\n")), **scripts: Iterable[Step]
) -> Callable[[str, Command], Iterable[Step]]:
    """What each node does; `default` is that of all others."""
    return lambda node, command: scripts.get(node, default)


def act(fake: FakeTransport, session: FakeSession, *steps: Step) -> None:
    """Have a session that hangs do something now."""
    for step in steps:
        fake._at(time.monotonic(), lambda step=step: session.take(step))  # type: ignore[misc]


class Recorder(EventHandler):
    """Remembers every event, what came with it, and the thread that it came in."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any, Any]] = []
        self.threads: set[threading.Thread] = set()

    def _note(self, name: str, node: Any = None, what: Any = None) -> None:
        self.events.append((name, node, what))
        self.threads.add(threading.current_thread())

    def ev_start(self, worker: Worker) -> None:
        self._note("start")

    def ev_pickup(self, worker: Worker, node: str) -> None:
        self._note("pickup", node)

    def ev_read(self, worker: Worker, node: str, sname: str, msg: Output) -> None:
        self._note("read", node, (sname, msg))

    def ev_hup(self, worker: Worker, node: str, rc: int) -> None:
        self._note("hup", node, rc)

    def ev_done(self, worker: Worker, node: str, result: NodeResult) -> None:
        self._note("done", node, result)

    def ev_close(self, worker: Worker, timedout: bool) -> None:
        self._note("close", None, timedout)

    def names(self, node: Any = None) -> list[str]:
        """The names of the events, of one node or of all."""
        return [name for name, at, _ in self.events if node is None or at == node]

    def given(self, name: str) -> list[Any]:
        """What came with the events of that name."""
        return [what for event, _, what in self.events if event == name]
