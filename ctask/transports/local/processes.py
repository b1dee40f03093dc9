# SPDX-License-Identifier: Apache-2.0
"""Processes of this machine: start one in a session of its own, find who is in a session, end them all.

`Ends` and `Process.reap` run in the watcher's thread, `end_sessions` and `kill_sessions` in a thread that may wait. A
`Process` has a lock of its own, under which it is reaped and signalled: no signal goes to a number that is somebody
else's by now.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pty
import signal
import termios
import threading
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import NamedTuple

from ctask import children
from ctask.options import Command, Stop
from ctask.result import Ending, RemoteProcess
from ctask.standstill import LATE
from ctask.transports.base import STDERR, STDOUT

__all__ = ["Ends", "Process", "end_sessions", "kill_sessions"]

_SHELL = b"/bin/sh"
#: What a shell does that begins where SIGCHLD is ignored: it becomes the command once the pipe was closed.
_GATE = 9
_WAIT = b'read -r ctask_gate <&9; unset ctask_gate; exec 9<&-; exec "$@"'
#: What runs a command in a session of its own, waits for it, and passes on the TERM that it gets.
_RUNNERS = frozenset({"sudo", "su", "runuser"})
_TICKS = os.sysconf("SC_CLK_TCK")

#: Seconds between two looks at a session that is being ended.
_LOOK = 0.01
#: Seconds between KILLs, and how many are sent: a process that forks all the time can slip through one.
_AGAIN = 0.05
_KILLS = 5
#: Processes of one session that are told of.
_MOST = 16


class Ends:
    """The descriptors between a child and us; ours do not block, all are closed on exec.

    What somebody has made inheritable in this process is inherited, as by any program that it starts.

    Attributes:
        outputs: stream number -> what it is read from.
        stdin: what the child's standard input is written to; None where it has none.
        pidfd: of the child, once it was started; None where there can be none. `close` leaves it.

    Raises:
        OSError: there are no descriptors, or no terminals, left.
    """

    __slots__ = ("_actions", "_theirs", "outputs", "pidfd", "stdin")

    def __init__(self, command: Command) -> None:
        self.outputs: dict[int, int] = {}
        self.stdin: int | None = None
        self.pidfd: int | None = None
        self._theirs: list[int] = []
        self._actions: list[tuple[object, ...]] = []
        try:
            if command.pty:
                self._terminal()
            else:
                self._pipes(stdin=command.stdin)
            for fd in (self.stdin, *self.outputs.values()):
                if fd is not None:
                    os.set_blocking(fd, False)
        except BaseException:
            self.close()
            raise

    def spawn(self, command: Command) -> int:
        """Start the command and return its pid.

        Raises:
            OSError: it could not be started; all descriptors have been closed.
        """
        program, argv = (command.argv[0], command.argv) if command.argv else (_SHELL, (b"sh", b"-c", command.line))
        gate = -1
        try:
            if children.keeps_no_status():
                # One that has ended by the time that we ask for its pidfd leaves nothing: it waits for that.
                theirs, gate = children.make_pipe()
                self._give(theirs, _GATE)
                program, argv = _SHELL, (b"sh", b"-c", _WAIT, b"sh", program, *argv[1:])
            pid = (os.posix_spawnp if command.argv else os.posix_spawn)(
                program,
                argv,
                _environment(),
                file_actions=self._actions,
                setsid=True,
                setsigmask=(),
                setsigdef=children.DEFAULT_SIGNALS,
            )
            self.pidfd = children.open_pidfd(pid)
        except BaseException:
            self.close()
            raise
        finally:
            if gate >= 0:
                os.close(gate)
        self._close_theirs()
        return pid

    def close(self) -> None:
        """Close all that is open."""
        self._close_theirs()
        for fd in self.outputs.values():
            os.close(fd)
        self.outputs.clear()
        if self.stdin is not None:
            os.close(self.stdin)
            self.stdin = None

    def _close_theirs(self) -> None:
        while self._theirs:
            os.close(self._theirs.pop())

    def _pipes(self, *, stdin: bool) -> None:
        if stdin:
            read, self.stdin = children.make_pipe()
            self._give(read, 0)
        else:
            self._actions.append((os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0))
        for stream in (STDOUT, STDERR):
            self.outputs[stream], write = children.make_pipe()
            self._give(write, stream)

    def _give(self, fd: int, number: int) -> None:
        self._theirs.append(fd)
        self._actions.append((os.POSIX_SPAWN_DUP2, fd, number))

    def _terminal(self) -> None:
        master, slave = pty.openpty()
        self._theirs.append(slave)
        self.outputs[STDOUT] = master
        self.outputs[STDOUT] = children.above_standard(master)
        # A descriptor of its own to write to: what is written and what is read are watched apart.
        self.stdin = children.above_standard(os.dup(master))
        termios.tcsetwinsize(slave, (24, 80))
        # The leader of a session has no terminal until it opens one by its path: that becomes its own.
        self._actions.append((os.POSIX_SPAWN_OPEN, 0, os.ttyname(slave), os.O_RDWR, 0))
        self._actions.append((os.POSIX_SPAWN_DUP2, 0, STDOUT))
        self._actions.append((os.POSIX_SPAWN_DUP2, 0, STDERR))


def _environment() -> dict[bytes, bytes]:
    while True:
        try:
            return os.environb.copy()
        except (KeyError, RuntimeError):
            continue  # another thread took a variable out of it meanwhile


class Member(NamedTuple):
    """A living process of a session."""

    pid: int
    parent: int
    group: int
    session: int
    #: clock ticks between boot and its start
    start: int
    #: letter of proc(5), and name of its program: of the moment when it was seen
    state: str
    name: str
    #: TERM comes to it by the one that runs it; a second one would mean "at once" to some programs
    relayed: bool = False


class Process:
    """A child that leads a session.

    The kernel gives the number of a session to nobody else as long as anybody is in it. So while the child is
    not reaped, who has its number for a session belongs to it; afterwards, once one of them was there before the
    child's end, or had been seen by us in the session.

    What sudo, su and runuser run in a session of its own is a part of the command, for they wait for it.
    """

    __slots__ = ("_inner", "_lock", "_seen", "ended", "pid")

    def __init__(self, pid: int) -> None:
        self.pid = pid
        #: when it was reaped, in seconds since boot; None before. Guarded by the lock.
        self.ended: float | None = None
        self._lock = threading.Lock()
        self._seen: frozenset[tuple[int, int]] = frozenset()
        #: session -> who was last seen in it, of those within this one
        self._inner: dict[int, frozenset[tuple[int, int]]] = {}

    def reap(self) -> int | None:
        """Return the status for `os.waitstatus_to_exitcode` once the child has ended, None before.

        Raises:
            ChildProcessError: somebody else has reaped it.
        """
        with self._lock:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:
                self.ended = _since_boot()
                raise
            if not pid:
                return None
            self.ended = _since_boot()
            return status

    def signal_group(self, number: signal.Signals) -> None:
        """Signal the child's process group while the child is not reaped."""
        with self._lock:
            if self.ended is None:
                # Another user's by now: whether it is still there, the next look tells.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.pid, number)

    def claim(self, found: list[Member]) -> list[Member] | None:
        """Return who is of this session, of all that have its number; None where that is not known."""
        if self.ended is not None and found:
            if any(member.pid == self.pid for member in found):
                return []  # the number leads another session by now
            # Ticks are rounded down. A stranger would need all pids to be used up within that one.
            if not any(m.start / _TICKS <= self.ended or (m.pid, m.start) in self._seen for m in found):
                return None
        self._seen = frozenset((member.pid, member.start) for member in found)
        return found

    def look_inside(self, sessions: Mapping[int, Collection[int]], members: list[Member]) -> list[Member]:
        """Return who is in the sessions within this one, also where the one that ran them is gone by now."""
        found: list[Member] = []
        known = self._inner
        self._inner = {}
        queue = list(members)
        while True:
            runners = {member.pid for member in queue if member.name in _RUNNERS}
            fresh = [] if not runners else [s for s in sessions if s not in known and s not in self._inner]
            begun = {s for s in fresh if (leader := _member(s, s)) is not None and leader.parent in runners}
            if not known and not begun:
                return found
            queue = []
            for session in (*known, *begun):
                inside = _living(sessions.get(session, ()), session)
                if session in begun or any((member.pid, member.start) in known[session] for member in inside):
                    self._inner[session] = frozenset((member.pid, member.start) for member in inside)
                    relayed = any(member.pid == session and member.parent in runners for member in inside)
                    queue += [member._replace(relayed=relayed) for member in inside]
            known = {}
            found += queue

    def hidden(self) -> bool:
        """Whether the group has somebody whom we may not even see (another user's, with hidden processes)."""
        try:
            os.killpg(self.pid, 0)
        except PermissionError:
            return True
        except ProcessLookupError:
            pass
        return False


