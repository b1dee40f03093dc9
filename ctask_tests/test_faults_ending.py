# SPDX-License-Identifier: Apache-2.0
"""How jobs end, through a task: statuses, signals, losses, lingering output, and time that is up.

The rows F01, F02, F03, F05 and F06 of the fault matrix, on the real sshd and on hostile servers, each with a healthy
node beside the sick one. Runs in the thread of pytest. What a command leaves running on the sshd is ended by the test.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from ctask import (
    CommandFailed,
    CommandTimeout,
    ConnectionLost,
    ConnectRefused,
    EventHandler,
    NodeResult,
    Outcome,
    Task,
    TaskTimeout,
    Worker,
)
from ctask.ending import TIMEOUT_WITHIN
from ctask_tests.fix_hostile import Close, Eof, Out, Pause, Script, Signal, Status
from ctask_tests.fix_leaks import wait_until
from ctask_tests.fix_proxy import AtBytes, Delay, OnMessage, Rule, Stall, closed_port, deaf, silent
from ctask_tests.real_nodes import LATE, WELL, is_well, outcomes, reach, run, takes, task_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ctask_tests.fix_hostile import HostileFactory
    from ctask_tests.fix_proxy import ProxyFactory
    from ctask_tests.fix_sshd import Sshd, SshdFactory


@pytest.fixture
def task(sshd: Sshd) -> Iterator[Task]:
    yield task_of(sshd)
    for pid in sshd.processes():  # what lingers on purpose
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


class Ends(EventHandler):
    """Records how each node's job ended, in the order in which that is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []

    def ev_hup(self, worker: Worker, node: str, rc: int) -> None:
        self.told.append(("hup", (node, rc)))

    def ev_done(self, worker: Worker, node: str, result: NodeResult) -> None:
        self.told.append(("done", node))

    def ev_close(self, worker: Worker, timedout: bool) -> None:
        self.told.append(("close", timedout))


# -- F01, F02: statuses and signals ------------------------------------------------------------------------------


def test_f01_statuses_are_exact_and_255_is_one_of_them(task: Task) -> None:
    codes = {WELL: 0, **{f"n{code}": code for code in (1, 126, 127, 143, 255)}}
    for number, node in enumerate(codes, 1):
        task.node_options(node, address=f"127.0.1.{number}")
    ends = Ends()
    script = "case $SSH_CONNECTION in *' 127.0.1.%d '*) exit %d;; esac"
    command = "; ".join(script % (number, code) for number, code in enumerate(codes.values(), 1))
    with closed_port() as (address, port):
        task.node_options("gone", address=address, port=port)
        worker = run(task, command, [*codes, "gone"], handler=ends)
    found = outcomes(worker)
    gone = found["gone"]
    assert {node: found[node].rc for node in codes} == codes
    for node, code in codes.items():
        result = found[node]
        assert (result.outcome, result.signal, result.error, result.ran) == (Outcome.EXITED, None, None, True)
        assert result.ok is (code == 0)
        assert result.why == ("" if code == 0 else f"exit {code}")
        assert ("hup", (node, code)) in ends.told
    assert (gone.outcome, gone.rc, gone.ran) == (Outcome.UNREACHED, 255, False), "255 as well, and told apart"
    assert task.max_retcode() == 255
    assert {code: str(nodes) for code, nodes in task.iter_retcodes()} == {
        **{code: node for node, code in codes.items()},
        255: "gone,n255",
    }
    assert worker.exit_code() == 3


def test_f01_a_status_that_is_said_to_be_fine_is(task: Task) -> None:
    worker = run(task, "exit 3", [WELL], ok_codes={0, 3}, check=True)
    assert (outcomes(worker)[WELL].ok, str(worker.ok), worker.exit_code()) == (True, WELL, 0)
    strict = run(task, "exit 3", [WELL])
    assert (str(strict.failed), strict.exit_code()) == (WELL, 1)
    with pytest.raises(CommandFailed, match=r"^well: exit 3$"):
        outcomes(strict)[WELL].check()


@pytest.mark.parametrize(("name", "number"), [("TERM", 15), ("KILL", 9), ("SEGV", 11)])
def test_f02_a_signal_is_told_by_name_and_not_as_a_status(task: Task, name: str, number: int) -> None:
    killed = task.shell(f"echo so far; kill -{name} $$; echo never", nodes=[WELL, "127.0.1.2"], stdin=False)
    exited = task.shell(f"exit {128 + number}", nodes=[WELL], stdin=False)
    task.resume()
    for result in outcomes(killed).values():
        assert (result.outcome, result.signal, result.rc) == (Outcome.SIGNALED, name, 128 + number)
        assert (result.ran, result.ok, result.error) == (True, False, None)
        assert result.why == f"killed by SIG{name}"
        assert result.stdout == b"so far\n"
    plain = outcomes(exited)[WELL]
    assert (plain.outcome, plain.signal, plain.rc) == (Outcome.EXITED, None, 128 + number)
    assert killed.exit_code() == 1


