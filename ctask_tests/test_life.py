# SPDX-License-Identifier: Apache-2.0
"""Long lives: many submissions, many nodes, many threads, long queues, a fan-out that changes, few descriptors.

What grows is measured in child processes, after it had its time to warm up.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial

import pytest

from ctask import NodeSet, Outcome, task_self
from ctask.options import Command
from ctask.testing import FakeTransport, Step
from ctask_tests.child import Child
from ctask_tests.fake_nodes import HANGS, nodes
from ctask_tests.fix_leaks import wait_until
from ctask_tests.fix_proxy import silent
from ctask_tests.fix_sshd import Sshd
from ctask_tests.real_nodes import task_of

#: What a process may gain after its warm-up, in KiB: arenas that a new high mark of threads or garbage has filled.
GROWTH = 6_000

#: What the children of this file begin with.
STATUS = r"""
import gc, json
def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name + ":"))
"""


# -- a program that submits for a month -------------------------------------------------------------------------------

SUBMITS = STATUS + r"""
from ctask.testing import FakeTransport, Step

def script(node, command):
    if command.line == b"raise":
        return [Step("running"), Step("out", b"raise\n"), Step("exit")]
    if node == "n7":
        return [Step("running"), Step("signal", b"KILL")]
    return [Step("running"), Step("out", b"fine\n" * 20), Step("exit", status=1 if node == "n9" else 0)]

import logging
logging.getLogger("ctask.handler").setLevel(logging.CRITICAL)
heard = 0
def once(number):
    global heard
    def read(worker, node, sname, msg):  # made anew for each worker, and holding much
        global heard
        heard += 1
        if msg == "raise":
            raise ValueError(ballast[:10])
    ballast = "x" * 100_000
    worker = task.submit("raise" if number % 20 == 0 else "x", nodes=NODES, on_read=read, on_done=lambda *_: None)
    assert worker.wait()
    assert len(worker.ok) in (48, 50)

NODES = NodeSet("n[1-50]")
with FakeTransport(script) as fake:
    looks = []
    for number in range(1, GIVEN["rounds"] + 1):
        once(number)
        fake.sessions.clear()  # which remembers all
        if number in GIVEN["looks"]:
            gc.collect()
            looks.append((status("VmRSS"), status("VmHWM"), threading.active_count(), len(gc.get_objects())))
say(json.dumps([heard, looks]))
"""


@pytest.mark.parametrize(
    "rounds",
    [
        pytest.param(800, marks=[pytest.mark.slow, pytest.mark.timeout(90)]),
        pytest.param(2000, marks=[pytest.mark.nightly, pytest.mark.timeout(200)]),
    ],
)
def test_submissions_to_50_nodes_keep_their_memory(rounds: int) -> None:
    looks = [rounds // 2, 3 * rounds // 4, rounds]  # by the first, as many errors of handlers are kept as ever will be
    with Child(SUBMITS, rounds=rounds, looks=looks) as child:
        heard, seen = json.loads(child.line() or "[]") or pytest.fail(child.errors())
        assert child.end() == 0, child.errors()
    assert heard == (rounds - rounds // 20) * 49 * 20 + rounds // 20 * 50
    first, *_, last = seen
    assert last[0] - first[0] < GROWTH, seen
    assert last[1] - first[1] < GROWTH, seen
    assert last[2] == first[2], seen
    # Objects that stay with every submission would be thousands.
    assert last[3] - first[3] < 500, seen


KEPT = STATUS + r"""
for name, value in GIVEN["options"].items():
    task.set_info(name, value)
looks = []
for number in range(1, GIVEN["rounds"] + 1):
    lines = []
    worker = task.submit("echo fine", nodes=GIVEN["nodes"], on_read=lambda worker, node, sname, msg: lines.append(msg))
    assert worker.wait() and len(worker.ok) == len(lines) == 50, worker
    if number in GIVEN["looks"]:
        gc.collect()
        looks.append((status("VmRSS"), status("VmHWM"), len(os.listdir("/proc/self/fd")), len(gc.get_objects())))
