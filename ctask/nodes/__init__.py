# SPDX-License-Identifier: Apache-2.0
"""Node sets: ``green[36-39,133]`` as a set of names.

From the ground up: `names` (which names a node may have), `space` (sets of numbers, kept as ranges), `ranges` (ranges
as text), `order` (one after the other), `signs` (negative numbers), `wild` (wildcards), `grammar` (text to patterns and
numbers), `resolving` (who knows node groups), `lookup` (groups within groups), `algebra` (operators), `nodeset`
(`NodeSet`, what programs use), `regroup` (sets as groups), `rangeset` (`RangeSet`, `RangeSetND`).

Runs in any thread: no threads, no sockets, and no state but that of each set and the process's resolver of groups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ctask.nodes.nodeset import NodeSet, NodesLike, expand, fold
from ctask.nodes.resolving import RESOLVER_NOGROUP, Resolver, grouplist, set_std_group_resolver, std_group_resolver

if TYPE_CHECKING:
    from ctask.nodes.rangeset import RangeSet, RangeSetND

__all__ = [
    "RESOLVER_NOGROUP",
    "NodeSet",
    "NodesLike",
    "RangeSet",
    "RangeSetND",
    "Resolver",
    "expand",
    "fold",
    "grouplist",
    "set_std_group_resolver",
    "std_group_resolver",
]


def __getattr__(name: str) -> object:
    """Load what most programs do not use when it is first asked for."""
    if name in ("RangeSet", "RangeSetND"):
        from ctask.nodes import rangeset

        return getattr(rangeset, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
