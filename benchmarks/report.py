# SPDX-License-Identifier: Apache-2.0
"""The table of the fan-out, and what it says about the targets P1 to P3.

Pure: samples in, lines out. Nothing here runs in a thread of its own.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from benchmarks.measure import Cost, Spread

__all__ = ["TARGETS", "Samples", "Target", "table", "verdicts"]

Row = Literal["cold", "warm"]
What = Literal["cpu", "wall"]

ROWS: tuple[Row, ...] = ("cold", "warm")
OWN = "ctask"


@dataclass(frozen=True, slots=True)
class Target:
    """A ratio to reach: ctask's cost, divided by a peer's, is at most `most`."""

    name: str
    row: Row
    what: What
    peer: str
    most: float


#: The ratios to reach; P2 is held against each peer, and so against the fastest.
TARGETS = (
    Target("P1", "cold", "cpu", "ClusterShell", 0.25),
    Target("P1", "cold", "cpu", "asyncssh", 0.8),
    Target("P1", "cold", "cpu", "parallel-ssh", 1.3),
    Target("P2", "cold", "wall", "ClusterShell", 1.0),
    Target("P2", "cold", "wall", "asyncssh", 1.0),
    Target("P2", "cold", "wall", "parallel-ssh", 1.0),
    Target("P3", "warm", "cpu", "asyncssh", 0.65),
    Target("P3", "warm", "cpu", "parallel-ssh", 0.8),
    Target("P3", "warm", "cpu", "ClusterShell", 0.05),
)


class Samples:
    """The costs of each peer, round by round."""

    def __init__(self, nodes: int) -> None:
        self.nodes = nodes
        self._costs: dict[str, dict[Row, list[Cost]]] = {}

    @property
    def peers(self) -> list[str]:
        """The peers that were measured in every round."""
        return list(self._costs)

    def add(self, peer: str, cold: Cost, warm: Cost) -> None:
        """Add a round of one peer."""
        rounds = self._costs.setdefault(peer, {"cold": [], "warm": []})
        rounds["cold"].append(cold)
        rounds["warm"].append(warm)

    def drop(self, peer: str) -> None:
        """Forget a peer that failed."""
        self._costs.pop(peer, None)

    def spread(self, peer: str, row: Row, what: What) -> Spread:
        """Return what a peer's rounds took, in seconds."""
        return Spread.of([_part(cost, what) for cost in self._costs[peer][row]])

    def ratio(self, peer: str, row: Row, what: What, to: str) -> float:
        """Return the median of a peer's cost over that of another in the same round.

        Rounds are compared and not medians: whatever else the machine did in a round, both had it.
        """
        pairs = zip(self._costs[peer][row], self._costs[to][row], strict=True)
        return statistics.median(_part(one, what) / _part(other, what) for one, other in pairs)


def table(samples: Samples) -> Iterator[str]:
    """Yield the lines of the table: medians, the least and the greatest, and the ratio to ctask."""
    head = ["", "peer", "CPU ms/node", "least..most", "x ctask", "wall s", "least..most", "x ctask"]
    lines = [head]
    for row in ROWS:
        for number, peer in enumerate(samples.peers):
            lines.append([row if number == 0 else "", *_cells(samples, peer, row)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [
            cell.ljust(width) if at < 2 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def _cells(samples: Samples, peer: str, row: Row) -> list[str]:
    cpu = samples.spread(peer, row, "cpu").scaled(1000 / samples.nodes)
    wall = samples.spread(peer, row, "wall")
    cells = [peer]
    columns: tuple[tuple[What, Spread, int], ...] = (("cpu", cpu, 2), ("wall", wall, 3))
    for what, spread, digits in columns:
        ratio = f"{samples.ratio(peer, row, what, OWN):.2f}" if OWN in samples.peers else "-"
        cells += [f"{spread.median:.{digits}f}", f"{spread.least:.{digits}f}..{spread.most:.{digits}f}", ratio]
    return cells


def _part(cost: Cost, what: What) -> float:
    return cost.cpu if what == "cpu" else cost.wall


def verdicts(samples: Samples) -> Iterator[str]:
    """Yield a line for each target: reached, lost, or not measured."""
    for target in TARGETS:
        said = f"{target.name}  {target.row} {target.what:<4} at most {target.most:.2f} x {target.peer:<12}"
        if not {OWN, target.peer} <= set(samples.peers):
            yield f"{said}     -  not measured"
            continue
        ratio = round(samples.ratio(OWN, target.row, target.what, target.peer), 3)
        yield f"{said} {ratio:6.3f}  {'reached' if ratio <= target.most else 'LOST'}"
