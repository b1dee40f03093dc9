# SPDX-License-Identifier: Apache-2.0
"""What comes after the end: submissions that race it, posts and work that nobody carries out, threads that die.

Each is carried out or told; nothing that waits for it waits for ever.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ctask import (
    Aborted,
    ClusterExecutor,
    CommandTimeout,
    HandlerError,
    Outcome,
    Task,
    TaskError,
    TaskFailed,
    TaskTimeout,
    Worker,
    task_self,
)
from ctask.dispatcher import Dispatcher, Post
from ctask.testing import FakeTransport
from ctask_tests.child import Child
from ctask_tests.fake_nodes import HANGS, nodes, says
from ctask_tests.fix_leaks import wait_until

#: Seconds in which all that does not hang is over, also on a busy machine.
SOON = 10.0


@pytest.fixture(autouse=True)
def fake() -> Iterator[FakeTransport]:
    with FakeTransport(nodes(HANGS, quick=says(b"fine\n"))) as fake:
        yield fake


def every(worker: Worker) -> list[Any]:
    """Every result of a worker, waited for by another thread than the task's: futures and all."""
    found = []
    for future in worker:
        error = future.exception(SOON)
        found.append(error if error is not None else future.result(0))
    assert worker.wait(SOON)
    assert len(list(worker.results())) == len(worker)
    return found


# -- posts -----------------------------------------------------------------------------------------------------


@pytest.mark.load
@pytest.mark.parametrize("error", [None, SystemExit(1)], ids=["stopped", "died"])
def test_each_post_is_carried_out_or_returned_however_it_races_the_end(
    error: BaseException | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL + 1)
    for _ in range(30):
        carried: list[int] = []
        returned: list[Any] = []
        at_once = threading.Lock()

        def back(post: Post, returned: list[Any] = returned, at_once: threading.Lock = at_once) -> None:
            assert at_once.acquire(blocking=False), "one is returned at a time"
            if post[2]:
                returned.append(post[2][0])
            at_once.release()

        dispatcher = Dispatcher("ctask-test/race", lambda now: None, lambda: None, returned=back)
        dispatcher.start()
        start = threading.Barrier(4)

        def post(
            first: int,
            dispatcher: Dispatcher = dispatcher,
            start: threading.Barrier = start,
            carried: list[int] = carried,
        ) -> None:
            start.wait(SOON)
            for n in range(first, first + 200):
                dispatcher.post(None, carried.append, n)

        threads = [threading.Thread(target=post, args=(first * 200,)) for first in range(3)]
        for thread in threads:
            thread.start()
        start.wait(SOON)
        if error is None:
            dispatcher.stop()
        else:
            dispatcher.post(None, raises, error)
        for thread in threads:
            thread.join(SOON)
        assert dispatcher.join(SOON)
        assert sorted(carried + [n for n in returned if not isinstance(n, BaseException)]) == list(range(600))


def raises(error: BaseException) -> None:
    raise error


def test_what_a_returned_post_raises_keeps_no_other_from_coming_back(caplog: pytest.LogCaptureFixture) -> None:
    back: list[Any] = []

    def returned(post: Post) -> None:
        back.append(post[2][0])
        raise ValueError("of who is given it back")

    dispatcher = Dispatcher("ctask-test/back", lambda now: None, lambda: None, returned=returned)
    dispatcher.start()
    dispatcher.stop()
    assert dispatcher.join(SOON)
    for n in range(3):
        dispatcher.post(None, print, n)
    assert back == [0, 1, 2]
    assert "of who is given it back" in caplog.text


# -- submissions -----------------------------------------------------------------------------------------------


def submit_until_refused(task: Task, workers: list[Worker], start: threading.Barrier, how: str) -> None:
    start.wait(SOON)
    for number in itertools.count():
        if number >= 100:
            time.sleep(0.005)  # enough are on their way
        try:
            if how == "submit" or (how == "mixed" and number % 2):
                workers.append(task.submit("x", nodes="quick,n1"))
            else:
                workers.append(task.shell("x", nodes="quick,n1"))
                task.resume()
        except TaskError:
            return


@pytest.mark.parametrize("how", ["submit", "shell", "mixed"])
@pytest.mark.parametrize("end", ["close", "death"])
def test_submissions_that_race_the_end_are_all_told(
    fake: FakeTransport, how: str, end: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL + 1)
    for number in range(6):
        task = Task()
        workers: list[list[Worker]] = [[], [], []]
        start = threading.Barrier(4)
        threads = [
            threading.Thread(target=submit_until_refused, args=(task, mine, start, how), daemon=True)
            for mine in workers
        ]
        for thread in threads:
            thread.start()
        start.wait(SOON)
        time.sleep(0.004 * number)
        if end == "close":
            task.close(within=0.2)
        else:
            task._engine.dispatcher.post(None, raises, SystemExit("injected"))
        for thread in threads:
            thread.join(SOON)
            assert not thread.is_alive()
        for worker in [worker for mine in workers for worker in mine]:
            assert len(every(worker)) == 2
        task.close()
        assert task.closing(SOON)
        fake.sessions.clear()
        fake._due.clear()


