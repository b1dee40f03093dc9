# SPDX-License-Identifier: Apache-2.0
"""Node sets seen as groups: which groups have a part in a set, which make it up, and which explain it.

Runs in any thread; pure functions, nothing to guard. What a resolver does is its own.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

from ctask.nodes.grammar import Gather, Groups
from ctask.nodes.nodeset import NodeSet
from ctask.nodes.order import in_order, shown
from ctask.nodes.space import Budget

__all__ = ["Explained", "explained_by", "groups", "regroup"]

Set = TypeVar("Set", bound=NodeSet)


class Explained(NamedTuple):
    """How much of a node set is in a group.

    Attributes:
        group: ``@group``, or ``@source:group`` where a source was named.
        held: how many nodes of the set are in it.
        size: how many nodes it has.
    """

    group: str
    held: int
    size: int


def groups(nodes: Set, source: str | None, *, noprefix: bool) -> dict[str, tuple[Set, Set]]:
    """Return the groups that have a node of the set: name -> (group, what is in both)."""
    prefix = "@" if source is None or noprefix else f"@{source}:"
    return {f"{prefix}{name}": pair for name, pair in _held(nodes, source).items()}


def regroup(nodes: NodeSet, source: str | None, autostep: float | None, *, overlap: bool, noprefix: bool) -> str:
    """Return the set as text, by as many whole groups as there are."""
    whole = {name: group for name, (group, held) in _held(nodes, source).items() if len(held) == len(group)}
    rest = nodes.copy()
    taken = []
    for name in sorted(whole, key=lambda name: (-len(whole[name]), name)):
        if overlap or rest.issuperset(whole[name]):
            taken.append(name)
            rest.difference_update(whole[name])
    if autostep is not None:
        rest.autostep = autostep
    prefix = "@" if source is None or noprefix else f"@{source}:"
    texts = [f"{prefix}{text}" for text in _folded(taken)]
    return ",".join([*texts, str(rest)] if rest else texts)


def explained_by(nodes: NodeSet, source: str | None) -> list[Explained]:
    """Return the groups that hold the set and little else, best first."""
    found = [
        Explained(name, len(held), len(group))
        for name, (group, held) in groups(nodes, source, noprefix=False).items()
    ]
    # the share that both have of what either has: 1 where group and set are the same
    return sorted(found, key=lambda one: (-one.held / (one.size + len(nodes) - one.held), one.group))


def _held(nodes: Set, source: str | None) -> dict[str, tuple[Set, Set]]:
    """Return the groups that have a node of the set, by their bare names."""
    resolver = nodes.resolver
    names = resolver.grouplist(source)
    if len(names) > len(nodes) and resolver.has_node_groups(source):
        # the source can say for each node, and that is less work than to look at every group
        names = sorted({name for node in nodes for name in resolver.node_groups(node, source)})
    both = {name: (group, nodes & group) for name, group in nodes.group_sets(source, names)}
    return {name: (group, held) for name, (group, held) in both.items() if held}


def _folded(names: list[str]) -> list[str]:
    """Return the names of groups folded; they may have characters that no node has."""
    gather = Gather(_no_groups)
    for name in names:
        gather.add_checked(name)
    patterns = gather.patterns(Budget())
    return [text for key in in_order(patterns) for text in shown(patterns[key], key, None, None, Budget())]


def _no_groups() -> Groups:
    raise AssertionError("what is added needs no groups")
