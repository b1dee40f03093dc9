# SPDX-License-Identifier: Apache-2.0
"""What the caller asked for and cannot be right: raised in the caller's thread, before a packet is sent.

Any thread; nothing is shared.
"""

from __future__ import annotations

from typing import Any

from ctask.errors.text import printable, quoted

__all__ = [
    "CommandError",
    "CtaskError",
    "GroupResolverConfigError",
    "GroupResolverError",
    "GroupResolverIllegalCharError",
    "GroupResolverSourceError",
    "GroupSourceError",
    "GroupSourceNoUpcall",
    "GroupSourceQueryFailed",
    "NoSuchGroup",
    "NodeNameError",
    "NodeSetError",
    "NodeSetExternalError",
    "NodeSetParseError",
    "NodeSetParseRangeError",
    "OptionError",
    "RangeSetParseError",
    "UsageError",
]


class CtaskError(Exception):
    """The base of all that ctask raises."""


class UsageError(CtaskError, ValueError):
    """Raised in the caller's thread, before a packet is sent, when a request cannot be right."""


class NodeSetError(UsageError):
    """A node set that cannot be read.

    Args:
        text: the whole input.
        position: index of the character that is wrong, from 0 (the text counts from 1); None: no place is to blame.
        reason: what is wrong with it, and what to do.
    """

    #: what the text should have been
    subject = "node set"

    def __init__(self, text: str, position: int | None, reason: str) -> None:
        where = "" if position is None else f" at position {position + 1}"
        super().__init__(f"bad {self.subject} {quoted(text)}{where}: {reason}")
        self.text = text
        self.position = position
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.text, self.position, self.reason)


class NodeSetParseError(NodeSetError):
    """Text that is no node set; `position` is where it stops being one."""


class NodeSetParseRangeError(NodeSetParseError):
    """Numbers of a node set that are none, or that are in no order."""


class RangeSetParseError(NodeSetParseRangeError):
    """Text that is no `RangeSet`."""

    subject = "range set"


class NodeSetExternalError(NodeSetError):
    """What a node set needs of node groups cannot be had: the message is `reason` alone.

    Args:
        reason: what happened, and what to do.
        text: the group, as `@group` or `@source:group`, or whatever else was asked for.
    """

    def __init__(self, reason: str, text: str = "") -> None:
        super().__init__(text, None, reason)
        self.args = (printable(reason),)

    def before_anything(self) -> NodeSetExternalError:
        """Return the error with the word that nothing was run; for who was about to run something."""
        end = "" if self.reason.endswith(("?", ".")) else "."
        return type(self)(f"{self.reason}{end} Nothing was run.", self.text)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, self.text)


class NoSuchGroup(NodeSetExternalError):
    """A group that its source has not."""


class GroupSourceError(NodeSetExternalError):
    """A source of node groups that cannot answer."""


class GroupSourceNoUpcall(GroupSourceError):
    """A source that has nothing to answer such a question with: no command in its section, say."""


class GroupSourceQueryFailed(GroupSourceError):
    """A source whose command failed, did not end in time, or printed what it should not."""


class GroupResolverError(NodeSetExternalError):
    """A question about node groups that no source was asked."""


class GroupResolverSourceError(GroupResolverError):
    """A source of node groups that is not there."""


class GroupResolverIllegalCharError(GroupResolverError):
    """A name of a group, or of a node, with characters in it that it may not have there."""


class GroupResolverConfigError(GroupResolverError):
    """`groups.conf`, or a file that it names, cannot be used as it is; the message says which, and what to do."""


class NodeNameError(UsageError):
    """A name that no node may have: it would be read as an option, a path or a shell word somewhere."""


class CommandError(UsageError):
    """A command that cannot be sent as it stands (empty, with a NUL, too long, not encodable)."""


class OptionError(UsageError):
    """An option that is unknown, or that has no such value."""
