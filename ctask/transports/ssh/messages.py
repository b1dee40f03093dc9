# SPDX-License-Identifier: Apache-2.0
"""The messages of a session's channel that we send (RFC 4254), packed. Pure functions."""

from __future__ import annotations

from paramiko.common import (
    MSG_CHANNEL_CLOSE,
    MSG_CHANNEL_DATA,
    MSG_CHANNEL_EOF,
    MSG_CHANNEL_FAILURE,
    MSG_CHANNEL_OPEN,
    MSG_CHANNEL_REQUEST,
    MSG_CHANNEL_WINDOW_ADJUST,
)

__all__ = [
    "ERROR_OUTPUT",
    "PACKET",
    "adjust",
    "close",
    "data",
    "eof",
    "execute",
    "failure",
    "open_session",
    "signal",
    "terminal",
]

#: The largest packet that we take, which is also the most that every peer takes (RFC 4253 6.1).
PACKET = 32_768


def _u32(number: int) -> bytes:
    return number.to_bytes(4, "big")


def _string(text: bytes) -> bytes:
    return len(text).to_bytes(4, "big") + text


#: RFC 4254 5.2: the one kind of extended data there is
ERROR_OUTPUT = _u32(1)
_OPEN = bytes((MSG_CHANNEL_OPEN,)) + _string(b"session")
_REQUEST = bytes((MSG_CHANNEL_REQUEST,))
_EXEC = _string(b"exec") + b"\1"
_SIGNAL = _string(b"signal") + b"\1"
#: 80 columns, 24 lines, no pixels, no modes; "dumb", so that programs send no colours and no cursor movements
_PTY = _string(b"pty-req") + b"\1" + _string(b"dumb") + _u32(80) + _u32(24) + _u32(0) * 2 + _string(b"\0")
_EOF = bytes((MSG_CHANNEL_EOF,))
_CLOSE = bytes((MSG_CHANNEL_CLOSE,))
_FAILURE = bytes((MSG_CHANNEL_FAILURE,))
_ADJUST = bytes((MSG_CHANNEL_WINDOW_ADJUST,))
_DATA = bytes((MSG_CHANNEL_DATA,))


def open_session(ours: int, window: int) -> bytes:
    """Open a session, numbered `ours` here, on which the peer may send `window` bytes ahead."""
    return _OPEN + _u32(ours) + _u32(window) + _u32(PACKET)


def execute(theirs: int, command: bytes) -> bytes:
    """Run a command, and answer whether."""
    return _REQUEST + _u32(theirs) + _EXEC + _string(command)


def terminal(theirs: int) -> bytes:
    """Give the command that follows a terminal, and answer whether."""
    return _REQUEST + _u32(theirs) + _PTY


def signal(theirs: int, name: bytes) -> bytes:
    """Signal the command (6.9), and answer whether."""
    return _REQUEST + _u32(theirs) + _SIGNAL + _string(name)


def data(theirs: int, piece: bytes) -> bytes:
    """A piece of standard input."""
    return _DATA + _u32(theirs) + _string(piece)


def eof(theirs: int) -> bytes:
    """The end of standard input."""
    return _EOF + _u32(theirs)


def adjust(theirs: int, size: int) -> bytes:
    """Let the peer send so many bytes more."""
    return _ADJUST + _u32(theirs) + _u32(size)


def failure(theirs: int) -> bytes:
    """No to a request."""
    return _FAILURE + _u32(theirs)


def close(theirs: int) -> bytes:
    """The end of the channel."""
    return _CLOSE + _u32(theirs)
