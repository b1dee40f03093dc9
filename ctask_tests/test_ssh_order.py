# SPDX-License-Identifier: Apache-2.0
"""What a node sends twice, too early or too small, and any bytes in each phase; what the reader does beside a re-key.

Runs in the thread of pytest; the links and sessions are real, their nodes are the test's own end of a socket pair.
"""

from __future__ import annotations

import os
import random
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from paramiko.kex_group14 import KexGroup14SHA256
from paramiko.ssh_exception import SSHException

from ctask.options import GROUP_EXCHANGE, Command
from ctask.transports.ssh import messages
from ctask.transports.ssh.alive import ANSWER
from ctask.transports.ssh.channel import SshSession
from ctask.transports.ssh.exchange import ALLOWED, Exchange
from ctask.transports.ssh.fields import Fields
from ctask.transports.ssh.keyexchange import METHODS, verified_key
from ctask.transports.ssh.packets import _KINDS as KINDS
from ctask.transports.ssh.packets import WirePacketizer, differences
from ctask.transports.ssh.reader import Reader
from ctask.transports.ssh.settling import Settling
from ctask.transports.ssh.transport import Link
from ctask.transports.ssh.wire import Wire
from ctask_tests.fix_hostile import Close, Eof, HostileFactory, Out, Raw, Script, Status
from ctask_tests.fix_leaks import wait_until
from ctask_tests.fix_sshd import SshdFactory
from ctask_tests.ssh_sink import RecordingSink, connected, run, target_for

FIRST = messages.u32(0)
CONFIRMED = b"\x5b" + FIRST + messages.u32(7) + messages.u32(1 << 20) + messages.u32(32_768)
REFUSED = b"\x5c" + FIRST + messages.u32(4) + messages.string(b"") * 2
ASKS = b"\x62" + FIRST + messages.string(b"keepalive@openssh.com") + b"\1"


class Lab:
    """A link in some phase, and what it sent; once it is open, one session whose opening was sent."""

    def __init__(self, phase: str = "open") -> None:
        ours, self.there = socket.socketpair()
        self.link = Link(Wire(ours), "SSH-2.0-x", "test", ("ssh-ed25519",))
        self.link.phase = phase
        self.link.initial_kex_done = phase != "keys"
        self.link.packetizer.sequence = 5
        self.sent: list[bytes] = []
        self.link.packetizer.send_message = lambda packet: self.sent.append(packet.asbytes())
        self.sink = RecordingSink()
        if phase == "open":
            self.link.clear_to_send.set()
            connection = cast("Any", SimpleNamespace(link=self.link, guard=threading.Lock()))
            self.session = SshSession(connection, Command(line=b"x", stdin=True), self.sink)
            self.session.start()

    def take(self, *payloads: bytes) -> str:
        """Deal with messages; returns why they ended the connection, or ""."""
        for payload in payloads:
            if not self.link._guarded(lambda payload=payload: self.link._dispatch(payload)):  # type: ignore[misc]
                assert isinstance(self.link.saved_exception, (SSHException, EOFError)), self.link.saved_exception
                return str(self.link.saved_exception)
        return ""

    def rekey(self) -> None:
        """Begin to change keys."""
        self.link.clear_to_send.clear()

    def rekeyed(self) -> str:
        """End it; returns why what was parked ended the connection, or ""."""
        self.link.clear_to_send.set()
        parked, self.link._parked = list(self.link._parked), type(self.link._parked)()

        def play() -> None:
            for what in parked:
                what()

        return "" if self.link._guarded(play) else str(self.link.saved_exception)

    def kinds(self) -> list[int]:
        return [payload[0] for payload in self.sent]

    def close(self) -> None:
        self.link.abandon()
        self.there.close()


@pytest.fixture
def lab() -> Iterator[Lab]:
    lab = Lab()
    yield lab
    lab.close()


# -- a session's messages in a wrong order ---------------------------------------------------------------------------


def test_a_command_that_runs_is_not_refused_afterwards(hostile: HostileFactory) -> None:
    server = hostile(Script(steps=(Out(b"hi\n"), Raw(REFUSED), Status(0), Eof(), Close())))
    with connected(target_for(server.options(), server.address)) as connection:
        sink = run(connection, b"x")
    assert "answered twice to the opening of a session" in str(sink.error), "and nothing is said of a refusal"


@pytest.mark.parametrize("second", [CONFIRMED, REFUSED])
@pytest.mark.parametrize("first", [CONFIRMED, REFUSED])
def test_an_opening_is_answered_once_in_a_rekey_as_well(lab: Lab, first: bytes, second: bytes) -> None:
    lab.rekey()
    assert lab.take(first, second) == ""
    assert "answered twice" in lab.rekeyed()
    assert lab.kinds().count(98) == (first == CONFIRMED), "a session that was refused runs no command"


