# SPDX-License-Identifier: Apache-2.0
"""The words in which a test tells a hostile server what to do, and in which that server tells what it saw.

Scripts and steps are frozen, and may be shared between threads; a `Seen` is appended to by the threads of its
server and read by the test.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Literal

__all__ = [
    "Await",
    "Close",
    "Eof",
    "Err",
    "HangUp",
    "OpenToClient",
    "Out",
    "Pause",
    "Raw",
    "Reply",
    "Script",
    "Seen",
    "Signal",
    "Status",
    "Step",
]

#: What may become of a request: "silent" is no answer at all, "hang_up" the end of the connection.
Reply = Literal["accept", "refuse", "hang_up", "silent"]


@dataclass(frozen=True, slots=True)
class Out:
    """Write to the command's standard output."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Err:
    """Write to the command's standard error."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Eof:
    """Say that no more output comes."""


@dataclass(frozen=True, slots=True)
class Status:
    """Send an exit-status."""

    code: int


@dataclass(frozen=True, slots=True)
class Signal:
    """Send an exit-signal; the name without SIG, or any other text."""

    name: str
    core: bool = False
    message: str = ""


@dataclass(frozen=True, slots=True)
class Close:
    """Close the channel."""


@dataclass(frozen=True, slots=True)
class HangUp:
    """End the whole connection, in order or with a reset."""

    reset: bool = False


@dataclass(frozen=True, slots=True)
class Pause:
    """Do nothing for that many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Await:
    """Do nothing until the test sets this event."""

    event: threading.Event


@dataclass(frozen=True, slots=True)
class OpenToClient:
    """Ask the client for a channel of this kind; `Seen.answers` tells what it said."""

    kind: str  # "x11", "forwarded-tcpip", "auth-agent@openssh.com" or any other


@dataclass(frozen=True, slots=True)
class Raw:
    """Send this message as it stands, so many times. The first channel of a connection has number 0 at the client."""

    payload: bytes
    count: int = 1


Step = Raw | Out | Err | Eof | Status | Signal | Close | HangUp | Pause | Await | OpenToClient


@dataclass(frozen=True, slots=True)
class Script:
    """How one connection goes.

    `on_auth`, `on_open` and `on_exec` are the answers to a login, a channel-open and an exec request; for
    `on_open` a number is the reason code of its refusal (1 prohibited, 4 resource shortage). A command that
    is accepted plays its `steps`, after which nothing comes of itself. The first `honest` channels are each
    a command that ends well, whatever the rest says. `noise` is how many IGNORE and DEBUG messages come
    before the first answer to a login, `noise_in_kex` how many in the middle of the key exchange.
    `raw` are messages that are sent as they stand, each with its moment: `keys` (in the middle of the key exchange),
    `service` (after it), `login` (before the answer to the first login), `open` (before the answer to the first open).
    `rekeys` is how often the server asks for new keys once a command runs, each time as soon as it has them; -1: it
    never gives any.
    """

    steps: tuple[Step, ...] = (Status(0), Eof(), Close())
    on_auth: Reply = "accept"
    on_open: Reply | int = "accept"
    on_exec: Reply = "accept"
    honest: int = 0
    noise: int = 0
    noise_in_kex: int = 0
    raw: tuple[tuple[str, Raw], ...] = ()
    rekeys: int = 0


@dataclass(slots=True)
class Seen:
    """What a server saw, in order of arrival."""

    #: (method, user, fingerprint or ""): every attempt to log in, a key's question and its signature each.
    auths: list[tuple[str, str, str]] = field(default_factory=list)
    #: The kinds of the channels that the client asked for.
    opens: list[str] = field(default_factory=list)
    #: The commands, also of refused and unanswered requests.
    commands: list[bytes] = field(default_factory=list)
    #: The names of all other channel requests ("pty-req", "env", "signal").
    requests: list[str] = field(default_factory=list)
    #: How often keys were changed, the first time included.
    keys: int = 0
    #: (kind, "accepted" or the reason code of the refusal) of each channel that was asked of the client.
    answers: list[tuple[str, str | int]] = field(default_factory=list)
