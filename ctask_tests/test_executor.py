# SPDX-License-Identifier: Apache-2.0
"""ClusterExecutor: what a program expects of any Executor, with commands on nodes in place of functions."""

from __future__ import annotations

import concurrent.futures
import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from ctask import (
    Aborted,
    ClusterExecutor,
    CommandError,
    ConnectionLost,
    Future,
    NodeResult,
    NodeSet,
    NodeSetError,
    OptionError,
    Task,
    UsageError,
    task_self,
)
from ctask.testing import FakeTransport, Step, close_everything
from ctask_tests.fake_nodes import HANGS, Recorder, act, nodes, says
from ctask_tests.fix_leaks import wait_until
from ctask_tests.fix_sshd import Sshd

SCRIPTS = {
    "bad": says(b"out\n", 7),
    "hang": HANGS,
    "late": says(b"late\n", after=0.1),
    "lost": [Step("running"), Step("lost", error=ConnectionLost("reset"))],
}


@pytest.fixture
def fake() -> Iterator[FakeTransport]:
    with FakeTransport(nodes(**SCRIPTS)) as fake:
        yield fake
        close_everything()


@pytest.fixture(params=["its own task", "the task of this thread", "a task of another thread"])
def executor(request: pytest.FixtureRequest, fake: FakeTransport) -> Iterator[ClusterExecutor]:
    given = {"the task of this thread": task_self, "a task of another thread": Task}.get(request.param)
    with ClusterExecutor(given() if given is not None else None) as executor:
        yield executor


def release(fake: FakeTransport) -> None:
    """Let every command that hangs end by itself."""
    for session in fake.sessions:
        act(fake, session, Step("exit"), Step("end"))


# -- submit ----------------------------------------------------------------------------------------------------------


def test_submit_returns_the_future_of_the_node(executor: ClusterExecutor, fake: FakeTransport) -> None:
    assert isinstance(executor, concurrent.futures.Executor)
    future = executor.submit("uptime", node="n1")
    assert isinstance(future, Future)
    result = future.result(10)
    assert (result.node, result.rc, str(result.stdout)) == ("n1", 0, "ok\n")
    assert executor.submit("x", node="bad").result(10).rc == 7
    assert isinstance(executor.submit(["a", "b c"], node=NodeSet("lost")).exception(10), ConnectionLost)
    assert [session.command.argv for session in fake.sessions][-1] == (b"a", b"b c") or fake.sessions[-1].command.line


def test_options_of_a_call_count(executor: ClusterExecutor, fake: FakeTransport) -> None:
    error = executor.submit("x", node="hang", timeout=0.1, stop_grace=0).exception(10)
    assert "timeout after 0.1 s" in str(error)
    assert executor.submit("x", node="bad", ok_codes={7}).result(10).ok


def test_waits_of_the_standard_take_its_futures(executor: ClusterExecutor, fake: FakeTransport) -> None:
    futures = [executor.submit("x", node=node) for node in ("late", "n1", "n2", "lost")]
    assert set(concurrent.futures.as_completed(futures, 10)) == set(futures)
    done, pending = concurrent.futures.wait(futures, 10, concurrent.futures.ALL_COMPLETED)
    assert (len(done), pending) == (4, set())
    hanging = executor.submit("x", node="hang")
    found = concurrent.futures.wait([hanging, *futures], 10, concurrent.futures.FIRST_COMPLETED)
    assert found.not_done == {hanging}
    assert concurrent.futures.wait([hanging, futures[3]], 10, concurrent.futures.FIRST_EXCEPTION).not_done == {hanging}
    with pytest.raises(TimeoutError):
        next(concurrent.futures.as_completed([hanging], 0.05))
    called = threading.Event()
    hanging.add_done_callback(lambda future: called.set())
    assert hanging.cancel()
    with pytest.raises(Aborted):
        hanging.result(10)
    assert called.wait(10)


