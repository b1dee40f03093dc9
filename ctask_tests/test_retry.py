# SPDX-License-Identifier: Apache-2.0
"""Which failures are tried again, how often and when; and a job over its tries, on nodes of the fake transport."""

from __future__ import annotations

import concurrent.futures
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tenacity

from ctask import (
    Aborted,
    AuthRejected,
    BannerError,
    CommandFailed,
    CommandTimeout,
    ConnectionLost,
    ConnectRefused,
    Curable,
    ExecRefused,
    NodeError,
    OptionError,
    Outcome,
    Retry,
    SessionRefused,
    Task,
    UnknownHostKey,
    Worker,
    task_self,
)
from ctask.options import Command
from ctask.retry import BUSY, Tries
from ctask.testing import FakeTransport, Step
from ctask_tests.fake_nodes import HANGS, Recorder, says
from ctask_tests.fix_leaks import wait_until


@pytest.fixture
def task() -> Task:
    return task_self()


def tries(error: NodeError, count: int = 1, *, rc: int | None = None, sent: bool = False, took: float = 1.0) -> Tries:
    return Tries(error, rc, sent, count, 100.0, 100.0 + took)


BUSY_SERVER = BannerError("connection dropped by the server", phase="banner", curable=Curable.BUSY)


# -- what a policy may be ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"attempts": 0}, "1 or more"),
        ({"attempts": True}, "1 or more"),
        ({"attempts": 2.5}, "1 or more"),
        ({"wait": -1}, "seconds, 0 or more"),
        ({"wait": float("nan")}, "seconds, 0 or more"),
        ({"wait": "1"}, "seconds, 0 or more"),
        ({"budget": float("inf")}, "seconds, 0 or more"),
        ({"on": "tcpp"}, "no such phase: 'tcpp'; there are: queued, resolve"),
        ({"on": [ValueError]}, "neither a phase nor a class of NodeError"),
        ({"on": 5}, "phases, classes of NodeError or a function"),
        ({"on": "hostkey"}, "never tried again"),
        ({"on": UnknownHostKey}, "never tried again"),
        ({"on": ("tcp", AuthRejected)}, "never tried again"),
        ({"exit_codes": {75}}, "say idempotent=True"),
        ({"on": "running"}, "say idempotent=True"),
        ({"on": ["banner", ConnectionLost]}, "say idempotent=True"),
        ({"on": CommandTimeout}, "say idempotent=True"),
        ({"exit_codes": {2**32}, "idempotent": True}, "0 to 4294967295"),
        ({"exit_codes": "75", "idempotent": True}, "0 to 4294967295"),
        ({"exit_codes": {-1}, "idempotent": True}, "0 to 4294967295"),
        ({"idempotent": 1}, "True or False"),
    ],
    ids=repr,
)
def test_what_cannot_be_right_is_refused_when_it_is_made(given: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        Retry(**given)


@pytest.mark.parametrize("value", ["yes", 2.5, object, True])
def test_the_option_takes_a_policy_a_number_or_none(task: Task, value: object) -> None:
    with pytest.raises(OptionError, match=r"a ctask\.Retry, a number of tries, or None"):
        task.submit("x", nodes="n1", retry=value)


def test_a_number_is_a_policy_that_names_nothing(task: Task) -> None:
    task.set_info("retry", 4)
    assert task.info("retry") == Retry(4)


# -- what it says -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "asked", "again"),
    [
        (BUSY, tries(BUSY_SERVER), True),
        (BUSY, tries(ConnectRefused()), False),
        (BUSY, tries(SessionRefused(curable=Curable.BUSY), sent=True), False),
        (Retry(), tries(ConnectRefused()), True),
        (Retry(), tries(ExecRefused()), False),
        (Retry(on=ExecRefused), tries(ExecRefused()), True),
        (Retry(on=NodeError), tries(ExecRefused()), True),
        (Retry(on=NodeError), tries(UnknownHostKey()), False),
        (Retry(on="banner"), tries(BUSY_SERVER), True),
        (Retry(on="kex"), tries(BUSY_SERVER), False),
        (Retry(on=lambda error: "dropped" in error.reason), tries(BUSY_SERVER), True),
        (Retry(on=lambda error: True), tries(AuthRejected()), False),
        (Retry(on=lambda error: True), tries(ConnectionLost(), sent=True), False),
        (Retry(), tries(ConnectionLost(), sent=True), False),
        (Retry(idempotent=True), tries(ConnectionLost(), sent=True), True),
        (Retry(idempotent=True), tries(CommandTimeout(), sent=True), False),
        (Retry(on=CommandTimeout, idempotent=True), tries(CommandTimeout(), sent=True), True),
        (Retry(on=CommandTimeout, idempotent=True), tries(CommandTimeout(curable=Curable.NEVER), sent=True), False),
        (Retry(idempotent=True), tries(CommandFailed("exit 1"), rc=1, sent=True), False),
        (Retry(exit_codes={75}, idempotent=True), tries(CommandFailed("exit 75"), rc=75, sent=True), True),
        (Retry(exit_codes=75, idempotent=True), tries(CommandFailed("exit 1"), rc=1, sent=True), False),
        (Retry(on=CommandFailed, idempotent=True), tries(CommandFailed("exit 1"), rc=1, sent=True), True),
        (Retry(2), tries(ConnectRefused(), 2), False),
        (Retry(budget=5, wait=1), tries(ConnectRefused(), took=4.0), True),
        (Retry(budget=5, wait=1), tries(ConnectRefused(), took=4.1), False),
        (Retry(tenacity.stop_after_attempt(2)), tries(ConnectRefused(), 2), False),
        (Retry(tenacity.stop_after_delay(3) | tenacity.stop_after_attempt(9)), tries(ConnectRefused(), 5), True),
        (Retry(tenacity.stop_before_delay(3), wait=2), tries(ConnectRefused(), took=1.5), False),
    ],
)
def test_a_policy_says_what_is_tried_again(policy: Retry, asked: Tries, again: bool) -> None:
    assert (policy.delay(asked) is not None) == again


