# SPDX-License-Identifier: Apache-2.0
"""A program that stood still (SIGSTOP, a frozen cgroup, a suspended machine) tells what was so (row F09).

While it stands, nodes and children go on, and what they say lies in sockets and pipes.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ctask.dispatcher import SETTLE, Dispatcher
from ctask.nodes.groups import shell
from ctask.standstill import LATE, TICK, Standstills
from ctask.transports.ssh import SshTransport
from ctask.transports.ssh.reader import Reader
from ctask.transports.ssh.settling import Settling
from ctask.transports.watcher import Watcher
from ctask_tests.child import Child
from ctask_tests.fix_leaks import wait_until
from ctask_tests.fix_sshd import Sshd

#: Seconds for which a program is stopped: longer than each limit in it.
STOPPED = 1.6
NODES = 8


# -- noticing ---------------------------------------------------------------------------------------------------------


def test_f09_the_first_that_looks_notices_and_no_other_counts_it_again() -> None:
    seen = Standstills()
    seen.begin(100.0)
    assert seen.look(100.0 + TICK) == 0
    assert seen.look(104.0 + TICK) == pytest.approx(4.0)
    assert seen.look(104.1 + TICK) == pytest.approx(4.0)
    assert seen.look(103.0) == pytest.approx(4.0)  # the time of a thread that stood between clock and look
    assert seen.look(104.2 + TICK) == pytest.approx(4.0)


def test_f09_a_time_in_which_no_thread_looked_is_no_standstill() -> None:
    seen = Standstills()
    assert seen.look(1000.0) == 0
    seen.begin(2000.0)
    assert seen.look(2000.0 + TICK + LATE / 2) == 0
    seen.end()
    seen.begin(3000.0)
    assert seen.look(3000.1) == 0


class Lab:
    """A dispatcher whose clock is set by hand; what has come is let in when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0
        self.seen: list[str] = []
        self.asked: list[Callable[[], None]] = []
        self.dispatcher = Dispatcher(
            "ctask-test/dispatcher", lambda now: None, lambda: None, lambda: self.now, settle=self.asked.append
        )
        self.dispatcher.start()
        self.heap: Any = self.dispatcher

    def sync(self) -> None:
        for _ in range(3):
            done = threading.Event()
            self.dispatcher.post(None, done.set)
            assert done.wait(10)


@pytest.fixture
def lab() -> Iterator[Lab]:
    lab = Lab()
    yield lab
    lab.dispatcher.stop()
    assert lab.dispatcher.join(10)


def test_f09_a_late_deadline_lets_in_what_has_come_first(lab: Lab) -> None:
    lab.dispatcher.post(None, lab.dispatcher.at, 101.0, None, lab.seen.append, "deadline")
    lab.sync()
    lab.now = 104.0
    lab.sync()
    assert lab.seen == []
    assert len(lab.asked) == 1
    lab.dispatcher.post(None, lab.seen.append, "exited")  # what the reader found
    lab.asked.pop()()
    lab.sync()
    assert lab.seen == ["exited", "deadline"]
    assert lab.asked == []


def test_f09_a_deadline_that_is_seen_in_time_asks_nobody(lab: Lab) -> None:
    lab.dispatcher.post(None, lab.dispatcher.at, 100.1, None, lab.seen.append, "deadline")
    lab.sync()
    lab.now = 100.12
    lab.sync()
    assert lab.seen == ["deadline"]
    assert lab.asked == []


def test_f09_a_reader_that_never_comes_to_an_end_holds_a_deadline_for_a_moment(lab: Lab) -> None:
    lab.dispatcher.post(None, lab.dispatcher.at, 101.0, None, lab.seen.append, "deadline")
    lab.sync()
    lab.now = 104.0
    lab.sync()
    lab.now += SETTLE[1]
    lab.sync()
    assert lab.seen == ["deadline"]
    lab.asked.pop()()  # too late, and of no effect
    lab.sync()
    assert lab.seen == ["deadline"]


def test_f09_a_limit_on_an_exchange_does_not_count_the_standstill(lab: Lab) -> None:
    lab.dispatcher.post(None, lab.dispatcher.after, 3.0, None, lab.seen.append, "unanswered")
    lab.sync()
    lab.now = 101.0 + TICK
    lab.sync()
    lab.now += 20.0
    lab.sync()
    lab.asked.pop()()
    lab.sync()
    assert lab.seen == []
    for _ in range(8):  # as the thread looks by itself
        lab.now += TICK
        lab.sync()
    assert lab.seen == ["unanswered"]


def test_f09_what_is_put_behind_what_has_come_comes_behind_it(lab: Lab) -> None:
    lab.dispatcher.post(None, lab.dispatcher.behind, None, lab.seen.append, "stop")
    lab.sync()
    assert lab.seen == []
    lab.dispatcher.post(None, lab.seen.append, "exited")
    lab.asked.pop()()
    lab.sync()
    assert lab.seen == ["exited", "stop"]


# -- the threads that read --------------------------------------------------------------------------------------------


class Pipe:
    """Something to read, a byte at a time."""

    def __init__(self, size: int) -> None:
        self.fd, out = os.pipe()
        os.set_blocking(self.fd, False)
        os.write(out, bytes(size))
        self.out = out
        self.taken = 0

    def adopted(self, reader: Reader) -> None:
        """See `Readable`."""

    def readable(self) -> bool:
        try:
            self.taken += len(os.read(self.fd, 1))
        except BlockingIOError:
            pass
        return False

    def writable(self) -> None:
        """See `Readable`."""

    def hung_up(self) -> None:
        """See `Readable`."""

    def abandon(self) -> None:
        """See `Readable`."""

    def close(self) -> None:
        os.close(self.fd)
        os.close(self.out)


