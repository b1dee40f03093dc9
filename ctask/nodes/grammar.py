# SPDX-License-Identifier: Apache-2.0
"""The grammar of node sets: from text to patterns and the ranges of their numbers.

::

    set     = [operand {operator operand}]     operators: "," and, "!" without, "&" in both,
                                               "^" in one only; from left to right
    operand = one or more of: text, digits, "[" range {"," range} "]"
    range   = number | number "-" number ["/" step]

Every run of digits is a number of its own, with its padding: ``n1`` is ``n[1]``, ``a1b2`` has two dimensions.
Digits before a bracket are put before its numbers, digits after it behind them: ``n1[2-3]0`` is
``n[120,130]``.

Nothing here takes memory in proportion to a number that is written in the text.

Runs in any thread; a `Gather` belongs to the call that made it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TypeAlias, cast

from ctask.errors import NodeNameError, NodeSetError
from ctask.nodes import names
from ctask.nodes.space import (
    EMPTY,
    LEAF,
    Axis,
    Budget,
    Op,
    Space,
    Span,
    TooManyPieces,
    box,
    coalesce,
    code,
    merge,
    numbers,
    pieces,
    points,
    ranges_of,
    union,
)  # fmt: skip

__all__ = ["Gather", "Patterns", "Template", "apply", "combine", "parse", "split_name"]

#: the text of a name before, between and after its numbers
Template: TypeAlias = tuple[str, ...]
#: what a node set is: the numbers of each pattern; never with an empty space
Patterns: TypeAlias = dict[Template, Space]

#: numbers that steps, and digits after brackets, may write out in one text; these do not stay ranges
MAX_STEPPED = 100_000

TOO_MANY_PIECES = "its ranges overlap in too many ways; use fewer of them at once"

_DIGITS = "0123456789"
_BLANK = " \t\r\n"
_NUMBER = re.compile("([0-9]+)")
# what makes a text more than one plain name; the comma is looked at apart
_SPECIAL = re.compile(r"[][!&^@*?\s]")
_OPERAND = re.compile(r"(?:[^][,!&^]+|\[[^][]*\])*")
_SLOT = re.compile(r"((?:[0-9]|\[[^][]*\])+)")
_BRACKET = re.compile(r"([0-9]*)\[([^][]*)\]([0-9]*)")
_WILD = re.compile(r"[*?]")
_RANGE = re.compile(r"([0-9]+)(?:-([0-9]+)(?:/([0-9]+))?)?")


def parse(text: str) -> Patterns:
    """Return the patterns of a node set; those of an empty text, or of blanks, are none.

    Raises:
        NodeSetError: with the position of what cannot be read.
        NodeNameError: a name in it is one that no node may have.
    """
    if not _SPECIAL.search(text):
        return _parse_names(text)
    if not text.strip(_BLANK):
        return {}
    return _Parser(text).patterns()


def combine(left: Patterns, right: Patterns, op: Op, budget: Budget) -> Patterns:
    """Return what `left op right` changes in `left`: the new spaces of its patterns, EMPTY for those that go.

    Raises:
        TooManyPieces: the budget does not suffice.
    """
    touched = left if op == "&" else right
    return {key: merge(left.get(key, EMPTY), right.get(key, EMPTY), op, budget) for key in touched}


def apply(patterns: Patterns, changes: Patterns) -> None:
    """Carry out what `combine` has found."""
    for template, space in changes.items():
        if space:
            patterns[template] = space
        else:
            patterns.pop(template, None)


def split_name(name: str) -> tuple[Template, list[int]]:
    """Return the template of a name and the codes of its numbers; for names of at most `MAX_LENGTH`."""
    parts = _NUMBER.split(name)
    return tuple(parts[::2]), [code(digits) for digits in parts[1::2]]


class Gather:
    """Collects names and spaces, and folds them at once: time grows with their number."""

    def __init__(self) -> None:
        # Names are grouped before they are looked at: most differ in their last digits only, so that one is
        # checked and cut to pieces for all that share its head.
        self._tails: dict[str, list[str]] = {}
        self._rows: dict[Template, list[list[str]]] = {}
        self._spaces: dict[Template, list[Space]] = {}

    def add(self, text: str) -> None:
        """Take an element of a list: a name, or a node set of its own.

        Raises:
            NodeSetError, NodeNameError: as `parse`; an element may not be blank.
        """
        if not isinstance(text, str):
            names.check(text)
        head = text.rstrip(_DIGITS)
        tails = self._tails.get(head)
        if tails is not None and len(head) < len(text) <= names.MAX_LENGTH:
            tails.append(text[len(head) :])
        elif _SPECIAL.search(text) or "," in text:
            if not text.strip(_BLANK):
                raise NodeNameError(f"bad node name {text!a}: it is blank")
            self.add_patterns(parse(text))
        else:
            self.add_name(text)

    def add_name(self, name: str) -> None:
        """Take one name. Raises NodeNameError for one that no node may have."""
        names.check(name)
        parts = _NUMBER.split(name)
        if len(parts) == 1:
            self._spaces[name,] = [LEAF]
        elif len(parts) == 3 and not parts[2]:
            self._tails.setdefault(parts[0], []).append(parts[1])
        else:
            self._rows.setdefault(tuple(parts[::2]), []).append(parts[1::2])

    def add_patterns(self, patterns: Patterns) -> None:
        """Take what another node set holds."""
        for template, space in patterns.items():
            self._spaces.setdefault(template, []).append(space)

    def patterns(self, budget: Budget) -> Patterns:
        """Return all that was added.

        Raises:
            TooManyPieces: the budget does not suffice.
        """
        for head, tails in self._tails.items():
            space = points([(code(digits),) for digits in set(tails)], 1)
            self._spaces.setdefault((head, ""), []).append(space)
        for template, rows in self._rows.items():
            space = points([[code(digits) for digits in row] for row in rows], len(template) - 1)
            self._spaces.setdefault(template, []).append(space)
        self._tails, self._rows = {}, {}
        return {template: _union(spaces, budget) for template, spaces in self._spaces.items()}


class _Parser:
    """Reads one text that has more in it than names and commas."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.stepped = 0
        self.budget = Budget(100_000 + 20 * len(text))

    def patterns(self) -> Patterns:
        found: Patterns = {}
        pending = Gather()
        pending_op: Op = ","
        position = 0
        try:
            for op, position, operand in self._operands():
                # a,b,c is a,(b,c) and a!b!c is a!(b,c): operands of a row are folded at once
                if op != pending_op or op in "&^":
                    apply(found, self._combined(found, pending, pending_op))
                    pending, pending_op = Gather(), op
                self._operand(position, operand, pending)
            apply(found, self._combined(found, pending, pending_op))
        except TooManyPieces:
            raise NodeSetError(self.text, position, TOO_MANY_PIECES) from None
        return found

    def _combined(self, found: Patterns, pending: Gather, op: Op) -> Patterns:
        return combine(found, pending.patterns(self.budget), op, self.budget)

    def _operands(self) -> Iterator[tuple[Op, int, str]]:
        """Yield (operator before it, position, operand) from left to right."""
        text, op, at = self.text, ",", 0
        while True:
            found = _OPERAND.match(text, at)
            end = found.end() if found else at
            if end < len(text) and text[end] in "[]":
                raise self._unbalanced(end)
            operand = text[at:end].strip(_BLANK)
            if not operand:
                raise self._missing(at, end)
            yield cast(Op, op), at + text[at:end].index(operand), operand
            if end == len(text):
                return
            op, at = text[end], end + 1

    def _unbalanced(self, at: int) -> NodeSetError:
        if self.text[at] == "]":
            return NodeSetError(self.text, at, "closing bracket without an opening one")
        again = self.text.find("[", at + 1)
        if again >= 0 and "]" not in self.text[at:again]:
            return NodeSetError(self.text, again, "opening bracket inside a bracket")
        return NodeSetError(self.text, at, "bracket not closed")

    def _missing(self, at: int, end: int) -> NodeSetError:
        if end < len(self.text):
            return NodeSetError(self.text, end, f"no node before '{self.text[end]}'")
        return NodeSetError(self.text, at - 1, f"no node after '{self.text[at - 1]}'")

    def _operand(self, position: int, operand: str, gather: Gather) -> None:
        if operand.startswith("@"):
            raise NodeSetError(self.text, position, "node groups are not supported")
        cuts = _SLOT.split(operand)
        at = position
        for cut in cuts[::2]:
            wild = _WILD.search(cut)
            if wild:
                where = self.text.index(wild.group(), at)
                raise NodeSetError(self.text, where, "wildcards are not supported")
        if "[" not in operand:
            gather.add_name(operand)
            return
        axes = []
        for index, cut in enumerate(cuts):
            if index % 2:
                axes.append(self._slot(at, cut))
            at += len(cut)
        # the last numbers are the longest: if their name will do, all will
        longest = [next(numbers(axis[-1][1], axis[-1][1])) for axis in axes]
        names.check("".join(text for pair in zip(cuts[::2], [*longest, ""], strict=True) for text in pair))
        gather.add_patterns({tuple(cuts[::2]): box(axes)})

    def _slot(self, position: int, slot: str) -> Axis:
        """Return the numbers of digits and brackets that stand together."""
        if "[" not in slot:
            return coalesce(self._range(position, slot))
        found = _BRACKET.fullmatch(slot)
        if not found:
            again = position + slot.index("[", slot.index("]"))
            raise NodeSetError(self.text, again, "a second bracket needs text before it")
        before, ranges, after = found.groups()
        inside = at = position + found.start(2)
        spans: list[Span] = []
        for item in ranges.split(","):
            bare = item.strip(_BLANK)
            start = at + item.index(bare)
            if after and "/" in bare:
                raise NodeSetError(self.text, start, "no digits may follow a bracket that has a step in it")
            spans += self._range(start, bare)
            at += len(item) + 1
        if before:
            # as ClusterShell reads it: before the ends of each folded range, so that n1[2-13] is n[12-113]
            folded = ranges_of(coalesce(spans))
            spans = [span for ends in folded for span in self._spans(inside, *(before + end for end in ends))]
        return coalesce(self._behind(inside, coalesce(spans), after) if after else spans)

    def _range(self, position: int, item: str) -> list[Span]:
        found = _RANGE.fullmatch(item)
        if not found:
            raise NodeSetError(self.text, position, _why_no_range(item))
        first, last, step = found[1], found[2] or found[1], found[3] or "1"
        self._check_length(position, len(step))
        spans = self._spans(position, first, last)
        if int(step) == 0:
            raise NodeSetError(self.text, position, "a step is 1 or more")
        if int(step) == 1:
            return spans
        self._write_out(position, (int(last) - int(first)) // int(step) + 1)
        values = range(int(first), int(last) + 1, int(step))
        return [(number, number) for number in (code(str(value).zfill(len(first))) for value in values)]

    def _spans(self, position: int, first: str, last: str) -> list[Span]:
        """Return the codes from one number to another: a span for each length where they are not padded."""
        self._check_length(position, max(len(first), len(last)))
        if len(first) != len(last) and (last[0] == "0" or (first[0] == "0" and first != "0")):
            raise NodeSetError(self.text, position, f"padding differs between {first} and {last}")
        if int(first) > int(last):
            raise NodeSetError(self.text, position, f"range ends before it begins: {first}-{last}")
        spans = []
        for width in range(len(first), len(last)):
            spans.append((code(first), code("9" * width)))
            first = "1" + "0" * width
        return [*spans, (code(first), code(last))]

    def _behind(self, position: int, spans: Iterable[Span], after: str) -> list[Span]:
        """Return the numbers with the digits `after` behind each of them."""
        out = []
        for first, last in spans:
            self._write_out(position, last - first + 1)
            longest, _, _ = list(pieces(first, last))[-1]
            self._check_length(position, longest + len(after))
            out += [code(number + after) for number in numbers(first, last)]
        return [(number, number) for number in out]

    def _check_length(self, position: int, digits: int) -> None:
        if digits > names.MAX_LENGTH:
            raise NodeSetError(self.text, position, f"number longer than {names.MAX_LENGTH} digits")

    def _write_out(self, position: int, count: int) -> None:
        self.stepped += count
        if self.stepped > MAX_STEPPED:
            reason = f"steps, and digits after brackets, may make at most {MAX_STEPPED} numbers"
            raise NodeSetError(self.text, position, reason)


def _parse_names(text: str) -> Patterns:
    """Return the patterns of names with commas between them."""
    gather = Gather()
    if not text:
        return {}
    items = text.split(",")
    if "" in items:
        at = sum(len(item) + 1 for item in items[: items.index("")])
        at, side = (at, "before") if at < len(text) else (at - 1, "after")
        raise NodeSetError(text, at, f"no node {side} ','")
    for item in items:
        gather.add(item)
    return gather.patterns(Budget())


def _union(spaces: list[Space], budget: Budget) -> Space:
    if len(spaces) > 1 and spaces[0] is not LEAF and spaces[0][0][1] is LEAF:
        # one dimension: all ranges at once
        return ((coalesce(span for space in spaces for axis, _ in space for span in axis), LEAF),)
    return union(spaces, budget)


def _why_no_range(item: str) -> str:
    if not item:
        return "empty range"
    if not item.isascii():
        return "numbers are written with the ASCII digits 0 to 9"
    if item.startswith("-"):
        return "negative numbers are not supported in brackets"
    if "/" in item and "-" not in item:
        return "a step needs a range before it, as in 1-9/2"
    return f"not a number or a range: {item[:40]!a}"
