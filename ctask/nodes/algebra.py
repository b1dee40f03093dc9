# SPDX-License-Identifier: Apache-2.0
"""What node sets and range sets have in common, over patterns: they are sets, and their elements have an order.

Runs in any thread; what is here has no state but that of each set.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Generic, Self, TypeVar, overload

from ctask.errors import NodeSetError, OptionError
from ctask.nodes.grammar import TOO_MANY_PIECES, Parsed, apply, combine
from ctask.nodes.order import blocks, in_order, section
from ctask.nodes.signs import NO_SIGNS, Signs, signed, without_signs
from ctask.nodes.space import EMPTY, Budget, Op, Patterns, TooManyPieces, size

__all__ = ["MAX_WRITTEN", "FoldedSet"]

#: what the methods take for another set
Like = TypeVar("Like")
Element = TypeVar("Element")

#: a slice with a step, and a text that is not folded, may write out so many elements
MAX_WRITTEN = 1_000_000


class FoldedSet(Generic[Like, Element]):
    """A set that is kept as ranges. Operators take sets of the same kind, methods whatever stands for one.

    Thread safety: as that of a `set`; reading is safe from anywhere as long as nobody changes it.
    """

    __slots__ = ("_patterns", "_signs")

    _patterns: Patterns
    _signs: Signs

    def _parsed(self, other: Like) -> Parsed:
        """Return what stands for a set."""
        raise NotImplementedError

    def _made(self, patterns: Patterns, signs: Signs = NO_SIGNS) -> Self:
        """Return a set that is shown as this one is."""
        raise NotImplementedError

    def _items(self, skip: int = 0) -> Iterator[Element]:
        """Yield the elements in order, without the first ones; the set may change meanwhile."""
        raise NotImplementedError

    def _gathered(self, items: Iterable[Element]) -> Patterns:
        """Return elements that are in the set as patterns."""
        raise NotImplementedError

    def _shown(self) -> Patterns:
        """Return the patterns as they are shown and gone through."""
        return signed(self._patterns, self._signs) if self._signs else self._patterns

    def _is_kin(self, other: object) -> bool:
        """Whether operators take it."""
        raise NotImplementedError

    def copy(self) -> Self:
        """Return a set of its own that holds the same; its time does not depend on how much that is."""
        return self._made(dict(self._patterns), self._signs)

    __copy__ = copy

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return self.copy()

    def __bool__(self) -> bool:
        return bool(self._patterns)

    # Elements

    def __iter__(self) -> Iterator[Element]:
        """Iterate over the elements in order; they are made as they are asked for."""
        return self._items()

    def __len__(self) -> int:
        """Return the number of elements, by arithmetic.

        Raises:
            NodeSetError: more than a `len` can say (`sys.maxsize`).
        """
        count = self._count()
        if count > sys.maxsize:
            raise NodeSetError(str(self), None, f"{count} elements are more than can be counted off")
        return count

    @overload
    def __getitem__(self, index: int) -> Element: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> Element | Self:
        """Return one element, or the set of a slice (its step may be negative; a set keeps its order).

        Raises:
            IndexError: there is no such element.
            NodeSetError: a slice with a step that has to go through more than a million elements.
        """
        count = self._count()
        if isinstance(index, slice):
            return self._slice(range(*index.indices(count)))
        if not -count <= index < count:
            raise IndexError(f"a set of {count} has no index {index}")
        return next(self._items(index if index >= 0 else count + index))

    def contiguous(self) -> Iterator[Self]:
        """Iterate over sets of one range in each dimension, in order, which are the set together."""
        shown = self._shown()
        for template in in_order(shown):
            for block in blocks(shown[template]):
                yield self._made(without_signs({template: block}) if self._signs else {template: block}, self._signs)

    def split(self, nbr: int) -> Iterator[Self]:
        """Iterate over `nbr` sets (of fewer elements: one for each) of the same size, give or take one.

        Raises:
            OptionError: `nbr` is less than 1.
        """
        if nbr < 1:
            raise OptionError(f"a set cannot be split into {nbr} parts; give 1 or more")
        return self._parts(nbr)

    # Comparing

    def __eq__(self, other: object) -> bool:
        return self._patterns == other._patterns if self._is_kin(other) else NotImplemented  # type: ignore[attr-defined]

    __hash__ = None  # type: ignore[assignment]  # it can be changed

    def __le__(self, other: object) -> bool:
        return self.issubset(other) if self._is_kin(other) else NotImplemented  # type: ignore[arg-type]

    def __lt__(self, other: object) -> bool:
        return self != other and self.issubset(other) if self._is_kin(other) else NotImplemented  # type: ignore[arg-type]

    def __ge__(self, other: object) -> bool:
        return self.issuperset(other) if self._is_kin(other) else NotImplemented  # type: ignore[arg-type]

    def __gt__(self, other: object) -> bool:
        return self != other and self.issuperset(other) if self._is_kin(other) else NotImplemented  # type: ignore[arg-type]

    def issubset(self, other: Like) -> bool:
        """Return whether all of the set is in the other."""
        return not self.difference(other)

    def issuperset(self, other: Like) -> bool:
        """Return whether all of the other is in the set."""
        rest = dict(self._parsed(other)[0])
        apply(rest, self._combined(rest, self._patterns, "!"))
        return not rest

    def isdisjoint(self, other: Like) -> bool:
        """Return whether nothing is in both."""
        return not self.intersection(other)

    # New sets

    def union(self, other: Like) -> Self:
        """Return what is in either."""
        return self._with(other, ",")

    def intersection(self, other: Like) -> Self:
        """Return what is in both."""
        return self._with(other, "&")

    def difference(self, other: Like) -> Self:
        """Return what is not in the other."""
        return self._with(other, "!")

    def symmetric_difference(self, other: Like) -> Self:
        """Return what is in one of them only."""
        return self._with(other, "^")

    def __or__(self, other: object) -> Self:
        return self._with(other, ",") if self._is_kin(other) else NotImplemented  # type: ignore[arg-type]

    def __and__(self, other: object) -> Self:
        return self._with(other, "&") if self._is_kin(other) else NotImplemented  # type: ignore[arg-type]

    def __sub__(self, other: object) -> Self:
        return self._with(other, "!") if self._is_kin(other) else NotImplemented  # type: ignore[arg-type]

    def __xor__(self, other: object) -> Self:
        return self._with(other, "^") if self._is_kin(other) else NotImplemented  # type: ignore[arg-type]

    # Changing

    def update(self, other: Like) -> None:
        """Add what is in the other."""
        self._change(other, ",")

    def intersection_update(self, other: Like) -> None:
        """Keep what is in both."""
        self._change(other, "&")

    def difference_update(self, other: Like, *, strict: bool = False) -> None:
        """Take out what is in the other.

        Raises:
            KeyError: `strict`, and not all of it is in the set; then nothing is taken out.
        """
        gone = self._made(*self._parsed(other))
        if strict and (missing := gone - self):
            raise KeyError(str(missing))
        self -= gone

    def symmetric_difference_update(self, other: Like) -> None:
        """Keep what is in one of them only."""
        self._change(other, "^")

    def clear(self) -> None:
        """Take everything out."""
        self._patterns, self._signs = {}, NO_SIGNS

    def __ior__(self, other: object) -> Self:
        return self._changed(other, ",")

    def __iand__(self, other: object) -> Self:
        return self._changed(other, "&")

    def __isub__(self, other: object) -> Self:
        return self._changed(other, "!")

    def __ixor__(self, other: object) -> Self:
        return self._changed(other, "^")

    # How

    def _count(self) -> int:
        return sum(map(size, self._patterns.values()))

    def _parts(self, nbr: int) -> Iterator[Self]:
        count = self._count()
        each, more = divmod(count, nbr)
        start = 0
        for part in range(min(nbr, count)):
            stop = start + each + (part < more)
            yield self._section(start, stop)
            start = stop

    def _section(self, start: int, stop: int) -> Self:
        """Return the elements from one place in the order up to another, by arithmetic."""
        found: Patterns = {}
        shown = self._shown()
        for template in in_order(shown):
            count = size(shown[template])
            part = section(shown[template], max(start, 0), min(stop, count)) if start < count and stop > 0 else EMPTY
            if part:
                found[template] = part
            start, stop = start - count, stop - count
        return self._made(without_signs(found) if self._signs else found, self._signs)

    def _slice(self, indexes: range) -> Self:
        if not indexes:
            return self._made({})
        if indexes.step < 0:
            indexes = indexes[::-1]
        if indexes.step == 1:
            return self._section(indexes.start, indexes.stop)
        reach = indexes[-1] - indexes[0] + 1
        if reach > MAX_WRITTEN:
            reason = f"a slice with a step may go through at most {MAX_WRITTEN} elements, not {reach}"
            raise NodeSetError(str(self), None, reason)
        items = islice(self._items(indexes[0]), 0, reach, indexes.step)
        return self._made(self._gathered(items), self._signs)

    def _with(self, other: Like, op: Op) -> Self:
        made = self.copy()
        made._change(other, op)
        return made

    def _changed(self, other: object, op: Op) -> Self:
        if self._is_kin(other):
            self._change(other, op)  # type: ignore[arg-type]
            return self
        return NotImplemented  # type: ignore[no-any-return]  # what operators answer for others

    def _change(self, other: Like, op: Op) -> None:
        patterns, signs = self._parsed(other)
        # all is calculated before anything is changed
        apply(self._patterns, self._combined(self._patterns, patterns, op))
        # what is taken out does not say how the rest is shown
        if signs and op != "!":
            self._signs |= signs

    def _combined(self, left: Patterns, right: Patterns, op: Op) -> Patterns:
        try:
            return combine(left, right, op, Budget())
        except TooManyPieces:
            raise NodeSetError(str(self._made(right)), None, TOO_MANY_PIECES) from None
