# SPDX-License-Identifier: Apache-2.0
"""Wildcards in node sets: ``www*[1-4]``, in time that grows with the names and not with the ways to match them.

Runs in any thread; pure functions, nothing to guard.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import Enum
from typing import TypeAlias

from ctask.nodes.space import Axis, code, holds

__all__ = ["Part", "Wild", "matcher", "parts_of_text"]


class Wild(Enum):
    """A wildcard: any text, or any character."""

    ANY = "*"
    ONE = "?"


#: a piece of a wildcard: text as it stands, a wildcard, or the numbers of a bracket
Part: TypeAlias = "str | Wild | Axis"

_NUMBER = re.compile("-?[0-9]+")
_CUT = re.compile(r"([*?])")


def parts_of_text(text: str) -> list[Part]:
    """Return the parts of text without brackets."""
    cuts = (cut for cut in _CUT.split(text) if cut)
    return [Wild(cut) if cut in "*?" else cut for cut in cuts]


def matcher(parts: list[Part]) -> Callable[[str], bool]:
    """Return a function that says whether a name matches.

    All ways to match are followed at once, as sets of positions: a name takes time for its length times the parts,
    however many stars there are.
    """
    head = parts[0] if parts and isinstance(parts[0], str) else ""

    def matches(name: str) -> bool:
        if not name.startswith(head):
            return False
        positions = {0}
        for part in parts:
            positions = _after(part, name, positions)
            if not positions:
                return False
        return len(name) in positions

    return matches


def _after(part: Part, name: str, positions: set[int]) -> set[int]:
    """Return where a name can go on after a part that began at one of the positions."""
    if part is Wild.ANY:
        return set(range(min(positions), len(name) + 1))
    if part is Wild.ONE:
        return {at + 1 for at in positions if at < len(name)}
    if isinstance(part, str):
        return {at + len(part) for at in positions if name.startswith(part, at)}
    ends = set()
    for at in positions:
        found = _NUMBER.match(name, at)
        if found:
            digits = at + (name[at] == "-") + 1
            ends |= {end for end in range(digits, found.end() + 1) if _in(part, name[at:end])}
    return ends


def _in(axis: Axis, number: str) -> bool:
    return not number.startswith("-0") and holds(axis, code(number))
