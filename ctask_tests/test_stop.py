# SPDX-License-Identifier: Apache-2.0
"""What ctask stops, it ends: the policies, the promises, what is said of it, and the ends of whole programs.

The job's side over the fake transport, then on the real sshd, where what lives is looked up in the process table.
Runs in the thread of pytest; the rows H02, H03, H09 and H10 run in processes of their own.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from ctask import (
    Aborted,
    CommandTimeout,
    ConnectionLost,
    Outcome,
    Task,
    TaskError,
    TaskTimeout,
    Worker,
    as_completed,
    ending,
    job,
    task_self,
    wait,
)
from ctask.display import account
from ctask.result import Ending, RemoteProcess
from ctask.testing import FakeTransport, close_everything
from ctask.testing.fake import End, FakeSession
from ctask.threads import NoThread
from ctask_tests.child import Child
from ctask_tests.fake_nodes import HANGS, nodes, says
from ctask_tests.fix_hostile import Script
from ctask_tests.fix_leaks import wait_until
from ctask_tests.fix_proxy import OnMessage, Rule, Stall, deaf, silent
from ctask_tests.real_nodes import WELL, is_well, outcomes, reach, run, takes, task_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ctask_tests.fix_hostile import HostileFactory
    from ctask_tests.fix_proxy import ProxyFactory
    from ctask_tests.fix_sshd import Sshd

#: What a node says of a process that cannot be killed.
STUCK = Ending("alive", 3, (RemoteProcess(4711, "df", "D", "ll_statfs"),))


@pytest.fixture
def task() -> Task:
    return task_self()


def hanging(task: Task, **options: Any) -> Worker:
    """A command on n1 that runs and does not end by itself."""
    worker = task.submit("x", nodes="n1", **options)
    wait_until(lambda: worker.jobs[0].phase == "running")
    return worker


def policies(fake: FakeTransport) -> list[tuple[str, float, str]]:
    return [(end.stop.policy, end.stop.grace, end.stop.by) for end in fake.ends]


# -- policies ----------------------------------------------------------------------------------------------------


def test_the_policy_is_of_the_call_the_node_or_the_task(task: Task) -> None:
    task.set_info("stop", "term")
    task.set_info("stop_grace", 7)
    task.node_options("n2", stop="leave", stop_by="signal")
    with FakeTransport(nodes(HANGS)) as fake:
        plain = task.submit("x", nodes="n1,n2")
        call = task.submit("x", nodes="n2", stop="kill", stop_grace=0)
        wait_until(lambda: all(job.phase == "running" for job in (*plain.jobs, *call.jobs)))
        task.abort()
        task.join()
        told = {(end.node, end.stop.policy): (end.stop.grace, end.stop.by) for end in fake.ends}
    assert told == {
        ("n1", "term"): (7.0, "session"),
        ("n2", "leave"): (7.0, "signal"),
        ("n2", "kill"): (0.0, "signal"),
    }


@pytest.mark.parametrize("policy", ["kill", "term", "leave"])
def test_a_timeout_and_a_cancel_end_by_the_policy(task: Task, policy: str) -> None:
    with FakeTransport(nodes(HANGS)) as fake:
        timed = task.submit("x", nodes="n1", stop=policy, timeout=0.05)
        cancelled = hanging(task, stop=policy)
        cancelled.futures["n1"].cancel()
        task.join()
        assert {end.stop.policy for end in fake.ends} == {policy}
    assert (next(timed.results()).outcome, next(cancelled.results()).outcome) == (Outcome.TIMEOUT, Outcome.ABORTED)


@pytest.mark.parametrize(("policy", "used"), [("kill", "term"), ("term", "term"), ("leave", "leave")])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_h02_ctrl_c_means_term_at_most(
    task: Task, kind: type[BaseException], policy: str, used: str
) -> None:
    def out(*_: object) -> None:
        raise kind

    with FakeTransport(nodes(HANGS, n2=says(b"now\n", after=0.1))) as fake:
        task.shell("x", nodes="n1,n2", on_read=out, stop=policy)
        with pytest.raises(kind):
            task.resume()
        assert [end.stop.policy for end in fake.ends if end.node == "n1"] == [used]


def test_the_deadline_of_a_run_ends_by_the_policy(task: Task) -> None:
    with FakeTransport(nodes(HANGS)) as fake:
        with pytest.raises(TaskTimeout):
            task.run("x", nodes="n1", deadline=0.1, stop="kill", stop_grace=3)
        assert policies(fake) == [("kill", 3.0, "session")]


def test_a_command_that_ends_by_itself_has_nothing_ended(task: Task) -> None:
    with FakeTransport(nodes()) as fake:
        worker = task.run("x", nodes="n[1-20]", timeout=5)
        task.abort()
        assert fake.ends == []
    assert worker is not None
    assert {result.ending for result in worker.results()} == {None}


# -- together ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["abort", "deadline"])
def test_eight_jobs_of_a_connection_are_one_ending(task: Task, way: str) -> None:
    with FakeTransport(nodes(HANGS)) as fake:
        workers = [task.submit("x", nodes="n[1-2]") for _ in range(8)]
        wait_until(lambda: all(job.phase == "running" for worker in workers for job in worker.jobs))
        if way == "abort":
            task.abort()
            task.join()
        else:
            with pytest.raises(TaskTimeout):
                task.resume(0.05)
        assert sorted((end.node, len(set(end.sessions))) for end in fake.ends) == [("n1", 8), ("n2", 8)]


def test_jobs_with_other_policies_are_ended_apart(task: Task) -> None:
    with FakeTransport(nodes(HANGS)) as fake:
        workers = [task.submit("x", nodes="n1", stop=policy) for policy in ("kill", "term", "kill", "leave")]
        wait_until(lambda: all(worker.jobs[0].phase == "running" for worker in workers))
        task.abort()
        task.join()
        assert sorted((end.stop.policy, len(end.sessions)) for end in fake.ends) == [
            ("kill", 2),
            ("leave", 1),
            ("term", 1),
        ]


def test_each_job_of_an_ending_gets_its_own_word(task: Task) -> None:
    def answer(end: End) -> Ending | dict[FakeSession, Ending]:
        return dict(zip(end.sessions, [Ending("gone", 1), STUCK, Ending("unknown")], strict=True))

    with FakeTransport(nodes(HANGS), end=answer) as fake:
        workers = [task.submit("x", nodes="n1") for _ in range(3)]
        wait_until(lambda: all(worker.jobs[0].phase == "running" for worker in workers))
        task.abort()
        task.join()
        assert fake.sessions[0].connection.retired, "not all of it is gone"
    assert sorted(str(next(worker.results()).remote_state) for worker in workers) == ["alive", "gone", "unknown"]


# -- promises ----------------------------------------------------------------------------------------------------


def test_the_word_comes_before_the_promise(task: Task) -> None:
    with FakeTransport(nodes(HANGS), end_after=0.3) as fake, takes(0.4):
        result = outcomes(task.submit("x", nodes="n1", timeout=0.1))["n1"]
        (end,) = fake.ends
    assert (result.outcome, result.remote_state) == (Outcome.TIMEOUT, "gone")
    assert 6.0 < end.within < 7.0, "the node has its grace of 5 s, and 2 s"


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
def test_f09_a_wall_clock_that_is_set_ends_nothing_early_or_late(
    task: Task, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    wall, began = time.time, time.monotonic()
    with FakeTransport(nodes(HANGS, n2=says(b"on time\n", after=0.1))):
        monkeypatch.setattr(time, "time", lambda: wall() + jump * (time.monotonic() > began + 0.05))
        with takes(0.2):
            found = outcomes(task.submit("x", nodes="n[1-2]", timeout=0.2))
        with takes(0.1), pytest.raises(TaskTimeout):
            task.run("x", nodes="n1", deadline=0.1)
    assert (found["n1"].outcome, found["n2"].outcome) == (Outcome.TIMEOUT, Outcome.EXITED)


def test_an_abort_waits_for_no_word(task: Task) -> None:
    with FakeTransport(nodes(HANGS), end_after=60) as fake:
        worker = hanging(task)
        began = time.monotonic()
        task.abort()
        assert task.join(5)
        assert time.monotonic() - began <= 2.0, "as it is promised"
        (result,) = worker.results()
        assert fake.ends[0].within < 1.7, "its own word has to come before"
        assert fake.sessions[0].connection.retired
    assert (result.outcome, result.remote_state, result.ending) == (Outcome.ABORTED, "unknown", Ending("unknown"))


def test_a_timeout_waits_for_no_word(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "TIMEOUT_WITHIN", 0.2)
    with FakeTransport(nodes(HANGS), end_after=60), takes(0.5):
        (result,) = task.submit("x", nodes="n1", timeout=0.1, stop_grace=0.2).results()
    assert (result.outcome, result.remote_state) == (Outcome.TIMEOUT, "unknown")


@pytest.mark.parametrize("then", ["abort", "deadline", "interrupt"])
def test_who_is_promised_to_go_sooner_does_not_wait_for_the_grace(task: Task, then: str) -> None:
    with FakeTransport(nodes(HANGS), end_after=60) as fake:
        worker = task.submit("x", nodes="n1", timeout=0.05, stop_grace=30)
        wait_until(lambda: bool(fake.ends), what="its ending has begun")
        began = time.monotonic()
        if then == "abort":
            task.abort()
            assert task.join(10)
        elif then == "deadline":
            with pytest.raises(TaskTimeout):
                task.resume(0.05)
        else:
            threading.Timer(0.05, signal.raise_signal, (signal.SIGINT,)).start()
            with pytest.raises(KeyboardInterrupt):
                task.resume()
        assert time.monotonic() - began <= (2.0 if then == "abort" else 1.5)
        assert worker.done(), "a run that has returned leaves nobody without an outcome"
        assert len(fake.ends) == 1, "it is told to end once"
    (result,) = worker.results()
    assert (result.outcome, result.remote_state) == (Outcome.TIMEOUT, "unknown"), "what came first stands"


def test_an_ending_that_raises_is_an_unknown_end(task: Task, caplog: pytest.LogCaptureFixture) -> None:
    def answer(end: End) -> Ending:
        raise RuntimeError("a defect")

    with FakeTransport(nodes(HANGS), end=answer) as fake, takes(0.1):
        workers = [task.submit("x", nodes="n1", timeout=0.1) for _ in range(2)]
        task.join()
        assert fake.sessions[0].connection.retired
    for worker in workers:
        (result,) = worker.results()
        assert (result.outcome, result.remote_state) == (Outcome.TIMEOUT, "unknown")
        assert isinstance(result.error, CommandTimeout)
    assert "a defect" in caplog.text


def test_an_ending_for_which_there_is_no_thread_is_unknown(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise NoThread("can't start new thread")

    with FakeTransport(nodes(HANGS)) as fake:
        worker = hanging(task)
        monkeypatch.setattr("ctask.threads.start", refuse)
        with takes(0):
            worker.abort()
            assert worker.wait(5)
        monkeypatch.undo()
        assert fake.ends == []
    (result,) = worker.results()
    assert (result.outcome, result.remote_state) == (Outcome.ABORTED, "unknown")


# -- what is said ------------------------------------------------------------------------------------------------


def test_what_was_seen_is_in_the_error_and_folds_without_it(task: Task) -> None:
    with FakeTransport(nodes(HANGS), end=lambda end: STUCK):
        worker = task.submit("x", nodes="n[1-2]", timeout=0.05)
        worker.wait()
        result = outcomes(worker)["n1"]
        assert str(result.error) == (
            'n1: timeout after 0.05 s. Ended: 2 processes. Still there: pid 4711 "df", '
            "state D in ll_statfs (cannot be killed)."
        )
        assert result.error is not None
        assert result.error.args == (result.error.reason,)
        assert (result.ending, result.remote_state) == (STUCK, "alive")
        failures = {key: str(value) for key, value in worker.failures().items()}
        assert failures == {("running", "CommandTimeout", "timeout after 0.05 s"): "n[1-2]"}
        assert [(str(group.nodes), group.why) for group in worker.groups()] == [("n[1-2]", "timeout after 0.05 s")]
        assert account(worker).splitlines()[1].endswith('ran; ended 2 processes; still there: "df", D in ll_statfs')


def test_e04_what_a_node_says_of_its_processes_is_made_harmless(task: Task) -> None:
    rude = Ending("alive", 1, (RemoteProcess(7, "\x1b]0;x\x07\n", "S\r", "a\nb"),))
    with FakeTransport(nodes(HANGS), end=lambda end: rude):
        worker = task.submit("x", nodes="n1", timeout=0.05)
        worker.wait()
    (result,) = worker.results()
    assert str(result.error).isprintable()
    assert "pid 7" in str(result.error)
    assert result.why.isprintable()


def test_the_phase_of_a_plain_exit_is_closing(task: Task) -> None:
    with FakeTransport(nodes(n2=says(b"x", after=0.05))):
        worker = task.run("x", nodes="n[1-3]")
    assert worker is not None
    assert {(result.outcome, result.phase) for result in worker.results()} == {(Outcome.EXITED, "closing")}


# -- H03, and what is only scheduled -------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["abort", "worker", "cancel"])
def test_h03_what_is_taken_back_before_the_run_does_not_run(task: Task, way: str) -> None:
    with FakeTransport(nodes()) as fake:
        worker = task.shell("x", nodes="n1")
        if way == "abort":
            task.abort()
        elif way == "worker":
            worker.abort()
        else:
            assert worker.futures["n1"].cancel()
        with pytest.raises(Aborted):
            worker.futures["n1"].result(5)
        task.resume()
        assert fake.sessions == []
        again = task.run("x", nodes="n1")
        assert again is not None
        assert again.result("n1").ok, "the task can be used again"


WAITS: dict[str, Callable[[Worker], object]] = {
    "wait": lambda worker: worker.wait(),
    "wait with a deadline": lambda worker: worker.wait(0.01),
    "result": lambda worker: worker.result("n1"),
    "exception": lambda worker: worker.futures["n1"].exception(),
    "results": lambda worker: list(worker.results()),
    "check": lambda worker: worker.check(),
    "ctask.wait": wait,
    "as_completed": lambda worker: list(as_completed(worker)),
}


@pytest.mark.parametrize("way", WAITS)
def test_waiting_for_what_nobody_will_begin_is_an_error(task: Task, way: str) -> None:
    with FakeTransport(nodes()):
        worker = task.shell("x", nodes="n[1-2]")
        with pytest.raises(TaskError, match=r"call resume\(\)"):
            WAITS[way](worker)
        task.resume()
        WAITS[way](worker)
        assert worker.result("n2").ok


def test_another_thread_may_wait_for_what_the_owner_will_begin(task: Task) -> None:
    with FakeTransport(nodes()):
        worker = task.shell("x", nodes="n1")
        rcs: list[int | None] = []
        other = threading.Thread(target=lambda: rcs.append(worker.result("n1").rc))
        other.start()
        task.resume()
        other.join(10)
        assert rcs == [0]


def test_one_of_two_may_be_waited_for_while_the_other_is_scheduled(task: Task) -> None:
    with FakeTransport(nodes()):
        running, scheduled = task.submit("x", nodes="n1"), task.shell("x", nodes="n2")
        both = [*running, *scheduled]
        done, rest = wait(both, return_when="FIRST_COMPLETED")
        assert (len(done), len(rest)) == (1, 1)
        with pytest.raises(TaskError, match=r"resume\(\)"):
            wait(both)
        task.resume()
        assert wait(both)[1] == set()


# -- local commands ------------------------------------------------------------------------------------------------


@pytest.fixture
def strays() -> Iterator[list[int]]:
    """Processes that a test leaves alive on purpose."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):  # reaped, where the watcher still looks at it
            os.waitpid(pid, 0)


