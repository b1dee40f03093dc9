# SPDX-License-Identifier: Apache-2.0
"""What paramiko and the kernel raise, and what nodes answer, as errors of `ctask.errors`: in this one place.

Pure functions; they run in whichever thread has the failure in hand, and hold no state.
"""

from __future__ import annotations

import errno
from typing import TypeVar

from cryptography.exceptions import InvalidTag
from paramiko.ssh_exception import IncompatiblePeer, MessageOrderError, SSHException

from ctask.errors import (
    AuthError,
    BannerError,
    ConnectError,
    ConnectionLost,
    Curable,
    ExecRefused,
    HandshakeError,
    HostKeyError,
    LocalResource,
    NodeError,
    SessionRefused,
)
from ctask.transports.ssh.wire import VERSION_LIMIT, NoVersion

_Error = TypeVar("_Error", bound=NodeError)

__all__ = [
    "HostKeyChanged",
    "NoCommonAlgorithm",
    "Silence",
    "TooMuch",
    "auth_lost",
    "exec_refused",
    "handshake_failed",
    "host_key_unchecked",
    "is_hang_up_for_tries",
    "local_resource",
    "lost",
    "no_exit_status",
    "no_terminal",
    "no_version",
    "open_refused",
    "quoted",
    "says_forced_command",
    "wrong_version",
]

#: What sshd says in place of its version when it is busy (8.x to 9.7; 9.8 and newer, which says it as well to
#: a source that it punishes).
_BUSY = ("Exceeded MaxStartups", "Not allowed at this time")
_BUSY_ADVICE = "MaxStartups is full? Lower the fan-out, or raise MaxStartups there"
#: errno -> words, where the kernel's own say less
_BROKEN = {
    errno.ECONNRESET: "connection reset by the node",
    errno.EPIPE: "connection closed by the node",
    errno.ETIMEDOUT: "the node stopped answering",
    errno.EHOSTUNREACH: "no route to the node any more",
    errno.ENETUNREACH: "no route to the node any more",
}
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)
#: RFC 4254 5.1: reasons of a refused open
_REFUSALS = {
    1: "administratively prohibited",
    2: "connect failed",
    3: "unknown channel type",
    4: "resource shortage",
}


class NoCommonAlgorithm(IncompatiblePeer):  # type: ignore[misc]  # paramiko has no types
    """paramiko and the server have no algorithm of a kind in common; its text names both lists."""


class HostKeyChanged(SSHException):  # type: ignore[misc]  # paramiko has no types
    """A re-key showed another host key than the handshake did."""


class Silence(SSHException):  # type: ignore[misc]  # paramiko has no types
    """A connection that was given up because its node said, or took, nothing for too long."""


class TooMuch(SSHException):  # type: ignore[misc]  # paramiko has no types
    """The server sent more than the protocol allows it."""


def quoted(text: str | bytes, limit: int = 120) -> str:
    """Return what a node said on one line, in quotes, without control characters."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "backslashreplace")
    shown = text if len(text) <= limit else text[: limit - 1] + "…"
    return '"' + "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown) + '"'


def no_version(failure: NoVersion) -> NodeError:
    """Return the error for a server that hung up before it named its version."""
    said = failure.said.strip()
    # A version line that broke off is one of an SSH server all the same.
    begun = said.rpartition(b"\n")[2][:4]
    dropped = b"SSH-".startswith(begun) or any(word.encode() in said for word in _BUSY)
    error: ConnectError
    if failure.why == "limit":
        reason = f"no SSH version within {VERSION_LIMIT} bytes; is this an SSH port?"
        error = BannerError(f"{reason} it says {quoted(said, 60)}", phase="banner", kind=reason, curable=Curable.NAMED)
    elif said and not dropped:
        reason = "no SSH server answers there"
        error = HandshakeError(f"{reason}: it says {quoted(said)}", phase="banner", kind=reason)
    else:
        reason = "connection dropped by the server"
        words = f": {quoted(said)}" if said else ""
        text = f"{reason}{words}. {_BUSY_ADVICE}"
        error = BannerError(text, phase="banner", kind=reason, curable=Curable.BUSY)
    error.__cause__ = failure.__cause__
    return error


def wrong_version(line: bytes) -> HandshakeError:
    """Return the error for a version line that is not one of SSH 2."""
    reason = "the server does not speak SSH 2"
    return HandshakeError(f"{reason}: it says {quoted(line)}", phase="banner", kind=reason)


def handshake_failed(cause: BaseException | None, said: str) -> NodeError:
    """Return the error for a connection that ended in the key exchange; `said` is the server's farewell."""
    if isinstance(cause, NoCommonAlgorithm):
        return _because(HandshakeError(str(cause), phase="kex"), cause)
    if said:
        text = f"key exchange failed: the server disconnected: {quoted(said)}"
        return _because(HandshakeError(text, phase="kex"), cause)
    # Reset or closed: a server that is busy may do that to a client that has not logged in.
    curable = Curable.BUSY if cause is None or isinstance(cause, (EOFError, OSError)) else Curable.MAYBE
    integrity = _is_integrity(cause)
    error = HandshakeError(
        f"key exchange failed: {_broken(cause)}", phase="kex", curable=Curable.NEVER if integrity else curable
    )
    error.integrity = integrity
    return _because(error, cause)


