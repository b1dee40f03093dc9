# SPDX-License-Identifier: Apache-2.0
"""Handlers that raise, abort, submit, wait and block; and many threads with a task each (rows H01, H03 to H05, H08)."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ctask import (
    Aborted,
    AlreadyRunningError,
    EventHandler,
    HandlerError,
    NodeResult,
    NodeSet,
    OptionError,
    Outcome,
    Task,
    TaskTimeout,
    Worker,
    task_self,
)
from ctask.testing import FakeTransport, Step, close_everything
from ctask_tests.fake_nodes import HANGS, Recorder, nodes, says
from ctask_tests.fix_leaks import wait_until
from ctask_tests.fix_sshd import Sshd

EVENTS = ["start", "pickup", "read", "hup", "done", "close"]


@pytest.fixture
def task() -> Task:
    return task_self()


@pytest.fixture
def fake() -> Iterator[FakeTransport]:
    with FakeTransport(nodes(says(b"one\ntwo\n"), hang=HANGS, late=says(b"late\n", after=0.2))) as fake:
        yield fake
        close_everything()


# -- H01: handlers that raise ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", EVENTS)
def test_h01_a_handler_that_raises_does_not_end_the_run(
    task: Task, fake: FakeTransport, caplog: pytest.LogCaptureFixture, event: str
) -> None:
    calls = 0

    def slip(*_: object) -> None:
        nonlocal calls
        calls += 1
        raise ZeroDivisionError(f"slip {calls}")

    story = Recorder()
    worker = task.shell("x", nodes="n[1-3]", handler=story)
    worker.on(event, slip)
    with pytest.raises(HandlerError) as caught:
        task.resume()
    times = story.names().count(event)
    assert calls == times == {"start": 1, "close": 1, "read": 6}.get(event, 3)
    assert [str(error) for error in caught.value.exceptions] == [f"slip {n + 1}" for n in range(times)]
    assert len(worker.ok) == 3
    assert story.names()[-1] == "close"
    assert story.names().count("done") == 3
    # Once with its traceback, then in one line each.
    assert caplog.text.count("Traceback (most recent call last)") == 1
    assert len(caplog.records) == times
    caplog.clear()
    task.run("x", nodes="n1")  # the next run has nothing of it
    assert task.node_buffer("n1") == "one\ntwo"


def test_h01_on_real_nodes(task: Task, sshd: Sshd, caplog: pytest.LogCaptureFixture) -> None:
    def slip(worker: Worker, node: str, sname: str, msg: bytes) -> None:
        raise ValueError(node)

    story = Recorder()
    with pytest.raises(HandlerError) as caught:
        task.run("echo hi", nodes=sshd.nodes(4), handler=story, on_read=slip, **sshd.options())
    assert sorted(str(error) for error in caught.value.exceptions) == sshd.nodes(4)
    assert story.names().count("done") == 4
    assert task.max_retcode() == 0
    caplog.clear()


def test_h01_join_raises_as_run_does_and_a_deadline_comes_first(
    task: Task, fake: FakeTransport, caplog: pytest.LogCaptureFixture
) -> None:
    task.submit("x", nodes="n1", on_done=lambda *_: 1 // 0)
    with pytest.raises(HandlerError):
        task.join()
    with pytest.raises(TaskTimeout) as caught:
        task.run("x", nodes="n1,hang", deadline=0.1, on_hup=lambda *_: 1 // 0)
    assert isinstance(caught.value.__cause__, HandlerError)
    caplog.clear()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_a_handler_that_wants_out_aborts_the_run(
    task: Task, fake: FakeTransport, kind: type[BaseException]
) -> None:
    def leave(worker: Worker, node: str, sname: str, msg: bytes) -> None:
        raise kind

    story = Recorder()
    worker = task.shell("x", nodes="hang,n1", on_read=leave)
    worker.on("done", story.ev_done).on("close", story.ev_close)
    began = time.monotonic()
    with pytest.raises(kind):
        task.resume()
    assert time.monotonic() - began < 2
    assert isinstance(worker.futures["hang"].exception(0), Aborted)
    assert story.names()[-1] == "close"
    assert story.names("n1") == story.names("hang") == ["done"]
    assert worker.node_buffer("n1") == "one\ntwo"
    task.run("x", nodes="n2")
    assert task.node_retcode("n2") == 0


# -- H03: abort, everywhere ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", EVENTS)
def test_h03_abort_in_each_callback(task: Task, fake: FakeTransport, event: str) -> None:
    story = Recorder()
    worker = task.shell("x", nodes="hang,n[1-2]", handler=story)

    def stop(*_: object) -> None:
        task.abort()
        task.abort()

    worker.on(event, stop)
    if event == "close":  # which a command that hangs does not come to
        wanted: Callable[[], None] = lambda: worker.abort("hang")  # noqa: E731
        worker.on("start", lambda worker: wanted())
    began = time.monotonic()
    task.resume()
    assert time.monotonic() - began < 2.5
    assert worker.done()
    assert story.names().count("close") == 1
    assert story.names()[-1] == "close"
    assert story.names().count("done") == 3
    assert isinstance(worker.futures["hang"].exception(0), Aborted)
    assert worker.pending == NodeSet()
    assert all(result.outcome in (Outcome.EXITED, Outcome.ABORTED) for result in worker.results())
    story.events.clear()
    task.run("x", nodes="n1", handler=story)  # the task can be used again
    assert story.names() == ["start", "pickup", "read", "read", "hup", "done", "close"]


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("what", ["task", "worker", "future"])
def test_h03_lines_after_an_abort_are_kept_but_not_delivered(task: Task, what: str, ended: bool) -> None:
    heard: list[bytes] = []
    story = Recorder()

    def stop(worker: Worker, node: str, sname: str, msg: bytes) -> None:
        heard.append(msg)
        if ended:
            wait_until(worker.done)
        if what == "task":
            task.abort()
            return  # from here on at once
        worker.abort(node) if what == "worker" else worker.futures[node].cancel()
        task.submit("x", nodes="n2").wait(5)  # until the dispatcher has heard of it

    steps = [Step("out", b"1\n2\n3\n"), Step("exit") if ended else Step("end", after=600)]
    with FakeTransport(nodes(n1=[Step("running"), *steps])):
        worker = task.shell("x", nodes="n1", on_read=stop)
        worker.on("done", story.ev_done).on("close", story.ev_close)
        task.resume()
        assert worker.node_buffer("n1") == "1\n2\n3"
        if what == "future" and ended:
            assert heard == [b"1", b"2", b"3"]  # there was nothing left to cancel
        else:
            assert heard == [b"1"]
        assert story.names() == ["done", "close"]
        assert worker.futures["n1"].cancelled() is not ended
        heard.clear()
        task.run("x", nodes="n2", on_read=lambda worker, node, sname, msg: heard.append(msg))
        assert heard == [b"ok"]


def test_h03_abort_before_the_run(task: Task, fake: FakeTransport) -> None:
    story = Recorder()
    worker = task.shell("x", nodes="n1,hang", handler=story)
    task.abort()
    task.abort()
    task.resume()
    assert [type(future.exception()) for future in worker] == [Aborted, Aborted]
    assert story.names()[-1] == "close"
    assert story.names().count("done") == 2
    assert worker.not_run | worker.failed == worker.nodes
    task.abort()  # with nothing to abort
    task.run("x", nodes="n1")
    assert task.node_retcode("n1") == 0


def test_h03_abort_after_the_end_changes_nothing(task: Task, fake: FakeTransport) -> None:
    story = Recorder()
    worker = task.run("x", nodes="n[1-2]", handler=story)
    assert worker is not None
    before = list(story.events)
    task.abort()
    worker.abort()
    task.join()
    assert story.events == before
    assert worker.ok == NodeSet("n[1-2]")


def test_h03_abort_from_another_thread(task: Task, sshd: Sshd) -> None:
    story = Recorder()
    worker = task.shell("echo up; cat", nodes=sshd.nodes(3), handler=story, **sshd.options())
    lines = threading.Semaphore(0)
    worker.on("read", lambda *_: lines.release())
    aborted = 0.0

    def abort() -> None:
        nonlocal aborted
        for _ in range(3):
            lines.acquire()
        aborted = time.monotonic()
        task.abort()

    thread = threading.Thread(target=abort)
    thread.start()
    task.resume()
    assert time.monotonic() - aborted < 3  # promised: 2 s
    thread.join()
    assert [type(future.exception()) for future in worker] == [Aborted] * 3
    assert story.names().count("hup") == 0
    assert story.names().count("close") == 1
    assert {result.ran for result in worker.results()} == {True}
    assert [result.stdout for result in worker.results()] == ["up\n"] * 3
    task.run("echo again", nodes=sshd.nodes(3), **sshd.options())
    assert [(str(out), len(at)) for out, at in task.iter_buffers()] == [("again", 3)]


# -- H04: more work from inside and outside --------------------------------------------------------------------------


def test_h04_work_from_a_handler_is_a_part_of_the_run(task: Task, fake: FakeTransport) -> None:
    story, generations = Recorder(), ["n1", "n2", "n3"]

    def again(worker: Worker, node: str, result: Any) -> None:
        if node != generations[-1]:
            following = generations[generations.index(node) + 1]
            verb = task.submit if following == "n2" else task.shell
            verb("x", nodes=following, handler=story, on_done=again)

    task.run("x", nodes="n1", handler=story, on_done=again)
    assert [node for name, node, _ in story.events if name == "done"] == generations
    assert story.names().count("close") == 3
    assert [worker.nodes for worker in task.workers] == [NodeSet(node) for node in generations]
    assert [str(at) for _, at in task.iter_buffers()] == ["n[1-3]"]


def test_h04_work_from_another_thread_joins_the_run(task: Task, fake: FakeTransport) -> None:
    story = Recorder()
    made: list[Worker] = []
    began = threading.Event()

    def submit() -> None:
        began.wait(10)
        made.append(task.submit("x", nodes="late", handler=story))

    thread = threading.Thread(target=submit)
    thread.start()

    def hold(*_: object) -> None:
        began.set()
        thread.join()

    task.run("x", nodes="n1", on_hup=hold)
    assert made[0].done()
    assert made[0] in task.workers
    assert story.threads == {threading.current_thread()}
    assert story.names()[-1] == "close"


def test_h04_many_threads_submit_to_one_task(task: Task, fake: FakeTransport) -> None:
    story = Recorder()
    made: list[list[Worker]] = [[] for _ in range(6)]
    failed: list[BaseException] = []

    def submit(number: int) -> None:
        try:
            for _ in range(150):
                made[number].append(task.submit("x", nodes="n1", handler=story))
        except BaseException as error:
            failed.append(error)
            raise

    threads = [threading.Thread(target=submit, args=(number,)) for number in range(6)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            task.resume()
            task.join()
        task.join()
    finally:
        sys.setswitchinterval(interval)
        for thread in threads:
            thread.join()
    assert failed == []
    workers = [worker for some in made for worker in some]
    assert len(workers) == 900
    assert all(worker.closed for worker in workers)
    assert len({worker.number for worker in workers}) == 900
    assert story.names().count("close") == 900
    assert story.names().count("read") == 1800


def test_h04_run_inside_a_handler_is_refused_and_the_run_goes_on(task: Task, sshd: Sshd) -> None:
    refused: list[BaseException] = []

    def nested(worker: Worker, node: str, rc: int) -> None:
        with pytest.raises(AlreadyRunningError, match=r"Use task\.shell\(\) or task\.submit\(\) here") as caught:
            task.run("true", nodes=node, **sshd.options())
        refused.append(caught.value)

    worker = task.run("exit 4", nodes=sshd.nodes(2), on_hup=nested, **sshd.options())
    assert worker is not None
    assert len(refused) == 2
    assert task.max_retcode() == 4
    assert task.workers == [worker]


# -- H05: a handler that blocks --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_h05_a_handler_that_blocks_delays_nobody_else(task: Task, sshd: Sshd) -> None:
    options = sshd.options()
    own, story = Task(), Recorder()
    slow, quick = sshd.address(1), sshd.address(2)
    ended: dict[str, float] = {}

    def block(worker: Worker, node: str, sname: str, msg: bytes) -> None:
        if node == slow and not ended:
            other = own.run("echo other", nodes=sshd.address(3), handler=story, **options)
            assert other is not None
            for future in other:
                future.add_done_callback(lambda _: ended.setdefault("another task", time.monotonic()))
            time.sleep(3)

    began = time.monotonic()
    worker = task.shell("echo go; cat", nodes=f"{slow},{quick}", timeout=1, on_read=block, **options)
    for node, future in worker.futures.items():
        future.add_done_callback(lambda _, node=node: ended.setdefault(node, time.monotonic()))  # type: ignore[misc]
    task.resume()
    assert time.monotonic() - began >= 3
    # Another task's work, and this task's own timeouts, came while the handler slept.
    assert ended["another task"] - began < 2.5
    assert 1 <= ended[slow] - began < 2.8
    assert 1 <= ended[quick] - began < 2.8
    assert worker.timedout == worker.nodes
    assert own.join(10)
    assert story.given("read") == [("stdout", "other")]


# -- H08: many threads, each with its own task -----------------------------------------------------------------------


def test_h08_a_hundred_threads_have_a_task_each(fake: FakeTransport) -> None:
    with FakeTransport(lambda node, command: says(node.encode() + b" " + command.line)):
        barrier = threading.Barrier(100)
        found: dict[int, list[Any]] = {}

        def program(number: int) -> None:
            mine = found[number] = []
            barrier.wait(20)
            task = task_self()
            story = Recorder()
            for turn in range(3):
                task.run(f"run{turn} of {number}", nodes=f"t{number}n[1-2]", handler=story)
                mine.append(sorted(str(out) for out, _ in task.iter_buffers()))
            mine += [task, story.threads == {threading.current_thread()}, story.names().count("close")]

        threads = [threading.Thread(target=program, args=(number,)) for number in range(100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert len({id(mine[3]) for mine in found.values()}) == 100
    for number, mine in found.items():
        expected = [[f"t{number}n{n} run{turn} of {number}" for n in (1, 2)] for turn in range(3)]
        assert mine[:3] == expected
        assert mine[4:] == [True, 3]
    tasks = [mine[3] for mine in found.values()]
    wait_until(lambda: not any(task._engine.dispatcher.alive() for task in tasks))  # they end with their threads


def test_h08_threads_with_real_nodes_share_them(sshd: Sshd) -> None:
    found: dict[int, str] = {}

    def program(number: int) -> None:
        task = task_self()
        task.run(f"echo {number}", nodes=sshd.nodes(2), **sshd.options())
        found[number] = " ".join(f"{nodes}:{out}" for out, nodes in task.iter_buffers())

    threads = [threading.Thread(target=program, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == {number: f"127.0.1.[1-2]:{number}" for number in range(8)}


def test_a_coroutine_function_is_no_handler(task: Task) -> None:
    async def read(worker: Worker, node: str, sname: str, msg: bytes) -> None: ...

    class Handler(EventHandler):
        async def ev_done(self, worker: Worker, node: str, result: NodeResult) -> None:  # type: ignore[override]
            ...

    for options in ({"on_read": read}, {"handler": Handler()}):
        with pytest.raises(OptionError, match="coroutine function, which nobody would await"):
            task.submit("x", nodes="n1", **options)
