# SPDX-License-Identifier: Apache-2.0
"""`NodeSet`: a set of node names, kept and shown folded.

Runs in any thread. A `NodeSet` has no lock: like a `set` it may be read by many threads, or changed by one.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any, Self, TypeAlias, overload

from ctask.errors import NodeSetError
from ctask.nodes.grammar import TOO_MANY_PIECES, Gather, Patterns, Template, apply, combine, parse, split_name
from ctask.nodes.names import MAX_LENGTH
from ctask.nodes.space import Budget, Op, TooManyPieces, contains, size, vectors, walk

__all__ = ["NodeSet", "NodesLike", "fold"]

#: what stands for nodes wherever they are asked for; a text is a node set, not its letters
NodesLike: TypeAlias = "str | NodeSet | Iterable[str | NodeSet]"

#: a slice that would have to write out more names than this is refused
MAX_SLICE = 1_000_000

# what is in no name
_EXPRESSION = re.compile(r"[][,!&^@*?]")


class NodeSet:
    """A set of node names: each node is in it once, in an order of its own, and it is shown folded.

    ``NodeSet("green[36-39,133]")``, ``NodeSet("n[1-9/2],login!n3")``, ``NodeSet(["n1", "n2"])``. The grammar
    is ClusterShell's (`ctask.nodes.grammar`); node groups, wildcards and negative numbers are not supported.

    Its order: patterns by their text, then numbers by their count of digits and their value, the first number
    of a name first. ``n1``, ``n01`` and ``n001`` are three nodes. Time and memory grow with the ranges, not
    with the names in them: ``NodeSet("n[1-999999999999]")`` is at once there, and its `len` is arithmetic.

    The operators ``| & - ^`` and comparisons take node sets, the methods also text and iterables of names. A
    node set can be changed, so it cannot be hashed. Equal is what holds the same names; a text equals none.

    Thread safety: as that of a `set`; reading is safe from anywhere as long as nobody changes it.

    Args:
        nodes: a node set as text (the empty text is the empty set), a NodeSet, or an iterable of either;
            None is the empty set.

    Raises:
        NodeSetError: text that is no node set; it has the position.
        NodeNameError: a name that no node may have.
    """

    __slots__ = ("_patterns",)

    _patterns: Patterns

    def __init__(self, nodes: NodesLike | None = None) -> None:
        self._patterns = {} if nodes is None else dict(_patterns(nodes))

    @classmethod
    def fromlist(cls, names: Iterable[str | NodeSet]) -> Self:
        """Return the node set of many names or node sets, in time that grows with their number.

        Raises:
            NodeSetError, NodeNameError: as the constructor; an element may not be blank.
        """
        return cls(names)

    # Reading

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names in order; the names are made as they are asked for."""
        return self._names()

    def __len__(self) -> int:
        """Return the number of nodes, by arithmetic.

        Raises:
            NodeSetError: more than a `len` can say (`sys.maxsize`).
        """
        count = self._count()
        if count > sys.maxsize:
            raise NodeSetError(str(self), None, f"{count} nodes are more than can be counted off")
        return count

    def __bool__(self) -> bool:
        return bool(self._patterns)

    def __contains__(self, nodes: object) -> bool:
        """Return whether a name, or all of a node set (as text or as a NodeSet), is in the set.

        What cannot be the name of a node, as the empty text, is not in it.

        Raises:
            NodeSetError, NodeNameError: text with an operator or a bracket that is no node set.
        """
        if isinstance(nodes, NodeSet):
            return self.issuperset(nodes)
        if not isinstance(nodes, str):
            return False
        if _EXPRESSION.search(nodes):
            return self.issuperset(nodes)
        if len(nodes) > MAX_LENGTH:
            return False
        template, codes = split_name(nodes)
        space = self._patterns.get(template)
        return space is not None and contains(space, codes)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> str | Self:
        """Return one name, or the node set of a slice (its step may be negative; a set keeps its order).

        Raises:
            IndexError: there is no such node.
            NodeSetError: a slice that has to write out more than a million names.
        """
        count = self._count()
        if isinstance(index, slice):
            return self._slice(range(*index.indices(count)), count)
        if not -count <= index < count:
            raise IndexError(f"node set of {count} nodes has no index {index}")
        return next(self._names(index if index >= 0 else count + index))

    def __str__(self) -> str:
        """Return the set folded, in its order: ``a,b[1-2],c3``."""
        return ",".join(
            "".join(chain.from_iterable(zip(template, (*numbers, ""), strict=True)))
            for template in self._templates()
            for numbers in vectors(self._patterns[template])
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self),)

    def copy(self) -> Self:
        """Return a node set of its own with the same nodes; its time does not depend on their number."""
        return self._made(dict(self._patterns))

    __copy__ = copy

    # Comparing

    def __eq__(self, other: object) -> bool:
        return self._patterns == other._patterns if isinstance(other, NodeSet) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __le__(self, other: object) -> bool:
        return self.issubset(other) if isinstance(other, NodeSet) else NotImplemented

    def __lt__(self, other: object) -> bool:
        return self != other and self.issubset(other) if isinstance(other, NodeSet) else NotImplemented

    def __ge__(self, other: object) -> bool:
        return self.issuperset(other) if isinstance(other, NodeSet) else NotImplemented

    def __gt__(self, other: object) -> bool:
        return self != other and self.issuperset(other) if isinstance(other, NodeSet) else NotImplemented

    def issubset(self, other: NodesLike) -> bool:
        """Return whether all of the set is in the other."""
        return not self.difference(other)

    def issuperset(self, other: NodesLike) -> bool:
        """Return whether all of the other is in the set."""
        return not NodeSet(other) - self

    def isdisjoint(self, other: NodesLike) -> bool:
        """Return whether no node is in both."""
        return not self.intersection(other)

    # New sets

    def union(self, other: NodesLike) -> Self:
        """Return the nodes of either."""
        return self._with(other, ",")

    def intersection(self, other: NodesLike) -> Self:
        """Return the nodes that are in both."""
        return self._with(other, "&")

    def difference(self, other: NodesLike) -> Self:
        """Return the nodes that are not in the other."""
        return self._with(other, "!")

    def symmetric_difference(self, other: NodesLike) -> Self:
        """Return the nodes that are in one of them only."""
        return self._with(other, "^")

    def __or__(self, other: object) -> Self:
        return self._with(other, ",") if isinstance(other, NodeSet) else NotImplemented

    def __and__(self, other: object) -> Self:
        return self._with(other, "&") if isinstance(other, NodeSet) else NotImplemented

    def __sub__(self, other: object) -> Self:
        return self._with(other, "!") if isinstance(other, NodeSet) else NotImplemented

    def __xor__(self, other: object) -> Self:
        return self._with(other, "^") if isinstance(other, NodeSet) else NotImplemented

    # Changing

    def update(self, other: NodesLike) -> None:
        """Add the nodes of the other."""
        self._change(other, ",")

    add = update

    def intersection_update(self, other: NodesLike) -> None:
        """Keep the nodes that are in both."""
        self._change(other, "&")

    def difference_update(self, other: NodesLike) -> None:
        """Take the nodes of the other out, those that are there."""
        self._change(other, "!")

    def symmetric_difference_update(self, other: NodesLike) -> None:
        """Keep the nodes that are in one of them only."""
        self._change(other, "^")

    def remove(self, other: NodesLike) -> None:
        """Take the nodes of the other out.

        Raises:
            KeyError: not all of them are in the set; then nothing is taken out.
        """
        gone = NodeSet(other)
        missing = gone - self
        if missing:
            raise KeyError(str(missing))
        self._change(gone, "!")

    def clear(self) -> None:
        """Take all nodes out."""
        self._patterns = {}

    def __ior__(self, other: object) -> Self:
        if not isinstance(other, NodeSet):
            return NotImplemented
        self._change(other, ",")
        return self

    def __iand__(self, other: object) -> Self:
        if not isinstance(other, NodeSet):
            return NotImplemented
        self._change(other, "&")
        return self

    def __isub__(self, other: object) -> Self:
        if not isinstance(other, NodeSet):
            return NotImplemented
        self._change(other, "!")
        return self

    def __ixor__(self, other: object) -> Self:
        if not isinstance(other, NodeSet):
            return NotImplemented
        self._change(other, "^")
        return self

    # How

    def _made(self, patterns: Patterns) -> Self:
        made = type(self).__new__(type(self))
        made._patterns = patterns  # noqa: SLF001
        return made

    def _templates(self) -> list[Template]:
        # "%s" for the numbers: the order that ClusterShell's users know
        return sorted(self._patterns, key="%s".join)

    def _count(self) -> int:
        return sum(map(size, self._patterns.values()))

    def _names(self, skip: int = 0) -> Iterator[str]:
        # patterns are never changed in place, so that a set may change while it is gone through
        patterns = self._patterns.copy()
        for template in self._templates():
            count = size(patterns[template]) if skip else 1
            if skip < count:
                yield from walk(patterns[template], template, skip)
            skip = max(0, skip - count)

    def _slice(self, indexes: range, count: int) -> Self:
        if not indexes:
            return self._made({})
        if indexes.step < 0:
            indexes = indexes[::-1]
        reach = indexes[-1] - indexes[0] + 1
        if indexes.step == 1 and reach == count:
            return self.copy()
        if reach > MAX_SLICE:
            reason = f"a slice may go through at most {MAX_SLICE} nodes, not {reach}"
            raise NodeSetError(str(self), None, reason)
        return self._made(_patterns(islice(self._names(indexes[0]), 0, reach, indexes.step)))

    def _with(self, other: NodesLike, op: Op) -> Self:
        made = self.copy()
        made._change(other, op)  # noqa: SLF001
        return made

    def _change(self, other: NodesLike, op: Op) -> None:
        # all is calculated before anything is changed
        apply(self._patterns, self._changed(other, op))

    def _changed(self, other: NodesLike, op: Op) -> Patterns:
        patterns = _patterns(other)
        try:
            return combine(self._patterns, patterns, op, Budget())
        except TooManyPieces:
            raise NodeSetError(str(self._made(patterns)), None, TOO_MANY_PIECES) from None


def fold(names: Iterable[str | NodeSet]) -> str:
    """Return names as one folded text: ``green[36-39,133]``.

    Raises:
        NodeSetError, NodeNameError: as `NodeSet`.
    """
    return str(NodeSet.fromlist(names))


def _patterns(nodes: object) -> Patterns:
    """Return the patterns of whatever stands for nodes; those of a NodeSet are its own."""
    if isinstance(nodes, NodeSet):
        return nodes._patterns  # noqa: SLF001
    if isinstance(nodes, str):
        return parse(nodes)
    if not isinstance(nodes, Iterable) or isinstance(nodes, bytes):
        shown = ascii(nodes)[:80]
        raise NodeSetError(shown, None, f"give text, a NodeSet or names, not {type(nodes).__name__}")
    gather = Gather()
    for element in nodes:
        if isinstance(element, NodeSet):
            gather.add_patterns(element._patterns)  # noqa: SLF001
        else:
            gather.add(element)
    try:
        return gather.patterns(Budget())
    except TooManyPieces:
        raise NodeSetError("", None, TOO_MANY_PIECES) from None
