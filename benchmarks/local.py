# SPDX-License-Identifier: Apache-2.0
"""P10: many local commands.

Runs in the main thread of a peer's process; nothing is shared.
"""

from __future__ import annotations

import importlib
from functools import partial

from benchmarks.contest import Program
from benchmarks.measure import BenchmarkError, Sample, Setup, measured
from benchmarks.report import Figure, Target

__all__ = ["PROGRAM"]


def sample(module: str, setup: Setup) -> Sample:
    """Run `true` many times on this machine, so many at a time."""
    task = importlib.import_module(module).task_self()
    task.set_info("fanout", setup.sizes["fanout"])
    keys = [f"k{number}" for number in range(setup.sizes["commands"])]

    def work() -> list[tuple[int, list[str]]]:
        for key in keys:
            task.shell("true", key=key)
        task.resume()
        return [(rc, list(found)) for rc, found in task.iter_retcodes()]

    codes, cost = measured(work)
    if [(rc, sorted(found)) for rc, found in codes] != [(0, sorted(keys))]:
        raise BenchmarkError(f"not all have exited with 0: {codes}")
    return {"wall": cost.wall * 1000 / len(keys), "CPU": cost.cpu * 1000 / len(keys)}


PROGRAM = Program(
    name="local",
    title="P10: many local commands",
    heading="`true` {commands} times on this machine, fan-out {fanout}; CPU has the commands' own in it",
    figures=[Figure("wall", "ms/command"), Figure("CPU", "ms/command")],
    targets=[Target("P10", "wall", 0.4, "ClusterShell")],
    peers={"ctask": partial(sample, "ctask"), "ClusterShell": partial(sample, "ClusterShell.Task")},
    full={"commands": 300, "fanout": 64, "rounds": 7},
    quick={"commands": 100, "fanout": 64, "rounds": 2},
)
