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

__all__ = ["HashedLines", "Line"]

#: The type of key that is asked for first. As in `ssh`, who is known by one of these is asked for no other.
BEST_TYPE = "ssh-ed25519"
#: Hashed lines of a file for which the beginning of their HMACs is kept (1 KB each), once each was computed so often
#: that it pays. Then one costs a third.
MOST_BEGUN = 20_000
BEGIN_AFTER = 2

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


class HashedLines:
    """The hashed lines of a file, only added to. Names are given as text and as bytes."""

    def __init__(self) -> None:
        self._lines: list[_Hashed] = []
        self._by_key: dict[bytes, _Alike] = {}
        self._best = _Alike()  # those of the best type, and all that revoke
        self._types: dict[str, None] = {}
        self._searches = 0
        # What all lines gave for a name, and how many there were.
        self._found: dict[str, tuple[int, list[Line]]] = {}

    def __len__(self) -> int:
        return len(self._lines)

    @property
    def only_type(self) -> str:
        """The one type of key that all lines have; empty where there are more, or none."""
        return next(iter(self._types)) if len(self._types) == 1 else ""

    def add(self, salt: bytes, wanted: bytes, line: Line) -> None:
        """Add a line: its salt, and the HMAC of its name."""
        entry = _Hashed(salt, wanted, line)
        self._lines.append(entry)
        self._by_key.setdefault(line.blob, _Alike()).add(entry)
        if line.revoked or line.key_type == BEST_TYPE:
            self._best.add(entry)
        if not line.revoked:
            self._types[line.key_type] = None

    def find(self, name: str, text: bytes, *, without: bytes = b"") -> list[Line]:
        """Return all lines of a name; `without` is a key of which it is known to have none."""
        self._begin(len(self._lines))
        if without in self._by_key and name not in self._found:
            # Not kept: a line with this key may have been added since it was known.
            return _matching(text, [entry for entry in self._lines if entry.line.blob != without])
        count, lines = self._found.get(name, (0, []))
        if count < len(self._lines):
            lines = lines + _matching(text, self._lines, count)
            self._found[name] = len(self._lines), lines
        return lines

    def revoking(self, text: bytes, blob: bytes) -> list[Line]:
        """Return the lines that revoke a key for a name."""
        same = self._by_key.get(blob)
        return _matching(text, same.revoked) if same is not None else []

    def one(self, name: str, text: bytes, blob: bytes) -> tuple[Line, ...]:
        """Return a line that gives a name a key, or nothing."""
        same = self._by_key.get(blob)
        if same is None:
            return ()
        self._begin(len(same.plain))
        return same.first(name, text)

    def best(self, name: str, text: bytes) -> list[Line] | None:
        """Return a line of a name whose key is of `BEST_TYPE`, and all that revoke keys; None: it has no such line."""
        if BEST_TYPE not in self._types:
            return None
        self._begin(len(self._best.plain))
        one = self._best.first(name, text)
        return [*_matching(text, self._best.revoked), *one] if one else None

    def _begin(self, many: int) -> None:
        """Have what is searched again and again half computed; `many` of the lines are about to be searched."""
        if many * 4 < len(self._lines) or len(self._lines) > MOST_BEGUN:
            return
        self._searches += 1
        if self._searches == BEGIN_AFTER + 1:
            for entry in self._lines:
                entry.begin()


class _Hashed:
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


class _Alike:
    """Hashed lines of one key, or of one type of key, of which a node has about one.

    Where nodes are clones of each other, the lines of a key are a line of each node.
    """

    __slots__ = ("_known", "_without", "plain", "revoked")

    def __init__(self) -> None:
        self.plain: list[_Hashed] = []
        self.revoked: list[_Hashed] = []
        # Names whose line was found, in the order of their numbers, and where it was.
        self._known: list[tuple[list[str | int], int]] = []
        # How many of the plain lines are known not to have a name.
        self._without: dict[str, int] = {}

    def add(self, entry: _Hashed) -> None:
        (self.revoked if entry.line.revoked else self.plain).append(entry)

    def first(self, name: str, text: bytes) -> tuple[Line, ...]:
        """Return a line that is not revoked and has this name, or nothing. `text` is the name in bytes.

        Files are written in some order of the nodes, and nodes are reached in some order: so what was found for the
        names before and behind this one says where to look first. Where nothing is found there, all are tried.
        """
        lines, looked = self.plain, self._without.get(name, 0)
        order = _in_order(name)
        place = bisect.bisect(self._known, (order, len(lines)))  # behind what is known of this very name
        around = [at for _, at in self._known[max(0, place - 1) : place + 1]]
        for width in NEAR if len(lines) - looked > NEAR[-1] else ():
            for at in around:
                # Forward first: that is how both go.
                for begin, end in ((at, at + width), (max(0, at - width), at)):
                    found = _first(text, lines, begin, end)
                    if found is not None:
                        return self._keep(order, place, found)
        found = _first(text, lines, looked, len(lines))
        if found is not None:
            return self._keep(order, place, found)
        self._without[name] = len(lines)
        return ()

    def _keep(self, order: list[str | int], place: int, at: int) -> tuple[Line, ...]:
        if not (self._known[place - 1 : place] and self._known[place - 1][0] == order):
            self._known.insert(place, (order, at))
        return (self.plain[at].line,)


def _matching(text: bytes, entries: list[_Hashed], begin: int = 0) -> list[Line]:
    """Return the lines that have a name, from the place `begin` on."""
    found = []
    at = _first(text, entries, begin, len(entries))
    while at is not None:
        found.append(entries[at].line)
        at = _first(text, entries, at + 1, len(entries))
    return found


def _first(text: bytes, entries: list[_Hashed], begin: int, end: int) -> int | None:
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
