# SPDX-License-Identifier: Apache-2.0
"""Faults of the network on loopback: a proxy that breaks connections by rules, and peers that do not answer.

One thread per proxy runs an epoll and owns all of its sockets and their state; other threads read its counters and
leave it requests in a deque. The rules are in `proxy_lanes.py`, the fates by chance in `proxy_fates.py`; both are to be
had from here.

By rules, in front of one node::

    proxy = fault_proxy((sshd.address(3), sshd.port), Rule("down", AtBytes(9_000), Stall()))
    task.node_options("sick", **{**sshd.options(via=proxy.endpoint), "address": proxy.address})

By chance, in front of 200 nodes, in one thread (all on one port, 127.0.2.n before 127.0.1.n)::

    mixture = Mixture(seed=7, weights={"none": 60, "delay": 10, "slice": 5, "rst": 10, "stall": 5, "corrupt": 10})
    fronts = addresses(200)
    proxy = fault_proxy(
        lambda front: (sshd.address(int(front.rpartition(".")[2])), sshd.port), addresses=fronts, mixture=mixture
    )
    task.set_info("port", proxy.port)
    task.set_info("known_hosts", sshd.known_hosts_for(*((front, proxy.port) for front in fronts)))
    worker = task.run("echo ok", nodes=NodeSet.fromlist(fronts), connect_timeout=3)
    for passage in proxy.passages:  # every connection that was accepted: address, number, fate, struck
        ...

A fate hangs on the seed, the address and the number of the connection there, so it is the same in every run, in
whatever order nodes are dialed: `mixture.fate("127.0.2.9", 0).name` says it beforehand. `GENTLE` has the toxics that
harm nobody. `passage.struck` False: nothing was done to that connection, whatever its fate was.
"""

from __future__ import annotations

import contextlib
import random
import select
import socket
import struct
import threading
import time
from collections import Counter, deque
from typing import TYPE_CHECKING, Literal, Protocol, Self, TypeAlias

import pytest

from ctask_tests.proxy_fates import GENTLE, TOXICS, Fate, Mixture, Passage
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
    Throttle,
    Xor,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = [
    "GENTLE",
    "TOXICS",
    "After",
    "AtBytes",
    "Delay",
    "Drip",
    "Drop",
    "Fate",
    "FaultProxy",
    "Fin",
    "HalfClose",
    "Inject",
    "Mixture",
    "OnEvent",
    "OnMatch",
    "OnMessage",
    "Passage",
    "ProxyFactory",
    "Resume",
    "Rst",
    "Rule",
    "Slice",
    "Stall",
    "Throttle",
    "Xor",
    "addresses",
    "closed_port",
    "deaf",
    "silent",
]

#: Where proxies and deaf, silent and closed peers listen.
ADDRESS = "127.0.2.1"

#: SO_LINGER on, 0 seconds: close() sends a reset.
RESET = struct.pack("ii", 1, 0)


#: Where a proxy's connections go to: one endpoint, or one for each address at which it listens.
Upstream: TypeAlias = "tuple[str, int] | Callable[[str], tuple[str, int]]"


def addresses(count: int) -> list[str]:
    """The first `count` addresses for a proxy that stands before many nodes; 254 at most."""
    return [f"127.0.2.{number}" for number in range(1, count + 1)]


class ProxyFactory(Protocol):
    """Start a proxy for this test: `fault_proxy(upstream, *rules)`; the arguments of `FaultProxy`."""

    def __call__(
        self, upstream: Upstream, *rules: Rule, addresses: Sequence[str] = (ADDRESS,), mixture: Mixture | None = None
    ) -> FaultProxy: ...


