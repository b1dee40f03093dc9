# SPDX-License-Identifier: Apache-2.0
"""One node that is sick beside nodes that are well: what every test of a fault asks of such a run.

Runs in the thread of pytest, which owns the task, so that handlers run in it too.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ctask import Curable, NodeResult, Outcome, Task, Worker, task_self
from ctask_tests.fix_leaks import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ctask_tests.fix_sshd import Sshd

__all__ = ["SICK", "WELL", "Course", "accepted", "dialogues", "takes", "task_for", "tried_keys"]

#: The node that a fault strikes, and the one beside it, which stands later in the order.
SICK = "sick"
WELL = "well1"

#: What sshd logs of a login: every method's tries, and its success.
_TRIES = re.compile(r"(?:Accepted|Failed|Postponed|Partial) (\S+) for")


def task_for(sshd: Sshd, *, well: int = 1, sick: dict[str, Any] | None = None, **options: Any) -> Task:
    """Return this thread's task, with nodes well1, well2, … on the real sshd, and `sick` where that says."""
    task = task_self()
    for name, value in {**sshd.options(), **options}.items():
        task.set_info(name, value)
    for number in range(1, well + 1):
        task.node_options(f"well{number}", address=sshd.address(number))
    if sick is not None:
        task.node_options(SICK, **sick)
    return task


class Course:
    """One command on some nodes: run to its end, with an account of every event that is promised once.

    Attributes: `worker`; `elapsed` (seconds); `ended` (nodes, in the order of their `ev_done`).
    """

    def __init__(self, task: Task, nodes: list[str], command: str = "echo ok", **options: Any) -> None:
        self.ended: list[str] = []
        self._told: Counter[tuple[str, str]] = Counter()
        self._rcs: dict[str, int] = {}
        self._began = time.monotonic()
        self.elapsed = 0.0
        self._asked = options.get("retry") is not None
        self.worker: Worker = task.submit(
            command,
            nodes=nodes,
            on_pickup=lambda worker, node: self._tell("pickup", node),
            on_hup=self._hup,
            on_done=self._done,
            on_close=lambda worker, timedout: self._tell("close", ""),
            **options,
        )

    def end(self) -> Course:
        """Wait for the end, and look that each node has exactly one outcome, told once in every way."""
        self.worker.task.resume()
        self.elapsed = time.monotonic() - self._began
        nodes = list(self.worker.nodes)
        results = list(self.worker.results())
        assert sorted(result.node for result in results) == sorted(nodes)
        assert sorted(self.ended) == sorted(nodes)
        assert self._told["close", ""] == 1
        for result in results:
            self._look_at(result)
        assert sum(len(found) for found in self.worker.failures().values()) == len(self.worker.failed)
        assert sum(len(group.nodes) for group in self.worker.groups()) == len(nodes)
        return self

    def result(self, node: str) -> NodeResult:
        """What became of a node; never raises for it."""
        return next(result for result in self.worker.results() if result.node == node)

    @property
    def sick(self) -> NodeResult:
        """What became of the sick node, where all others are well."""
        for result in self.worker.results():
            if result.node != SICK:
                assert (result.node, result.outcome, result.rc) == (result.node, Outcome.EXITED, 0), result
                assert result.stdout == b"ok\n"
        return self.result(SICK)

    def _look_at(self, result: NodeResult) -> None:
        node = result.node
        has_rc = result.rc is not None
        assert self._told["pickup", node] == self._told["done", node] == 1
        assert (self._told["hup", node], self._rcs.get(node)) == (int(has_rc), result.rc)
        assert len(result.attempts) <= 3
        for attempt in result.attempts[:-1] if not self._asked else ():
            assert attempt.error is not None
            assert attempt.error.curable is Curable.BUSY, "only a busy server is tried again without being asked"
        assert self.worker.futures[node].exception() is result.error
        error = result.error
        if error is None:
            return
        assert (error.node, error.phase) == (node, result.phase)
        assert error.result is result
        assert error.attempts == result.attempts
        assert str(error).startswith(f"{node}: ")
        assert str(error).isprintable()
        key = (error.phase, type(error).__name__, error.folded())
        assert node in self.worker.failures()[key]
        assert result.why == error.why()

    def _tell(self, event: str, node: str) -> None:
        assert not self._told["close", ""]
        self._told[event, node] += 1

    def _hup(self, worker: Worker, node: str, rc: int) -> None:
        self._tell("hup", node)
        self._rcs[node] = rc

    def _done(self, worker: Worker, node: str, result: NodeResult) -> None:
        self._tell("done", node)
        self.ended.append(node)


@contextmanager
def takes(limit: float) -> Iterator[None]:
    """What is done here takes `limit` seconds: never less, and at most one more."""
    began = time.monotonic()
    yield
    elapsed = time.monotonic() - began
    assert limit <= elapsed <= limit + 1.0


def dialogues(sshd: Sshd, address: str, since: int) -> list[str]:
    """What sshd has logged since then of each connection to one of its nodes."""
    log = sshd.log(since)
    ports = re.findall(rf"Connection from \S+ port (\d+) on {re.escape(address)} port", log)
    return ["\n".join(line for line in log.splitlines() if f" port {port}" in line) for port in ports]


def accepted(sshd: Sshd, address: str, since: int) -> int:
    """How many logins to one of its nodes sshd has let in since then."""
    return sum("Accepted publickey" in text for text in dialogues(sshd, address, since))


def tried_keys(sshd: Sshd, address: str, since: int) -> list[list[str]]:
    """For each connection to a node, which has to be over, the methods that a login was tried by, in order."""

    def over() -> bool:
        texts = dialogues(sshd, address, since)
        return bool(texts) and all(re.search(r"Connection (closed|reset) by|Disconnected from", t) for t in texts)

    wait_until(over, what=f"sshd's connections to {address} are over")
    return [_TRIES.findall(text) for text in dialogues(sshd, address, since)]
