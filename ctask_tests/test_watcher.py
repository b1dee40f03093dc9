# SPDX-License-Identifier: Apache-2.0
"""The watcher: calls, timers, descriptors, dials, names; and what is left when it is closed or forked.

The peers are plain sockets on 127.0.0.0/8 in this thread; the resolver's `getaddrinfo` is a function of the test.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from ctask.errors import (
    BannerError,
    ConnectError,
    ConnectRefused,
    ConnectTimeout,
    LocalResource,
    NodeError,
    ResolveError,
)
from ctask.transports.watcher import Dial, Watcher, close_watcher, watcher
from ctask.transports.watcher import dial as dial_module
from ctask.transports.watcher import resolver as resolver_module
from ctask_tests.fix_leaks import wait_until

BANNER = b"SSH-2.0-test\r\n"


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watcher]:
    monkeypatch.setattr(resolver_module, "IDLE", 0.05)
    yield watcher()
    close_watcher()


class Heard:
    """A listener that notes what it is told, and from which thread."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.error: NodeError | None = None
        self.threads: set[str] = set()

    def _note(self, word: str) -> None:
        self.threads.add(threading.current_thread().name)
        self.said.append(word)

    def phase(self, name: str) -> None:
        self._note(name)

    def spoke(self) -> None:
        self._note("spoke")

    def failed(self, error: NodeError) -> None:
        self.error = error
        self._note("failed")

    def hung_up(self) -> None:
        self._note("hung up")

    def held(self, waits: bool) -> None:
        self._note("held" if waits else "goes")

    def wait(self, word: str) -> None:
        wait_until(lambda: word in self.said, what=f"{word}; heard {self.said}")


class Server:
    """A listening socket and what it accepted."""

    def __init__(self, address: str = "127.0.0.1", *, backlog: int = 8) -> None:
        self.listening = socket.create_server((address, 0), backlog=backlog)
        self.port: int = self.listening.getsockname()[1]
        self.accepted: list[socket.socket] = []

    def accept(self) -> socket.socket:
        self.listening.settimeout(5)
        peer = self.listening.accept()[0]
        self.accepted.append(peer)
        return peer

    def close(self) -> None:
        for sock in (self.listening, *self.accepted):
            sock.close()


@contextmanager
def server(address: str = "127.0.0.1", *, backlog: int = 8) -> Iterator[Server]:
    made = Server(address, backlog=backlog)
    try:
        yield made
    finally:
        made.close()


def closed_port(address: str = "127.0.0.1") -> int:
    with server(address) as made:
        return made.port


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def barrier(watch: Watcher) -> None:
    """Return when the watcher has seen to all that was ready, and to all that it was asked, before this call."""
    for _ in range(2):
        passed = threading.Event()
        watch.call(passed.set)
        assert passed.wait(5)


def held(watch: Watcher) -> threading.Event:
    """Return when the watcher stands still: it does until the event is set."""
    begun, go_on = threading.Event(), threading.Event()

    def stand() -> None:
        begun.set()
        go_on.wait(5)

    watch.call(stand)
    assert begun.wait(5)
    return go_on


def look_up(monkeypatch: pytest.MonkeyPatch, table: Callable[[str], Any]) -> None:
    def fake(name: bytes | str, *_: object, **__: object) -> list[tuple[Any, ...]]:
        text = name.decode() if isinstance(name, bytes) else name
        found = table(text)
        if isinstance(found, Exception):
            raise found
        family = {True: socket.AF_INET6, False: socket.AF_INET}
        return [(family[":" in one], socket.SOCK_STREAM, 6, "", (one, 0)) for one in found]

    monkeypatch.setattr(socket, "getaddrinfo", fake)


def spoken(watch: Watcher, made: Server) -> tuple[Dial, Heard, socket.socket]:
    heard = Heard()
    dial = watch.dial("127.0.0.1", made.port, heard)
    peer = made.accept()
    peer.sendall(BANNER)
    heard.wait("spoke")
    return dial, heard, peer


