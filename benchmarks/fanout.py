# SPDX-License-Identifier: Apache-2.0
"""P1 to P3: one command on many nodes, cold (every connection has still to be made) and warm.

Runs in the main thread of a peer's process; nothing is shared.
"""

from __future__ import annotations

from functools import partial

from benchmarks.contest import Program
from benchmarks.measure import Cost, Sample, Setup, measured
from benchmarks.peers import PEERS, expect
from benchmarks.report import Figure, Target
from benchmarks.server import served

__all__ = ["PROGRAM"]

#: What the nodes run, and what each of them has to answer.
COMMAND = "echo ok"
ANSWER = b"ok\n"


def sample(name: str, setup: Setup) -> Sample:
    """Run the command once cold, and `repeats` times warm."""
    peer = PEERS[name](setup)
    costs = []
    for _ in range(1 + setup.sizes["repeats"]):
        answers, cost = measured(partial(peer.run, COMMAND), peer.rest)
        expect(setup, answers, ANSWER)
        costs.append(cost)
    peer.close()
    cold, *warm = costs
    return {**_figures("cold", [cold], len(setup.nodes)), **_figures("warm", warm, len(setup.nodes))}


def _figures(name: str, costs: list[Cost], nodes: int) -> Sample:
    return {
        f"{name} CPU": sum(cost.cpu for cost in costs) / len(costs) * 1000 / nodes,
        f"{name} wall": sum(cost.wall for cost in costs) / len(costs),
    }


PROGRAM = Program(
    name="fanout",
    title="P1 to P3: one command on many nodes, cold and warm",
    heading="{nodes} nodes on one sshd, fan-out {fanout}; warm is the mean of {repeats} more commands",
    figures=[
        Figure("cold CPU", "ms/node"),
        Figure("cold wall", "s", 3),
        Figure("warm CPU", "ms/node"),
        Figure("warm wall", "s", 3),
    ],
    # P2 is held against each peer, and so against the fastest.
    targets=[
        Target("P1", "cold CPU", 0.25, "ClusterShell"),
        Target("P1", "cold CPU", 0.8, "asyncssh"),
        Target("P1", "cold CPU", 1.3, "parallel-ssh"),
        Target("P2", "cold wall", 1.0, "ClusterShell"),
        Target("P2", "cold wall", 1.0, "asyncssh"),
        Target("P2", "cold wall", 1.0, "parallel-ssh"),
        Target("P3", "warm CPU", 0.65, "asyncssh"),
        Target("P3", "warm CPU", 0.8, "parallel-ssh"),
        Target("P3", "warm CPU", 0.05, "ClusterShell"),
    ],
    peers={name: partial(sample, name) for name in PEERS},
    full={"nodes": 200, "fanout": 64, "rounds": 5, "repeats": 3},
    quick={"nodes": 32, "fanout": 16, "rounds": 2, "repeats": 3},
    arena=served,
)
