# SPDX-License-Identifier: Apache-2.0
"""The connections that this process keeps: who has places on them, when they go, and how many there may be.

Dispatchers take and give back places; the watcher ends idle connections; the connections' threads tell when
they are gone. One lock guards all of it; under it nothing is sent, waited for or called out to, and sockets
are shut, and waiters called, after it was left.
"""

from __future__ import annotations

import resource
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ctask.buffers.spill import files
from ctask.options import Target
from ctask.standstill import LATE
from ctask.transports.ssh import alive
from ctask.transports.ssh.connection import SshConnection
from ctask.transports.ssh.reader import Readable, Reader
from ctask.transports.ssh.settling import Settling
from ctask.transports.ssh.transport import Link
from ctask.transports.watcher import watcher

__all__ = ["PLACES", "ConnectionPool", "Statistics"]

#: Jobs on one connection: sshd's MaxSessions is 10 by default, and the ending of a command needs a session.
PLACES = 8
#: Descriptors that are left to the program and to ctask's own needs.
SPARE_DESCRIPTORS = 26
#: Seconds for which a target that could not be reached is remembered.
UNREACHED = 600.0
#: Seconds that a new connection waits for its first job, where `keep` is shorter.
_FIRST_JOB = 1.0
#: Seconds after which a timer that has not come is not coming: its watcher was closed.
_LATE = 5.0


@dataclass(frozen=True, slots=True)
class Statistics:
    """What the pool has, and what it has done.

    Attributes:
        open: connections that live.
        idle: those of them without a job.
        dials: connections in the making that were reserved.
        made: connections that were ever added.
        reused: places taken on a connection that had served a job before.
        lost: connections that ended by themselves.
    """

    open: int
    idle: int
    dials: int
    made: int
    reused: int
    lost: int