class TestThread:
    def test_calls_come_in_order_and_from_its_own_thread(self, watch: Watcher) -> None:
        seen: list[tuple[int, str]] = []
        for number in range(1000):
            watch.call(lambda number=number: seen.append((number, threading.current_thread().name)))  # type: ignore[misc]
        barrier(watch)
        assert seen == [(number, "ctask/watcher") for number in range(1000)]

    def test_a_process_has_one_however_many_ask(self, watch: Watcher) -> None:
        found: list[Watcher] = []
        threads = [threading.Thread(target=lambda: found.append(watcher())) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(found) == {watch}

    def test_what_raises_is_logged_and_ends_nothing(self, watch: Watcher, caplog: pytest.LogCaptureFixture) -> None:
        def slip() -> None:
            raise ZeroDivisionError("a slip")

        with caplog.at_level(logging.ERROR, "ctask.watcher"):
            watch.call(slip)
            watch.at(time.monotonic(), slip)
            barrier(watch)
            wait_until(lambda: len(caplog.records) == 2)
        assert all(record.name == "ctask.watcher" and record.exc_info for record in caplog.records)

    def test_closing_ends_thread_and_descriptors_and_a_new_one_can_be_made(self) -> None:
        before = set(os.listdir("/proc/self/fd"))
        first = watcher()
        close_watcher()
        assert "ctask/watcher" not in {thread.name for thread in threading.enumerate()}
        assert set(os.listdir("/proc/self/fd")) == before
        second = watcher()
        assert second is not first
        barrier(second)
        close_watcher()

    def test_a_closed_one_forgets_what_it_is_asked(self) -> None:
        closed = watcher()
        close_watcher()
        read, write = os.pipe()
        closed.call(pytest.fail)
        closed.at(0.0, pytest.fail)
        closed.watch(read, select.EPOLLIN, lambda _: pytest.fail("called"))
        closed.unwatch(read)
        closed.close()
        os.close(read)
        os.close(write)

    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12 and newer warn of the test itself
    def test_a_forked_child_has_a_watcher_of_its_own_and_none_of_the_sockets(self, watch: Watcher) -> None:
        with server() as made:
            _, heard, peer = spoken(watch, made)
            read, write = os.pipe()
            child = os.fork()
            if not child:
                try:
                    inherited = [fd for fd in os.listdir("/proc/self/fd") if _is_peer_of(int(fd), peer)]
                    fresh = watcher()
                    passed = threading.Event()
                    fresh.call(passed.set)
                    good = passed.wait(5) and fresh is not watch and not inherited
                    os.write(write, b"good" if good else repr(inherited).encode())
                finally:
                    os._exit(0)
            os.close(write)
            with os.fdopen(read, "rb") as said:
                assert said.read() == b"good"
            os.waitpid(child, 0)
            # The parent's is untouched: it still hears its sockets.
            assert "hung up" not in heard.said
            barrier(watch)


def _is_peer_of(fd: int, peer: socket.socket) -> bool:
    try:
        with socket.socket(fileno=os.dup(fd)) as sock:
            return bool(sock.getpeername() == peer.getsockname() and sock.getsockname() == peer.getpeername())
    except OSError:
        return False


class TestTimers:
    def test_they_come_by_time_and_never_early(self, watch: Watcher) -> None:
        begun = time.monotonic()
        rung: list[tuple[float, float]] = []
        for delay in (0.06, 0.02, 0.04):
            watch.at(begun + delay, lambda delay=delay: rung.append((delay, time.monotonic() - begun)))  # type: ignore[misc]
        wait_until(lambda: len(rung) == 3)
        assert [delay for delay, _ in rung] == [0.02, 0.04, 0.06]
        assert all(when >= delay for delay, when in rung)

    def test_one_that_is_cancelled_does_not_come(self, watch: Watcher) -> None:
        when = time.monotonic() + 0.02
        rung: list[str] = []
        timer = watch.at(when, lambda: rung.append("cancelled"))
        timer.cancel()
        timer.cancel()
        watch.at(when, lambda: rung.append("kept"))
        wait_until(lambda: rung)
        barrier(watch)
        assert rung == ["kept"]

    def test_a_storm_of_cancelled_ones_takes_no_room(self, watch: Watcher) -> None:
        far = time.monotonic() + 1000
        timers = [watch.at(far, pytest.fail) for _ in range(10_000)]
        for timer in timers:
            timer.cancel()
        assert len(watch._timers) < 200


class TestDescriptors:
    def test_a_descriptor_is_heard_until_it_is_unwatched(self, watch: Watcher) -> None:
        read, write = os.pipe()
        got: list[bytes] = []
        watch.watch(read, select.EPOLLIN, lambda _: got.append(os.read(read, 100)))
        os.write(write, b"one")
        wait_until(lambda: got == [b"one"])
        watch.modify(read, 0)
        os.write(write, b"two")
        barrier(watch)
        assert got == [b"one"]
        watch.modify(read, select.EPOLLIN)
        wait_until(lambda: got == [b"one", b"two"])
        watch.unwatch(read)
        watch.unwatch(read)
        os.write(write, b"three")
        barrier(watch)
        assert got == [b"one", b"two"]
        os.close(read)
        os.close(write)

    def test_a_number_used_again_in_the_same_turn_gets_no_event_of_its_former_owner(self, watch: Watcher) -> None:
        first, second = os.pipe(), os.pipe()
        wrong: list[int] = []

        def swap(_: int) -> None:
            # Both are ready in this turn; the one that comes first puts a quiet pipe in the place of the other.
            for read, _write in (first, second):
                watch.unwatch(read)
            quiet_read, quiet_write = os.pipe()
            for read, _write in (first, second):
                os.dup2(quiet_read, read, inheritable=False)
                watch.watch(read, select.EPOLLIN, wrong.append)
            os.close(quiet_read)
            quiet.append(quiet_write)

        quiet: list[int] = []
        go_on = held(watch)
        for read, write in (first, second):
            watch.watch(read, select.EPOLLIN, swap)
            os.write(write, b"x")
        go_on.set()
        wait_until(lambda: quiet)
        barrier(watch)
        assert (len(quiet), wrong) == (1, [])
        for read, _write in (first, second):
            watch.unwatch(read)
        for fd in (*first, *second, *quiet):
            os.close(fd)

    def test_long_queues_do_not_keep_descriptors_waiting(self, watch: Watcher) -> None:
        read, write = os.pipe()
        order: list[str] = []
        go_on = held(watch)
        watch.watch(read, select.EPOLLIN, lambda _: order.append(os.read(read, 1).decode()))
        os.write(write, b"r")

        def slow_call() -> None:
            time.sleep(0.001)
            order.append("c")

        for _ in range(100):
            watch.call(slow_call)
        go_on.set()
        wait_until(lambda: len(order) == 101)
        assert order.index("r") < 50
        watch.unwatch(read)
        os.close(read)
        os.close(write)


class TestDials:
    def test_b01_a_closed_port_is_refused(self, watch: Watcher) -> None:
        heard = Heard()
        watch.dial("127.0.0.1", closed_port(), heard)
        heard.wait("failed")
        assert heard.said == ["tcp", "failed"]
        assert isinstance(heard.error, ConnectRefused)
        assert (heard.error.phase, heard.error.reason, heard.error.kind) == ("tcp", "refused", "refused")
        assert heard.threads == {"ctask/watcher"}

    def test_b02_a_deaf_node_stays_in_tcp_until_it_is_dropped(self, watch: Watcher) -> None:
        with server(backlog=0) as made:
            # A backlog that is full: the kernel answers no more SYNs.
            fillers = [socket.socket() for _ in range(4)]
            for filler in fillers:
                filler.setblocking(False)
                filler.connect_ex(("127.0.0.1", made.port))
            wait_until(lambda: _syns(made.port) > 0, what="a connection that is not answered")
            heard = Heard()
            before = len(os.listdir("/proc/self/fd"))
            dial = watch.dial("127.0.0.1", made.port, heard)
            heard.wait("tcp")
            barrier(watch)
            assert heard.said == ["tcp"]
            assert dial.where() == f"127.0.0.1:{made.port}"
            dial.drop()
            dial.drop()
            assert dial.take() is None
            assert len(os.listdir("/proc/self/fd")) == before
            barrier(watch)
            assert heard.said == ["tcp"]
            for filler in fillers:
                filler.close()

    def test_b05_a_silent_server_stays_in_banner(self, watch: Watcher) -> None:
        with server() as made:
            heard = Heard()
            dial = watch.dial("127.0.0.1", made.port, heard)
            peer = made.accept()
            heard.wait("banner")
            barrier(watch)
            assert heard.said == ["tcp", "banner"]
            assert dial.take() is None
            dial.drop()
            assert peer.recv(1) == b""

    def test_a_server_that_speaks_is_taken_with_its_first_bytes(self, watch: Watcher) -> None:
        with server() as made:
            dial, heard, peer = spoken(watch, made)
            sock = dial.take()
            assert sock is not None
            with sock:
                assert sock.getblocking()
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                assert not os.get_inheritable(sock.fileno())
                assert sock.recv(100) == BANNER
                peer.close()
                barrier(watch)
                assert heard.said == ["tcp", "banner", "spoke"]
                assert dial.take() is None
                dial.drop()
                assert sock.recv(1) == b""  # it is the taker's: no drop closes it

    def test_a_server_that_hangs_up_while_it_waits_is_told(
        self, watch: Watcher, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(dial_module, "PROMPT", 0.0)
        for hang_up in (socket.socket.close, reset):
            with server() as made:
                dial, heard, peer = spoken(watch, made)
                peer.sendall(b"more bytes, which are no hang-up")
                barrier(watch)
                assert heard.said[-1] == "spoke"
                hang_up(peer)
                heard.wait("hung up")
                assert heard.said == ["tcp", "banner", "spoke", "hung up"]
                assert dial.take() is None

    def test_one_that_hangs_up_at_once_is_left_to_the_handshake(self, watch: Watcher) -> None:
        with server() as made:
            dial, heard, peer = spoken(watch, made)
            peer.close()
            barrier(watch)
            assert heard.said == ["tcp", "banner", "spoke"]
            sock = dial.take()
            assert sock is not None
            with sock:
                assert sock.recv(100) == BANNER
                assert sock.recv(100) == b""

    def test_one_that_drops_after_it_spoke_is_silent_and_closed(self, watch: Watcher) -> None:
        with server() as made:
            dial, heard, peer = spoken(watch, made)
            dial.drop()
            with pytest.raises(ConnectionResetError):  # closed with the banner unread
                peer.recv(1)
            barrier(watch)
            assert heard.said == ["tcp", "banner", "spoke"]

    @pytest.mark.parametrize("hang_up", [socket.socket.close, reset], ids=["fin", "rst"])
    def test_b07_a_server_that_hangs_up_before_its_first_byte(
        self, watch: Watcher, hang_up: Callable[[socket.socket], None]
    ) -> None:
        with server() as made:
            heard = Heard()
            watch.dial("127.0.0.1", made.port, heard)
            hang_up(made.accept())
            heard.wait("failed")
            assert heard.said == ["tcp", "banner", "failed"]
            assert isinstance(heard.error, BannerError)
            assert (heard.error.phase, heard.error.reason) == ("banner", "connection dropped by the server")

    @pytest.mark.parametrize(
        ("failure", "kind", "text"),
        [
            (errno.EHOSTUNREACH, ConnectTimeout, "no route to 127.0.0.9:7"),
            (errno.ENETUNREACH, ConnectTimeout, "network unreachable: 127.0.0.9:7"),
            (errno.ETIMEDOUT, ConnectTimeout, "no answer from 127.0.0.9:7"),
            (errno.EACCES, ConnectError, "permission denied: 127.0.0.9:7"),
            (errno.EMFILE, LocalResource, "too many open files in this process (ulimit -n)"),
        ],
    )
    def test_what_the_system_says_of_a_connect(
        self, watch: Watcher, monkeypatch: pytest.MonkeyPatch, failure: int, kind: type[NodeError], text: str
    ) -> None:
        monkeypatch.setattr(socket.socket, "connect_ex", lambda *_: failure)
        heard = Heard()
        watch.dial("127.0.0.9", 7, heard)
        heard.wait("failed")
        assert type(heard.error) is kind
        assert (heard.error.phase, heard.error.reason) == ("tcp", text)
        assert "127.0.0.9" not in heard.error.kind

    def test_an_ipv6_address_needs_no_resolver(self, watch: Watcher) -> None:
        try:
            made = Server("::1") if socket.has_ipv6 else None
        except OSError:
            made = None
        if made is None:
            pytest.skip("no IPv6 on this machine")
        heard = Heard()
        dial = watch.dial("::1", made.port, heard)
        made.accept().sendall(BANNER)
        heard.wait("spoke")
        assert heard.said == ["tcp", "banner", "spoke"]
        assert dial.where() == f"[::1]:{made.port}"
        dial.drop()
        made.close()

    def test_hundreds_at_once_each_have_their_own_end(self, watch: Watcher) -> None:
        port = closed_port()
        all_heard = [Heard() for _ in range(300)]
        for number, heard in enumerate(all_heard):
            watch.dial(f"127.0.1.{number % 250 + 1}", port, heard)
        wait_until(lambda: all(heard.error for heard in all_heard))
        assert {tuple(heard.said) for heard in all_heard} == {("tcp", "failed")}
        assert len({id(heard.error) for heard in all_heard}) == 300

    def test_closing_the_watcher_drops_its_dials(self) -> None:
        with server() as made:
            heard = Heard()
            watcher().dial("127.0.0.1", made.port, heard)
            peer = made.accept()
            close_watcher()
            assert peer.recv(1) == b""
            assert "failed" not in heard.said


def _syns(port: int) -> int:
    """Count connections to `port` that wait for an answer (state 02 in /proc/net/tcp)."""
    with open("/proc/net/tcp") as table:
        return sum(1 for line in table if line.split()[2].endswith(f":{port:04X}") and line.split()[3] == "02")


class TestNames:
    def test_localhost_is_looked_up_and_connected(self, watch: Watcher) -> None:
        with server() as made:
            heard = Heard()
            dial = watch.dial("localhost", made.port, heard)
            made.accept().sendall(BANNER)
            heard.wait("spoke")
            assert heard.said == ["resolve", "tcp", "banner", "spoke"]
            dial.drop()

    @pytest.mark.parametrize(
        ("failure", "text"),
        [
            (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "the name has no address"),
            (socket.gaierror(socket.EAI_AGAIN, "Temporary failure"), "temporary failure"),
            (UnicodeError("label too long"), "not a name that can be looked up"),
        ],
    )
    def test_b03_a_name_without_an_address(
        self, watch: Watcher, monkeypatch: pytest.MonkeyPatch, failure: Exception, text: str
    ) -> None:
        look_up(monkeypatch, lambda _: failure)
        heard = Heard()
        dial = watch.dial("nowhere.invalid", 22, heard)
        heard.wait("failed")
        assert heard.said == ["resolve", "failed"]
        assert isinstance(heard.error, ResolveError)
        assert (heard.error.phase, heard.error.reason) == ("resolve", text)
        assert heard.error.__cause__ is failure
        assert dial.where() == "nowhere.invalid:22"

    def test_the_addresses_of_a_name_are_tried_in_turn(self, watch: Watcher, monkeypatch: pytest.MonkeyPatch) -> None:
        look_up(monkeypatch, lambda _: ["127.0.0.2", "127.0.0.2", "127.0.0.3", "127.0.0.4"])
        with server("127.0.0.4") as made:
            heard = Heard()
            dial = watch.dial("three", made.port, heard)
            made.accept().sendall(BANNER)
            heard.wait("spoke")
            assert heard.said == ["resolve", "tcp", "banner", "spoke"]
            assert dial.where() == f"127.0.0.4:{made.port}"
            dial.drop()

    def test_of_several_failures_the_refusal_is_told(self, watch: Watcher, monkeypatch: pytest.MonkeyPatch) -> None:
        look_up(monkeypatch, lambda _: ["127.0.0.2", "127.0.0.3", "127.0.0.4"])
        ends = iter((errno.ENETUNREACH, errno.ECONNREFUSED, errno.EHOSTUNREACH))
        monkeypatch.setattr(socket.socket, "connect_ex", lambda *_: next(ends))
        heard = Heard()
        watch.dial("three", 22, heard)
        heard.wait("failed")
        assert isinstance(heard.error, ConnectRefused)

    def test_b03_names_that_hang_hold_nobody_but_themselves(
        self, watch: Watcher, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(resolver_module, "STUCK", 0.05)
        hold = threading.Event()
        asked: list[str] = []

        def table(name: str) -> list[str]:
            asked.append(name)
            if name.startswith("hangs"):
                hold.wait(20)
            return ["127.0.0.1"]

        look_up(monkeypatch, table)
        port = closed_port()
        stuck = [Heard() for _ in range(resolver_module.THREADS + 3)]
        dials = [watch.dial(f"hangs{number}", port, heard) for number, heard in enumerate(stuck)]
        same = Heard()
        watch.dial("hangs0", port, same)
        address, name = Heard(), Heard()
        watch.dial("127.0.0.1", port, address)
        watch.dial("quick", port, name)
        address.wait("failed")
        name.wait("failed")
        assert {tuple(heard.said) for heard in (same, *stuck)} == {("resolve",)}
        assert asked.count("hangs0") == 1
        dials[1].drop()
        hold.set()
        for heard in (same, stuck[0], *stuck[2:]):
            heard.wait("failed")
        barrier(watch)
        assert stuck[1].said == ["resolve"]
        wait_until(lambda: not _resolvers(), what="idle resolver threads end")

    def test_names_that_nobody_asks_for_any_more_are_not_looked_up(
        self, watch: Watcher, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hold = threading.Event()
        asked: list[str] = []

        def table(name: str) -> list[str]:
            asked.append(name)
            hold.wait(20)
            return []

        look_up(monkeypatch, table)
        monkeypatch.setattr(resolver_module, "THREADS", 1)
        first, second, third = Heard(), Heard(), Heard()
        watch.dial("first", 22, first)
        dropped = watch.dial("second", 22, second)
        watch.dial("third", 22, third)
        for heard in (first, second, third):
            heard.wait("resolve")
        barrier(watch)
        dropped.drop()
        hold.set()
        third.wait("failed")  # a name that has no address at all
        assert isinstance(third.error, ResolveError)
        assert asked == ["first", "third"]


def _resolvers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ctask/resolver-")]
