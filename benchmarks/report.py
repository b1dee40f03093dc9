# SPDX-License-Identifier: Apache-2.0
"""The table of a program, and what it says about the numbers that are to be reached.

Pure: samples in, lines out. Nothing here runs in a thread of its own.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.measure import Sample, Spread

__all__ = ["OWN", "Figure", "Samples", "Target", "table", "verdicts"]

#: The peer that all others are held against.
OWN = "ctask"


@dataclass(frozen=True, slots=True)
class Figure:
    """Something that is measured: `name` is how peers give it, `unit` and `digits` how it is shown."""

    name: str
    unit: str
    digits: int = 2


@dataclass(frozen=True, slots=True)
class Target:
    """A number to reach: ctask's figure, over that of `peer` where there is one.

    Attributes:
        bound: the most that it may be; where `least`, the least.
    """

    name: str
    figure: str
    bound: float
    peer: str = ""
    least: bool = False

    def reached(self, value: float) -> bool:
        """Whether a value that is shown with three digits does."""
        return round(value, 3) >= self.bound if self.least else round(value, 3) <= self.bound


class Samples:
    """What the peers did, round by round."""

    def __init__(self) -> None:
        self._rounds: dict[str, list[Mapping[str, float]]] = {}

    @property
    def peers(self) -> list[str]:
        """The peers that were measured in every round."""
        return list(self._rounds)

    def add(self, peer: str, sample: Sample) -> None:
        """Add a round of one peer."""
        self._rounds.setdefault(peer, []).append(sample)

    def drop(self, peer: str) -> None:
        """Forget a peer that failed."""
        self._rounds.pop(peer, None)

    def has(self, peer: str, figure: str) -> bool:
        """Whether a peer was measured, and gives this figure."""
        return peer in self._rounds and all(figure in sample for sample in self._rounds[peer])

    def spread(self, peer: str, figure: str) -> Spread:
        """Return what a peer did in its rounds."""
        return Spread.of([sample[figure] for sample in self._rounds[peer]])

    def ratio(self, peer: str, figure: str, to: str) -> float:
        """Return the median of a peer's figure over that of another in the same round.

        Rounds are compared and not medians: whatever else the machine did in a round, both had it.
        """
        pairs = zip(self._rounds[peer], self._rounds[to], strict=True)
        return statistics.median(one[figure] / other[figure] for one, other in pairs)


def table(figures: Sequence[Figure], samples: Samples) -> Iterator[str]:
    """Yield the lines of the table: medians, the least and the greatest, and the ratio to ctask."""
    lines = [["", "peer", "median", "least..most", "unit", "x ctask"]]
    for figure in figures:
        peers = [peer for peer in samples.peers if samples.has(peer, figure.name)]
        for number, peer in enumerate(peers):
            lines.append([figure.name if number == 0 else "", *_cells(samples, peer, figure)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [
            cell.ljust(width) if at in (0, 1, 4) else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def _cells(samples: Samples, peer: str, figure: Figure) -> list[str]:
    spread, digits = samples.spread(peer, figure.name), figure.digits
    compared = samples.has(OWN, figure.name) and samples.spread(OWN, figure.name).least > 0
    return [
        peer,
        f"{spread.median:.{digits}f}",
        f"{spread.least:.{digits}f}..{spread.most:.{digits}f}",
        figure.unit,
        f"{samples.ratio(peer, figure.name, OWN):.2f}" if compared else "-",
    ]


def verdicts(figures: Sequence[Figure], targets: Sequence[Target], samples: Samples) -> Iterator[str]:
    """Yield a line for each target: reached, lost, or not measured."""
    units = {figure.name: figure.unit for figure in figures}
    width = max((len(target.figure) for target in targets), default=0)
    for target in targets:
        sense = "at least" if target.least else "at most"
        against = f"x {target.peer}" if target.peer else units[target.figure]
        said = f"{target.name:<3} {target.figure:<{width}}  {sense:<8} {target.bound:5.2f} {against:<14}"
        if not (samples.has(OWN, target.figure) and (not target.peer or samples.has(target.peer, target.figure))):
            yield f"{said}      -  not measured"
            continue
        value = (
            samples.ratio(OWN, target.figure, target.peer)
            if target.peer
            else samples.spread(OWN, target.figure).median
        )
        yield f"{said} {value:6.3f}  {'reached' if target.reached(value) else 'LOST'}"