say(json.dumps(looks))
"""


def keep_connections(sshd: Sshd, rounds: int, looks: Sequence[int]) -> None:
    given = {"options": dict(sshd.options()), "nodes": sshd.nodes(50)}
    with Child(KEPT, rounds=rounds, looks=looks, **given) as child:
        seen = json.loads(child.line() or "[]") or pytest.fail(child.errors())
        assert child.end() == 0, child.errors()
    first, *_, last = seen
    assert last[0] - first[0] < GROWTH, seen
    assert last[1] - first[1] < GROWTH, seen
    assert last[2] == first[2], seen
    assert last[3] - first[3] < 500, seen


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_60_submissions_to_50_real_nodes_keep_connections_and_memory(sshd: Sshd) -> None:
    keep_connections(sshd, 60, [30, 60])


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_2000_submissions_to_50_real_nodes_keep_connections_and_memory(sshd: Sshd) -> None:
    keep_connections(sshd, 2000, [500, 1000, 1500, 2000])


# -- 500 nodes --------------------------------------------------------------------------------------------------------

MANY = STATUS + r"""
for name, value in GIVEN["options"].items():
    task.set_info(name, value)
task.set_info("fanout", 64)
ALL = NodeSet.fromlist(GIVEN["nodes"])
looks = []
for number in range(1, 11):
    ends = []
    began = time.monotonic()
    worker = task.run("echo $SSH_CONNECTION", nodes=ALL, on_done=lambda worker, node, result: ends.append(node))
    assert sorted(ends) == sorted(ALL)
    assert len(worker.ok) == 500, worker.failures()
    assert all(result.stdout.split()[2].decode() == result.node for result in worker.results()), worker
    assert sum(len(group.nodes) for group in worker.groups()) == 500
    del worker
    gc.collect()
    looks.append((status("VmRSS"), round(time.monotonic() - began, 2), len(os.listdir("/proc/self/fd"))))
