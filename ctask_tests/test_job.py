# SPDX-License-Identifier: Apache-2.0
"""A job's life over the fake transport: whatever comes, in whatever order, one outcome and events in their order."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctask import (
    Aborted,
    CommandTimeout,
    ConnectionLost,
    EventHandler,
    ExecRefused,
    LocalResource,
    NodeResult,
    Outcome,
    SessionTimeout,
    Task,
    Worker,
    task_self,
)
from ctask.options import Command
from ctask.states import ENDS, NEXT, PHASES, IllegalTransition, Timeline
from ctask.testing import FakeTransport, Step

RUNS = Step("running")
EXITS = Step("exit")


class History(EventHandler):
    """Records every event with what it came with."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []

    def ev_start(self, worker: Worker) -> None:
        self.events.append(("start", None))

    def ev_pickup(self, worker: Worker, node: str) -> None:
        self.events.append(("pickup", node))

    def ev_read(self, worker: Worker, node: str, sname: str, msg: bytes) -> None:
        self.events.append(("read", node))

    def ev_hup(self, worker: Worker, node: str, rc: int) -> None:
        self.events.append(("hup", node))

    def ev_done(self, worker: Worker, node: str, result: NodeResult) -> None:
        self.events.append(("done", node))

    def ev_close(self, worker: Worker, timedout: bool) -> None:
        self.events.append(("close", timedout))


def check_history(history: History, worker: Worker) -> None:
    """Check R1, R5 and R6 of a worker that has ended."""
    names = [name for name, _ in history.events]
    assert names[0] == "start" or "start" not in names
    assert names[-1] == "close"
    assert names.count("close") == 1
    for node, future in worker.futures.items():
        own = [name for name, what in history.events if what == node and name != "close"]
        result = future.exception().result if future.exception() else future.result()  # type: ignore[union-attr]
        assert own.count("done") == 1
        assert own[-1] == "done"
        assert own.count("pickup") <= 1
        assert own.index("pickup") == 0 if "pickup" in own else own == ["done"]
        ends_by_itself = result.outcome not in (Outcome.TIMEOUT, Outcome.ABORTED)
        assert own.count("hup") == ends_by_itself
        if "hup" in own:
            assert own.index("hup") == len(own) - 2


@pytest.fixture
def task() -> Task:
    return task_self()


steps = st.lists(
    st.one_of(
        st.just(RUNS),
        st.binary(min_size=1, max_size=12).map(lambda b: Step("out", b)),
        st.binary(min_size=1, max_size=12).map(lambda b: Step("err", b)),
        st.integers(0, 255).map(lambda n: Step("exit", status=n)),
        st.just(Step("signal", b"TERM")),
        st.just(Step("lost", error=ConnectionLost())),
        st.just(Step("lost", error=ExecRefused("exec refused"))),
        st.just(Step("end")),
        st.sampled_from(("abort", "cancel", "stop", "deadline")).map(lambda what: Step("call", what.encode())),
    ),
    max_size=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps, st.sampled_from(("gone", "unknown", "alive")), st.booleans())
def test_whatever_comes_there_is_one_outcome_and_events_are_in_order(
    task: Task, script: list[Step], state: str, listens: bool
) -> None:
    made: list[Worker] = []
    ready = threading.Event()

    def act(what: bytes) -> None:
        assert ready.wait(10)
        worker = made[0]
        if what == b"abort":
            task.abort()
        elif what == b"cancel":
            worker.futures["n1"].cancel()
        elif what == b"stop":
            worker.abort("n1")
        else:
            job = worker.jobs[0]
            job.run.post(job, job.too_long)

    def play(node: str, command: Command) -> Iterable[Step]:
        for step in script:
            yield Step("call", call=lambda step=step: act(step.text)) if step.do == "call" else step  # type: ignore[misc]

    with FakeTransport(play, end_state=state):
        history = History() if listens else None
        worker = task.submit("x", nodes="n1", handler=history, timeout=60, stop_grace=0)
        made.append(worker)
        ready.set()
        task.join()
        future = worker.futures["n1"]
        assert future.done()
        error = future.exception()
        result = error.result if error is not None else future.result()  # type: ignore[attr-defined]
        assert result.node == "n1"
        assert result.outcome in ENDS[result.phase]
        assert abs(sum(result.timings.values()) - result.timings.total) < 1e-9
        sent = b"".join(step.text for step in script if step.do == "out")
        assert sent.startswith(result.stdout)
        if not any(step.do in ("call", "lost", "end", "exit", "signal") for step in script):
            assert result.stdout == sent
            assert result.outcome is Outcome.LOST, "the session ended without a status"
        if history is not None:
            check_history(history, worker)
        assert not task._engine.run.live
        assert task._engine.plan.slots == 0


