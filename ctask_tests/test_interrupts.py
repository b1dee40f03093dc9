# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C at every line of what a program calls: the task stays usable, and what was interrupted runs no later.

The owner's thread is traced, and the n-th line of ctask that it comes to raises KeyboardInterrupt, for each n. On fake
nodes. Runs in the thread of pytest, which owns the task.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import ctask
from ctask import ClusterExecutor, Task, Worker, task_self
from ctask.options import Command
from ctask.testing import FakeTransport, Step
from ctask_tests.fake_nodes import Recorder, says

#: What a program's own thread passes on its way, but for node sets, options and jobs, which nothing else knows yet.
FILES = {
    str(Path(ctask.__file__).with_name(f"{name}.py"))
    for name in ("task", "roster", "worker", "future", "mailbox", "executor", "engine", "dispatcher", "submission")
}
#: How often one line is interrupted.
TIMES = 1


class Interrupter:
    """Raises KeyboardInterrupt in this thread before the `at`th line of ctask's own code that it comes to.

    A line that was passed `TIMES` is not counted.
    """

    def __init__(self, at: int) -> None:
        self._at = at
        self._passed: Counter[tuple[object, int]] = Counter()
        self.hit = ""

    def __enter__(self) -> None:
        self._before = sys.gettrace()
        sys.settrace(self._called)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _called(self, frame: FrameType, event: str, arg: object) -> Callable[..., Any] | None:
        return self._line if frame.f_code.co_filename in FILES and not is_destroying(frame) else None

    def _line(self, frame: FrameType, event: str, arg: object) -> Callable[..., Any]:
        if event == "line" and not is_before(frame):
            line = (frame.f_code, frame.f_lineno)
            self._passed[line] += 1
            if self._passed[line] <= TIMES:
                self._at -= 1
                if self._at == 0:
                    self.hit = f"{frame.f_code.co_qualname}, line {frame.f_lineno}"
                    raise KeyboardInterrupt
        return self._line


def is_destroying(frame: FrameType | None) -> bool:
    """Whether this is a finalizer's work: what that raises reaches no caller, and the interpreter prints it."""
    while frame is not None:
        if frame.f_code is weakref.finalize.__call__.__code__:
            return True
        frame = frame.f_back
    return False


def is_before(frame: FrameType) -> bool:
    """Whether nothing of a call has begun: what its caller has scheduled stays scheduled then."""
    code = frame.f_code
    return code is Task.resume.__code__ or (code is Task._resume.__code__ and frame.f_lineno == code.co_firstlineno + 1)


class Nodes:
    """Fake nodes that remember which commands were sent to them."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def __call__(self, node: str, command: Command) -> list[Step]:
        self.sent.append(command.line)
        return says(b"line\n")


@pytest.fixture
def nodes() -> Nodes:
    return Nodes()


@pytest.fixture
def task(nodes: Nodes) -> Iterator[Task]:
    with FakeTransport(nodes):
        yield task_self()


def by_run(task: Task, heard: Recorder) -> None:
    task.run("interrupted", nodes="n[1-2]", handler=heard)


def by_resume(task: Task, heard: Recorder) -> None:
    task.shell("interrupted", nodes="n[1-2]", handler=heard)
    task.resume()


def by_a_handler(task: Task, heard: Recorder) -> None:
    def more(*_: object) -> None:
        task.shell("interrupted", nodes="n2", handler=heard).write("x")

    task.run("interrupted", nodes="n1", on_done=more)


def by_submit(task: Task, heard: Recorder) -> None:
    task.submit("interrupted", nodes="n[1-2]", handler=heard)
    task.join()


def by_join(task: Task, heard: Recorder) -> None:
    worker = task.submit("interrupted", nodes="n[1-2]", handler=heard)
    while not task.join(0.001):
        pass
    assert worker.closed


def by_deadline(task: Task, heard: Recorder) -> None:
    with pytest.raises(ctask.TaskTimeout):
        task.run("interrupted", nodes="n1", handler=heard, deadline=1e-6)


def by_waiting(task: Task, heard: Recorder) -> None:
    worker = task.submit("interrupted", nodes="n[1-3]", handler=heard)
    for _ in ctask.as_completed(worker, 5):
        pass
    worker.result("n1", 5)
    for _ in worker.results(5):
        pass
    worker.wait()


def by_executor(task: Task, heard: Recorder) -> None:
    with ClusterExecutor(task) as executor:
        executor.submit("interrupted", node="n1")
        assert len(list(executor.map("interrupted", "n[1-2]"))) == 2


WAYS = [
    by_run,
    *(
        pytest.param(way, marks=pytest.mark.slow)
        for way in (by_resume, by_a_handler, by_submit, by_join, by_deadline, by_waiting, by_executor)
    ),
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_an_interrupt_at_any_line_leaves_a_task_that_works(
    task: Task, nodes: Nodes, way: Callable[[Task, Recorder], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Worker] = []
    assign = Worker.assign

    def note(self: Worker, *what: Any) -> None:
        made.append(self)
        assign(self, *what)

    monkeypatch.setattr(Worker, "assign", note)
    way(task, Recorder())  # what is only done once is done now
    failed = []
    for at in itertools.count(1):
        made.clear()
        interrupter = Interrupter(at)
        with contextlib.suppress(KeyboardInterrupt), interrupter:
            way(task, Recorder())
        if not interrupter.hit:
            break
        if (what := wrong(task, nodes, made)):
            failed.append(f"{at} {interrupter.hit}: {what}")
    assert not failed, "\n".join(failed)


def wrong(task: Task, nodes: Nodes, made: list[Worker]) -> str:
    if task.running():
        task._roster.end()
        return "the task is running"
    known = [*task.unfinished(), *task._roster._scheduled]
    until = time.monotonic() + 2
    while not all(worker.done() for worker in known) and time.monotonic() < until:
        time.sleep(0.001)
    if not all(worker.done() for worker in known):
        return f"not ended: {known}"
    time.sleep(0.002)
    sent = len(nodes.sent)
    heard = Recorder()
    try:
        task.run("next", nodes="m1", handler=heard, deadline=1.5)
    except BaseException as error:  # noqa: BLE001
        return f"the next run: {error!r} {task.workers}"
    if nodes.sent[sent:] != [b"next"]:
        return f"sent later: {nodes.sent[sent:]}"
    if heard.names() != ["start", "pickup", "read", "hup", "done", "close"]:
        return f"heard: {heard.names()}"
    if not all(worker.done() for worker in made if worker.admission.given):
        return "a worker never ends"
    return ""
