# SPDX-License-Identifier: Apache-2.0
"""Runs under faults by chance, whose recorded history is checked: R1, R2, R5, R6 and R12, whatever befell the nodes.

A seed decides what befalls each connection. It is printed when a test fails; `CTASK_HISTORY_SEED` runs that one again.
"""

from __future__ import annotations

import dataclasses
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tenacity import wait_random

from ctask import NodeSet, Outcome, Retry, Task, Worker, task_self
from ctask.errors import ConnectionLost
from ctask.options import Command
from ctask.testing import FakeTransport, Step
from ctask_tests.fix_leaks import wait_until
from ctask_tests.fix_proxy import GENTLE, FaultProxy, Mixture, ProxyFactory, addresses
from ctask_tests.fix_sshd import Sshd
from ctask_tests.history import Event, History, faults, numbered

NODES = 200
#: Lines of each command on each stream, and bytes of a line: some 25 KB, in which most toxics strike.
LINES = 120
WIDTH = 100
PRINTED = {"stdout": numbered(LINES, "o", WIDTH), "stderr": numbered(LINES, "e", WIDTH)}
WEIGHTS = {"none": 50, "delay": 8, "throttle": 4, "slice": 6, "rst": 12, "fin": 6, "stall": 3, "corrupt": 6}

#: What each node runs: it counts that it was run, and prints. A third of the nodes ask for another try, at first.
COMMAND = """\
set -- $SSH_CONNECTION; echo ran >> {folder}/$3.{number}
dots={dots}; i=0
while [ $i -lt {lines} ]; do echo "o$i $dots"; echo "e$i $dots" >&2; i=$((i+1)); done
[ $((${{3##*.}} % 3)) != 0 ] || [ $(grep -c ran {folder}/$3.{number}) -ge 2 ] || exit 75"""

#: With what each of three commands is submitted: what is tried unasked; what is asked for, but never twice; what may
#: run again and again.
POLICIES: tuple[dict[str, Any], ...] = (
    {"deadline": 25},
    {"retry": Retry(4, wait=wait_random(0, 0.3), budget=8), "idle_timeout": 5, "deadline": 20},
    {"retry": Retry(3, wait=0.1, exit_codes={75}, idempotent=True), "idle_timeout": 6, "timeout": 7},
)


class Meddler(History):
    """A history whose handlers abort some nodes when they have printed some lines."""

    def __init__(self, victims: dict[str, int]) -> None:
        super().__init__()
        self._victims = victims
        self.worker: Worker | None = None

    def acts(self, event: Event) -> None:
        if event.name == "read" and event.node in self._victims and self.worker is not None:
            self._victims[event.node] -= 1
            if self._victims[event.node] == 0:
                self.aborted.add(event.node)
                self.worker.abort(event.node)


def show(seed: int, found: list[str]) -> None:
    """Fail with every breach, and with the seed."""
    if found:
        pytest.fail(f"CTASK_HISTORY_SEED={seed}\n" + "\n".join(found[:40]), pytrace=False)


# -- the checker is able to find what it looks for --------------------------------------------------------------------


def fake_script(node: str, command: Command) -> Iterator[Step]:
    """Nodes that end in every way, and print in pieces."""
    number = int(node[1:])
    yield Step("running")
    for start in range(0, len(PRINTED["stdout"]), 700):
        yield Step("out", PRINTED["stdout"][start : start + 700])
        if number % 5 == 1 and start > 3000:
            yield Step("lost", error=ConnectionLost())
            return
        yield Step("err", PRINTED["stderr"][start : start + 700])
    yield Step("signal", b"KILL") if number % 5 == 2 else Step("exit", status=number % 3)


@pytest.fixture
def lived() -> tuple[History, Worker]:
    """A run of the fake transport, in which nothing is wrong."""
    history = History()
    with FakeTransport(fake_script):
        worker = task_self().run("x", nodes="n[1-30]", handler=history, stderr=True)
    return history, worker


def test_a_sound_history_has_no_faults(lived: tuple[History, Worker]) -> None:
    history, worker = lived
    assert len({result.outcome for result in worker.results()}) == 3
    assert faults(history, worker, threading.get_ident(), PRINTED) == []


def at(events: list[Event], name: str, node: str = "", nth: int = 0) -> int:
    return [number for number, event in enumerate(events) if (event.name, event.node) == (name, node)][nth]


def drop(events: list[Event], *where: int) -> list[Event]:
    return [event for number, event in enumerate(events) if number not in where]


def double(events: list[Event], where: int) -> list[Event]:
    return [*events[: where + 1], *events[where:]]


