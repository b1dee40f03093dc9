# SPDX-License-Identifier: Apache-2.0
"""The login: each private key once, in the target's order, and what is said where none of them does.

Runs in the pool thread that connects, after the host key was verified.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from paramiko.auth_handler import AuthHandler

from ctask.errors import NoCredentials, NodeError
from ctask.options import Target
from ctask.transports.ssh import keys, mapping
from ctask.transports.ssh.keys import Identity
from ctask.transports.ssh.transport import Link

if TYPE_CHECKING:
    from paramiko.message import Message

__all__ = ["log_in"]

#: What a server may call a method in what we print: its words are not ours.
_METHOD = re.compile(r"[A-Za-z0-9@._-]{1,64}")


def log_in(link: Link, target: Target) -> None:
    """Log in as the target's user.

    A key is not asked about first: it is offered with its signature, one round trip. `none` is not tried.

    Raises:
        AuthRejected: every key was refused.
        NoCredentials: there was no key, or the server takes none, or wants more than keys.
        ConnectionLost: the connection ended in the login, which says nothing about the keys.
    """
    offered: list[Identity] = []
    allowed: Sequence[str] = ()
    partly = False
    for identity in keys.identities(target):
        if not _takes(link, identity):
            continue
        offered.append(identity)
        login = link.auth_handler = _Login(link)
        if not login.ask(target.user, identity):
            raise _hung_up(link, target, offered)
        if login.is_authenticated():
            return
        allowed = login.allowed
        partly = partly or login.partly
        if "publickey" not in allowed:
            break
    raise _failed(target, offered, allowed, partly=partly)


class _Login(AuthHandler):  # type: ignore[misc]  # paramiko has no types
    """paramiko's side of one login, which keeps what the server would go on with.

    Attributes:
        answered: the server refused, in part or in whole.
        allowed: the methods that the server named then.
        partly: it took the key, and wants something else as well.
    """

    def __init__(self, link: Link) -> None:
        super().__init__(link)
        self.answered = False
        self.allowed: tuple[str, ...] = ()
        self.partly = False

    def ask(self, user: str, identity: Identity) -> bool:
        """Offer a key and wait for the answer; False: the connection has ended."""
        link: Link = self.transport
        try:
            self.auth_publickey(user, identity.pkey, threading.Event())
        except (EOFError, OSError):
            pass  # a connection that is gone is told by the next read of it
        return link.drive(lambda: self.answered or self.authenticated)

    def _parse_userauth_failure(self, m: Message) -> None:
        names = m.get_string()[:1000].decode("ascii", "replace").split(",")
        self.allowed = tuple(name for name in names if _METHOD.fullmatch(name))
        self.partly = m.get_boolean()
        self.answered = True
        m.rewind()
        super()._parse_userauth_failure(m)


def _takes(link: Link, identity: Identity) -> bool:
    """Whether the server understands a signature of this key; paramiko would end the connection over one."""
    told = link.server_extensions.get("server-sig-algs", b"")
    if not told or identity.key_type != "rsa":
        return True
    return bool({b"rsa-sha2-256", b"rsa-sha2-512"} & set(told.split(b",")))


def _hung_up(link: Link, target: Target, offered: list[Identity]) -> NodeError:
    code, said = link.farewell
    if mapping.is_hang_up_for_tries(code, said):
        error = keys.rejected(target, offered)
        error.__cause__ = link.saved_exception
        return error
    return mapping.auth_lost(link.saved_exception, said)


def _failed(target: Target, offered: list[Identity], allowed: Sequence[str], *, partly: bool) -> NodeError:
    if partly:
        kind = f"a key was accepted for {target.user}, and the server wants more"
        more = ", ".join(allowed) or "it does not say what"
        return NoCredentials(f"{kind}: {more}", phase="auth", kind=kind)
    if not offered or (len(offered) == 1 and "publickey" not in allowed):
        return keys.no_credentials(target, allowed)
    return keys.rejected(target, offered, allowed)
