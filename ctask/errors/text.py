# SPDX-License-Identifier: Apache-2.0
"""Text of nodes and users as it may stand in a message.

Pure functions; any thread.
"""

from __future__ import annotations

__all__ = ["printable", "quoted", "told"]


def printable(text: str) -> str:
    """Return text of a node, or a name, on one line and without a character that a terminal would act on."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def quoted(text: str) -> str:
    """Return `text` in double quotes, without control characters, at most 200 characters of it."""
    shown = text if len(text) <= 200 else text[:197] + "..."
    return '"' + shown.encode("unicode_escape").decode("ascii").replace('"', '\\"') + '"'


def told(error: BaseException) -> str:
    """Return an exception as `repr` has it; one of a program's may raise in its own `__repr__`."""
    try:
        return printable(repr(error))
    except Exception:  # noqa: BLE001 (whatever that is: it is the first error that matters)
        return f"{type(error).__name__}(…)"