def test_room_that_is_given_before_the_confirmation_is_dealt_with_is_not_lost(lab: Lab) -> None:
    lab.rekey()
    confirmed = b"\x5b" + FIRST + messages.u32(7) + messages.u32(0) + messages.u32(32_768)
    assert lab.take(confirmed, b"\x5d" + FIRST + messages.u32(1000)) == ""
    assert lab.rekeyed() == ""
    assert lab.session.write(memoryview(bytes(5000))) == 1000


def test_a_request_is_answered_after_the_confirmation_that_waits(lab: Lab) -> None:
    lab.rekey()
    assert lab.take(CONFIRMED, ASKS) == ""
    assert lab.rekeyed() == ""
    assert lab.kinds() == [90, 98, 100]


@pytest.mark.parametrize("early", [ASKS, b"\x61" + FIRST, b"\x5e" + FIRST + messages.string(b"x")])
def test_what_comes_before_the_confirmation_ends_the_connection_in_words(lab: Lab, early: bytes) -> None:
    why = lab.take(early)
    assert "session" in why or "command that was not sent" in why


@pytest.mark.parametrize("size", [0, 1, 255])
def test_packets_too_small_to_be_sent_are_not_made(lab: Lab, size: int) -> None:
    # Each costs the same, and the reader sends some itself.
    confirmed = b"\x5b" + FIRST + messages.u32(7) + messages.u32(1 << 30) + messages.u32(size)
    assert f"at most {size} bytes" in lab.take(confirmed)


# -- any bytes -------------------------------------------------------------------------------------------------------


def _body(seeded: random.Random) -> bytes:
    fields: list[Callable[[], bytes]] = [
        lambda: messages.u32(seeded.choice([0, 1, 2, 77, 65_536, 1 << 31, (1 << 32) - 1])),
        lambda: bytes((seeded.randrange(3),)),
        lambda: messages.string(seeded.choice([b"", b"exit-status", b"exit-signal", b"\xff\xfe", bytes(300)])),
        lambda: seeded.randbytes(seeded.randrange(20)),
    ]
    body = b"".join(seeded.choice(fields)() for _ in range(seeded.randrange(8)))
    return body[: seeded.randrange(len(body) + 1)] if seeded.random() < 0.2 else body


@pytest.mark.parametrize("phase", sorted(ALLOWED))
def test_any_bytes_are_dealt_with_or_told_in_words(phase: str) -> None:
    for seed in range(300):
        seeded = random.Random(seed)
        lab = Lab(phase)
        for _ in range(8):
            kind = seeded.choice([*ALLOWED[phase], 1, 2, 3, 4, seeded.randrange(256)])
            number = messages.u32(seeded.choice([0, 0, 0, 1])) if 91 <= kind <= 100 else b""
            # NEWKEYS and KEXINIT have tests of their own.
            if kind not in (20, 21) and lab.take(bytes((kind,)) + number + _body(seeded)):
                break
            if phase == "open" and seeded.random() < 0.2:
                lab.rekey()
            elif lab.link._parked and lab.rekeyed():
                break
        lab.close()
        assert not lab.sink.problems, (seed, lab.sink.problems)
        assert lab.sink.events.count("ended") == (phase == "open"), seed


def test_a_packet_with_more_padding_than_it_has_is_refused() -> None:
    ours, theirs = socket.socketpair()
    for padding in (12, 13, 14, 255):
        wire = Wire(ours)
        packetizer = WirePacketizer(wire)
        wire.ahead = messages.u32(12) + bytes((padding,)) + b"\x02" + bytes(10)
        with pytest.raises(SSHException, match="without a payload"):
            packetizer.next_payload()
    ours.close()
    theirs.close()


# -- key exchange: what is refused is told as what it is -------------------------------------------------------------

PRIME = KexGroup14SHA256.P


@pytest.mark.parametrize(
    ("modulus", "generator", "why"),
    [
        (1 << 8191 | 1, 2, "of 8192 bits; ctask takes 2048 to 4096"),
        (1 << 2999, 2, "keeps no secret"),
        (PRIME, 0, "keeps no secret"),
        (PRIME, 1, "keeps no secret"),
        (PRIME, PRIME - 1, "keeps no secret"),
    ],
)
def test_a_group_that_is_none_is_refused(modulus: int, generator: int, why: str) -> None:
    exchange = METHODS[GROUP_EXCHANGE](None)
    with pytest.raises(SSHException, match=why):
        exchange.parse_next(31, Fields(b"\x1f" + messages.mpint(modulus) + messages.mpint(generator), "a group"))


@pytest.mark.parametrize(
    ("bits", "exponent", "why"), [(512, 3, "has 512 bits; ctask takes"), (2048, 1 << 64, "above 64")]
)
def test_an_rsa_host_key_that_is_not_taken_is_told_by_what_is_wrong(bits: int, exponent: int, why: str) -> None:
    key = messages.string(b"ssh-rsa") + messages.mpint(exponent) + messages.mpint(1 << bits - 1 | 1)
    with pytest.raises(SSHException, match=why):
        verified_key("rsa-sha2-512", key, b"", b"")


