# SPDX-License-Identifier: Apache-2.0
"""Nodes that are listed in a file or on standard input: the one reader of them, for every option that takes them.

Words, separated by white space; `#` begins a comment, wherever it stands. Runs in the main thread; a `Lists` belongs to
one command line.
"""

from __future__ import annotations

import codecs
import select
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ctask.errors import NodeNameError, NodeSetError, OptionError
from ctask.nodes import NodeSet, Resolver

__all__ = ["ITS_NAMES", "STANDARD_INPUT", "Lists", "Word", "node_set"]

#: What names standard input, as for most programs.
STANDARD_INPUT = "-"
#: Its other names. Opened as files they are the same pipe, and a socket cannot be opened at all.
ITS_NAMES = (STANDARD_INPUT, "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")
#: Bytes of a list: some times what the most nodes of a command take with the longest names; a device has no end.
MOST = 64 << 20
_SLICE = 64 * 1024


class Word(NamedTuple):
    """One word, and where it stands: `FILE:LINE`; empty where it was typed."""

    text: str
    where: str = ""


class Lists:
    """The lists of one command line. Standard input is read once: a second reader would find it empty.

    Args:
        say: writes a line for the person who has to type the list.
    """

    def __init__(self, say: Callable[[str], None] | None = None) -> None:
        self._say = say
        #: the option that standard input was read for; None: it was not
        self.taken_by: str | None = None

    def words(self, path: str, option: str) -> list[Word]:
        """Return the words of a file, or of standard input.

        Args:
            option: which asks for it, as it was typed.

        Raises:
            OptionError: it cannot be read, or is not text.
        """
        if path in ITS_NAMES:
            return _split(self._standard_input(option), "standard input")
        try:
            with open(path, "rb", buffering=0) as file:
                data = _whole(file)
        except (OSError, ValueError) as error:
            raise OptionError(f"{option}: {getattr(error, 'strerror', None) or error}") from error
        return _split(data, path)

    def _standard_input(self, option: str) -> bytes:
        if self.taken_by is not None:
            raise OptionError(f"{self.taken_by} and {option} both read standard input, which can be read once")
        self.taken_by = option
        if sys.stdin is None:
            raise OptionError(f"{option}: standard input is closed")
        try:
            if self._say is not None and sys.stdin.isatty():
                self._say("ctask: type the nodes; Ctrl-D on a line of its own ends them")
            buffer = sys.stdin.buffer
            return _whole(getattr(buffer, "raw", buffer))
        except (OSError, ValueError) as error:
            raise OptionError(f"{option}: {getattr(error, 'strerror', None) or error}") from error


def node_set(words: Sequence[Word], resolver: Resolver | None) -> NodeSet:
    """Return the union of node sets.

    Raises:
        UsageError: one of them cannot be right; it says where it stands.
    """
    try:
        return NodeSet.fromlist((word.text for word in words), resolver=resolver)
    except (NodeSetError, NodeNameError):
        for word in words:
            _alone(word, resolver)
        raise


def _alone(word: Word, resolver: Resolver | None) -> None:
    """Raise, with its place, if a word from a list names no nodes."""
    try:
        NodeSet(word.text, resolver=resolver)
    except (NodeSetError, NodeNameError) as error:
        if not word.where:
            raise
        raise OptionError(f"{word.where}: {error}") from error


def _whole(file: Any) -> bytes:
    """Return all that is in a file, also where another program has made it non-blocking."""
    parts: list[bytes] = []
    held = 0
    while held <= MOST:
        data = file.read(_SLICE)
        if data is None:  # nothing yet, and blocking is off
            select.select([file], [], [])
        elif not data:
            return b"".join(parts)
        else:
            parts.append(data)
            held += len(data)
    raise ValueError(f"this is longer than {MOST >> 20} MiB, and no list of nodes")


def _split(data: bytes, where: str) -> list[Word]:
    data = data.removeprefix(codecs.BOM_UTF8)
    if b"\0" in data:
        place = data.count(b"\n", 0, data.index(b"\0")) + 1
        raise OptionError(f"{where}:{place}: no list of nodes: there is a zero byte in it (is it binary, or UTF-16?)")
    # What is no UTF-8 is harmless in a comment; in a name it is refused like any other backslash.
    lines = data.decode("utf-8", "backslashreplace").split("\n")
    words: list[Word] = []
    for number, line in enumerate(lines, 1):
        before, _, comment = line.partition("#")
        if "\r" in comment.rstrip("\r"):
            # Where lines end in a carriage return alone, all that follows would be taken for the comment.
            raise OptionError(f"{where}:{number}: a carriage return stands in a comment; end lines with a newline")
        words += [Word(text, f"{where}:{number}") for text in before.split()]
    return words