def local(task: Task, script: str, **options: Any) -> tuple[Worker, int]:
    """A local command that has printed its pid."""
    worker = task.submit(script, key="laptop", **options)
    wait_until(lambda: bool(worker.node_buffer("laptop")))
    return worker, int(worker.node_buffer("laptop"))


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie: who reaps it is not us."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b") ")[2][:1] not in b"ZX"
    except OSError:
        return False


def test_a_local_command_is_left_when_that_is_the_policy(task: Task, strays: list[int]) -> None:
    worker, pid = local(task, "echo $$; exec sleep 60", stop="leave")
    strays.append(pid)
    with takes(0):
        worker.abort()
        worker.wait()
    (result,) = worker.results()
    assert (result.outcome, result.ending) == (Outcome.ABORTED, Ending("left"))
    assert close_everything()
    assert alive(pid), "nor does the exit end it"


def test_a_local_command_gets_no_kill_when_that_is_the_policy(
    task: Task, strays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ending, "WORD_BEFORE", 1.0)  # a busy machine is late with its word
    worker, pid = local(task, "trap 'echo TERM' TERM; echo $$; while :; do sleep 0.05; done", stop="term")
    strays.append(pid)
    worker.jobs[0].run.post(None, worker.jobs[0].stop, Outcome.ABORTED, Aborted(), 1.3)
    worker.wait()
    (result,) = worker.results()
    assert result.remote_state == "alive"
    assert result.stdout.endswith(b"\nTERM\n"), "once"
    assert close_everything()
    assert alive(pid), "TERM, and nothing after it"