@pytest.mark.parametrize(
    ("sent", "rc"), [(Signal("SEGV", core=True, message="(core dumped)"), 139), (Signal("FOO@x"), 128)]
)
def test_f02_any_signal_is_kept_by_its_name(task: Task, hostile: HostileFactory, sent: Signal, rc: int) -> None:
    reach(task, "sick", hostile(Script(steps=(Out(b"so far\n"), sent, Eof(), Close()))))
    found = outcomes(run(task, "true", ["sick", WELL]))
    sick = found["sick"]
    assert (sick.outcome, sick.signal, sick.rc, sick.ok) == (Outcome.SIGNALED, sent.name, rc, False)
    assert sick.stdout == b"so far\n"
    assert is_well(found[WELL])


def test_f02_what_came_first_stands_where_a_node_says_both(task: Task, hostile: HostileFactory) -> None:
    reach(task, "sick1", hostile(Script(steps=(Status(3), Signal("KILL"), Eof(), Close()))))
    reach(task, "sick2", hostile(Script(steps=(Signal("KILL"), Status(3), Eof(), Close()))))
    found = outcomes(run(task, "true", ["sick1", "sick2", WELL]))
    assert (found["sick1"].outcome, found["sick1"].rc) == (Outcome.EXITED, 3)
    assert (found["sick2"].outcome, found["sick2"].rc) == (Outcome.SIGNALED, 137)
    assert is_well(found[WELL])


# -- F03: sshd dies ----------------------------------------------------------------------------------------------


def test_f03_a_killed_session_is_a_loss_with_what_was_said_until_then(task: Task, sshd: Sshd) -> None:
    ends = Ends()
    dead = "127.0.1.3"
    heard: list[str] = []

    def kill(worker: Worker, node: str, sname: str, msg: Any) -> None:
        heard.append(node)
        if len(heard) == 3:
            assert sshd.kill_session(dead) == 1
            first.set_write_eof(WELL)

    first = task.shell("echo so far; cat; echo end", nodes=[dead, WELL], handler=ends, on_read=kill)
    other = task.shell("echo so far; exec sleep 50", nodes=[dead], stdin=False, on_read=kill)
    task.resume()
    for result in (outcomes(first)[dead], outcomes(other)[dead]):
        assert (result.outcome, result.rc, result.ran, result.phase) == (Outcome.LOST, 255, None, "running")
        assert isinstance(result.error, ConnectionLost)
        assert result.error.result is result
        assert len(result.attempts) == 1, "what may have run is not tried again"
        assert result.stdout == b"so far\n"
    assert outcomes(first)[WELL].stdout == b"so far\nend\n"
    assert is_well(outcomes(first)[WELL])
    assert ends.told.count(("hup", (dead, 255))) == 1
    assert ends.told.count(("done", dead)) == 1
    assert ends.told[-1] == ("close", False)
    assert str(first.not_run) == "", "nobody knows what ran"
    again = run(task, "echo back", [dead])
    assert is_well(outcomes(again)[dead])


def test_f03_a_killed_master_leaves_what_runs_and_refuses_what_is_new(task: Task, sshd_factory: SshdFactory) -> None:
    server = sshd_factory()
    task.node_options("old", address=server.address(2), **server.options())
    task.node_options("new", address=server.address(3), **server.options())
    dials: list[Worker] = []

    def kill(worker: Worker, node: str, sname: str, msg: Any) -> None:
        server.kill_master()
        dials.append(task.shell("true", nodes=["new", WELL], stdin=False))
        worker.write("go on\n")
        worker.set_write_eof()

    worker = task.shell("echo ready; read x; sleep 0.1; exit 4", nodes=["old"], on_read=kill)
    task.resume()
    (late,) = dials
    assert (outcomes(worker)["old"].outcome, outcomes(worker)["old"].rc) == (Outcome.EXITED, 4)
    refused = outcomes(late)["new"]
    assert (refused.outcome, refused.phase, refused.ran) == (Outcome.UNREACHED, "tcp", False)
    assert isinstance(refused.error, ConnectRefused)
    assert is_well(outcomes(late)[WELL])
    kept = run(task, "echo still here", ["old"])
    assert is_well(outcomes(kept)["old"]), "a connection that was kept needs no master"


# -- F05: who holds the output -----------------------------------------------------------------------------------


