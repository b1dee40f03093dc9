# SPDX-License-Identifier: Apache-2.0
"""The messages that we send, packed: of the login (RFC 4252), of key exchange, of a session's channel (RFC 4254).

Pure functions.
"""

from __future__ import annotations

from paramiko.common import (
    MSG_CHANNEL_CLOSE,
    MSG_CHANNEL_DATA,
    MSG_CHANNEL_EOF,
    MSG_CHANNEL_FAILURE,
    MSG_CHANNEL_OPEN,
    MSG_CHANNEL_OPEN_FAILURE,
    MSG_CHANNEL_REQUEST,
    MSG_CHANNEL_WINDOW_ADJUST,
    MSG_REQUEST_FAILURE,
    MSG_SERVICE_REQUEST,
    MSG_UNIMPLEMENTED,
    MSG_USERAUTH_REQUEST,
)

__all__ = [
    "ERROR_OUTPUT",
    "LOGIN",
    "NO_TO_REQUEST",
    "PACKET",
    "adjust",
    "close",
    "data",
    "eof",
    "execute",
    "failure",
    "login",
    "mpint",
    "no_channel",
    "open_session",
    "signal",
    "string",
    "terminal",
    "u32",
    "unimplemented",
]

#: The largest packet that we take, which is also the most that every peer takes (RFC 4253 6.1).
PACKET = 32_768


def u32(number: int) -> bytes:
    """A number of 32 bits."""
    return number.to_bytes(4, "big")


def string(text: bytes) -> bytes:
    """Any bytes, behind their length."""
    return len(text).to_bytes(4, "big") + text


def mpint(number: int) -> bytes:
    """A number of any size that is not negative."""
    return string(number.to_bytes(number.bit_length() // 8 + 1, "big") if number else b"")


#: RFC 4254 5.2: the one kind of extended data there is
ERROR_OUTPUT = u32(1)
_OPEN = bytes((MSG_CHANNEL_OPEN,)) + string(b"session")
_REQUEST = bytes((MSG_CHANNEL_REQUEST,))
_EXEC = string(b"exec") + b"\1"
_SIGNAL = string(b"signal") + b"\1"
#: 80 columns, 24 lines, no pixels, no modes; "dumb", so that programs send no colours and no cursor movements
_PTY = string(b"pty-req") + b"\1" + string(b"dumb") + u32(80) + u32(24) + u32(0) * 2 + string(b"\0")
_EOF = bytes((MSG_CHANNEL_EOF,))
_CLOSE = bytes((MSG_CHANNEL_CLOSE,))
_FAILURE = bytes((MSG_CHANNEL_FAILURE,))
_ADJUST = bytes((MSG_CHANNEL_WINDOW_ADJUST,))
_DATA = bytes((MSG_CHANNEL_DATA,))
#: Ask for the service of logging in.
LOGIN = bytes((MSG_SERVICE_REQUEST,)) + string(b"ssh-userauth")
_BY_KEY = string(b"ssh-connection") + string(b"publickey") + b"\1"
#: No to a request that concerns the connection.
NO_TO_REQUEST = bytes((MSG_REQUEST_FAILURE,))
#: 1: administratively prohibited; no text, no language
_PROHIBITED = u32(1) + string(b"") * 2


def login(user: bytes, algorithm: bytes, public: bytes) -> bytes:
    """A login by key (RFC 4252 7), up to the signature."""
    return bytes((MSG_USERAUTH_REQUEST,)) + string(user) + _BY_KEY + string(algorithm) + string(public)


def unimplemented(sequence: int) -> bytes:
    """The answer to a message that has no meaning; `sequence` is its number among those that came."""
    return bytes((MSG_UNIMPLEMENTED,)) + u32(sequence)


def no_channel(theirs: int) -> bytes:
    """No to a channel that the peer wants to open."""
    return bytes((MSG_CHANNEL_OPEN_FAILURE,)) + u32(theirs) + _PROHIBITED


def open_session(ours: int, window: int) -> bytes:
    """Open a session, numbered `ours` here, on which the peer may send `window` bytes ahead."""
    return _OPEN + u32(ours) + u32(window) + u32(PACKET)


def execute(theirs: int, command: bytes) -> bytes:
    """Run a command, and answer whether."""
    return _REQUEST + u32(theirs) + _EXEC + string(command)


def terminal(theirs: int) -> bytes:
    """Give the command that follows a terminal, and answer whether."""
    return _REQUEST + u32(theirs) + _PTY


def signal(theirs: int, name: bytes) -> bytes:
    """Signal the command (6.9), and answer whether."""
    return _REQUEST + u32(theirs) + _SIGNAL + string(name)


def data(theirs: int, piece: bytes) -> bytes:
    """A piece of standard input."""
    return _DATA + u32(theirs) + string(piece)


def eof(theirs: int) -> bytes:
    """The end of standard input."""
    return _EOF + u32(theirs)


def adjust(theirs: int, size: int) -> bytes:
    """Let the peer send so many bytes more."""
    return _ADJUST + u32(theirs) + u32(size)


def failure(theirs: int) -> bytes:
    """No to a request."""
    return _FAILURE + u32(theirs)


def close(theirs: int) -> bytes:
    """The end of the channel."""
    return _CLOSE + u32(theirs)
