# SPDX-License-Identifier: Apache-2.0
"""Which names a node may have.

A node's name ends up in argument lists, file names, known_hosts lines and terminals; what could be read as an
option, a path, a shell word or a node set is refused here, once, before anything is sent.

Runs in any thread; pure functions, nothing to guard.
"""

from __future__ import annotations

import re

from ctask.errors import NodeNameError

__all__ = ["MAX_LENGTH", "check"]

#: longest name: what a file name may have on Linux, and more than DNS allows (253)
MAX_LENGTH = 255

# Letters, digits and what IPv6 addresses, zones and service names need: what OpenSSH's `ssh_valid_hostname`
# lets through, without the characters that mean something in a node set or a path.
_GOOD = re.compile(r"[A-Za-z0-9_.:%+=~#][A-Za-z0-9_.:%+=~#-]*")
_REASONS = (
    (r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "control characters are not allowed"),
    (r"[ \t\r\n]", "white space is not allowed; separate nodes by commas"),
    (r"[^\x00-\x7f]", "only ASCII is allowed; write a name as DNS holds it (xn--...)"),
    (r"@", "a node is named without its login; give the login as an option of its own (user)"),
    (r"[][,!&^*?]", "{0} has a meaning in node sets and cannot be part of a name"),
    (r"/", "{0} would be read as part of a path; give the node's name or address"),
    (r".", "{0} has a meaning to a shell and cannot be part of a name"),
)


def check(name: str) -> None:
    """Refuse a name that no node may have.

    Allowed are letters, digits and ``_ . : % + = ~ # -`` (so IPv6 addresses with zones are), at most
    `MAX_LENGTH` of them, with no ``-`` in front, and with no ``..``.

    Args:
        name: one name, not a node set.

    Raises:
        NodeNameError: says what is wrong with the name and what to do.
    """
    if not isinstance(name, str):
        raise NodeNameError(f"bad node name {ascii(name)[:80]}: give text, not {type(name).__name__}")
    good = _GOOD.fullmatch(name)
    if good and len(name) <= MAX_LENGTH and ".." not in name and name != ".":
        return
    shown = ascii(name if len(name) <= 80 else name[:77] + "...")
    raise NodeNameError(f"bad node name {shown}: {_reason(name)}")


def _reason(name: str) -> str:
    if not name:
        return "it is empty"
    if len(name) > MAX_LENGTH:
        return f"it is longer than {MAX_LENGTH} characters"
    if name.startswith("-"):
        return "it would be read as an option; a node name does not begin with '-'"
    for pattern, reason in _REASONS:
        # letters are no fault; the last pattern takes whatever is left that is not allowed
        for found in re.finditer(pattern, name):
            if not _GOOD.fullmatch("n" + found.group()):
                return reason.format(ascii(found.group()))
    return "'.' and '..' would be read as a path; give the node's name or address"