@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        (lambda e: e.submit(print, node="n1"), CommandError, "a ThreadPoolExecutor runs it here"),
        (lambda e: e.map(len, "n[1-2]"), CommandError, "is a function"),
        (lambda e: e.submit("echo", "a b", node="n1"), CommandError, r"one list, as in \['echo', 'a b'\]"),
        (lambda e: e.submit("x", node="n[1-3]"), UsageError, r"'n\[1-3\]' is 3; map\(\)"),
        (lambda e: e.submit("x", node=[]), UsageError, "is 0"),
        (lambda e: e.submit("x", node="n1", nodes="n2"), OptionError, r"no nodes=.*map\(command, nodes\)"),
        (lambda e: e.submit("", node="n1"), CommandError, "empty"),
        (lambda e: e.submit("x", node="n1", tiemout=3), OptionError, "tiemout"),
        (lambda e: e.submit("x", node="n[1-"), NodeSetError, "bracket"),
        (lambda e: e.map("x", []), UsageError, "nothing was run"),
        (lambda e: e.map("x", ["n1"], ["n2"]), CommandError, "one command"),
        (lambda e: e.submit("x"), TypeError, "'node'"),
        (lambda e: ClusterExecutor(e._task, user="root"), OptionError, "set_info"),
    ],
)
def test_what_cannot_be_right_is_refused_before_anything_is_sent(
    fake: FakeTransport, call: Any, kind: type[Exception], says: str
) -> None:
    with ClusterExecutor() as executor, pytest.raises(kind, match=says):
        call(executor)
    assert fake.sessions == []


def test_options_of_its_own_task_are_checked(fake: FakeTransport) -> None:
    before = threading.active_count()
    with pytest.raises(OptionError, match="fan_out"):
        ClusterExecutor(fan_out=3)
    wait_until(lambda: threading.active_count() == before)
    with ClusterExecutor(fanout=1, timeout=0.1, stop_grace=0) as executor:
        assert "timeout" in str(executor.submit("x", node="hang").exception(10))


# -- map -------------------------------------------------------------------------------------------------------------


def test_map_gives_one_result_per_node_in_their_order(executor: ClusterExecutor, fake: FakeTransport) -> None:
    results = list(executor.map("x", "n[1-20],bad,late"))
    assert [result.node for result in results] == list(NodeSet("n[1-20],bad,late"))
    assert all(isinstance(result, NodeResult) for result in results)
    names = ["n3", "late", "n1", "n3"]
    assert [result.node for result in executor.map("x", names)] == names  # zip(names, …) is right
    assert [result.node for result in executor.map("x", iter(["n2", "n[4-5]"]), chunksize=2)] == ["n2", "n4", "n5"]
    assert len(fake.sessions) == 22 + 3 + 3


def test_map_starts_at_once_and_raises_in_turn(executor: ClusterExecutor, fake: FakeTransport) -> None:
    results = executor.map("x", ["n1", "lost", "n2"])
    wait_until(lambda: len(fake.sessions) == 3)
    assert next(results).node == "n1"
    with pytest.raises(ConnectionLost):
        next(results)
    with pytest.raises(StopIteration):
        next(results)


def test_maps_timeout_is_of_the_waiting(executor: ClusterExecutor, fake: FakeTransport) -> None:
    results = executor.map("x", ["n1", "hang"], timeout=0.2)
    assert next(results).node == "n1"
    with pytest.raises(TimeoutError):
        next(results)
    assert fake.ends == []  # it runs on
    wait_until(lambda: all(session.sent for session in fake.sessions))
    release(fake)


def test_a_map_that_is_left_withdraws_what_has_not_begun(fake: FakeTransport) -> None:
    with ClusterExecutor(fanout=1) as executor:
        results = executor.map("x", ["a1", "hang", "n2", "n3"])  # they start in the order of their set
        assert next(results).node == "a1"
        wait_until(lambda: sum(session.sent for session in fake.sessions) == 2)
        del results
        (worker,) = executor._workers
        wait_until(lambda: worker.not_run == NodeSet("n[2-3]"))
        assert worker.pending == NodeSet("hang")
        assert fake.ends == []  # what runs goes on
        release(fake)
    assert worker.ok == NodeSet("a1,hang")


# -- shutdown --------------------------------------------------------------------------------------------------------


def test_after_shutdown_nothing_is_taken(executor: ClusterExecutor, fake: FakeTransport) -> None:
    executor.shutdown()
    for call in (lambda: executor.submit("x", node="n1"), lambda: executor.map("x", "n1")):
        with pytest.raises(RuntimeError, match="after shutdown"):
            call()
    executor.shutdown()
    executor.shutdown(wait=False)
    assert fake.sessions == []


def test_leaving_the_block_waits(executor: ClusterExecutor, fake: FakeTransport) -> None:
    with executor:
        futures = [executor.submit("x", node=node) for node in ("n1", "late")]
        mapped = executor.map("x", "late,n2")
    assert all(future.done() for future in futures)
    assert [result.node for result in mapped] == ["late", "n2"]


