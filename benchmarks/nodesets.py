# SPDX-License-Identifier: Apache-2.0
"""P9: node sets, large ones and thousands of small ones, beside ClusterShell's.

Runs in the main thread of a peer's process; nothing is shared.
"""

from __future__ import annotations

import random
import statistics
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.contest import Program
from benchmarks.measure import BenchmarkError, Sample, Setup
from benchmarks.report import Figure, Target

__all__ = ["PROGRAM"]

#: From a text, or a list of names, to a node set.
Make = Callable[[Any], Any]

#: Seeds the names: all peers have the same in all rounds.
SEED = 9


def ctask() -> tuple[Make, Make]:
    """Return what reads a text, and what folds a list."""
    from ctask import NodeSet
    from ctask.nodes import RESOLVER_NOGROUP

    return partial(NodeSet, resolver=RESOLVER_NOGROUP), partial(NodeSet.fromlist, resolver=RESOLVER_NOGROUP)


def clustershell() -> tuple[Make, Make]:
    """Return what reads a text, and the faster of the two that fold a list."""
    from ClusterShell.NodeSet import RESOLVER_NOGROUP, NodeSet

    return partial(NodeSet, resolver=RESOLVER_NOGROUP), partial(NodeSet._fromlist1, resolver=RESOLVER_NOGROUP)


def sample(peer: Callable[[], tuple[Make, Make]], setup: Setup) -> Sample:
    """Take each figure once; every answer is checked."""
    read, fold = peer()
    sizes, chance = setup.sizes, random.Random(SEED)
    names, nodes = sizes["names"], sizes["nodes"]
    in_a_row = [f"n{i}" for i in range(1, names + 1)]
    chance.shuffle(in_a_row)
    apart = [f"n{i}" for i in chance.sample(range(2 * names), names)]
    racks = [f"r{i // 100}n{i % 100}" for i in chance.sample(range(10_000), sizes["grid"])]
    blades = sizes["xnames"]
    # a fortieth of the machine is missing here and there
    places = chance.sample(range(blades * 41 // 40), blades)
    xnames = [f"x{1000 + i // 512}c{i // 64 % 8}s{i // 2 % 32}b{i % 2}" for i in places]
    found = {
        "fold": _folded(fold, in_a_row),
        "fold scattered": _folded(fold, apart),
        "fold 2-D": _folded(fold, racks),
        "fold 4-D": _folded(fold, xnames),
        "iterate": _seconds(lambda: _expect(sum(1 for _ in read(f"n[1-{names}]")), names)) * 1000,
        "small": _small(read),
        "memory": _memory(read),
    }
    ranges = [read(f"n[1-{nodes}]"), read(f"n[{nodes // 2 + 1}-{nodes + nodes // 2}]")]
    scattered = [fold(f"n{i}" for i in chance.sample(range(2 * nodes), nodes)) for _ in range(2)]
    found["folded operators"] = _operators(*ranges)
    found["scattered operators"] = _operators(*scattered)
    return found


def _folded(fold: Make, names: list[str]) -> float:
    """Milliseconds from a list to its folded text."""
    _expect(len(fold(names)), len(names))
    return _seconds(lambda: str(fold(names))) * 1000


def _operators(one: Any, other: Any) -> float:
    """Milliseconds of a union, an intersection and a difference."""
    both = one & other
    _expect(len(one | other), len(one) + len(other) - len(both))
    _expect(len(one - other), len(one) - len(both))
    return _seconds(lambda: (one | other, one & other, one - other)) * 1000


def _small(read: Make) -> float:
    """Microseconds to read a small text, no two of them alike."""
    texts = [f"green[{i}-{i + 3},{i + 97}]" for i in range(2000)]
    _expect(len(read(texts[36])), 5)
    return _seconds(lambda: [read(text) for text in texts]) / len(texts) * 1e6


def _memory(read: Make) -> float:
    """Megabytes of a node set of a million nodes."""
    tracemalloc.start()
    try:
        nodes = read("n[1-1000000]")
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    _expect(len(nodes), 1_000_000)
    return held / 1e6


def _seconds(work: Callable[[], object]) -> float:
    """Return the median of three times."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _expect(count: int, wanted: int) -> None:
    if count != wanted:
        raise BenchmarkError(f"{count} nodes where there are {wanted}")


PROGRAM = Program(
    name="nodesets",
    title="P9: node sets, folded, read, combined",
    heading=(
        "lists of {names}, {grid} (2-D) and {xnames} (4-D) names folded; n[1-{names}] read and iterated; union, "
        "intersection, difference of {nodes} nodes; green[36-39,133] read; n[1-1000000] in memory"
    ),
    figures=[
        Figure("fold", "ms", 1),
        Figure("fold scattered", "ms", 1),
        Figure("fold 2-D", "ms", 1),
        Figure("fold 4-D", "ms", 1),
        Figure("iterate", "ms", 1),
        Figure("folded operators", "ms", 3),
        Figure("scattered operators", "ms", 3),
        Figure("small", "us", 1),
        Figure("memory", "MB", 4),
    ],
    targets=[
        Target("P9", "fold", 0.1, "ClusterShell"),
        Target("P9", "fold scattered", 0.1, "ClusterShell"),
        Target("P9", "fold 2-D", 0.05, "ClusterShell"),
        Target("P9", "fold 4-D", 0.05, "ClusterShell"),
        Target("P9", "iterate", 0.2, "ClusterShell"),
        Target("P9", "folded operators", 0.05, "ClusterShell"),
        Target("P9", "scattered operators", 1.0, "ClusterShell"),
        Target("P9", "small", 0.5, "ClusterShell"),
        Target("P9", "memory", 1.0),
    ],
    peers={"ctask": partial(sample, ctask), "ClusterShell": partial(sample, clustershell)},
    full={"names": 100_000, "nodes": 50_000, "grid": 1_000, "xnames": 10_000, "rounds": 3},
    quick={"names": 10_000, "nodes": 5_000, "grid": 300, "xnames": 1_000, "rounds": 1},
)
