# SPDX-License-Identifier: Apache-2.0
"""Kept connections as the user of a Task sees them: how many logins a node hears of, and when they end.

Runs in the thread of pytest, over the public Task API; logins are counted in the log of a real sshd.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from ctask import AuthRejected, ConnectionLost, HandshakeTimeout, Outcome, Task, Worker
from ctask_tests.fix_hostile import HangUp, Script
from ctask_tests.fix_leaks import wait_until
from ctask_tests.fix_proxy import OnEvent, OnMessage, Resume, Rule, Stall
from ctask_tests.fix_sshd import make_key
from ctask_tests.sick_node import SICK, WELL, Course, accepted, dialogues, takes, task_for, tried_keys

if TYPE_CHECKING:
    from pathlib import Path

    from ctask_tests.fix_hostile import HostileFactory
    from ctask_tests.fix_proxy import ProxyFactory
    from ctask_tests.fix_sshd import Sshd

#: The address of the node that all commands here run on.
NODE = 30


class Log:
    """What sshd has logged of one node from now on."""

    def __init__(self, sshd: Sshd, node: int = NODE) -> None:
        self._sshd = sshd
        self._address = sshd.address(node)
        self._since = len(sshd.log())

    @property
    def logins(self) -> int:
        return accepted(self._sshd, self._address, self._since)

    @property
    def connections(self) -> int:
        return len(dialogues(self._sshd, self._address, self._since))

    def tried(self) -> list[list[str]]:
        return tried_keys(self._sshd, self._address, self._since)

    def wait_over(self) -> None:
        """Wait until the node has no connection any more."""
        wait_until(lambda: not self._sshd.sessions(self._address), what="the connection is closed")


def ready(sshd: Sshd, **options: Any) -> Task:
    return task_for(sshd, well=0, sick={"address": sshd.address(NODE)}, **options)


def cats(sshd: Sshd) -> int:
    """How many of the commands that wait for their standard input run."""
    return sum(title == "cat" for title in sshd.processes().values())


def start_cats(task: Task, count: int, **options: Any) -> list[Worker]:
    return [task.submit("exec cat", nodes=SICK, stdin=True, **options) for _ in range(count)]


def end_all(workers: list[Worker]) -> None:
    for worker in workers:
        worker.set_write_eof()
    for worker in workers:
        assert worker.wait(10)
        assert [result.rc for result in worker.results()] == [0]


# --- shared


def test_one_login_serves_one_command_after_another(sshd: Sshd) -> None:
    log, task = Log(sshd), ready(sshd)
    for number in range(5):
        worker = task.run(f"echo {number}", nodes=SICK)
        assert worker is not None
        assert worker.node_buffer(SICK) == str(number)
    assert log.logins == log.connections == 1


def test_commands_that_come_while_a_connection_is_made_wait_for_it(sshd: Sshd) -> None:
    log, task = Log(sshd), ready(sshd)
    workers = [task.submit(f"echo {number}", nodes=SICK) for number in range(8)]
    task.resume()
    assert [worker.node_buffer(SICK) for worker in workers] == [str(number) for number in range(8)]
    assert log.logins == log.connections == 1


def test_a_connection_carries_eight_commands_then_there_is_another(sshd: Sshd) -> None:
    log, task = Log(sshd), ready(sshd)
    workers = start_cats(task, 8)
    wait_until(lambda: cats(sshd) == 8)
    assert log.logins == 1
    workers += start_cats(task, 1)
    wait_until(lambda: cats(sshd) == 9)
    assert log.logins == 2
    end_all(workers)
    # What follows finds room on these two.
    workers = start_cats(task, 16)
    wait_until(lambda: cats(sshd) == 16)
    assert log.logins == log.connections == 2
    end_all(workers)


def test_a_place_is_given_back_with_the_outcome(sshd: Sshd) -> None:
    log, task = Log(sshd), ready(sshd)
    workers = start_cats(task, 8)
    wait_until(lambda: cats(sshd) == 8)
    end_all(workers[:1])
    assert task.submit("true", nodes=SICK).wait(10)
    assert log.logins == 1
    end_all(workers[1:])


def test_tasks_share_connections(sshd: Sshd) -> None:
    log, mine = Log(sshd), ready(sshd)
    mine.run("true", nodes=SICK)
    other = Task()
    for name, value in sshd.options().items():
        other.set_info(name, value)
    worker = other.submit("echo shared", nodes=sshd.address(NODE))  # by another name of the same target
    assert worker.wait(10)
    assert worker.node_buffer(sshd.address(NODE)) == "shared"
    assert log.logins == 1


def test_another_policy_is_another_connection(sshd: Sshd) -> None:
    log, task = Log(sshd), ready(sshd)
    for policy in ("insecure-ignore", "verify", "insecure-ignore", "verify"):
        task.run("true", nodes=SICK, host_key_policy=policy)
    assert log.logins == 2


# --- one in the making


def test_three_commands_with_a_refused_key_are_one_refused_login(sshd: Sshd, tmp_path: Path) -> None:
    log, task = Log(sshd), ready(sshd, identity=make_key(tmp_path / "wrong"))
    workers = [task.submit(f"echo {number}", nodes=SICK) for number in range(3)]
    task.resume()
    errors = [worker.futures[SICK].exception() for worker in workers]
    assert [type(error) for error in errors] == [AuthRejected] * 3
    assert len({id(error) for error in errors}) == 3  # each has its own, with its own result
    for worker, error in zip(workers, errors, strict=True):
        assert isinstance(error, AuthRejected)
        assert error.result is next(worker.results())
        assert len(error.attempts) == 1
    assert log.tried() == [["publickey"]]


def test_each_command_leaves_a_connection_in_the_making_at_its_own_deadline(
    sshd: Sshd, fault_proxy: ProxyFactory
) -> None:
    go_on = threading.Event()
    proxy = fault_proxy(
        (sshd.address(NODE), sshd.port), Rule("down", OnMessage(20), Stall()), Rule("down", OnEvent(go_on), Resume())
    )
    task = task_for(sshd, sick={**sshd.options(via=proxy.endpoint), "address": proxy.address}, fanout=2)
    taken_back = task.submit("echo back", nodes=SICK)
    patient = task.submit("echo patient", nodes=SICK)
    # Not before it stands still: on a busy machine that takes longer than the short one waits.
    wait_until(lambda: any(passage.struck for passage in proxy.passages), what="the handshake stands still")
    with takes(0.5):
        short = task.submit("echo short", nodes=SICK, connect_timeout=0.5)
        assert short.wait(10)
    taken_back.abort()
    assert taken_back.wait(2)
    assert not patient.done()
    go_on.set()
    assert patient.wait(10)
    (left,), (aborted,), (ran,) = (list(worker.results()) for worker in (short, taken_back, patient))
    assert (type(left.error), left.outcome, left.phase) == (HandshakeTimeout, Outcome.UNREACHED, "kex")
    assert (aborted.outcome, aborted.phase, aborted.ran) == (Outcome.ABORTED, "kex", False)
    assert (ran.stdout, ran.error) == (b"patient\n", None)
    assert proxy.connections == 1


def test_the_last_one_that_leaves_ends_the_connection_in_the_making(sshd: Sshd, fault_proxy: ProxyFactory) -> None:
    log = Log(sshd)
    proxy = fault_proxy((sshd.address(NODE), sshd.port), Rule("down", OnMessage(20), Stall()))
    task = task_for(sshd, sick={**sshd.options(via=proxy.endpoint), "address": proxy.address})
    workers = [task.submit("echo never", nodes=SICK, connect_timeout=limit) for limit in (0.3, 0.6)]
    with takes(0.5):
        task.resume()
    assert [worker.futures[SICK].done() for worker in workers] == [True, True]
    assert log.tried() == [[]]
    assert proxy.connections == 1


def test_a_dead_node_fails_for_all_that_wait_for_it(sshd: Sshd, fault_proxy: ProxyFactory) -> None:
    proxy = fault_proxy((sshd.address(NODE), sshd.port), Rule("down", OnMessage(20), Stall()))
    task = task_for(sshd, sick={**sshd.options(via=proxy.endpoint), "address": proxy.address}, retry=None)
    workers = [task.submit("echo never", nodes=SICK) for _ in range(3)]
    wait_until(lambda: proxy.live == 1)
    wait_until(lambda: all(job.phase == "kex" for worker in workers for job in worker.jobs))
    proxy.cut()
    task.resume()
    failures = [list(worker.failures()) for worker in workers]
    assert failures == [[("kex", "HandshakeError", failures[0][0][2])]] * 3
    assert proxy.connections == 1


# --- lost


def test_a_connection_that_was_lost_while_idle_is_made_anew(sshd: Sshd) -> None:
    log, task = Log(sshd), ready(sshd)
    task.run("true", nodes=SICK)
    assert sshd.kill_session(sshd.address(NODE)) > 0
    worker = task.run("echo again", nodes=SICK)
    assert worker is not None
    (result,) = worker.results()
    assert (result.outcome, result.stdout, len(result.attempts)) == (Outcome.EXITED, b"again\n", 1)
    assert log.logins == 2


def test_a_kept_connection_that_fails_before_exec_is_replaced(sshd: Sshd, hostile: HostileFactory) -> None:
    server = hostile(Script(honest=1, on_open="hang_up"), Script())
    task = task_for(sshd, sick={**server.options(), "address": server.address})
    assert Course(task, [SICK, WELL], "echo first").end().result(SICK).rc == 0
    workers = [task.submit("echo second", nodes=SICK) for _ in range(3)]
    task.resume()
    for worker in workers:
        (result,) = worker.results()
        assert (result.outcome, result.rc, result.ran, len(result.attempts)) == (Outcome.EXITED, 0, True, 1)
    assert server.connections == 2  # one new connection for all three
    assert server.seen.commands == [b"echo first"] + [b"echo second"] * 3


def test_a_connection_is_replaced_once_and_not_for_ever(sshd: Sshd, hostile: HostileFactory) -> None:
    server = hostile(Script(honest=1, on_open="hang_up"), Script(on_open="hang_up"))
    task = task_for(sshd, sick={**server.options(), "address": server.address})
    Course(task, [SICK, WELL], "echo first").end()
    sick = Course(task, [SICK, WELL]).end().sick
    assert (type(sick.error), sick.outcome, sick.phase, sick.ran) == (
        ConnectionLost,
        Outcome.UNREACHED,
        "open",
        False,
    )
    assert (server.connections, server.seen.commands) == (2, [b"echo first"])


def test_the_replacement_that_cannot_be_made_is_told_as_it_is(sshd: Sshd, fault_proxy: ProxyFactory) -> None:
    proxy = fault_proxy((sshd.address(NODE), sshd.port), Rule("down", OnMessage(20), Stall(), only=1))
    task = task_for(sshd, sick={**sshd.options(via=proxy.endpoint), "address": proxy.address})
    assert Course(task, [SICK, WELL]).end().sick.ok
    proxy.cut()
    with takes(1.0):
        sick = Course(task, [SICK, WELL], connect_timeout=1.0).end().sick
    assert (type(sick.error), sick.outcome, sick.phase, sick.ran) == (
        HandshakeTimeout,
        Outcome.UNREACHED,
        "kex",
        False,
    )


def test_a_lost_connection_takes_all_its_commands_and_no_other(sshd: Sshd) -> None:
    log, task = Log(sshd), ready(sshd)
    task.node_options(WELL, address=sshd.address(NODE + 1))
    bystander = task.submit("exec cat", nodes=WELL, stdin=True)
    workers = start_cats(task, 3)
    wait_until(lambda: cats(sshd) == 4)
    sshd.kill_session(sshd.address(NODE))
    for worker in workers:
        (result,) = worker.results()
        assert (type(result.error), result.outcome, result.rc) == (ConnectionLost, Outcome.LOST, 255)
        assert (result.ran, result.phase) == (None, "running")
    assert not bystander.done()
    bystander.set_write_eof()
    assert bystander.wait(10)
    assert str(bystander.ok) == WELL
    assert log.logins == 1  # what may have run is not sent again


def test_a_connection_that_dies_under_a_command_is_not_used_again(sshd: Sshd, hostile: HostileFactory) -> None:
    server = hostile(Script(steps=(HangUp(),)), Script())
    task = task_for(sshd, sick={**server.options(), "address": server.address})
    outcomes = [Course(task, [SICK, WELL]).end().result(SICK).outcome for _ in range(3)]
    assert outcomes == [Outcome.LOST, Outcome.EXITED, Outcome.EXITED]
    assert server.connections == 2


# --- kept for how long


def test_an_idle_connection_is_kept_for_keep_seconds(sshd: Sshd) -> None:
    log, task = Log(sshd), ready(sshd, keep=1.0)
    task.run("true", nodes=SICK)
    began = time.monotonic()
    task.run("true", nodes=SICK)
    idle_by = time.monotonic()
    log.wait_over()
    gone = time.monotonic()
    assert gone - began >= 1.0
    assert gone - idle_by <= 2.0
    assert log.logins == 1
    task.run("true", nodes=SICK)
    assert log.logins == 2


def test_a_busy_connection_is_kept_for_as_long_as_it_is(sshd: Sshd) -> None:
    log, task = Log(sshd), ready(sshd, keep=0.2)
    workers = start_cats(task, 1)
    wait_until(lambda: cats(sshd) == 1)
    busy_until = time.monotonic() + 0.6
    while time.monotonic() < busy_until:
        assert task.submit("true", nodes=SICK).wait(10)
    assert log.logins == 1
    end_all(workers)
    log.wait_over()


def test_keep_0_closes_a_connection_with_its_last_command(sshd: Sshd) -> None:
    log, task = Log(sshd), ready(sshd, keep=0)
    for count in (1, 2):
        task.run("true", nodes=SICK)
        with takes(0.0):
            log.wait_over()
        assert log.logins == count


# --- ended by choice


def test_disconnect_closes_the_connections_to_these_nodes_alone(sshd: Sshd) -> None:
    log, task = Log(sshd), ready(sshd)
    other = Log(sshd, NODE + 1)
    task.node_options(WELL, address=sshd.address(NODE + 1))
    nodes = [SICK, WELL]
    task.run("true", nodes=nodes)
    task.disconnect(SICK)
    log.wait_over()
    assert sshd.sessions(sshd.address(NODE + 1))
    task.run("true", nodes=nodes)
    assert (log.logins, other.logins) == (2, 1)
    task.disconnect()
    log.wait_over()
    other.wait_over()


def test_disconnect_closes_them_whatever_options_they_were_made_with(sshd: Sshd) -> None:
    log, task = Log(sshd), ready(sshd)
    task.run("true", nodes=SICK, host_key_policy="insecure-ignore")
    task.run("true", nodes=SICK, keep=50)
    task.disconnect(SICK)
    log.wait_over()
    assert log.logins == 2


def test_disconnect_lets_what_runs_come_to_its_end(sshd: Sshd) -> None:
    log, task = Log(sshd), ready(sshd)
    workers = start_cats(task, 2)
    wait_until(lambda: cats(sshd) == 2)
    task.disconnect(SICK)
    assert task.submit("true", nodes=SICK).wait(10)
    assert log.logins == 2  # nothing new on the one that goes
    assert cats(sshd) == 2
    end_all(workers)
    wait_until(lambda: len(sshd.sessions(sshd.address(NODE))) == 1)
    task.run("true", nodes=SICK)
    assert log.logins == 2


def test_fresh_makes_a_new_connection_which_is_then_the_kept_one(sshd: Sshd) -> None:
    log, task = Log(sshd), ready(sshd)
    task.run("true", nodes=SICK)
    task.run("true", nodes=SICK, fresh=True)
    assert log.logins == 2
    wait_until(lambda: len(sshd.sessions(sshd.address(NODE))) == 1, what="the older connection is closed")
    task.run("true", nodes=SICK)
    assert log.logins == log.connections == 2


@pytest.mark.parametrize("fresh", [False, True])
def test_a_refused_connection_leaves_the_kept_one_alone(sshd: Sshd, fault_proxy: ProxyFactory, fresh: bool) -> None:
    proxy = fault_proxy((sshd.address(NODE), sshd.port), Rule("down", OnMessage(20), Stall(), only=1))
    task = task_for(sshd, sick={**sshd.options(via=proxy.endpoint), "address": proxy.address})
    assert Course(task, [SICK, WELL]).end().sick.ok
    second = Course(task, [SICK, WELL], fresh=fresh, connect_timeout=0.5).end().sick
    assert second.ok is not fresh
    assert Course(task, [SICK, WELL]).end().sick.ok
    assert proxy.connections == (2 if fresh else 1)
