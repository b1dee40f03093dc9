# SPDX-License-Identifier: Apache-2.0
"""`GroupResolver`: sources of node groups under their names; what node sets ask (`ctask.nodes.resolving.Resolver`).

Runs in any thread. The table of sources is replaced whole by whoever adds one, under a lock; who reads takes it as it
is. A source is asked without a lock.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from difflib import get_close_matches

from ctask.errors import (
    GroupResolverIllegalCharError,
    GroupResolverSourceError,
    GroupSourceNoUpcall,
    NodeSetExternalError,
    NoSuchGroup,
)
from ctask.errors.text import printable
from ctask.nodes.groups.source import GroupSource, words
from ctask.nodes.nodeset import NodeSet
from ctask.nodes.resolving import no_such_group

__all__ = ["ILLEGAL_GROUP_CHARS", "GroupResolver"]

#: What has a meaning in node sets, and so cannot be in the name of a group; white space cannot either.
ILLEGAL_GROUP_CHARS = frozenset("@,!&^*")


class GroupResolver:
    """Looks groups up in sources: ``NodeSet("@site:prod", resolver=GroupResolver(GroupSource("site", {…})))``.

    Thread safety: any thread may ask, and add sources.

    Args:
        default_source: the source of groups without one (``@prod``).
        illegal_chars: characters that no group may have in its name, in place of `ILLEGAL_GROUP_CHARS`.
    """

    def __init__(self, default_source: GroupSource | None = None, illegal_chars: Iterable[str] | None = None) -> None:
        self.illegal_chars = ILLEGAL_GROUP_CHARS if illegal_chars is None else frozenset(illegal_chars)
        self._lock = threading.Lock()
        self._sources: dict[str, GroupSource] = {}
        self._default: str | None = None
        if default_source is not None:
            self._sources = {default_source.name: default_source}
            self._default = default_source.name

    def add_source(self, source: GroupSource) -> None:
        """Add a source; the first one is the default.

        Raises:
            GroupResolverSourceError: there is one of that name.
        """
        self._load()
        with self._lock:
            if source.name in self._sources:
                raise GroupResolverSourceError(f"there is a group source {source.name!r} already", source.name)
            self._sources = {**self._sources, source.name: source}
            if self._default is None:
                self._default = source.name

    @property
    def default_source_name(self) -> str | None:
        """The source of groups without one; None: there are no sources. It can be set.

        Raises:
            GroupResolverSourceError: set to one that is not there.
        """
        self._load()
        return self._default

    @default_source_name.setter
    def default_source_name(self, name: str) -> None:
        self._default = self._source(name).name
        self._default_chosen()

    def sources(self) -> list[str]:
        """Return the names of all sources, the default one first."""
        self._load()
        default = self._default
        return sorted(self._sources, key=lambda name: name != default)

    def group_nodes(self, group: str, source: str | None = None) -> list[str]:
        """Return the words of a group, each a name or a node set.

        Raises:
            NoSuchGroup: its source has none of that name; the message names the nearest one.
            NodeSetExternalError: there is no such source, it does not answer, or the name can be none of a group.
        """
        found = self._source(source, group)
        self._check(group)
        try:
            return words(found.resolv_map(group), f"group {group!r} of {found}")
        except NoSuchGroup as error:
            try:
                known = found.resolv_list()
            except GroupSourceNoUpcall:
                raise error from None  # which says that nobody can tell
            except NodeSetExternalError:
                known = []
            where = str(found) if found.origin else ""
            raise no_such_group(group, source=source, where=where, known=known) from error.__cause__

    def all_nodes(self, source: str | None = None) -> list[str]:
        """Return the words of all nodes of a source: what it says itself, else those of all its groups.

        Raises:
            NodeSetExternalError: there is no such source, or it cannot tell.
        """
        found = self._source(source)
        try:
            return words(found.resolv_all(), f"all nodes of {found}")
        except GroupSourceNoUpcall:
            try:
                groups = found.resolv_list()
            except GroupSourceNoUpcall:
                raise GroupSourceNoUpcall(
                    f"{found} cannot tell all its nodes: it needs `all`, or `list` beside `map`"
                ) from None
        return [word for group in groups for word in words(found.resolv_map(group), f"group {group!r} of {found}")]

    def grouplist(self, source: str | None = None) -> list[str]:
        """Return the names of the groups of a source.

        Raises:
            GroupResolverIllegalCharError: one of them can be no name of a group.
            NodeSetExternalError: there is no such source, or it cannot tell.
        """
        return self._checked(self._source(source).resolv_list())

    def has_node_groups(self, source: str | None = None) -> bool:
        """Return whether `node_groups` answers without going through all groups."""
        return self._source(source).has_reverse

    def node_groups(self, node: str, source: str | None = None) -> list[str]:
        """Return the names of the groups that a node is in: what the source says itself, else all that have it.

        Raises:
            NodeSetExternalError: as `grouplist` and `group_nodes`.
        """
        found = self._source(source)
        if found.has_reverse:
            return self._checked(found.resolv_reverse(node))
        prefix = f"@{found.name}:"
        return [group for group in self.grouplist(source) if node in NodeSet(prefix + group, resolver=self)]

    def _load(self) -> None:
        """Have the sources there; where they are configured, they are read at the first question."""

    def _default_chosen(self) -> None:
        """Note that the program has said which source is the default one."""

    def _source(self, name: str | None, group: str | None = None) -> GroupSource:
        self._load()
        wanted = self._default if name is None else name
        found = self._sources.get(wanted) if wanted is not None else None
        if found is None:
            prefix = "@" if name is None else f"@{name}:"
            asked = "" if group is None else prefix + group
            shown = f"{printable(asked)}: " if asked else ""
            raise GroupResolverSourceError(f"{shown}{self._no_source(name)}", asked)
        return found

    def _no_source(self, name: str | None) -> str:
        known = self.sources()
        if not known:
            return f"there are no node groups: {self._nowhere()}"
        if name is None:
            return f"no group source is the default one; there are {', '.join(known)}: write @{known[0]}:GROUP"
        near = get_close_matches(name, known, 1)
        hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(known)}"
        return f"no such group source: {printable(name)}. {hint}"

    def _nowhere(self) -> str:
        return "no source was added"

    def _check(self, group: str) -> None:
        bad = next((char for char in group if char in self.illegal_chars or char.isspace()), None)
        if bad is not None or not group:
            what = "is empty" if bad is None else f"has {bad!r} in it"
            raise GroupResolverIllegalCharError(f"{printable(group)!r} can be no name of a group: it {what}", group)

    def _checked(self, groups: Iterable[str]) -> list[str]:
        found = list(groups)
        for group in found:
            self._check(group)
        return found
