# SPDX-License-Identifier: Apache-2.0
"""What is dropped is freed at once, not when the collector comes by: workers, futures, errors, tasks, and the budget.

The collector is off in every test of this file, and `gc.collect()` is called nowhere.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import ctask
from ctask import ConnectError, ConnectionLost, HandlerError, NodeError, Retry, Task, Worker, task_self
from ctask.testing import FakeTransport, Step
from ctask_tests.fake_nodes import HANGS, Recorder, nodes, says
from ctask_tests.fix_leaks import wait_until
from ctask_tests.fix_sshd import Sshd
from ctask_tests.real_nodes import task_of

SOON = 10.0
LATEST = 1.0
#: More than a block, so that the store counts blocks as well.
TEXT = b"x" * 200_000 + b"\n"


@pytest.fixture(autouse=True)
def no_collector(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.CRITICAL + 1)  # pytest keeps records, and what their frames hold
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def fake() -> Iterator[FakeTransport]:
    lost = [Step("running"), Step("out", TEXT), Step("lost", error=ConnectionLost())]

    def refuse(node: str, command: object) -> NodeError | None:
        return ConnectError("no") if node == "refused" else None

    script = nodes(HANGS, well=says(TEXT), bad=says(TEXT, 3), lost=lost, out=[Step("running"), Step("out", TEXT)])
    with FakeTransport(script, refuse=refuse) as fake:
        yield fake


def freed(task: Task, *refs: Any) -> None:
    """Hold all to being gone, and the task's account of memory to being even."""
    budget = task._budget
    wait_until(lambda: all(ref() is None for ref in refs), timeout=LATEST, what="what was dropped is freed")
    wait_until(lambda: budget.held == 0, timeout=LATEST, what="the budget has all back")


NODES = "well,bad,lost,refused,out"


def by_wait(worker: Worker) -> None:
    assert worker.wait(SOON)


def by_results(worker: Worker) -> None:
    assert len(list(worker.results())) == len(worker)


def by_futures(worker: Worker) -> None:
    for future in ctask.as_completed(worker, SOON):
        future.exception()
    for future in list(worker):
        try:
            future.result()
        except NodeError as error:
            found = error.result
            assert found is not None
            assert found.why == error.why()  # noqa: PT017
            del found


def by_check(worker: Worker) -> None:
    worker.wait(SOON)
    with pytest.raises(ctask.JobsFailed):
        worker.check()
    for result in worker.results():
        try:
            result.check()
        except NodeError as error:
            assert error.result is result  # noqa: PT017
    del result


def by_views(worker: Worker) -> None:
    worker.wait(SOON)
    assert worker.groups()
    list(worker.iter_buffers())
    assert worker.failures()
    assert repr(worker)
    assert list(worker.iter_retcodes())


def by_abort(worker: Worker) -> None:
    worker.abort()
    assert worker.wait(SOON)


def by_cancel(worker: Worker) -> None:
    for future in worker:
        future.cancel()
    del future
    assert worker.wait(SOON)


def by_await(worker: Worker) -> None:
    async def wait() -> None:
        await worker
        async for result in worker:
            assert result.node

    asyncio.run(wait())


def by_context(worker: Worker) -> None:
    with worker:
        pass


WAYS: list[Callable[[Worker], None]] = [
    by_wait, by_results, by_futures, by_check, by_views, by_abort, by_cancel, by_await, by_context,
]  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "handler": {"handler": Recorder},
    "read": {"on_read": lambda *_: None, "on_done": lambda *_: None},
    "stdin": {"stdin": b"some"},
    "streams": {"stderr": True, "timeout": 5, "idle_timeout": 5, "deadline": 20},
    "retry": {"retry": Retry(2, wait=0.01, exit_codes=3, on=NodeError, idempotent=True)},
    "loose": {"gather": False, "on_read": lambda *_: None},
}


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_worker_that_is_dropped_frees_its_output(
    fake: FakeTransport, way: Callable[[Worker], None], options: dict[str, Any]
) -> None:
    task = task_self()
    task.set_info("stop_grace", 0)
    given = {name: value() if isinstance(value, type) else value for name, value in options.items()}
    worker = task.submit("x", nodes=NODES if way not in (by_abort, by_cancel) else NODES + ",n[1-3]", **given)
    del given
    refs = [weakref.ref(worker), *(weakref.ref(job) for job in worker.jobs), *(weakref.ref(one) for one in worker)]
    way(worker)
    assert worker.wait(SOON)  # handlers have heard the rest
    refs.extend(weakref.ref(job.result) for job in worker.jobs)
    del worker
    freed(task, *refs)


def test_a_run_frees_its_workers_with_the_next_one(fake: FakeTransport) -> None:
    task = task_self()
    refs = []
    for _ in range(3):
        worker = task.run("x", nodes=NODES, handler=Recorder())
        assert worker is not None
        refs += [weakref.ref(worker), *(weakref.ref(job) for job in worker.jobs)]
        del worker
    task.resume()
    freed(task, *refs)


