# SPDX-License-Identifier: Apache-2.0
"""Whether a connection still stands: one in use is asked now and then, one that rested before it is used again.

What is asked is OpenSSH's own `keepalive@openssh.com`; a refusal is an answer. `Pulse` belongs to the watcher's thread;
`Doubt` is made by a dispatcher, settled in pool threads, and answered by the connection's thread; its lock guards who
asks. Nothing here costs a packet or a command anything: bytes are counted by the wire, and looked at per beat.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

from ctask.standstill import awake
from ctask.transports.ssh.mapping import Silence

__all__ = ["ANSWER", "SILENCES", "STALE", "Doubt", "Pulse"]

#: Seconds of rest after which a connection is asked before it is used.
STALE = 15.0
#: Seconds that it may take to answer then.
ANSWER = 2.0
#: Intervals without a sign of life after which a connection in use is lost.
SILENCES = 3


class _Wire(Protocol):
    received: int
    pushed: int

    @property
    def waiting(self) -> int: ...


class _Link(Protocol):
    dead: bool

    @property
    def wire(self) -> _Wire: ...

    def ask(self, answered: Callable[[], None]) -> None: ...

    def give_up(self, why: Silence) -> None: ...


class Pulse:
    """What was seen of one connection from beat to beat.

    Silences are counted, and not the time: where this process itself stood still (a suspended laptop, a program that
    held the interpreter), one beat comes late, and no node is blamed.

    Any byte is a sign of life. What is to be told apart is a node that says nothing (it is frozen, or the way is cut)
    from one that takes nothing: that may go on talking for ever, and never hear that it should stop.

    Attributes:
        at: when it beat last.
    """

    __slots__ = ("_asked_at", "_pushed", "_received", "_silences", "_stuck", "_stuck_at", "at")

    def __init__(self) -> None:
        self.at = time.monotonic()
        self._received = self._pushed = -1
        self._silences = self._stuck = 0
        #: when the first question that is not answered was asked; 0: none is open
        self._asked_at = 0.0
        self._stuck_at = 0.0

    def beat(self, link: _Link, now: float, interval: float, *, busy: bool) -> None:
        """Count silences, and ask again; give the connection up after `SILENCES` of them. The watcher; never waits.

        Called more often than every `interval` seconds, it does nothing.
        """
        if now < self.at + interval:
            return
        self.at = now
        wire = link.wire
        received, pushed, waiting = wire.received, wire.pushed, wire.waiting
        if not busy or received != self._received:
            self._silences, self._asked_at = 0, 0.0
        elif self._asked_at:
            self._silences += 1
        if not waiting or pushed != self._pushed:
            self._stuck, self._stuck_at = 0, now
        else:
            self._stuck += 1
        self._received, self._pushed = received, pushed
        if self._silences >= SILENCES:
            link.give_up(Silence(f"no sign of life, nor an answer to keepalives, for {now - self._asked_at:.3g} s"))
        elif self._stuck >= SILENCES:
            link.give_up(Silence(f"the node has taken nothing that was sent to it for {now - self._stuck_at:.3g} s"))
        elif busy:
            self._asked_at = self._asked_at or now
            link.ask(_nothing)


class Doubt:
    """Whether a connection that rested still stands, asked once for all who want to use it."""

    def __init__(self, link: _Link) -> None:
        self._link = link
        self._lock = threading.Lock()
        self._until = 0.0
        self._received = 0
        self._answered = threading.Event()

    def stands(self) -> bool:
        """Return whether it answers, within `ANSWER` seconds from the first call; else it is given up. Pool."""
        with self._lock:
            first = not self._until
            if first:
                self._until = awake() + ANSWER
                self._received = self._link.wire.received
        if first:
            self._link.ask(self._answered.set)
        answered = False
        while not answered and (left := self._until - awake()) > 0:  # again where this process stood still
            answered = self._answered.wait(left)
        if self._link.dead:
            return False
        if answered or self._link.wire.received != self._received:
            return True
        self._link.give_up(Silence(f"no answer for {ANSWER:g} s from a kept connection"))
        return False


def _nothing() -> None:
    """An answer is a sign of life, and those are counted as bytes."""