def test_a_server_that_offers_nothing_is_told_so() -> None:
    theirs = dict.fromkeys(KINDS, ())
    assert differences(dict.fromkeys(KINDS, ("x",)), theirs).startswith(
        "no common key exchange algorithm: the server has nothing; ctask has x"
    )


@pytest.mark.parametrize("limit", ["16K", "64K", "1M"])
def test_a_busy_connection_of_a_server_that_changes_keys_often_does_not_stand_still(
    sshd_factory: SshdFactory, limit: str
) -> None:
    server = sshd_factory(f"RekeyLimit {limit}")
    with connected(target_for(server.options(), server.address(1))) as connection:
        connection.prepare(Command(line=b"head -c 1500000 /dev/zero; exit 3"), sink := RecordingSink()).start()
        assert (sink.wait(8).status, sink.size) == (3, 1_500_000)
        assert run(connection, b"exit 4").status == 4


def test_new_keys_are_earned_by_time_and_by_bytes(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[bytes] = []
    held: list[float] = []
    monkeypatch.setattr(Exchange, "_on_kexinit", lambda self, payload: given.append(payload))
    monkeypatch.setattr(lab.link, "_hold", lambda payload, seconds: held.append(seconds))
    monkeypatch.setattr(lab.link, "_reader", object())
    clock = [1000.0]
    monkeypatch.setattr(sys.modules[Link.__module__], "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def ask(*, bytes_moved: int = 0, seconds: float = 0.0) -> tuple[int, int]:
        lab.link._keys_at, lab.link.packetizer._bytes = clock[0], 1000 + bytes_moved
        clock[0] += seconds
        given.clear()
        held.clear()
        lab.link._on_kexinit(bytes(1000))  # which came as well, and earns nothing
        return len(given), len(held)

    assert [ask() for _ in range(10)] == [(1, 0)] * 8 + [(0, 1)] * 2
    assert held[0] < ANSWER + 0.1, "a question that waits behind it is answered in time"
    assert [ask(seconds=2.0), ask(), ask()] == [(1, 0), (1, 0), (0, 1)]
    assert [ask(bytes_moved=8192), ask(), ask()] == [(1, 0), (1, 0), (0, 1)]
    assert ask(bytes_moved=4000) == (0, 1)


# -- the reader ------------------------------------------------------------------------------------------------------


class _Paused:
    """A connection that is paused by its first packet, as a re-key does."""

    def __init__(self) -> None:
        self.here, self.there = socket.socketpair()
        self.reader: Reader | None = None
        self.paused = threading.Event()
        self.ended = threading.Event()
        self.taken = 0

    def adopted(self, reader: Reader) -> None:
        self.reader = reader

    def readable(self) -> bool:
        assert self.reader is not None
        self.taken += len(self.here.recv(100))
        if not self.paused.is_set():
            self.reader.pause(self.here.fileno())
            self.paused.set()
        return False

    def go_on(self) -> None:
        assert self.reader is not None
        self.reader.resume(self.here.fileno(), self, behind=False)

    def writable(self) -> None:
        pass

    def hung_up(self) -> None:
        self.ended.set()

    def abandon(self) -> None:
        pass


@pytest.fixture
def paused() -> Iterator[_Paused]:
    link = _Paused()
    reader = Reader()
    reader.add(link.here.fileno(), link)
    link.there.send(b"x")
    assert link.paused.wait(5)
    yield link
    reader.close()
    link.here.close()
    link.there.close()


def test_the_end_of_a_paused_connection_is_told_beside_a_question_to_the_reader(paused: _Paused) -> None:
    reader = paused.reader
    assert reader is not None
    looked: list[set[int]] = []

    def look() -> None:
        paused.here.shutdown(socket.SHUT_RDWR)
        looked.append(reader.ready())

    reader.call(look)  # the question sees the end before the reader does
    assert paused.ended.wait(5)
    assert looked


def test_what_lies_behind_a_rekey_has_come_as_well(paused: _Paused) -> None:
    reader = paused.reader
    assert reader is not None
    paused.there.send(b"the exit status")
    answered: list[int] = []
    settling = Settling(lambda: answered.append(paused.taken))
    reader.call(paused.go_on)
    reader.add(settling.fd, settling)
    wait_until(lambda: bool(answered), what="the answer")
    assert answered == [16]


def test_a_call_after_the_end_writes_to_no_descriptor_of_others() -> None:
    reader = Reader()
    wake = reader._wake
    assert reader.close()
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.dup2(writing, wake)  # the number's next owner
    reader.call(lambda: None)
    with pytest.raises(BlockingIOError):
        os.read(reading, 100)
    for fd in {reading, writing, wake}:
        os.close(fd)
