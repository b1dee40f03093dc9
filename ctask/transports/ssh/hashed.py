# SPDX-License-Identifier: Apache-2.0
"""Lines of known_hosts whose names are hashed, and how the one of a node is found among thousands.

Such a line says no name: for each name that is asked for, an HMAC-SHA1 has to be computed under the line's own salt.
Runs under the lock of the file that the lines are of (`knownhosts.HostsFile`).
"""

from __future__ import annotations

import bisect
import hashlib
import hmac
import itertools
import re
from typing import NamedTuple

__all__ = ["Alike", "Hashed", "Line", "matching"]

#: How far around the lines of the nodes next in order a node's line is looked for first.
NEAR = 32, 512

_NUMBER = re.compile(r"([0-9]+)")
# RFC 2104: how the key of an HMAC goes into its two hashes.
_INNER = bytes(byte ^ 0x36 for byte in range(256))
_OUTER = bytes(byte ^ 0x5C for byte in range(256))


class Line(NamedTuple):
    """One key of a known_hosts file, with the number of its line."""

    number: int
    revoked: bool
    key_type: str
    blob: bytes


class Hashed:
    """A line whose name is hashed: HMAC-SHA1 of the name under a salt of its own."""

    __slots__ = ("inner", "line", "outer", "salt", "wanted")

    def __init__(self, salt: bytes, wanted: bytes, line: Line) -> None:
        self.salt = salt
        self.wanted = wanted
        self.line = line
        # SHA1 of what the salt alone decides, inside and outside (RFC 2104), once `begin` was called
        self.inner: hashlib._Hash | None = None
        self.outer: hashlib._Hash | None = None

    def begin(self) -> None:
        """Compute the half of the HMAC that is the same for every name."""
        block = self.salt.ljust(64, b"\0")
        self.outer = hashlib.sha1(block.translate(_OUTER), usedforsecurity=False)
        self.inner = hashlib.sha1(block.translate(_INNER), usedforsecurity=False)


class Alike:
    """Hashed lines of one key, or of one type of key, of which a node has about one.

    Where nodes are clones of each other, the lines of a key are a line of each node.
    """

    __slots__ = ("_known", "plain", "revoked")

    def __init__(self) -> None:
        self.plain: list[Hashed] = []
        self.revoked: list[Hashed] = []
        # Names whose line was found, in the order of their numbers, and where it was.
        self._known: list[tuple[list[str | int], int]] = []

    def add(self, entry: Hashed) -> None:
        (self.revoked if entry.line.revoked else self.plain).append(entry)

    def first(self, name: str, text: bytes) -> tuple[Line, ...]:
        """Return a line that is not revoked and has this name, or nothing. `text` is the name in bytes.

        Files are written in some order of the nodes, and nodes are reached in some order: so what was found for the
        names before and behind this one says where to look first. Where nothing is found there, all are tried.
        """
        lines = self.plain
        order = _in_order(name)
        place = bisect.bisect(self._known, (order, len(lines)))  # behind what is known of this very name
        around = [at for _, at in self._known[max(0, place - 1) : place + 1]]
        for width in NEAR if len(lines) > NEAR[-1] else ():
            for at in around:
                # Forward first: that is how both go.
                for begin, end in ((at, at + width), (max(0, at - width), at)):
                    found = _first(text, lines, begin, end)
                    if found is not None:
                        return self._keep(order, place, found)
        found = _first(text, lines, 0, len(lines))
        return () if found is None else self._keep(order, place, found)

    def _keep(self, order: list[str | int], place: int, at: int) -> tuple[Line, ...]:
        if not (self._known[place - 1 : place] and self._known[place - 1][0] == order):
            self._known.insert(place, (order, at))
        return (self.plain[at].line,)


def matching(text: bytes, entries: list[Hashed]) -> list[Line]:
    """Return the lines that have a name."""
    found = []
    at = _first(text, entries, 0, len(entries))
    while at is not None:
        found.append(entries[at].line)
        at = _first(text, entries, at + 1, len(entries))
    return found


def _first(text: bytes, entries: list[Hashed], begin: int, end: int) -> int | None:
    """Return the place of the first line from `begin` to `end` that has a name."""
    digest = hmac.digest
    for at, entry in enumerate(itertools.islice(entries, begin, end), begin):
        if entry.inner is None or entry.outer is None:
            if digest(entry.salt, text, "sha1") == entry.wanted:
                return at
            continue
        # Spelled out, since there are thousands: hmac.digest takes three times as long.
        inner, outer = entry.inner.copy(), entry.outer.copy()
        inner.update(text)
        outer.update(inner.digest())
        if outer.digest() == entry.wanted:
            return at
    return None


def _in_order(name: str) -> list[str | int]:
    """Return what a name is sorted by: its numbers as numbers."""
    return [int(part) if place % 2 else part for place, part in enumerate(_NUMBER.split(name))]