say(json.dumps(looks))
"""


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_500_nodes_ten_times_with_a_fanout_of_64(sshd: Sshd) -> None:
    """One sshd is 500 nodes in two blocks of addresses; after the first round the connections are kept."""
    more = [f"127.0.3.{n}" for n in range(1, 251)]
    known = sshd.known_hosts_for(*((node, sshd.port) for node in more))
    given = {"options": {**sshd.options(), "known_hosts": known}, "nodes": [*sshd.nodes(250), *more]}
    with Child(MANY, **given) as child:
        seen = json.loads(child.line() or "[]") or pytest.fail(child.errors())
        assert child.end() == 0, child.errors()
        assert child.errors() == ""
    assert len(seen) == 10
    assert seen[-1][2] == seen[1][2], seen
    assert seen[-1][0] - seen[2][0] < GROWTH, seen
    sshd.wait_idle(timeout=10)


# -- H08: a hundred threads share kept connections --------------------------------------------------------------------


def test_h08_a_hundred_threads_share_kept_connections(sshd: Sshd) -> None:
    addresses = sshd.nodes(12)
    options = sshd.options()
    warm = task_of(sshd).run("true", nodes=addresses)
    assert len(warm.ok) == 12
    since = len(sshd.log())
    told: dict[int, list[tuple[str, bytes]]] = {}
    handlers: dict[int, set[int]] = {}
    start = threading.Barrier(100)

    def work(number: int) -> None:
        task = task_self()
        threads: set[int] = set()
        found: list[tuple[str, bytes]] = []
        start.wait(20)
        for shift in range(5):
            worker = task.run(
                f"echo {number} $SSH_CONNECTION",
                nodes=addresses[(number + shift) % 12],
                on_read=lambda worker, node, sname, msg: threads.add(threading.get_ident()),
                **options,
            )
            found += [(result.node, bytes(result.stdout)) for result in worker.results()]
        handlers[number] = threads | {threading.get_ident()}
        told[number] = found

    threads = [threading.Thread(target=work, args=(number,)) for number in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(25)
    assert sorted(told) == list(range(100))
    for number, results in told.items():
        assert [node for node, _ in results] == [addresses[(number + shift) % 12] for shift in range(5)]
        for node, output in results:
            words = output.decode().split()
            assert (words[0], words[3]) == (str(number), node)
        assert len(handlers[number]) == 1
    # 500 commands on 12 nodes: those who find no place at the start log in, and all others use what is there.
    assert sshd.log(since).count("Accepted publickey") < 250


# -- long queues ------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake() -> Iterator[FakeTransport]:
    with FakeTransport(nodes(HANGS)) as fake:
        yield fake


@pytest.mark.parametrize("how", ["task", "worker", "futures"])
def test_10000_queued_jobs_are_aborted_at_once(fake: FakeTransport, how: str) -> None:
    task = task_self()
    ends: Counter[str] = Counter()
    closes: list[bool] = []
    worker = task.submit(
        "x",
        nodes="n[1-10000]",
        on_done=lambda worker, node, result: ends.update([node]),
        on_close=lambda worker, timedout: closes.append(timedout),
    )
    wait_until(lambda: sum(session.sent for session in fake.sessions) == 64)
    began = time.monotonic()
    if how == "task":
        task.abort()
    elif how == "worker":
        worker.abort()
    else:
        for future in worker:
            future.cancel()
    assert worker.wait(10)
    assert time.monotonic() - began < 4.0
    if how != "futures":  # each of which is a call of its own
        assert len(fake.sessions) == 64, "nothing was begun on the way to the end"
    assert len(ends) == 10_000
    assert set(ends.values()) == {1}
    assert closes == [False]
    results = list(worker.results())
    assert {result.outcome for result in results} == {Outcome.ABORTED}
    assert sum(result.ran is False for result in results) == 10_000 - sum(session.sent for session in fake.sessions)
    assert repr(task).endswith("0 slots taken, 0 dialing>")


def test_2000_real_jobs_are_queued_and_aborted(sshd: Sshd) -> None:
    task = task_of(sshd)
    task.set_info("fanout", 8)
    worker = task.submit("exec cat", nodes=sshd.nodes(250), stdin=True)
    others = [task.submit("echo never", nodes=sshd.nodes(250)) for _ in range(7)]
    wait_until(lambda: sum(job.phase == "running" for job in worker.jobs) == 8, timeout=10)
    began = time.monotonic()
    task.abort()
    assert task.join(10)
    assert time.monotonic() - began < 3.0
    for each in (worker, *others):
        assert len({result.node for result in each.results()}) == 250
        assert {result.outcome for result in each.results()} == {Outcome.ABORTED}
    assert sum(result.ran is not False for result in worker.results()) == 8
    assert all(result.ran is False for each in others for result in each.results())
    task.disconnect()
    sshd.wait_idle(timeout=10)


# -- a fan-out that changes -------------------------------------------------------------------------------------------


class Census:
    """Counts how many scripted commands run at once, by what was allowed when each began."""

    def __init__(self, allowed: int) -> None:
        self.now = 0
        self.peaks: Counter[int] = Counter()
        self.over: list[tuple[int, int]] = []
        # The fan-out that holds for certain: a lowered one counts once what ran before is gone.
        self.allowed = allowed

    def script(self, node: str, command: Command) -> list[Step]:
        return [
            Step("running"),
            Step("call", call=self.begin),
            Step("call", call=self.end, after=0.004),
            Step("exit"),
        ]

    def begin(self) -> None:
        self.now += 1
        self.peaks[self.allowed] = max(self.peaks[self.allowed], self.now)
        if self.now > self.allowed:
            self.over.append((self.now, self.allowed))

    def end(self) -> None:
        self.now -= 1


def test_the_fanout_changes_while_it_runs_and_is_never_passed() -> None:
    def few(fanout: int) -> bool:
        return census.now <= fanout and task._engine.plan.fanout == fanout and task._engine.plan.slots <= fanout

    def full(fanout: int) -> bool:
        return census.peaks[fanout] == fanout

    task = task_self()
    census = Census(10)
    with FakeTransport(census.script):
        task.set_info("fanout", 10)
        worker = task.submit("x", nodes="n[1-3000]")
        for fanout in (10, 40, 3, 1, 25, 60):
            census.allowed = max(census.allowed, fanout)
            task.set_info("fanout", fanout)
            wait_until(partial(few, fanout))
            census.allowed = fanout
            wait_until(partial(full, fanout), what=f"{fanout} at once")
        assert worker.wait(20)
    assert census.over == []
    assert set(census.peaks) == {10, 40, 3, 1, 25, 60}
    assert len(worker.ok) == 3000


# -- I01: few descriptors ---------------------------------------------------------------------------------------------

FEW = STATUS + r"""
import logging, resource, socket
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 512))
before = sorted(os.listdir("/proc/self/fd"))
for name, value in GIVEN["options"].items():
    task.set_info(name, value)
