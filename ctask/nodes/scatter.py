# SPDX-License-Identifier: Apache-2.0
"""Axes of many short ranges, kept as a bit for each number: sets of scattered nodes are combined word by word.

`Scattered` stands in for the tuple of spans that an axis is, and makes that tuple when somebody looks at it. Only
spaces of one dimension have one, and only where the bits take no more room than the spans would.

Runs in any thread. What a `Scattered` makes on demand is one reference that is set once: two threads that look at the
same time make the same spans.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import accumulate, count
from operator import add
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from ctask.nodes.space import Axis, Op, Span

__all__ = ["LEAST", "Scattered", "combined", "of_axis", "of_codes"]

#: as many numbers, or ranges, are worth bits
LEAST = 256
#: and as many bits for each of them, which take less room than its span; their text, made on the way, takes 64 bytes
ROOM = 64


class Scattered:
    """The spans of the codes `base + k` for each bit k of `bits`: equal, and hashed alike, to their tuple.

    Args:
        base: a code that is not greater than the least one.
        bits, spans: what it holds; one of them, the other is made when it is looked at.
    """

    __slots__ = ("_bits", "_spans", "base")

    def __init__(self, base: int, bits: int | None = None, spans: tuple[Span, ...] | None = None) -> None:
        self.base = base
        self._bits = bits
        self._spans = spans

    @property
    def bits(self) -> int:
        """A bit for each code from `base` on, which has the lowest one."""
        if self._bits is None:
            texts, at = [], self.base
            for low, high in self.spans:
                texts += ["0" * (low - at), "1" * (high + 1 - low)]
                at = high + 1
            # the text of a binary number has its lowest bit last
            self._bits = int("".join(reversed(texts)) or "0", 2)
        return self._bits

    @property
    def spans(self) -> tuple[Span, ...]:
        """The tuple that this stands for."""
        if self._spans is None:
            self._spans = tuple(self._edges())
        return self._spans

    def _edges(self) -> Iterator[Span]:
        # an edge is where a bit differs from the one below it: edges are by turns a first number and one too far
        edges = bin(self.bits ^ (self.bits << 1))[:1:-1].split("1")
        places = list(map(add, accumulate(map(len, edges[:-1])), count(self.base)))
        return zip(places[::2], map((-1).__add__, places[1::2]), strict=True)

    def has(self, number: int) -> bool:
        """Return whether a code is on the axis."""
        return number >= self.base and self.bits >> (number - self.base) & 1 == 1

    def size(self) -> int:
        """Return the number of codes."""
        return self.bits.bit_count()

    def __iter__(self) -> Iterator[Span]:
        # who goes through it once, as to write it down, needs no tuple of it
        return self._edges() if self._spans is None else iter(self._spans)

    def __reversed__(self) -> Iterator[Span]:
        return reversed(self.spans)

    def __len__(self) -> int:
        return len(self.spans)

    def __bool__(self) -> bool:
        return bool(self._spans) if self._bits is None else bool(self._bits)

    def __getitem__(self, index: int) -> Span:
        return self.spans[index]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Scattered):
            base = min(self.base, other.base)
            return self.bits << (self.base - base) == other.bits << (other.base - base)
        return self.spans == other

    def __hash__(self) -> int:
        return hash(self.spans)

    def __lt__(self, other: tuple[Span, ...]) -> bool:
        return self.spans < tuple(other)


def of_codes(codes: Collection[int]) -> Axis | None:
    """Return codes in any order as an axis of bits, or None where spans are better."""
    if len(codes) < LEAST:
        return None
    low, high = min(codes), max(codes)
    if high - low > ROOM * len(codes):
        return None
    marks = bytearray(b"0") * (high - low + 1)
    for number in codes:
        marks[high - number] = 49
    return cast("Axis", Scattered(low, int(marks, 2)))


def combined(left: Axis, right: Axis, op: Op) -> Axis | None:
    """Return `left op right` by bits where one of the axes has them, or None: it is to be done by spans."""
    if not (_is_scattered(left) or _is_scattered(right)):
        return None
    one, other = _bits_of(left), _bits_of(right)
    if one is None or other is None:
        return None
    base = min(one.base, other.base)
    extent = max(one.base + one.bits.bit_length(), other.base + other.bits.bit_length()) - base
    if extent > ROOM * (LEAST + one.size() + other.size()):
        return None
    mine, theirs = one.bits << (one.base - base), other.bits << (other.base - base)
    if op == ",":
        bits = mine | theirs
    elif op == "&":
        bits = mine & theirs
    else:
        bits = mine ^ (theirs if op == "^" else mine & theirs)
    return cast("Axis", Scattered(base, bits))


def of_axis(axis: Axis) -> Axis:
    """Return an axis as one of bits, where that is better than spans."""
    return cast("Axis", Scattered(axis[0][0], spans=axis)) if _is_dense(axis, LEAST) else axis


def _bits_of(axis: Axis) -> Scattered | None:
    """Return an axis as bits, or None where they would take too much room."""
    if isinstance(axis, Scattered):
        return axis
    return Scattered(axis[0][0], spans=axis) if _is_dense(axis, 0) else None


def _is_scattered(axis: object) -> bool:
    return isinstance(axis, Scattered)


def _is_dense(axis: Axis, least: int) -> bool:
    return len(axis) >= least and axis[-1][1] - axis[0][0] <= ROOM * max(len(axis), LEAST)
