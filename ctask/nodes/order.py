# SPDX-License-Identifier: Apache-2.0
"""The order of a space: its vectors one after the other, by arithmetic wherever they need not be written out.

The first number decides, then the second. Shown, a space is a list of products (`shown`), in an order of its own.

Runs in any thread; pure functions over tuples, nothing to guard.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, product
from math import prod

from ctask.nodes.ranges import axis_text
from ctask.nodes.space import (
    EMPTY,
    LEAF,
    Axis,
    Budget,
    Patterns,
    Space,
    Span,
    Template,
    box,
    coalesce,
    code,
    numbers,
    ranges_of,
    size,
)

__all__ = ["blocks", "in_order", "products", "rank", "section", "shown", "tuples", "walk"]


def in_order(patterns: Patterns) -> list[Template]:
    """Return templates in the order in which node sets show them."""
    # "%s" for the numbers: the order that ClusterShell's users know
    return sorted(patterns, key="%s".join) if len(patterns) > 1 else list(patterns)


def walk(space: Space, template: Template, skip: int = 0) -> Iterator[str]:
    """Yield the names of a pattern in order, without keeping them.

    Args:
        space: the numbers.
        template: the text before, between and after them.
        skip: how many names to leave out at the beginning, by arithmetic.
    """
    return _walk(space, template[1:], template[0], skip)


def tuples(space: Space, skip: int = 0) -> Iterator[tuple[str, ...]]:
    """Yield the vectors of a space in order, as their numbers are written, without keeping them."""
    if space is LEAF:
        yield ()
        return
    for low, high, sub, each in _runs(space):
        left_out = min(skip // each, high - low + 1)
        skip -= left_out * each
        for number in numbers(low + left_out, high):
            for rest in tuples(sub, skip):
                yield (number, *rest)
            skip = 0


def rank(space: Space, vector: Sequence[int]) -> int | None:
    """Return how many vectors of a space come before one, or None where it is not in it."""
    if space is LEAF:
        return 0
    number, found, before = vector[0], None, 0
    for axis, sub in space:
        each = size(sub)
        for low, high in axis:
            if high < number:
                before += (high - low + 1) * each
            elif low <= number:
                before += (number - low) * each
                found = sub
    inside = None if found is None else rank(found, vector[1:])
    return None if inside is None else before + inside


def section(space: Space, start: int, stop: int) -> Space:
    """Return the vectors from one place in the order up to another, by arithmetic."""
    if space is LEAF:
        return LEAF if start < stop else EMPTY
    kept: defaultdict[Space, list[Span]] = defaultdict(list)
    # by the place of what goes with it: a sub-space is large, and is only looked at where it is cut
    whole: list[list[Span]] = [[] for _ in space]
    sizes = [size(sub) for _, sub in space]
    for low, high, place in sorted((low, high, k) for k, (axis, _) in enumerate(space) for low, high in axis):
        each, sub = sizes[place], space[place][1]
        count = (high - low + 1) * each
        if start < count and stop > 0:
            first, last = max(start, 0), min(stop, count)
            # numbers with only some of their vectors: the one where it begins, and the one where it ends
            begin, end = -(-first // each), last // each
            if first % each:
                part = section(sub, first % each, min(each, last - (first // each) * each))
                kept[part].append((low + first // each,) * 2)
            if begin < end:
                whole[place].append((low + begin, low + end - 1))
            if begin <= end and last % each:
                kept[section(sub, 0, last % each)].append((low + end,) * 2)
        start, stop = start - count, stop - count
    for (_, sub), spans in zip(space, whole, strict=True):
        if spans:
            kept[sub] += spans
    return tuple(sorted((coalesce(spans), sub) for sub, spans in kept.items()))


def products(space: Space) -> Iterator[tuple[Axis, ...]]:
    """Yield the products of axes that make up the space, in order of their first vectors' first numbers."""
    if space is LEAF:
        yield ()
        return
    for axis, sub in space:
        for rest in products(sub):
            yield (axis, *rest)


