# SPDX-License-Identifier: Apache-2.0
"""The way to this machine: always there, with room for as many commands as there are descriptors for their pipes.

`end` and `terminate_all` run in threads that may wait, the rest in any. One small lock guards the count of places.
"""

from __future__ import annotations

import functools
import resource
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from socket import socket
from typing import NoReturn

from ctask.options import Command, Stop, Target
from ctask.result import Ending
from ctask.standstill import awake
from ctask.transports.base import Connection, Session, Sink
from ctask.transports.local.processes import Process, end_sessions, kill_sessions
from ctask.transports.local.session import LocalSession
from ctask.transports.local.session import sessions as all_sessions
from ctask.transports.watcher import Watcher, watcher

__all__ = ["LocalConnection", "LocalTransport", "transport"]

#: Descriptors of a command that runs (three pipes, its pidfd), and those that are left to the program and to ctask.
DESCRIPTORS = 4
SPARE_DESCRIPTORS = 26
#: Seconds for which no more commands run than ran when there was no process for one more.
CROWDED = 5.0
#: Seconds in which the watcher hands over the last words of commands that were ended.
TELL = 0.5


class LocalTransport:
    """The way to this machine: one connection, which has room as long as there are descriptors for pipes."""

    dials = False
    by_files = True
    hello = b""

    def __init__(self) -> None:
        self._connection = LocalConnection(self._crowded)
        self._lock = threading.Lock()
        # Under the lock.
        self._places = 0
        # No process was to be had for more than so many, until this time.
        self._most, self._most_until = 0, 0.0
        self._waiters: list[Callable[[], None]] = []

    def check(self, target: Target) -> None:
        """Nothing can be wrong with it."""

    def take(self, target: Target) -> LocalConnection | None:
        """Return the one connection, unless as many commands run as there are descriptors for. Never waits."""
        del target
        with self._lock:
            if not self._room():
                return None
            self._places += 1
        return self._connection

    def give_back(self, connection: Connection) -> None:
        """A command has its outcome."""
        with self._lock:
            self._places -= 1
            waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter()

    def _room(self) -> bool:
        """Under the lock."""
        if self._most_until and time.monotonic() >= self._most_until:
            self._most_until = 0.0
        return self._places < (min(_bound(), self._most) if self._most_until else _bound())

    def _crowded(self) -> None:
        """There was no process for one more: as many as run are the most for a while. The watcher."""
        most = max(1, self.living())
        with self._lock:
            self._most, self._most_until = most, time.monotonic() + CROWDED

    def connect(self, target: Target, sock: socket, on_phase: Callable[[str], None]) -> NoReturn:
        """Never to be called: `take` always gives a connection."""
        raise RuntimeError(f"a local command needs no connection: {target}, {sock}, {on_phase}")

    def keep(self, connection: Connection, *, alone: bool = False) -> None:
        """It is kept anyway."""

    def disconnect(self, targets: Iterable[Target] | None = None) -> None:
        """There is nothing to close: a local command has no connection."""

    def reserve(self) -> bool:
        """Nothing is dialed: who finds no place waits for one."""
        return False

    def unreserve(self) -> None:
        """Nothing was reserved."""

    def when_room(self, call: Callable[[], None]) -> None:
        """Have `call` called once, when a place is free; now where one is."""
        with self._lock:
            room = self._room()
            if not room:
                self._waiters.append(call)
        if room:
            call()

    def unreachable(self, target: Target, now: float) -> None:
        """This machine is always reached."""

    def shunned(self, target: Target, now: float) -> bool:
        """Never."""
        del target, now
        return False

    def terminate_all(self, grace: float) -> None:
        """End every local command of this process: TERM now, KILL after `grace` seconds.

        What was told to end before is not told again, and has its KILL `grace` seconds after that, if its policy
        has one. For the interpreter's exit. Waits for it, half a second longer than `grace` at most. What a command
        that has ended by itself left in the background stays. Any thread but the watcher's.
        """
        until = awake() + TELL
        begun = {session: session.started(until) for session in tuple(all_sessions) if not session.drop()}
        living = {one: process for one, process in begun.items() if process is not None and process.ended is None}
        untold = [process for session, process in living.items() if session.stopped is None]
        endings = end_sessions(untold, Stop("kill", grace), grace + 0.5, watcher().at) if untold else {}
        endings |= _kill_told({session: process for session, process in begun.items() if process is not None}, grace)
        self._connection.wake()
        # The watcher, which may be closed next, has still to reap them and to close their pipes.
        over = {
            session
            for session, process in begun.items()
            if process is None or session not in living or (process in endings and endings[process].state == "gone")
        }
        for session in begun:
            if session in over:
                session.wind_up()
            else:
                session.let_go()
        until = time.monotonic() + TELL
        while any(session in all_sessions for session in begun) and time.monotonic() < until:
            time.sleep(0.001)

    def living(self) -> int:
        """Return how many processes of local commands run. Any thread."""
        return sum(1 for session in tuple(all_sessions) if session.runs())