def test_what_a_local_ending_saw_is_told(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "WORD_BEFORE", 1.0)
    script = "trap '' TERM; echo $$; sleep 60 & exec tail -f /dev/null"
    worker, pid = local(task, script, stop_grace=0.3)
    began = time.monotonic()
    worker.jobs[0].run.post(None, worker.jobs[0].stop, Outcome.ABORTED, Aborted(), 1.2)
    worker.wait()
    assert time.monotonic() - began >= 0.1
    (result,) = worker.results()
    assert result.ending is not None
    assert (result.ending.state, result.ending.ended) == ("alive", 2)
    assert {process.name for process in result.ending.processes} == {"sleep", "tail"}
    assert pid in {process.pid for process in result.ending.processes}
    assert re.search(r'aborted\. Still there: pid \d+ "\w+", state S', str(result.error))
    wait_until(lambda: not alive(pid), what="the KILL, which was due later")


def test_a_local_command_does_not_wait_for_its_neighbours_grace(task: Task) -> None:
    stubborn, pid = local(task, "trap '' TERM; echo $$; while :; do sleep 0.05; done", stop_grace=1.0)
    meek = task.submit("exec sleep 60", key="meek", stop_grace=1.0)
    wait_until(lambda: meek.jobs[0].phase == "running")
    began = time.monotonic()
    task.abort()
    meek.wait()
    assert time.monotonic() - began < 0.9
    assert not stubborn.done()
    stubborn.wait()
    assert time.monotonic() - began >= 1.0
    assert [next(worker.results()).ending for worker in (meek, stubborn)] == [Ending("gone", 1), Ending("gone", 2)]
    assert not alive(pid)