class FaultProxy:
    """Forward TCP connections to `upstream`, and break them as the rules, and the mixture's fates, say.

    A side that resets or ends its connection is passed on as such. It listens at all `addresses` on one port;
    `port` and `address` are that and the first of them; `connections` counts the accepted ones, `live` those
    that stand, and `passages` has a record of each.

    Thread safety: `cut` and `stop` may be called from any thread.
    """

    def __init__(
        self, upstream: Upstream, *rules: Rule, addresses: Sequence[str] = (ADDRESS,), mixture: Mixture | None = None
    ) -> None:
        self.upstream = upstream
        self.address = addresses[0]
        self.passages: list[Passage] = []
        self._rules = rules
        self._mixture = mixture
        self._accepted: Counter[str] = Counter()
        self._listeners = {listener.fileno(): listener for listener in _listen_at(addresses)}
        self.port: int = next(iter(self._listeners.values())).getsockname()[1]
        self._epoll = select.epoll()
        self._links: list[_Link] = []
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        for fd in (*self._listeners, self._wake_in.fileno()):
            self._epoll.register(fd, select.EPOLLIN)
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
    def connections(self) -> int:
        """How many connections were accepted."""
        return len(self.passages)

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
            self._epoll.close()
            for sock in (*self._listeners.values(), self._wake_in, self._wake_out):
                sock.close()
            for done in stopped:
                done.set()

    def _turn(self, stopped: list[threading.Event]) -> None:
        due = min((link.due for link in self._links), default=float("inf"))
        timeout = None if due == float("inf") else max(0.0, due - time.monotonic())
        ready = dict(self._epoll.poll(timeout))
        now = time.monotonic()
        for link in list(self._links):
            if link.due <= now or not ready.keys().isdisjoint(link.sockets):
                self._work(link, ready, now)
        for fd in ready.keys() & self._listeners.keys():
            self._accept(self._listeners[fd], now)
        if self._wake_in.fileno() in ready:
            self._answer(stopped, now)

    def _work(self, link: _Link, ready: dict[int, int], now: float) -> None:
        link.work(ready, now)
        if link.closed:
            self._links.remove(link)
        else:
            link.rest(now)

    def _answer(self, stopped: list[threading.Event], now: float) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_in.recv(1024)
        while self._requests:
            what, done = self._requests.popleft()
            if what == "stop":
                stopped.append(done)
                continue
            for listener in self._listeners.values():
                self._accept(listener, now)  # also what stands in the backlog: its client believes to be connected
            for link in self._links:
                link.reset()
            self._links.clear()
            done.set()

    def _accept(self, listener: socket.socket, now: float) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except BlockingIOError:
                return
            address = client.getsockname()[0]
            upstream = self.upstream(address) if callable(self.upstream) else self.upstream
            passage = self._begin(address)
            try:
                server = socket.create_connection(upstream, timeout=2)
            except OSError:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                client.close()
                continue
            number = len(self.passages) - 1
            rules = [rule for rule in (*self._rules, *passage.fate.rules) if rule.only in {None, number}]
            link = _Link(client, server, rules, now, passage, self._epoll)
            self._links.append(link)
            self._work(link, {}, now)  # what is due at once, before the first byte

    def _begin(self, address: str) -> Passage:
        number = self._accepted[address]
        self._accepted[address] += 1
        fate = self._mixture.fate(address, number) if self._mixture is not None else Fate("none")
        self.passages.append(Passage(address, number, fate))
        return self.passages[-1]


class _Link:
    """One proxied connection: two sockets and two lanes, and what of them the epoll looks at."""

    def __init__(
        self,
        client: socket.socket,
        server: socket.socket,
        rules: list[Rule],
        now: float,
        passage: Passage,
        epoll: select.epoll,
    ) -> None:
        for sock in (client, server):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.closed = False
        #: when there is something to do that no socket tells of
        self.due = float("inf")
        self.sockets = (client.fileno(), server.fileno())
        self._passage = passage
        self._epoll = epoll
        self._watched: dict[int, int] = {}
        dice = random.Random(f"{passage.address}/{passage.number}")
        up = Lane(client, server, [rule for rule in rules if rule.direction == "up"], now, dice)
        down = Lane(server, client, [rule for rule in rules if rule.direction == "down"], now, dice)
        self._lanes = (up, down)

    def rest(self, now: float) -> None:
        """Have the sockets looked at, until there is something to do."""
        wanted: dict[int, int] = {}
        for lane in self._lanes:
            if lane.wants_input:
                wanted[lane.source.fileno()] = wanted.get(lane.source.fileno(), 0) | select.EPOLLIN
            if lane.wants_output(now):
                wanted[lane.target.fileno()] = wanted.get(lane.target.fileno(), 0) | select.EPOLLOUT
        self.due = min(lane.next_time(now) for lane in self._lanes)
        self._watch(wanted)

    def _watch(self, wanted: dict[int, int]) -> None:
        # One that nothing is wanted of is taken out, since the end of its other side would be told without cease.
        for fd in self._watched.keys() - wanted.keys():
            self._epoll.unregister(fd)
        for fd, mask in wanted.items():
            if fd not in self._watched:
                self._epoll.register(fd, mask)
            elif self._watched[fd] != mask:
                self._epoll.modify(fd, mask)
        self._watched = wanted

    def work(self, ready: dict[int, int], now: float) -> None:
        """Do what the sockets and the clock allow; the order within is the order on the wire."""
        try:
            for lane in self._lanes:
                if ready.get(lane.source.fileno(), 0) & ~select.EPOLLOUT:
                    lane.receive()
                lane.advance(now)
                self._passage.struck = self._passage.struck or lane.struck
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
        self._watch({})
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

        def start(
            upstream: Upstream,
            *rules: Rule,
            addresses: Sequence[str] = (ADDRESS,),
            mixture: Mixture | None = None,
        ) -> FaultProxy:
            return stack.enter_context(FaultProxy(upstream, *rules, addresses=addresses, mixture=mixture))

        yield start


def _listen(address: str, backlog: int, port: int = 0) -> socket.socket:
    listener = socket.socket()
    try:
        listener.bind((address, port))
        listener.listen(backlog)
    except BaseException:
        listener.close()
        raise
    return listener


def _listen_at(addresses: Sequence[str]) -> list[socket.socket]:
    """Listen at all of them, on one port."""
    for _ in range(20):  # a port that is free at the first may be taken at another
        listeners: list[socket.socket] = []
        try:
            for address in addresses:
                listeners.append(_listen(address, 128, listeners[0].getsockname()[1] if listeners else 0))
                listeners[-1].setblocking(False)
        except OSError:
            for listener in listeners:
                listener.close()
        else:
            return listeners
    raise RuntimeError(f"no port that is free at all {len(addresses)} addresses")
