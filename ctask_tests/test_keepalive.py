# SPDX-License-Identifier: Apache-2.0
"""Whether a connection still lives: one in use is asked every `alive_interval`, one that rested before it is used.

Runs in the thread of pytest, over the public Task API on a real sshd; the counting of silences without one, on a clock
of the test's own.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from ctask import ConnectionLost, OptionError, Outcome, SessionTimeout
from ctask.transports.ssh import SshTransport, alive
from ctask.transports.ssh.transport import Link
from ctask.transports.ssh.wire import Wire
from ctask.transports.watcher import Watcher
from ctask_tests.fix_leaks import wait_until
from ctask_tests.fix_proxy import Fin, OnEvent, Rst, Rule, Stall
from ctask_tests.sick_node import SICK, WELL, Course, accepted, takes, task_for
from ctask_tests.ssh_sink import open_connection, run, target_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ctask.job import Job
    from ctask.transports.ssh.mapping import Silence
    from ctask_tests.fix_proxy import FaultProxy, ProxyFactory
    from ctask_tests.fix_sshd import Sshd, SshdFactory

pytestmark = pytest.mark.usefixtures("nothing_runs_on")

#: The address of the node that faults strike.
NODE = 40

#: Seconds between the questions in these tests.
INTERVAL = 0.3

#: Seconds of rest after which a connection is in doubt in these tests.
REST = 0.1


class FakeLink:
    """What `alive` asks of a connection, with everything that it did."""

    def __init__(self, wire: Wire | None = None) -> None:
        self.dead = False
        self.wire: Any = wire or self
        self.received = self.pushed = self.waiting = 0
        self.asked: list[Callable[[], None]] = []
        self.verdicts: list[str] = []

    def ask(self, answered: Callable[[], None]) -> None:
        self.asked.append(answered)

    def give_up(self, why: Silence) -> None:
        self.verdicts.append(str(why))


class Clock:
    """Beats of one pulse, on a clock that goes from one to the next."""

    def __init__(self, link: FakeLink) -> None:
        self.pulse = alive.Pulse()
        self.link = link
        self.now = self.pulse.at

    def beat(self, after: float = 10.0, *, busy: bool = True) -> list[str]:
        self.now += after
        self.pulse.beat(self.link, self.now, 10.0, busy=busy)
        return self.link.verdicts


# --- the counting of silences


def test_a_node_that_says_nothing_is_lost_with_the_third_silence() -> None:
    clock = Clock(FakeLink())
    assert [clock.beat() for _ in range(3)] == [[], [], []]
    assert len(clock.link.asked) == 3
    (verdict,) = clock.beat()
    assert "no sign of life" in verdict
    assert "30 s" in verdict


def test_any_byte_is_a_sign_of_life() -> None:
    clock = Clock(FakeLink())
    for _ in range(20):
        clock.link.received += clock.now % 30 < 10  # with every third beat
        assert clock.beat() == []
    assert len(clock.link.asked) == 20


def test_one_that_rests_is_not_asked_and_its_silence_does_not_count() -> None:
    clock = Clock(FakeLink())
    for _ in range(3):
        clock.beat()
    for _ in range(5):
        assert clock.beat(busy=False) == []
    assert len(clock.link.asked) == 3
    for _ in range(3):
        assert clock.beat() == []
    assert len(clock.beat()) == 1


def test_f09_time_in_which_we_stood_still_is_one_beat_and_blames_no_node() -> None:
    clock = Clock(FakeLink())
    clock.beat()
    assert clock.beat(after=100_000.0) == []
    assert len(clock.link.asked) == 2


def test_a_beat_before_its_time_counts_nothing() -> None:
    clock = Clock(FakeLink())
    clock.beat()
    for _ in range(9):
        assert clock.beat(after=1.0) == []
    assert len(clock.link.asked) == 1
    clock.beat(after=1.0)
    assert len(clock.link.asked) == 2


def test_a_node_that_talks_on_and_takes_nothing_is_lost_as_well() -> None:
    here, there = socket.socketpair()
    wire = Wire(here)
    clock = Clock(FakeLink(wire))
    wire.send(bytes(900_000))
    assert wire.waiting
    for _ in range(3):
        there.sendall(b"x")
        assert wire.fill_now()
        assert clock.beat() == []
    there.sendall(b"x")
    assert wire.fill_now()
    (verdict,) = clock.beat()
    assert "taken nothing" in verdict
    there.close()
    wire.close()


def test_a_node_that_takes_a_little_now_and_then_is_not_lost() -> None:
    here, there = socket.socketpair()
    wire = Wire(here)
    clock = Clock(FakeLink(wire))
    wire.send(bytes(900_000))
    for _ in range(6):
        there.recv(40_000)
        wire.push()
        assert wire.waiting
        clock.link.received += 1
        assert clock.beat(busy=False) == []
    there.close()
    wire.close()


# --- one in use


def sessions(sshd: Sshd) -> list[int]:
    return sshd.sessions(sshd.address(NODE))


@contextlib.contextmanager
def frozen(pids: Sequence[int]) -> Iterator[None]:
    """Stop these processes, as a node stands still that has run out of memory; let them go on at the end."""
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def fallen_silent(job: Job) -> float:
    """Return when the last byte of a frozen node was stored: what lies in sockets is a sign of life all the same."""
    total, since = -1, 0.0
    while job.outcome is None and (total < 0 or time.monotonic() < since + INTERVAL / 2):
        now = job.capture.total if job.capture is not None else 0
        if now != total:
            total, since = now, time.monotonic()
        time.sleep(0.005)
    return since


def sick(sshd: Sshd, **options: Any) -> dict[str, Any]:
    return {"address": sshd.address(NODE), **options}


@pytest.mark.load
@pytest.mark.parametrize(
    ("command", "printed"),
    [("exec sleep 60", b""), ("printf half; exec sleep 60", b"half"), ("echo whole; exec yes", b"whole\n")],
    ids=["idle", "mid-line", "flood"],
)
def test_f08_a_frozen_node_is_lost_after_three_silences(sshd: Sshd, command: str, printed: bytes) -> None:
    task = task_for(sshd, sick=sick(sshd, alive_interval=INTERVAL), gather=True)
    worker = task.submit(command, nodes=SICK)
    job = worker.jobs[0]
    wait_until(lambda: job.phase == "running" and job.capture is not None and job.capture.total >= len(printed))
    with frozen(sessions(sshd)):
        frozen_at = time.monotonic()
        heard_at = fallen_silent(job)
        assert worker.wait(10)
        over = time.monotonic()
        assert Course(task, [WELL], "echo ok").end().result(WELL).ok
    assert over >= frozen_at + 3 * INTERVAL
    assert over <= heard_at + 4 * INTERVAL + 1.0, "the first beat after the last byte still finds that one"
    (result,) = worker.results()
    assert (type(result.error), result.outcome, result.rc) == (ConnectionLost, Outcome.LOST, 255)
    assert (result.ran, result.phase) == (None, "running")
    assert result.stdout.startswith(printed)
    told = re.search(r"no sign of life, nor an answer to keepalives, for ([\d.]+) s", str(result.error))
    assert told is not None, result.error
    assert 3 * INTERVAL - 0.01 <= float(told[1]) <= over - frozen_at + INTERVAL  # counted in beats, which may be late


@pytest.mark.slow
def test_f08_without_it_the_timeout_ends_a_command_on_a_frozen_node(sshd: Sshd) -> None:
    task = task_for(sshd, sick=sick(sshd, alive_interval=0))
    worker = task.submit("exec sleep 60", nodes=SICK, timeout=0.5, stop_grace=0)
    wait_until(lambda: worker.jobs[0].phase == "running")
    with frozen(sessions(sshd)):
        assert worker.wait(0.5 + 2.0 + 1.0)
    (result,) = worker.results()
    assert (result.outcome, result.ran, result.remote_state) == (Outcome.TIMEOUT, True, "unknown")


def test_a_node_that_answers_may_be_silent_for_as_long_as_it_likes(sshd: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = count_questions(monkeypatch)
    task = task_for(sshd, sick=sick(sshd, alive_interval=0.1))
    course = Course(task, [SICK, WELL], "sleep 1.2; echo ok").end()
    assert course.sick.rc == 0
    assert 8 <= len(asked) <= 12
    assert len(set(asked)) == 1  # the node beside it has the default, and was not asked within this second


@pytest.mark.parametrize("value", [None, 0])
def test_none_asks_nothing(sshd: Sshd, monkeypatch: pytest.MonkeyPatch, value: object) -> None:
    asked = count_questions(monkeypatch)
    task = task_for(sshd, sick=sick(sshd), alive_interval=value)
    assert Course(task, [SICK], "sleep 0.3").end().result(SICK).rc == 0
    assert asked == []
    with pytest.raises(OptionError):
        task.set_info("alive_interval", -1)


def count_questions(monkeypatch: pytest.MonkeyPatch) -> list[Link]:
    """Note each connection that is asked, when it is."""
    asked: list[Link] = []
    whole = Link.ask

    def ask(link: Link, answered: Callable[[], None]) -> None:
        asked.append(link)
        whole(link, answered)

    monkeypatch.setattr(Link, "ask", ask)
    return asked


# --- one timer for everything


@pytest.fixture
def ways() -> Iterator[SshTransport]:
    transport = SshTransport()
    yield transport
    assert transport.close_all(5.0)


def test_a_warm_command_costs_no_timer(sshd: Sshd, ways: SshTransport, monkeypatch: pytest.MonkeyPatch) -> None:
    target = target_for(sshd.options(), sshd.address(NODE))
    connection = open_connection(ways, target)
    timers: list[float] = []
    whole = Watcher.at

    def at(self: Watcher, when: float, fn: Callable[[], None]) -> Any:
        timers.append(when)
        return whole(self, when, fn)

    monkeypatch.setattr(Watcher, "at", at)
    for _ in range(1_000):
        assert ways.take(target) is connection
        ways.give_back(connection)
    assert timers == []


@pytest.mark.parametrize(("keep", "interval"), [(0.6, 0.1), (0.3, 10.0), (0.3, None)])
def test_beats_do_not_change_how_long_one_is_kept(
    sshd: Sshd, ways: SshTransport, keep: float, interval: float | None
) -> None:
    target = target_for(sshd.options(), sshd.address(NODE), keep=keep, alive_interval=interval)
    connection = open_connection(ways, target)
    for _ in range(3):
        assert ways.take(target) is connection
        assert run(connection, b"sleep 0.1").status == 0
        back = time.monotonic()
        ways.give_back(connection)
    wait_until(lambda: connection.dead)
    assert keep <= time.monotonic() - back <= keep + 1.0
    wait_until(lambda: connection.alarm is None or connection.alarm.call is None)


def test_one_that_nobody_has_used_yet_is_kept_for_its_second(sshd: Sshd, ways: SshTransport) -> None:
    target = target_for(sshd.options(), sshd.address(NODE), keep=0.0, alive_interval=0.05)
    began = time.monotonic()
    connection = open_connection(ways, target)
    wait_until(lambda: connection.dead)
    assert time.monotonic() - began >= 1.0


# --- one that rested


class Doubted:
    """A node whose kept connection is asked before each use, behind a proxy that can be made to strike."""

    def __init__(self, sshd: Sshd, fault_proxy: ProxyFactory, monkeypatch: pytest.MonkeyPatch, do: Any) -> None:
        monkeypatch.setattr(alive, "STALE", REST)
        monkeypatch.setattr(alive, "ANSWER", 0.5)
        self.asked = count_questions(monkeypatch)
        self.event = threading.Event()
        rules = [Rule(way, OnEvent(self.event), do, only=0) for way in ("up", "down")]
        self.proxy: FaultProxy = fault_proxy((sshd.address(NODE), sshd.port), *rules)
        self.task = task_for(sshd, sick={**sshd.options(via=self.proxy.endpoint), "address": self.proxy.address})
        assert Course(self.task, [SICK, WELL]).end().sick.rc == 0
        self.asked.clear()

    def strike(self) -> None:
        self.event.set()
        wait_until(lambda: self.proxy.passages[0].struck)
        self.rest()

    def rest(self) -> None:
        """Let the connections rest for long enough to be in doubt."""
        time.sleep(1.5 * REST)

    def run_at_once(self, count: int, **options: Any) -> list[Any]:
        workers = [self.task.submit("echo ok", nodes=[SICK, WELL], **options) for _ in range(count)]
        for worker in workers:
            assert worker.wait(10)
        results = [{result.node: result for result in worker.results()} for worker in workers]
        assert all(each[WELL].stdout == b"ok\n" for each in results)
        return [each[SICK] for each in results]


def test_a_silent_cut_is_noticed_before_the_connection_is_used(
    sshd: Sshd, fault_proxy: ProxyFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Doubted(sshd, fault_proxy, monkeypatch, Stall())
    node.strike()
    with takes(0.5):
        results = node.run_at_once(5)
    assert [(each.outcome, each.rc, each.stdout) for each in results] == [(Outcome.EXITED, 0, b"ok\n")] * 5
    assert {(each.error, len(each.attempts)) for each in results} == {(None, 1)}
    assert node.proxy.connections == 2  # one new one for all five
    assert len(node.asked) == len(set(node.asked)) == 2  # one question to each of the two nodes


def test_one_that_answers_is_used(sshd: Sshd, fault_proxy: ProxyFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    node = Doubted(sshd, fault_proxy, monkeypatch, Stall())
    for count in (1, 2):
        node.rest()
        assert [each.rc for each in node.run_at_once(5)] == [0] * 5
        assert (len(node.asked), len(set(node.asked))) == (2 * count, 2)  # however many jobs there are
    assert node.proxy.connections == 1


def test_one_that_rested_for_a_moment_is_not_asked(
    sshd: Sshd, fault_proxy: ProxyFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Doubted(sshd, fault_proxy, monkeypatch, Stall())
    monkeypatch.setattr(alive, "STALE", 15.0)
    assert [each.rc for each in node.run_at_once(2)] == [0] * 2
    assert node.asked == []


def test_a_job_with_less_time_than_an_answer_may_take_is_not_late(
    sshd: Sshd, fault_proxy: ProxyFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Doubted(sshd, fault_proxy, monkeypatch, Stall())
    monkeypatch.setattr(alive, "ANSWER", 2.0)
    node.strike()
    with takes(0.3):
        (result,) = node.run_at_once(1, connect_timeout=0.3)
    assert (type(result.error), result.outcome) == (SessionTimeout, Outcome.UNREACHED)
    assert (result.phase, result.ran) == ("open", False)
    with takes(0.0):
        assert node.run_at_once(1)[0].rc == 0  # on a new one, at once


@pytest.mark.parametrize("do", [Rst(), Fin()], ids=["rst", "fin"])
def test_one_that_ended_while_it_rested_is_made_anew(
    sshd: Sshd, fault_proxy: ProxyFactory, monkeypatch: pytest.MonkeyPatch, do: Rst | Fin
) -> None:
    node = Doubted(sshd, fault_proxy, monkeypatch, do)
    node.strike()
    with takes(0.0):
        assert [each.rc for each in node.run_at_once(3)] == [0] * 3
    assert node.proxy.connections == 2


def test_a_node_that_froze_while_its_connection_rested_is_given_a_new_one(
    sshd: Sshd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alive, "STALE", REST)
    monkeypatch.setattr(alive, "ANSWER", 0.5)
    since = len(sshd.log())
    task = task_for(sshd, sick=sick(sshd))
    assert Course(task, [SICK, WELL]).end().sick.rc == 0
    time.sleep(1.5 * REST)
    with frozen(sessions(sshd)), takes(0.5):
        assert Course(task, [SICK, WELL]).end().sick.rc == 0
    assert accepted(sshd, sshd.address(NODE), since) == 2


def test_b13_a_server_that_was_restarted_between_two_runs_is_no_matter(sshd_factory: SshdFactory) -> None:
    server = sshd_factory()
    task = task_for(server, sick=sick(server))
    assert Course(task, [SICK, WELL]).end().sick.rc == 0
    server.restart()
    with takes(0.0):
        assert Course(task, [SICK, WELL]).end().sick.rc == 0