# -- on the real sshd ----------------------------------------------------------------------------------------------

#: It prints its pid; TERM does not end it.
STUBBORN = "trap '' TERM; echo $$; exec sleep 60"


@pytest.fixture
def ssh(sshd: Sshd) -> Iterator[Task]:
    task = task_of(sshd)
    task.node_options("sick", address=sshd.address(2))
    yield task
    for pid in sshd.processes():  # what is left on purpose, and a script that is at work on it
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_f06_a_timeout_ends_the_command_on_its_node(ssh: Task) -> None:
    sick = ssh.shell("sleep 60 & echo $$ $!; wait", nodes="sick", stdin=False, timeout=0.3)
    well = ssh.shell("sleep 0.5; echo fine", nodes=WELL, stdin=False)
    ssh.resume()
    result = outcomes(sick)["sick"]
    assert (result.outcome, result.ending) == (Outcome.TIMEOUT, Ending("gone", 2))
    assert not any(alive(int(pid)) for pid in result.stdout.split())
    assert is_well(outcomes(well)[WELL])


@pytest.mark.usefixtures("terminals")
def test_f11_a_timeout_ends_a_command_with_a_terminal(ssh: Task) -> None:
    began = time.monotonic()
    worker = run(ssh, "trap '' TERM HUP; echo $$; exec sleep 60", ["sick", WELL], timeout=0.3, stop_grace=0.3, pty=True)
    assert 0.6 <= time.monotonic() - began <= 0.3 + 2.0
    for result in outcomes(worker).values():
        assert (result.outcome, result.remote_state) == (Outcome.TIMEOUT, "gone")
        assert not alive(int(result.stdout))