def test_f05_what_lingers_does_not_hold_the_job(task: Task, sshd: Sshd) -> None:
    with takes(0.5):
        found = outcomes(
            run(task, "echo before; sleep 50 & echo $! >&2; exit 7", [WELL, "127.0.1.2"], drain_timeout=0.5)
        )
    for result in found.values():
        assert (result.outcome, result.rc, result.lingering) == (Outcome.EXITED, 7, True)
        assert result.stdout == b"before\n"
        assert 0.5 <= result.timings["closing"] <= 0.5 + LATE
        assert int(result.stderr) in sshd.processes(), "nothing of it is ended"
    assert is_well(outcomes(run(task, "true", [WELL]))[WELL]), "the connection serves on"


def test_f05_what_holds_no_output_costs_no_time(task: Task, sshd: Sshd) -> None:
    with takes(0):
        worker = run(task, "sleep 50 >/dev/null 2>&1 & echo $!; exit 7", [WELL], drain_timeout=20)
    result = outcomes(worker)[WELL]
    assert (result.outcome, result.rc, result.lingering) == (Outcome.EXITED, 7, False)
    assert int(result.stdout) in sshd.processes()


def test_f05_the_quiet_end_counts_from_the_last_byte(task: Task, hostile: HostileFactory) -> None:
    late: list[Pause | Out] = []
    for byte in b"tail":
        late += [Pause(0.25), Out(bytes([byte]))]
    reach(task, "sick", hostile(Script(steps=(Status(7), *late, Pause(20)))))
    with takes(1.5):
        found = outcomes(run(task, "true", ["sick", WELL], drain_timeout=0.5))
    sick = found["sick"]
    assert (sick.outcome, sick.rc, sick.stdout, sick.lingering) == (Outcome.EXITED, 7, b"tail", True)
    assert is_well(found[WELL])


# -- F06: time is up ---------------------------------------------------------------------------------------------


def check_timed_out(task: Task, worker: Worker, found: dict[str, NodeResult], ends: Ends) -> None:
    """What holds of every job in `found` that timed out, in whatever phase."""
    for node, result in found.items():
        assert (result.outcome, result.rc, result.signal, result.ok) == (Outcome.TIMEOUT, None, None, False), node
        assert isinstance(result.error, CommandTimeout)
        assert not isinstance(result.error, TimeoutError), "that one means the waiter's own time"
        assert result.error.phase == result.phase
        assert not any(name == "hup" and what[0] == node for name, what in ends.told)
        assert ends.told.count(("done", node)) == 1
        with pytest.raises(KeyError):
            task.node_retcode(node)
        with pytest.raises(CommandTimeout):
            worker.result(node)
    assert sorted(task.iter_keys_timeout()) == sorted(found)
    assert task.num_timeout() == len(found) == len(worker.timedout)
    assert ends.told[-1] == ("close", True)
    assert worker.did_timeout()


def test_f06_the_deadline_ends_a_job_in_whatever_phase_it_is(
    task: Task, sshd: Sshd, hostile: HostileFactory, fault_proxy: ProxyFactory
) -> None:
    proxy = fault_proxy((sshd.address(3), sshd.port), Rule("down", OnMessage(31), Stall()))
    task.node_options("kex", address=proxy.address, **sshd.options(via=(proxy.address, proxy.port)))
    reach(task, "open", hostile(Script(on_open="silent")))
    reach(task, "exec", hostile(Script(on_exec="silent")))
    task.node_options("running", address=sshd.address(2))
    phases = ["tcp", "banner", "kex", "open", "exec", "running"]
    ends = Ends()
    with deaf() as nobody, silent() as mute:
        task.node_options("tcp", address=nobody[0], port=nobody[1])
        task.node_options("banner", address=mute[0], port=mute[1])
        command = "echo said; case $SSH_CONNECTION in *127.0.1.2*) exec sleep 50;; esac"
        worker = task.shell(command, nodes=[*phases, WELL], stdin=False, handler=ends)
        with takes(1), pytest.raises(TaskTimeout, match="deadline of 1 s"):
            task.resume(1)
    found = dict(outcomes(worker))
    assert is_well(found.pop(WELL))
    check_timed_out(task, worker, found, ends)
    assert {node: result.phase for node, result in found.items()} == {phase: phase for phase in phases}
    ran = {"exec": None, "running": True}
    assert {node: result.ran for node, result in found.items()} == {phase: ran.get(phase, False) for phase in phases}
    for node, result in found.items():
        assert result.timings.total >= 1
        assert (result.remote_state is None) is (node not in ran), "told of what was stopped, and of nothing else"
        assert result.stdout == (b"said\n" if node == "running" else b"")
    assert "deadline of 1 s" in found["running"].why


