# SPDX-License-Identifier: Apache-2.0
"""Tries on real nodes: busy servers, closed ports, a server that is restarted between two tries, deadlines, races.

Commands count on the node how often they were run, so that "once" is the node's own word.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tenacity import wait_random

from ctask import (
    BannerError,
    ConnectRefused,
    IdleTimeout,
    NodeSet,
    Outcome,
    ResolveError,
    Retry,
    SessionRefused,
    Task,
    Worker,
    task_self,
)
from ctask.testing import FakeTransport, Step
from ctask_tests.fix_leaks import wait_until
from ctask_tests.fix_proxy import closed_port
from ctask_tests.fix_sshd import Sshd, SshdFactory
from ctask_tests.sick_node import SICK, WELL, Course, task_for


@pytest.fixture
def counts(sshd: Sshd, request: pytest.FixtureRequest) -> Path:
    """A folder in which every account may count."""
    folder: Path = sshd.folder / request.node.name
    folder.mkdir()
    folder.chmod(0o777)
    return folder


# -- servers that are busy, closed, or gone for a moment --------------------------------------------------------------


def test_b01_a_closed_port_is_told_at_once_and_tried_again_where_that_is_asked_for(sshd: Sshd) -> None:
    with closed_port() as (address, port):
        task = task_for(sshd, sick={"address": address, "port": port})
        for policy, count in ((None, 1), (Retry(3, wait=0.05), 3)):
            sick = Course(task, [SICK, WELL], retry=policy).end().sick
            assert isinstance(sick.error, ConnectRefused)
            assert [attempt.phase for attempt in sick.attempts] == ["tcp"] * count
            assert ("(3 tries, " in sick.why) == (count == 3)


def test_b03_a_server_of_names_that_fails_for_a_moment_is_asked_again(
    sshd: Sshd, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = socket.getaddrinfo, []

    def look_up(name: Any, *args: Any, **kwargs: Any) -> Any:
        if name in ("sick.example", b"sick.example"):
            asked.append(name)
            if len(asked) < 3:
                raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
            return real(sshd.address(2), *args, **kwargs)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr("ctask.retry._MOST_WAIT", 0.2)
    known = sshd.known_hosts_for(("sick.example", sshd.port))
    task = task_for(sshd, sick={"address": "sick.example", "known_hosts": known})
    sick = Course(task, [SICK, WELL]).end().sick
    assert sick.ok
    assert [type(attempt.error) for attempt in sick.attempts] == [ResolveError, ResolveError, type(None)]


def test_b10_a_server_without_room_for_one_more_login_is_tried_again(sshd_factory: SshdFactory) -> None:
    server = sshd_factory("MaxStartups 1")
    tried: list[tuple[int, str]] = []
    with contextlib.ExitStack() as stack:
        other = stack.enter_context(socket.create_connection((server.address(1), server.port)))
        assert other.recv(4) == b"SSH-"  # it has the one place, and does not log in

        def retry(worker: Worker, node: str, attempt: int, error: Exception, delay: float) -> None:
            tried.append((attempt, type(error).__name__))
            other.close()
            server.wait_idle()

        task = task_for(server)
        task.node_options(SICK, address=server.address(1))
        worker = task.run("echo ok", nodes=SICK, on_retry=retry)
    result = worker.result(SICK)
    assert result.stdout == b"ok\n"
    assert tried[0] in {(1, "BannerError"), (1, "HandshakeError")}
    assert len(result.attempts) == len(tried) + 1


def test_b10_one_that_stays_full_is_given_up_with_its_reason(sshd_factory: SshdFactory) -> None:
    server = sshd_factory("MaxStartups 1")
    with socket.create_connection((server.address(1), server.port)) as other:
        assert other.recv(4) == b"SSH-"
        task = task_for(server)
        task.node_options(SICK, address=server.address(1))
        (result,) = task.run("echo ok", nodes=SICK, retry=Retry(3, wait=0.05)).results()
    assert isinstance(result.error, BannerError)
    assert result.why.startswith("banner: connection dropped by the server")
    assert "(3 tries, " in result.why
    assert "MaxStartups is full?" in result.why


@pytest.mark.slow
def test_b10_nodes_that_are_dropped_at_random_are_all_served_in_the_end(sshd_factory: SshdFactory) -> None:
    server = sshd_factory("MaxStartups 3:50:10")
    task = task_for(server)
    nodes = NodeSet("b[1-60]")
    for number, node in enumerate(nodes):
        task.node_options(node, address=server.address(number + 1))
    worker = task.run("echo ok", nodes=nodes, retry=Retry(60, wait=wait_random(0.02, 0.2), on=["banner", "kex"]))
    assert worker.ok == nodes, worker.failures()
    tries = Counter(len(result.attempts) for result in worker.results())
    assert max(tries) > 1, "none was dropped: nothing was tested"


def test_b13_a_server_that_is_restarted_between_two_tries_serves_the_second(
    sshd_factory: SshdFactory, counts: Path
) -> None:
    server = sshd_factory()
    task = task_for(server)
    task.node_options(SICK, address=server.address(1))
    count = counts / "count"
    worker = task.run(
        f"echo x >>{count}; [ $(grep -c x {count}) -ge 2 ] || exit 75",
        nodes=SICK,
        retry=Retry(2, wait=1.0, exit_codes={75}, idempotent=True),
        on_retry=lambda *_: server.restart(),
    )
    result = worker.result(SICK)
    assert (result.rc, len(result.attempts)) == (0, 2)
    assert count.read_text() == "x\n" * 2


def test_d02_a_node_that_takes_one_session_per_connection_serves_two_on_two(sshd_factory: SshdFactory) -> None:
    server = sshd_factory("MaxSessions 1")
    task = task_for(server)
    task.node_options(SICK, address=server.address(1))
    first = task.submit("exec sleep 60", nodes=SICK)
    wait_until(lambda: first.jobs[0].phase == "running")
    result = task.submit("echo second", nodes=SICK).result(SICK)
    assert (result.stdout, len(result.attempts)) == (b"second\n", 2)
    assert isinstance(result.attempts[0].error, SessionRefused)
    assert not first.futures[SICK].done()
    first.abort()
    assert first.wait(10)


# -- at most once, whatever the policy --------------------------------------------------------------------------------


def test_a_command_whose_connection_is_cut_runs_once_unless_it_may_run_again(sshd: Sshd, counts: Path) -> None:
    task = task_for(sshd)
    task.node_options(SICK, address=sshd.address(2))
    for name, policy, runs in (("once", Retry(3, wait=0.05), 1), ("again", Retry(3, wait=0.05, idempotent=True), 3)):
        count = counts / name
        # It kills the process that is its connection.
        worker = task.run(f"echo x >>{count}; kill -9 $PPID; sleep 60", nodes=SICK, retry=policy)
        (result,) = worker.results()
        assert (result.outcome, result.ran, len(result.attempts)) == (Outcome.LOST, None, runs)
        assert count.read_text() == "x\n" * runs


# -- silence and deadlines --------------------------------------------------------------------------------------------


def test_a_command_that_falls_silent_is_ended(sshd: Sshd) -> None:
    task = task_for(sshd)
    task.node_options(SICK, address=sshd.address(2))
    began = time.monotonic()
    worker = task.run("for i in 1 2 3; do echo $i; sleep 0.3; done; exec sleep 60", nodes=SICK, idle_timeout=0.7)
    elapsed = time.monotonic() - began
    (result,) = worker.results()
    assert (result.outcome, result.stdout, result.remote_state) == (Outcome.TIMEOUT, b"1\n2\n3\n", "gone")
    assert isinstance(result.error, IdleTimeout)
    assert result.why == "silent for 0.7 s"
    assert elapsed >= 1.3
    assert worker.timedout == worker.nodes
    assert task.num_timeout() == 1


def test_one_that_says_something_now_and_then_is_not(sshd: Sshd) -> None:
    task = task_for(sshd)
    task.node_options(SICK, address=sshd.address(2))
    worker = task.run("for i in 1 2 3 4 5 6; do echo $i; sleep 0.2; done", nodes=SICK, idle_timeout=0.9)
    assert worker.result(SICK).ok


def test_a_node_that_may_not_send_is_not_silent(sshd: Sshd) -> None:
    """A handler that is slower than `idle_timeout` holds the node back: that is no silence of the node."""
    task = task_for(sshd, queue_limit=65_536)
    task.node_options(SICK, address=sshd.address(2))
    waited: list[float] = []

    def read(worker: Worker, node: str, sname: str, msg: bytes) -> None:
        if len(waited) < 3 and len(msg) > 100:
            began = time.monotonic()
            wait_until(lambda: time.monotonic() - began > 0.5)
            waited.append(time.monotonic() - began)

    command = "head -c 8000000 /dev/zero | tr '\\0' x | fold -w 1000000; echo"
    worker = task.run(command, nodes=SICK, idle_timeout=0.3, on_read=read)
    assert worker.result(SICK).ok
    assert len(waited) == 3


@pytest.mark.parametrize("where", ["call", "node", "task"])
def test_a_deadline_counts_from_the_submission(sshd: Sshd, where: str) -> None:
    task = task_for(sshd)
    task.node_options(SICK, address=sshd.address(2))
    options: dict[str, Any] = {}
    if where == "call":
        options["deadline"] = 0.4
    elif where == "node":
        task.node_options(SICK, deadline=0.4)
    else:
        task.set_info("deadline", 0.4)
    began = time.monotonic()
    worker = task.submit("exec sleep 60", nodes=[SICK], **options)
    assert worker.wait(10)
    elapsed = time.monotonic() - began
    (result,) = worker.results()
    assert (result.outcome, result.why) == (Outcome.TIMEOUT, "deadline of 0.4 s passed")
    assert 0.4 <= elapsed < 1.4


# -- races ------------------------------------------------------------------------------------------------------------


def check_once(worker: Worker, ends: list[str]) -> Counter[Outcome]:
    assert sorted(ends) == sorted(worker.nodes)
    outcomes = Counter(result.outcome for result in worker.results())
    assert set(outcomes) <= {Outcome.EXITED, Outcome.TIMEOUT}
    for result in worker.results():
        assert (result.error is None) == (result.outcome is Outcome.EXITED)
    return outcomes


def test_timeouts_that_race_with_500_natural_ends_on_fake_nodes(task: Task) -> None:
    ends: list[str] = []
    script = [Step("running"), Step("out", b"x\n"), Step("exit", after=0.1)]
    with FakeTransport(lambda node, command: script):
        task.set_info("fanout", 500)
        worker = task.run("x", nodes="n[1-500]", timeout=0.1, on_done=lambda worker, node, result: ends.append(node))
    check_once(worker, ends)


@pytest.mark.slow
def test_timeouts_that_race_with_50_natural_ends_on_nodes(sshd: Sshd) -> None:
    ends: list[str] = []
    task = task_for(sshd, fanout=8)
    nodes = NodeSet("r[1-50]")
    for number, node in enumerate(nodes):
        task.node_options(node, address=sshd.address(number + 1))
    worker = task.run(
        "exec sleep 0.2", nodes=nodes, timeout=0.2, on_done=lambda worker, node, result: ends.append(node)
    )
    check_once(worker, ends)


@pytest.fixture
def task() -> Task:
    return task_self()
