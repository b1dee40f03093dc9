# SPDX-License-Identifier: Apache-2.0
"""What a fault proxy does to one direction of a connection: its rules, and the lane on which they act.

Runs in the thread of its proxy alone, which owns both sockets; rules are frozen, and may be shared.
"""

from __future__ import annotations

import contextlib
import fcntl
import random
import socket
import struct
import sys
import threading
from collections import deque
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "After",
    "AtBytes",
    "Delay",
    "Do",
    "Drip",
    "Drop",
    "Fin",
    "HalfClose",
    "Inject",
    "Lane",
    "OnEvent",
    "OnMatch",
    "OnMessage",
    "Resume",
    "Rst",
    "Rule",
    "Slice",
    "Stall",
    "Throttle",
    "When",
    "Xor",
]

#: A lane that holds more than this reads no more: the fault is on the wire, and a wire has no depth.
ENOUGH = 256 * 1024

#: How often that is looked at which no socket tells of: an armed `OnEvent`, the kernel's queue at a reset.
TICK = 0.005

#: The ioctl (Linux) that tells how many bytes of a TCP socket the kernel has not yet sent.
SIOCOUTQNSD = 0x894B

#: The beginning of an SSH packet: its length (less this field), its padding's length, its message's number.
HEADER = struct.Struct(">IBB")

#: The number of SSH_MSG_NEWKEYS; what follows it is encrypted.
NEWKEYS = 21


@dataclass(frozen=True, slots=True)
class AtBytes:
    """Once that many bytes of the direction have passed.

    0 is as soon as the connection stands, and a reset then may come so early that the client's connect() fails:
    to break what stands, stall at 0 and reset by `After` or `OnEvent`.
    """

    count: int


@dataclass(frozen=True, slots=True)
class OnMatch:
    """Just after these bytes have passed."""

    pattern: bytes


@dataclass(frozen=True, slots=True)
class OnMessage:
    """Just before (or after) the first SSH packet of this number; plaintext ones, up to NEWKEYS (21)."""

    number: int
    after: bool = False


@dataclass(frozen=True, slots=True)
class After:
    """That many seconds after the connection was accepted, wherever its stream stands."""

    seconds: float


@dataclass(frozen=True, slots=True)
class OnEvent:
    """When the test sets this event, wherever the stream stands."""

    event: threading.Event


@dataclass(frozen=True, slots=True)
class Rst:
    """Reset the connection on both sides."""


@dataclass(frozen=True, slots=True)
class Fin:
    """End the connection in order on both sides."""


@dataclass(frozen=True, slots=True)
class HalfClose:
    """End this direction in order; the other goes on."""


@dataclass(frozen=True, slots=True)
class Stall:
    """Let nothing more through, and keep the connection."""


@dataclass(frozen=True, slots=True)
class Resume:
    """End a stall; what was held goes on its way."""


@dataclass(frozen=True, slots=True)
class Delay:
    """Hold everything from here on for that many seconds (a longer way, not a slower one).

    `jitter`: each piece for up to that many more, drawn for it; the order stays.
    """

    seconds: float
    jitter: float = 0.0


@dataclass(frozen=True, slots=True)
class Throttle:
    """From here on, at most that many bytes per second."""

    rate: float


@dataclass(frozen=True, slots=True)
class Drip:
    """From here on, one byte per interval."""

    interval: float


@dataclass(frozen=True, slots=True)
class Slice:
    """From here on, at most that many bytes per segment."""

    size: int


@dataclass(frozen=True, slots=True)
class Xor:
    """Corrupt: flip all bits of the byte that comes `offset` bytes after this point."""

    offset: int = 0


@dataclass(frozen=True, slots=True)
class Drop:
    """Lose the next so many bytes."""

    count: int


@dataclass(frozen=True, slots=True)
class Inject:
    """Put these bytes into the stream at this point."""

    data: bytes


When = AtBytes | OnMatch | OnMessage | After | OnEvent
Do = Rst | Fin | HalfClose | Stall | Resume | Delay | Throttle | Drip | Slice | Xor | Drop | Inject


