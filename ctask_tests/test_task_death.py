# SPDX-License-Identifier: Apache-2.0
"""A task whose dispatcher dies by an error: whoever waits is told, loudly and at once, and nothing hangs (row H14)."""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import ctask
from ctask import LocalResource, NodeError, Outcome, Task, TaskError, TaskFailed, Worker, task_self
from ctask.testing import FakeTransport
from ctask_tests.child import Child
from ctask_tests.fake_nodes import HANGS, Recorder, nodes, says
from ctask_tests.fix_leaks import wait_until
from ctask_tests.fix_sshd import Sshd
from ctask_tests.real_nodes import task_of

#: What nobody may wait longer for than a moment.
SOON = 2.0


def raises(error: BaseException) -> None:
    raise error


def kill(task: Task, error: BaseException | None = None) -> BaseException:
    """Have the task's dispatcher carry out something that raises."""
    error = error or SystemExit("injected")
    task._engine.dispatcher.post(None, raises, error)
    return error


@pytest.fixture
def fake() -> Iterator[FakeTransport]:
    with FakeTransport(nodes(HANGS, quick=says(b"fine\n"))) as fake:
        yield fake


@pytest.fixture
def task(fake: FakeTransport) -> Task:
    task = task_self()
    task.set_info("fanout", 3)
    return task


@pytest.fixture
def worker(task: Task, fake: FakeTransport) -> Worker:
    """Three commands that run and two that wait for a slot; the task's dispatcher is about to die."""
    worker = task.submit("x", nodes="n[1-5]")
    wait_until(lambda: sum(session.sent for session in fake.sessions) == 3, what="three commands run")
    timer = threading.Timer(0.05, kill, (task,))
    timer.start()
    return worker


def failed(call: Callable[[], object]) -> None:
    """Hold a call to raising that the task has failed, at once, with the cause."""
    began = time.monotonic()
    with pytest.raises(TaskError) as raised:
        call()
    assert time.monotonic() - began < SOON
    assert isinstance(raised.value.__cause__, SystemExit)


def returns(call: Callable[[], Any]) -> Any:
    """Hold a call to returning at once."""
    began = time.monotonic()
    told = call()
    assert time.monotonic() - began < SOON
    return told


def check_results(worker: Worker) -> None:
    """Every node has one outcome, which says whether its command may run on."""
    assert worker.done()
    results = {result.node: result for result in worker.results()}
    assert sorted(results) == [f"n{n}" for n in range(1, 6)]
    for node, result in results.items():
        sent = node in ("n1", "n2", "n3")
        assert result.outcome is (Outcome.LOST if sent else Outcome.UNREACHED)
        assert result.ran is (None if sent else False)
        assert isinstance(result.error, TaskFailed)
        assert isinstance(result.error, NodeError)
        assert isinstance(result.error.__cause__, SystemExit)
        assert worker.futures[result.node].exception() is result.error
    assert sum(len(found) for found in worker.failures().values()) == 5
    assert sum(len(group.nodes) for group in worker.groups()) == 5
    assert worker.exit_code() == 3


@pytest.mark.parametrize("wait", ["wait", "results", "ctask.wait", "as_completed", "exception", "standard wait"])
def test_h14_the_owner_is_given_every_outcome(worker: Worker, wait: str) -> None:
    futures = list(worker.futures.values())
    calls: dict[str, Callable[[], object]] = {
        "wait": worker.wait,
        "results": lambda: list(worker.results()),
        "ctask.wait": lambda: ctask.wait(futures),
        "as_completed": lambda: list(ctask.as_completed(futures)),
        "exception": lambda: [future.exception() for future in futures],
        "standard wait": lambda: concurrent.futures.wait(futures),
    }
    returns(calls[wait])
    check_results(worker)


@pytest.mark.parametrize("wait", ["result", "resume", "run", "join", "check"])
def test_h14_the_owner_is_told_by_an_error(task: Task, worker: Worker, wait: str) -> None:
    calls: dict[str, Callable[[], object]] = {
        "result": worker.futures["n1"].result,
        "resume": task.resume,
        "run": lambda: task.run("y", nodes="n9"),
        "join": task.join,
    }
    if wait == "check":
        with pytest.raises(ctask.JobsFailed):
            returns(worker.check)
    else:
        failed(calls[wait])
    wait_until(worker.done)
    check_results(worker)


