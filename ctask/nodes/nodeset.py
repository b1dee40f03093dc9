# SPDX-License-Identifier: Apache-2.0
"""`NodeSet`: a set of node names, kept and shown folded.

Runs in any thread. A `NodeSet` has no lock: like a `set` it may be read by many threads, or changed by one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias

from ctask.errors import NodeSetError, OptionError
from ctask.nodes.algebra import MAX_WRITTEN, FoldedSet
from ctask.nodes.grammar import TOO_MANY_PIECES, Gather, Groups, Parsed, parse, split_name
from ctask.nodes.names import MAX_LENGTH
from ctask.nodes.order import in_order, rank, shown, walk
from ctask.nodes.resolving import RESOLVER_NOGROUP, Resolver, std_group_resolver
from ctask.nodes.signs import NO_SIGNS, Signs, in_pattern, is_lost
from ctask.nodes.space import Budget, Patterns, Template, TooManyPieces, contains, size

if TYPE_CHECKING:
    from ctask.nodes.regroup import Explained

__all__ = ["NodeSet", "NodesLike", "expand", "fold"]

#: what stands for nodes wherever they are asked for; a text is a node set, not its letters
NodesLike: TypeAlias = "str | NodeSet | Iterable[str | NodeSet]"

#: a list of as many names is looked at as a whole
MANY = 64

# what is in no name
_EXPRESSION = re.compile(r"[][,!&^@*?]")


class NodeSet(FoldedSet["NodesLike", str]):
    """A set of node names: each node is in it once, in an order of its own, and it is shown folded.

    ``NodeSet("green[36-39,133]")``, ``NodeSet("n[1-9/2],@rack3!n3")``, ``NodeSet(["n1", "n2"])``. The grammar
    is ClusterShell's (`ctask.nodes.grammar`). Where ctask differs:

    * A group that its source has not is an error, which names the nearest one; ClusterShell takes it for empty,
      so that ``@all!@pord`` (misspelt) is every node.
    * Names are looked at (`ctask.nodes.names`): one that could be read as an option or a path is refused.
    * ``n-5`` is one node, whether it is written so or as ``n[-5]``. It is shown as ``n-5``, and as ``n[-5]`` where the
      set would be read as another text or in another order without it: ``n[-5],n3x``.
    * Names of several numbers come in the order of their numbers, however the set came about. So do the products
      that they are shown as; where sets overlap, these may be others than ClusterShell's.
    * Slices may have any step; `contiguous` knows no steps; digits may not be glued to negative numbers in front.

    Its order: patterns by their text, then numbers by their count of digits and their value (negative ones first),
    the first number of a name first. ``n1``, ``n01`` and ``n001`` are three nodes. Time and memory grow with the
    ranges, not with the names in them: ``NodeSet("n[1-999999999999]")`` is at once there, and its `len` is arithmetic.

    The operators ``| & - ^`` and comparisons take node sets, the methods also text and iterables of names. A
    node set can be changed, so it cannot be hashed. Equal is what holds the same names; a text equals none.

    Thread safety: as that of a `set`; reading is safe from anywhere as long as nobody changes it.

    Args:
        nodes: a node set as text (the empty text is the empty set), a NodeSet, or an iterable of either;
            None is the empty set.
        autostep: the text shows as many numbers at equal distances, or more, as one range with a step
            (``n[1-9/2]``); None: never.
        resolver: who knows node groups; None: the process's (`std_group_resolver`), and for a NodeSet its own.
        fold_axis: the dimensions that the text shows folded, from 0, or from -1 backwards; None: all.
        missing: what a group is that its source has not: an "error", or "empty".

    Raises:
        NodeSetError: text that is no node set, with the position; a group that there is not.
        NodeNameError: a name that no node may have.
        OptionError: an option with a value that it cannot have.
    """

    __slots__ = ("_autostep", "_fold_axis", "_missing", "_resolver")

    def __init__(
        self,
        nodes: NodesLike | None = None,
        autostep: float | None = None,
        resolver: Resolver | int | None = None,
        fold_axis: Iterable[int] | None = None,
        *,
        missing: Literal["error", "empty"] = "error",
    ) -> None:
        self._patterns, self._signs = {}, NO_SIGNS
        self._autostep: float | None = None
        self._fold_axis: tuple[int, ...] | None = None
        self._resolver: Resolver | None = None
        self._missing: str = missing
        if isinstance(nodes, NodeSet):
            self._take_style(nodes)
        if autostep is not None:
            self.autostep = autostep
        if fold_axis is not None:
            self.fold_axis = fold_axis
        if resolver is not None:
            self._resolver = RESOLVER_NOGROUP if isinstance(resolver, int) else resolver
        if missing not in ("error", "empty"):
            raise OptionError(f"missing={missing!r}: give 'error' or 'empty'")
        if nodes is not None:
            patterns, self._signs = self._parsed(nodes)
            self._patterns = dict(patterns) if isinstance(nodes, NodeSet) else patterns

    @classmethod
    def fromlist(
        cls,
        names: Iterable[str | NodeSet],
        autostep: float | None = None,
        resolver: Resolver | int | None = None,
        fold_axis: Iterable[int] | None = None,
    ) -> Self:
        """Return the node set of many names or node sets, in time that grows with their number.

        A text is a node set here as well, and not its letters.

        Raises:
            NodeSetError, NodeNameError: as the constructor; an element may not be blank.
        """
        return cls(names, autostep, resolver, fold_axis)

    #: ClusterShell's name for lists of single nodes; here `fromlist` is as fast
    _fromlist1 = fromlist

    @classmethod
    def fromall(
        cls,
        groupsource: str | None = None,
        autostep: float | None = None,
        resolver: Resolver | int | None = None,
        fold_axis: Iterable[int] | None = None,
    ) -> Self:
        """Return all nodes of a group source, None: of the default one.

        Raises:
            NodeSetExternalError: there is no such source, or it cannot say.
        """
        made = cls(None, autostep, resolver, fold_axis)
        patterns, made._signs = made._groups().of_all(groupsource)
        made._patterns = dict(patterns)
        return made

    # How it is shown

    @property
    def autostep(self) -> float | None:
        """How many numbers at equal distances are shown as one range with a step; None: never."""
        return self._autostep

    @autostep.setter
    def autostep(self, value: float | None) -> None:
        given: object = value
        if given is not None and not (isinstance(given, (int, float)) and given >= 0):
            raise OptionError(f"autostep={value!r}: give a number of nodes, or None")
        self._autostep = value

    @property
    def fold_axis(self) -> tuple[int, ...] | None:
        """The dimensions that are shown folded, from 0, or from -1 backwards; None: all."""
        return self._fold_axis

    @fold_axis.setter
    def fold_axis(self, value: Iterable[int] | None) -> None:
        axes = tuple(value) if isinstance(value, Iterable) else value
        if isinstance(axes, tuple) and not all(isinstance(axis, int) for axis in axes):
            raise OptionError(f"fold_axis={value!r}: give the numbers of dimensions, from 0 or from -1 backwards")
        if axes is not None and not isinstance(axes, tuple):
            raise OptionError(f"fold_axis={value!r}: give a list of dimensions, as [{value!r}]")
        self._fold_axis = axes

    # Reading

    def striter(self) -> Iterator[str]:
        """Iterate over the names in order."""
        return self._items()

    def nsiter(self) -> Iterator[Self]:
        """Iterate over the nodes in order, each as a node set of its own."""
        return (self._made(self._gathered([name])) for name in self)

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

    def index(self, node: NodesLike, start: int = 0, stop: int | None = None) -> int:
        """Return the place of a node in the order, by arithmetic.

        Args:
            node: one node, by its name or as a node set.
            start, stop: places between which it has to be, as those of `list.index`.

        Raises:
            ValueError: it is not there; NodeSetError (which is one) where it is not one node.
        """
        wanted = NodeSet(node, resolver=self._resolver)
        if wanted._count() != 1:
            raise NodeSetError(str(wanted), None, "give one node, whose place is asked for")
        name = wanted[0]
        place = self._place(name)
        if place is None or place not in range(self._count())[start:stop]:
            raise ValueError(f"{name!r} is not in the node set")
        return place

    def __str__(self) -> str:
        """Return the set folded, in its order: ``a,b[1-2],c3``.

        Read again, it is shown as the same text and has the same order, unless `fold_axis` leaves a dimension unfolded.

        Raises:
            NodeSetError: `fold_axis` leaves so much unfolded that more than a million names would be written out.
        """
        found = self._shown()
        budget = Budget(MAX_WRITTEN)
        signs = bool(self._signs) and is_lost(self._patterns, found)
        try:
            return ",".join(
                text
                for key in in_order(found)
                for text in shown(found[key], key, self._autostep, self._folded(key), budget, signs=signs)
            )
        except TooManyPieces:
            reason = f"fold_axis={self._fold_axis} would write out more than {MAX_WRITTEN} names"
            raise NodeSetError("", None, reason) from None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        # The resolver stays behind: the groups of one process say nothing to another one.
        plain = self._made(self._patterns)
        plain._autostep = plain._fold_axis = None
        return type(self), (str(plain),), (self._signs, self._autostep, self._fold_axis, self._missing)

    def __setstate__(self, state: tuple[Signs, float | None, tuple[int, ...] | None, str]) -> None:
        self._signs, self._autostep, self._fold_axis, self._missing = state

    # Groups

    @property
    def resolver(self) -> Resolver:
        """Who knows the groups: the set's own resolver, else that of the process."""
        return std_group_resolver() if self._resolver is None else self._resolver

    def group_sets(self, groupsource: str | None, names: Iterable[str]) -> Iterator[tuple[str, Self]]:
        """Yield groups of a source with their nodes, each of them asked for once.

        Raises:
            NodeSetExternalError: a group that there is not, or that cannot be read.
        """
        lookup = self._groups()
        for name in names:
            patterns, signs = lookup.of_group(name, groupsource)
            yield name, self._made(dict(patterns), signs)

    def groups(self, groupsource: str | None = None, *, noprefix: bool = False) -> dict[str, tuple[Self, Self]]:
        """Return the groups that have a node of the set: ``@group`` or ``@source:group`` -> (group, what is in both).

        Args:
            groupsource: the source; None: the default one, whose groups are named without it.
            noprefix: groups are named without their source.
        """
        from ctask.nodes.regroup import groups  # on demand: most programs name no group

        return groups(self, groupsource, noprefix=noprefix)

    def regroup(
        self,
        groupsource: str | None = None,
        autostep: float | None = None,
        *,
        overlap: bool = False,
        noprefix: bool = False,
    ) -> str:
        """Return the set as text, by as many whole groups as there are: ``@rack[1-2],n9``.

        The largest groups come first (then by name); what no group covers is added folded.

        Args:
            groupsource, noprefix: as `groups`.
            autostep: as the constructor's; None: the set's own.
            overlap: take all groups that the set holds, not only those that cover more of it.
        """
        from ctask.nodes.regroup import regroup  # on demand: most programs name no group

        return regroup(self, groupsource, autostep, overlap=overlap, noprefix=noprefix)

    def explained_by(self, groups: str | None = None) -> list[Explained]:
        """Return the groups that hold the set and little else, best first: (group, of the set, of the group).

        ``nodes.explained_by("switch")`` is ``[("@switch:sw12", 36, 36), …]``: 36 nodes of the set are in it, and it
        has 36. Only groups with a node of the set are there.

        Args:
            groups: the group source; None: the default one.
        """
        from ctask.nodes.regroup import explained_by  # on demand: most programs name no group

        return explained_by(self, groups)

    # Changing

    add = FoldedSet.update

    def updaten(self, others: Iterable[str | NodeSet]) -> None:
        """Add the nodes of many others at once."""
        self._change(others, ",")

    def remove(self, other: NodesLike) -> None:
        """Take the nodes of the other out.

        Raises:
            KeyError: not all of them are in the set; then nothing is taken out.
        """
        self.difference_update(other, strict=True)

    # How

    def _parsed(self, other: NodesLike) -> Parsed:
        if isinstance(other, NodeSet):
            return other._patterns, other._signs
        if isinstance(other, str):
            return parse(other, self._groups)
        given: object = other
        if not isinstance(given, Iterable) or isinstance(given, bytes):
            shown = ascii(given)[:80]
            raise NodeSetError(shown, None, f"give text, a NodeSet or names, not {type(given).__name__}")
        gather = Gather(self._groups)
        elements = list(other)
        if len(elements) >= MANY and gather.add_alike(elements):
            elements = []
        for element in elements:
            if isinstance(element, NodeSet):
                gather.add_parsed((element._patterns, element._signs))
            else:
                gather.add(element)
        try:
            return gather.patterns(Budget()), gather.signs
        except TooManyPieces:
            raise NodeSetError("", None, TOO_MANY_PIECES) from None

    def _made(self, patterns: Patterns, signs: Signs = NO_SIGNS) -> Self:
        made = type(self).__new__(type(self))
        made._patterns, made._signs = patterns, signs
        made._take_style(self)
        return made

    def _gathered(self, items: Iterable[str]) -> Patterns:
        return self._parsed(items)[0]

    def _is_kin(self, other: object) -> bool:
        return isinstance(other, NodeSet)

    def _take_style(self, other: NodeSet) -> None:
        self._autostep, self._fold_axis = other._autostep, other._fold_axis
        self._resolver, self._missing = other._resolver, other._missing

    def _groups(self) -> Groups:
        from ctask.nodes.lookup import Lookup  # on demand: most texts name no group

        return Lookup(self.resolver, missing_is_empty=self._missing == "empty")

    def _folded(self, template: Template) -> list[bool] | None:
        """Return which dimensions of a pattern are shown folded, or None: all."""
        if self._fold_axis is None:
            return None
        dims = len(template) - 1
        return [axis in self._fold_axis or axis - dims in self._fold_axis for axis in range(dims)]

    def _items(self, skip: int = 0) -> Iterator[str]:
        # patterns are never changed in place, so that a set may change while it is gone through
        return chain.from_iterable(_walks(dict(self._shown()), skip))

    def _place(self, name: str) -> int | None:
        """Return how many nodes come before a name, or None where it is not in the set."""
        before, shown = 0, self._shown()
        template, codes = split_name(name)
        for pattern in in_order(shown):
            spelt = in_pattern(template, codes, pattern)
            place = None if spelt is None else rank(shown[pattern], spelt)
            if place is not None:
                return before + place
            before += size(shown[pattern])
        return None


def expand(nodes: NodesLike) -> list[str]:
    """Return the names of a node set, in order.

    Raises:
        NodeSetError, NodeNameError: as `NodeSet`.
    """
    return list(NodeSet(nodes))


def fold(nodes: NodesLike) -> str:
    """Return a node set, or many names, as one folded text: ``green[36-39,133]``.

    Raises:
        NodeSetError, NodeNameError: as `NodeSet`.
    """
    return str(NodeSet(nodes))


def _walks(patterns: Patterns, skip: int) -> Iterator[Iterator[str]]:
    for template in in_order(patterns):
        count = size(patterns[template]) if skip else 1
        if skip < count:
            yield walk(patterns[template], template, skip)
        skip = max(0, skip - count)