@dataclass(frozen=True, slots=True)
class Rule:
    """Do this once in one direction ("up": client to server) of each connection, or of the n-th (from 0)."""

    direction: Literal["up", "down"]
    when: When
    do: Do
    only: int | None = None


class Lane:
    """One direction: what came in, where the rules cut it, what goes out and when."""

    def __init__(
        self, source: socket.socket, target: socket.socket, rules: list[Rule], born: float, dice: random.Random
    ) -> None:
        self.source = source
        self.target = target
        self.finished = False  # the source has ended and everything was passed on, the end too
        self.struck = False  # a rule has acted
        self._dice = dice
        self._rules = list(rules)
        self._born = born
        self._pending = bytearray()  # not yet past the rules
        self._position = 0  # how many bytes are past them
        self._tail = b""  # the last of those, for a pattern that lies across two reads
        self._packets = _Packets() if any(isinstance(rule.when, OnMessage) for rule in rules) else None
        self._out: deque[tuple[float, bytes]] = deque()  # (not before, bytes)
        self._ended = False  # the source has said its end
        self._discarding = False  # the target was told the end: what still comes is lost
        self._stalled = False
        self._last: Rst | Fin | HalfClose | None = None  # to be done once everything before it is out
        self._at_once = False  # ... or without waiting for that
        self._delay = Delay(0.0)
        self._rate = 0.0
        self._interval = 0.0
        self._size = 0
        self._not_before = 0.0
        self._flips: list[int] = []
        self._dropping = 0

    @property
    def wants_input(self) -> bool:
        if self._ended:
            return False
        held = len(self._pending) + sum(len(data) for _, data in self._out)
        return self._discarding or (not self._stalled and self._last is None and held < ENOUGH)

    def wants_output(self, now: float) -> bool:
        return bool(self._out) and now >= max(self._out[0][0], self._not_before)

    def next_time(self, now: float) -> float:
        """When this lane has something to do that no socket tells of."""
        times = [float("inf") if self._last is None else now + TICK]
        if self._out and not self.wants_output(now):
            times.append(max(self._out[0][0], self._not_before))
        for rule in self._rules:
            if isinstance(rule.when, After):
                times.append(self._born + rule.when.seconds)
            elif isinstance(rule.when, OnEvent):
                times.append(now + TICK)
        return min(times)

    def receive(self) -> None:
        try:
            data = self.source.recv(65536)
        except BlockingIOError:
            return
        if not data:
            self._ended = True
        elif not self._discarding:
            self._pending += data
            if self._packets is not None:
                self._packets.feed(data)

    def advance(self, now: float) -> None:
        """Pass on what the rules let through, stopping at each point where one of them acts."""
        for rule in list(self._rules):
            if _is_due(rule.when, now - self._born):
                self._rules.remove(rule)
                self._act(rule.do, at_once=True)
        while not self._stalled and self._last is None:
            stop, acting = self._next_stop()
            self._pass_on(stop - self._position, now)
            if acting is None:
                break
            self._rules.remove(acting)
            self._act(acting.do, at_once=False)

    def flush(self, now: float) -> None:
        if self.wants_output(now):
            due, data = self._out.popleft()
            size = 1 if self._interval else self._size or len(data)
            if self._rate:
                size = min(size, max(1, round(self._rate * TICK)))
            try:
                sent = self.target.send(data[:size])
            except BlockingIOError:
                sent = 0
            if sent < len(data):
                self._out.appendleft((due, data[sent:]))
            self._not_before = now + self._interval
            if self._rate:
                self._not_before += sent / self._rate
        if isinstance(self._last, HalfClose) and not self._out:
            self.end()
        if self._ended and not (self._pending or self._out or self._stalled or self.finished):
            self.finished = True
            if not self._discarding:
                self.end()

    def verdict(self) -> type[Rst | Fin] | None:
        """What a rule of this lane wants done with the whole connection now."""
        if self._out or not isinstance(self._last, Rst | Fin):
            return None
        # A reset throws away what the kernel still holds, as it does until small segments are acknowledged.
        if not self._at_once and isinstance(self._last, Rst) and _unsent(self.target):
            return None
        return type(self._last)

    def end(self) -> None:
        """Tell the target that nothing more comes, and lose what still does.

        (Closing in its place would send a reset, as long as something is unread.)
        """
        if not self._discarding:
            self._discarding = True
            self._pending.clear()
            self._out.clear()
            with contextlib.suppress(OSError):
                self.target.shutdown(socket.SHUT_WR)
        self._stalled = False
        self._last = None
        self._rules = []

    def _next_stop(self) -> tuple[int, Rule | None]:
        """Where in the stream the next rule acts, or how far everything may pass."""
        limit = self._position + len(self._pending)
        best, acting = limit, None
        for rule in self._rules:
            at = self._locate(rule.when)
            if at is not None and (at < best or (at == best and acting is None)):
                best, acting = at, rule
        if acting is None and self._packets is not None and not self._ended:
            best = min(best, self._packets.undecided)
        return max(best, self._position), acting

    def _locate(self, when: When) -> int | None:
        match when:
            case AtBytes(count):
                return count
            case OnMatch(pattern):
                index = (self._tail + self._pending).find(pattern)
                return None if index < 0 else self._position - len(self._tail) + index + len(pattern)
            case OnMessage(number, after) if self._packets is not None:
                span = self._packets.found.get(number)
                return None if span is None else span[after]
        return None

    def _pass_on(self, count: int, now: float) -> None:
        data = self._pending[:count]
        del self._pending[:count]
        for at in [at for at in self._flips if 0 <= at - self._position < len(data)]:
            data[at - self._position] ^= 0xFF
        self._position += len(data)
        self._tail = (self._tail + data)[-256:]
        lost = min(self._dropping, len(data))
        self._dropping -= lost
        if len(data) > lost:
            held = self._delay.seconds + self._delay.jitter * self._dice.random()
            self._out.append((now + held, bytes(data[lost:])))

    def _act(self, do: Do, *, at_once: bool) -> None:
        self.struck = True
        match do:
            case Rst() | Fin() | HalfClose():
                self._last = do
                self._at_once = at_once
                if at_once:  # by the clock or the test
                    self._out.clear()
            case Stall():
                self._stalled = True
            case Resume():
                self._stalled = False
            case Delay():
                self._delay = do
            case Throttle(rate):
                self._rate = rate
            case Drip(interval):
                self._interval = interval
            case Slice(size):
                self._size = size
            case Xor(offset):
                self._flips.append(self._position + offset)
            case Drop(count):
                self._dropping += count
            case Inject(data):
                self._out.append((0.0, data))