def test_h14_every_other_thread_is_told(task: Task, worker: Worker) -> None:
    futures = list(worker.futures.values())
    with ThreadPoolExecutor(7) as threads:
        calls: dict[str, Callable[[], Any]] = {
            "result": futures[0].result,
            "queued": futures[4].result,
            "wait": worker.wait,
            "results": lambda: len(list(worker.results())),
            "ctask": lambda: ctask.wait(futures),
            "standard": lambda: concurrent.futures.wait(futures),
            "join": task.join,
        }
        told = {name: threads.submit(call) for name, call in calls.items()}
        assert not concurrent.futures.wait(told.values(), 10).not_done
    for name in ("result", "queued", "join"):
        assert isinstance(told[name].exception(), TaskError), name
    assert told["wait"].result() is True
    assert told["results"].result() == 5
    for name in ("ctask", "standard"):
        assert told[name].result()[0] == set(futures)
    check_results(worker)


def test_h14_a_handler_that_waits_is_told_and_is_the_last(task: Task, fake: FakeTransport) -> None:
    heard = Recorder()
    task.set_info("fanout", 10)
    other = task.submit("x", nodes="n[1-2]")
    seen: list[BaseException | None] = []

    def wait_in(worker: Worker, node: str, result: object) -> None:
        kill(task)
        seen.append(other.futures["n1"].exception())

    worker = task.shell("y", nodes="n3,quick", handler=heard, on_done=wait_in)
    failed(task.resume)
    assert [type(error) for error in seen] == [TaskFailed]
    assert heard.names("n3") == ["pickup"]
    assert "close" not in heard.names()
    assert worker.result("quick").stdout == b"fine\n"
    assert worker.closed
    assert other.closed


def test_h14_later_calls_are_refused_and_the_thread_has_a_fresh_task(task: Task, worker: Worker) -> None:
    worker.wait()
    wait_until(lambda: task.failed)
    failed(lambda: task.submit("x", nodes="n1"))
    failed(lambda: task.shell("x", nodes="n1"))
    failed(lambda: task.run("x", nodes="n1"))
    failed(task.resume)
    failed(task.join)
    task.abort()  # harmless
    worker.abort()
    assert not worker.futures["n1"].cancel()
    fresh = task_self()
    assert fresh is not task
    assert fresh is task_self()
    again = fresh.run("x", nodes="quick")
    assert again.result("quick").stdout == b"fine\n"
    assert worker.futures["n1"].exception() is not None


def test_h14_a_submission_that_meets_the_death_has_its_outcomes(task: Task, fake: FakeTransport) -> None:
    """Posted before, while and after the dispatcher dies: each job is ended once, or the call raises."""
    workers: list[Worker] = []
    for number in range(60):
        if number == 30:
            kill(task)
        try:
            workers.append(task.submit("x", nodes="n[1-4]"))
        except TaskError:
            break
    assert len(workers) >= 30
    for worker in workers:
        assert returns(worker.wait)
        assert [result.outcome for result in worker.results()]
        assert len(list(worker.results())) == 4
        assert all(isinstance(future.exception(), TaskFailed) for future in worker.futures.values())


def test_h14_a_thread_of_its_own_ends_and_join_says_why(fake: FakeTransport) -> None:
    task = Task()
    worker = task.shell("x", nodes="n[1-3]")
    task.resume()
    wait_until(lambda: sum(session.sent for session in fake.sessions) == 3)
    task.shell("y", nodes="n4")
    task.resume()
    kill(task)
    failed(task.join)
    assert all(isinstance(future.exception(), TaskFailed) for future in worker.futures.values())
    task.thread.join(SOON)
    assert not task.thread.is_alive()
    failed(task.resume)


def test_h14_a_done_callback_that_wants_out_is_such_an_error(task: Task, fake: FakeTransport) -> None:
    worker = task.submit("x", nodes="n[1-2],quick")
    worker.futures["quick"].add_done_callback(lambda future: raises(SystemExit("of a callback")))
    assert returns(worker.wait)
    assert len(list(worker.results())) == 3
    assert worker.result("quick").stdout == b"fine\n"
    failed(lambda: task.submit("x", nodes="n1"))


