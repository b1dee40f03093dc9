# SPDX-License-Identifier: Apache-2.0
"""The harness itself: the fault proxy and the peers that do not answer.

Runs in the thread of pytest.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple, Self

import pytest

from ctask_tests.fix_leaks import wait_until
from ctask_tests.fix_proxy import (
    GENTLE,
    TOXICS,
    After,
    AtBytes,
    Delay,
    Drip,
    Drop,
    FaultProxy,
    Fin,
    HalfClose,
    Inject,
    Mixture,
    OnEvent,
    OnMatch,
    OnMessage,
    Resume,
    Rst,
    Rule,
    Slice,
    Stall,
    Throttle,
    Xor,
    addresses,
    closed_port,
    deaf,
    silent,
)
from ctask_tests.plain_ssh import ssh

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ctask_tests.fix_proxy import ProxyFactory
    from ctask_tests.fix_sshd import Sshd


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream() as server:
        yield server


class Upstream:
    """A server of one connection, which the test plays by hand."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.2.1", 0))
        self.peers: list[socket.socket] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in (self.listener, *self.peers):
            sock.close()

    @property
    def endpoint(self) -> tuple[str, int]:
        name: tuple[str, int] = self.listener.getsockname()
        return name

    def join(self, proxy: FaultProxy) -> tuple[socket.socket, socket.socket]:
        """Connect through the proxy; return the client's end and the server's."""
        client = socket.create_connection(proxy.endpoint, timeout=5)
        server, _ = self.listener.accept()
        server.settimeout(5)
        self.peers += [client, server]
        return client, server


def read_all(sock: socket.socket) -> bytes:
    """Read to the end, which may be a reset."""
    data = bytearray()
    with suppress(ConnectionResetError):
        while chunk := sock.recv(65536):
            data += chunk
    return bytes(data)


