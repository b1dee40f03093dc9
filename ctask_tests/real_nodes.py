# SPDX-License-Identifier: Apache-2.0
"""A task on the real sshd by the public API, with a healthy node beside each sick one.

Runs in the thread of pytest, which owns the task; nothing here is shared.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

from ctask import NodeResult, Outcome, Task, Worker, task_self

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ctask_tests.fix_hostile import HostileServer
    from ctask_tests.fix_sshd import Sshd

__all__ = ["LATE", "WELL", "is_well", "outcomes", "reach", "run", "takes", "task_of"]

#: The node that every task of `task_of` knows and that nothing is wrong with.
WELL = "well"

#: How many seconds later than promised a timed end may come.
LATE = 1.0


def task_of(sshd: Sshd) -> Task:
    """Return the task of this thread: its nodes are the server's addresses, and `WELL` is the first of them."""
    task = task_self()
    for name, value in sshd.options().items():
        task.set_info(name, value)
    task.node_options(WELL, address=sshd.address(1))
    return task


def reach(task: Task, node: str, server: HostileServer, **options: Any) -> None:
    """Let `node` be a hostile server."""
    task.node_options(node, address=server.address, **server.options(), **options)


def run(task: Task, command: Any, nodes: Any, **options: Any) -> Worker:
    """Run a command on nodes, with its standard input closed unless it is asked for."""
    worker = task.run(command, nodes=nodes, **{"stdin": False, **options})
    assert worker is not None
    return worker


def outcomes(worker: Worker) -> Mapping[str, NodeResult]:
    """The result of each node; every node has exactly one."""
    results = list(worker.results())
    found = {result.node: result for result in results}
    assert len(results) == len(found) == len(worker.futures)
    return found


def is_well(result: NodeResult) -> bool:
    """Whether nothing that befell another node touched this one."""
    return (result.outcome, result.rc, result.error, result.ran) == (Outcome.EXITED, 0, None, True)


@contextlib.contextmanager
def takes(least: float, *, late: float = LATE) -> Iterator[None]:
    """Hold the block to its time: never early, and at most so late."""
    began = time.monotonic()
    yield
    spent = time.monotonic() - began
    assert least <= spent <= least + late, f"{spent:.3f} s"
