# SPDX-License-Identifier: Apache-2.0
"""The grammar of node sets: from text to patterns and the ranges of their numbers.

::

    set     = [operand {operator operand}]     operators: "," and, "!" without, "&" in both,
                                               "^" in one only; from left to right
    operand = nodes | "@" group | "@" source ":" group | "@*" | "@" source ":*" | "@@" | "@@" source
    nodes   = one or more of: text, digits, "[" ranges "]", "*", "?"
    group   = one or more of: text, digits, "[" ranges "]"

Every run of digits is a number of its own, with its padding: ``n1`` is ``n[1]``, ``a1b2`` has two dimensions.
Digits before a bracket are put before its numbers, digits after it behind them: ``n1[2-3]0`` is
``n[120,130]``. Ranges are those of `ctask.nodes.ranges`. ``@*`` is all nodes of a source, and ``@@`` the names of its
groups; an operand with ``*`` or ``?`` is those of all nodes that it matches. Groups are what `Groups` says.

Nothing here takes memory in proportion to a number that is written in the text.

Runs in any thread; a `Gather` belongs to the call that made it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, product
from typing import TYPE_CHECKING, Protocol, TypeAlias, cast

from ctask.errors import NodeNameError, NodeSetError, NodeSetParseError, NodeSetParseRangeError
from ctask.nodes import names
from ctask.nodes.ranges import BLANK, MAX_STEPPED, RangeReader, padded_spans
from ctask.nodes.signs import NO_SIGNS, Signs, unsigned
from ctask.nodes.space import (
    EMPTY,
    LEAF,
    Axis,
    Budget,
    Op,
    Patterns,
    Space,
    Template,
    TooManyPieces,
    box,
    coalesce,
    code,
    codes,
    line,
    merge,
    numbers,
    points,
    size,
    union,
)  # fmt: skip

if TYPE_CHECKING:
    from ctask.nodes.wild import Part

__all__ = ["TOO_MANY_PIECES", "Gather", "Groups", "Parsed", "apply", "combine", "parse", "split_name"]

#: patterns, and which of their numbers were written with a sign
Parsed: TypeAlias = "tuple[Patterns, Signs]"

TOO_MANY_PIECES = "its ranges overlap in too many ways; use fewer of them at once"

_DIGITS = "0123456789"
_NUMBER = re.compile("([0-9]+)")
# what makes a text more than one plain name; the comma is looked at apart
_SPECIAL = re.compile(r"[][!&^@*?\s]")
# one operand with one bracket, and digits nowhere else; no number in it is so long that the name may be too long
_PLAIN = re.compile(
    r"([A-Za-z_.:%+=~#][A-Za-z_.:%+=~#-]*)"
    r"\[([0-9]{1,18}(?:-[0-9]{1,18})?(?:,[0-9]{1,18}(?:-[0-9]{1,18})?)*)\]"
    r"([A-Za-z_.:%+=~#-]*)"
)
MAX_PLAIN = names.MAX_LENGTH - 18
_OPERAND = re.compile(r"(?:[^][,!&^]+|\[[^][]*\])*")
_SLOT = re.compile(r"((?:[0-9]|\[[^][]*\])+)")
_BRACKET = re.compile(r"([0-9]*)\[([^][]*)\]([0-9]*)")
_WILD = re.compile(r"[*?]")
_NOT_IN_GROUPS = re.compile(r"[\s*?@\x00-\x1f\x7f]")


class Groups(Protocol):
    """What the grammar asks of node groups; a source that is None is the one that the text stands in."""

    def of_group(self, group: str, source: str | None) -> Parsed:
        """Return the nodes of a group."""

    def of_all(self, source: str | None) -> Parsed:
        """Return all nodes of a source."""

    def of_names(self, source: str | None) -> Parsed:
        """Return the names of the groups of a source, as a node set."""

    def matching(self, parts: list[Part]) -> Parsed:
        """Return those of all nodes that a wildcard matches."""


#: makes what the grammar asks, when it first has to
MakeGroups: TypeAlias = Callable[[], Groups]


def parse(text: str, groups: MakeGroups) -> Parsed:
    """Return the patterns of a node set; those of an empty text, or of blanks, are none.

    Raises:
        NodeSetError: with the position of what cannot be read.
        NodeNameError: a name in it is one that no node may have.
    """
    if not _SPECIAL.search(text):
        return _parse_names(text, groups)
    plain = _PLAIN.fullmatch(text)
    if plain:
        parsed = _parse_plain(*plain.groups())
        if parsed:
            return parsed
    if not text.strip(BLANK):
        return {}, NO_SIGNS
    return _Parser(text, groups).parsed()


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

    def __init__(self, groups: MakeGroups) -> None:
        self._make_groups = groups
        self._made_groups: Groups | None = None
        # Names are grouped before they are looked at: most differ in their last digits only, so that one is
        # checked and cut to pieces for all that share its head.
        self._tails: dict[str, list[str]] = {}
        self._rows: dict[Template, list[list[str]]] = {}
        self._spaces: dict[Template, list[Space]] = {}
        #: of all that was added
        self.signs: Signs = NO_SIGNS

    def groups(self) -> Groups:
        """Return what knows node groups, one for all that is added: what it has looked up is looked up once."""
        if self._made_groups is None:
            self._made_groups = self._make_groups()
        return self._made_groups

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
            if not text.strip(BLANK):
                raise NodeNameError(f"bad node name {text!a}: it is blank")
            self.add_parsed(parse(text, self.groups))
        else:
            self.add_name(text)

    def add_alike(self, many: Sequence[object]) -> bool:
        """Take many names at once if they differ in their numbers only; False: nothing was taken.

        A list of nodes is mostly such a list. It is read as one text, name by name only within the regular
        expressions' own loops.
        """
        try:
            text = "\n".join(cast(Sequence[str], many))
        except TypeError:
            return False  # it has something else in it
        one = str(many[0])
        first = _NUMBER.sub("0", one)
        template = tuple(first.split("0"))
        dims = len(template) - 1
        if dims < 1 or _SPECIAL.search(first) or "," in first:
            return False
        if dims == 1:
            digits = _between(text, *template)
        else:
            digits = _NUMBER.findall(text) if _NUMBER.sub("0", text) == "\n".join([first] * len(many)) else []
        if len(digits) != len(many) * dims:
            return False
        names.check(max(cast(Sequence[str], many), key=len))
        found = codes(digits)
        self._spaces.setdefault(template, []).append(line(found) if dims == 1 else points(_rows(found, dims), dims))
        return True

    def add_name(self, name: str) -> None:
        """Take one name. Raises NodeNameError for one that no node may have."""
        names.check(name)
        self.add_checked(name)

    def add_checked(self, name: str) -> None:
        """Take one name that is known to be good."""
        parts = _NUMBER.split(name)
        if len(parts) == 1:
            self._spaces[name,] = [LEAF]
        elif len(parts) == 3 and not parts[2]:
            self._tails.setdefault(parts[0], []).append(parts[1])
        else:
            self._rows.setdefault(tuple(parts[::2]), []).append(parts[1::2])

    def add_parsed(self, parsed: Parsed) -> None:
        """Take what another node set holds."""
        patterns, signs = parsed
        for template, space in patterns.items():
            self._spaces.setdefault(template, []).append(space)
        if signs:
            self.signs |= signs

    def patterns(self, budget: Budget) -> Patterns:
        """Return all that was added.

        Raises:
            TooManyPieces: the budget does not suffice.
        """
        for head, tails in self._tails.items():
            self._spaces.setdefault((head, ""), []).append(line(codes(tails)))
        for template, rows in self._rows.items():
            space = points([[code(digits) for digits in row] for row in rows], len(template) - 1)
            self._spaces.setdefault(template, []).append(space)
        self._tails, self._rows = {}, {}
        return {template: _union(spaces, budget) for template, spaces in self._spaces.items()}


class _Parser:
    """Reads one text that has more in it than names and commas."""

    def __init__(self, text: str, groups: MakeGroups) -> None:
        self.text = text
        self.whole = Gather(groups)
        self.reader = RangeReader(self._refuse_range)
        self.budget = Budget(100_000 + 20 * len(text))

    def parsed(self) -> Parsed:
        found: Patterns = {}
        signs = NO_SIGNS
        pending = Gather(self.whole.groups)
        pending_op: Op = ","
        position = 0
        try:
            for op, position, operand in self._operands():
                # a,b,c is a,(b,c) and a!b!c is a!(b,c): operands of a row are folded at once
                if op != pending_op or op in "&^":
                    apply(found, self._combined(found, pending, pending_op))
                    # what is taken out does not say how the rest is shown
                    signs |= pending.signs if pending_op != "!" else NO_SIGNS
                    pending, pending_op = Gather(self.whole.groups), op
                self._operand(position, operand, pending)
            apply(found, self._combined(found, pending, pending_op))
        except TooManyPieces:
            raise NodeSetError(self.text, position, TOO_MANY_PIECES) from None
        return found, signs | pending.signs if pending_op != "!" else signs

    def _combined(self, found: Patterns, pending: Gather, op: Op) -> Patterns:
        patterns = pending.patterns(self.budget)
        return combine(found, patterns, op, self.budget) if found or op != "," else patterns

    def _operands(self) -> Iterator[tuple[Op, int, str]]:
        """Yield (operator before it, position, operand) from left to right."""
        text, op, at = self.text, ",", 0
        while True:
            found = _OPERAND.match(text, at)
            end = found.end() if found else at
            if end < len(text) and text[end] in "[]":
                raise self._unbalanced(end)
            operand = text[at:end].strip(BLANK)
            if not operand:
                raise self._missing(at, end)
            yield cast(Op, op), at + text[at:end].index(operand), operand
            if end == len(text):
                return
            op, at = text[end], end + 1

    def _unbalanced(self, at: int) -> NodeSetError:
        if self.text[at] == "]":
            return self._refuse(at, "closing bracket without an opening one")
        again = self.text.find("[", at + 1)
        if again >= 0 and "]" not in self.text[at:again]:
            return self._refuse(again, "opening bracket inside a bracket")
        return self._refuse(at, "bracket not closed")

    def _missing(self, at: int, end: int) -> NodeSetError:
        if end < len(self.text):
            return self._refuse(end, f"no node before '{self.text[end]}'")
        return self._refuse(at - 1, f"no node after '{self.text[at - 1]}'")

    def _refuse(self, position: int, reason: str) -> NodeSetParseError:
        return NodeSetParseError(self.text, position, reason)

    def _refuse_range(self, position: int, reason: str) -> NodeSetParseRangeError:
        return NodeSetParseRangeError(self.text, position, reason)

    def _operand(self, position: int, operand: str, gather: Gather) -> None:
        plain = _PLAIN.fullmatch(operand)
        parsed = _parse_plain(*plain.groups()) if plain else None
        if parsed:
            gather.add_parsed(parsed)
            return
        if operand[0] == "@":
            self._group(position, operand, gather)
            return
        cuts = _SLOT.split(operand)
        if any(_WILD.search(cut) for cut in cuts[::2]):
            gather.add_parsed(gather.groups().matching(list(self._parts(position, cuts))))
        elif "[" not in operand:
            gather.add_name(operand)
        else:
            template, axes = self._axes(position, cuts)
            negative = any(axis[0][0] < 0 for axis in axes)
            # the last numbers are the longest, and the first ones may have a sign: if their names will do, all will
            for end in (0, -1) if negative else (-1,):
                ends = (axis[end][bool(end)] for axis in axes)
                texts = [next(numbers(number, number)) for number in ends]
                names.check("".join(chain.from_iterable(zip(template, [*texts, ""], strict=True))))
            space = box(axes)
            gather.add_parsed(unsigned(template, space) if negative else ({template: space}, NO_SIGNS))

    def _axes(self, position: int, cuts: list[str]) -> tuple[Template, list[Axis]]:
        """Return the text and the numbers of an operand that was cut by its numbers."""
        axes = []
        for index, cut in enumerate(cuts):
            if index % 2:
                axes.append(self._slot(position, cut))
            position += len(cut)
        return tuple(cuts[::2]), axes

    def _parts(self, position: int, cuts: list[str]) -> Iterator[Part]:
        """Yield the parts of a wildcard."""
        from ctask.nodes.wild import parts_of_text  # on demand: most texts have none

        for index, cut in enumerate(cuts):
            if index % 2 and "[" in cut:
                yield self._slot(position, cut)
            else:
                yield from parts_of_text(cut)
            position += len(cut)

    def _slot(self, position: int, slot: str) -> Axis:
        """Return the numbers of digits and brackets that stand together."""
        if "[" not in slot:
            return coalesce(self.reader.range(position, slot))
        found = _BRACKET.fullmatch(slot)
        if not found:
            again = position + slot.index("[", slot.index("]"))
            raise self._refuse(again, "a second bracket needs text before it")
        before, ranges, after = found.groups()
        inside = position + found.start(2)
        if after and "/" in ranges:
            raise self._refuse_range(inside, "no digits may follow a bracket that has a step in it")
        spans = self.reader.ranges(inside, ranges)
        if before:
            spans = self.reader.before(inside, before, spans)
        return coalesce(self.reader.behind(inside, spans, after) if after else spans)

    def _group(self, position: int, operand: str, gather: Gather) -> None:
        """Read ``@group``, ``@source:group``, ``@*``, ``@source:*``, ``@@`` and ``@@source``."""
        groups = gather.groups()
        if operand.startswith("@@"):
            self._check_group(position + 2, operand[2:])
            gather.add_parsed(groups.of_names(operand[2:] or None))
            return
        before, colon, after = operand[1:].partition(":")
        source, group = (before, after) if colon else (None, before)
        at = position + len(operand) - len(group)
        if source is not None:
            self._check_group(position + 1, source)
        if not group or source == "":
            where, what = (position + 1, "source") if group else (at, "group")
            raise self._refuse(min(where, len(self.text) - 1), f"the name of a {what} is missing; @* is all nodes")
        if group == "*":
            gather.add_parsed(groups.of_all(source))
            return
        self._check_group(at, _SLOT.sub("", group))
        for name in self._group_names(at, group):
            gather.add_parsed(groups.of_group(name, source))

    def _check_group(self, position: int, name: str) -> None:
        wrong = _NOT_IN_GROUPS.search(name)
        if wrong:
            at = self.text.index(wrong.group(), position)
            raise self._refuse(at, f"{wrong.group()!a} cannot be part of a group's name; @* is all nodes")

    def _group_names(self, position: int, group: str) -> Iterable[str]:
        if "[" not in group:
            return [group]
        template, axes = self._axes(position, _SLOT.split(group))
        if size(box(axes)) > MAX_STEPPED:
            raise self._refuse_range(position, f"at most {MAX_STEPPED} groups may be named at once")
        rows = product(*([text for span in axis for text in numbers(*span)] for axis in axes))
        return ("".join(chain.from_iterable(zip(template, [*row, ""], strict=True))) for row in rows)


def _parse_names(text: str, groups: MakeGroups) -> Parsed:
    """Return the patterns of names with commas between them."""
    if not text:
        return {}, NO_SIGNS
    gather = Gather(groups)
    items = text.split(",")
    if "" in items:
        at = sum(len(item) + 1 for item in items[: items.index("")])
        at, side = (at, "before") if at < len(text) else (at - 1, "after")
        raise NodeSetParseError(text, at, f"no node {side} ','")
    for item in items:
        gather.add(item)
    return gather.patterns(Budget()), NO_SIGNS


def _parse_plain(before: str, ranges: str, after: str) -> Parsed | None:
    """Return the patterns of what most texts are, one operand with one bracket; None: it is less simple than that."""
    if ".." in before or ".." in after or len(before) + len(after) > MAX_PLAIN:
        return None
    spans = []
    for item in ranges.split(","):
        first, dash, last = item.partition("-")
        low = high = code(first)
        if dash:
            high = code(last)
            if len(first) != len(last):
                if last[0] == "0" or (first[0] == "0" and first != "0"):
                    return None
                spans += padded_spans(int(first), int(last), 1)
        if low > high:
            return None
        if len(first) == len(last) or not dash:
            spans.append((low, high))
    return {(before, after): box([coalesce(spans)])}, NO_SIGNS


def _between(text: str, before: str, after: str) -> list[str]:
    """Return the digits of lines that have the same text around one number; none where one is different."""
    if not (text.startswith(before) and text.endswith(after) and text.isascii()):
        return []
    digits = text[len(before) : len(text) - len(after)].split(f"{after}\n{before}")
    return digits if "" not in digits and "".join(digits).isdigit() else []


def _rows(row_by_row: list[int], dims: int) -> Iterable[tuple[int, ...]]:
    """Return numbers in rows of so many."""
    return zip(*[iter(row_by_row)] * dims, strict=True)


def _union(spaces: list[Space], budget: Budget) -> Space:
    if len(spaces) > 1 and spaces[0] is not LEAF and spaces[0][0][1] is LEAF:
        # one dimension: all ranges at once
        return box([coalesce(span for space in spaces for axis, _ in space for span in axis)])
    return union(spaces, budget)