def outcome_of(task: Task, script: list[Step], **options: Any) -> NodeResult:
    with FakeTransport(lambda node, command: script, end_state=options.pop("end_state", "gone")):
        worker = task.submit("x", nodes="n1", **options)
        return next(worker.results())


def test_an_exit_status_overtakes_output_and_nothing_is_lost(task: Task) -> None:
    result = outcome_of(task, [RUNS, Step("exit", status=7), Step("out", b"late"), Step("end")])
    assert (result.outcome, result.rc, result.stdout, result.lingering) == (Outcome.EXITED, 7, b"late", False)


def test_f05_who_holds_the_output_open_does_not_hold_the_job(task: Task) -> None:
    result = outcome_of(task, [RUNS, EXITS, Step("out", b"x"), Step("end", after=60)], drain_timeout=0.1)
    assert (result.outcome, result.rc, result.lingering) == (Outcome.EXITED, 0, True)


def test_the_quiet_end_counts_from_the_last_byte(task: Task) -> None:
    script = [RUNS, EXITS, *[Step("out", b"x", after=0.05)] * 6, Step("end", after=60)]
    result = outcome_of(task, script, drain_timeout=0.2)
    assert result.stdout == b"x" * 6


def test_f02_a_signal_is_not_a_status(task: Task) -> None:
    result = outcome_of(task, [RUNS, Step("signal", b"KILL")])
    assert (result.outcome, result.rc, result.signal, result.ran) == (Outcome.SIGNALED, 137, "KILL", True)
    odd = outcome_of(task, [RUNS, Step("signal", b"FOO@x")])
    assert (odd.rc, odd.signal) == (128, "FOO@x")


def test_e13_a_session_that_ends_without_a_status_is_lost(task: Task) -> None:
    result = outcome_of(task, [RUNS, Step("out", b"part"), Step("end")])
    assert (result.outcome, result.ran, result.stdout) == (Outcome.LOST, None, b"part")
    assert isinstance(result.error, ConnectionLost)


def test_a_loss_after_the_status_is_ignored(task: Task) -> None:
    result = outcome_of(task, [RUNS, Step("exit", status=3), Step("lost", error=ConnectionLost())])
    assert (result.outcome, result.rc, result.error) == (Outcome.EXITED, 3, None)


@pytest.mark.parametrize("state", ["gone", "unknown"])
def test_f06_a_timeout_keeps_what_came_and_says_what_became_of_it(task: Task, state: str) -> None:
    script = [RUNS, Step("out", b"begun\n"), Step("end", after=60)]
    result = outcome_of(task, script, timeout=0.1, end_state=state)
    assert (result.outcome, result.rc, result.remote_state) == (Outcome.TIMEOUT, None, state)
    assert isinstance(result.error, CommandTimeout)
    assert result.error.phase == "running"
    assert result.error.result is result
    assert result.stdout == b"begun\n"
    assert result.ran is True


def test_a_timeout_does_not_begin_before_the_command(task: Task) -> None:
    with FakeTransport(lambda node, command: [RUNS, EXITS], delay=0.4):
        result = next(task.submit("x", nodes="n1", timeout=0.2).results())
    assert result.outcome is Outcome.EXITED


