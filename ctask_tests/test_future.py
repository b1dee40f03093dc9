# SPDX-License-Identifier: Apache-2.0
"""Futures: the standard library's, resolved whether anybody pumps or not; and ctask's own waits, which pump."""

from __future__ import annotations

import concurrent.futures
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

import ctask
from ctask import (
    Aborted,
    CommandTimeout,
    ConnectionLost,
    Future,
    NodeError,
    NodeResult,
    Outcome,
    Task,
    Worker,
    WrongThread,
    task_self,
)
from ctask.testing import FakeTransport, Step, close_everything
from ctask_tests.fake_nodes import HANGS, Recorder, act, nodes, says
from ctask_tests.fix_leaks import wait_until
from ctask_tests.fix_sshd import Sshd

SCRIPTS = {
    "bad": says(b"out\n", 7),
    "hang": HANGS,
    "late": says(b"late\n", after=0.2),
    "lost": [Step("running"), Step("out", b"half"), Step("lost", error=ConnectionLost("reset"))],
}


@pytest.fixture
def task() -> Task:
    return task_self()


@pytest.fixture
def fake() -> Iterator[FakeTransport]:
    with FakeTransport(nodes(**SCRIPTS)) as fake:
        yield fake
        close_everything()


def in_a_thread(call: Callable[[], Any]) -> Any:
    """Call it in another thread, and return what it returned."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result(20)


# -- what it resolves to ---------------------------------------------------------------------------------------------


def test_any_exit_status_is_a_result(task: Task, fake: FakeTransport) -> None:
    worker = task.submit("x", nodes="n1,bad")
    result = worker.futures["bad"].result()
    assert isinstance(result, NodeResult)
    assert (result.rc, result.stdout, result.ran, result.ok) == (7, "out\n", True, False)  # type: ignore[comparison-overlap]
    assert worker.futures["bad"].exception() is None
    assert worker.futures["n1"].result().ok
    assert worker.futures["n1"].node == "n1"


def test_what_could_not_run_to_its_end_raises(task: Task, fake: FakeTransport) -> None:
    worker = task.submit("x", nodes="lost,hang", timeout=0.1, stop_grace=0)
    with pytest.raises(ConnectionLost) as caught:
        worker.futures["lost"].result()
    error = caught.value
    assert (error.node, error.phase) == ("lost", "running")
    assert error.result is not None
    assert (error.result.outcome, error.result.output, error.result.rc) == (Outcome.LOST, "half", 255)  # type: ignore[comparison-overlap]
    assert [attempt.error for attempt in error.attempts] == [error]
    late = worker.futures["hang"].exception()
    assert isinstance(late, CommandTimeout)
    assert not isinstance(late, TimeoutError)  # that one is the waiter's own time


@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_waiters_own_time_is_a_timeout_error(task: Task, fake: FakeTransport, elsewhere: bool) -> None:
    future = task.submit("x", nodes="hang").futures["hang"]

    def wait() -> None:
        for call in (future.result, future.exception):
            began = time.monotonic()
            with pytest.raises(TimeoutError) as caught:
                call(timeout=0.1)
            assert not isinstance(caught.value, NodeError)
            assert 0.1 <= time.monotonic() - began < 1.1

    in_a_thread(wait) if elsewhere else wait()
    with pytest.raises(TimeoutError):
        future.result(0)
    assert not future.done()  # it goes on
    assert future.running()


def test_a_result_is_whole_when_it_is_there(task: Task, sshd: Sshd) -> None:
    worker = task.submit("head -c 3000000 /dev/zero", nodes=sshd.nodes(4), **sshd.options())
    for future in concurrent.futures.as_completed(worker, 20):
        assert len(future.result().stdout) == 3_000_000


def test_waiting_in_the_owner_runs_its_handlers(task: Task, fake: FakeTransport) -> None:
    story = Recorder()
    first = task.submit("x", nodes="n1", handler=story)
    second = task.submit("x", nodes="late")
    assert second.futures["late"].result().ok
    assert first.done()
    assert story.names() == ["start", "pickup", "read", "hup", "done", "close"]
    assert story.threads == {threading.current_thread()}


# -- the standard library's waits ------------------------------------------------------------------------------------


def test_std_waits_need_nobody_who_pumps(task: Task, fake: FakeTransport) -> None:
    story = Recorder()
    worker = task.submit("x", nodes="n[1-3],late,lost", handler=story)
    done, left = concurrent.futures.wait(worker.futures.values(), timeout=20)
    assert (len(done), left) == (5, set())
    assert story.events == []  # nobody pumped
    assert {future.node for future in concurrent.futures.as_completed(worker, 20) if isinstance(future, Future)} == {
        *worker.futures
    }
    task.join()
    assert story.names().count("done") == 5


def test_std_waits_while_the_owner_pumps(task: Task, fake: FakeTransport) -> None:
    story = Recorder()
    worker = task.shell("x", nodes="n[1-3],late", handler=story)
    found: list[Any] = []

    def watch() -> None:
        found.extend(future.result().node for future in concurrent.futures.as_completed(worker, 20))
        found.append(len(concurrent.futures.wait(worker, 20).done))

    thread = threading.Thread(target=watch)
    thread.start()
    task.resume()
    thread.join()
    assert found[3:] == ["late", 4]
    assert sorted(found[:3]) == ["n1", "n2", "n3"]
    assert story.names()[-1] == "close"


def test_std_waits_see_first_completed_exceptions_and_cancellations(task: Task, fake: FakeTransport) -> None:
    worker = task.submit("x", nodes="hang,n1")
    done, left = concurrent.futures.wait(worker, 20, concurrent.futures.FIRST_COMPLETED)
    assert [future.result().node for future in done] == ["n1"]
    assert left == {worker.futures["hang"]}
    assert worker.futures["hang"].cancel()
    assert concurrent.futures.wait(worker, 20).not_done == set()
    with pytest.raises(concurrent.futures.CancelledError):
        worker.futures["hang"].result()
    both = task.submit("x", nodes="hang,lost")
    done, _ = concurrent.futures.wait(both, 20, concurrent.futures.FIRST_EXCEPTION)
    assert done == {both.futures["lost"]}


# -- ctask's own -----------------------------------------------------------------------------------------------------


def test_ctasks_wait_pumps(task: Task, fake: FakeTransport) -> None:
    story = Recorder()
    worker = task.submit("x", nodes="n[1-3],hang", handler=story)
    futures = list(worker)
    assert ctask.wait(futures, return_when=concurrent.futures.FIRST_COMPLETED)[0]
    well = [future for future in futures if future.node != "hang"]
    assert ctask.wait(well) == (set(well), set())
    began = time.monotonic()
    assert ctask.wait(futures, timeout=0.2) == (set(well), {worker.futures["hang"]})
    assert 0.2 <= time.monotonic() - began < 1.2
    assert story.names().count("done") == 3
    assert story.threads == {threading.current_thread()}
    assert ctask.wait(well, timeout=0) == (set(well), set())
    assert ctask.wait([]) == (set(), set())
    other = task.submit("x", nodes="lost,hang")
    assert ctask.wait(other, return_when=concurrent.futures.FIRST_EXCEPTION)[0] == {other.futures["lost"]}


def test_ctasks_as_completed_pumps(task: Task, fake: FakeTransport) -> None:
    story = Recorder()
    worker = task.submit("x", nodes="n[1-3],late", handler=story)
    order = [future.node for future in ctask.as_completed(worker)]
    assert order[-1] == "late"
    assert sorted(order[:3]) == ["n1", "n2", "n3"]
    assert story.threads == {threading.current_thread()}
    assert list(ctask.as_completed([])) == []
    hanging = task.submit("x", nodes="n1,hang")
    found: list[object] = []
    with pytest.raises(TimeoutError, match="1 jobs have not ended"):
        found.extend(future.node for future in ctask.as_completed(hanging, timeout=0.2))


@pytest.mark.parametrize("elsewhere", [False, True])
def test_ctasks_waits_give_each_future_once(task: Task, fake: FakeTransport, elsewhere: bool) -> None:
    worker = task.submit("x", nodes="n[1-50],late")

    def collect() -> list[str]:
        found = [future.node for future in ctask.as_completed([*worker, *worker], 20)]
        assert isinstance(ctask.wait(worker, 20), tuple)
        return found

    found = in_a_thread(collect) if elsewhere else collect()
    assert sorted(found) == sorted(worker.futures)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_program_that_waits_again_and_again_leaves_nothing_in_its_futures(
    task: Task, fake: FakeTransport, elsewhere: bool
) -> None:
    (future,) = task.submit("x", nodes="hang")

    def poll() -> None:
        for _ in range(20):
            assert ctask.wait([future], 0.001) == (set(), {future})
            with pytest.raises(TimeoutError):
                next(ctask.as_completed([future], 0.001))

    in_a_thread(poll) if elsewhere else poll()
    assert future.told == []
    assert future._done_callbacks == []  # type: ignore[attr-defined]


def test_futures_of_several_tasks_are_waited_for_together(task: Task, fake: FakeTransport) -> None:
    other = Task()
    futures = [*task.submit("x", nodes="n[1-3]"), *other.submit("x", nodes="late,n9")]
    assert {future.node for future in ctask.as_completed(futures, 10)} == {"n1", "n2", "n3", "n9", "late"}
    assert ctask.wait(futures, 10) == (set(futures), set())


# -- cancel and callbacks --------------------------------------------------------------------------------------------


def test_cancel_ends_what_waits_and_what_runs(task: Task) -> None:
    task.set_info("fanout", 1)
    with FakeTransport(nodes(HANGS)) as fake:
        worker = task.submit("x", nodes="n[1-2]")
        running, waiting = worker.futures.values()
        wait_until(running.running)
        assert waiting.cancel()
        with pytest.raises(Aborted) as caught:
            waiting.result(10)
        assert caught.value.result is not None
        assert caught.value.result.ran is False
        assert len(fake.sessions) == 1
        assert running.cancel()
        with pytest.raises(Aborted):
            running.result(10)
        assert running.cancelled()
        assert waiting.cancelled()
        assert running.done()
        assert not running.cancel()
        assert running.exception().result.ran is True  # type: ignore[union-attr]
    task.set_info("fanout", 64)
    assert worker.failures() == {
        ("running", "Aborted", "cancelled"): ctask.NodeSet("n1"),
        ("queued", "Aborted", "cancelled"): ctask.NodeSet("n2"),
    }


@pytest.mark.parametrize("name", ["done", "running", "cancelled", "exception", "result", "add_done_callback", "cancel"])
def test_ctrl_c_leaves_no_lock_of_a_future_taken(task: Task, name: str) -> None:
    def interrupt(frame: FrameType, event: str, _: object) -> Any:
        if event == "return" and frame.f_code.co_name == "__enter__":
            raise KeyboardInterrupt
        return interrupt

    with FakeTransport(nodes(**SCRIPTS)):
        future = task.submit("x", nodes="late").futures["late"]
        ask = getattr(future, name)
        before = sys.gettrace()
        sys.settrace(interrupt)
        try:
            ask(print) if name == "add_done_callback" else ask()
        except (KeyboardInterrupt, Aborted):
            pass
        finally:
            sys.settrace(before)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            try:
                pool.submit(future.done).result(5)
            except TimeoutError:
                future._condition.release()  # else the pool is waited for, for ever
                raise
        task.join()


def test_done_callbacks_run_in_the_dispatcher_and_may_not_wait(task: Task, fake: FakeTransport) -> None:
    said: list[Any] = []
    worker = task.submit("x", nodes="hang,n2")
    other = worker.futures["hang"]

    def callback(future: concurrent.futures.Future[NodeResult]) -> None:
        assert isinstance(future, Future)
        said.append(threading.current_thread().name)
        said.append(future.result().node)  # of a future that is done
        waits: tuple[Callable[[], Any], ...] = (
            other.result,
            other.exception,
            worker.wait,
            task.join,
            task.resume,
            lambda: task.run("x", nodes="n3"),
            lambda: next(iter(task.submit("x", nodes="hang").results())),
            lambda: ctask.wait([other]),
            lambda: next(ctask.as_completed([other])),
        )
        for wait in waits:
            with pytest.raises(WrongThread):
                wait()
        said.append("all refused")

    worker.futures["n2"].add_done_callback(callback)
    wait_until(lambda: len(said) == 3)
    assert said == [f"{task._name}/dispatcher", "n2", "all refused"]
    assert task.submit("x", nodes="n1").result("n1").ok  # the dispatcher is well


def test_a_callback_that_raises_hurts_nobody(
    task: Task, fake: FakeTransport, caplog: pytest.LogCaptureFixture
) -> None:
    worker = task.shell("x", nodes="n[1-3]")
    for future in worker:
        future.add_done_callback(lambda future: 1 // 0)
    task.resume()
    assert len(worker.ok) == 3
    assert caplog.text.count("exception calling callback") == 3
    caplog.clear()


def test_a_callback_may_submit_and_cancel(task: Task, fake: FakeTransport) -> None:
    made: list[Worker] = []
    worker = task.submit("x", nodes="hang,late")

    def callback(future: concurrent.futures.Future[NodeResult]) -> None:
        made.append(task.submit("x", nodes="n1"))
        worker.futures["hang"].cancel()

    worker.futures["late"].add_done_callback(callback)
    assert worker.wait(10)
    assert worker.futures["hang"].cancelled()
    assert made[0].result("n1").ok


def test_waiting_inside_a_handler_waits_without_other_handlers(task: Task, fake: FakeTransport) -> None:
    depth = 0
    seen: list[str] = []

    def done(worker: Worker, node: str, result: NodeResult) -> None:
        nonlocal depth
        depth += 1
        assert depth == 1  # never nested
        other = task.submit("x", nodes="n9,late")
        assert other.futures["n9"].result(10).ok
        assert {future.node for future in ctask.as_completed(other, 10)} == {"n9", "late"}
        assert other.wait(10)
        assert [result.node for result in other.results()] == ["n9", "late"]
        with pytest.raises(TimeoutError):
            task.submit("x", nodes="hang").futures["hang"].result(0.05)
        seen.append(node)
        depth -= 1
        if len(seen) == 2:
            task.abort()

    task.run("x", nodes="n[1-2]", on_done=done)
    assert seen == ["n1", "n2"]


# -- many ------------------------------------------------------------------------------------------------------------


def test_10_000_jobs_proceed_while_the_owner_does_something_else(task: Task) -> None:
    with FakeTransport(nodes(says(b"same\n"))) as fake:
        began = time.monotonic()
        worker = task.submit("x", nodes="n[1-10000]")
        assert time.monotonic() - began < 5  # it does not wait for the nodes
        deadline = time.monotonic() + 25
        progress = set()
        while not worker.done() and time.monotonic() < deadline:
            # Something else, which is no call of ctask that pumps.
            sum(range(100_000))
            progress.add(len(fake.sessions))
        assert len(worker.ok) == len(fake.sessions) == 10_000
        assert len(progress) > 3  # it went on all the time
        assert [(str(out), len(at)) for out, at in worker.iter_buffers()] == [("same", 10_000)]
        assert all(future.done() for future in worker)


def test_a_future_that_is_queued_is_not_running(task: Task) -> None:
    task.set_info("fanout", 1)
    with FakeTransport(nodes(HANGS)) as fake:
        worker = task.submit("x", nodes="n[1-2]")
        first, second = worker
        wait_until(first.running)
        assert not second.running()
        assert repr(second) == "<Future n2 queued>"
        assert repr(first) == "<Future n1 running>"
        act(fake, fake.sessions[0], Step("exit"), Step("end"))
        wait_until(second.running)
        task.abort()
        assert worker.wait(5)
    task.set_info("fanout", 64)


def test_ctasks_wait_answers_and_refuses_as_the_standards_does(task: Task, fake: FakeTransport) -> None:
    worker = task.submit("x", nodes="quick")
    found = ctask.wait(worker)
    assert (found.done, found.not_done) == (set(worker), set())
    with pytest.raises(ValueError, match="FIRST_COMPLETED, FIRST_EXCEPTION, ALL_COMPLETED"):
        ctask.wait(worker, return_when="SOME")