def read_exactly(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        chunk = sock.recv(size - len(data))
        assert chunk, f"ended after {bytes(data)!r}"
        data += chunk
    return bytes(data)


def says_nothing(sock: socket.socket, seconds: float = 0.05) -> bool:
    timeout = sock.gettimeout()
    sock.settimeout(seconds)
    try:
        sock.recv(1)
    except TimeoutError:
        return True
    finally:
        sock.settimeout(timeout)
    return False


def packet(number: int, body: bytes = b"") -> bytes:
    payload = bytes([4, number]) + body + b"pads"
    return len(payload).to_bytes(4, "big") + payload


def test_without_rules_the_proxy_is_a_wire(fault_proxy: ProxyFactory, upstream: Upstream) -> None:
    proxy = fault_proxy(upstream.endpoint)
    client, server = upstream.join(proxy)
    blob = os.urandom(3_000_000)
    sender = threading.Thread(target=server.sendall, args=(blob,))
    sender.start()
    assert read_exactly(client, len(blob)) == blob
    sender.join()
    client.sendall(b"question")
    client.shutdown(socket.SHUT_WR)
    assert read_all(server) == b"question"
    server.sendall(b"answer")  # the other direction outlives the first one's end
    server.close()
    assert read_all(client) == b"answer"
    wait_until(lambda: proxy.live == 0)
    assert proxy.connections == 1


class Row(NamedTuple):
    rules: list[Rule]
    sent: bytes
    arrives: bytes
    ends: str  # "reset", "fin", or "" where the connection stands


BANNER = b"SSH-2.0-x\r\n"
KEXINIT = packet(20, b"a" * 100)
NEWKEYS = packet(21)
ROWS = {
    "reset before the banner": Row(
        [Rule("down", AtBytes(0), Stall()), Rule("down", After(0.05), Rst())], BANNER, b"", "reset"
    ),
    "reset within it": Row([Rule("down", AtBytes(4), Rst())], BANNER, b"SSH-", "reset"),
    "end after it": Row([Rule("down", OnMatch(b"\r\n"), Fin())], BANNER + KEXINIT, BANNER, "fin"),
    "end before a packet": Row(
        [Rule("down", OnMessage(20), Fin())], b"hello\r\n" + BANNER + KEXINIT, b"hello\r\n" + BANNER, "fin"
    ),
    "reset after a packet": Row(
        [Rule("down", OnMessage(21, after=True), Rst())],
        BANNER + KEXINIT + NEWKEYS + b"\0\0\0\1\x14\x15",
        BANNER + KEXINIT + NEWKEYS,
        "reset",
    ),
    "one end": Row([Rule("down", AtBytes(3), HalfClose())], b"abcdef", b"abc", "fin"),
    "stall": Row([Rule("down", OnMessage(20), Stall())], BANNER + KEXINIT, BANNER, ""),
    "stall and resume": Row(
        [Rule("down", AtBytes(3), Stall()), Rule("down", After(0.05), Resume())], b"abcdef", b"abcdef", ""
    ),
    "a wrong byte": Row([Rule("down", AtBytes(2), Xor(1))], b"abcdef", b"abc\x9bef", ""),
    "a gap": Row([Rule("down", AtBytes(2), Drop(3))], b"abcdef", b"abf", ""),
    "too much": Row([Rule("down", AtBytes(2), Inject(b"--"))], b"abcdef", b"ab--cdef", ""),
    "several in a row": Row(
        [Rule("down", OnMatch(b"c"), Inject(b"1")), Rule("down", AtBytes(4), Drop(1))],
        b"abcdef",
        b"abc1df",
        "",
    ),
    "another connection's": Row([Rule("down", AtBytes(2), Rst(), only=1)], b"abcdef", b"abcdef", ""),
    "other direction": Row([Rule("up", AtBytes(1), Rst())], b"abcdef", b"abcdef", ""),
}


@pytest.mark.parametrize("in_pieces", [False, True], ids=["whole", "bytewise"])
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_proxy_rules(fault_proxy: ProxyFactory, upstream: Upstream, row: Row, *, in_pieces: bool) -> None:
    proxy = fault_proxy(upstream.endpoint, *row.rules)
    client, server = upstream.join(proxy)
    server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with suppress(ConnectionError):
        for start in range(0, len(row.sent), 1 if in_pieces else 10_000):
            server.sendall(row.sent[start : start + (1 if in_pieces else 10_000)])
    assert read_exactly(client, len(row.arrives)) == row.arrives
    if row.ends == "reset":
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    elif row.ends == "fin":
        assert client.recv(1) == b""
    else:
        assert says_nothing(client)


def test_proxy_half_close_leaves_the_other_direction(fault_proxy: ProxyFactory, upstream: Upstream) -> None:
    client, server = upstream.join(fault_proxy(upstream.endpoint, Rule("down", AtBytes(0), HalfClose())))
    assert client.recv(1) == b""
    client.sendall(b"still here")
    assert read_exactly(server, 10) == b"still here"


def test_proxy_drips_slices_and_delays(fault_proxy: ProxyFactory, upstream: Upstream) -> None:
    client, server = upstream.join(fault_proxy(upstream.endpoint, Rule("down", AtBytes(2), Drip(0.02))))
    server.sendall(b"abcdef")
    start = time.monotonic()
    assert read_exactly(client, 6) == b"abcdef"
    assert time.monotonic() - start >= 0.06  # the first of four bytes waits for nothing
    client, server = upstream.join(fault_proxy(upstream.endpoint, Rule("down", AtBytes(0), Slice(3))))
    server.sendall(b"abcdef" * 100)
    assert read_exactly(client, 600) == b"abcdef" * 100
    client, server = upstream.join(fault_proxy(upstream.endpoint, Rule("up", AtBytes(0), Delay(0.1))))
    start = time.monotonic()
    client.sendall(b"abc")
    assert read_exactly(server, 3) == b"abc"
    assert time.monotonic() - start >= 0.1


def test_proxy_throttles_and_jitter_keeps_the_order(fault_proxy: ProxyFactory, upstream: Upstream) -> None:
    blob = os.urandom(20_000)
    client, server = upstream.join(fault_proxy(upstream.endpoint, Rule("down", AtBytes(0), Throttle(100_000))))
    start = time.monotonic()
    server.sendall(blob)
    assert read_exactly(client, len(blob)) == blob
    assert time.monotonic() - start >= 0.15
    jitter = Delay(0.01, jitter=0.05)
    client, server = upstream.join(fault_proxy(upstream.endpoint, Rule("down", AtBytes(0), jitter)))
    start = time.monotonic()
    for at in range(0, len(blob), 1_000):
        server.sendall(blob[at : at + 1_000])
    assert read_exactly(client, len(blob)) == blob
    assert time.monotonic() - start >= 0.01


def test_one_proxy_stands_before_many_nodes(fault_proxy: ProxyFactory, sshd: Sshd) -> None:
    def behind(front: str) -> tuple[str, int]:
        return sshd.address(int(front.rpartition(".")[2])), sshd.port

    fronts = addresses(120)
    proxy = fault_proxy(behind, addresses=fronts)
    for front in (fronts[0], fronts[119], fronts[0]):
        with socket.create_connection((front, proxy.port), timeout=5) as client:
            assert client.recv(4) == b"SSH-"
    assert [(passage.address, passage.number) for passage in proxy.passages] == [
        ("127.0.2.1", 0),
        ("127.0.2.120", 0),
        ("127.0.2.1", 1),
    ]
    assert {(passage.fate.name, passage.struck) for passage in proxy.passages} == {("none", False)}


def test_a_fate_hangs_on_the_seed_and_the_connection_alone() -> None:
    def draw(seed: int) -> list[str]:
        mixture = Mixture(seed, {"none": 50, **dict.fromkeys(TOXICS.keys() - {"none"}, 10)})
        return [mixture.fate(front, number).name for front in addresses(120) for number in (0, 1)]

    assert draw(1) == draw(1) != draw(2)
    assert set(draw(1)) == set(TOXICS)
    assert 60 <= Counter(draw(1))["none"] <= 140  # 50 in 120 of 240
    mixture = Mixture(3, {"rst": 1}, span=100)
    assert mixture.fate("127.0.2.9", 1) == mixture.fate("127.0.2.9", 1) != mixture.fate("127.0.2.9", 2)
    assert set(TOXICS) > GENTLE


@pytest.mark.parametrize("toxic", sorted(TOXICS))
def test_each_toxic_does_what_it_is_called(fault_proxy: ProxyFactory, upstream: Upstream, toxic: str) -> None:
    mixture = Mixture(6, {toxic: 1}, span=1_000, seconds=0.0)  # a seed with which all strike at a byte
    proxy = fault_proxy(upstream.endpoint, mixture=mixture)
    client, server = upstream.join(proxy)
    blob = os.urandom(20_000)
    peers = {"up": (client, server), "down": (server, client)}
    for way in ("up", "down"):
        sender, receiver = peers[way]
        received = b""
        with suppress(OSError):
            sender.sendall(blob)
        receiver.settimeout(0.3)
        with suppress(ConnectionError, TimeoutError):
            while len(received) < len(blob) and (chunk := receiver.recv(65_536)):
                received += chunk
        if toxic in GENTLE:
            assert received == blob
        elif toxic == "corrupt" and proxy.passages[0].fate.rules[0].direction == way:
            assert sum(a != b for a, b in zip(received, blob, strict=True)) == 1
        elif toxic != "corrupt" and proxy.passages[0].fate.rules[0].direction == way:
            assert blob.startswith(received)
            assert received != blob
    assert proxy.passages[0].fate.name == toxic
    assert proxy.passages[0].struck is (toxic != "none")


def test_proxy_acts_on_the_tests_event_and_cut(fault_proxy: ProxyFactory, upstream: Upstream) -> None:
    event = threading.Event()
    proxy = fault_proxy(upstream.endpoint, Rule("up", OnEvent(event), Rst(), only=0))
    one, _ = upstream.join(proxy)
    two, server = upstream.join(proxy)
    assert says_nothing(one)
    event.set()
    with pytest.raises(ConnectionResetError):
        one.recv(1)
    two.sendall(b"x")
    assert server.recv(1) == b"x"
    proxy.cut()
    for sock in (two, server):
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    assert proxy.live == 0
    three, server = upstream.join(proxy)
    three.sendall(b"y")
    assert server.recv(1) == b"y"


def test_proxy_passes_resets_and_refusals_on(fault_proxy: ProxyFactory, upstream: Upstream) -> None:
    client, server = upstream.join(fault_proxy(upstream.endpoint))
    client.sendall(b"unread")
    wait_until(lambda: server.recv(6, socket.MSG_PEEK))
    server.close()  # with something unread: a reset
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    with closed_port() as endpoint:
        proxy = fault_proxy(endpoint)
        with pytest.raises(ConnectionResetError), socket.create_connection(proxy.endpoint, 5) as client:
            client.recv(1)


def test_ssh_through_the_proxy(sshd: Sshd, fault_proxy: ProxyFactory) -> None:
    honest = fault_proxy((sshd.address(9), sshd.port), Rule("down", AtBytes(0), Slice(7)))
    answer = ssh(sshd.options(via=honest.endpoint), honest.address, "echo $SSH_CONNECTION")
    assert answer.out.split()[2] == sshd.address(9)
    broken = fault_proxy((sshd.address(9), sshd.port), Rule("down", OnMessage(31), Rst()))
    assert "Connection reset" in ssh(sshd.options(via=broken.endpoint), broken.address, "true").err


def test_deaf_silent_and_closed_endpoints() -> None:
    with deaf() as endpoint, socket.socket() as sock:
        sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            sock.connect(endpoint)
    with silent() as endpoint, socket.create_connection(endpoint, 5) as sock:
        assert says_nothing(sock)
    with closed_port() as endpoint, pytest.raises(ConnectionRefusedError):
        socket.create_connection(endpoint)
