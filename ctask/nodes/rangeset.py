# SPDX-License-Identifier: Apache-2.0
"""`RangeSet` and `RangeSetND`: sets of numbers, and of vectors of numbers, kept and shown folded.

As ClusterShell's, with these differences: no range is too large, since ranges stay ranges; what cannot be a number is
refused by a `RangeSetParseError` wherever it is given; text may stand for a set in every method; an empty iterable is
an empty set; `contiguous` knows no steps; vectors come in the order of their numbers.

Runs in any thread. They have no lock: like a `set` they may be read by many threads, or changed by one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, MutableSet, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Self, TypeAlias

from ctask.errors import OptionError, RangeSetParseError
from ctask.nodes.algebra import FoldedSet
from ctask.nodes.grammar import Parsed
from ctask.nodes.names import MAX_LENGTH
from ctask.nodes.order import products, rank, tuples, walk
from ctask.nodes.ranges import MAX_STEPPED, RangeReader, axis_text, padded_spans
from ctask.nodes.signs import NO_SIGNS, Signs
from ctask.nodes.space import (
    EMPTY,
    LEAF,
    Axis,
    Budget,
    Patterns,
    Space,
    Span,
    TooManyPieces,
    box,
    coalesce,
    code,
    contains,
    padded,
    pieces,
    union,
)  # fmt: skip

__all__ = ["RangeSet", "RangeSetND", "RangesLike", "VectorsLike"]

#: what stands for a set of numbers; text is ranges
RangesLike: TypeAlias = "str | RangeSet | Iterable[str | int | RangeSet]"
#: what stands for one dimension of a vector
AxisLike: TypeAlias = "RangeSet | str | int | slice"
#: what stands for a set of vectors
VectorsLike: TypeAlias = "RangeSetND | Iterable[Iterable[AxisLike]]"

_KEY = ("", "")
_NUMBER = re.compile("[0-9]+|-[1-9][0-9]*")


class RangeSet(FoldedSet[RangesLike, str], MutableSet[str]):
    """A set of numbers as they are written: ``RangeSet("1-9/2,05")``. 5, 05 and 005 are three numbers.

    A `MutableSet` of text, in the order of sign, length and value; an `int` stands for its digits without padding.
    Operators and comparisons take range sets and sets of numbers (as text), methods also text and iterables. Equal
    sets hold the same texts: ``1-5`` is not ``01-05``.

    Thread safety: as that of a `set`; reading is safe from anywhere as long as nobody changes it.

    Args:
        pattern: ranges as text, a RangeSet, or an iterable of either and of ints; None is the empty set.
        autostep: the text shows as many numbers at equal distances, or more, as one range with a step; None: never.

    Raises:
        RangeSetParseError: what is given is no set of numbers; the empty text is none.
    """

    __slots__ = ("_autostep",)

    def __init__(self, pattern: RangesLike | None = None, autostep: float | None = None) -> None:
        self._patterns, self._signs = {}, NO_SIGNS
        self._autostep: float | None = pattern.autostep if isinstance(pattern, RangeSet) else None
        if autostep is not None:
            self.autostep = autostep
        if pattern is not None:
            self._patterns = dict(self._parsed(pattern)[0])

    @classmethod
    def fromlist(cls, rnglist: Iterable[str | int | RangeSet], autostep: float | None = None) -> Self:
        """Return the set of many ranges, or range sets. Raises RangeSetParseError as the constructor."""
        return cls(rnglist, autostep)

    @classmethod
    def fromone(cls, index: int | slice | str, pad: int = 0, autostep: float | None = None) -> Self:
        """Return the set of one number, or of the numbers of a slice (whose end is not in it)."""
        made = cls(None, autostep)
        if isinstance(index, slice):
            if index.stop is None:
                raise RangeSetParseError(str(index), None, "a slice of numbers needs an end")
            made.add_range(index.start or 0, index.stop, index.step or 1, pad)
        else:
            made.add(index, pad)
        return made

    @property
    def autostep(self) -> float | None:
        """How many numbers at equal distances are shown as one range with a step; None: never."""
        return self._autostep

    @autostep.setter
    def autostep(self, value: float | None) -> None:
        given: object = value
        if given is not None and not (isinstance(given, (int, float)) and given >= 0):
            raise OptionError(f"autostep={value!r}: give a count of numbers, or None")
        self._autostep = value

    @property
    def padding(self) -> int | None:
        """The digits of the longest number with zeros in front, or None; setting it pads all numbers anew."""
        return _padding(self._axis())

    @padding.setter
    def padding(self, value: int | None) -> None:
        values = (piece for span in self._axis() for piece in pieces(*span))
        pad = _checked_pad(value or 0)
        self._put(span for _, low, high in values for span in padded_spans(low, high, pad))

    # Reading

    def dim(self) -> int:
        """Return 1."""
        return 1

    def striter(self) -> Iterator[str]:
        """Iterate over the numbers as they are written, in order."""
        return self._items()

    def intiter(self) -> Iterator[int]:
        """Iterate over the values of the numbers, in their order; 5 and 05 are there as 5 each."""
        return map(int, self._items())

    def slices(self) -> Iterator[slice]:
        """Iterate over the ranges as slices, with steps as `autostep` has them; their ends are not in the set."""
        for text in axis_text(self._axis(), self._autostep):
            found = re.fullmatch(r"(-?[0-9]+)(?:-(-?[0-9]+)(?:/([0-9]+))?)?", text)
            first, last, step = found.groups() if found else (text, None, None)
            yield slice(int(first), int(last or first) + 1, int(step or 1))

    def index(self, element: str | int) -> int:
        """Return the place of a number in the order, by arithmetic.

        Raises:
            ValueError: it is not in the set.
        """
        number = str(element)
        place = rank(self._space(), [code(number)]) if self._space() and _is_number(number) else None
        if place is None:
            raise ValueError(f"{number!r} is not in the range set")
        return place

    def __contains__(self, element: object) -> bool:
        """Return whether a number (as text, or an int: its digits), or all of a RangeSet, is in the set."""
        if isinstance(element, RangeSet):
            return self.issuperset(element)
        number = str(element) if isinstance(element, (int, str)) else ""
        return _is_number(number) and contains(self._space(), [code(number)])

    def __eq__(self, other: object) -> bool:
        if isinstance(other, RangeSet):
            return self._patterns == other._patterns
        if isinstance(other, AbstractSet):
            return len(self) == len(other) and all(isinstance(item, str) and item in self for item in other)
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]  # it can be changed

    def __str__(self) -> str:
        return ",".join(axis_text(self._axis(), self._autostep))

    __repr__ = __str__

    def __reduce__(self) -> tuple[Any, ...]:
        text = ",".join(axis_text(self._axis()))
        return type(self), (text or None, self._autostep)

    # Changing

    def add(self, value: str | int, pad: int = 0) -> None:
        """Add a number, padded to so many digits.

        Raises:
            RangeSetParseError: it is none.
        """
        number = self._one(value, pad)
        self._change([number], ",")

    def discard(self, value: str | int, pad: int = 0) -> None:
        """Take a number out, if it is there."""
        self._change([self._one(value, pad)], "!")

    def remove(self, value: str | int, pad: int = 0) -> None:
        """Take a number out. Raises KeyError where it is not in the set."""
        number = self._one(value, pad)
        if number not in self:
            raise KeyError(number)
        self._change([number], "!")

    def add_range(self, start: int, stop: int, step: int = 1, pad: int = 0) -> None:
        """Add the numbers from `start` up to `stop`, which is not one of them, padded to so many digits.

        Raises:
            RangeSetParseError: there are none, or with a step more than 100,000.
        """
        text = f"{start}-{stop - 1}/{step}"
        if start >= stop or step < 1:
            raise RangeSetParseError(text, None, "give a first number, a greater end, and a step of 1 or more")
        _checked_pad(pad, len(str(start)), len(str(stop)))
        if step > 1 and len(range(start, stop, step)) > MAX_STEPPED:
            raise RangeSetParseError(text, None, f"steps may make at most {MAX_STEPPED} numbers")
        ends = [(start, stop - 1)] if step == 1 else [(value, value) for value in range(start, stop, step)]
        added = self._made({_KEY: box([coalesce(span for pair in ends for span in padded_spans(*pair, pad))])})
        self._change(added, ",")

    def updaten(self, others: Iterable[RangesLike]) -> None:
        """Add what is in any of many others."""
        for other in others:
            self._change(other, ",")

    def union_update(self, other: RangesLike) -> None:
        """Add what is in the other."""
        self._change(other, ",")

    # How

    def _space(self) -> Space:
        return self._patterns.get(_KEY, EMPTY)

    def _axis(self) -> Axis:
        space = self._space()
        return space[0][0] if space else ()

    def _put(self, spans: Iterable[Span]) -> None:
        axis = coalesce(spans)
        self._patterns = {_KEY: box([axis])} if axis else {}

    def _parsed(self, other: RangesLike) -> Parsed:
        if isinstance(other, RangeSet):
            return other._patterns, NO_SIGNS
        axis = coalesce(_spans(other))
        return ({_KEY: box([axis])} if axis else {}), NO_SIGNS

    def _made(self, patterns: Patterns, signs: Signs = NO_SIGNS) -> Self:
        made = type(self).__new__(type(self))
        made._patterns, made._signs, made._autostep = patterns, NO_SIGNS, self._autostep
        return made

    def _is_kin(self, other: object) -> bool:
        return isinstance(other, AbstractSet)

    def _items(self, skip: int = 0) -> Iterator[str]:
        return walk(self._space(), _KEY, skip) if self._patterns else iter(())

    def _gathered(self, items: Iterable[str]) -> Patterns:
        return self._parsed(items)[0]

    def _one(self, value: str | int, pad: int) -> str:
        number = str(value)
        if not _is_number(number):
            raise RangeSetParseError(number, 0, "not a number")
        return number if number[0] == "-" else number.zfill(_checked_pad(pad))


class RangeSetND(FoldedSet[VectorsLike, tuple[str, ...]]):
    """A set of vectors of numbers, all of so many dimensions: ``RangeSetND([["1-2", "3-4"], ["5", "6"]])``.

    Its elements are tuples of numbers as they are written, in the order of the first, then the second number. It is
    shown as a line for each product of ranges, with ``; `` between the dimensions. Operators take sets of the same
    kind, methods also lists of vectors.

    Thread safety: as that of a `set`; reading is safe from anywhere as long as nobody changes it.

    Args:
        args: a RangeSetND, or vectors: for each dimension a RangeSet, ranges as text, an int or a slice.
        pads: digits that the numbers of each dimension are padded to.
        autostep: as that of a RangeSet.

    Raises:
        RangeSetParseError: what is given is no set of vectors, or they differ in their dimensions.
    """

    __slots__ = ("_autostep",)

    def __init__(
        self, args: VectorsLike | None = None, pads: Sequence[int] | None = None, autostep: float | None = None
    ) -> None:
        self._patterns, self._signs = {}, NO_SIGNS
        self._autostep: float | None = args.autostep if isinstance(args, RangeSetND) else None
        if autostep is not None:
            self.autostep = autostep
        if args is not None:
            self._patterns = dict(self._parsed(args if pads is None else _padded_vectors(args, pads))[0])

    @property
    def autostep(self) -> float | None:
        """How many numbers at equal distances are shown as one range with a step; None: never."""
        return self._autostep

    @autostep.setter
    def autostep(self, value: float | None) -> None:
        self._autostep = RangeSet(None, value).autostep

    def dim(self) -> int:
        """Return the number of dimensions; of the empty set it is 0."""
        return next((len(key) - 1 for key in self._patterns), 0)

    @property
    def veclist(self) -> list[list[RangeSet]]:
        """The products that make up the set, each a RangeSet for each dimension."""
        return list(self.vectors())

    def vectors(self) -> Iterator[list[RangeSet]]:
        """Iterate over the products that make up the set, each a RangeSet for each dimension."""
        for axes in products(self._space()) if self._patterns else ():
            yield [_range_set(axis, self._autostep) for axis in axes]

    def pads(self) -> tuple[int, ...]:
        """Return the digits of the longest number with zeros in front, for each dimension; 0 where there is none."""
        columns = zip(*self.vectors(), strict=True)
        return tuple(max(ranges.padding or 0 for ranges in column) for column in columns)

    def iter_padding(self) -> Iterator[tuple[tuple[str, ...], list[int | None]]]:
        """Iterate over the vectors, each with the digits of its numbers that have zeros in front (else None)."""
        for row in self:
            yield row, [len(number) if number[0] == "0" and number != "0" else None for number in row]

    def fold(self) -> None:
        """Do nothing: the set is always folded. For programs that call it."""

    def index(self, element: Sequence[str | int]) -> int:
        """Return the place of a vector in the order, by arithmetic.

        Raises:
            ValueError: it is not in the set.
        """
        codes = self._codes(element)
        place = rank(self._space(), codes) if codes else None
        if place is None:
            raise ValueError(f"{element!r} is not in the range set")
        return place

    def __contains__(self, element: object) -> bool:
        """Return whether a vector, or all of a RangeSetND, is in the set."""
        if isinstance(element, RangeSetND):
            return self.issuperset(element)
        codes = self._codes(element)
        return bool(codes) and contains(self._space(), codes)

    def __str__(self) -> str:
        return "".join("; ".join(map(str, vector)) + "\n" for vector in self.vectors())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({[[str(ranges) for ranges in vector] for vector in self.vectors()]!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        plain = [[",".join(axis_text(axis)) for axis in axes] for axes in products(self._space()) if axes]
        return type(self), (plain, None, self._autostep)

    # How

    def _space(self) -> Space:
        return next(iter(self._patterns.values()), EMPTY)

    def _codes(self, element: object) -> list[int]:
        """Return the codes of a vector; none where it cannot be in the set."""
        if isinstance(element, (str, bytes)) or not isinstance(element, Sequence) or len(element) != self.dim():
            return []
        texts = [str(number) for number in element]
        return [code(text) for text in texts] if all(map(_is_number, texts)) else []

    def _parsed(self, other: VectorsLike) -> Parsed:
        patterns = other._patterns if isinstance(other, RangeSetND) else _vectors(other)
        if patterns and self._patterns and patterns.keys() != self._patterns.keys():
            dims = len(next(iter(patterns))) - 1
            raise RangeSetParseError("", None, f"vectors of {dims} dimensions for a set of {self.dim()}")
        return patterns, NO_SIGNS

    def _made(self, patterns: Patterns, signs: Signs = NO_SIGNS) -> Self:
        made = type(self).__new__(type(self))
        made._patterns, made._signs, made._autostep = patterns, NO_SIGNS, self._autostep
        return made

    def _is_kin(self, other: object) -> bool:
        return isinstance(other, RangeSetND)

    def _items(self, skip: int = 0) -> Iterator[tuple[str, ...]]:
        return tuples(self._space(), skip) if self._patterns else iter(())

    def _gathered(self, items: Iterable[tuple[str, ...]]) -> Patterns:
        return _vectors(items)


def _range_set(axis: Axis, autostep: float | None) -> RangeSet:
    made = RangeSet(None, autostep)
    made._put(axis)
    return made


def _spans(ranges: RangesLike) -> list[Span]:
    """Return the codes of what stands for a set of numbers."""
    if isinstance(ranges, RangeSet):
        return list(ranges._axis())
    if isinstance(ranges, str):
        return RangeReader(lambda position, reason: RangeSetParseError(ranges, position, reason)).ranges(0, ranges)
    given: object = ranges
    if not isinstance(given, Iterable) or isinstance(given, bytes):
        raise RangeSetParseError(ascii(given)[:80], None, "give ranges as text, a RangeSet, or a list of either")
    return [span for item in ranges for span in _spans(str(item) if isinstance(item, int) else item)]


def _axis(ranges: AxisLike) -> Axis:
    if isinstance(ranges, (int, slice)):
        ranges = RangeSet.fromone(ranges)
    axis = coalesce(_spans(ranges))
    if not axis:
        raise RangeSetParseError("", None, "a dimension of a vector is empty")
    return axis


def _vectors(rows: Iterable[Iterable[AxisLike]]) -> Patterns:
    given: object = rows
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise RangeSetParseError(ascii(given)[:80], None, "give vectors: a list of lists of ranges")
    spaces = [box([_axis(ranges) for ranges in row]) for row in rows]
    dims = {_dims(space) for space in spaces}
    if len(dims) > 1 or 0 in dims:
        raise RangeSetParseError("", None, f"vectors of {' and '.join(map(str, sorted(dims)))} dimensions in one set")
    try:
        return {("",) * (dims.pop() + 1): union(spaces, Budget())} if spaces else {}
    except TooManyPieces:
        raise RangeSetParseError("", None, "its vectors overlap in too many ways; use fewer of them at once") from None


def _padded_vectors(rows: VectorsLike, pads: Sequence[int]) -> list[list[RangeSet]]:
    """Return vectors with the numbers of each dimension padded."""
    padded_rows = []
    for row in rows.vectors() if isinstance(rows, RangeSetND) else rows:
        sets = [_range_set(_axis(ranges), None) for ranges in row]
        if len(sets) != len(pads):
            raise RangeSetParseError("", None, f"{len(pads)} pads for {len(sets)} dimensions")
        for ranges, pad in zip(sets, pads, strict=True):
            ranges.padding = pad
        padded_rows.append(sets)
    return padded_rows


def _dims(space: Space) -> int:
    return 0 if space is LEAF else 1 + _dims(space[0][1])


def _padding(axis: Axis) -> int | None:
    widths = [width for span in axis for width, low, _ in pieces(*span) if padded(width, low)]
    return max(widths, default=None)


def _is_number(text: str) -> bool:
    return len(text) <= MAX_LENGTH and _NUMBER.fullmatch(text) is not None


def _checked_pad(*digits: int) -> int:
    if max(digits) > MAX_LENGTH:
        raise RangeSetParseError("", None, f"number longer than {MAX_LENGTH} digits")
    return digits[0]
