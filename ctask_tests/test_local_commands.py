# SPDX-License-Identifier: Apache-2.0
"""Local commands through a task, beside remote ones in the same run: labels, views, placeholders, ends.

The processes of one local command are the business of `test_local.py`. Runs in the thread of pytest.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ctask import (
    CommandError,
    CommandTimeout,
    EventHandler,
    ExecRefused,
    NodeResult,
    NodeSet,
    OptionError,
    Outcome,
    Task,
    TaskTimeout,
    UsageError,
    Worker,
)
from ctask.testing import close_everything
from ctask.transports.watcher import watcher
from ctask_tests.fix_leaks import process_table, wait_until
from ctask_tests.real_nodes import WELL, is_well, outcomes, run, takes, task_of

if TYPE_CHECKING:
    from ctask_tests.fix_sshd import Sshd


@pytest.fixture
def task(sshd: Sshd) -> Task:
    return task_of(sshd)


def only(worker: Worker) -> NodeResult:
    """The result of a local command."""
    (result,) = worker.results()
    return result


def runs(pid: int) -> bool:
    process = process_table().get(pid)
    return process is not None and process.state != "Z"


# -- beside remote ones ------------------------------------------------------------------------------------------


def test_local_and_remote_commands_run_in_one_run(task: Task, sshd: Sshd) -> None:
    here = task.shell("echo here; exit 3", key="laptop", stdin=False)
    there = task.shell("echo there", nodes=sshd.nodes(2), stdin=False)
    task.resume()
    assert [(str(buf), nodes) for buf, nodes in task.iter_buffers()] == [
        ("there", NodeSet("127.0.1.[1-2]")),
        ("here", ["laptop"]),
    ]
    assert isinstance(next(iter(there.iter_buffers()))[1], NodeSet)
    assert task.node_buffer("laptop") == "here"
    assert task.node_retcode("laptop") == task.max_retcode() == 3
    assert dict(task.iter_retcodes()) == {0: NodeSet("127.0.1.[1-2]"), 3: ["laptop"]}
    assert dict(task.failures()) == {("running", "CommandFailed", "exit 3"): ["laptop"]}
    assert list(here.nodes) == list(here.failed) == ["laptop"]
    result = here.futures["laptop"].result()
    assert (result.node, result.outcome, result.rc, result.ran) == ("laptop", Outcome.EXITED, 3, True)
    assert all(is_well(one) for one in outcomes(there).values())
    assert here.exit_code() == 1
    assert "laptop" in repr(result)


def test_what_both_printed_is_one_entry_under_all_of_them(task: Task) -> None:
    task.shell("echo same", key="laptop", stdin=False)
    task.shell("echo same", nodes=[WELL], stdin=False)
    task.shell("echo same", key="again", stdin=False)
    task.resume()
    assert [(str(buf), list(nodes)) for buf, nodes in task.iter_buffers()] == [("same", ["laptop", WELL, "again"])]
    assert [list(nodes) for _, nodes in task.iter_buffers(["laptop", "again"])] == [["laptop", "again"]]


def test_without_a_label_the_worker_is_its_own(task: Task) -> None:
    one = task.shell("echo one", stdin=False)
    two = task.shell("echo two", stdin=False)
    task.resume()
    assert [(str(buf), nodes) for buf, nodes in task.iter_buffers()] == [("one", [one]), ("two", [two])]
    assert only(one).node is one
    assert task.node_buffer(two) == "two"
    assert "echo one" in repr(one)


def test_events_come_with_the_label(task: Task) -> None:
    told: list[tuple[Any, ...]] = []

    class Told(EventHandler):
        def ev_start(self, worker: Worker) -> None:
            told.append(("start",))

        def ev_pickup(self, worker: Worker, node: str) -> None:
            told.append(("pickup", node))

        def ev_read(self, worker: Worker, node: str, sname: str, msg: bytes) -> None:
            told.append(("read", node, sname, str(msg)))

        def ev_hup(self, worker: Worker, node: str, rc: int) -> None:
            told.append(("hup", node, rc))

        def ev_done(self, worker: Worker, node: str, result: NodeResult) -> None:
            told.append(("done", node, result.rc))

        def ev_close(self, worker: Worker, timedout: bool) -> None:
            told.append(("close", timedout))

    task.run("echo out; echo err >&2; exit 4", key="laptop", handler=Told(), stderr=True, stdin=False)
    assert sorted(told[2:4]) == [("read", "laptop", "stderr", "err"), ("read", "laptop", "stdout", "out")]
    assert told[:2] == [("start",), ("pickup", "laptop")]
    assert told[4:] == [("hup", "laptop", 4), ("done", "laptop", 4), ("close", False)]


def test_a_handler_starts_a_local_command_for_what_a_node_said(task: Task, sshd: Sshd) -> None:
    drained: list[Worker] = []

    def drain(worker: Worker, node: str, result: NodeResult) -> None:
        drained.append(task.shell(["echo", "drain", node], key=f"drain {node}", stdin=False))

    task.run("exit 1", nodes=sshd.nodes(3), on_done=drain)
    assert sorted(str(only(worker).stdout) for worker in drained) == [f"drain {node}\n" for node in sshd.nodes(3)]
    assert len(task.workers) == 4, "they are of the same run"


def test_the_fan_out_counts_local_commands_too(task: Task, tmp_path: Path) -> None:
    task.set_info("fanout", 2)
    script = f"cd {tmp_path}; touch $$; ls | wc -l; sleep 0.1; rm $$"
    for number in range(6):
        task.shell(script, key=number, stdin=False)
    task.resume()
    at_once = [int(task.node_buffer(number)) for number in range(6)]
    assert max(at_once) == 2


# -- the way a command is given ----------------------------------------------------------------------------------


def test_words_are_given_without_a_shell(task: Task) -> None:
    words = ["printf", "<%s>", "two words", "$HOME", "`id`", "*", ""]
    assert only(task.submit(words)).stdout == "<two words><$HOME><`id`><*><>"
    assert only(task.submit("echo $((6 * 7)); cd /; pwd")).stdout == "42\n/\n"
    assert only(task.submit(b"printf '\\377' | od -An -tx1")).stdout == " ff\n"


def test_standard_input_reaches_local_commands(task: Task, tmp_path: Path) -> None:
    (tmp_path / "input").write_bytes(data := os.urandom(1_000_000))
    assert only(task.submit("cat", stdin=tmp_path / "input")).stdout == data
    assert only(task.submit("cat", stdin=lambda key: key.encode(), key="laptop")).stdout == b"laptop"
    talk = task.shell("read x; echo got $x; cat", key="laptop")
    talk.write("one\ntwo")
    talk.set_write_eof("laptop")
    task.resume()
    assert only(talk).stdout == "got one\ntwo"
    with takes(0):
        assert only(task.submit("exec sleep 0.1", stdin=bytes(4 * 1024 * 1024))).rc == 0


def test_a_terminal_for_a_local_command(task: Task) -> None:
    result = only(task.submit("test -t 1 && echo out; echo err >&2; exit 5", pty=True, stdin=True))
    assert (result.rc, result.stdout, result.stderr) == (5, b"out\r\nerr\r\n", b"")


def test_what_cannot_be_started_was_not_run(task: Task) -> None:
    worker = task.shell(["/nowhere/program"], key="laptop")
    well = task.shell("true", key="well")
    task.resume()
    result = only(worker)
    assert (result.outcome, result.rc, result.ran) == (Outcome.UNREACHED, 255, False)
    assert isinstance(result.error, ExecRefused)
    assert "no such program: /nowhere/program" in result.why
    assert worker.exit_code() == 3
    assert is_well(only(well))


def test_a_signal_is_no_status_here_either(task: Task) -> None:
    killed, exited = task.submit("kill -9 $$"), task.submit("exit 137")
    assert (only(killed).outcome, only(killed).signal, only(killed).rc) == (Outcome.SIGNALED, "KILL", 137)
    assert (only(exited).outcome, only(exited).signal, only(exited).rc) == (Outcome.EXITED, None, 137)


def test_labels_and_nodes_do_not_mix(task: Task) -> None:
    with pytest.raises(OptionError, match="key"):
        task.shell("true", nodes=[WELL], key="laptop")
    with pytest.raises(UsageError, match="leave nodes out"):
        task.shell("true", nodes=None)  # type: ignore[arg-type]  # the mistake is the point
    with pytest.raises(CommandError, match="NUL"):
        task.shell("true\0", key="laptop")


# -- placeholders ------------------------------------------------------------------------------------------------


def test_placeholders_name_the_node_and_its_rank(task: Task) -> None:
    worker = run(task, "echo %h %n %{host} %{rank} 100%%", "n[1-3]", transport="local")
    assert {node: str(result.stdout) for node, result in outcomes(worker).items()} == {
        f"n{number + 1}": f"n{number + 1} {number} n{number + 1} {number} 100%\n" for number in range(3)
    }
    assert isinstance(worker.nodes, NodeSet)
    words = run(task, ["printf", "%%s;", "%h", "to-%host"], "n[1-2]", transport="local")
    assert {node: str(result.stdout) for node, result in outcomes(words).items()} == {
        "n1": "n1;to-n1;",
        "n2": "n2;to-n2;",
    }


def test_a_local_command_that_names_no_node_is_refused_on_many(task: Task, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    for command in (f"touch {mark}", f"touch {mark} %n", f"touch {mark} %%h", ["touch", str(mark)]):
        with pytest.raises(CommandError, match="would run 512 times on this machine"):
            run(task, command, "n[1-512]", transport="local")
    with pytest.raises(CommandError, match="no placeholder"):
        run(task, "echo %h %x", "n[1-2]", transport="local")
    assert not mark.exists()
    assert only(run(task, "echo once", "n1", transport="local")).stdout == "once\n", "one node is no risk"


def test_nodes_can_be_local_ones_beside_others(task: Task) -> None:
    task.node_options("n[1-2]", transport="local")
    found = outcomes(run(task, 'test -n "$SSH_CONNECTION" && echo remote || echo local # %h', f"n[1-2],{WELL}"))
    assert {node: str(result.stdout) for node, result in found.items()} == {
        "n1": "local\n",
        "n2": "local\n",
        WELL: "remote\n",
    }


# -- ends --------------------------------------------------------------------------------------------------------


def test_f06_a_timeout_ends_the_whole_session_with_term(task: Task) -> None:
    script = "trap 'echo last words; exit' TERM; sleep 50 & echo $$ $!; while :; do wait; done"
    with takes(0.5):
        worker = task.run(script, key="laptop", timeout=0.5, stdin=False)
    assert worker is not None
    result = only(worker)
    assert (result.outcome, result.rc, result.signal, result.ran) == (Outcome.TIMEOUT, None, None, True)
    assert isinstance(result.error, CommandTimeout)
    assert result.remote_state == "gone"
    assert result.phase == "running"
    first, last = result.stdout.lines()
    assert last == "last words"
    assert not any(runs(int(pid)) for pid in first.split())
    assert list(task.iter_keys_timeout()) == ["laptop"]


def test_f06_who_ignores_term_is_killed_after_its_grace(task: Task) -> None:
    script = "trap '' TERM; sleep 50 & echo $$ $!; wait; sleep 50"
    with takes(0.8):
        worker = task.run(script, key="laptop", timeout=0.4, stop_grace=0.4, stdin=False)
    assert worker is not None
    result = only(worker)
    assert (result.outcome, result.remote_state) == (Outcome.TIMEOUT, "gone")
    assert not any(runs(int(pid)) for pid in result.stdout.split())


def test_an_abort_ends_local_commands_and_their_children(task: Task) -> None:
    worker = task.shell("sleep 50 & echo $$ $!; wait", key="laptop", stdin=False)
    well = task.shell("echo fine", key="well", stdin=False)
    worker.on("read", lambda worker, node, sname, msg: worker.abort())
    with takes(0):
        task.resume()
    result = only(worker)
    assert (result.outcome, result.rc, result.remote_state) == (Outcome.ABORTED, None, "gone")
    assert not any(runs(int(pid)) for pid in result.stdout.split())
    assert is_well(only(well))


def test_an_abort_does_not_wait_for_who_ignores_term(task: Task) -> None:
    worker = task.shell("trap '' TERM; echo $$; while :; do sleep 50; done", key="stubborn", stdin=False)
    aborted_at: list[float] = []

    def abort(worker: Worker, node: str, sname: str, msg: Any) -> None:
        aborted_at.append(time.monotonic())
        task.abort()

    worker.on("read", abort)
    task.resume()
    assert time.monotonic() - aborted_at[0] <= 2, "as it is promised"
    result = only(worker)
    assert result.outcome is Outcome.ABORTED
    assert result.remote_state in ("unknown", "alive")
    pid = int(result.stdout)
    assert runs(pid), "its grace of 5 s is not over"
    os.killpg(pid, signal.SIGKILL)


def test_a_cancelled_local_command_is_ended(task: Task) -> None:
    worker = task.submit("echo $$; exec sleep 50", key="laptop")
    future = worker.futures["laptop"]
    wait_until(lambda: worker.node_buffer("laptop"), what="it runs")
    assert future.cancel()
    error = future.exception()
    assert error is not None
    assert future.cancelled()
    assert not runs(int(worker.node_buffer("laptop")))
    assert not future.cancel(), "it is done"


def test_the_deadline_of_a_run_ends_local_commands_within_a_second(task: Task) -> None:
    script = "trap '' TERM; echo $$; while :; do sleep 50; done"
    told: list[str] = []
    stubborn = task.shell(script, key="stubborn", stdin=False, on_close=lambda worker, timedout: told.append("close"))
    stubborn.on("done", lambda worker, node, result: told.append(result.outcome))
    meek = task.shell("echo $$; exec sleep 50", key="meek", stdin=False)
    with takes(0.4), pytest.raises(TaskTimeout):
        task.resume(0.4)
    assert stubborn.futures["stubborn"].done(), "a run that has returned leaves nobody without an outcome"
    assert told == ["TIMEOUT", "close"], "nor without the events of its end"
    assert only(stubborn).outcome is only(meek).outcome is Outcome.TIMEOUT
    assert only(meek).remote_state == "gone"
    assert only(stubborn).remote_state in ("unknown", "alive"), "the promise comes before the grace"
    pid = int(only(stubborn).stdout)
    assert runs(pid), "its grace of 5 s is not over"
    watcher().call(lambda: time.sleep(0.2))  # who reaps is busy when the command ends
    os.killpg(pid, signal.SIGKILL)
    assert close_everything()
    with pytest.raises(ChildProcessError):  # no zombie is left
        os.waitpid(pid, os.WNOHANG)


def test_f05_what_a_local_command_leaves_behind_stays(task: Task) -> None:
    with takes(0.4):
        worker = task.run("sleep 50 & echo $!; exit 7", key="laptop", drain_timeout=0.4, stdin=False)
    assert worker is not None
    result = only(worker)
    assert (result.outcome, result.rc, result.lingering, result.remote_state) == (Outcome.EXITED, 7, True, None)
    pid = int(result.stdout)
    assert runs(pid)
    os.kill(pid, signal.SIGKILL)


def test_a_hundred_local_commands_beside_nodes_that_are_busy(task: Task, sshd: Sshd) -> None:
    busy = task.submit("read x; echo $x", nodes=sshd.nodes(2), stdin=True)
    seen: set[str] = set()

    def count(worker: Worker, node: str, result: NodeResult) -> None:
        assert threading.current_thread() is task.thread
        seen.add(str(result.stdout))
        if len(seen) == 100:
            busy.write("over\n")

    for number in range(100):
        task.shell(f"echo {number}", key=number, on_done=count, stdin=False)
    task.resume()
    assert seen == {f"{number}\n" for number in range(100)}
    assert [result.stdout for result in outcomes(busy).values()] == [b"over\n"] * 2