def test_exec_without_an_answer_is_lost_at_the_connect_timeout(task: Task) -> None:
    result = outcome_of(task, [Step("end", after=60)], connect_timeout=0.1)
    assert (result.outcome, result.rc, result.ran) == (Outcome.LOST, 255, None)
    assert isinstance(result.error, SessionTimeout)
    assert result.error.phase == "exec"


def test_a_session_that_was_not_sent_has_not_run(task: Task) -> None:
    with FakeTransport(lambda node, command: [RUNS], delay=60):
        result = next(task.submit("x", nodes="n1", connect_timeout=0.1).results())
    assert (result.outcome, result.rc, result.ran) == (Outcome.UNREACHED, 255, False)


def test_a_dead_kept_connection_is_replaced_once_before_exec(task: Task) -> None:
    """The fake loses the session before the command is sent: the job is tried on a new connection, once."""
    with FakeTransport(lambda node, command: [RUNS, EXITS], delay=0.05) as fake:
        worker = task.submit("x", nodes="n1")
        while not fake.sessions:
            pass
        fake.finish(fake.sessions[0], ConnectionLost())
        with pytest.raises(Exception):  # noqa: B017 (the fake cannot be dialed: what matters is the second try)
            worker.result("n1")
        assert worker.jobs[0]._replaced


def test_a_full_disk_ends_one_job_and_no_other(task: Task, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    task.set_info("output_memory", 1000)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))

    def play(node: str, command: Command) -> Iterable[Step]:
        size = 100_000 if node == "big" else 10
        return [RUNS, Step("out", node.encode() * size), EXITS, Step("end")]

    try:
        with FakeTransport(play):
            worker = task.submit("x", nodes="a,big,c")
            results = {result.node: result for result in worker.results()}
    finally:
        task.set_info("output_memory", 512 << 20)
    assert isinstance(results["big"].error, LocalResource)
    assert results["big"].outcome is Outcome.ABORTED
    assert "output_memory" in results["big"].why
    assert "TMPDIR" in str(results["big"].error)
    assert results["big"].stdout == b"big" * 100_000
    assert results["a"].ok
    assert results["c"].ok


def test_an_error_of_our_own_ends_the_job_and_says_so(task: Task, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    from ctask.buffers import Capture

    def broken(self: Capture, stream: int, chunk: bytes) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(Capture, "append", broken)
    result = outcome_of(task, [RUNS, Step("out", b"x"), EXITS])
    assert result.outcome is Outcome.LOST
    assert "a defect" in result.why


def test_cancel_asks_once_and_an_end_that_came_first_stands(task: Task) -> None:
    with FakeTransport(lambda node, command: [RUNS, Step("end", after=60)]):
        worker = task.submit("x", nodes="n1")
        future = worker.futures["n1"]
        assert future.cancel()
        with pytest.raises(Aborted):
            future.result(10)
        assert future.cancelled()
        assert not future.cancel()
    with FakeTransport(lambda node, command: [RUNS, EXITS]):
        worker = task.submit("x", nodes="n1")
        worker.wait()
        assert not worker.futures["n1"].cancel()
        assert not worker.futures["n1"].cancelled()


def test_the_table_knows_every_phase() -> None:
    assert set(NEXT) == set(ENDS) == set(PHASES)
    assert all(phase in PHASES for phases in NEXT.values() for phase in phases)
    line = Timeline(0.0)
    line.enter("tcp", 1.0)
    with pytest.raises(IllegalTransition, match="tcp -> running"):
        line.enter("running", 2.0)
    line.enter("tcp", 5.0)
    assert line.close(Outcome.UNREACHED, 3.0) == {"queued": 1.0, "tcp": 2.0}
    with pytest.raises(IllegalTransition):
        Timeline(0.0).close(Outcome.EXITED, 1.0)
