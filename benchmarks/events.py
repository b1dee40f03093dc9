# SPDX-License-Identifier: Apache-2.0
"""P7: a handler that is called with each line of a local command.

Runs in the main thread of a peer's process; nothing is shared.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

from benchmarks.contest import Program
from benchmarks.measure import BenchmarkError, Sample, Setup, measured
from benchmarks.report import Figure, Target

__all__ = ["PROGRAM"]


def sample(names: tuple[str, str], setup: Setup) -> Sample:
    """Count the lines in a handler, and keep the last."""
    task_module, event_module = (importlib.import_module(name) for name in names)
    task = task_module.task_self()
    lines = setup.sizes["lines"]
    handler = _handler(event_module.EventHandler)

    def work() -> None:
        task.shell(f"seq {lines}", key="here", handler=handler)
        task.resume()

    _, cost = measured(work)
    if (handler.lines, bytes(handler.last)) != (lines, str(lines).encode()):
        raise BenchmarkError(f"{handler.lines} lines, the last {handler.last!r}")
    return {"lines": lines / cost.wall / 1000, "CPU": cost.cpu / lines * 1e6}


def _handler(base: Any) -> Any:
    class Handler(base):  # type: ignore[misc]
        lines = 0
        last = b""

        def ev_read(self, worker: Any, node: Any, sname: str, msg: bytes) -> None:
            self.lines += 1
            self.last = msg

    return Handler()


PROGRAM = Program(
    name="events",
    title="P7: a handler per line",
    heading="ev_read for each line of a local `seq {lines}`",
    figures=[Figure("lines", "1000 lines/s", 0), Figure("CPU", "us/line")],
    targets=[Target("P7", "lines", 25.0, "ClusterShell", least=True)],
    peers={
        "ctask": partial(sample, ("ctask", "ctask")),
        "ClusterShell": partial(sample, ("ClusterShell.Task", "ClusterShell.Event")),
    },
    full={"lines": 1_000_000, "rounds": 3},
    quick={"lines": 100_000, "rounds": 1},
)
