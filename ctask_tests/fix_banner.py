# SPDX-License-Identifier: Apache-2.0
"""Servers that never get further than the banner, and the listener that all hostile servers are built on.

Each server has one thread that accepts and one per connection; the test reads what they counted. Closing
joins all of them.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
from typing import TYPE_CHECKING, Protocol, Self

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = [
    "PATIENCE",
    "BannerServer",
    "BannerServerFactory",
    "Listener",
    "dripped_banner",
    "endless_line",
    "http_answer",
    "join_threads",
    "many_lines",
    "nul_in_banner",
    "old_version",
]

#: Where hostile servers listen.
ADDRESS = "127.0.3.1"

#: How long a thread may take to end once everything it could wait for is closed.
PATIENCE = 10.0


class BannerServerFactory(Protocol):
    """Start a server for this test that never gets further than the banner: `banner_server(game)`."""

    def __call__(self, game: Callable[[], Iterable[bytes | float]]) -> BannerServer: ...


class Listener:
    """Accept connections in a thread of its own, and end it and theirs on `close()`.

    `connections` counts the accepted ones. What serves them is up to the subclass.
    """

    def __init__(self, name: str) -> None:
        self.address = ADDRESS
        self.connections = 0
        self.stopping = threading.Event()
        self._socket = socket.create_server((ADDRESS, 0), backlog=128)
        self.port: int = self._socket.getsockname()[1]
        self.name = f"{name}/{self.port}"
        self._thread = threading.Thread(target=self._accept, name=self.name)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def endpoint(self) -> tuple[str, int]:
        """Where clients connect to."""
        return self.address, self.port

    def close(self) -> None:
        """Hang up on everybody and join every thread."""
        self.stopping.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the accepting thread; close() alone would not
        join_threads([self._thread])
        self._socket.close()
        self._end_connections()

    def serve(self, sock: socket.socket, number: int) -> None:
        """Take a connection over; runs in the accepting thread."""
        raise NotImplementedError

    def _end_connections(self) -> None:
        raise NotImplementedError

    def _accept(self) -> None:
        while not self.stopping.is_set():
            try:
                sock, _ = self._socket.accept()
            except OSError:
                return
            number = self.connections
            self.connections += 1
            self.serve(sock, number)


class BannerServer(Listener):
    """A server that plays a game with its banner, and then says no more.

    A game yields bytes to send and seconds to wait; every connection gets its own. `sent` is how much went
    out to all of them, `received` what came in.
    """

    def __init__(self, game: Callable[[], Iterable[bytes | float]]) -> None:
        self._game = game
        self.sent = 0
        self.received = bytearray()
        self._served: list[tuple[socket.socket, threading.Thread]] = []
        super().__init__("banner")

    def serve(self, sock: socket.socket, number: int) -> None:
        thread = threading.Thread(target=self._play, args=(sock,), name=f"{self.name}/{number}")
        self._served.append((sock, thread))
        thread.start()

    def _play(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            for move in self._game():
                if isinstance(move, bytes):
                    for start in range(0, len(move), 65536):
                        chunk = move[start : start + 65536]
                        sock.sendall(chunk)
                        self.sent += len(chunk)
                elif self.stopping.wait(move):
                    return
            while data := sock.recv(65536):
                self.received += data

    def _end_connections(self) -> None:
        for sock, _ in self._served:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for sock, thread in self._served:
            join_threads([thread])
            sock.close()


def dripped_banner(interval: float = 1.0) -> Callable[[], Iterator[bytes | float]]:
    """A right banner without end, a byte at a time."""

    def game() -> Iterator[bytes | float]:
        for byte in itertools.chain(b"SSH-2.0-", itertools.repeat(ord("x"))):
            yield bytes([byte])
            yield interval

    return game


def endless_line(size: int = 10 * 1024 * 1024) -> Callable[[], Iterator[bytes | float]]:
    """So many bytes without a newline."""
    return lambda: iter([b"x" * size])


def many_lines(count: int = 101) -> Callable[[], Iterator[bytes | float]]:
    """So many lines before a right banner."""
    return lambda: iter([b"welcome\r\n" * count, b"SSH-2.0-hostile\r\n"])


def http_answer() -> Callable[[], Iterator[bytes | float]]:
    """What a web server says to an SSH client."""
    return lambda: iter([b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"])


def old_version(banner: bytes = b"SSH-1.5-hostile\r\n") -> Callable[[], Iterator[bytes | float]]:
    """The banner of a protocol that is not ours."""
    return lambda: iter([banner])


def nul_in_banner() -> Callable[[], Iterator[bytes | float]]:
    """A banner with a NUL in it."""
    return lambda: iter([b"SSH-2.0-ho\0stile\r\n"])


@pytest.fixture
def banner_server() -> Iterator[BannerServerFactory]:
    """Start servers that play with their banner, closed when the test ends."""
    with contextlib.ExitStack() as stack:
        yield lambda game: stack.enter_context(BannerServer(game))


def join_threads(threads: Iterable[threading.Thread]) -> None:
    """Join threads that have nothing to wait for any more; one that goes on is an error of the harness."""
    for thread in threads:
        thread.join(PATIENCE)
        if thread.is_alive():
            raise RuntimeError(f"{thread.name} does not end")