def test_what_a_run_raises_keeps_nothing_once_it_is_dropped(fake: FakeTransport) -> None:
    task = task_self()

    def slip(worker: Worker, node: str, result: object) -> None:
        raise ValueError(node)

    def run() -> weakref.ref[Worker]:
        worker = task.shell("x", nodes=NODES, on_done=slip)
        with pytest.raises(HandlerError):
            task.resume()
        return weakref.ref(worker)

    ref = run()
    task.resume()
    freed(task, ref)
    worker = task.shell("x", nodes="n1")
    with pytest.raises(ctask.TaskTimeout):
        task.resume(0.05)
    ref = weakref.ref(worker)
    del worker
    task.resume()
    freed(task, ref)


def test_each_part_that_is_kept_keeps_what_it_needs_and_no_more(fake: FakeTransport) -> None:
    """A future keeps its job's output, an error its result, a result its error; none of them the other nodes'."""
    task = task_self()
    worker = task.submit("x", nodes=NODES)
    assert worker.wait(SOON)
    future, result = worker.futures["well"], worker.result("bad")
    error = worker.futures["lost"].exception()
    ref, others = weakref.ref(worker), [weakref.ref(job) for job in worker.jobs if job.node in ("refused", "out")]
    del worker
    wait_until(lambda: ref() is None and [one for one in others if one() is not None] == [])
    assert future.result().output == TEXT
    assert result.output == TEXT
    assert isinstance(error, ConnectionLost)
    again = error.result
    assert again is not None
    assert again is error.result
    assert again.error is error
    assert again.output == TEXT
    assert again.attempts == error.attempts
    assert again.attempts[-1].error is error
    assert (again.node, again.rc, again.ran, error.node) == ("lost", 255, None, "lost")
    del future, result, error, again
    freed(task, *others)


def test_futures_with_callbacks_are_freed(fake: FakeTransport) -> None:
    task = task_self()
    seen: list[str] = []
    worker = task.submit("x", nodes=NODES)
    for future in worker:
        future.add_done_callback(lambda future: seen.append(future.node))
    del future
    assert worker.wait(SOON)
    wait_until(lambda: len(seen) == 5)
    ref = weakref.ref(worker)
    del worker
    freed(task, ref)


def test_a_worker_is_freed_in_every_thread(fake: FakeTransport) -> None:
    task = Task()
    refs: list[Any] = []

    def work() -> None:
        worker = task.submit("x", nodes=NODES)
        assert worker.wait(SOON)
        assert all(result for result in worker.results())
        refs.extend([weakref.ref(worker), *(weakref.ref(job) for job in worker.jobs)])

    for _ in range(3):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(SOON)
    freed(task, *refs)
    task.close()
    assert task.closing(SOON)


def test_a_task_that_is_dropped_ends_its_threads_at_once(fake: FakeTransport) -> None:
    task = Task()
    name = task._name
    worker = task.submit("x", nodes=NODES)
    assert worker.wait(SOON)
    ref = weakref.ref(task)
    del worker, task
    wait_until(lambda: ref() is None, what="the task is freed")
    wait_until(lambda: not [one for one in threading.enumerate() if one.name.startswith(name + "/")])


def test_labelled_local_commands_are_freed() -> None:
    task = task_self()
    refs = []
    for command in ("printf %200000d 1", "exit 3", "sleep 60", "cat"):
        worker = task.submit(command, key="k", stdin=b"x" if command == "cat" else False, timeout=0.3, stop_grace=0)
        assert worker.wait(SOON)
        refs += [weakref.ref(worker), *(weakref.ref(job) for job in worker.jobs)]
        del worker
    freed(task, *refs)


@pytest.mark.parametrize("keep", [60, 0])
def test_workers_on_real_nodes_are_freed(sshd: Sshd, keep: float) -> None:
    task = task_of(sshd)
    task.set_info("stop_grace", 0)
    refs = []
    for command in ("head -c 300000 /dev/zero", "exit 3", "exec sleep 60", "cat", "kill -9 $$"):
        worker = task.submit(
            command, nodes=sshd.nodes(3), stdin=b"x" if command == "cat" else False, timeout=0.5, keep=keep
        )
        assert worker.wait(SOON)
        refs += [weakref.ref(worker), *(weakref.ref(job) for job in worker.jobs)]
        del worker
    worker = task.submit("true", nodes=sshd.nodes(2), port=1, connect_timeout=2)
    assert worker.wait(SOON)
    assert worker.unreached == worker.nodes
    refs += [weakref.ref(worker), *(weakref.ref(job) for job in worker.jobs)]
    del worker
    freed(task, *refs)