def blocks(space: Space) -> Iterator[Space]:
    """Yield the space in pieces that are one range in each dimension."""
    for axes in products(space):
        for ranges in product(*map(_ranges, axes)):
            yield box(ranges)


def shown(
    space: Space,
    template: Template,
    autostep: float | None,
    fold: Sequence[bool] | None,
    budget: Budget,
    *,
    signs: bool = False,
) -> Iterator[str]:
    """Yield the space as text: ``n[1-3,5]``, a text for each product.

    Args:
        fold: whether each dimension is written folded; None: all are. What is not is written out.
        signs: whether a single negative number has a bracket where it is folded: ``n[-5]``.

    Raises:
        TooManyPieces: more would be written out than there is in `budget`.
    """
    if len(template) == 2 and fold is None:
        # most sets: one number in each name
        yield f"{template[0]}{_bracketed(axis_text(space[0][0], autostep), signs)}{template[1]}"
        return
    last = template[-1]
    for axes in products(space):
        if fold is None:
            texts = [_bracketed(axis_text(axis, autostep), signs) for axis in axes]
            yield "".join(chain.from_iterable(zip(template, [*texts, ""], strict=True)))
            continue
        budget.spend(prod(size(box([axis])) for axis, folded in zip(axes, fold, strict=True) if not folded))
        choices = [
            (_bracketed(axis_text(axis, autostep), signs),) if folded else _Numbers(axis)
            for axis, folded in zip(axes, fold, strict=True)
        ]
        for row in _rows(choices):
            yield "".join(f"{text}{number}" for text, number in zip(template, row, strict=False)) + last


class _Numbers:
    """The numbers of an axis, written out anew each time they are gone through."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(numbers(low, high) for low, high in self.axis)


def _rows(choices: Sequence[tuple[str, ...] | _Numbers]) -> Iterator[tuple[str, ...]]:
    """As `itertools.product`, without keeping what there is to choose from."""
    if not choices:
        yield ()
        return
    for first in choices[0]:
        for rest in _rows(choices[1:]):
            yield (first, *rest)


def _walk(space: Space, parts: Sequence[str], head: str, skip: int) -> Iterator[str]:
    """Return the names that begin with `head` and go on with numbers and the other parts."""
    if space is LEAF:
        return iter((head,))
    return chain.from_iterable(_walk_runs(space, parts, head, skip))


def _walk_runs(space: Space, parts: Sequence[str], head: str, skip: int) -> Iterator[Iterable[str]]:
    for low, high, sub, each in _runs(space):
        left_out = min(skip // each, high - low + 1)
        skip -= left_out * each
        if sub is LEAF:
            yield numbers(low + left_out, high, head, parts[0])
            continue
        for longer in numbers(low + left_out, high, head, parts[0]):
            yield _walk(sub, parts[1:], longer, skip)
            skip = 0


def _runs(space: Space) -> list[tuple[int, int, Space, int]]:
    """Return the ranges of the first dimension in order, each with what goes with it, and the size of that."""
    sized = ((axis, sub, size(sub)) for axis, sub in space)
    return sorted((low, high, sub, each) for axis, sub, each in sized for low, high in axis)


def _ranges(axis: Axis) -> Iterator[Axis]:
    """Yield the ranges of an axis as they are written: 8-12 is one, of two spans of codes."""
    spans = list(reversed(axis))
    for _, last in ranges_of(axis):
        end = code(last)
        within = []
        while spans and spans[-1][0] <= end:
            low, high = spans.pop()
            within.append((low, min(high, end)))
            if high > end:
                spans.append((end + 1, high))
        yield tuple(within)


def _bracketed(texts: list[str], signs: bool) -> str:
    return f"[{','.join(texts)}]" if len(texts) > 1 or "-" in texts[0][not signs :] else texts[0]
