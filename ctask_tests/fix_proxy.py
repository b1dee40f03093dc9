# SPDX-License-Identifier: Apache-2.0
"""Faults of the network on loopback: a proxy that breaks connections by rules, and peers that do not answer.

One thread per proxy runs a selector and owns all of its sockets and their state; other threads read its
counters and leave it requests in a deque. The rules are in `proxy_lanes.py`, and are to be had from here.
"""

from __future__ import annotations

import contextlib
import select
import selectors
import socket
import struct
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Literal, Protocol, Self

import pytest

from ctask_tests.proxy_lanes import (
    After,
    AtBytes,
    Delay,
    Drip,
    Drop,
    Fin,
    HalfClose,
    Inject,
    Lane,
    OnEvent,
    OnMatch,
    OnMessage,
    Resume,
    Rst,
    Rule,
    Slice,
    Stall,
    Xor,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "After",
    "AtBytes",
    "Delay",
    "Drip",
    "Drop",
    "FaultProxy",
    "Fin",
    "HalfClose",
    "Inject",
    "OnEvent",
    "OnMatch",
    "OnMessage",
    "ProxyFactory",
    "Resume",
    "Rst",
    "Rule",
    "Slice",
    "Stall",
    "Xor",
    "closed_port",
    "deaf",
    "silent",
]

#: Where proxies and deaf, silent and closed peers listen.
ADDRESS = "127.0.2.1"

#: SO_LINGER on, 0 seconds: close() sends a reset.
RESET = struct.pack("ii", 1, 0)


class ProxyFactory(Protocol):
    """Start a proxy for this test: `fault_proxy(upstream, *rules)`."""

    def __call__(self, upstream: tuple[str, int], *rules: Rule) -> FaultProxy: ...


class FaultProxy:
    """Forward TCP connections to `upstream`, and break them as the rules say.

    A side that resets or ends its connection is passed on as such. `port` and `address` are where it listens;
    `connections` counts the accepted ones, `live` those that stand.

    Thread safety: `cut` and `stop` may be called from any thread.
    """

    def __init__(self, upstream: tuple[str, int], *rules: Rule, address: str = ADDRESS) -> None:
        self.upstream = upstream
        self.address = address
        self.connections = 0
        self._rules = rules
        self._listener = _listen(address, 128)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._links: list[_Link] = []
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._requests: deque[tuple[Literal["cut", "stop"], threading.Event]] = deque()
        self._thread = threading.Thread(target=self._run, name=f"fault-proxy/{self.port}", daemon=False)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def endpoint(self) -> tuple[str, int]:
        """Where clients connect to."""
        return self.address, self.port

    @property
    def live(self) -> int:
        """How many connections stand now."""
        return len(self._links)

    def cut(self) -> None:
        """Reset all connections; return when that is done. New ones are accepted as before."""
        self._ask("cut")

    def stop(self) -> None:
        """End the proxy, reset what stands, and join its thread."""
        if self._thread.is_alive():
            self._ask("stop")
            self._thread.join(10)

    def _ask(self, what: Literal["cut", "stop"]) -> None:
        done = threading.Event()
        self._requests.append((what, done))
        self._wake_out.send(b"!")
        if not done.wait(10):
            raise RuntimeError(f"the fault proxy does not {what}")

    def _run(self) -> None:
        stopped: list[threading.Event] = []
        try:
            while not stopped:
                self._turn(stopped)
        finally:
            for link in self._links:
                link.reset()
            for sock in (self._listener, self._wake_in, self._wake_out):
                sock.close()
            for done in stopped:
                done.set()

    def _turn(self, stopped: list[threading.Event]) -> None:
        now = time.monotonic()
        wanted: dict[socket.socket, int] = {self._listener: selectors.EVENT_READ}
        wanted[self._wake_in] = selectors.EVENT_READ
        for link in self._links:
            wanted.update(link.wants(now))
        due = min((link.next_time(now) for link in self._links), default=float("inf"))
        # A selector per turn: it has no state that closed sockets could be left in.
        with selectors.PollSelector() as selector:
            for sock, mask in wanted.items():
                selector.register(sock, mask)
            timeout = None if due == float("inf") else max(0.0, due - now)
            ready: dict[object, int] = {key.fileobj: mask for key, mask in selector.select(timeout)}
        now = time.monotonic()
        for link in self._links:
            link.work(ready, now)
        if self._listener in ready:
            self._accept(now)
        if self._wake_in in ready:
            self._answer(stopped, now)
        self._links = [link for link in self._links if not link.closed]

    def _answer(self, stopped: list[threading.Event], now: float) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_in.recv(1024)
        while self._requests:
            what, done = self._requests.popleft()
            if what == "stop":
                stopped.append(done)
                continue
            self._accept(now)  # also what stands in the backlog: its client believes to be connected
            for link in self._links:
                link.reset()
            done.set()

    def _accept(self, now: float) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except BlockingIOError:
                return
            number = self.connections
            self.connections += 1
            try:
                server = socket.create_connection(self.upstream, timeout=2)
            except OSError:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                client.close()
                continue
            rules = [rule for rule in self._rules if rule.only in {None, number}]
            link = _Link(client, server, rules, now)
            self._links.append(link)
            link.work({}, now)  # what is due at once, before the first byte