def test_what_is_submitted_to_a_task_that_closes_is_not_run(fake: FakeTransport) -> None:
    task = task_self()
    running = task.submit("x", nodes="n1")
    wait_until(lambda: fake.sessions and fake.sessions[0].sent)
    task._engine.close()  # its job still runs
    late = task.submit("y", nodes="quick,n2")
    assert late.wait(SOON)
    assert {result.outcome for result in late.results()} == {Outcome.UNREACHED}
    assert all(result.ran is False and "closed" in result.why for result in late.results())
    assert len(fake.sessions) == 1
    running.abort()
    assert running.wait(SOON)
    assert task._engine.closing(SOON)


@pytest.mark.parametrize("end", ["close", "death"])
@pytest.mark.parametrize("ask", ["nothing", "abort", "cancel", "withdraw", "write"])
def test_what_is_only_scheduled_when_its_task_ends_has_its_outcome(end: str, ask: str) -> None:
    """Also what is asked of a job after its task has ended comes back, and ends it."""
    task = Task()
    worker = task.shell("x", nodes="n[1-3]", stdin=True)
    calls: dict[str, Callable[[], object]] = {
        "nothing": lambda: None,
        "abort": worker.abort,
        "cancel": lambda: [future.cancel() for future in worker],
        "withdraw": worker.withdraw,
        "write": lambda: worker.write(b"x"),
    }
    if end == "close":
        task.close()
        assert task.closing(SOON)
    else:
        task._engine.dispatcher.post(None, raises, SystemExit("injected"))
        wait_until(lambda: task.failed)
    calls[ask]()
    assert all(isinstance(error, Exception) for error in every(worker))


def test_handlers_hear_the_rest_of_a_task_that_is_closed_while_something_is_submitted() -> None:
    """A late submission does not take the events of the others away."""
    task = task_self()
    heard: list[str] = []
    worker = task.submit("x", nodes="quick", on_done=lambda worker, node, result: heard.append(node))
    wait_until(worker.done)
    task._engine.close()
    assert task._engine.closing(SOON)
    late = task.submit("x", nodes="n1", on_done=lambda worker, node, result: heard.append(node))
    assert late.wait(SOON)
    assert heard == ["quick", "n1"]