@pytest.mark.parametrize(("policy", "state", "lives"), [("kill", "gone", False), ("term", "alive", True)])
def test_who_ignores_term_on_its_node(ssh: Task, policy: str, state: str, lives: bool) -> None:
    began = time.monotonic()
    worker = run(ssh, STUBBORN, ["sick"], timeout=0.3, stop=policy, stop_grace=0.3)
    result = outcomes(worker)["sick"]
    assert 0.6 <= time.monotonic() - began <= 0.3 + 0.3 + 2 + 1
    assert (result.outcome, result.remote_state) == (Outcome.TIMEOUT, state)
    assert alive(int(result.stdout)) is lives
    if lives:
        assert re.search(r'timeout after 0\.3 s\. Still there: pid \d+ "sleep", state S', str(result.error))
    assert is_well(outcomes(run(ssh, "true", ["sick"]))["sick"])


def test_survivors_are_named_where_the_promise_comes_before_the_last_word(
    ssh: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ending, "WORD_BEFORE", -30.0)  # a machine on which the last word is always late
    worker = ssh.submit(STUBBORN, nodes="sick", stop_grace=30)
    wait_until(lambda: bool(worker.node_buffer("sick")))
    job = worker.jobs[0]
    job.run.post(None, job.stop, Outcome.ABORTED, Aborted(), 0.7)
    result = outcomes(worker)["sick"]
    assert (result.outcome, result.remote_state) == (Outcome.ABORTED, "alive")
    assert result.ending is not None
    assert [process.pid for process in result.ending.processes] == [int(result.stdout)]


