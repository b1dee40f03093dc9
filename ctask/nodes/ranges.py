# SPDX-License-Identifier: Apache-2.0
"""Ranges as text: ``1-9/2,05,-3-3`` to spans of codes, and axes back to text.

::

    ranges = range {"," range}
    range  = number | number "-" number ["/" step]
    number = digits, or "-" and digits without padding

What stands in the brackets of a node set, and what a `RangeSet` is made of. Nothing here takes memory in proportion
to a number that is written in the text: what has to be written out (steps, digits behind a bracket) is bounded.

Runs in any thread; a `RangeReader` belongs to the call that made it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TypeAlias

from ctask.nodes.names import MAX_LENGTH
from ctask.nodes.space import Axis, Ends, Span, coalesce, code, numbers, pieces, ranges_of, texts_of

__all__ = ["BLANK", "MAX_STEPPED", "RangeReader", "axis_text", "padded_spans"]

#: numbers that steps, and digits after brackets, may write out in one text; these do not stay ranges
MAX_STEPPED = 100_000

#: what may stand around names and numbers
BLANK = " \t\r\n"

#: makes the error for a position and a reason
Refuse: TypeAlias = Callable[[int, str], Exception]

_RANGE = re.compile(r"(-?[0-9]+)(?:[ \t]*-[ \t]*(-?[0-9]+)(?:/([0-9]+))?)?")


class RangeReader:
    """Reads the ranges of one text.

    Args:
        refuse: makes the error for a position and a reason.
    """

    def __init__(self, refuse: Refuse) -> None:
        self._refuse = refuse
        self._stepped = 0

    def ranges(self, position: int, text: str) -> list[Span]:
        """Return the spans of a list of ranges, in its order."""
        spans: list[Span] = []
        at = position
        for item in text.split(","):
            bare = item.strip(BLANK)
            spans += self.range(at + item.index(bare), bare)
            at += len(item) + 1
        return spans

    def range(self, position: int, item: str) -> list[Span]:
        """Return the spans of one range."""
        found = _RANGE.fullmatch(item)
        if not found:
            raise self._refuse(position, _why_no_range(item))
        first, last, step = found[1], found[2] or found[1], found[3] or "1"
        self._check_length(position, len(step))
        spans = self._spans(position, first, last)
        if int(step) == 0:
            raise self._refuse(position, "a step is 1 or more")
        if int(step) == 1:
            return spans
        self._write_out(position, (int(last) - int(first)) // int(step) + 1)
        # "-" counts as no digit, and what is negative has no padding
        width = 0 if first[0] == "-" else len(first)
        values = range(int(first), int(last) + 1, int(step))
        return [(number, number) for number in (code(str(value).zfill(width)) for value in values)]

    def before(self, position: int, digits: str, spans: Iterable[Span]) -> list[Span]:
        """Return the numbers with `digits` in front of them.

        As ClusterShell reads it: in front of the ends of each folded range, so that n1[2-13] is n[12-113].
        """
        folded = ranges_of(coalesce(spans))
        if folded and folded[0][0][0] == "-":
            raise self._refuse(position, "no digits may stand before a bracket with a negative number in it")
        return [span for ends in folded for span in self._spans(position, *(digits + end for end in ends))]

    def behind(self, position: int, spans: Iterable[Span], digits: str) -> list[Span]:
        """Return the numbers with `digits` behind each of them."""
        out = []
        for first, last in coalesce(spans):
            self._write_out(position, last - first + 1)
            longest, _, _ = list(pieces(first, last))[-1]
            self._check_length(position, longest + len(digits))
            out += [code(number + digits) for number in numbers(first, last)]
        return [(number, number) for number in out]

    def _spans(self, position: int, first: str, last: str) -> list[Span]:
        """Return the codes from one number to another: a span for each length where they are not padded."""
        self._check_length(position, max(len(first), len(last)))
        first, last = self._number(position, first), self._number(position, last)
        low, high = int(first), int(last)
        if low > high:
            raise self._refuse(position, f"range ends before it begins: {first}-{last}")
        if first[0] == "-":
            first = "0"  # what is below zero has one code after the other, down to the last of them
            if high < 0:
                return [(low, high)]
        if len(first) != len(last) and (last[0] == "0" or (first[0] == "0" and first != "0")):
            raise self._refuse(position, f"padding differs between {first} and {last}")
        spans = [(low, -1)] if low < 0 else []
        for width in range(len(first), len(last)):
            spans.append((code(first), code("9" * width)))
            first = "1" + "0" * width
        return [*spans, (code(first), code(last))]

    def _number(self, position: int, text: str) -> str:
        if text.startswith("-0") and text != "-0":
            raise self._refuse(position, f"a negative number has no padding: {text}")
        return "0" if text == "-0" else text

    def _check_length(self, position: int, digits: int) -> None:
        if digits > MAX_LENGTH:
            raise self._refuse(position, f"number longer than {MAX_LENGTH} digits")

    def _write_out(self, position: int, count: int) -> None:
        self._stepped += count
        if self._stepped > MAX_STEPPED:
            raise self._refuse(position, f"steps, and digits after brackets, may make at most {MAX_STEPPED} numbers")


def padded_spans(first: int, last: int, pad: int) -> list[Span]:
    """Return the codes of the values from one to another, those that are shorter padded to so many digits.

    What is negative has no padding.
    """
    spans = [(first, min(last, -1))] if first < 0 else []
    low, width = max(first, 0), max(pad, 1)
    while low <= last:
        width = max(width, len(str(low)))
        high = min(last, 10**width - 1)
        spans.append((code(str(low).zfill(width)), code(str(high).zfill(width))))
        low = high + 1
    return spans


def axis_text(axis: Axis, autostep: float | None = None) -> list[str]:
    """Return the ranges of an axis as text, one by one.

    Args:
        autostep: as many numbers at equal distances are written as one range with a step; None: none are.
    """
    if autostep is not None:
        return _stepped(ranges_of(axis), autostep)
    return texts_of(axis)


def _stepped(folded: list[Ends], autostep: float) -> list[str]:
    """Return folded ranges as text, with steps where so many numbers are at equal distances; the list is used up.

    From left to right, as ClusterShell does: a run begins at a single number and takes the first number of the range
    that it ends in; of a run that is too short, one number is written, and the next may begin another.
    """
    texts: list[str] = []
    at = 0
    while at < len(folded):
        first, last = folded[at]
        end, step = _run(folded, at)
        if first != last:
            texts.append(f"{first}-{last}")
            at += 1
        elif end - at + 1 < max(autostep, 2):
            # shorter still would be a run that began within this one, but for its last number
            at, begin = max(at + 1, end), at
            texts += [number for number, _ in folded[begin:at]]
        else:
            until, rest = folded[end]
            texts.append(f"{first}-{until}/{step}")
            at = end + 1
            if until != rest:
                # the range that the run ends in goes on without its first number
                at, folded[end] = end, (_after(until), rest)
    return texts


def _run(folded: list[Ends], at: int) -> tuple[int, int]:
    """Return the last range whose first number is in the run that begins at one, and the run's step."""
    first = folded[at][0]
    step, end = 0, at
    while end + 1 < len(folded) and folded[end][0] == folded[end][1]:
        here, there = folded[end][0], folded[end + 1][0]
        if not _alike(first, there):
            break
        distance = int(there) - int(here)
        if step and distance != step:
            break
        step, end = distance, end + 1
    return end, step


def _alike(first: str, other: str) -> bool:
    """Whether a range may go from one number to a greater one: both without padding, or of one length."""
    if _padded(first) or _padded(other):
        return len(first) == len(other) and first[0] != "-"
    return True


def _padded(number: str) -> bool:
    return number[0] == "0" and number != "0"


def _after(number: str) -> str:
    value = int(number) + 1
    return str(value) if number[0] == "-" else str(value).zfill(len(number))


def _why_no_range(item: str) -> str:
    if not item:
        return "empty range"
    if not item.isascii():
        return "numbers are written with the ASCII digits 0 to 9"
    if "/" in item and "-" not in item[1:]:
        return "a step needs a range before it, as in 1-9/2"
    if ":" in item:
        return "an IPv6 address is written without brackets, and its port is an option of its own (port)"
    return f"not a number or a range: {item[:40]!a}"
