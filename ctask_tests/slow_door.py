# SPDX-License-Identifier: Apache-2.0
"""What stands before a server: it takes connections out of a small queue one by one, or waits for a first word.

One thread accepts and passes bytes on, in both directions, between the clients and the server behind it; nothing else
runs. It is over when the `with` block is left.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = ["Door", "door"]


@dataclass
class Door:
    """Where it listens, on every address of this machine, and how many came in."""

    port: int
    accepted: int = 0
    errors: list[str] = field(default_factory=list)


@contextlib.contextmanager
def door(
    server: tuple[str, int], *, takes: float = 0.0, backlog: int = 128, first_word: bool = False
) -> Iterator[Door]:
    """Stand before a server.

    Args:
        server: where to pass on to.
        takes: seconds between two accepted connections.
        backlog: of the listening socket.
        first_word: pass on only once the client has said something.
    """
    wake, out = socket.socketpair()
    with wake, socket.create_server(("", 0), backlog=backlog) as listening:
        made = Door(listening.getsockname()[1])
        thread = threading.Thread(target=_Passing(listening, wake, server, takes, made, first_word).run)
        thread.start()
        try:
            yield made
        finally:
            out.close()
            thread.join()


class _Passing:
    def __init__(
        self,
        listening: socket.socket,
        wake: socket.socket,
        server: tuple[str, int],
        takes: float,
        made: Door,
        first_word: bool,
    ) -> None:
        self._listening = listening
        self._wake = wake
        self._server = server
        self._takes = takes
        self._made = made
        self._first_word = first_word
        self._to: dict[socket.socket, socket.socket | None] = {}

    def run(self) -> None:
        due = 0.0
        try:
            while True:
                now = time.monotonic()
                wants = [self._wake, *self._to, *([self._listening] if now >= due else [])]
                ready, _, _ = select.select(wants, [], [], None if now >= due else due - now)
                if self._wake in ready:
                    return
                for one in ready:
                    if one is self._listening:
                        due = now + self._takes
                        self._accept()
                    elif one in self._to:
                        self._pass_on(one)
        finally:
            for one in self._to:
                one.close()

    def _accept(self) -> None:
        client = self._listening.accept()[0]
        self._made.accepted += 1
        self._to[client] = None
        if not self._first_word:
            self._connect(client)

    def _connect(self, client: socket.socket) -> socket.socket:
        behind = socket.create_connection(self._server)
        self._to[client], self._to[behind] = behind, client
        return behind

    def _pass_on(self, one: socket.socket) -> None:
        try:
            data = one.recv(65536)
            if data:
                (self._to[one] or self._connect(one)).sendall(data)
                return
        except OSError:
            pass
        other = self._to.pop(one)
        one.close()
        if other is not None:
            del self._to[other]
            other.close()