def test_what_a_command_left_in_the_background_outlives_its_end_and_the_end_of_others(ssh: Task) -> None:
    left = int(outcomes(run(ssh, "nohup sleep 60 >/dev/null 2>&1 & echo $!", ["sick"]))["sick"].stdout)
    doomed = outcomes(run(ssh, "echo $$; nohup timeout 60 sleep 50", ["sick"], timeout=0.2))["sick"]
    assert (doomed.outcome, doomed.remote_state) == (Outcome.TIMEOUT, "gone")
    assert not alive(int(doomed.stdout))
    assert alive(left)


def test_what_is_left_runs_on_on_its_node(ssh: Task) -> None:
    with takes(0.2):
        worker = run(ssh, "echo $$; exec sleep 60", ["sick"], timeout=0.2, stop="leave")
    result = outcomes(worker)["sick"]
    assert (result.outcome, result.ending) == (Outcome.TIMEOUT, Ending("left"))
    assert alive(int(result.stdout))


def test_eight_jobs_of_a_connection_are_ended_together_and_others_are_unharmed(ssh: Task, sshd: Sshd) -> None:
    doomed = [ssh.submit("echo $$; exec sleep 60", nodes="sick", stop_grace=2) for _ in range(6)]
    doomed.append(ssh.submit(STUBBORN, nodes="sick", stop_grace=0.5))
    well = ssh.submit("read x; echo $x", nodes="sick", stdin=True)
    wait_until(lambda: all(worker.node_buffer("sick") for worker in doomed))
    pids = [int(worker.node_buffer("sick")) for worker in doomed]
    with takes(0.5):
        for worker in doomed:
            worker.futures["sick"].cancel()
        assert {outcomes(worker)["sick"].remote_state for worker in doomed} == {"gone"}
    assert not any(map(alive, pids))
    well.write("fine\n")
    assert is_well(outcomes(well)["sick"])
    assert well.node_buffer("sick") == "fine"


def test_only_a_kept_connection_is_replaced(ssh: Task, hostile: HostileFactory) -> None:
    server = hostile(Script(on_open="hang_up"), Script())
    reach(ssh, "cold", server)
    found = outcomes(run(ssh, "true", ["cold", WELL]))
    cold = found["cold"]
    assert (cold.outcome, cold.phase, cold.ran) == (Outcome.UNREACHED, "open", False)
    assert isinstance(cold.error, ConnectionLost)
    assert server.connections == 1, "it had been made for this job: the failure is told"
    assert is_well(found[WELL])


# -- whole programs ------------------------------------------------------------------------------------------------

#: Jobs in every phase. Once all that can run does, and one is being ended, their pids are said.
EVERY_PHASE = """
for name in ("deaf", "silent", "kex"):
    task.node_options(name, **{**GIVEN["options"], **GIVEN[name]})
a, b, c, d = GIVEN["nodes"]
for node in GIVEN["nodes"]:
    task.node_options(node, **GIVEN["options"])
stubborn = "trap '' TERM; echo $$; exec sleep 60"
meek = "echo $$; exec sleep 60"
pids, deaf_to_term = [], []
def note(worker, node, sname, line):
    if line.isdigit():
        pids.append(line.text)
        if worker.command == stubborn:
            deaf_to_term.append(line.text)
dialing = task.submit("true", nodes="deaf,silent,kex")
task.submit(meek, nodes=a, on_read=note)
task.submit(stubborn, nodes=b, on_read=note, stop_grace=2.5)
task.submit("echo $$; exec yes", nodes=c, on_read=note, gather=False)
ending = task.submit(stubborn, nodes=d, on_read=note, timeout=0.2, stop_grace=2.5)
task.submit(meek, key="meek", on_read=note)
task.submit(stubborn, key="stubborn", on_read=note, stop_grace=2.5)
until = time.monotonic() + 10
while len(pids) < 6 or ending.jobs[0]._stopped is None:
    assert time.monotonic() < until
    task.join(0.02)
wait_until(lambda: sorted(job.phase for job in dialing.jobs) == ["banner", "kex", "tcp"])
"""