def auth_lost(cause: BaseException | None, said: str) -> NodeError:
    """Return the error for a connection that ended in the login: not a word about the credentials."""
    words = f": {quoted(said)}" if said else ""
    kind = _broken(cause)
    if not isinstance(cause, SSHException):  # those say themselves what was wrong, and when
        kind += " during the login"
    # Trying again could lock the account out.
    return _because(ConnectionLost(f"{kind}{words}", phase="auth", kind=kind, curable=Curable.NAMED), cause)


def lost(cause: BaseException | None, said: str, *, here: bool = False) -> ConnectionLost:
    """Return the error for a session whose connection ended under it; `here`: by ctask."""
    if here:
        error = ConnectionLost("connection closed by ctask")
    elif said:
        text = f"connection lost: the node disconnected: {quoted(said)}"
        error = ConnectionLost(text, kind="connection lost")
    else:
        error = ConnectionLost(f"connection lost: {_broken(cause)}", kind="connection lost")
    _because(error, cause)
    return error


def no_exit_status() -> ConnectionLost:
    """Return the error for a session that the node closed without saying how the command ended."""
    return ConnectionLost("no exit status: the node closed the session without one", kind="no exit status")


def open_refused(code: int, text: bytes) -> SessionRefused:
    """Return the error for a session that the node did not open; each session gets one of its own."""
    reason = _REFUSALS.get(code, f"reason {code}")
    advice = {2: ". MaxSessions of its sshd is reached?", 4: ". The node is short of resources"}.get(code, "")
    words = "" if text.lower() in (b"", b"open failed", reason.encode()) else f": {quoted(text)}"
    return SessionRefused(
        f"the node refused to open a session: {reason}{words}{advice}",
        kind=f"session refused: {reason}",
        curable=Curable.BUSY if code in (2, 4) else Curable.NAMED,
    )


def exec_refused() -> ExecRefused:
    """Return the error for a command that the node refused to run."""
    return ExecRefused("the node opened a session and refused to run the command")


def no_terminal() -> ExecRefused:
    """Return the error for `pty=True` where there is no terminal to be had; the command was not sent."""
    return ExecRefused("the node gives no terminal (no-pty?); the command was not sent. Say pty=False")


def host_key_unchecked(cause: Exception) -> HostKeyError:
    """Return the refusal for a host key that could not be looked up: unchecked is not trusted."""
    kind = "host key could not be checked"
    text = f"{kind}, so it is refused: {type(cause).__name__}: {quoted(str(cause))}"
    return _because(HostKeyError(text, phase="hostkey", kind=kind), cause)


def local_resource(cause: BaseException, phase: str) -> LocalResource | None:
    """Return the error where this machine lacks descriptors, threads or memory; else None."""
    thread = isinstance(cause, RuntimeError) and "new thread" in str(cause)
    if not thread and not isinstance(cause, MemoryError) and getattr(cause, "errno", None) not in _NO_ROOM:
        return None
    what = "threads" if thread else "memory" if isinstance(cause, MemoryError) else "descriptors"
    text = f"this machine has no more {what}; lower the fan-out, or raise its limit (ulimit)"
    return _because(LocalResource(text, phase=phase, curable=Curable.BUSY), cause)  # others give theirs back


def is_hang_up_for_tries(code: int, said: str) -> bool:
    """Whether a farewell in the login means that too many credentials were offered."""
    # 14 is "no more authentication methods"; OpenSSH says 2 and the words.
    return code == 14 or "too many authentication failures" in said.lower()


def says_forced_command(text: bytes) -> bool:
    """Whether what sshd tells debuggers of a key is that it runs one command, whatever is asked for.

    It says `PLACE: key options: agent-forwarding command pty`, and the same of a certificate.
    """
    _, found, options = text.partition(b": key options:")
    return bool(found) and b"command" in options.split()


def _broken(cause: BaseException | None) -> str:
    """What ended a connection, in words."""
    if cause is None or isinstance(cause, EOFError):
        return "connection closed by the node"
    if isinstance(cause, OSError):
        return _BROKEN.get(cause.errno or 0, cause.strerror or "connection broken")
    if isinstance(cause, InvalidTag):
        return "a packet failed its integrity check"
    if isinstance(cause, (SSHException, AuthError)):
        return str(cause).rstrip(".")
    # A defect: its class and text would say nothing to a user; they are the error's cause, and in the debug log.
    return "what the node sent could not be dealt with"


def _is_integrity(cause: BaseException | None) -> bool:
    if isinstance(cause, (MessageOrderError, InvalidTag, HostKeyChanged)):
        return True
    # paramiko has no classes for these two.
    text = str(cause) if isinstance(cause, SSHException) else ""
    return text.startswith("Signature verification") or text == "Mismatched MAC"


def _because(error: _Error, cause: BaseException | None) -> _Error:
    error.__cause__ = cause
    return error
