# SPDX-License-Identifier: Apache-2.0
"""P6: many lines of several nodes, gathered and put together where they are the same.

Runs in the main thread of a peer's process; nothing is shared.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks.contest import Program
from benchmarks.measure import BenchmarkError, Sample, Setup, measured
from benchmarks.peers import ClusterShell, Ctask
from benchmarks.report import Figure, Target
from benchmarks.server import served

__all__ = ["PROGRAM"]

#: Distinct output, and the nodes that printed it.
Piles = list[tuple[bytes, list[str]]]


def sample(make: Callable[[Setup], Ctask | ClusterShell], setup: Setup) -> Sample:
    """Gather the lines of all nodes, connecting included."""
    peer = make(setup)
    lines = setup.sizes["lines"]
    wanted = "\n".join(map(str, range(1, lines + 1))).encode()

    def gather() -> Piles:
        peer.task.run(f"seq {lines}", nodes=peer.nodes)
        return [(_bytes(output), list(nodes)) for output, nodes in peer.task.iter_buffers()]

    found = {}
    # Who keeps connections has them the second time.
    for title in ("cold", "warm"):
        piles, cost = measured(gather)
        if [(output, sorted(nodes)) for output, nodes in piles] != [(wanted, sorted(setup.nodes))]:
            raise BenchmarkError(f"the nodes printed something else: {[(p[0][:40], p[1]) for p in piles]}")
        found[title] = lines * len(setup.nodes) / cost.wall / 1000
        found[f"{title} CPU"] = cost.cpu / (lines * len(setup.nodes)) * 1e9
    peer.close()
    return found


def _bytes(output: object) -> bytes:
    """Return what was gathered in one piece, which ClusterShell makes when it is asked to."""
    return output if isinstance(output, bytes) else output.message()  # type: ignore[attr-defined]


PROGRAM = Program(
    name="gather",
    title="P6: many lines of several nodes, gathered",
    heading="{nodes} nodes, {lines} lines of each; cold has the connecting in it (ClusterShell always connects)",
    figures=[
        Figure("cold", "1000 lines/s", 0),
        Figure("warm", "1000 lines/s", 0),
        Figure("cold CPU", "ns/line", 0),
        Figure("warm CPU", "ns/line", 0),
    ],
    targets=[
        Target("P6", "cold", 25.0, "ClusterShell", least=True),
        Target("P6", "warm", 25.0, "ClusterShell", least=True),
    ],
    peers={"ctask": partial(sample, Ctask), "ClusterShell": partial(sample, ClusterShell)},
    full={"nodes": 20, "lines": 200_000, "fanout": 64, "rounds": 5},
    quick={"nodes": 5, "lines": 20_000, "fanout": 64, "rounds": 1},
    arena=served,
)
