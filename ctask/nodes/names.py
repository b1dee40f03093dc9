# SPDX-License-Identifier: Apache-2.0
"""Which names a node may have, and which of them can be looked up.

A node's name ends up in argument lists, file names, known_hosts lines and terminals; what could be read as an
option, a path, a shell word or a node set is refused here, once, before anything is sent. A name may be no more than a
label, so what the resolver is asked for is judged by itself (`check_address`).

Runs in any thread; pure functions, nothing to guard.
"""

from __future__ import annotations

import re

from ctask.errors import NodeNameError

__all__ = ["MAX_LABEL", "MAX_LENGTH", "MAX_LOOKED_UP", "check", "check_address"]

#: longest name: what a file name may have on Linux, and more than DNS allows (253)
MAX_LENGTH = 255
#: longest name that DNS holds, without a dot at its end, and the longest part between two dots (RFC 1035 2.3.4)
MAX_LOOKED_UP = 253
MAX_LABEL = 63

# Letters, digits and what IPv6 addresses, zones and service names need: what OpenSSH's `ssh_valid_hostname`
# lets through, without the characters that mean something in a node set or a path.
_GOOD = re.compile(r"[A-Za-z0-9_.:%+=~#][A-Za-z0-9_.:%+=~#-]*")
# What a resolver can be asked for. Which characters a name may have is its affair: /etc/hosts takes nearly all.
_LOOKED_UP = re.compile(rf"(?:[^.:]{{1,{MAX_LABEL}}}\.)*[^.:]{{1,{MAX_LABEL}}}\.?")
_BRACKETED = re.compile(r"\[[^][]*\](?::[0-9]*)?")
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


def check_address(address: str, node: str) -> None:
    """Refuse what no resolver can know, before it is asked: a query would go out for a name that is none.

    Names of parts with 1 to `MAX_LABEL` characters, `MAX_LOOKED_UP` in all, pass, with or without a dot at the end, and
    IPv6 addresses with or without a zone.

    Args:
        address: what is looked up or connected to; `check` has let it pass.
        node: the node that it is the address of; its name, where no other address was given.

    Raises:
        NodeNameError: says what is wrong with the address and what to do.
    """
    if len(address) <= MAX_LOOKED_UP and _LOOKED_UP.fullmatch(address):
        return
    reason = _unknowable(address)
    if reason:
        shown = ascii(address if len(address) <= 80 else address[:77] + "...")
        what = f"bad node name {shown}" if address == node else f"bad address {shown} of node {ascii(node)[:80]}"
        raise NodeNameError(f"{what}: {reason}")


def _unknowable(address: str) -> str:
    if ":" in address:
        return _no_address(address)
    name = address.removesuffix(".")
    if len(name) > MAX_LOOKED_UP:
        return f"it has {len(name)} characters, and DNS knows no name with more than {MAX_LOOKED_UP}; give its address"
    longest = max(name.split("."), key=len)
    if len(longest) > MAX_LABEL:
        return (
            f"one part of it has {len(longest)} characters, and DNS knows none with more than {MAX_LABEL} between two "
            "dots; give its address"
        )
    return "" if name and all(name.split(".")) else "it has an empty part before or behind a '.'; give the whole name"


def _no_address(address: str) -> str:
    """Say why a name with a colon is no IPv6 address; empty: it is one."""
    import socket  # on demand: most names have no colon

    literal, percent, zone = address.partition("%")
    try:
        socket.inet_pton(socket.AF_INET6, literal)
    except OSError:
        name, _, port = address.rpartition(":")
        if name and ":" not in name and port.isdecimal():
            return (
                f"the port is no part of a name; give it as an option of its own (port={port}, or -o Port={port}), "
                f"and the name as {name}"
            )
        return (
            "it is no IPv6 address, and no name has a ':' in it; a port is an option of its own (port=N, or -o Port=N)"
        )
    return "there is no zone behind '%'; give one, as in fe80::1%eth0" if percent and not zone else ""


def _reason(name: str) -> str:
    if not name:
        return "it is empty"
    if len(name) > MAX_LENGTH:
        return f"it is longer than {MAX_LENGTH} characters"
    if name.startswith("-"):
        return "it would be read as an option; a node name does not begin with '-'"
    if _BRACKETED.fullmatch(name):
        return "give the name or the IPv6 address without brackets, and a port as an option of its own (port)"
    for pattern, reason in _REASONS:
        # letters are no fault; the last pattern takes whatever is left that is not allowed
        for found in re.finditer(pattern, name):
            if not _GOOD.fullmatch("n" + found.group()):
                return reason.format(ascii(found.group()))
    return "'.' and '..' would be read as a path; give the node's name or address"
