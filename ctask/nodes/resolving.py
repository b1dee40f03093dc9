# SPDX-License-Identifier: Apache-2.0
"""What node sets ask of node groups: the `Resolver` Protocol, and which resolver a process has.

A resolver knows *sources*, a source knows groups, and a group is words that may be node sets with further groups in
them. Reading those, and following groups within groups, is the grammar's part; a resolver only says what it has.

Runs in any thread that reads node sets. The standard resolver is one reference that is replaced whole; it is made at
the first question that needs it, and where two threads are the first, one of their resolvers is dropped.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from ctask.errors import NodeSetExternalError, NoSuchGroup

__all__ = [
    "RESOLVER_NOGROUP", "Resolver", "grouplist", "no_such_group", "set_std_group_resolver", "std_group_resolver",
]  # fmt: skip


class Resolver(Protocol):
    """Whoever knows node groups.

    `source` is always the name of a source, None is the default one. What goes wrong is a `NodeSetExternalError`:
    a source that is not there (its text names those that are), one that does not answer; `NoSuchGroup` (made by
    `no_such_group`) for a group that a known source has not. A group that is empty yields nothing.

    Thread safety: a resolver is asked from any thread, and by several at once.
    """

    @property
    def default_source_name(self) -> str | None:
        """The source that groups without one are looked up in; None: there are no sources."""

    def sources(self) -> list[str]:
        """Return the names of all sources, the default one first."""

    def group_nodes(self, group: str, source: str | None = None) -> Iterable[str]:
        """Return the words of a group, each a name or a node set."""

    def all_nodes(self, source: str | None = None) -> Iterable[str]:
        """Return the words of all nodes of a source: what it says itself, else those of all its groups."""

    def grouplist(self, source: str | None = None) -> list[str]:
        """Return the names of the groups of a source, without `@` and source."""

    def has_node_groups(self, source: str | None = None) -> bool:
        """Return whether `node_groups` answers without going through all groups."""

    def node_groups(self, node: str, source: str | None = None) -> list[str]:
        """Return the names of the groups that a node is in."""


class _NoGroups:
    """The resolver that knows none: text with a group in it is refused."""

    default_source_name: str | None = None

    def sources(self) -> list[str]:
        return []

    def group_nodes(self, group: str, source: str | None = None) -> Iterable[str]:
        shown = f"@{source}:{group}" if source else f"@{group}"
        raise NodeSetExternalError(f"node groups are not looked up here: {shown}", shown)

    def all_nodes(self, source: str | None = None) -> Iterable[str]:
        raise NodeSetExternalError("node groups are not looked up here, so that nobody knows all nodes")

    def grouplist(self, source: str | None = None) -> list[str]:
        return []

    def has_node_groups(self, source: str | None = None) -> bool:
        return False

    def node_groups(self, node: str, source: str | None = None) -> list[str]:
        return []

    def __repr__(self) -> str:
        return "RESOLVER_NOGROUP"

    def __reduce__(self) -> str:
        return "RESOLVER_NOGROUP"


#: for `NodeSet(…, resolver=RESOLVER_NOGROUP)`: no groups, whatever the process has
RESOLVER_NOGROUP: Resolver = _NoGroups()

_standard: list[Resolver] = []


def std_group_resolver() -> Resolver:
    """Return the resolver of the process: the one that was set, else that of the configuration files.

    Raises:
        NodeSetExternalError: the configuration cannot be read.
    """
    for resolver in _standard[:1]:
        return resolver
    # on demand: most programs name no group
    from ctask.nodes.groups import GroupResolverConfig

    made: Resolver = GroupResolverConfig()
    _standard.append(made)
    return made


def set_std_group_resolver(resolver: Resolver | None) -> None:
    """Set the resolver of the process; None: that of the configuration files, read anew."""
    _standard[:] = [] if resolver is None else [resolver]


def grouplist(namespace: str | None = None, resolver: Resolver | None = None) -> list[str]:
    """Return the names of the groups of a source, None: of the default one.

    Raises:
        NodeSetExternalError: there is no such source, or it cannot say.
    """
    return (std_group_resolver() if resolver is None else resolver).grouplist(namespace)


def no_such_group(group: str, *, source: str | None = None, where: str = "", known: Iterable[str] = ()) -> NoSuchGroup:
    """Return the error for a group that its source has not.

    Args:
        group: its name, without `@`.
        source: the source as it was asked for, None for the default one.
        where: what was looked in, as ``source site: /etc/clustershell/groups.d/site.yaml``.
        known: the groups that there are; the nearest one is named.
    """
    from difflib import get_close_matches  # on demand: an error is rare

    prefix = f"@{source}:" if source else "@"
    place = f" ({where})" if where else ""
    near = get_close_matches(group, list(known), n=1, cutoff=0.5)
    hint = f". Did you mean {prefix}{near[0]}?" if near else ""
    return NoSuchGroup(f"no such group: {prefix}{group}{place}{hint}", f"{prefix}{group}")