def test_f09_the_reader_has_read_all_that_had_come_when_it_says_so() -> None:
    pipes = [Pipe(size) for size in (0, 1, 20)]
    reader = Reader()
    seen: list[int] = []
    said = threading.Event()

    def settled() -> None:
        seen.append(sum(pipe.taken for pipe in pipes))
        said.set()

    try:
        for pipe in pipes:
            reader.add(pipe.fd, pipe)
        settling = Settling(settled)
        reader.add(settling.fd, settling)
        assert said.wait(10)
    finally:
        reader.close()
        for pipe in pipes:
            pipe.close()
    assert seen == [21]


@pytest.mark.parametrize("endless", [False, True], ids=["", "endless"])
def test_f09_the_watcher_has_served_all_that_had_come_when_it_says_so(*, endless: bool) -> None:
    watch = Watcher()
    pipe = Pipe(5)
    seen: list[int] = []
    said = threading.Event()

    def served(events: int) -> None:
        pipe.readable()
        if endless:
            os.write(pipe.out, b"x")

    def settled() -> None:
        seen.append(pipe.taken)
        said.set()

    try:
        watch.watch(pipe.fd, 1, served)
        watch.settle(settled)
        assert said.wait(10)
    finally:
        watch.close()
        pipe.close()
    assert seen[0] >= 5


def test_f09_a_command_of_a_group_source_that_ended_in_time_has_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.monotonic
    began = real()
    # The clock of a process that is stopped right after it started the command.
    monkeypatch.setattr("time.monotonic", lambda: real() + (60.0 if real() > began + 0.001 else 0.0))
    assert shell.run("echo a b", variables={}, folder=None, timeout=5.0) == "a b\n"


def stop(child: Child, after: float) -> None:
    """Let a program run for so long, and stop it for a while."""
    time.sleep(after)
    os.kill(child.process.pid, signal.SIGSTOP)
    time.sleep(STOPPED)
    os.kill(child.process.pid, signal.SIGCONT)


# -- whole programs ---------------------------------------------------------------------------------------------------

WARM = """
nodes, options = GIVEN["nodes"], GIVEN["options"]
def told(worker):
    return sorted({(result.outcome.name, result.why, str(result.stdout)) for result in worker.results()})
task.run("true", nodes=nodes, **options)
say("begun")
"""
COLD = WARM.replace('task.run("true", nodes=nodes, **options)', "")
DONE = [("EXITED", "", "done\n")]

#: what is run, after how many seconds it is stopped, and what all nodes are told to have done
PROGRAMS = {
    "limits of commands": (
        WARM
        + """
limits = ({"timeout": 1.2}, {"idle_timeout": 1.2}, {"deadline": 1.2})
workers = [task.submit("sleep 0.8; echo done", nodes=nodes, **limit, **options) for limit in limits]
workers.append(task.submit("(sleep 1; echo done) &", nodes=nodes, drain_timeout=1.2, **options))
workers.append(task.submit("sleep 0.8; echo done", key="here", timeout=1.2))
say([told(worker) for worker in workers])
""",
        0.4,
        [DONE] * 5,
    ),
    "deadline of the run": (
        WARM
        + """
worker = task.shell("sleep 0.8; echo done", nodes=nodes, **options)
task.run(deadline=1.2)
say(told(worker))
""",
        0.4,
        DONE,
    ),
    "connect_timeout": (
        COLD + 'say(told(task.run("echo done", nodes=nodes, connect_timeout=1.5, **options)))',
        0.08,
        DONE,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", PROGRAMS)
def test_f09_a_program_that_was_stopped_tells_what_was_so(sshd: Sshd, what: str) -> None:
    program, after, said = PROGRAMS[what]
    with Child(program, nodes=sshd.nodes(NODES), options=sshd.options()) as child:
        child.expect("begun")
        stop(child, after)
        assert child.line() == repr(said)
        assert child.process.wait(10) == 0


@pytest.mark.slow
def test_f09_what_has_not_ended_meanwhile_is_still_timed_out_and_ended(sshd: Sshd) -> None:
    program = WARM + (
        "worker = task.run('sleep 600', nodes=nodes, timeout=0.7, stop_grace=1, **options)\n"
        "say({(result.outcome.name, result.remote_state) for result in worker.results()})"
    )
    with Child(program, nodes=sshd.nodes(NODES), options=sshd.options()) as child:
        child.expect("begun")
        stop(child, 0.4)
        assert child.line() == repr({("TIMEOUT", "gone")})
        assert child.process.wait(10) == 0
    wait_until(lambda: not any("sleep 600" in line for line in sshd.processes().values()))


def test_f09_a_pool_that_is_closed_leaves_no_question_open() -> None:
    pool = SshTransport().pool
    said: list[str] = []
    pool.settle(lambda: said.append("no reader"))
    assert said == ["no reader"]
    pool.prepare()
    for _ in range(50):
        pool.settle(lambda: said.append("asked"))
    pool.close_all()
    assert said.count("asked") == 50
    assert not pool._settlings