class LocalConnection:
    """Makes and ends the processes."""

    def __init__(self, crowded: Callable[[], None] = lambda: None) -> None:
        self._crowded = crowded
        self.target = Target(transport="local")
        self._broken = threading.Event()

    def prepare(self, command: Command, sink: Sink) -> LocalSession:
        """Make a session for `command`; nothing runs yet. Any thread."""
        return LocalSession(command, sink, self._crowded)

    def wake(self) -> None:
        """End the waits of `end`: the interpreter exits."""
        broken, self._broken = self._broken, threading.Event()
        broken.set()

    def end(
        self,
        sessions: Sequence[Session],
        stop: Stop,
        within: float,
        told: Callable[[Session, Ending], None] | None = None,
    ) -> dict[Session, Ending]:
        """End what runs in these sessions by the policy of `stop`. Pool.

        What is ended is the whole session of each command: its children too, whatever group they have made.
        Returns when all are gone, after `within` seconds at the latest; a KILL that is due later still comes. What
        had been printed has then been given to the sinks, and the sessions are over, whoever holds their pipes.
        What is left to run has its pipes closed.
        """
        until, broken = awake() + within, self._broken
        endings = dict.fromkeys(sessions, Ending("unknown"))
        processes: dict[LocalSession, Process] = {}
        for session in sessions:
            if isinstance(session, LocalSession):
                # One that could be dropped, or was refused by the system, has no process and will have none.
                process = None if session.drop() else session.started(until)
                session.stopped = (stop, time.monotonic())
                if process is None:
                    endings[session] = Ending("gone", 0)
                elif stop.policy == "leave":
                    endings[session] = Ending("left")
                    session.close()
                else:
                    processes[session] = process
        if processes:
            endings |= _end(processes, stop, until, broken, told)
        return endings

    def retire(self) -> None:
        """There is no other one to take its place: it goes on."""


def _end(
    processes: Mapping[LocalSession, Process],
    stop: Stop,
    until: float,
    broken: threading.Event,
    told: Callable[[Session, Ending], None] | None,
) -> dict[Session, Ending]:
    """End what runs in these sessions; see `LocalConnection.end`."""
    whose = {process: session for session, process in processes.items()}
    # That which started them. It may be closed meanwhile, and the exit wants no new one.
    loop = next(iter(processes)).loop

    def over(process: Process, ending: Ending) -> None:
        if told is not None:
            session = whose[process]
            session.wind_up()
            _after_words(loop, partial(told, session, ending))

    left = max(0.0, until - awake())
    endings = end_sessions(tuple(whose), stop, left, loop.at, broken=broken, over=over)
    for session in processes:
        session.wind_up()
    done, patience = threading.Event(), awake() + TELL
    _after_words(loop, done.set)
    while not done.wait(0.02) and not loop.closed and awake() < patience:
        pass
    return {session: endings[process] for session, process in processes.items()}


def _after_words(loop: Watcher, call: Callable[[], None]) -> None:
    """Have `call` called by the watcher when it has told the sinks what it read until now."""
    loop.call(partial(loop.later, call))


def _kill_told(begun: Mapping[LocalSession, Process], grace: float) -> dict[Process, Ending]:
    """KILL what was told to end `grace` seconds ago, waiting for that moment."""
    stops = {process: session.stopped for session, process in begun.items() if session.stopped is not None}
    due = {process: at + min(stop.grace, grace) for process, (stop, at) in stops.items() if stop.policy == "kill"}
    if not due:
        return {}
    _sleep_until(max(due.values()), due)
    return kill_sessions(tuple(due), 0.5)


def _sleep_until(when: float, processes: Iterable[Process]) -> None:
    while time.monotonic() < when and any(process.ended is None for process in processes):
        time.sleep(0.005)


def _bound() -> float:
    """Return how many commands may run at once; read anew, since a program may raise its limit."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return float("inf") if soft == resource.RLIM_INFINITY else max(1, (soft - SPARE_DESCRIPTORS) // DESCRIPTORS)


@functools.cache
def transport() -> LocalTransport:
    """Return the process's transport for local commands."""
    return LocalTransport()