def test_f06_the_deadline_ends_what_waits_for_its_turn(task: Task, sshd: Sshd) -> None:
    task.set_info("fanout", 1)
    holder, waiter = sshd.nodes(2, 2)
    ends = Ends()
    waiting: list[Worker] = []

    def queue(worker: Worker, node: str, sname: str, msg: Any) -> None:
        waiting.append(task.shell("true", nodes=[waiter], stdin=False, handler=ends))

    first = task.shell("echo has the slot; exec sleep 50", nodes=[holder], stdin=False, on_read=queue)
    with takes(1), pytest.raises(TaskTimeout):
        task.resume(1)
    assert (outcomes(first)[holder].outcome, outcomes(first)[holder].phase) == (Outcome.TIMEOUT, "running")
    waited = outcomes(waiting[0])[waiter]
    assert (waited.outcome, waited.phase, waited.ran) == (Outcome.TIMEOUT, "queued", False)
    assert ends.told == [("done", waiter), ("close", True)]
    assert (str(waiting[0].not_run), task.num_timeout()) == (waiter, 2)
    assert all(is_well(result) for result in outcomes(run(task, "true", [waiter, WELL])).values()), "the slot is free"


def test_f06_a_silent_command_is_ended_by_its_timeout(task: Task) -> None:
    ends = Ends()
    task.node_options("sick", address="127.0.1.2")
    command = "printf partial; case $SSH_CONNECTION in *127.0.1.2*) exec sleep 50;; esac"
    with takes(0.5):
        worker = run(task, command, ["sick", WELL], handler=ends, timeout=0.5)
    found = dict(outcomes(worker))
    assert is_well(found.pop(WELL))
    check_timed_out(task, worker, found, ends)
    sick = found["sick"]
    assert (sick.phase, sick.ran, sick.stdout) == ("running", True, b"partial")
    assert sick.remote_state in ("gone", "unknown")
    assert 0.5 <= sick.timings["running"] <= 0.5 + LATE
    assert "timeout after 0.5 s" in sick.why
    assert sick.error is not None
    assert sick.error.result is sick
    assert worker.exit_code() == 3


@pytest.mark.load
def test_f06_a_flood_is_ended_by_its_timeout(task: Task, sshd: Sshd) -> None:
    ends = Ends()
    got: list[int] = []
    task.node_options("sick", address="127.0.1.2")
    line = "y" * 1023
    worker = task.shell(f"exec yes {line}", nodes=["sick"], stdin=False, handler=ends, gather=False, timeout=0.5)
    worker.on("read", lambda worker, node, sname, msg: got.append(len(msg)))
    well = task.shell("sleep 0.2; echo fine", nodes=[WELL], stdin=False, timeout=5)
    with takes(0.5, late=TIMEOUT_WITHIN + LATE):
        task.resume()
    found = dict(outcomes(worker))
    check_timed_out(task, worker, found, ends)
    # To end it takes its node some time, the more the busier that is: with a flood, and all else that runs there.
    assert 0.5 <= found["sick"].timings["running"] <= 0.5 + TIMEOUT_WITHIN + 0.5, "promised: 2 s from the timeout on"
    assert (found["sick"].phase, found["sick"].ran) == ("running", True)
    assert set(got) == {1023}, "whole lines, and of the flood's"
    assert is_well(outcomes(well)[WELL])
    assert outcomes(well)[WELL].timings.total < 1.5, "who floods delays nobody"
    wait_until(lambda: not any("yes" in title for title in sshd.processes().values()), what="the flood is over")


def test_f06_who_lingers_is_ended_by_the_timeout_too(task: Task) -> None:
    ends = Ends()
    task.node_options("sick", address="127.0.1.2")
    command = "echo said; case $SSH_CONNECTION in *127.0.1.2*) sleep 50 & exit 7;; esac"
    with takes(0.5):
        worker = run(task, command, ["sick", WELL], handler=ends, timeout=0.5, drain_timeout=20)
    found = dict(outcomes(worker))
    assert is_well(found.pop(WELL))
    check_timed_out(task, worker, found, ends)
    assert (found["sick"].phase, found["sick"].ran, found["sick"].stdout) == ("closing", True, b"said\n")


def test_f06_the_wait_for_a_turn_is_not_the_commands_time(task: Task, sshd: Sshd) -> None:
    task.set_info("fanout", 1)
    results = outcomes(run(task, "sleep 0.4", sshd.nodes(3), timeout=1)).values()
    assert all(is_well(result) for result in results)
    assert max(result.timings.total for result in results) >= 1.2, "of which the last one waited for 0.8"


def test_f06_the_way_to_a_node_is_not_the_commands_time(task: Task, sshd: Sshd, fault_proxy: ProxyFactory) -> None:
    proxy = fault_proxy((sshd.address(3), sshd.port), Rule("down", AtBytes(0), Delay(0.1)))
    task.node_options("far", address=proxy.address, **sshd.options(via=(proxy.address, proxy.port)))
    result = outcomes(run(task, "true", ["far", WELL], timeout=0.4))["far"]
    assert is_well(result)
    assert result.timings.total > 0.4, "it took longer than the command's time, and was not timed out"
