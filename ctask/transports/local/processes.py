# SPDX-License-Identifier: Apache-2.0
"""Processes of this machine: start one in a session of its own, find who is in a session, end them all.

`Ends` and `Process.reap` run in the watcher's thread, `end_sessions` in a thread that may wait. A `Process` has a
lock of its own, under which it is reaped and signalled: no signal goes to a number that is somebody else's by now.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pty
import signal
import termios
import threading
import time
from collections.abc import Callable, Collection
from functools import partial
from typing import NamedTuple

from ctask.options import Command
from ctask.transports.base import STDERR, STDOUT

__all__ = ["Ends", "Process", "end_sessions"]

#: What a program begins with, as in a fresh login: the rest is inherited, as it was set for this process.
_DEFAULT_SIGNALS = (
    signal.SIGPIPE,
    signal.SIGXFSZ,
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGCHLD,
)
_SHELL = b"/bin/sh"
_TICKS = os.sysconf("SC_CLK_TCK")

#: Seconds between two looks at a session that is being ended.
_LOOK = 0.01
#: Seconds between KILLs, and how many are sent: a process that forks all the time can slip through one.
_AGAIN = 0.05
_KILLS = 5


class Ends:
    """The descriptors between a child and us; ours do not block, all are closed on exec.

    What somebody has made inheritable in this process is inherited, as by any program that it starts.

    Attributes:
        outputs: stream number -> what it is read from.
        stdin: what the child's standard input is written to; None where it has none.

    Raises:
        OSError: there are no descriptors, or no terminals, left.
    """

    __slots__ = ("_actions", "_theirs", "outputs", "stdin")

    def __init__(self, command: Command) -> None:
        self.outputs: dict[int, int] = {}
        self.stdin: int | None = None
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
        argv = command.argv or (b"sh", b"-c", command.line)
        start = os.posix_spawnp if command.argv else os.posix_spawn
        try:
            pid = start(
                argv[0] if command.argv else _SHELL,
                argv,
                _environment(),
                file_actions=self._actions,
                setsid=True,
                setsigmask=(),
                setsigdef=_DEFAULT_SIGNALS,
            )
        except BaseException:
            self.close()
            raise
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
            read, self.stdin = _pipe()
            self._give(read, 0)
        else:
            self._actions.append((os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0))
        for stream in (STDOUT, STDERR):
            self.outputs[stream], write = _pipe()
            self._give(write, stream)

    def _give(self, fd: int, number: int) -> None:
        self._theirs.append(fd)
        self._actions.append((os.POSIX_SPAWN_DUP2, fd, number))

    def _terminal(self) -> None:
        master, slave = pty.openpty()
        self._theirs.append(slave)
        self.outputs[STDOUT] = master
        self.outputs[STDOUT] = _high(master)
        # A descriptor of its own to write to: what is written and what is read are watched apart.
        self.stdin = _high(os.dup(master))
        termios.tcsetwinsize(slave, (24, 80))
        # The leader of a session has no terminal until it opens one by its path: that becomes its own.
        self._actions.append((os.POSIX_SPAWN_OPEN, 0, os.ttyname(slave), os.O_RDWR, 0))
        self._actions.append((os.POSIX_SPAWN_DUP2, 0, STDOUT))
        self._actions.append((os.POSIX_SPAWN_DUP2, 0, STDERR))


def _pipe() -> tuple[int, int]:
    read, write = os.pipe()
    if min(read, write) > STDERR:
        return read, write
    try:
        read = _high(read)
        return read, _high(write)
    except BaseException:
        os.close(read)
        os.close(write)
        raise


def _high(fd: int) -> int:
    """Return `fd` above the standard three, over which a child's are laid: a daemon has closed its own."""
    if fd > STDERR:
        return fd
    high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, STDERR + 1)
    os.close(fd)
    return high


def _environment() -> dict[bytes, bytes]:
    while True:
        try:
            return os.environb.copy()
        except (KeyError, RuntimeError):
            continue  # another thread took a variable out of it meanwhile


class Member(NamedTuple):
    """A living process of a session."""

    pid: int
    group: int
    #: clock ticks between boot and its start
    start: int


class Process:
    """A child that leads a session.

    The kernel gives the number of a session to nobody else as long as anybody is in it. So while the child is
    not reaped, who has its number for a session belongs to it; afterwards, once one of them was there before the
    child's end, or had been seen by us in the session.
    """

    __slots__ = ("_lock", "_seen", "ended", "pid")

    def __init__(self, pid: int) -> None:
        self.pid = pid
        #: when it was reaped, in seconds since boot; None before. Guarded by the lock.
        self.ended: float | None = None
        self._lock = threading.Lock()
        self._seen: frozenset[tuple[int, int]] = frozenset()

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