def test_shutdown_without_waiting_returns_and_frees_its_threads_later(fake: FakeTransport) -> None:
    before = set(threading.enumerate())
    executor = ClusterExecutor()
    future = executor.submit("x", node="hang")
    wait_until(lambda: any(session.sent for session in fake.sessions))
    executor.shutdown(wait=False)
    assert not future.done()
    release(fake)
    assert future.result(10).ok
    wait_until(lambda: set(threading.enumerate()) <= before)


@pytest.mark.parametrize("wait", [True, False])
def test_shutdown_withdraws_what_has_not_begun_and_leaves_what_runs(fake: FakeTransport, wait: bool) -> None:
    executor = ClusterExecutor(fanout=1)
    running = executor.submit("x", node="hang")
    wait_until(lambda: any(session.sent for session in fake.sessions))
    waiting = [executor.submit("x", node=f"n{number}") for number in range(20)]
    mapped = executor.map("x", "m[1-5]")
    ended = threading.Timer(0.1, release, (fake,))
    ended.start()
    executor.shutdown(wait=wait, cancel_futures=True)
    assert running.result(10).ok
    concurrent.futures.wait(waiting, 10)
    assert all(future.cancelled() for future in waiting)
    with pytest.raises(Aborted) as caught:
        next(mapped)
    assert caught.value.result is not None
    assert caught.value.result.ran is False
    assert len(fake.sessions) == 1
    ended.join()
    executor.shutdown()


def test_its_threads_are_gone_after_the_block(fake: FakeTransport) -> None:
    before = set(threading.enumerate())
    with ClusterExecutor() as executor:
        list(executor.map("x", "n[1-50]"))
    wait_until(lambda: set(threading.enumerate()) <= before, timeout=1)


def test_a_given_task_stays(fake: FakeTransport) -> None:
    task = task_self()
    with ClusterExecutor(task) as executor:
        executor.submit("x", node="n1")
    assert task.run("x", nodes="n2").ok == NodeSet("n2")


def test_handlers_have_heard_all_when_the_block_is_left(executor: ClusterExecutor, fake: FakeTransport) -> None:
    story = Recorder()
    with executor:
        executor.submit("x", node="n1", handler=story)
        executor.map("x", "n[2-9]", handler=story)
    if not executor._own and executor._task.thread is not threading.current_thread():
        executor._task.join()  # a given task that is elsewhere hears it in its own time
        wait_until(lambda: story.names().count("close") == 2)
    assert story.names().count("done") == 9
    assert story.names().count("close") == 2
    assert story.threads == {executor._task.thread}


def test_shutdown_in_a_handler_of_its_own_task_waits_for_the_others(fake: FakeTransport) -> None:
    executor = ClusterExecutor()
    seen: list[bool] = []

    def done(*_: object) -> None:
        executor.shutdown()
        seen.append(other.done())

    other = executor.submit("x", node="late")
    executor.submit("x", node="n1", on_done=done)
    wait_until(lambda: seen == [True])
    executor.shutdown()


# -- threads ---------------------------------------------------------------------------------------------------------


def test_threads_submit_while_another_shuts_down(fake: FakeTransport) -> None:
    executor = ClusterExecutor()
    taken: list[Future] = []
    refused = threading.Barrier(5)

    def submit() -> None:
        try:
            while True:
                taken.append(executor.submit("x", node="n1"))
        except RuntimeError:
            refused.wait(10)

    threads = [threading.Thread(target=submit) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(taken) > 20)
    executor.shutdown(cancel_futures=True)
    refused.wait(10)
    for thread in threads:
        thread.join()
    assert all(future.done() for future in taken)
    assert {future.cancelled() or future.result().ok for future in taken} == {True}


def test_what_is_dropped_is_freed(fake: FakeTransport) -> None:
    with ClusterExecutor() as executor:
        for _ in range(5):
            executor.submit("x", node="n1").result(10)
        fake.sessions.clear()
        wait_until(lambda: gc.collect() >= 0 and len(executor._workers) <= 1)  # the task may hold the last one


# -- real nodes ------------------------------------------------------------------------------------------------------


def test_an_executor_on_real_nodes(sshd: Sshd) -> None:
    with ClusterExecutor() as executor:
        nodes = list(sshd.nodes(3))
        results = list(executor.map("echo here; exit 3", nodes, **sshd.options()))
        future = executor.submit(["echo", "a  b"], node=nodes[0], **sshd.options())
    assert [(result.node, result.rc, str(result.stdout)) for result in results] == [(n, 3, "here\n") for n in nodes]
    assert str(future.result().stdout) == "a  b\n"