def test_without_a_wait_tries_come_at_random_under_a_bound_that_doubles() -> None:
    for count, most in ((1, 1.0), (2, 2.0), (3, 4.0), (9, 5.0)):
        delays = [Retry(20).delay(tries(ConnectRefused(), count)) for _ in range(200)]
        found = [delay for delay in delays if delay is not None]
        assert len(found) == 200
        assert 0.2 <= min(found) < most / 2 + 0.2
        assert most / 2 < max(found) <= most


@pytest.mark.parametrize(
    ("wait", "second"),
    [
        (0, 0.0),
        (1.5, 1.5),
        (tenacity.wait_fixed(2), 2.0),
        (tenacity.wait_incrementing(start=1, increment=3), 4.0),
        (tenacity.wait_chain(tenacity.wait_fixed(1), tenacity.wait_fixed(7)), 7.0),
        (tenacity.wait_exponential(multiplier=3) + tenacity.wait_fixed(1), 7.0),
        (lambda state: float(state.attempt_number), 2.0),
    ],
)
def test_waits_of_tenacity_are_taken_as_they_are(wait: Any, second: float) -> None:
    assert Retry(wait=wait).delay(tries(ConnectRefused(), 2)) == second


def test_tenacity_is_asked_about_the_error() -> None:
    seen = []

    def wait(state: tenacity.RetryCallState) -> float:
        assert state.outcome is not None
        seen.append((state.attempt_number, state.outcome.exception(), state.seconds_since_start))
        return 0.0

    error = ConnectRefused()
    Retry(wait=wait).delay(tries(error, 2, took=3.0))
    assert seen == [(2, error, 3.0)]


@pytest.mark.parametrize("policy", [Retry(on=lambda error: 1 / 0 > 1), Retry(wait=lambda state: -1.0)])
def test_a_function_that_raises_is_logged_and_nothing_is_tried(
    policy: Retry, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "ctask.retry"):
        assert policy.delay(tries(ConnectRefused())) is None
    assert "not tried again" in caplog.text


def test_tenacity_is_loaded_at_the_first_failure_only() -> None:
    program = "import sys, ctask; ctask.Retry(3, wait=1); assert 'tenacity' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


# -- jobs over their tries --------------------------------------------------------------------------------------------


