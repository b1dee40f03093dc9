# SPDX-License-Identifier: Apache-2.0
"""Nodes that cannot be reached (faults B01, B02, B05), and many sick nodes of all kinds beside healthy ones.

Runs in the thread of pytest, over the public Task API, on a real sshd and peers that do not answer.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from ctask import (
    AuthRejected,
    BannerError,
    ConnectionLost,
    ConnectRefused,
    ConnectTimeout,
    HandshakeError,
    HostKeyMismatch,
    NodeError,
    Outcome,
    SessionRefused,
    UnknownHostKey,
)
from ctask_tests.fix_banner import http_answer
from ctask_tests.fix_hostile import HangUp, Out, Script
from ctask_tests.fix_leaks import wait_until
from ctask_tests.fix_proxy import OnMessage, Rst, Rule, closed_port, deaf, silent
from ctask_tests.fix_sshd import make_key, public_key, write_known_hosts
from ctask_tests.sick_node import SICK, WELL, Course, takes, task_for

if TYPE_CHECKING:
    from pathlib import Path

    from ctask_tests.fix_banner import BannerServerFactory
    from ctask_tests.fix_hostile import HostileFactory
    from ctask_tests.fix_proxy import ProxyFactory
    from ctask_tests.fix_sshd import Sshd


def at(endpoint: tuple[str, int]) -> dict[str, Any]:
    return {"address": endpoint[0], "port": endpoint[1]}


def test_b01_a_closed_port_is_refused_at_once(sshd: Sshd) -> None:
    with closed_port() as endpoint, takes(0.0):
        course = Course(task_for(sshd, sick=at(endpoint)), [SICK, WELL]).end()
    sick = course.sick
    assert type(sick.error) is ConnectRefused
    assert (sick.outcome, sick.rc, sick.ran, sick.phase) == (Outcome.UNREACHED, 255, False, "tcp")
    assert sick.why == "tcp: refused"
    assert list(course.worker.failures()) == [("tcp", "ConnectRefused", "tcp: refused")]
    assert str(course.worker.unreached) == str(course.worker.not_run) == SICK
    assert course.worker.exit_code() == 3


def test_b02_a_node_that_is_switched_off_ends_at_the_connect_timeout(sshd: Sshd) -> None:
    with deaf() as endpoint:
        task = task_for(sshd, sick=at(endpoint), fanout=1)
        with takes(1.0):
            course = Course(task, [SICK, WELL], connect_timeout=1.0).end()
    sick = course.sick
    assert type(sick.error) is ConnectTimeout
    assert (sick.outcome, sick.rc, sick.ran, sick.phase) == (Outcome.UNREACHED, 255, False, "tcp")
    assert sick.why == f"tcp: no answer from {endpoint[0]}:{endpoint[1]} for 1 s"
    assert list(course.worker.failures()) == [("tcp", "ConnectTimeout", "tcp: no answer for 1 s")]
    assert course.worker.num_timeout() == 0
    assert course.ended == [WELL, SICK]  # though it was first in the order, and there is one slot


def test_b05_a_server_that_says_nothing_ends_at_the_connect_timeout(sshd: Sshd) -> None:
    with silent() as endpoint:
        task = task_for(sshd, sick=at(endpoint), fanout=1)
        with takes(1.0):
            course = Course(task, [SICK, WELL], connect_timeout=1.0).end()
    sick = course.sick
    assert type(sick.error) is BannerError
    assert (sick.outcome, sick.rc, sick.ran, sick.phase) == (Outcome.UNREACHED, 255, False, "banner")
    assert sick.why == "banner: no answer for 1 s"
    assert course.ended == [WELL, SICK]


def test_no_silent_node_holds_a_slot(sshd: Sshd) -> None:
    with ExitStack() as stack:
        task = task_for(sshd, well=8, fanout=2, connect_timeout=3.0)
        for number in range(1, 7):
            endpoint = stack.enter_context(deaf() if number % 2 else silent())
            task.node_options(f"sick{number}", **at(endpoint))
        sick = [f"sick{number}" for number in range(1, 7)]
        well = [f"well{number}" for number in range(1, 9)]
        with takes(3.0):
            course = Course(task, [*sick, *well]).end()
    assert sorted(course.ended[:8]) == well
    assert str(course.worker.ok) == "well[1-8]"
    assert {key[:2]: str(nodes) for key, nodes in course.worker.failures().items()} == {
        ("tcp", "ConnectTimeout"): "sick[1,3,5]",
        ("banner", "BannerError"): "sick[2,4,6]",
    }
    assert task.num_timeout() == 0


def test_nodes_that_were_not_reached_start_last_the_next_time(sshd: Sshd) -> None:
    with closed_port() as endpoint:
        task = task_for(sshd, sick=at(endpoint))
        assert list(Course(task, [SICK, WELL]).end().worker.futures) == [SICK, WELL]
        assert list(Course(task, [SICK, WELL]).end().worker.futures) == [WELL, SICK]


def test_a_dead_node_is_dialed_again_by_the_next_command(sshd: Sshd, fault_proxy: ProxyFactory) -> None:
    proxy = fault_proxy((sshd.address(2), sshd.port), Rule("down", OnMessage(20), Rst(), only=0))
    task = task_for(sshd, sick={**sshd.options(via=proxy.endpoint), "address": proxy.address}, retry=None)
    assert Course(task, [SICK, WELL]).end().sick.outcome is Outcome.UNREACHED
    assert Course(task, [SICK, WELL]).end().sick.outcome is Outcome.EXITED
    assert proxy.connections == 2


def test_sick_nodes_of_every_kind_beside_healthy_ones(
    sshd: Sshd,
    fault_proxy: ProxyFactory,
    hostile: HostileFactory,
    banner_server: BannerServerFactory,
    tmp_path: Path,
) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    other = public_key(make_key(tmp_path / "other"))
    changed = write_known_hosts(tmp_path / "changed", [(sshd.address(20), sshd.port)], [other])
    reset = fault_proxy((sshd.address(2), sshd.port), Rule("down", OnMessage(20), Rst()))
    dying = hostile(Script(steps=(Out(b"half a li"), HangUp())))
    full = hostile(Script(on_open=4))
    web = banner_server(http_answer())
    with ExitStack() as stack:
        kinds: dict[str, tuple[dict[str, Any], type[NodeError], str, Outcome]] = {
            "off": (at(stack.enter_context(deaf())), ConnectTimeout, "tcp", Outcome.UNREACHED),
            "closed": (at(stack.enter_context(closed_port())), ConnectRefused, "tcp", Outcome.UNREACHED),
            "mute": (at(stack.enter_context(silent())), BannerError, "banner", Outcome.UNREACHED),
            "web": (at(web.endpoint), HandshakeError, "banner", Outcome.UNREACHED),
            "reset": (at(reset.endpoint), HandshakeError, "kex", Outcome.UNREACHED),
            "unknown": (
                {"address": sshd.address(21), "known_hosts": str(empty)},
                UnknownHostKey,
                "hostkey",
                Outcome.UNREACHED,
            ),
            "changed": (
                {"address": sshd.address(20), "known_hosts": changed},
                HostKeyMismatch,
                "hostkey",
                Outcome.UNREACHED,
            ),
            "wrongkey": (
                {"address": sshd.address(22), "identity": make_key(tmp_path / "wrong")},
                AuthRejected,
                "auth",
                Outcome.UNREACHED,
            ),
            "wronglogin": (
                {"address": sshd.address(23), "user": "nobody-of-that-name"},
                AuthRejected,
                "auth",
                Outcome.UNREACHED,
            ),
            "full": (
                {**full.options(), "address": full.address, "retry": None},
                SessionRefused,
                "open",
                Outcome.UNREACHED,
            ),
            "dying": (
                {**dying.options(), "address": dying.address},
                ConnectionLost,
                "running",
                Outcome.LOST,
            ),
        }
        task = task_for(sshd, well=6, fanout=3, connect_timeout=3.0)
        for node, (options, *_) in kinds.items():
            task.node_options(node, **options)
        with takes(3.0):
            course = Course(task, [*kinds, *(f"well{n}" for n in range(1, 7))]).end()
    worker = course.worker
    assert {str(task.node_buffer(node)) for node in worker.ok} == {"ok"}
    assert str(worker.ok) == "well[1-6]"
    for node, (_, error, phase, outcome) in kinds.items():
        result = course.result(node)
        assert (node, type(result.error), result.phase, result.outcome) == (node, error, phase, outcome)
        assert result.ran is (None if outcome is Outcome.LOST else False)
    assert course.result("dying").stdout == b"half a li"
    assert worker.exit_code() == 3
    assert len(worker.not_run) == len(kinds) - 1


@pytest.mark.parametrize("fanout", [1, 64])
def test_an_abort_leaves_nothing_of_nodes_that_are_being_reached(sshd: Sshd, fanout: int) -> None:
    with deaf() as off, silent() as mute:
        task = task_for(sshd, sick=at(off), fanout=fanout)
        task.node_options("mute", **at(mute))
        course = Course(task, [SICK, "mute", WELL])
        wait_until(course.worker.futures[WELL].done)
        with takes(0.0):
            task.abort()
            course.end()
    for node, phase in ((SICK, "tcp"), ("mute", "banner")):
        result = course.result(node)
        assert (result.outcome, result.rc, result.ran, result.phase) == (Outcome.ABORTED, None, False, phase)
    assert course.result(WELL).ok
