# SPDX-License-Identifier: Apache-2.0
"""Sets of numbers of one name pattern, kept as ranges: what `NodeSet` calculates with.

A run of digits is one number, and its padding belongs to it (``1``, ``01`` and ``001`` are three). Counted in
the order of (digits, value) all of them are the integers from 0: ``0`` to ``9`` are 0 to 9, ``00`` to ``99``
are 10 to 109, and so on; below 0 are the negative numbers, which have no padding and are their own codes. Such an
integer is a *code*, so any set of numbers is a set of integers.

A `Space` is a set of vectors of codes, in one canonical form: (axis, sub-space) pairs, where an axis holds
the first numbers that go with one and the same sub-space, and after the last number comes `LEAF`. Equal sets
are equal tuples; a product of ranges takes memory for its ranges only.

Runs in any thread; pure functions over tuples, nothing to guard.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain
from operator import add, itemgetter
from typing import Literal, TypeAlias

from ctask.nodes.names import MAX_LENGTH
from ctask.nodes.scatter import Scattered, combined, of_axis, of_codes

__all__ = [
    "EMPTY", "LEAF", "Axis", "Budget", "Ends", "Op", "Patterns", "Space", "Span", "Template", "TooManyPieces", "box",
    "coalesce", "code", "codes", "contains", "holds", "line", "merge", "numbers", "pieces", "points", "ranges_of",
    "size", "texts_of", "union",
]  # fmt: skip

Span: TypeAlias = tuple[int, int]
#: first and last number of a range, as they are written folded
Ends: TypeAlias = tuple[str, str]
#: first and last codes of ranges, in order, no two of them touching; of one dimension, a `Scattered` may stand for it
Axis: TypeAlias = tuple[Span, ...]
Space: TypeAlias = "tuple[tuple[Axis, Space], ...]"
#: the text of a name before, between and after its numbers
Template: TypeAlias = tuple[str, ...]
#: what a node set is: the numbers of each pattern; never with an empty space
Patterns: TypeAlias = dict[Template, Space]
#: the letters of the node set grammar: union, difference, intersection, symmetric difference
Op: TypeAlias = Literal[",", "!", "&", "^"]

EMPTY: Space = ()
#: the space of no dimension that holds the one vector without numbers; always this object
LEAF: Space = (((), ()),)
_POWERS: list[int] = [10**width for width in range(MAX_LENGTH + 2)]
# _FIRST[width] is the code of the first number of so many digits; -1 stands for "no digits"
_FIRST: list[int] = [-1, *((power - 10) // 9 for power in _POWERS[1:])]
# _LEAST[width] is the least number of so many digits that has no padding; none of one digit has any, nor a negative one
_LEAST: list[int] = [-_POWERS[-1], 0, *_POWERS[1:]]


class TooManyPieces(Exception):
    """A calculation would cut its sets into more ranges than its `Budget` has."""


class Budget:
    """How many ranges calculations may still cut.

    Sets of many dimensions can overlap in so many ways that a short text would keep a machine busy for hours.
    """

    def __init__(self, ranges: int = 1_000_000) -> None:
        self.ranges = ranges

    def spend(self, ranges: int) -> None:
        """Take ranges off. Raises TooManyPieces where not so many are left."""
        self.ranges -= ranges
        if self.ranges < 0:
            raise TooManyPieces


def code(digits: str) -> int:
    """Return the code of a number as it is written (ASCII digits, at most `MAX_LENGTH`; a sign where it has one)."""
    value = int(digits)
    return value if value < 0 else value + _FIRST[len(digits)]


def codes(digits: Iterable[str]) -> list[int]:
    """Return the codes of many numbers without signs."""
    texts = list(digits)
    return list(map(add, map(int, texts), map(_FIRST.__getitem__, map(len, texts))))


def pieces(first: int, last: int) -> Iterator[tuple[int, int, int]]:
    """Yield the codes from `first` to `last` as (digits, first value, last value), by count of digits.

    What is negative comes as a piece of no digits.
    """
    if first < 0:
        yield 0, first, min(last, -1)
        first = 0
    width = bisect_right(_FIRST, first) - 1
    while first <= last:
        end = min(last, _FIRST[width + 1] - 1)
        yield width, first - _FIRST[width], end - _FIRST[width]
        first, width = end + 1, width + 1


def numbers(first: int, last: int, before: str = "", after: str = "") -> Iterator[str]:
    """Return the numbers from code `first` to code `last` as they are written, in order, with text around each."""
    before, after = before.replace("%", "%%"), after.replace("%", "%%")
    # no loop of our own: the interpreter would go through it for each of a hundred thousand names
    return chain.from_iterable(
        map(f"{before}%0{width}d{after}".__mod__, range(low, high + 1)) for width, low, high in pieces(first, last)
    )


def coalesce(spans: Iterable[Span]) -> Axis:
    """Return ranges in any order, overlapping or not, as an axis."""
    axis: list[Span] = []
    start, end = -1, -2
    for low, high in sorted(spans):
        if low <= end + 1 and axis:
            if high > end:
                end = high
                axis[-1] = (start, end)
        else:
            start, end = low, high
            axis.append((low, high))
    return tuple(axis)


def ranges_of(axis: Axis) -> list[Ends]:
    """Return the ranges of an axis as their first and last numbers, as they are written folded."""
    return [(str(low).zfill(width), str(high).zfill(end)) for width, low, end, high in _folded(axis)]


def texts_of(axis: Axis) -> list[str]:
    """Return the ranges of an axis as they are written folded: ``3``, ``5-9``."""
    # Most numbers have no padding, and `zfill` is a call for each of them.
    return [
        (str(low) if low >= _LEAST[width] else str(low).zfill(width))
        if low == high and width == end
        else f"{str(low).zfill(width)}-{str(high).zfill(end)}"
        for width, low, end, high in _folded(axis)
    ]


def box(axes: Sequence[Axis]) -> Space:
    """Return the product of axes, the first dimension first."""
    if len(axes) == 1:
        return ((of_axis(axes[0]), LEAF),)
    space = LEAF
    for axis in reversed(axes):
        space = ((axis, space),)
    return space


def points(vectors: Iterable[Sequence[int]], dims: int) -> Space:
    """Return the space of vectors of `dims` codes each, in time that grows with their number."""
    return _points(list(vectors), 0, dims - 1)


def line(codes: Collection[int]) -> Space:
    """Return the space of one dimension with these codes, at least one of them."""
    axis = of_codes(codes)
    return ((_runs(sorted(set(codes))) if axis is None else axis, LEAF),)


def size(space: Space) -> int:
    """Return the number of vectors, by arithmetic."""
    if space is LEAF:
        return 1
    if isinstance(space[0][0], Scattered):
        return space[0][0].size()
    return sum(sum(high - low + 1 for low, high in axis) * size(sub) for axis, sub in space)


def holds(axis: Axis, number: int) -> bool:
    """Return whether a code is on an axis."""
    if isinstance(axis, Scattered):
        return axis.has(number)
    at = bisect_right(axis, number, key=itemgetter(0)) - 1
    return at >= 0 and number <= axis[at][1]


def contains(space: Space, vector: Iterable[int]) -> bool:
    """Return whether a vector of codes is in the space."""
    for number in vector:
        for axis, sub in space:
            if holds(axis, number):
                space = sub
                break
        else:
            return False
    return True


def union(spaces: Sequence[Space], budget: Budget) -> Space:
    """Return the union of many spaces, two by two, so that none is gone through again for each of the others.

    Raises:
        TooManyPieces: it would need more ranges than there are in `budget`.
    """
    while len(spaces) > 1:
        pairs = zip(spaces[::2], [*spaces[1::2], EMPTY], strict=False)
        spaces = [merge(one, other, ",", budget) for one, other in pairs]
    return spaces[0] if spaces else EMPTY


def merge(left: Space, right: Space, op: Op, budget: Budget) -> Space:
    """Return `left op right`, in time that grows with the ranges, not with the numbers in them.

    Raises:
        TooManyPieces: it would need more ranges than there are in `budget`.
    """
    return _Merge(op, budget).of(left, right)


class _Merge:
    """One calculation."""

    def __init__(self, op: Op, budget: Budget) -> None:
        self.op = op
        self.budget = budget

    def of(self, left: Space, right: Space) -> Space:
        if not left:
            return right if self.op in ",^" else EMPTY
        if not right:
            return EMPTY if self.op == "&" else left
        if left == right:
            return left if self.op in ",&" else EMPTY
        if left[0][1] is LEAF:
            one, other = left[0][0], right[0][0]
            axis = combined(one, other, self.op)
            if axis is None:
                return self._near(tuple(one), tuple(other))
            return ((axis, LEAF),) if axis else EMPTY
        return self._cross(left, right)

    def _near(self, left: Axis, right: Axis) -> Space:
        # One dimension: only the ranges that `right` reaches are gone through, so that adding names one by
        # one, or a long chain of operators, does not go through the whole set each time.
        if self.op != "!" and len(right) > len(left):
            left, right = right, left
        low = bisect_left(left, right[0][0] - 1, key=itemgetter(1))
        high = bisect_right(left, right[-1][1] + 1, key=itemgetter(0))
        near = self._cross(((left[low:high], LEAF),), ((right, LEAF),))
        axis = near[0][0] if near else ()
        if self.op != "&":
            axis = left[:low] + axis + left[high:]
        return ((axis, LEAF),) if axis else EMPTY

    def _cross(self, left: Space, right: Space) -> Space:
        cuts: defaultdict[tuple[int, int], list[Span]] = defaultdict(list)
        for low, high, i, j in _sweep(left, right):
            cuts[i, j].append((low, high))
        self.budget.spend(sum(map(len, cuts.values())))
        kept: defaultdict[Space, list[Span]] = defaultdict(list)
        for (i, j), spans in cuts.items():
            kept[self.of(left[i][1] if i >= 0 else EMPTY, right[j][1] if j >= 0 else EMPTY)] += spans
        kept.pop(EMPTY, None)
        return tuple(sorted((coalesce(spans), sub) for sub, spans in kept.items()))


def _folded(axis: Axis) -> Iterator[tuple[int, int, int, int]]:
    """Yield the ranges as they are written: digits and value of the first number, digits and value of the last."""
    apart = False
    width = begin = end = 0
    first_digits = first = last_digits = last = -1
    for low, high in axis:
        if low < begin or high >= end:
            parts = list(pieces(low, high))
            width = parts[-1][0]
            begin, end = (_FIRST[width], _FIRST[width + 1]) if width else (0, 0)
        else:
            # nearly all: a range of numbers with as many digits as those before
            parts = [(width, low - begin, high - begin)]
        for digits, least, most in parts:
            if first_digits >= 0:
                shortest = _POWERS[last_digits] if digits > 1 else 0
                follows = last == least - 1 and last_digits == digits - 1 and least == shortest
                if follows and not (apart or padded(first_digits, first)):
                    # 10 follows 9, and 0 follows -1: both are written as one range
                    last_digits, last = digits, most
                    continue
                yield first_digits, first, last_digits, last
                # as ClusterShell writes it: not so after a single number with padding, up to the next range
                # (and spelt out what `padded` says, for 100,000 of them)
                apart = first == last and first_digits == last_digits and (apart or first < _LEAST[first_digits])
            first_digits, first, last_digits, last = digits, least, digits, most
    if first_digits >= 0:
        yield first_digits, first, last_digits, last


def _sweep(left: Space, right: Space) -> Iterator[tuple[int, int, int, int]]:
    """Yield (first, last, i, j): these codes are on axis i of `left` and axis j of `right`; -1 is none."""
    edges = []
    for side, space in enumerate((left, right)):
        for index, (axis, _) in enumerate(space):
            for low, high in axis:
                edges.append((low, side, index))
                edges.append((high + 1, side, -1))
    # -1 sorts first: where one axis ends and another of its side begins, the end comes before the beginning
    edges.sort()
    on = [-1, -1]
    before = edges[0][0]
    for at, side, index in edges:
        if before < at:
            if on != [-1, -1]:
                yield before, at - 1, on[0], on[1]
            before = at
        on[side] = index


def _points(vectors: list[Sequence[int]], k: int, last: int) -> Space:
    if k == last:
        return ((_runs(sorted({vector[k] for vector in vectors})), LEAF),)
    firsts: defaultdict[int, list[Sequence[int]]] = defaultdict(list)
    for vector in vectors:
        firsts[vector[k]].append(vector)
    subs: defaultdict[Space, list[int]] = defaultdict(list)
    for first in sorted(firsts):
        subs[_points(firsts[first], k + 1, last)].append(first)
    return tuple(sorted((_runs(codes), sub) for sub, codes in subs.items()))


def _runs(codes: list[int]) -> Axis:
    """Return codes that are in order, each once, as an axis."""
    axis = []
    start = end = codes[0]
    for number in codes:
        if number > end + 1:
            axis.append((start, end))
            start = number
        end = number
    axis.append((start, end))
    return tuple(axis)


def padded(width: int, value: int) -> bool:
    return value < _LEAST[width]
