# SPDX-License-Identifier: Apache-2.0
"""`GroupSource`: groups under one name; this one has them in memory, others derive from it.

Runs in any thread. Nothing is guarded, since nothing is changed here; a mapping that the program goes on changing is
read at each question.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Protocol, TypeAlias

from ctask.errors import GroupSourceError, GroupSourceNoUpcall
from ctask.nodes.nodeset import NodeSet
from ctask.nodes.resolving import no_such_group

__all__ = ["FileGroupSource", "GroupLoader", "GroupSource", "Groups", "Words", "uncommented", "words"]

#: what the nodes of a group may be given as; None is the empty group
Words: TypeAlias = "str | NodeSet | Iterable[str | NodeSet] | None"
#: the groups of a source, by name
Groups: TypeAlias = Mapping[str, Words]

# "n1, n2" and "[1, 3]" are no words of their own
_AROUND_OPERATOR = re.compile(r"\s*([,!&^])\s*")
# as in lists of nodes: a node that is commented out is none, also where a command prints such a file
_COMMENT = re.compile(r"#[^\r\n]*")


class GroupSource:
    """Node groups in memory, and the base of all other sources.

    ``GroupSource("site", {"prod": "n[1-90]", "test": ["n91", "n92"], "all": "@prod,@test"})``. A group is a node set
    as text (words with blanks between them do as well, and ``#`` begins a comment), a NodeSet, or several of them; it
    may name further groups.

    Thread safety: any thread may ask; so a subclass guards what it keeps.

    Args:
        name: what stands before the colon in ``@site:prod``.
        groups: the groups by name; it is not copied, so a program may go on changing it.
        allgroups: all nodes of the source; without it, they are those of all its groups.
        origin: where it is from, such as the path of a file; told in errors.
    """

    #: whether `resolv_reverse` answers
    has_reverse = False

    def __init__(
        self, name: str, groups: Groups | None = None, allgroups: Words = None, *, origin: str = ""
    ) -> None:
        self.name = name
        self.origin = origin
        self._groups: Groups = {} if groups is None else groups
        self._allgroups = allgroups

    @property
    def groups(self) -> Groups:
        """The groups by name, as they are now."""
        return self._groups

    @property
    def allgroups(self) -> Words:
        """All nodes of the source; None: nobody has said."""
        return self._allgroups

    def resolv_map(self, group: str) -> list[str]:
        """Return the words of a group, each a name or a node set.

        Raises:
            NoSuchGroup: the source has no such group. One that is empty is no error.
            GroupSourceError: it cannot tell.
        """
        groups = self.groups
        if group not in groups:
            raise no_such_group(group)
        return words(groups[group], f"group {group!r} of {self}")

    def resolv_list(self) -> list[str]:
        """Return the names of all groups.

        Raises:
            GroupSourceError: the source cannot tell.
        """
        return list(self.groups)

    def resolv_all(self) -> list[str]:
        """Return the words of all nodes.

        Raises:
            GroupSourceNoUpcall: it has no word of its own for that; its groups have to be put together.
            GroupSourceError: it cannot tell.
        """
        if self.allgroups is None:
            raise GroupSourceNoUpcall(f"{self} does not say by itself which nodes are all nodes")
        return words(self.allgroups, f"all nodes of {self}")

    def resolv_reverse(self, node: str) -> list[str]:
        """Return the names of the groups that a node is in.

        Raises:
            GroupSourceNoUpcall: it does not answer that by itself (`has_reverse`).
            GroupSourceError: it cannot tell.
        """
        raise GroupSourceNoUpcall(f"{self} does not say by itself which groups a node is in")

    def __str__(self) -> str:
        return f"source {self.name}: {self.origin}" if self.origin else f"source {self.name}"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"


class GroupLoader(Protocol):
    """Whoever reads the groups of several sources from a file."""

    filename: str

    def groups(self, sourcename: str) -> Groups:
        """Return the groups of a source as the file has them now; none if the source is gone from it."""


class FileGroupSource(GroupSource):
    """Node groups in a file that a loader reads, and reads again when it has changed.

    Its group ``all``, if there is one, is all nodes.
    """

    def __init__(self, name: str, loader: GroupLoader) -> None:
        super().__init__(name, origin=loader.filename)
        self.loader = loader

    @property
    def groups(self) -> Groups:
        """The groups by name, as the file has them now."""
        return self.loader.groups(self.name)

    @property
    def allgroups(self) -> Words:
        """The group ``all``; None: there is none."""
        groups = self.groups
        return words(groups["all"], f"group 'all' of {self}") if "all" in groups else None


def uncommented(text: str) -> str:
    """Return text without its comments, which go from a `#` to the end of the line."""
    return _COMMENT.sub("", text)


def words(value: Words, what: str) -> list[str]:
    """Return what stands for nodes as words, each a name or a node set.

    Raises:
        GroupSourceError: it is nothing of that; `what` says whose it is.
    """
    if value is None:
        return []
    if isinstance(value, str):
        return _AROUND_OPERATOR.sub(r"\1", uncommented(value)).split()
    if isinstance(value, NodeSet):
        return [str(value)] if value else []
    if isinstance(value, (bytes, Mapping)) or not isinstance(value, Iterable):
        raise GroupSourceError(f"{what} is {value!r}; give it as text, which is a node set, or as a list of texts")
    found = []
    for part in value:
        if not isinstance(part, (str, NodeSet)):
            raise GroupSourceError(f"{what} has {part!r} in it, which is no text; put it in quotes")
        found += words(part, what)
    return found
