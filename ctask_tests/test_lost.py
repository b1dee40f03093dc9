# SPDX-License-Identifier: Apache-2.0
"""Connections that are lost under load, wherever they are; bytes that change on their way; keys that change.

Runs in the thread of pytest, over the public Task API: a real sshd behind proxies that break things.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from ctask import ConnectionLost, NodeSet, Outcome, Task, Worker
from ctask.transports.ssh.packets import WirePacketizer
from ctask.transports.ssh.transport import Link
from ctask_tests.fix_leaks import wait_until
from ctask_tests.fix_proxy import GENTLE, Fin, Mixture, OnEvent, Rst, Rule, Stall, addresses
from ctask_tests.sick_node import WELL, Course, takes, task_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ctask import NodeResult
    from ctask_tests.fix_proxy import FaultProxy, ProxyFactory
    from ctask_tests.fix_sshd import Sshd, SshdFactory

#: Nodes behind the proxies of these tests: 127.0.2.n stands before 127.0.1.(n + FIRST).
FIRST = 60

#: Seconds between the questions to a node in use.
INTERVAL = 0.3

#: A line, without an end.
FLOOD = "yes 0123456789abcdef"


def behind(sshd: Sshd, front: str) -> tuple[str, int]:
    return sshd.address(FIRST + int(front.rpartition(".")[2])), sshd.port


def sick_task(sshd: Sshd, proxy: FaultProxy, fronts: list[str], **options: Any) -> Task:
    """A task whose nodes `fronts` are reached through the proxy, and `WELL` is not."""
    task = task_for(sshd, alive_interval=INTERVAL)
    known_hosts = sshd.known_hosts_for(*((front, proxy.port) for front in fronts))
    task.node_options(",".join(fronts), port=proxy.port, known_hosts=known_hosts, **options)
    return task


def results_of(workers: list[Worker], nodes: int) -> list[NodeResult]:
    """What became of every job, exactly one outcome each."""
    results = [result for worker in workers for result in worker.results()]
    assert len(results) == nodes * len(workers)
    for worker in workers:
        assert len({result.node for result in worker.results()}) == nodes
    return results


# --- under load


class Load:
    """Six floods on each of some nodes, with a command beside them on a node that is well."""

    def __init__(self, task: Task, nodes: list[str], jobs: int = 6, command: str = FLOOD) -> None:
        self.task = task
        self.nodes = nodes
        self.bystander = task.submit("read line; echo ok", nodes=WELL, stdin=True)
        names = ",".join(nodes)
        # They stay small: one line in a moment, from then on as many as come.
        self.workers = [task.submit(command, nodes=names, stdin=False) for _ in range(jobs)]
        wait_until(self.flows, timeout=20, what="output of every job")

    def flows(self) -> bool:
        captures = [job.capture for worker in self.workers for job in worker.jobs]
        return all(capture is not None and capture.total > 0 for capture in captures)

    def end(self, seconds: float) -> list[NodeResult]:
        """Wait until all are lost, `seconds` from now, and look at every one."""
        with takes(seconds):
            for worker in self.workers:
                assert worker.wait(20)
        assert not self.bystander.done()
        self.bystander.write("go\n")
        assert self.bystander.wait(10)
        assert [result.stdout for result in self.bystander.results()] == [b"ok\n"]
        results = results_of(self.workers, len(self.nodes))
        for result in results:
            assert (type(result.error), result.outcome, result.rc) == (ConnectionLost, Outcome.LOST, 255)
            assert (result.ran, result.phase, len(result.attempts)) == (None, "running", 1)
            assert result.stdout
            text = bytes(result.stdout)
            assert text == (b"0123456789abcdef\n" * (len(text) // 17 + 1))[: len(text)]
        return results


@pytest.mark.parametrize(("do", "seconds"), [(Rst(), 0.0), (Fin(), 0.0), (Stall(), 3 * INTERVAL)])
def test_connections_that_are_cut_with_six_jobs_on_each(
    sshd: Sshd, fault_proxy: ProxyFactory, do: Rst | Fin | Stall, seconds: float
) -> None:
    event = threading.Event()
    fronts = addresses(2)
    rules = [Rule("down", OnEvent(event), do), Rule("up", OnEvent(event), do)]
    proxy = fault_proxy(lambda front: behind(sshd, front), *rules, addresses=fronts)
    load = Load(sick_task(sshd, proxy, fronts), fronts)
    assert proxy.connections == 2
    event.set()
    results = load.end(seconds)
    assert all(("no sign of life" in str(result.error)) == isinstance(do, Stall) for result in results)
    event.clear()
    if not isinstance(do, Stall):  # the next connection is none of those that were cut
        proxy._rules = ()
        again = load.task.run("echo again", nodes=",".join(fronts))
        assert again is not None
        assert [result.stdout for result in again.results()] == [b"again\n"] * 2


def test_a_command_that_kills_its_own_server_process_takes_its_neighbours_along(sshd: Sshd) -> None:
    task = task_for(sshd)
    task.node_options("sick", address=sshd.address(FIRST))
    load = Load(task, ["sick"], jobs=5)
    killer = task.submit("echo now; sleep 0.3; kill -9 $PPID; sleep 60", nodes="sick", stdin=False)
    load.end(0.0)
    (result,) = killer.results()
    assert (result.outcome, result.ran, result.stdout) == (Outcome.LOST, None, b"now\n")
    task.node_options("sick", address=sshd.address(FIRST))
    assert Course(task, ["sick", WELL]).end().sick.rc == 0


def test_f08_a_node_that_freezes_with_six_jobs_on_it(sshd: Sshd) -> None:
    task = task_for(sshd)
    task.node_options("sick", address=sshd.address(FIRST), alive_interval=INTERVAL)
    load = Load(task, ["sick"])
    pids = sshd.sessions(sshd.address(FIRST))
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        results = load.end(3 * INTERVAL)
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    assert all("no sign of life" in str(result.error) for result in results)


def test_a_server_that_is_restarted_under_load_loses_all_and_serves_the_next_run(sshd_factory: SshdFactory) -> None:
    server = sshd_factory()
    task = task_for(server)
    nodes = [f"sick{number}" for number in range(3)]
    for number, node in enumerate(nodes):
        task.node_options(node, address=server.address(FIRST + number))
    workers = [task.submit(FLOOD, nodes=",".join(nodes), stdin=False) for _ in range(4)]
    wait_until(lambda: all(job.phase == "running" for worker in workers for job in worker.jobs))
    server.restart()
    for worker in workers:
        assert worker.wait(2)
    assert {result.outcome for result in results_of(workers, 3)} == {Outcome.LOST}
    again = task.run("echo again", nodes=",".join(nodes))
    assert again is not None
    assert [result.stdout for result in again.results()] == [b"again\n"] * 3


# --- in every phase


@pytest.mark.slow
@pytest.mark.parametrize("toxic", ["rst", "fin", "stall", "corrupt"])
def test_connections_that_are_struck_at_any_byte(sshd: Sshd, fault_proxy: ProxyFactory, toxic: str) -> None:
    fronts = addresses(40)
    # The handshake has about 4 KB in each direction; what follows is the login and the command.
    mixture = Mixture(11, {toxic: 1.0}, span=12_000, seconds=0.4)
    proxy = fault_proxy(lambda front: behind(sshd, front), addresses=fronts, mixture=mixture)
    task = sick_task(sshd, proxy, fronts, connect_timeout=2.0, retry=None)
    trace = sshd.folder / f"trace-{toxic}"
    trace.mkdir(mode=0o777)
    trace.chmod(0o777)
    command = f"touch {trace}/${{SSH_CONNECTION% *}}; head -c 4000 /dev/zero | tr '\\0' x; echo"
    command = command.replace("${SSH_CONNECTION% *}", "$(echo $SSH_CONNECTION | cut -d' ' -f3)")
    worker = task.submit(command, nodes=",".join([*fronts, WELL]), stdin=False)
    with within(2.0 + 3 * INTERVAL + 1.7 + 1.0):
        assert worker.wait(20)
    results = results_of([worker], 41)
    by_node = {result.node: result for result in results}
    assert by_node[WELL].outcome is Outcome.EXITED
    struck: dict[str, bool] = {}
    for passage in proxy.passages:
        struck[passage.address] = passage.struck or struck.get(passage.address, False)
    assert sum(struck.values()) >= 10, "the mixture struck nobody"
    whole = b"x" * 4_000 + b"\n"
    # Whatever had begun has made its mark by now.
    wait_until(lambda: not any(str(trace) in title for title in sshd.processes().values()))
    for front in fronts:
        result = by_node[front]
        ran = (trace / behind(sshd, front)[0]).exists()
        if result.outcome is Outcome.EXITED:
            assert (result.rc, bytes(result.stdout), result.ran) == (0, whole, True)
        else:
            assert struck[front], result
            assert result.outcome in {Outcome.UNREACHED, Outcome.LOST}
            assert whole.startswith(bytes(result.stdout))
            assert result.error is not None
            assert result.error.node == front
            # An end that was told is heard at once; nobody waits for its time to be over.
            waited = any(words in str(result.error) for words in ("no answer", "no sign of life"))
            assert not waited or toxic not in {"rst", "fin"}
        if result.ran is not None:
            assert result.ran is ran, result
    assert {result.outcome for result in results} > {Outcome.EXITED}


def test_gentle_toxics_harm_nobody(sshd: Sshd, fault_proxy: ProxyFactory) -> None:
    fronts = addresses(16)
    mixture = Mixture(4, dict.fromkeys(GENTLE, 1.0))
    proxy = fault_proxy(lambda front: behind(sshd, front), addresses=fronts, mixture=mixture)
    task = sick_task(sshd, proxy, fronts)
    worker = task.run("head -c 20000 /dev/zero", nodes=NodeSet.fromlist(fronts), stdin=False)
    assert worker is not None
    assert {bytes(result.stdout) for result in results_of([worker], 16)} == {bytes(20_000)}
    assert {passage.fate.name for passage in proxy.passages} == GENTLE
    assert proxy.connections == 16


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began <= seconds


# --- new keys under load


@pytest.fixture
def rekeys(monkeypatch: pytest.MonkeyPatch) -> list[Link]:
    """Note each exchange of keys, the first one of a connection included; keys are changed every 0.5 MB."""
    seen: list[Link] = []
    whole = Link._on_newkeys

    def count(link: Link, payload: bytes) -> None:
        seen.append(link)
        whole(link, payload)

    monkeypatch.setattr(Link, "_on_newkeys", count)
    monkeypatch.setattr(WirePacketizer, "REKEY_BYTES", 500_000)
    return seen


def cat(task: Task, node: str, payload: bytes) -> Worker:
    worker = task.submit("cat", nodes=node, stdin=True)
    worker.write(payload)
    worker.set_write_eof()
    return worker


@pytest.mark.parametrize("jobs", [1, 8])
def test_e11_nobody_notices_new_keys(sshd: Sshd, rekeys: list[Link], jobs: int) -> None:
    task = task_for(sshd)
    task.node_options("sick", address=sshd.address(FIRST))
    size = 8_000_000 // jobs
    shapes: list[Callable[[int], tuple[Worker, bytes]]] = [
        lambda number: (cat(task, "sick", payload), payload),  # both directions
        lambda number: (task.submit(f"head -c {size} /dev/zero; exit 3", nodes="sick", stdin=False), bytes(size)),
    ]
    payload = os.urandom(size)
    started = [shapes[number % 2](number) for number in range(jobs)]
    if jobs == 1:
        started.append(shapes[1](1))
    lines = task.submit("seq 200000", nodes="sick", stdin=False)
    for number, (worker, wanted) in enumerate(started):
        assert worker.wait(20)
        (result,) = worker.results()
        assert (result.outcome, result.rc, result.error) == (Outcome.EXITED, 3 if number % 2 else 0, None)
        assert bytes(result.stdout) == wanted
    assert lines.wait(20)
    assert next(lines.results()).stdout.split() == [b"%d" % n for n in range(1, 200_001)]
    # The first, and one after each 0.5 MB, not counted what is on its way meanwhile.
    assert max(rekeys.count(link) for link in rekeys) > 4


def test_e11_new_keys_that_the_node_asks_for(sshd_factory: SshdFactory, rekeys: list[Link]) -> None:
    server = sshd_factory("RekeyLimit 512K")
    task = task_for(server)
    task.node_options("sick", address=server.address(FIRST))
    payload = os.urandom(2_000_000)
    workers = [cat(task, "sick", payload) for _ in range(4)]
    for worker in workers:
        assert worker.wait(20)
        assert [bytes(result.stdout) for result in worker.results()] == [payload]
    assert max(rekeys.count(link) for link in rekeys) > 8