def _since_boot() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _sessions() -> dict[int, list[int]]:
    """Return the processes of each session, dead ones included."""
    found: dict[int, list[int]] = {}
    with os.scandir("/proc") as entries:
        pids = [int(entry.name) for entry in entries if entry.name.isdecimal()]
    for pid in pids:
        # A call that reads no file: /proc/PID/stat is opened for those only that are looked for.
        with contextlib.suppress(OSError):
            found.setdefault(os.getsid(pid), []).append(pid)
    return found


def _living(pids: Collection[int], session: int) -> list[Member]:
    """Return those of these processes that live in a session; a zombie lives no more."""
    return [member for pid in pids if (member := _member(pid, session)) is not None]


def _member(pid: int, session: int) -> Member | None:
    try:
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        line = os.read(fd, 4096)
    except OSError:
        return None
    finally:
        os.close(fd)
    # Behind the name, which may have blanks and brackets: state, ppid, pgrp, session, … (starttime is field 22).
    before, _, after = line.rpartition(b") ")
    fields = after.split()
    if len(fields) < 20 or fields[0] in (b"Z", b"X", b"x") or int(fields[3]) != session:
        return None
    name = before.partition(b"(")[2].decode("utf-8", "backslashreplace")
    return Member(pid, int(fields[1]), int(fields[2]), session, int(fields[19]), fields[0].decode(), name)