def test_h14_done_callbacks_that_want_out_while_it_dies_do_not_stop_the_others(
    task: Task, worker: Worker
) -> None:
    for future in worker.futures.values():
        future.add_done_callback(lambda future: raises(SystemExit("again")))
    assert returns(worker.wait)
    check_results(worker)


def test_h14_memory_that_runs_out_in_a_post_ends_its_subject_only(
    task: Task, fake: FakeTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = task.submit("x", nodes="n[1-3]")
    victim = worker.jobs[1]
    wait_until(lambda: sum(session.sent for session in fake.sessions) == 3)
    task._engine.dispatcher.post(victim, raises, MemoryError("injected"))
    error = worker.futures["n2"].exception()
    assert isinstance(error, LocalResource)
    assert isinstance(error.__cause__, MemoryError)
    assert not worker.futures["n1"].done()
    assert task.submit("x", nodes="quick").result("quick").ok
    worker.abort()
    assert worker.wait()


def test_h14_an_end_that_raises_on_its_way_is_told_all_the_same(
    task: Task, fake: FakeTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = task.submit("x", nodes="n[1-3]")
    wait_until(lambda: sum(session.sent for session in fake.sessions) == 3)
    with monkeypatch.context() as patch:
        patch.setattr(worker.jobs[1], "_release", lambda *_: raises(MemoryError("injected")))
        worker.abort()
        assert returns(worker.wait)
    told = {result.node: type(result.error).__name__ for result in worker.results()}
    assert told == {"n1": "Aborted", "n2": "LocalResource", "n3": "Aborted"}
    assert isinstance(worker.futures["n2"].exception(), LocalResource)


def test_h14_a_submission_that_raises_in_the_dispatcher_ends_its_jobs(
    task: Task, fake: FakeTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    def submitted(*_: object) -> None:
        raise MemoryError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(task._engine.plan, "submitted", submitted)
        worker = task.submit("x", nodes="n[1-3]")
        assert returns(worker.wait)
    assert all(isinstance(future.exception(), LocalResource) for future in worker.futures.values())
    assert task.run("x", nodes="quick").result("quick").ok


def test_h14_real_sessions_are_ended_and_other_tasks_unharmed(sshd: Sshd) -> None:
    before = sshd.processes().keys()
    task = task_of(sshd)
    other = Task()
    for name, value in sshd.options().items():
        other.set_info(name, value)
    address = sshd.address(1)
    beside = other.submit("read line; echo $line", nodes=address, stdin=True)
    worker = task.submit("echo begun; exec sleep 60", nodes=[address, sshd.address(2)])
    wait_until(lambda: all(result and b"begun" in result.output() for result in (job.capture for job in worker.jobs)))
    kill(task)
    assert returns(worker.wait)
    assert all(isinstance(future.exception(), TaskFailed) for future in worker.futures.values())
    beside.write("still here\n")
    assert beside.result(address).stdout == b"still here\n"
    wait_until(lambda: sshd.processes().keys() <= before, what="what ran on the nodes was ended")


PROGRAM = r"""
for name, value in GIVEN["options"].items():
    task.set_info(name, value)
worker = task.submit("sleep 60", nodes=GIVEN["nodes"])
wait_until(lambda: all(job.phase == "running" for job in worker.jobs))
def die():
    raise SystemExit("injected")
task._engine.dispatcher.post(None, die)
worker.wait()
say("woken", len(list(worker.results())))
fresh = task_self()
say("fresh", fresh.run("echo ok", nodes=GIVEN["nodes"][0], **GIVEN["options"]).result(GIVEN["nodes"][0]).output)
"""


def test_h14_the_exit_is_not_held(sshd: Sshd) -> None:
    before = sshd.processes().keys()
    with Child(PROGRAM, options=dict(sshd.options()), nodes=sshd.nodes(3)) as child:
        assert child.expect("woken") == "3"
        assert child.expect("fresh") == "ok"
        began = time.monotonic()
        assert child.end() == 0
        assert time.monotonic() - began < 3.0
        assert "injected" in child.errors()  # told once, with its traceback
        assert child.errors().count("Traceback") == 1
    wait_until(lambda: sshd.processes().keys() <= before, timeout=10, what="what ran on the nodes was ended")