def _members(sessions: Collection[int]) -> dict[int, list[Member]]:
    """Find the living processes of these sessions; a zombie lives no more."""
    found: dict[int, list[Member]] = {session: [] for session in sessions}
    with os.scandir("/proc") as entries:
        pids = [int(entry.name) for entry in entries if entry.name.isdecimal()]
    for pid in pids:
        try:
            # A call that reads no file: /proc/PID/stat is opened for those only that are looked for.
            session = os.getsid(pid)
        except OSError:
            continue
        if session in found and (member := _member(pid, session)) is not None:
            found[session].append(member)
    return found


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
    fields = line[line.rfind(b")") + 2 :].split()
    if len(fields) < 20 or fields[0] in (b"Z", b"X", b"x") or int(fields[3]) != session:
        return None
    return Member(pid, int(fields[2]), int(fields[19]))


def _signal_member(session: int, member: Member, number: signal.Signals) -> None:
    """Signal this process and no other that has got its pid."""
    try:
        fd = os.pidfd_open(member.pid)
    except OSError as error:
        # A kernel or a sandbox without pidfd: between this look and the signal there are microseconds.
        if error.errno != errno.ESRCH and _member(member.pid, session) == member:
            _kill(member.pid, number)
        return
    try:
        if (now := _member(member.pid, session)) is not None and now.start == member.start:
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
    found = _members({process.pid for process in processes})
    living: dict[Process, list[Member]] = {}
    unknown: set[Process] = set()
    for process in processes:
        members = process.claim(found[process.pid])
        if members is None:
            unknown.add(process)
        elif members or process.hidden():
            living[process] = members
    return _Look(living, unknown)


def end_sessions(
    processes: Collection[Process],
    grace: float,
    within: float,
    at: Callable[[float, Callable[[], None]], object],
) -> dict[Process, str]:
    """End all that runs in the sessions of these children: TERM at once, KILL after `grace` seconds.

    Waits until all are gone, at most `within` seconds; a KILL that is due later is made by `at`.

    Returns:
        `gone`, `alive` or `unknown` for each, as it was last seen.
    """
    began = time.monotonic()
    until = began + within
    for process in processes:
        process.signal_group(signal.SIGTERM)
    seen = _look(processes)
    for process, members in seen.living.items():
        for member in members:
            # Those that were in the leader's group have had theirs, unless the leader was reaped already.
            if member.group != process.pid or process.ended is not None:
                _signal_member(process.pid, member, signal.SIGTERM)
    seen = _wait(seen, min(began + grace, until))
    if seen.living and began + grace <= until:
        kills = 0
        while seen.living and kills < _KILLS and (not kills or time.monotonic() < until):
            kills += 1
            _kill_members(seen.living)
            seen = _wait(seen, min(time.monotonic() + _AGAIN, until))
        seen = _wait(seen, until)
    elif seen.living:
        at(began + grace, partial(_kill_later, tuple(seen.living), _KILLS, at))
    return {process: _state(process, seen) for process in processes}


def _state(process: Process, seen: _Look) -> str:
    if process in seen.living:
        return "alive" if seen.living[process] else "unknown"
    return "unknown" if process in seen.unknown else "gone"


def _wait(seen: _Look, until: float) -> _Look:
    """Look until the living are gone, at most until then; what cannot be known is not waited for."""
    unknown = seen.unknown
    while seen.living and (left := until - time.monotonic()) > 0:
        time.sleep(min(_LOOK, left))
        seen = _look(seen.living)
        unknown = unknown | seen.unknown
    return _Look(seen.living, unknown)


def _kill_members(living: dict[Process, list[Member]]) -> None:
    for process, members in living.items():
        process.signal_group(signal.SIGKILL)
        for member in members:
            _signal_member(process.pid, member, signal.SIGKILL)


def _kill_later(processes: Collection[Process], times: int, at: Callable[[float, Callable[[], None]], object]) -> None:
    """Kill what is left, and look again a little later; in the watcher's thread, so it waits for nothing."""
    living = _look(processes).living
    _kill_members(living)
    if living and times > 1:
        at(time.monotonic() + _AGAIN, partial(_kill_later, tuple(living), times - 1, at))
