# SPDX-License-Identifier: Apache-2.0
"""The way to this machine: always there, with room for everybody.

`end` and `terminate_all` run in threads that may wait, the rest in any. There is no state but the sessions'.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Sequence
from socket import socket
from typing import NoReturn

from ctask.options import Command, Stop, Target
from ctask.result import Ending
from ctask.transports.base import Connection, Session, Sink
from ctask.transports.local.processes import Process, end_sessions
from ctask.transports.local.session import LocalSession
from ctask.transports.local.session import sessions as all_sessions
from ctask.transports.watcher import watcher

__all__ = ["LocalConnection", "LocalTransport", "transport"]

#: Seconds in which the watcher hands over the last words of commands that were ended.
TELL = 0.5


class LocalTransport:
    """The way to this machine: one connection, which always has room."""

    dials = False

    def __init__(self) -> None:
        self._connection = LocalConnection()

    def check(self, target: Target) -> None:
        """Nothing can be wrong with it."""

    def take(self, target: Target) -> LocalConnection:
        """Return the one connection. Never waits."""
        del target
        return self._connection

    def give_back(self, connection: Connection) -> None:
        """Nothing is counted."""

    def connect(self, target: Target, sock: socket, on_phase: Callable[[str], None]) -> NoReturn:
        """Never to be called: `take` always gives a connection."""
        raise RuntimeError(f"a local command needs no connection: {target}, {sock}, {on_phase}")

    def keep(self, connection: Connection, *, alone: bool = False) -> None:
        """It is kept anyway."""

    def reserve(self) -> bool:
        """Nothing is dialed, so there is always room for it."""
        return True

    def unreserve(self) -> None:
        """Nothing was reserved."""

    def when_room(self, call: Callable[[], None]) -> None:
        """There is room now."""
        call()

    def unreachable(self, target: Target, now: float) -> None:
        """This machine is always reached."""

    def shunned(self, target: Target, now: float) -> bool:
        """Never."""
        del target, now
        return False

    def terminate_all(self, grace: float) -> None:
        """End every local command of this process: TERM now, KILL after `grace` seconds.

        For the interpreter's exit. Waits for it, half a second longer than `grace` at most. What a command that has
        ended by itself left in the background stays. Any thread but the watcher's.
        """
        until = time.monotonic() + TELL
        begun = {session: session.started(until) for session in tuple(all_sessions) if not session.drop()}
        living = [process for process in begun.values() if process is not None and process.ended is None]
        states = end_sessions(living, grace, grace + 0.5, watcher().at) if living else {}
        # The watcher, which may be closed next, has still to reap them and to close their pipes.
        over = [one for one, process in begun.items() if process is None or states.get(process, "gone") == "gone"]
        for session in over:
            session.wind_up()
        until = time.monotonic() + TELL
        while any(session in all_sessions for session in over) and time.monotonic() < until:
            time.sleep(0.001)

    def living(self) -> int:
        """Return how many processes of local commands run. Any thread."""
        return sum(1 for session in tuple(all_sessions) if session.runs())


class LocalConnection:
    """Makes and ends the processes."""

    def __init__(self) -> None:
        self.target = Target(transport="local")

    def prepare(self, command: Command, sink: Sink) -> LocalSession:
        """Make a session for `command`; nothing runs yet. Any thread."""
        return LocalSession(command, sink)

    def end(self, sessions: Sequence[Session], stop: Stop, within: float) -> dict[Session, Ending]:
        """End what runs in these sessions: TERM at once, KILL after `grace` seconds. Pool.

        What is ended is the whole session of each command: its children too, whatever group they have made.
        Returns when all are gone, after `within` seconds at the latest; a KILL that is due later still comes. What
        had been printed has then been given to the sinks, and the sessions are over, whoever holds their pipes.
        """
        until = time.monotonic() + within
        endings = dict.fromkeys(sessions, Ending("unknown"))
        processes: dict[LocalSession, Process] = {}
        for session in sessions:
            if isinstance(session, LocalSession):
                # One that could be dropped, or was refused by the system, has no process and will have none.
                process = None if session.drop() else session.started(until)
                if process is None:
                    endings[session] = Ending("gone")
                else:
                    processes[session] = process
        left = max(0.0, until - time.monotonic())
        ended = end_sessions(tuple(processes.values()), stop.grace, left, watcher().at)
        for session, process in processes.items():
            endings[session] = Ending(ended[process])
            session.wind_up()
        if processes:
            told = threading.Event()
            watcher().call(told.set)
            told.wait(TELL)
        return endings

    def retire(self) -> None:
        """There is no other one to take its place: it goes on."""


@functools.cache
def transport() -> LocalTransport:
    """Return the process's transport for local commands."""
    return LocalTransport()