warned = []
class Keep(logging.Handler):
    def emit(self, record):
        warned.append((record.name, record.getMessage()))
logging.getLogger("ctask").addHandler(Keep(logging.WARNING))
for number in range(1, 251):
    address, port = GIVEN["mute"]
    task.node_options(f"mute{number}", address=address, port=port, user=f"u{number}", connect_timeout=1)
task.set_info("fanout", 512)
began = time.monotonic()
nodes = [*(f"mute{n}" for n in range(1, 251)), *GIVEN["nodes"]]
worker = task.run("echo ok", nodes=NodeSet.fromlist(nodes))
elapsed = time.monotonic() - began
outcomes = {}
for result in worker.results():
    key = f"{result.outcome.name} {type(result.error).__name__ if result.error else ''}".strip()
    outcomes.setdefault(key, []).append(result.node)
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (256, 512)
local = [task.submit("sleep 0.2", key=n) for n in range(200)]
assert task.join(20)
assert all(worker.exit_code() == 0 for worker in local), [str(worker) for worker in local if worker.exit_code()][:3]
pool = __import__("ctask.transports.ssh").transports.ssh.transport().statistics()
say(json.dumps([{key: str(NodeSet.fromlist(value)) for key, value in outcomes.items()}, warned, elapsed, pool.dials]))
task.disconnect()
close_everything()
def sockets():
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return [link for link in links if os.path.islink(link) and os.readlink(link).startswith("socket:")]
wait_until(lambda: not sockets())
say("clean")
"""


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_i01_with_256_descriptors_a_fanout_of_512_is_lowered_once(sshd: Sshd) -> None:
    healthy = sshd.nodes(20)
    with silent() as mute, Child(FEW, options=dict(sshd.options()), mute=mute, nodes=healthy) as child:
        outcomes, warned, elapsed, dials = json.loads(child.line() or "[]") or pytest.fail(child.errors())
        assert outcomes == {
            "EXITED": str(NodeSet.fromlist(healthy)),
            "UNREACHED BannerError": "mute[1-250]",
        }
        assert warned == [
            ["ctask", "fan-out lowered from 512 to 230: this process may open 256 files (ulimit -n)"]
        ]
        assert dials == 0
        assert 2.0 <= elapsed < 5.0  # two turns of silent nodes
        child.expect("clean")
        assert child.end() == 0, child.errors()
        assert child.errors() == ""


def test_i01_the_command_line_tells_it(sshd: Sshd) -> None:
    program = r"""
import resource, runpy
resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
sys.argv = ["ctask", "-w", ",".join(GIVEN["nodes"]), "-f", "100", "-l", GIVEN["options"]["user"],
    "-i", GIVEN["options"]["identity"], "-o", f"Port={GIVEN['options']['port']}",
    "-o", f"UserKnownHostsFile={GIVEN['options']['known_hosts']}", "sleep 0.5; echo ok"]
runpy.run_module("ctask", run_name="__main__")
"""
    with Child(program, options=dict(sshd.options()), nodes=sshd.nodes(40)) as child:
        lines = []
        while line := child.line():
            lines.append(line)
        status = child.end()
        assert status == 0, child.errors()
        assert sum(line.endswith(": ok") for line in lines) == 40
        assert child.errors().count("ctask: fan-out lowered from 100 to 34: this process may open 60 files") == 1