#: How the program ends then, and its status.
GOES = {
    "exit": 'say("pids", *pids, "stubborn", *deaf_to_term); say("leaving", time.monotonic()); sys.exit(7)',
    "ctrl-c": """
main = threading.main_thread().ident
def in_pump():
    frame, names = sys._current_frames()[main], []
    while frame is not None:
        names.append(frame.f_code.co_name)
        frame = frame.f_back
    return "pump" in names
def waits():
    wait_until(in_pump)
    say("pids", *pids, "stubborn", *deaf_to_term)
threading.Thread(target=waits, daemon=True).start()
try:
    task.resume()
except KeyboardInterrupt:
    say("leaving", time.monotonic())
    raise SystemExit(7)
""",
}


@pytest.mark.slow  # the nodes have their grace of 2.5 s
@pytest.mark.parametrize("way", GOES)
def test_h10_with_jobs_in_every_phase_a_program_ends_and_has_told_the_nodes(
    sshd: Sshd, fault_proxy: ProxyFactory, way: str
) -> None:
    proxy = fault_proxy((sshd.address(5), sshd.port), Rule("down", OnMessage(31), Stall()))
    with deaf() as no_answer, silent() as no_word:
        given = {
            "deaf": {"address": no_answer[0], "port": no_answer[1]},
            "silent": {"address": no_word[0], "port": no_word[1]},
            "kex": {**sshd.options(via=proxy.endpoint), "address": proxy.address},
            "nodes": sshd.nodes(4),
            "options": dict(sshd.options()),
        }
        with Child(EVERY_PHASE + GOES[way], **given) as child:
            pids, stubborn = (set(map(int, part.split())) for part in child.expect("pids").split("stubborn"))
            assert (len(pids), len(stubborn)) == (6, 3)
            interrupted = child.interrupt() if way == "ctrl-c" else None
            left = float(child.expect("leaving"))
            assert interrupted is None or left - interrupted < 1.5, "promised: 1 s"
            assert child.end() == 7
            assert time.monotonic() - left < 2.5, "promised: 2 s"
            assert child.errors() == ""
    # Ctrl-C kills nobody; who was being ended when it came has its KILL.
    spared = 2 if way == "ctrl-c" else 0
    wait_until(lambda: sum(map(alive, pids)) <= spared, timeout=8, what="what ran is gone")
    lives = {pid for pid in pids if alive(pid)}
    assert lives <= stubborn
    assert len(lives) == spared
    for pid in lives:
        os.kill(pid, signal.SIGKILL)
    sshd.wait_idle()


@pytest.mark.parametrize("kind", ["KeyboardInterrupt", "SystemExit(5)"])
def test_h02_a_handler_that_wants_out_ends_everything(sshd: Sshd, kind: str) -> None:
    program = f"""
def out(worker, node, sname, line):
    say("pid", line.text, time.monotonic())
    raise {kind}
try:
    task.run("echo $$; exec sleep 60", nodes=GIVEN["address"], on_read=out, **GIVEN["options"])
except BaseException as error:
    say("raised", type(error).__name__, time.monotonic())
    say(*[(result.outcome.name, result.remote_state) for worker in task.workers for result in worker.results()])
    raise
"""
    with Child(program, address=sshd.address(1), options=dict(sshd.options())) as child:
        pid, began = child.expect("pid").split()
        name, raised = child.expect("raised").split()
        assert kind.startswith(name)
        assert float(raised) - float(began) < 1.5, "promised: 1 s"
        assert child.line() == "('ABORTED', 'gone')"
        assert child.end() == (5 if "5" in kind else -signal.SIGINT)
    assert not alive(int(pid))
    sshd.wait_idle()