class _Packets:
    """The packets of a plaintext SSH stream: banner lines, then length-prefixed packets up to NEWKEYS."""

    def __init__(self) -> None:
        self.found: dict[int, tuple[int, int]] = {}  # number: (start, end) of its first packet
        self._phase: Literal["banner", "packets", "encrypted"] = "banner"
        self._unread = bytearray()  # the received part of the line or packet that begins at `_next`
        self._next = 0

    @property
    def undecided(self) -> int:
        """How far the stream may pass before more of it must be seen: not into a packet of unknown number."""
        return self._next if self._phase == "packets" and len(self._unread) < HEADER.size else sys.maxsize

    def feed(self, data: bytes) -> None:
        if self._phase == "encrypted":
            return
        self._unread += data
        while size := self._measure():
            del self._unread[:size]
            self._next += size

    def _measure(self) -> int:
        """The size of the line or packet at `_next`, or 0 while it is not all there."""
        if self._phase == "banner":
            size = self._unread.find(b"\n") + 1
            if size and self._unread.startswith(b"SSH-"):
                self._phase = "packets"
            return size
        if self._phase == "encrypted" or len(self._unread) < HEADER.size:
            return 0
        length, _, number = HEADER.unpack_from(self._unread)
        size = 4 + int(length)
        self.found.setdefault(number, (self._next, self._next + size))
        if len(self._unread) < size:
            return 0
        if number == NEWKEYS:
            self._phase = "encrypted"
        return size


def _unsent(sock: socket.socket) -> bool:
    return any(fcntl.ioctl(sock, SIOCOUTQNSD, bytes(4)))


def _is_due(when: When, age: float) -> bool:
    match when:
        case After(seconds):
            return age >= seconds
        case OnEvent(event):
            return event.is_set()
    return False