class _Link:
    """One proxied connection: two sockets and two lanes."""

    def __init__(self, client: socket.socket, server: socket.socket, rules: list[Rule], now: float) -> None:
        for sock in (client, server):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.closed = False
        up = Lane(client, server, [rule for rule in rules if rule.direction == "up"], now)
        down = Lane(server, client, [rule for rule in rules if rule.direction == "down"], now)
        self._lanes = (up, down)

    def wants(self, now: float) -> dict[socket.socket, int]:
        wanted: dict[socket.socket, int] = {}
        for lane in self._lanes:
            if lane.wants_input:
                wanted[lane.source] = wanted.get(lane.source, 0) | selectors.EVENT_READ
            if lane.wants_output(now):
                wanted[lane.target] = wanted.get(lane.target, 0) | selectors.EVENT_WRITE
        return wanted

    def next_time(self, now: float) -> float:
        return min(lane.next_time(now) for lane in self._lanes)

    def work(self, ready: dict[object, int], now: float) -> None:
        """Do what the sockets and the clock allow; the order within is the order on the wire."""
        if self.closed:
            return
        try:
            for lane in self._lanes:
                if ready.get(lane.source, 0) & selectors.EVENT_READ:
                    lane.receive()
                lane.advance(now)
                lane.flush(now)
        except OSError:  # one side has reset its connection, or is gone: so does the other
            self.reset()
            return
        verdicts = {lane.verdict() for lane in self._lanes}
        if Rst in verdicts:
            self.reset()
        elif Fin in verdicts:
            for lane in self._lanes:
                lane.end()
        elif all(lane.finished for lane in self._lanes):
            self.close()

    def reset(self) -> None:
        for lane in self._lanes:
            with contextlib.suppress(OSError):
                lane.source.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.close()

    def close(self) -> None:
        self.closed = True
        for lane in self._lanes:
            lane.source.close()


@contextlib.contextmanager
def deaf() -> Iterator[tuple[str, int]]:
    """An endpoint that answers no SYN, like a node that is switched off: its backlog is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_listen(ADDRESS, 0))
        endpoint: tuple[str, int] = listener.getsockname()
        for _ in range(16):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(endpoint)
            if not select.select([], [filler], [], 0.05)[1]:
                break  # this one waits for its answer, and so will all others
        else:
            raise RuntimeError("the backlog of a listener does not fill up")
        yield endpoint


@contextlib.contextmanager
def silent() -> Iterator[tuple[str, int]]:
    """An endpoint that accepts connections and never says a word."""
    with _listen(ADDRESS, 1024) as listener:  # the kernel accepts; nobody looks
        yield listener.getsockname()


@contextlib.contextmanager
def closed_port() -> Iterator[tuple[str, int]]:
    """An endpoint that refuses connections, and that nobody else can take meanwhile."""
    with socket.socket() as holder:
        holder.bind((ADDRESS, 0))
        yield holder.getsockname()


@pytest.fixture
def fault_proxy() -> Iterator[ProxyFactory]:
    """Start proxies, stopped when the test ends."""
    with contextlib.ExitStack() as stack:

        def start(upstream: tuple[str, int], *rules: Rule) -> FaultProxy:
            return stack.enter_context(FaultProxy(upstream, *rules))

        yield start


def _listen(address: str, backlog: int) -> socket.socket:
    listener = socket.socket()
    listener.bind((address, 0))
    listener.listen(backlog)
    return listener
