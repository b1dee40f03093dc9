# SPDX-License-Identifier: Apache-2.0
"""The login (RFC 4252): each private key once, in the target's order, and what is said where none of them does.

Runs in the pool thread that connects, after the host key was verified. Once the node has let us in, there is no login:
what the node sends of one later reaches nothing that could sign.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from paramiko.common import MSG_SERVICE_ACCEPT, MSG_USERAUTH_FAILURE, MSG_USERAUTH_SUCCESS
from paramiko.ssh_exception import SSHException

from ctask.errors import NoCredentials, NodeError
from ctask.options import Target
from ctask.transports.ssh import keys, mapping, messages
from ctask.transports.ssh.fields import Fields
from ctask.transports.ssh.keys import Identity
from ctask.transports.ssh.packets import Packet
from ctask.transports.ssh.transport import Link

__all__ = ["log_in"]

#: What a server may call a method in what we print: its words are not ours.
_METHOD = re.compile(r"[A-Za-z0-9@._-]{1,64}")
#: Methods that are looked at in the node's list.
_METHODS = 32
#: How an RSA key signs, the best first; `ssh-rsa` alone would be SHA-1.
_RSA = (b"rsa-sha2-512", b"rsa-sha2-256")


def log_in(link: Link, target: Target) -> None:
    """Log in as the target's user.

    A key is not asked about first: it is offered with its signature, one round trip. `none` is not tried.

    Raises:
        AuthRejected: every key was refused.
        NoCredentials: there was no key, or the server takes none, or wants more than keys.
        ConnectionLost: the connection ended in the login, which says nothing about the keys.
    """
    login = _Login(link, target.user)
    offered: list[Identity] = []
    partly = False
    try:
        for identity in keys.identities(target):
            if not offered and not login.begin():
                raise _hung_up(link, target, offered)
            algorithm = _algorithm(link, identity)
            if not algorithm:
                continue
            offered.append(identity)
            if not login.offer(identity, algorithm):
                raise _hung_up(link, target, offered)
            if link.phase == "open":
                return
            partly = partly or login.partly
            if "publickey" not in login.allowed:
                break
    finally:
        link.login = None
    raise _failed(target, offered, login.allowed, partly=partly)


class _Login:
    """The login of one connection, which keeps what the server would go on with.

    Attributes:
        allowed: the methods that the server named when it refused.
        partly: it took the key that was offered last, and wants something else as well.
    """

    def __init__(self, link: Link, user: str) -> None:
        self._link = link
        self._user = user.encode()
        self._answered = False
        self.allowed: tuple[str, ...] = ()
        self.partly = False
        link.login = self

    def begin(self) -> bool:
        """Ask for the login, once; False: the connection has ended."""
        if self._link.phase == "service":
            self._send(messages.LOGIN)
        return self._link.drive(lambda: self._link.phase != "service")

    def offer(self, identity: Identity, algorithm: bytes) -> bool:
        """Offer a key with its signature, and wait for the answer; False: the connection has ended.

        Args:
            identity: the key.
            algorithm: how it signs.
        """
        self._answered = False
        request = messages.login(self._user, algorithm, identity.pkey.asbytes())
        signed = messages.string(self._link.session_id) + request
        signature = identity.pkey.sign_ssh_data(signed, algorithm.decode()).asbytes()
        self._send(request + messages.string(signature))
        return self._link.drive(lambda: self._answered)

    def _send(self, payload: bytes) -> None:
        try:
            self._link.packetizer.send_message(Packet(payload))
        except (EOFError, OSError):
            pass  # a connection that is gone is told by the next read of it

    def packet(self, kind: int, fields: Fields) -> None:
        """Deal with an answer; see `exchange.Login`."""
        if kind == MSG_SERVICE_ACCEPT:
            if fields.string() != b"ssh-userauth":
                raise SSHException("the node accepted another service than the login")
            self._link.phase = "login"
        elif kind == MSG_USERAUTH_SUCCESS:
            self._answered = True
            self._link.authenticated = True
            self._link.phase = "open"
        elif kind == MSG_USERAUTH_FAILURE:
            names = fields.string()[:1000].decode("ascii", "replace").split(",", _METHODS)[:_METHODS]
            self.allowed = tuple(name for name in names if _METHOD.fullmatch(name))
            self.partly = fields.boolean()
            self._answered = True


def _algorithm(link: Link, identity: Identity) -> bytes:
    """Return how the key signs for this server; b"" where the server says that it takes none of its signatures."""
    if identity.key_type != "rsa":
        return identity.pkey.get_name().encode()  # type: ignore[no-any-return]
    told = link.server_extensions.get("server-sig-algs", b"")
    taken = told.split(b",")
    return next((name for name in _RSA if not told or name in taken), b"")


def _hung_up(link: Link, target: Target, offered: list[Identity]) -> NodeError:
    code, said = link.farewell
    if offered and mapping.is_hang_up_for_tries(code, said):
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