class ConnectionPool:
    """Kept connections by their whole target; thread safe, and no call but `close_all` waits for anything."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reader: Reader | None = None
        #: questions to the reader that are open; the reader's thread takes them out
        self._settlings: set[Settling] = set()
        self._clear()

    def _clear(self) -> None:
        #: target -> its connections with room, in the order in which they got it
        self._roomy: dict[Target, dict[SshConnection, None]] = {}
        #: every connection that was kept and is not gone, retired ones included
        self._all: dict[SshConnection, None] = {}
        #: those of them without a job, the longest idle first
        self._idle: dict[SshConnection, None] = {}
        #: every connection that has begun, those in the making included
        self._links: set[Link] = set()
        self._dials = 0
        self._waiters: list[Callable[[], None]] = []
        self._unreached: dict[Target, float] = {}
        self._made = self._reused = self._lost = 0
        self._served: set[SshConnection] = set()

    def __repr__(self) -> str:
        now = self.statistics()
        return f"<ConnectionPool: {now.open} open, {now.idle} idle, {now.dials} in the making>"

    def statistics(self) -> Statistics:
        """Return counts of this moment."""
        with self._lock:
            return Statistics(len(self._all), len(self._idle), self._dials, self._made, self._reused, self._lost)

    # --- places: the dispatchers

    def take(self, target: Target) -> SshConnection | None:
        """Take a place on a connection to `target` that has one; else None."""
        with self._lock:
            shelf = self._roomy.get(target)
            for connection in shelf or ():
                if connection.dead:
                    continue  # its thread is about to say so
                if not connection.places:
                    self._wake(connection)
                connection.places += 1
                if connection.places >= PLACES:
                    self._unshelve(connection)
                self._reused += connection in self._served
                self._served.add(connection)
                return connection
        return None

    def give_back(self, connection: SshConnection) -> None:
        """Give a place back."""
        with self._lock:
            connection.places -= 1
            if connection.places == PLACES - 1 and self._usable(connection):
                self._roomy.setdefault(connection.target, {})[connection] = None
            if connection.places:
                return
            close = not self._usable(connection) or connection.target.keep == 0
            if close:
                self._unshelve(connection)
                connection.retired = True
            else:
                self._rest(connection)
            waiters = self._take_waiters()
        if close:
            connection.close()
        else:
            self._watch(connection, connection.idle_since + self._keep_of(connection))
        _call(waiters)

    def keep(self, connection: SshConnection, *, alone: bool = False) -> None:
        """Add a connection, which takes over its dial's reservation; `alone` retires the target's others."""
        if alone:
            self._retire_those(lambda target: target == connection.target)
        with self._lock:
            self._dials = max(0, self._dials - 1)
            self._unreached.pop(connection.target, None)
            if not connection.dead and not connection.retired:
                connection.kept = True
                self._made += 1
                self._all[connection] = None
                self._roomy.setdefault(connection.target, {})[connection] = None
                self._rest(connection)
            waiters = self._take_waiters()
        if connection.kept:
            self._watch(connection, connection.idle_since + self._keep_of(connection))
        else:
            connection.close()
        _call(waiters)

    def retire(self, connection: SshConnection) -> None:
        """Give no new places on it, and close it once the last came back."""
        with self._lock:
            connection.retired = True
            self._unshelve(connection)
            self._idle.pop(connection, None)
            idle = connection.places == 0
        if idle:
            connection.close()

    def disconnect(self, targets: Iterable[Target] | None = None) -> None:
        """Close the idle connections to these, or to all, now, and busy ones after their jobs.

        Of a target its address and port are looked at: who disconnects a node means every user's connections.
        """
        wanted = {(target.address, target.port) for target in targets} if targets is not None else None
        self._retire_those(lambda target: wanted is None or (target.address, target.port) in wanted)

    # --- the bound: the side that plans dials

    def reserve(self) -> bool:
        """Count a new dial in, if descriptors allow; an idle connection is closed for it.

        False: `when_room` tells when it is worth another try.
        """
        bound = _bound()
        with self._lock:
            if self._dials + len(self._all) < bound:
                self._dials += 1
                return True
            oldest = next(iter(self._idle), None)
            if oldest is None:
                return False
            # Its descriptor is closed by its thread, a moment from now; the spare ones cover that moment.
            self._forget(oldest)
            oldest.retired = True
            self._dials += 1
        oldest.close()
        return True

    def unreserve(self) -> None:
        """Count a dial out that made no connection."""
        with self._lock:
            self._dials = max(0, self._dials - 1)
            waiters = self._take_waiters()
        _call(waiters)

    def when_room(self, call: Callable[[], None]) -> None:
        """Have `call` called once, when there may be room; now where there is. It must not wait."""
        bound = _bound()
        with self._lock:
            room = bool(self._idle) or self._dials + len(self._all) < bound
            if not room:
                self._waiters.append(call)
        if room:
            call()

    # --- targets that could not be reached

    def unreachable(self, target: Target, now: float) -> None:
        """Remember that `target` could not be reached."""
        with self._lock:
            if len(self._unreached) > 1_000:
                self._unreached = {t: at for t, at in self._unreached.items() if now - at < UNREACHED}
            self._unreached[target] = now

    def shunned(self, target: Target, now: float) -> bool:
        """Whether `target` could not be reached within the last ten minutes, and has not been since."""
        with self._lock:
            at = self._unreached.get(target)
            return at is not None and now - at < UNREACHED

    # --- the lives of connections

    def prepare(self) -> None:
        """Have the reader. Raises as making a thread and descriptors does."""
        if self._reader is None:
            with self._lock:
                if self._reader is None:
                    self._reader = Reader()

    def read(self, fd: int, link: Readable) -> None:
        """Have the reader look after a connection. Raises as making a thread and descriptors does."""
        with self._lock:
            if self._reader is None:
                self._reader = Reader()
            self._reader.add(fd, link)

    def settle(self, call: Callable[[], None]) -> None:
        """Make a call once the reader has taken all that had come by now. Any thread; never waits."""
        try:
            settling = Settling(call, self._settlings.discard)
        except OSError:  # no descriptor: there is no better answer
            call()
            return
        with self._lock:
            reader = self._reader
            if reader is not None:
                self._settlings.add(settling)
                reader.add(settling.fd, settling)
        if reader is None:
            settling.abandon()

    def born(self, link: Link) -> None:
        """Note a connection that begins."""
        with self._lock:
            self._links.add(link)

    def unborn(self, link: Link) -> None:
        """Note that it ended before it was one that is kept."""
        with self._lock:
            self._links.discard(link)

    def gone(self, connection: SshConnection) -> None:
        """Forget a connection that is gone; its thread, before its sessions are told."""
        with self._lock:
            self._links.discard(connection.link)
            self._lost += connection.kept and not connection.retired
            self._forget(connection)
            waiters = self._take_waiters()
        _call(waiters)

    def close_all(self, within: float = 2.0) -> bool:
        """End every connection, those in the making included, and wait for it; False: some are left.

        For the process's exit, and for tests that look for leaks.
        """
        deadline = time.monotonic() + within
        with self._lock:
            for connection in list(self._all):
                connection.retired = True
                self._unshelve(connection)
            self._idle.clear()
            links = list(self._links)
        for link in links:
            link.close()
        while (left := not all(link.over for link in links)) and time.monotonic() < deadline:
            time.sleep(0.001)
        with self._lock:
            reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()
        for settling in list(self._settlings):
            settling.abandon()
        return not left

    def forget(self) -> None:
        """Forget everything, without a word to anybody: in the child of a fork, where no connection is ours."""
        self._lock = threading.Lock()
        self._clear()
        for settling in list(self._settlings):
            settling.forget()
        if self._reader is not None:
            self._reader.abandon()
            self._reader = None

    def _retire_those(self, wanted: Callable[[Target], bool]) -> None:
        with self._lock:
            chosen = [each for each in self._all if wanted(each.target)]
        for connection in chosen:
            self.retire(connection)

    def _usable(self, connection: SshConnection) -> bool:
        return connection.kept and not connection.retired and not connection.dead

    def _rest(self, connection: SshConnection) -> None:
        """It has no job now; under the lock."""
        connection.idle_since = time.monotonic()
        self._idle[connection] = None

    def _wake(self, connection: SshConnection) -> None:
        """It has a job again; under the lock."""
        self._idle.pop(connection, None)
        if time.monotonic() - connection.idle_since >= alive.STALE:
            connection.link.doubt = alive.Doubt(connection.link)

    def _unshelve(self, connection: SshConnection) -> None:
        shelf = self._roomy.get(connection.target)
        if shelf is not None and shelf.pop(connection, self) is None and not shelf:
            del self._roomy[connection.target]

    def _forget(self, connection: SshConnection) -> None:
        self._unshelve(connection)
        self._all.pop(connection, None)
        self._idle.pop(connection, None)
        self._served.discard(connection)
        if connection.alarm is not None:
            connection.alarm.cancel()

    def _take_waiters(self) -> list[Callable[[], None]]:
        """Take those who wait for room, where there is some; under the lock."""
        if not self._waiters or (not self._idle and self._dials + len(self._all) >= _bound()):
            return []
        waiters, self._waiters = self._waiters, []
        return waiters

    def _keep_of(self, connection: SshConnection) -> float:
        """Return for how long it may be idle: a new one gets its time to be taken."""
        keep = connection.target.keep
        return keep if connection in self._served else max(keep, _FIRST_JOB)

    def _watch(self, connection: SshConnection, due: float) -> None:
        """Have a connection looked at by `due`, and at its next beat; one timer for each, however often it rests."""
        now = time.monotonic()
        interval = connection.target.alive_interval
        when = due if interval is None else min(due, connection.pulse.at + interval)
        with self._lock:
            if connection.timer and now < connection.timer + _LATE and connection.timer <= when:
                return  # it is looked at before, and then what is due is seen
            connection.timer = when
            former, connection.alarm = connection.alarm, None
        if former is not None:
            former.cancel()
        # The timer outlives a connection that is lost: it is not to keep it, and all that hangs on it, until then.
        seen = weakref.ref(connection)

        def look() -> None:
            found = seen()
            if found is not None:
                self._look(found)

        def look_first() -> None:
            # Noticed late: a sign of life may lie in the socket.
            if time.monotonic() - when > LATE:
                self.settle(lambda: loop.call(look))
            else:
                look()

        try:
            loop = watcher()
            connection.alarm = loop.at(when, look_first)
        except (RuntimeError, OSError):  # no thread or descriptor for a watcher: nothing is kept then
            self.retire(connection)

    def _look(self, connection: SshConnection) -> None:
        """Close it if it was idle for long enough, ask it if it is in use, and look again later; the watcher."""
        now = time.monotonic()
        interval = connection.target.alive_interval
        with self._lock:
            connection.timer = 0.0
            busy = connection.places > 0
            if connection not in (self._all if busy else self._idle):
                return  # it is gone, or about to be
            due = float("inf") if busy else connection.idle_since + self._keep_of(connection)
            expired = now >= due
            if expired:
                connection.retired = True
                self._unshelve(connection)
                self._idle.pop(connection)
        if expired:
            connection.close()
            return
        if interval is not None:
            connection.pulse.beat(connection.link, now, interval, busy=busy)
        if due < float("inf") or interval is not None:
            self._watch(connection, due)


def _bound() -> float:
    """Return how many connections and dials there may be together; read anew, since a program may raise its limit."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return float("inf") if soft == resource.RLIM_INFINITY else max(1, soft - SPARE_DESCRIPTORS - files())


def _call(waiters: list[Callable[[], None]]) -> None:
    for waiter in waiters:
        waiter()