def test_work_after_the_end_is_told_and_not_under_a_lock(caplog: pytest.LogCaptureFixture) -> None:
    task = task_self()
    engine = task._engine
    engine.close()
    assert engine.closing(SOON)
    free: list[bool] = []

    class Look(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            free.append(engine._pool._changed.acquire(timeout=1))
            if free[-1]:
                engine._pool._changed.release()

    log, look = logging.getLogger("ctask.engine"), Look()
    log.addHandler(look)
    try:
        with caplog.at_level(logging.DEBUG, "ctask.engine"):
            engine.run.work(print, "x")
    finally:
        log.removeHandler(look)
    assert "not begun: <built-in function print>" in caplog.text
    assert free == [True]


# -- a thread of its own ---------------------------------------------------------------------------------------


def slip(worker: Worker, node: str, result: object) -> None:
    raise ValueError(f"a slip on {node}")


def test_join_raises_what_handlers_of_a_run_raised_once(caplog: pytest.LogCaptureFixture) -> None:
    task = Task()
    task.run("x", nodes="quick", on_done=slip)
    task.run("x", nodes="quick", on_done=slip)
    with pytest.raises(HandlerError) as raised:
        task.join(SOON)
    assert [str(error) for error in raised.value.exceptions] == ["a slip on quick"] * 2
    assert task.join(SOON), "told once"
    task.run("x", nodes="quick")
    assert task.join(SOON)
    task.close()


def test_join_raises_what_handlers_raised_outside_of_a_run(caplog: pytest.LogCaptureFixture) -> None:
    task = Task()
    task.submit("x", nodes="quick", on_done=slip)
    with pytest.raises(HandlerError, match="handlers raised"):
        task.join(SOON)
    task.submit("x", nodes="quick", on_done=slip).wait()
    task.run("x", nodes="quick")  # a run does not forget what was before it
    with pytest.raises(HandlerError, match="handlers raised"):
        task.join(SOON)
    task.close()


def test_join_of_a_thread_of_its_own_waits_for_its_handlers() -> None:
    task = Task()
    heard: list[str] = []
    gate = threading.Event()

    def slow(worker: Worker, node: str, result: object) -> None:
        gate.wait(SOON)
        heard.append(node)

    task.submit("x", nodes="quick", on_done=slow)
    assert not task.join(0.1)
    gate.set()
    assert task.join(SOON)
    assert heard == ["quick"]
    task.close()


def test_join_raises_that_a_run_s_deadline_passed_and_handlers_raised_as_well(
    caplog: pytest.LogCaptureFixture,
) -> None:
    task = Task()
    worker = task.run("x", nodes="quick,n1", deadline=0.3, on_done=slip)
    task.run("y", nodes="n2", deadline=0.1)
    with pytest.raises(TaskTimeout) as raised:
        task.join(SOON)
    assert isinstance(raised.value.__cause__, HandlerError)
    assert "1 more" in "".join(raised.value.__notes__)
    assert isinstance(worker.futures["n1"].exception(0), CommandTimeout)
    assert task.join(SOON)
    assert "deadline" in caplog.text
    task.close()


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()], ids=["exit", "interrupt"])
@pytest.mark.parametrize("where", ["run", "submit"])
def test_a_handler_that_wants_out_ends_its_task_loudly(
    error: BaseException, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    task = Task()
    beside = task.submit("y", nodes="n[1-2]")
    start = task.run if where == "run" else task.submit
    worker = start("x", nodes="quick,n3", on_done=lambda worker, node, result: raises(error))
    task.run("z", nodes="n4")
    with pytest.raises(TaskError) as raised:
        task.join(SOON)
    assert raised.value.__cause__ is error
    for one in (beside, worker):
        assert len(every(one)) == len(one)
    task.thread.join(SOON)
    assert not task.thread.is_alive()
    assert "ends by an error" in caplog.text
    for call in (task.resume, task.join, lambda: task.run("x", nodes="quick"), lambda: task.submit("x", nodes="n1")):
        with pytest.raises(TaskError):
            call()


def test_what_was_asked_of_a_thread_that_ends_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Runs that wait for their turn when a handler wants out, or the task is closed, never begin and are told."""
    for end in ("exit", "close"):
        task = Task()
        gate = threading.Event()

        def out(worker: Worker, node: str, result: object, gate: threading.Event = gate, end: str = end) -> None:
            gate.wait(SOON)
            if end == "exit":
                sys.exit(1)

        first = task.run("x", nodes="quick", on_done=out)
        assert first is not None
        wait_until(first.done)
        later = [task.run("y", nodes="n1") for _ in range(3)]
        if end == "close":
            task.close()
        gate.set()
        for worker in later:
            assert isinstance(every(worker)[0], (TaskFailed, Aborted))
        task.close()
        assert task.closing(SOON)


def test_runs_that_race_the_end_of_their_thread_are_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL + 1)
    for _ in range(4):
        task = Task()
        workers: list[Worker] = []
        start = threading.Barrier(2)
        thread = threading.Thread(target=submit_until_refused, args=(task, workers, start, "shell"), daemon=True)
        thread.start()
        start.wait(SOON)
        with contextlib.suppress(TaskError):
            task.submit("x", nodes="quick", on_done=lambda *_: sys.exit(1))
        thread.join(SOON)
        assert not thread.is_alive(), "it was refused in the end"
        for worker in workers:
            assert len(every(worker)) == 2
        task.close()
        assert task.closing(SOON)


def test_errors_that_wait_for_a_join_hold_no_worker(fake: FakeTransport, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL + 1)  # pytest keeps records, and what their frames hold
    task = Task()
    own = task._own
    assert own is not None
    ref = weakref.ref(task.run("x", nodes="quick", on_done=slip))
    task.run("x", nodes="quick")
    wait_until(lambda: not own._unfinished)
    fake.sessions.clear()
    wait_until(lambda: gc.collect() >= 0 and ref() is None, what="nothing holds the worker")
    with pytest.raises(HandlerError) as raised:
        task.join(SOON)
    assert "in slip" in "".join(raised.value.exceptions[0].__notes__), "where it was raised is told all the same"
    task.close()


def test_an_executor_is_shut_down_whatever_its_handlers_raised(caplog: pytest.LogCaptureFixture) -> None:
    with ClusterExecutor() as executor:
        assert executor.submit("x", node="quick", on_done=slip).result(SOON).ok
        task = executor._task
    assert task._closed
    assert not task.thread.is_alive()
    assert "a slip on quick" in caplog.text


# -- the interpreter's end -------------------------------------------------------------------------------------

PROGRAM = """
from ctask.testing import FakeTransport, Step
fake = FakeTransport(lambda node, command: [Step("running"), Step("exit")])
fake.__enter__()
def say(*words):  # in one piece, from several threads
    os.write(1, " ".join(map(str, words)).encode() + bytes([10]))
def submit():
    own = Task() if GIVEN["own"] else task_self()
    say("begun")
    while True:
        try:
            worker = own.run("x", nodes="n[1-3]") if GIVEN["own"] else own.submit("x", nodes="n[1-3]")
        except TaskError:
            break
        for future in worker:
            future.exception()
    say("refused")
threads = [threading.Thread(target=submit, daemon=True) for _ in range(3)]
for thread in threads:
    thread.start()
time.sleep(0.2)
import atexit
def wait():
    for thread in threads:
        thread.join(5)
    say("alive", sum(thread.is_alive() for thread in threads))
atexit.register(wait)  # after ctask has closed everything
"""


@pytest.mark.load
@pytest.mark.parametrize("own", [False, True], ids=["task_self", "own thread"])
def test_submissions_that_race_the_interpreter_s_end_are_told(own: bool) -> None:
    with Child(PROGRAM, own=own) as child:
        lines = [child.line() for _ in range(7)]
        assert sorted(lines) == ["alive 0"] + ["begun"] * 3 + ["refused"] * 3, child.errors()
        assert child.end() == 0
        assert child.errors() == ""