class Flaky:
    """A command that does something else each time that it is sent to a node."""

    def __init__(self, *scripts: Iterable[Step]) -> None:
        self._scripts = scripts
        self.counts: dict[str, int] = {}

    def __call__(self, node: str, command: Command) -> Iterable[Step]:
        count = self.counts[node] = self.counts.get(node, 0) + 1
        return self._scripts[min(count, len(self._scripts)) - 1]


AGAIN = Retry(3, wait=0.0, exit_codes={75}, idempotent=True)


class RetryRecorder(Recorder):
    def ev_retry(self, worker: Worker, node: str, attempt: int, error: NodeError, delay: float) -> None:
        self._note("retry", node, (attempt, error, delay))


def test_a_status_asks_for_another_try_and_the_last_one_counts(task: Task) -> None:
    flaky = Flaky(says(b"busy 1\n", 75), says(b"busy 2\n", 75), says(b"done\n"))
    heard = RetryRecorder()
    with FakeTransport(flaky):
        worker = task.run("x", nodes="n1", retry=AGAIN, handler=heard)
    result = worker.result("n1")
    assert (result.ok, result.rc, result.stdout, result.ran) == (True, 0, b"done\n", True)
    assert [(attempt.rc, attempt.phase, attempt.error) for attempt in result.attempts] == [
        (75, "closing", None), (75, "closing", None), (0, "closing", None),
    ]  # fmt: skip
    assert heard.names("n1") == ["pickup", "read", "retry", "read", "retry", "read", "hup", "done"]
    assert [line for _, line in heard.given("read")] == [b"busy 1", b"busy 2", b"done"]
    assert [(number, str(error), delay) for number, error, delay in heard.given("retry")] == [
        (1, "n1: exit 75", 0.0), (2, "n1: exit 75", 0.0),
    ]  # fmt: skip
    assert [(str(nodes), output) for output, nodes in worker.iter_buffers()] == [("n1", b"done")]
    assert "3 tries" in repr(result)


def test_tries_that_are_used_up_give_the_last_result(task: Task) -> None:
    with FakeTransport(Flaky(says(b"1\n", 75), says(b"2\n", 75), says(b"3\n", 75))):
        worker = task.run("x", nodes="n1", retry=AGAIN)
    result = worker.futures["n1"].result()
    assert (result.outcome, result.rc, result.stdout, len(result.attempts)) == (Outcome.EXITED, 75, b"3\n", 3)


def test_a_lost_command_is_not_sent_again_unless_that_does_no_harm(task: Task) -> None:
    lost = [Step("running"), Step("out", b"half"), Step("lost", error=ConnectionLost())]
    for policy, count in ((Retry(3, wait=0), 1), (Retry(3, wait=0, idempotent=True), 3)):
        flaky = Flaky(lost)
        with FakeTransport(flaky):
            worker = task.run("x", nodes="n1", retry=policy)
        error = worker.futures["n1"].exception()
        assert isinstance(error, ConnectionLost)
        assert error.result is not None
        assert (error.result.outcome, error.result.ran, error.result.stdout) == (Outcome.LOST, None, b"half")
        assert flaky.counts == {"n1": count}
        assert len(error.attempts) == count
        assert ("(3 tries, " in str(error)) == (count == 3)


def test_what_ran_once_has_run_whatever_the_last_try_came_to(task: Task) -> None:
    sent: list[str] = []

    def refuse(node: str, command: Command) -> NodeError | None:
        return ExecRefused() if sent else None

    def script(node: str, command: Command) -> Iterable[Step]:
        sent.append(node)
        return says(b"", 75)

    with FakeTransport(script, refuse=refuse):
        worker = task.run("x", nodes="n1", retry=AGAIN)
    (result,) = worker.results()
    assert (result.outcome, result.ran, len(result.attempts)) == (Outcome.UNREACHED, True, 2)
    assert not worker.not_run


