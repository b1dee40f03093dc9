# SPDX-License-Identifier: Apache-2.0
"""The history of a run, and what has to hold for it whatever befell the nodes: the promises R1, R5, R6 and R12.

A `History` is written by the handlers of one worker, in the task's own thread. `faults` reads it when all is over, in
any thread; it returns every breach in words, so that a test can show all of them beside the seed.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ctask import EventHandler, NodeError, NodeResult, Outcome, Output, Worker

__all__ = ["Event", "History", "faults", "numbered"]

#: What each event of a node may only come after.
RANK = {"pickup": 0, "read": 1, "retry": 1, "hup": 2, "done": 3}


@dataclass(frozen=True, slots=True)
class Event:
    """One call of a handler.

    Attributes:
        depth: how many handlers of the task were being run already.
        what: (stream, line), exit status, result or flag, as the event has it.
    """

    at: float
    thread: int
    depth: int
    name: str
    node: str = ""
    what: Any = None


class History(EventHandler):
    """Writes down every event of one worker.

    Attributes:
        aborted: nodes that somebody has aborted: of them, also if they ended first, lines may be left undelivered.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.aborted: set[str] = set()
        self._depth = 0

    def ev_start(self, worker: Worker) -> None:
        self._note("start")

    def ev_pickup(self, worker: Worker, node: str) -> None:
        self._note("pickup", node)

    def ev_read(self, worker: Worker, node: str, sname: str, msg: Output) -> None:
        self._note("read", node, (sname, bytes(msg)))

    def ev_retry(self, worker: Worker, node: str, attempt: int, error: NodeError, delay: float) -> None:
        self._note("retry", node, (attempt, error))

    def ev_hup(self, worker: Worker, node: str, rc: int) -> None:
        self._note("hup", node, rc)

    def ev_done(self, worker: Worker, node: str, result: NodeResult) -> None:
        self._note("done", node, result)

    def ev_close(self, worker: Worker, timedout: bool) -> None:
        self._note("close", "", timedout)

    def acts(self, event: Event) -> None:
        """What a test does inside a handler, after the event was written down."""

    def _note(self, name: str, node: str = "", what: Any = None) -> None:
        event = Event(time.monotonic(), threading.get_ident(), self._depth, name, node, what)
        self.events.append(event)
        self._depth += 1
        try:
            self.acts(event)
        finally:
            self._depth -= 1


def numbered(count: int, mark: str, width: int = 0) -> bytes:
    """What a node prints on one stream: `count` lines that say their stream and their number."""
    return b"".join(f"{mark}{number} {'.' * width}\n".encode() for number in range(count))


def faults(history: History, worker: Worker, owner: int, printed: dict[str, bytes]) -> list[str]:
    """Return what does not hold of a run that is over.

    Args:
        owner: the thread in which handlers may run.
        printed: what a node prints on each stream when its command runs to its end.
    """
    return [
        *_outcomes(history, worker),
        *_threads(history, owner),
        *_order(history, worker),
        *_lines(history, worker, printed),
        *_sums(worker),
    ]


def _outcomes(history: History, worker: Worker) -> Iterator[str]:
    """R1: exactly one outcome per node; every event as often as it is promised."""
    results = list(worker.results())
    nodes = sorted(worker.nodes)
    if sorted(result.node for result in results) != nodes:
        yield "R1: the results are not one for each node"
    counts = Counter((event.name, event.node) for event in history.events)
    for name in ("start", "close"):
        if counts[name, ""] != 1:
            yield f"R1: ev_{name} {counts[name, '']} times"
    told = {event.node: event.what for event in history.events if event.name == "done"}
    statuses = {event.node: event.what for event in history.events if event.name == "hup"}
    for result in results:
        node = result.node
        if counts["done", node] != 1:
            yield f"R1: {node}: ev_done {counts['done', node]} times"
        elif told[node] is not result:
            yield f"R1: {node}: ev_done was given another result"
        if counts["pickup", node] > 1:
            yield f"R1: {node}: ev_pickup {counts['pickup', node]} times"
        retries = [event.what[0] for event in history.events if (event.name, event.node) == ("retry", node)]
        if retries != list(range(1, len(result.attempts))):
            yield f"R1: {node}: ev_retry {retries} for {len(result.attempts)} tries"
        if counts["hup", node] != (result.rc is not None) or statuses.get(node) != result.rc:
            yield f"R1: {node}: ev_hup {counts['hup', node]} times, {statuses.get(node)} for {result.rc}"
        future = worker.futures[node]
        if not future.done() or future.exception() is not result.error:
            yield f"R1: {node}: the future says otherwise: {future!r}"


