# SPDX-License-Identifier: Apache-2.0
"""Connections that break on their way to a command's end (faults B06, B07, B11, B14): the phase, and what had run.

Runs in the thread of pytest, over the public Task API: a broken node beside a healthy one on a real sshd.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import threading
from typing import TYPE_CHECKING, Any, Literal

import pytest

from ctask import (
    AuthTimeout,
    BannerError,
    ConnectionLost,
    HandshakeError,
    HandshakeTimeout,
    NodeError,
    Outcome,
    SessionTimeout,
    retry,
)
from ctask.transports.ssh.exchange import HELLO
from ctask_tests.fix_banner import (
    dripped_banner,
    endless_line,
    http_answer,
    many_lines,
    nul_in_banner,
    old_version,
)
from ctask_tests.fix_hostile import Eof, HangUp, Out, Script, Status, Step
from ctask_tests.fix_leaks import wait_until
from ctask_tests.fix_proxy import AtBytes, Fin, OnEvent, OnMatch, OnMessage, Resume, Rst, Rule, Stall
from ctask_tests.fix_sshd import write_known_hosts
from ctask_tests.sick_node import SICK, WELL, Course, takes, task_for, tried_keys

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from ctask_tests.fix_banner import BannerServerFactory
    from ctask_tests.fix_hostile import HostileFactory, HostileServer
    from ctask_tests.fix_proxy import FaultProxy, ProxyFactory
    from ctask_tests.fix_sshd import Sshd, SshdFactory
    from ctask_tests.proxy_lanes import When


def of(server: HostileServer) -> dict[str, Any]:
    return {**server.options(), "address": server.address}


def through(proxy: FaultProxy, options: Mapping[str, Any]) -> dict[str, Any]:
    return {**options, "address": proxy.address, "port": proxy.port}


def beside(sshd: Sshd, sick: dict[str, Any], **options: Any) -> Course:
    """Run on a sick node and a healthy one, with one slot for both."""
    return Course(task_for(sshd, sick=sick, fanout=1), [SICK, WELL], **options).end()


# --- B06: what comes in place of a banner


@pytest.mark.parametrize(
    ("game", "kind", "words"),
    [
        (endless_line(), BannerError, "no SSH version within 8192 bytes"),
        (many_lines(5_000), BannerError, "no SSH version within 8192 bytes"),
        (http_answer(), HandshakeError, 'no SSH server answers there: it says "HTTP/1.1 400 Bad Request'),
        (old_version(), HandshakeError, 'the server does not speak SSH 2: it says "SSH-1.5-hostile'),
        (nul_in_banner(), HandshakeError, r'the server does not speak SSH 2: it says "SSH-2.0-ho\x00stile'),
    ],
    ids=["endless line", "endless lines", "http", "ssh 1.5", "nul"],
)
def test_b06_what_is_no_banner(
    sshd: Sshd,
    banner_server: BannerServerFactory,
    game: Callable[[], Iterable[bytes | float]],
    kind: type[NodeError],
    words: str,
) -> None:
    server = banner_server(game)
    with takes(0.0):
        sick = beside(sshd, {"address": server.address, "port": server.port}).sick
    assert type(sick.error) is kind
    assert (sick.outcome, sick.rc, sick.ran, sick.phase) == (Outcome.UNREACHED, 255, False, "banner")
    assert words in sick.why
    assert server.connections == 1
    assert server.received in (b"", HELLO)  # all that it hears: our name, which goes with the connect


def test_b06_a_dripped_banner_ends_at_the_connect_timeout(sshd: Sshd, banner_server: BannerServerFactory) -> None:
    server = banner_server(dripped_banner(0.1))
    with takes(1.0):
        sick = beside(sshd, {"address": server.address, "port": server.port}, connect_timeout=1.0).sick
    assert type(sick.error) is BannerError
    assert (sick.outcome, sick.ran, sick.why) == (Outcome.UNREACHED, False, "banner: no answer for 1 s")


def test_b06_a_hundred_lines_before_the_banner_are_read(sshd: Sshd, banner_server: BannerServerFactory) -> None:
    server = banner_server(many_lines(101))
    with takes(1.0):
        sick = beside(sshd, {"address": server.address, "port": server.port}, connect_timeout=1.0).sick
    assert type(sick.error) is HandshakeTimeout  # it named its version, and goes on with nothing
    assert (sick.outcome, sick.ran, sick.why) == (Outcome.UNREACHED, False, "kex: no answer for 1 s")


def test_b06_ten_megabytes_without_a_newline_take_no_memory(sshd: Sshd, banner_server: BannerServerFactory) -> None:
    program = textwrap.dedent("""
        import json, re, sys
        from ctask import task_self

        def peak():
            return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

        options, games = json.loads(sys.argv[1])
        task = task_self()
        for name, value in options.items():
            task.set_info(name, value)
        for number, port in enumerate(games):
            task.node_options(f"sick{number}", address="127.0.3.1", port=port)
        task.run("true", nodes=["127.0.1.1", "sick0"])
        before = peak()
        worker = task.run("true", nodes=["127.0.1.1", "sick1", "sick2"])
        print(json.dumps([str(worker.ok), sorted(worker.failures()), peak() - before]))
    """)
    games = [http_answer(), endless_line(), many_lines(200_000)]
    servers = [banner_server(game) for game in games]
    arguments = json.dumps([sshd.options(), [server.port for server in servers]])
    said = subprocess.run(
        [sys.executable, "-c", program, arguments], check=True, capture_output=True, text=True, timeout=25
    )
    assert said.stderr == ""
    ok, failures, growth = json.loads(said.stdout)
    assert ok == "127.0.1.1"
    assert [failure[:2] for failure in failures] == [["banner", "BannerError"]]
    assert growth < 1024  # KiB


# --- B07: the eleven phases; the first four on the way to a real sshd


@pytest.mark.parametrize("do", [Fin(), Rst()], ids=["fin", "rst"])
@pytest.mark.parametrize(
    ("direction", "when", "kind", "phase"),
    [
        ("down", AtBytes(0), BannerError, "banner"),
        ("down", AtBytes(1), BannerError, "banner"),
        ("down", OnMatch(b"\r\n"), HandshakeError, "kex"),
        ("down", AtBytes(200), HandshakeError, "kex"),
        ("down", OnMessage(21), HandshakeError, "kex"),
        # Ours, since sshd's stands in one segment with the end of its exchange: a reset there would hit ours.
        ("up", OnMessage(21, after=True), ConnectionLost, "auth"),
    ],
    ids=["before the banner", "in the banner", "after the banner", "in KEXINIT", "before NEWKEYS", "after NEWKEYS"],
)
def test_b07_before_the_login(
    sshd: Sshd,
    fault_proxy: ProxyFactory,
    direction: Literal["up", "down"],
    when: When,
    do: Fin | Rst,
    kind: type[NodeError],
    phase: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    proxy = fault_proxy((sshd.address(2), sshd.port), Rule(direction, when, do))
    # What a busy server does to those who have not logged in is tried again.
    monkeypatch.setattr(retry, "_LEAST_WAIT", 0.01)
    monkeypatch.setattr(retry, "_MOST_WAIT", 0.02)
    tries = 1 if phase == "auth" else 3
    with takes(0.0):
        sick = beside(sshd, through(proxy, sshd.options(via=proxy.endpoint))).sick
    assert (type(sick.error), sick.phase) == (kind, phase)
    assert (sick.outcome, sick.rc, sick.ran) == (Outcome.UNREACHED, 255, False)
    assert "dropped by the server" in sick.why or "connection closed" in sick.why or "reset by" in sick.why
    assert ("(3 tries, " in sick.why) == (tries == 3)
    assert proxy.connections == len(sick.attempts) == tries


@pytest.mark.parametrize("do", ["fin", "rst"])
@pytest.mark.parametrize(
    ("at", "phase", "outcome", "ran"),
    [
        ("on_auth", "auth", Outcome.UNREACHED, False),
        ("on_open", "open", Outcome.UNREACHED, False),
        ("on_exec", "exec", Outcome.LOST, None),
    ],
    ids=["in the login", "before the open", "exec unanswered"],
)
def test_b07_before_the_command(
    sshd: Sshd,
    hostile: HostileFactory,
    fault_proxy: ProxyFactory,
    tmp_path: Path,
    at: str,
    phase: str,
    outcome: Outcome,
    ran: bool | None,
    do: str,
) -> None:
    answer: Any = "hang_up" if do == "fin" else "silent"
    server = hostile(Script(**{at: answer}))
    proxy = fault_proxy(server.endpoint)
    known = write_known_hosts(tmp_path / "known_hosts", [proxy.endpoint], [server.host_key_line])
    task = task_for(sshd, sick=through(proxy, {**server.options(), "known_hosts": known}), fanout=1)
    course = Course(task, [SICK, WELL])
    future = course.worker.futures[SICK]
    seen: dict[str, Sequence[object]] = {
        "auth": server.seen.auths,
        "open": server.seen.opens,
        "exec": server.seen.commands,
    }
    asked = seen[phase]
    resets = 0
    while do == "rst" and not future.done():
        wait_until(lambda: len(asked) > resets or future.done())  # noqa: B023 (called here)
        resets = len(asked)
        proxy.cut()
    sick = course.end().sick
    assert (type(sick.error), sick.phase) == (ConnectionLost, phase)
    assert (sick.outcome, sick.rc, sick.ran) == (outcome, 255, ran)
    assert "connection reset by the node" in sick.why if do == "rst" else "connection closed by the node" in sick.why
    # Only a kept connection is replaced; one that was made for the command and fails is told as it is.
    assert proxy.connections == 1
    assert len(server.seen.commands) == (1 if phase == "exec" else 0)


@pytest.mark.parametrize("reset", [False, True], ids=["fin", "rst"])
@pytest.mark.parametrize(
    ("steps", "output"),
    [
        ((), b""),
        ((Out(b"half a li"),), b"half a li"),
        ((Out(b"all\n"), Eof()), b"all\n"),
    ],
    ids=["before the first byte", "in a line", "after the last byte"],
)
def test_b07_under_a_command(
    sshd: Sshd, hostile: HostileFactory, steps: tuple[Step, ...], output: bytes, reset: bool
) -> None:
    server = hostile(Script(steps=(*steps, HangUp(reset))))
    with takes(0.0):
        sick = beside(sshd, of(server)).sick
    assert (type(sick.error), sick.phase) == (ConnectionLost, "running")
    assert (sick.outcome, sick.rc, sick.ran, sick.ok) == (Outcome.LOST, 255, None, False)
    assert sick.why.startswith("connection lost: connection " + ("reset" if reset else "closed"))
    assert sick.stdout == output
    assert server.seen.commands == [b"echo ok"]  # whether it ran is not known: it is not sent again
    assert server.connections == 1


@pytest.mark.parametrize("reset", [False, True], ids=["fin", "rst"])
@pytest.mark.parametrize("status", [0, 3])
def test_b07_after_the_exit_status_the_loss_is_ignored(
    sshd: Sshd, hostile: HostileFactory, status: int, reset: bool
) -> None:
    server = hostile(Script(steps=(Out(b"all\n"), Status(status), HangUp(reset))))
    with takes(0.0):
        sick = beside(sshd, of(server)).sick
    assert (sick.outcome, sick.rc, sick.ran, sick.error) == (Outcome.EXITED, status, True, None)
    assert sick.stdout == b"all\n"
    assert not sick.lingering
    assert sick.truncated  # the node never said that this was all
    assert sick.why == f"exit {status}; connection lost before its last output"


def test_b07_a_command_on_a_kept_connection_is_not_sent_again(sshd: Sshd, hostile: HostileFactory) -> None:
    server = hostile(Script(honest=1, steps=(Out(b"half a li"), HangUp())))
    first = beside(sshd, of(server)).result(SICK)
    second = beside(sshd, of(server)).result(SICK)
    assert (first.outcome, second.outcome) == (Outcome.EXITED, Outcome.LOST)
    assert second.stdout == b"half a li"
    assert (server.connections, len(server.seen.commands)) == (1, 2)


# --- B11: the server's patience with a login


@pytest.mark.slow  # sshd's shortest LoginGraceTime is 1 s
def test_b11_a_login_that_takes_longer_than_the_server_waits_is_a_loss_in_auth(
    sshd: Sshd, sshd_factory: SshdFactory, fault_proxy: ProxyFactory
) -> None:
    strict = sshd_factory("LoginGraceTime 1")
    proxy = fault_proxy((strict.address(2), strict.port), Rule("up", OnMessage(21, after=True), Stall()))
    with takes(0.9):
        sick = beside(sshd, through(proxy, strict.options(via=proxy.endpoint)), connect_timeout=10).sick
    assert (type(sick.error), sick.phase) == (ConnectionLost, "auth")
    assert (sick.outcome, sick.rc, sick.ran) == (Outcome.UNREACHED, 255, False)
    assert proxy.connections == 1


# --- B14, and the same silence in every later phase


def test_b14_a_key_exchange_that_stalls_ends_at_the_connect_timeout(sshd: Sshd, fault_proxy: ProxyFactory) -> None:
    proxy = fault_proxy((sshd.address(2), sshd.port), Rule("down", OnMessage(20), Stall()))
    since = len(sshd.log())
    with takes(1.0):
        course = beside(sshd, through(proxy, sshd.options(via=proxy.endpoint)), connect_timeout=1.0)
    sick = course.sick
    assert type(sick.error) is HandshakeTimeout
    assert (sick.outcome, sick.rc, sick.ran, sick.phase) == (Outcome.UNREACHED, 255, False, "kex")
    assert sick.why == "kex: no answer for 1 s"
    assert course.worker.num_timeout() == 0
    assert tried_keys(sshd, sshd.address(2), since) == [[]]  # sshd saw one connection, which was closed


@pytest.mark.parametrize(
    ("at", "kind", "phase", "outcome", "ran"),
    [
        ("on_auth", AuthTimeout, "auth", Outcome.UNREACHED, False),
        ("on_open", SessionTimeout, "open", Outcome.UNREACHED, False),
        ("on_exec", SessionTimeout, "exec", Outcome.LOST, None),
    ],
)
def test_b14_later_silences_end_at_the_connect_timeout_too(
    sshd: Sshd,
    hostile: HostileFactory,
    at: str,
    kind: type[NodeError],
    phase: str,
    outcome: Outcome,
    ran: bool | None,
) -> None:
    answer: Any = "silent"
    server = hostile(Script(**{at: answer}))
    with takes(1.0):
        sick = beside(sshd, of(server), connect_timeout=1.0).sick
    assert (type(sick.error), sick.phase) == (kind, phase)
    assert (sick.outcome, sick.rc, sick.ran) == (outcome, 255, ran)
    assert sick.why.startswith(f"{phase}: no answer for 1 s")


def test_a_stall_that_ends_in_time_does_no_harm(sshd: Sshd, fault_proxy: ProxyFactory) -> None:
    go_on = threading.Event()
    proxy = fault_proxy(
        (sshd.address(2), sshd.port), Rule("down", OnMessage(31), Stall()), Rule("down", OnEvent(go_on), Resume())
    )
    task = task_for(sshd, sick=through(proxy, sshd.options(via=proxy.endpoint)))
    course = Course(task, [SICK, WELL])
    wait_until(course.worker.futures[WELL].done)
    wait_until(lambda: any(passage.struck for passage in proxy.passages), what="the handshake stands still")
    assert not course.worker.futures[SICK].done()
    go_on.set()
    assert course.end().sick.ok