@pytest.mark.parametrize(("policy", "count"), [({}, 3), ({"retry": None}, 1), ({"retry": 2}, 2)])
def test_a_busy_server_is_tried_again_without_being_asked(
    task: Task, policy: dict[str, Any], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ctask.retry._LEAST_WAIT", 0.0)
    monkeypatch.setattr("ctask.retry._MOST_WAIT", 0.01)
    refused: list[str] = []

    def refuse(node: str, command: Command) -> NodeError | None:
        refused.append(node)
        return SessionRefused("no room", curable=Curable.BUSY)

    with FakeTransport(lambda node, command: [], refuse=refuse):
        worker = task.run("x", nodes="n1", **policy)
    (result,) = worker.results()
    assert len(refused) == len(result.attempts) == count
    assert (result.outcome, result.ran, result.phase) == (Outcome.UNREACHED, False, "open")


def test_tries_that_nobody_asked_for_share_one_connect_timeout(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctask.retry._LEAST_WAIT", 0.3)
    monkeypatch.setattr("ctask.retry._MOST_WAIT", 0.3)
    refusal = SessionRefused("no room", curable=Curable.BUSY)
    with FakeTransport(lambda node, command: [], refuse=lambda node, command: refusal.copy()):
        worker = task.run("x", nodes="n1", connect_timeout=0.5)
    (result,) = worker.results()
    assert len(result.attempts) == 2
    assert isinstance(result.error, SessionRefused)


@pytest.fixture
def waits(task: Task) -> Iterator[Callable[..., Worker]]:
    """Start a command whose only try was busy, and return when it waits for its next one, a minute from now."""
    with FakeTransport(Flaky(says(b"busy\n", 75))):

        def start(nodes: str = "n1", **options: Any) -> Worker:
            again = Retry(3, wait=60.0, exit_codes={75}, idempotent=True)
            worker = task.submit("x", nodes=nodes, retry=again, **options)
            tried: Callable[[Any], bool] = lambda job: bool(job._tries.done)  # noqa: E731
            wait_until(lambda: all(map(tried, worker.jobs)))
            return worker

        yield start


@pytest.mark.parametrize("how", ["task", "worker", "future", "deadline"])
def test_a_wait_between_tries_ends_at_once(task: Task, waits: Callable[..., Worker], how: str) -> None:
    worker = waits(**({"deadline": 0.3} if how == "deadline" else {}))
    assert not worker.futures["n1"].done()
    if how == "task":
        task.abort()
    elif how == "worker":
        worker.abort()
    elif how == "future":
        assert worker.futures["n1"].cancel()
    assert worker.wait(10)
    (result,) = worker.results()
    assert (result.outcome, result.ran) == (Outcome.TIMEOUT if how == "deadline" else Outcome.ABORTED, True)
    assert [attempt.phase for attempt in result.attempts] == ["closing", "queued"]


def test_a_wait_between_tries_holds_no_place(task: Task, waits: Callable[..., Worker]) -> None:
    task.set_info("fanout", 1)
    worker = waits("n[1-5]")
    other = task.submit("y", nodes="m1", retry=None)
    assert other.wait(10)
    assert worker.pending == worker.nodes
    task.abort()


def test_a_command_that_is_taken_back_while_it_is_ended_is_not_tried_again(task: Task) -> None:
    flaky, ended, go_on = Flaky(HANGS), threading.Event(), threading.Event()

    def end(_: object) -> Any:
        ended.set()
        assert go_on.wait(10)
        from ctask.result import Ending

        return Ending("gone", 1)

    again = Retry(3, wait=0, on=CommandTimeout, idempotent=True)
    with FakeTransport(flaky, end=end):
        worker = task.submit("x", nodes="n1", timeout=0.05, retry=again)
        assert ended.wait(10)
        worker.abort()
        go_on.set()
        assert worker.wait(10)
        (result,) = worker.results()
        assert (result.outcome, flaky.counts) == (Outcome.TIMEOUT, {"n1": 1}), "an end that came first stands"


def test_a_timeout_is_of_each_try_and_a_deadline_of_all(task: Task) -> None:
    flaky = Flaky(HANGS)
    again = Retry(20, wait=0, on=CommandTimeout, idempotent=True)
    with FakeTransport(flaky):
        began = time.monotonic()
        twice = Retry(2, wait=0, on="running", idempotent=True)
        worker = task.run("x", nodes="n1", timeout=0.2, retry=twice)
        elapsed = time.monotonic() - began
        (result,) = worker.results()
        assert (result.outcome, len(result.attempts)) == (Outcome.TIMEOUT, 2)
        assert elapsed >= 0.4
        late = task.submit("x", nodes="n2", timeout=0.1, deadline=0.5, retry=again)
        assert late.wait(10)
    (result,) = late.results()
    assert result.outcome is Outcome.TIMEOUT
    assert "deadline of 0.5 s passed" in result.why
    assert 3 <= len(result.attempts) <= 6
    assert sum(attempt.timings.total for attempt in result.attempts) >= 0.5


def test_timings_of_the_tries_sum_to_the_whole(task: Task) -> None:
    flaky = Flaky(says(b"a\n", 75, after=0.1), says(b"b\n"))
    with FakeTransport(flaky):
        began = time.monotonic()
        worker = task.run("x", nodes="n1", retry=Retry(2, wait=0.2, exit_codes={75}, idempotent=True))
        elapsed = time.monotonic() - began
    first, second = worker.result("n1").attempts
    assert first.timings["running"] >= 0.1
    assert second.timings["queued"] >= 0.2
    assert second.timings.first_byte is not None
    assert 0.2 <= second.timings.first_byte <= second.timings.total
    assert first.timings.total + second.timings.total <= elapsed


@pytest.mark.parametrize("kind", ["bytes", "path", "written"])
def test_each_try_reads_the_same_standard_input(task: Task, tmp_path: Path, kind: str) -> None:
    text = b"some input\n" * 1000
    path = tmp_path / "input"
    path.write_bytes(text)
    stdin: Any = {"bytes": text, "path": path, "written": True}[kind]
    with FakeTransport(Flaky(says(b"", 75, after=0.05), says(b"", 75, after=0.05), says(b"ok\n", after=0.2))) as fake:
        worker = task.shell("x", nodes="n1", stdin=stdin, retry=AGAIN)
        if kind == "written":
            worker.write(text)
            worker.set_write_eof()
        task.resume()
        assert worker.result("n1").ok
        wait_until(lambda: all(session.stdin_closed for session in fake.sessions))
        assert [bytes(session.written) for session in fake.sessions] == [text] * 3


def test_lines_of_every_try_are_muted_by_an_abort(task: Task) -> None:
    seen: list[bytes] = []

    def read(worker: Worker, node: str, sname: str, msg: bytes) -> None:
        seen.append(msg)
        worker.abort()
        wait_until(lambda: worker.jobs[0].result)

    many = [Step("running"), Step("out", b"line\n" * 1000), Step("exit", status=75)]
    with FakeTransport(Flaky(many, many, [*many[:2], Step("end", after=600)])):
        worker = task.submit("x", nodes="n1", retry=AGAIN, on_read=read)
        wait_until(lambda: len(worker.jobs[0]._tries.done) == 2)
        assert worker.wait(10)
    assert seen == [b"line"], "what came in other tries and was not read is not read any more"


def test_local_commands_are_tried_again_too(task: Task, tmp_path: Path) -> None:
    count = tmp_path / "count"
    command = f"echo x >>{count}; [ $(grep -c x {count}) -ge 3 ] || exit 75; echo done"
    worker = task.run(command, key="here", retry=AGAIN)
    result = worker.result("here")
    assert ([attempt.rc for attempt in result.attempts], result.stdout) == ([75, 75, 0], b"done\n")


def test_waiters_of_the_standard_library_hear_the_end_only(task: Task) -> None:
    with FakeTransport(Flaky(says(b"", 75), says(b"", 75), says(b"ok\n"))):
        worker = task.submit("x", nodes="n[1-20]", retry=AGAIN)
        done, pending = concurrent.futures.wait(worker.futures.values(), timeout=10)
    assert (len(done), len(pending)) == (20, 0)
    assert all(len(future.result().attempts) == 3 for future in done)


def test_a_cancelled_future_says_so_after_any_number_of_tries(task: Task, waits: Callable[..., Worker]) -> None:
    future = waits().futures["n1"]
    future.cancel()
    with pytest.raises(Aborted):
        future.result(10)
    assert future.cancelled()


def test_retries_of_many_jobs_end_each_once(task: Task) -> None:
    ends: list[str] = []
    with FakeTransport(Flaky(says(b"", 75), [Step("running"), Step("lost", error=ConnectionLost())], says(b"ok\n"))):
        worker = task.run("x", nodes="n[1-200]", retry=AGAIN, on_done=lambda worker, node, result: ends.append(node))
    assert sorted(ends) == sorted(worker.nodes)
    assert worker.ok == worker.nodes
