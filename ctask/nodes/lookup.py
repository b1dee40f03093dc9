# SPDX-License-Identifier: Apache-2.0
"""Node groups, looked up: from ``@source:group`` to patterns, through groups within groups.

A `Lookup` is the grammar's `Groups` for one text, or for one question: each group is asked for once and read once,
however often it is named on the way. Groups that go in a circle are told with their path.

Runs in any thread; a `Lookup` belongs to the call that made it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

from ctask.errors import NodeNameError, NodeSetError, NodeSetExternalError, NoSuchGroup
from ctask.nodes.grammar import TOO_MANY_PIECES, Gather, Parsed
from ctask.nodes.order import walk
from ctask.nodes.resolving import Resolver
from ctask.nodes.signs import signed
from ctask.nodes.space import Budget, TooManyPieces
from ctask.nodes.wild import Part, Wild, matcher

__all__ = ["MAX_DEPTH", "Lookup"]

#: how deep groups may lie within groups; no site comes near, and Python's own stack ends at some hundreds
MAX_DEPTH = 50

#: source and group as they are asked for; a group that is None is all nodes of the source
_Key: TypeAlias = "tuple[str | None, str | None]"


class Lookup:
    """Looks up groups for a text that stands in one source.

    Args:
        resolver: who knows the groups.
        missing_is_empty: a group that a known source has not is empty, in place of an error.

    Thread safety: for one thread.
    """

    def __init__(self, resolver: Resolver, *, missing_is_empty: bool) -> None:
        self._resolver = resolver
        self._missing_is_empty = missing_is_empty
        self._source: str | None = None
        self._path: tuple[_Key, ...] = ()
        self._known: dict[_Key, Parsed] = {}

    def of_group(self, group: str, source: str | None) -> Parsed:
        """Return the nodes of a group."""
        source = self._from(source)

        def words() -> Iterable[str]:
            try:
                return list(self._resolver.group_nodes(group, source))
            except NoSuchGroup:
                if self._missing_is_empty:
                    return ()
                raise

        return self._looked_up((source, group), words)

    def of_all(self, source: str | None) -> Parsed:
        """Return all nodes of a source."""
        source = self._from(source)
        return self._looked_up((source, None), lambda: self._resolver.all_nodes(source))

    def of_names(self, source: str | None) -> Parsed:
        """Return the names of the groups of a source, as a node set."""
        gather = Gather(lambda: self)
        for name in self._resolver.grouplist(self._from(source)):
            gather.add_name(name)
        return self._folded(gather)

    def matching(self, parts: list[Part]) -> Parsed:
        """Return those of all nodes of the text's source that a wildcard matches."""
        everything = self.of_all(None)
        if all(part is Wild.ANY for part in parts):
            return everything
        gather = Gather(lambda: self)
        matches = matcher(parts)
        for template, space in signed(*everything).items():
            for name in walk(space, template):
                if matches(name):
                    gather.add_checked(name)
        return self._folded(gather)

    def _from(self, source: str | None) -> str | None:
        return self._source if source is None else source

    def _looked_up(self, key: _Key, words: Callable[[], Iterable[str]]) -> Parsed:
        # that of the default source has two names: it may be asked for without one
        source = key[0] if key[0] is not None else self._resolver.default_source_name
        key = source, key[1]
        if key in self._known:
            return self._known[key]
        if key in self._path:
            circle = " -> ".join(map(self._shown, (*self._path[self._path.index(key) :], key)))
            raise NodeSetExternalError(f"node groups go in a circle: {circle}", self._shown(key))
        if len(self._path) >= MAX_DEPTH:
            deep = self._shown(self._path[0])
            raise NodeSetExternalError(f"node groups lie more than {MAX_DEPTH} deep within each other: {deep}", deep)
        inner = Lookup(self._resolver, missing_is_empty=self._missing_is_empty)
        inner._source, inner._path, inner._known = source, (*self._path, key), self._known
        self._known[key] = inner._read(key, words())
        return self._known[key]

    def _read(self, key: _Key, words: Iterable[str]) -> Parsed:
        gather = Gather(lambda: self)
        for word in words:
            if word == "" or word.isspace():
                continue  # a group that is written down with nothing in it
            try:
                gather.add(word)
            except NodeSetExternalError:
                raise
            except (NodeSetError, NodeNameError) as error:
                raise NodeSetExternalError(f"{self._shown(key)} cannot be read: {error}", self._shown(key)) from error
        return self._folded(gather)

    def _folded(self, gather: Gather) -> Parsed:
        try:
            return gather.patterns(Budget()), gather.signs
        except TooManyPieces:
            raise NodeSetExternalError(f"a node group cannot be folded: {TOO_MANY_PIECES}") from None

    def _shown(self, key: _Key) -> str:
        source, group = key
        prefix = "" if source is None or source == self._resolver.default_source_name else f"{source}:"
        return f"@{prefix}{'*' if group is None else group}"
