# SPDX-License-Identifier: Apache-2.0
"""How long tasks and workers live: threads that end, objects that are dropped, cycles (rows H07 and H13)."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from ctask import NodeResult, Outcome, Task, Worker, task_self
from ctask.task import all_tasks
from ctask.testing import FakeTransport, Step
from ctask_tests.fake_nodes import HANGS, Recorder, act, nodes, says
from ctask_tests.fix_leaks import wait_until


@pytest.fixture
def fake() -> Iterator[FakeTransport]:
    with FakeTransport(nodes(HANGS, quick=says(b"fine\n"))) as fake:
        yield fake


def threads_of(task_name: str) -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(task_name)]


def forget(fake: FakeTransport) -> None:
    """Let go of its sessions, and of what they would do in ten minutes."""
    fake.sessions.clear()
    fake.ends.clear()
    fake._due.clear()


# -- H07: the owner's thread ends -------------------------------------------------------------------------------------


def test_h07_a_thread_that_ends_takes_its_task_along(fake: FakeTransport) -> None:
    kept: list[Any] = []

    def work() -> None:
        task = task_self()
        kept.append(weakref.ref(task))
        kept.append(task._name)
        kept.append(task.submit("x", nodes="n[1-3]", handler=Recorder()))
        wait_until(lambda: len(fake.sessions) == 3)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    ref, name, worker = kept
    assert worker.wait(2)
    assert {result.outcome for result in worker.results()} == {Outcome.ABORTED}
    wait_until(lambda: not threads_of(name), what="the task's threads have ended")
    with pytest.raises(Exception, match="closed"):
        worker.task.submit("x", nodes="n1")
    forget(fake)
    del worker
    kept.clear()
    gc.collect()
    assert ref() is None
    assert name not in [task._name for task in all_tasks()]


def test_h07_a_new_thread_never_inherits_a_task(fake: FakeTransport) -> None:
    """Also where the system gives it the identifier of one that has ended."""
    seen: dict[int, list[str]] = {}

    def work() -> None:
        task = task_self()
        seen.setdefault(threading.get_ident(), []).append(task._name)
        task.submit("x", nodes="n1")  # still runs when the thread ends
        assert task.submit("x", nodes="quick").result("quick").ok

    for _ in range(20):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(10)
        assert not thread.is_alive()
    names = [name for found in seen.values() for name in found]
    assert len(names) == len(set(names)) == 20
    assert len(seen) < 20, "no identifier came again: nothing was tested"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_h07_a_thread_that_dies_in_its_run_leaves_nothing_running(fake: FakeTransport) -> None:
    kept: list[Worker] = []

    def out(worker: Worker, node: str, result: NodeResult) -> None:
        raise SystemExit

    def work() -> None:
        kept.append(task_self().shell("x", nodes="n1,quick", on_done=out))
        task_self().resume()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()
    assert {result.node: result.outcome for result in kept[0].results()} == {
        "n1": Outcome.ABORTED,
        "quick": Outcome.EXITED,
    }


# -- H13: what is dropped is freed ------------------------------------------------------------------------------------


def test_h13_a_dropped_task_is_freed_and_its_threads_end(fake: FakeTransport) -> None:
    task = Task()
    name = task._name
    worker = task.shell("x", nodes="quick")
    task.resume()
    assert task.join(5)
    assert worker.result("quick").ok
    ref = weakref.ref(task)
    forget(fake)
    del task, worker
    gc.collect()
    assert ref() is None
    wait_until(lambda: not threads_of(name), what="the task's threads have ended")


def test_h13_a_task_that_was_never_used_is_freed() -> None:
    refs = [weakref.ref(Task()) for _ in range(10)]
    gc.collect()
    assert [ref() for ref in refs] == [None] * 10
    wait_until(lambda: not threads_of("ctask-"), what="the tasks' threads have ended")


def test_h13_a_dropped_task_runs_its_jobs_to_their_end(fake: FakeTransport) -> None:
    done: list[str] = []
    task = Task()
    name = task._name
    task.submit("x", nodes="n1", on_done=lambda worker, node, result: done.append(node))
    wait_until(lambda: len(fake.sessions) == 1 and fake.sessions[0].sent)
    ref = weakref.ref(task)
    del task
    gc.collect()
    assert ref() is not None
    act(fake, fake.sessions[0], *says(b"late\n"))
    act(fake, fake.sessions[0], Step("end"))
    wait_until(lambda: done == ["n1"])
    forget(fake)

    def gone() -> bool:
        gc.collect()
        return ref() is None and not threads_of(name)

    wait_until(gone, what="the task is freed")


def test_h13_dropped_workers_run_on_and_are_freed(fake: FakeTransport) -> None:
    task = task_self()
    heard = Recorder()
    ref = weakref.ref(task.submit("x", nodes="n[1-3]", handler=heard))
    wait_until(lambda: sum(session.sent for session in fake.sessions) == 3)
    gc.collect()
    assert ref() is not None
    task.abort()
    assert task.join(5)
    assert heard.names().count("done") == 3
    assert heard.names()[-1] == "close"
    heard.events.clear()
    forget(fake)
    task.submit("x", nodes="quick").wait()  # the run that has ended is forgotten with the next one
    gc.collect()
    assert ref() is None


def test_h13_cycles_through_handlers_are_freed_by_one_collection(fake: FakeTransport) -> None:
    class Knot:
        """Holds all that holds it."""

        def __init__(self, task: Task) -> None:
            self.task = task
            self.worker = task.submit("x", nodes="n1,quick", on_done=self.done)
            self.futures = list(self.worker)

        def done(self, worker: Worker, node: str, result: NodeResult) -> None:
            self.last = result

    task = Task()
    knots = [Knot(task) for _ in range(5)]
    refs = [weakref.ref(knot) for knot in knots] + [weakref.ref(knot.worker) for knot in knots] + [weakref.ref(task)]
    task.abort()
    assert task.join(5)
    for knot in knots:
        assert knot.worker.done()
    closed = [knot.worker for knot in knots]
    wait_until(lambda: all(worker.closed for worker in closed))
    forget(fake)
    name = task._name
    closed.clear()
    del task, knots, knot
    wait_until(lambda: gc.collect() >= 0 and not threads_of(name), what="the task's threads have ended")
    assert [ref() for ref in refs] == [None] * len(refs)


def test_h13_a_collection_during_a_run_ends_nothing(fake: FakeTransport) -> None:
    """Collections come at any time, in any thread: also in the dispatcher's, and while it posts."""
    task = task_self()
    thresholds = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        for _ in range(3):
            del_me = Task()
            del_me.submit("x", nodes="quick")
            del del_me
            worker = task.run("x", nodes="quick")
            assert worker.result("quick").stdout == b"fine\n"
    finally:
        gc.set_threshold(*thresholds)
    del worker
    # What a dropped task has begun goes on: it is freed when that has ended.
    wait_until(lambda: len(fake.sessions) == 6 and all(session.over for session in fake.sessions))
    forget(fake)

    def left() -> list[str]:
        gc.collect()
        return [name for name in threads_of("ctask-") if "dispatcher" in name]

    wait_until(lambda: len(left()) == 1, what="the dropped tasks' threads have ended")