def _signal_member(member: Member, number: signal.Signals) -> None:
    """Signal this process and no other that has got its pid."""
    try:
        fd = os.pidfd_open(member.pid)
    except OSError as error:
        # A kernel or a sandbox without pidfd: between this look and the signal there are microseconds.
        now = _member(member.pid, member.session) if error.errno != errno.ESRCH else None
        if now is not None and now.start == member.start:
            _kill(member.pid, number)
        return
    try:
        if (now := _member(member.pid, member.session)) is not None and now.start == member.start:
            signal.pidfd_send_signal(fd, number)
    except OSError:
        pass  # gone, or another user's: the next look tells
    finally:
        os.close(fd)


def _kill(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(OSError):
        os.kill(pid, number)


class _Look(NamedTuple):
    """What was seen of some sessions: which have somebody in them, and of which nothing can be said.

    An empty list stands for somebody whom we may not see.
    """

    living: dict[Process, list[Member]]
    unknown: set[Process]


def _look(processes: Collection[Process]) -> _Look:
    if not processes:
        return _Look({}, set())
    found = _sessions()
    living: dict[Process, list[Member]] = {}
    unknown: set[Process] = set()
    for process in processes:
        members = process.claim(_living(found.get(process.pid, ()), process.pid))
        if members is None:
            unknown.add(process)
            continue
        members = members + process.look_inside(found, members)
        if members or process.hidden():
            living[process] = members
    return _Look(living, unknown)


def end_sessions(
    processes: Collection[Process],
    stop: Stop,
    within: float,
    at: Callable[[float, Callable[[], None]], object],
    *,
    broken: threading.Event | None = None,
    over: Callable[[Process, Ending], None] = lambda process, ending: None,
) -> dict[Process, Ending]:
    """End all that runs in the sessions of these children: TERM at once, KILL after the grace where `stop` says so.

    Waits until all are gone, at most `within` seconds; a KILL that is due later is made by `at`.

    Args:
        broken: ends the waiting when it is set.
        over: told of each that is gone, as soon as it is seen to be.

    Returns:
        `gone`, `alive` or `unknown` for each, as it was last seen.
    """
    began = time.monotonic()
    until = began + within
    kill_at = began + stop.grace if stop.policy == "kill" else None
    ending = _Ending(processes, broken or threading.Event(), over)
    ending.terminate()
    ending.wait(until if kill_at is None else min(kill_at, until))
    if ending.living and kill_at is not None:
        if kill_at <= until and not ending.broken.is_set():
            ending.kill(until)
        else:
            at(kill_at, partial(_kill_later, tuple(ending.living), _KILLS, at))
    return {process: ending.told(process) for process in processes}


def kill_sessions(processes: Collection[Process], within: float) -> dict[Process, Ending]:
    """KILL all that runs in the sessions of these children, which had their TERM; as `end_sessions` otherwise."""
    ending = _Ending(processes, threading.Event(), lambda process, ending: None)
    ending.look(processes)
    ending.kill(time.monotonic() + within)
    return {process: ending.told(process) for process in processes}


class _Ending:
    """Sessions that are being ended: who is in them, and who was told to end."""

    def __init__(
        self, processes: Collection[Process], broken: threading.Event, over: Callable[[Process, Ending], None]
    ) -> None:
        self.broken = broken
        self.living: dict[Process, list[Member]] = {}
        self._over = over
        self._unknown: set[Process] = set()
        self._passed: set[tuple[int, int]] = set()
        self._counted: dict[Process, set[tuple[int, int]]] = {process: set() for process in processes}

    def look(self, processes: Collection[Process]) -> None:
        """See who is in these sessions."""
        seen = _look(processes)
        self.living = seen.living
        self._unknown |= seen.unknown

    def terminate(self) -> None:
        """Send TERM to everybody."""
        processes = tuple(self._counted)
        self._count(processes)
        for process in processes:
            process.signal_group(signal.SIGTERM)
        self._count(processes)
        for process, members in self.living.items():
            for member in members:
                # Those that were in the leader's group have had theirs, unless the leader was reaped already.
                if not member.relayed and (member.group != process.pid or process.ended is not None):
                    _signal_member(member, signal.SIGTERM)
        self._tell(processes)

    def _pass_on(self) -> None:
        # The TERM of sudo and its like reaches the command that they run, and not what that one has started.
        for process, members in self.living.items():
            for member in members:
                key = (member.pid, member.start)
                if member.session != process.pid and not member.relayed and key not in self._passed:
                    self._passed.add(key)
                    _signal_member(member, signal.SIGTERM)

    def _count(self, processes: Collection[Process]) -> None:
        # Those that are there at the TERM: who makes new ones all the time has told nobody to end.
        self.look(processes)
        for process, members in self.living.items():
            self._counted[process].update((member.pid, member.start) for member in members)

    def kill(self, until: float) -> None:
        """Send KILL, and wait."""
        kills = 0
        while self.living and kills < _KILLS and (not kills or time.monotonic() < until):
            kills += 1
            _kill_members(self.living)
            self.wait(min(time.monotonic() + _AGAIN, until))
        self.wait(until)

    def wait(self, until: float) -> None:
        """Look until the living are gone, at most until then; what cannot be known is not waited for."""
        while self.living and (left := until - time.monotonic()) > 0 and not self.broken.wait(min(_LOOK, left)):
            self._look_again()
        if self.living and time.monotonic() > until + LATE:
            self._look_again()  # this process stood still: who was told to end may have done it

    def _look_again(self) -> None:
        before = tuple(self.living)
        self.look(before)
        self._pass_on()
        self._tell(before)

    def _tell(self, processes: Collection[Process]) -> None:
        for process in processes:
            if process not in self.living and process not in self._unknown:
                self._over(process, self.told(process))

    def told(self, process: Process) -> Ending:
        """Return what is known of a session."""
        count = len(self._counted[process])
        members = self.living.get(process)
        if members is None:
            return Ending("unknown" if process in self._unknown else "gone", count)
        if not members:  # somebody whom we may not see
            return Ending("unknown", count or None)
        return Ending("alive", count, tuple(map(_seen, members[:_MOST])))


def _seen(member: Member) -> RemoteProcess:
    try:
        with open(f"/proc/{member.pid}/wchan", encoding="ascii", errors="backslashreplace") as file:
            waits_in = file.read(64).strip()
    except OSError:
        waits_in = ""
    return RemoteProcess(member.pid, member.name, member.state, "" if waits_in == "0" else waits_in)


def _kill_members(living: dict[Process, list[Member]]) -> None:
    for process, members in living.items():
        process.signal_group(signal.SIGKILL)
        for member in members:
            _signal_member(member, signal.SIGKILL)


def _kill_later(processes: Collection[Process], times: int, at: Callable[[float, Callable[[], None]], object]) -> None:
    """Kill what is left, and look again a little later; in the watcher's thread, so it waits for nothing."""
    living = _look(processes).living
    _kill_members(living)
    if living and times > 1:
        at(time.monotonic() + _AGAIN, partial(_kill_later, tuple(living), times - 1, at))