def swap(events: list[Event], one: int, other: int) -> list[Event]:
    swapped = list(events)
    # Only what was told changes places, not when.
    swapped[one] = dataclasses.replace(events[other], at=events[one].at)
    swapped[other] = dataclasses.replace(events[one], at=events[other].at)
    return swapped


def change(events: list[Event], where: int, **what: object) -> list[Event]:
    return [dataclasses.replace(event, **what) if n == where else event for n, event in enumerate(events)]  # type: ignore[arg-type]


WRONG: dict[str, tuple[str, Callable[[list[Event]], list[Event]]]] = {
    "a line is lost": ("R5: n5", lambda e: drop(e, at(e, "read", "n5", 7))),
    "a line is told twice": ("R5: n5", lambda e: double(e, at(e, "read", "n5", 7))),
    "two lines changed places": ("R5: n5", lambda e: swap(e, at(e, "read", "n5", 0), at(e, "read", "n5", 1))),
    "the last line is lost": ("R5: n5", lambda e: drop(e, at(e, "read", "n5", -1))),
    "a node is done twice": ("R1: n7", lambda e: [*e[:-1], e[at(e, "done", "n7")], e[-1]]),
    "a node is never done": ("R1: n7", lambda e: drop(e, at(e, "done", "n7"))),
    "no end is told": ("R1: ev_close", lambda e: e[:-1]),
    "the end is not the last": ("R5: ev_close", lambda e: [*e[:-2], e[-1], e[-2]]),
    "a status comes after the outcome": ("R5: n7", lambda e: swap(e, at(e, "hup", "n7"), at(e, "done", "n7"))),
    "a line comes after the status": ("R5: n5", lambda e: swap(e, at(e, "read", "n5", -1), at(e, "hup", "n5"))),
    "a node prints before it is picked up": ("R5: n5", lambda e: drop(e, at(e, "pickup", "n5"))),
    "a status is not told": ("R1: n6", lambda e: drop(e, at(e, "hup", "n6"))),
    "a status is another": ("R1: n6", lambda e: change(e, at(e, "hup", "n6"), what=77)),
    "another thread": ("R6: ev_hup", lambda e: change(e, at(e, "hup", "n6"), thread=1)),
    "inside another handler": ("R6: ev_hup", lambda e: change(e, at(e, "hup", "n6"), depth=1)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_history_in_which_something_is_wrong_is_found_out(wrong: str, lived: tuple[History, Worker]) -> None:
    history, worker = lived
    word, spoil = WRONG[wrong]
    history.events = spoil(history.events)
    found = faults(history, worker, threading.get_ident(), PRINTED)
    assert any(fault.startswith(word) for fault in found), found


def test_a_worker_whose_nodes_are_ended_before_they_begin_starts_and_closes_all_the_same() -> None:
    history = History()
    task = task_self()
    with FakeTransport(fake_script):
        worker = task.shell("x", nodes="n[1-5]", handler=history, stderr=True)
        history.aborted.update(worker.nodes)
        task.abort()
        assert task.join(5)
    assert [event.name for event in history.events] == ["start", *["done"] * 5, "close"]
    assert faults(history, worker, threading.get_ident(), PRINTED) == []


# -- nodes of the fake transport, with everything at once -------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
def test_histories_of_fake_nodes_hold(seed: int) -> None:
    dice = random.Random(seed)
    histories: list[Meddler] = []
    workers: list[Worker] = []
    task = task_self()
    task.set_info("fanout", dice.choice([3, 17, 64]))
    with FakeTransport(fake_script, delay=dice.choice([0.0, 0.002])):
        for _ in range(6):
            meddler = Meddler({f"n{dice.randint(1, 100)}": dice.randint(1, 40) for _ in range(5)})
            worker = task.submit("x", nodes="n[1-100]", handler=meddler, stderr=True)
            meddler.worker = worker
            histories.append(meddler)
            workers.append(worker)
        for node in dice.sample(range(1, 101), 10):
            histories[0].aborted.add(f"n{node}")
            workers[0].futures[f"n{node}"].cancel()
        task.resume()
    for meddler, worker in zip(histories, workers, strict=True):
        show(seed, faults(meddler, worker, threading.get_ident(), PRINTED))


# -- 200 nodes behind a proxy, each connection with a fate of its own -------------------------------------------------


def seeds(*fixed: int) -> list[int]:
    """The fixed ones, or the one that is asked for."""
    given = os.environ.get("CTASK_HISTORY_SEED")
    return [int(given)] if given else list(fixed)


def counted(folder: Path, number: int) -> Counter[str]:
    """How often the command of one worker was run on each node, by the node's own count."""
    return Counter(
        {path.name.rpartition(".")[0]: path.read_text().count("ran\n") for path in folder.glob(f"*.{number}")}
    )


def check_runs(worker: Worker, runs: Counter[str], *, idempotent: bool) -> Iterator[str]:
    """R2: at most once, unless it may run again, and then once per try; and what is said of it is so."""
    for result in worker.results():
        count = runs[result.node.replace("127.0.2.", "127.0.1.")]
        if count > (len(result.attempts) if idempotent else 1):
            yield f"R2: {result.node}: run {count} times: {result!r}"
        if result.ran is not None and bool(count) != result.ran:
            yield f"R2: {result.node}: ran is {result.ran}, and it was run {count} times: {result!r}"


def set_out(task: Task, sshd: Sshd, proxy: FaultProxy, fronts: list[str]) -> None:
    for name, value in sshd.options().items():
        task.set_info(name, value)
    task.set_info("port", proxy.port)
    task.set_info("known_hosts", sshd.known_hosts_for(*((front, proxy.port) for front in fronts)))
    task.set_info("connect_timeout", 6)
    task.set_info("timeout", 8)
    task.set_info("stop_grace", 0.3)
    task.set_info("drain_timeout", 1)


def live_through(seed: int, sshd: Sshd, fault_proxy: ProxyFactory) -> None:
    """Run three commands on 200 nodes at once, let chance and two meddlers at them, and check all that was seen."""
    dice = random.Random(seed)
    fronts = addresses(NODES)
    mixture = Mixture(seed=seed, weights=WEIGHTS, span=100_000, seconds=2.0)
    proxy = fault_proxy(
        lambda front: (sshd.address(int(front.rpartition(".")[2])), sshd.port), addresses=fronts, mixture=mixture
    )
    before = sshd.processes().keys()
    folder = sshd.folder / f"history-{seed}"
    folder.mkdir()
    folder.chmod(0o777)
    task = task_self()
    set_out(task, sshd, proxy, fronts)
    histories = [Meddler({dice.choice(fronts): dice.randint(1, LINES)}) for _ in range(3)]
    workers: list[Worker] = []
    began = time.monotonic()
    for number, meddler in enumerate(histories):
        command = COMMAND.format(folder=folder, number=number, dots="." * WIDTH, lines=LINES)
        nodes = NodeSet.fromlist(fronts)
        meddler.worker = task.submit(command, nodes=nodes, handler=meddler, stderr=True, **POLICIES[number])
        workers.append(meddler.worker)
    cancelled = dice.choice(fronts)
    histories[0].aborted.add(cancelled)
    canceller = threading.Timer(dice.uniform(0.3, 1.0), workers[0].futures[cancelled].cancel)
    canceller.start()
    task.resume()
    canceller.join()
    elapsed = time.monotonic() - began
    task.disconnect()
    wait_until(lambda: sshd.processes().keys() <= before, timeout=10, what="every command on the nodes is over")
    found = [f"R3: it took {elapsed:.1f} s"] if elapsed > 30 else []
    for number, (meddler, worker) in enumerate(zip(histories, workers, strict=True)):
        found += faults(meddler, worker, threading.get_ident(), PRINTED)
        found += check_runs(worker, counted(folder, number), idempotent=number == 2)
    found += check_the_well(proxy, workers)
    show(seed, found)


def check_the_well(proxy: FaultProxy, workers: list[Worker]) -> Iterator[str]:
    """R4: a node none of whose connections was touched is well, unless it was aborted; and chance has struck."""
    touched = {passage.address for passage in proxy.passages if passage.fate.name not in GENTLE}
    outcomes = Counter(result.outcome for worker in workers for result in worker.results())
    for worker in workers:
        for result in worker.results():
            if result.node not in touched and result.outcome not in (Outcome.EXITED, Outcome.ABORTED):
                yield f"R4: {result.node}: nothing befell it: {result!r}"
    if outcomes[Outcome.EXITED] < NODES or not outcomes[Outcome.LOST] + outcomes[Outcome.UNREACHED]:
        yield f"nothing was tested: {outcomes}"


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize("seed", seeds(1))
def test_histories_of_200_nodes_behind_faults_hold(seed: int, sshd: Sshd, fault_proxy: ProxyFactory) -> None:
    live_through(seed, sshd, fault_proxy)


@pytest.mark.nightly
@pytest.mark.timeout(60)
@pytest.mark.parametrize("turn", range(30))
def test_histories_of_200_nodes_behind_faults_hold_by_any_seed(
    turn: int, sshd: Sshd, fault_proxy: ProxyFactory
) -> None:
    live_through(random.SystemRandom().randrange(1 << 30), sshd, fault_proxy)