def _threads(history: History, owner: int) -> Iterator[str]:
    """R6: in the owner's thread only, one at a time."""
    for event in history.events:
        if event.thread != owner:
            yield f"R6: ev_{event.name} of {event.node!r} in another thread"
        if event.depth:
            yield f"R6: ev_{event.name} of {event.node!r} inside another handler"
    if any(one.at > other.at for one, other in zip(history.events, history.events[1:], strict=False)):
        yield "R6: time went backwards"


def _order(history: History, worker: Worker) -> Iterator[str]:
    """R5: start < pickup < read* < hup < done < close."""
    names = [event.name for event in history.events]
    if "start" in names[1:]:
        yield "R5: ev_start is not the first"
    if "close" in names[:-1]:
        yield "R5: ev_close is not the last"
    ranks: dict[str, int] = {}
    for event in history.events:
        if event.name not in RANK:
            continue
        rank = RANK[event.name]
        if rank < ranks.get(event.node, -1):
            yield f"R5: {event.node}: ev_{event.name} came late"
        if rank and event.name != "done" and event.node not in ranks:
            yield f"R5: {event.node}: ev_{event.name} without ev_pickup"
        ranks[event.node] = max(rank, ranks.get(event.node, -1))


def _lines(history: History, worker: Worker, printed: dict[str, bytes]) -> Iterator[str]:
    """R5: per node and stream, lines in order; all of them where the command ended well, else a beginning.

    Of a job that was tried again, each try prints from the beginning, and the last one is stored.
    """
    heard: dict[tuple[str, str], list[bytes]] = defaultdict(list)
    for event in history.events:
        if event.name == "read":
            stream, line = event.what
            heard[event.node, stream].append(line)
        elif event.name == "retry":
            for stream, whole in printed.items():
                lines = heard.pop((event.node, stream), [])
                if lines != whole.split(b"\n")[: len(lines)] and not _cut(lines, whole):
                    yield f"R5: {event.node}: {stream}: lines of an earlier try were lost, doubled or out of order"
    for result in worker.results():
        for stream, whole in printed.items():
            lines = heard[result.node, stream]
            stored = bytes(result.stdout if stream == "stdout" else result.stderr)
            where = f"R5: {result.node}: {stream}, {result!r}"
            ended = result.outcome is Outcome.EXITED and not (result.lingering or result.truncated)
            if ended and stored != whole:
                yield f"{where}: {len(stored)} bytes in place of {len(whole)}"
            if not whole.startswith(stored):
                yield f"{where}: not what was printed"
            kept = stored.split(b"\n")
            kept = kept if kept[-1] else kept[:-1]
            if lines != kept[: len(lines)]:
                yield f"{where}: lines were lost, doubled or out of order"
            muted = result.node in history.aborted or result.outcome is Outcome.ABORTED or _overdue(result)
            if len(lines) < len(kept) and not muted:
                yield f"{where}: {len(lines)} lines of {len(kept)} were delivered"


def _overdue(result: NodeResult) -> bool:
    """Whether the job's deadline has passed: what was not read is not delivered."""
    return result.outcome is Outcome.TIMEOUT and "deadline" in result.why


def _cut(lines: list[bytes], whole: bytes) -> bool:
    """Whether these are the first lines of a stream, the last of them perhaps broken off."""
    return bool(lines) and whole.startswith(b"\n".join(lines))


def _sums(worker: Worker) -> Iterator[str]:
    """R12: groups and failures add up, and each failure says where and why."""
    nodes = len(worker.nodes)
    groups = worker.groups()
    if sum(len(group.nodes) for group in groups) != nodes:
        yield "R12: the groups do not add up"
    if any(one.nodes & other.nodes for number, one in enumerate(groups) for other in groups[:number]):
        yield "R12: a node is in two groups"
    failures = worker.failures()
    if sum(len(found) for found in failures.values()) != len(worker.failed):
        yield "R12: the failures do not add up"
    if len(worker.ok) + len(worker.failed) != nodes or len(worker.pending):
        yield "R12: ok and failed do not add up"
    for result in worker.results():
        if result.outcome not in (Outcome.EXITED, Outcome.SIGNALED):
            error = result.error
            if error is None or error.node != result.node or not error.phase or not result.why:
                yield f"R12: {result.node}: {error!r} does not say where and why"
