# SPDX-License-Identifier: Apache-2.0
"""One command on this machine: a child of this process, by the same Protocol as a session on a node.

The watcher's thread starts the process, reads what it prints, reaps it and calls the sink. The dispatcher and the
pool ask for that through the watcher's queue. What both sides touch, the stage and the standard input, each has a
small lock, under which nothing waits.
"""

from __future__ import annotations

import enum
import errno
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from functools import partial

from ctask import children
from ctask.errors import ConnectionLost, Curable, ExecRefused, LocalResource, NodeError
from ctask.options import Command, Stop
from ctask.standstill import awake
from ctask.threads import spare
from ctask.transports.base import Sink
from ctask.transports.local.processes import Ends, Process
from ctask.transports.local.stdin import Input
from ctask.transports.watcher import Timer, Watcher, watcher

__all__ = ["LocalSession", "sessions"]

#: Bytes read at once; a pipe holds as many.
CHUNK = 65_536
#: Bytes after which a sink is asked whether more may come.
CREDIT = 131_072
#: Bytes read at most of what is left in the pipes when nothing will tell of their end.
REST = 1 << 20

#: Seconds between looks at a child where the kernel has no pidfd (before 5.3): the longest, and the first one after
#: its start or after the end of its output.
_LOOK = 0.05
_LOOK_SOON = 0.002
#: Where no process can be had: how often a start is tried at once, and seconds between two tries.
_STARTS, _AGAIN = 5, 0.05

#: Those of this process that were begun and have not ended, or have a child that runs on. Each adds itself in the
#: thread that begins it and takes itself out in the watcher's; both are single steps of the interpreter.
sessions: set[LocalSession] = set()


class _Stage(enum.Enum):
    READY = enum.auto()
    QUEUED = enum.auto()  # asked for, and may still be dropped
    DROPPED = enum.auto()
    STARTING = enum.auto()
    STARTED = enum.auto()
    REFUSED = enum.auto()  # there is no process, and will be none


class LocalSession:
    """One process, which leads a session of its own, and what is read from it.

    Args:
        crowded: told that no process was to be had for it.

    Everything without a word on threads is the watcher's.
    """

    def __init__(self, command: Command, sink: Sink, crowded: Callable[[], None] = lambda: None) -> None:
        self._command = command
        self._crowded = crowded
        self._sink = sink
        self._lock = threading.Lock()
        self._stage = _Stage.READY  # guarded by the lock
        self._process: Process | None = None  # the same
        self._watcher: Watcher | None = None  # set before the session is queued
        self._stdin = Input(sink.writable, terminal=command.pty)
        if not command.stdin:
            self._stdin.finish()  # on a terminal that is a sign of its own; else there is nothing to end
        self._outputs: dict[int, int] = {}
        self._pidfd: int | None = None
        self._timer: Timer | None = None
        self._delay = _LOOK_SOON
        self._starts = 0
        self._taken = 0
        self._paused = False
        self._unflushed = False
        self._exited = False
        self._ended = False
        #: how it was told to end, and when; of who ends it
        self.stopped: tuple[Stop, float] | None = None

    def __repr__(self) -> str:
        what = self._command.line or b" ".join(self._command.argv)
        return f"<LocalSession {what[:40]!r} {self._stage.name.lower()}>"

    def start(self) -> None:
        """Have the process started soon; never waits. Any thread."""
        self.try_start()

    def try_start(self) -> bool:
        """Have the process started soon; always True. Any thread."""
        with self._lock:
            if self._stage is not _Stage.READY:
                return True
            self._stage = _Stage.QUEUED
        try:
            self._watcher = watcher()
        except (OSError, RuntimeError) as error:
            with self._lock:
                self._stage = _Stage.REFUSED
            text = f"no thread or descriptor left to run it: {error}"
            failure = LocalResource(text, phase="open", curable=Curable.BUSY)
            failure.__cause__ = error
            self._end(failure)
            return True
        sessions.add(self)
        self._watcher.call(self._start)
        return True

    def write(self, view: memoryview) -> int:
        """Write to standard input what it takes now; see `Session.write`. Any thread; never waits.

        What a command does not read any more is thrown away, as if it had been taken.
        """
        return self._stdin.write(view)

    def close_stdin(self) -> None:
        """Let the command read end of file. Any thread; never waits."""
        self._stdin.finish()

    def give(self) -> None:
        """Read on. Any thread; never waits."""
        if self._watcher is not None:
            self._watcher.call(self._resume)

    def drop(self) -> bool:
        """Give the session up unless its process is being started. Any thread; never waits."""
        with self._lock:
            if self._stage in (_Stage.READY, _Stage.QUEUED):
                self._stage = _Stage.DROPPED
            return self._stage is _Stage.DROPPED

    def close(self) -> None:
        """Close the pipes (a terminal: hang up) and end the session; the process runs on.

        Any thread; never waits.
        """
        if not self.drop() and self._watcher is not None:
            self._watcher.call(partial(self._end, None))

    def wind_up(self) -> None:
        """As `close`, after what the pipes still hold. Any thread; never waits."""
        if self._watcher is not None:
            self._watcher.call(self._wind_up)

    def let_go(self) -> None:
        """Look at a process that runs on no more. Any thread; never waits."""
        if self._watcher is not None:
            self._watcher.call(self._let_go)

    def started(self, until: float) -> Process | None:
        """Return the process, waiting while it is being started, until then (as `awake`); None: there is none. Pool."""
        while True:
            with self._lock:
                if self._stage is not _Stage.STARTING or awake() >= until:
                    return self._process
            time.sleep(0.001)

    def runs(self) -> bool:
        """Whether there is a process that has not been reaped. Any thread."""
        process = self._process
        return process is not None and process.ended is None

    def abandon(self) -> None:
        """Close what a forked child has of this session: it would keep the command's standard input open."""
        for fd in (*self._outputs.values(), self._pidfd, self._stdin.surrender()):
            if fd is not None:
                os.close(fd)
        self._outputs = {}
        self._pidfd = None
        self._ended = True

    def _start(self) -> None:
        with self._lock:
            dropped = self._stage is _Stage.DROPPED
            if not dropped:
                self._stage = _Stage.STARTING
        if dropped:
            self._end(None)
            return
        try:
            ends = Ends(self._command)
        except OSError as error:
            # Told in the phase before exec: it is certain that nothing ran.
            text = f"no descriptors left for pipes: {_text(error)}"
            self._refuse(LocalResource(text, phase="open", curable=Curable.BUSY), error)
            return
        try:
            pid = ends.spawn(self._command)
        except (OSError, ValueError, NotImplementedError) as error:
            self._not_started(error)
            return
        self._pidfd = ends.pidfd
        # Said behind it: where only a process is lacking, nothing was begun, and the job may be tried again.
        self._sink.phase("exec")
        with self._lock:
            self._process = Process(pid)
            self._stage = _Stage.STARTED
        self._outputs = dict(ends.outputs)
        self._sink.phase("running")
        self._flush_soon()
        if self._stdin.attach(self.loop, ends.stdin):
            self._sink.writable()
        self._await_exit()
        self._listen()

    def _not_started(self, error: Exception) -> None:
        if getattr(error, "errno", None) not in (errno.EAGAIN, errno.ENOMEM):
            self._sink.phase("exec")
            self._refuse(ExecRefused(self._why_not(error), phase="exec"), error)
            return
        # RLIMIT_NPROC, as a rule: others end. Threads of ours that are idle count like processes.
        spare()
        self._starts += 1
        if self._starts < _STARTS:
            with self._lock:
                self._stage = _Stage.QUEUED
            self.loop.at(time.monotonic() + _AGAIN, self._start)
            return
        self._crowded()
        text = f"no process left to run it ({_text(error)}); lower the fan-out, or raise the limit (ulimit -u)"
        self._refuse(LocalResource(text, phase="open", curable=Curable.BUSY), error)

    def _await_exit(self) -> None:
        try:
            if self._pidfd is not None:
                self.loop.watch(self._pidfd, select.EPOLLIN, self._look)
        except OSError:
            self._close_pidfd()
        if self._pidfd is None:
            # No such call, no descriptor left, or reaped already: then it is looked at now and then.
            self._look_again()

    def _refuse(self, failure: NodeError, cause: Exception) -> None:
        failure.__cause__ = cause
        with self._lock:
            self._stage = _Stage.REFUSED
        self._end(failure)

    def _why_not(self, error: Exception) -> str:
        program = b"/bin/sh" if not self._command.argv else self._command.argv[0]
        name = program.decode(errors="backslashreplace")
        number = getattr(error, "errno", None)
        if number == errno.ENOENT:
            return f"no such program: {name}"
        if number == errno.EACCES:
            return f"not a program that may be run: {name}"
        return f"{name} could not be started: {_text(error)}"

    @property
    def loop(self) -> Watcher:
        """The watcher that it was begun by. Any thread.

        Raises:
            RuntimeError: it was not begun.
        """
        if self._watcher is None:
            raise RuntimeError("a session that was not started has no watcher")
        return self._watcher

    # Output.

    def _listen(self) -> None:
        try:
            for stream, fd in self._outputs.items():
                self.loop.watch(fd, select.EPOLLIN, partial(self._read, stream))
        except OSError as error:
            # Nobody could hear it: it must not run on unheard.
            if self._process is not None:
                self._process.signal_group(signal.SIGKILL)
            self._end(LocalResource(f"its output could not be watched: {_text(error)}"))

    def _read(self, stream: int, events: int) -> None:
        del events
        fd = self._outputs.get(stream)
        if fd is None or self._paused:
            return
        try:
            chunk = os.read(fd, CHUNK)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""  # how a terminal says that nobody has it open any more
        if not chunk:
            self._close_output(stream)
            self._end_if_over()
            return
        self._store(stream, chunk)
        if self._taken >= CREDIT:
            self._taken = 0
            if not self._sink.may(self):
                self._pause()

    def _store(self, stream: int, chunk: bytes) -> None:
        self._sink.data(stream, chunk)
        self._taken += len(chunk)
        self._flush_soon()

    def _flush_soon(self) -> None:
        # Once per turn of the watcher: output, status and end that come together are one post.
        if not self._unflushed:
            self._unflushed = True
            self.loop.later(self._flush)

    def _flush(self) -> None:
        if self._unflushed:
            self._unflushed = False
            self._sink.flush()

    def _pause(self) -> None:
        # `give` comes through the watcher's queue, so never between the sink's no and this.
        self._paused = True
        for fd in self._outputs.values():
            self.loop.unwatch(fd)  # not `modify`: HUP would be told for ever

    def _resume(self) -> None:
        if self._paused:
            self._paused = False
            self._listen()

    def _close_output(self, stream: int) -> None:
        fd = self._outputs.pop(stream)
        self.loop.unwatch(fd)
        os.close(fd)

    # The end.

    def _look(self, events: int = 0) -> None:
        """See whether the process has ended; reap it."""
        del events
        process = self._process
        if process is None or process.ended is not None:
            return
        try:
            status = process.reap()
        except ChildProcessError as error:
            status = children.exit_status(self._pidfd)
            if status is None:
                self._lose(error)
                return
        if status is None:
            if self._pidfd is None:
                self._look_again()
            return
        self._reaped()
        if not self._ended:
            self._exited = True
            code = os.waitstatus_to_exitcode(status)
            if code >= 0:
                self._sink.exited(code, None)
            else:
                self._sink.exited(None, _signal_name(-code))
            self._flush_soon()
            self._end_if_over()

    def _look_again(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.at(time.monotonic() + self._delay, self._look)
        self._delay = min(self._delay * 2, _LOOK)

    def _lose(self, cause: ChildProcessError) -> None:
        """The process was reaped by other code, or by the kernel: how it ended will never be known."""
        self._reaped()
        if self._ended:
            return
        failure = ConnectionLost(children.why_unknown())
        failure.__cause__ = cause
        self._take_rest()
        self._end(failure)

    def _wind_up(self) -> None:
        self._look()
        if not self._ended:
            self._take_rest()
            self._end(None)

    def _take_rest(self) -> None:
        rest = REST
        for stream, fd in self._outputs.items():
            while rest > 0 and (chunk := _available(fd)):
                rest -= len(chunk)
                self._store(stream, chunk)

    def _reaped(self) -> None:
        self._close_pidfd()
        if self._ended:
            sessions.discard(self)

    def _let_go(self) -> None:
        self._end(None)
        self._close_pidfd()
        sessions.discard(self)

    def _close_pidfd(self) -> None:
        fd, self._pidfd = self._pidfd, None
        if fd is not None:
            self.loop.unwatch(fd)
            os.close(fd)

    def _end_if_over(self) -> None:
        if self._outputs or self._ended:
            return
        if self._exited:
            self._end(None)
        elif self._pidfd is None:
            self._delay = _LOOK_SOON
            self._look()

    def _end(self, error: NodeError | None) -> None:
        """Close what is open and say that it is over, once; a process that runs on is still to be reaped."""
        if self._ended:
            return
        self._ended = True
        for stream in tuple(self._outputs):
            self._close_output(stream)
        self._stdin.discard()
        if self._process is None or self._process.ended is not None:
            sessions.discard(self)
        self._sink.ended(error)
        if self._watcher is None:
            self._sink.flush()
        else:
            self._flush_soon()


def _available(fd: int) -> bytes:
    try:
        return os.read(fd, CHUNK)
    except OSError:
        return b""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name.removeprefix("SIG")
    except ValueError:
        return f"RTMIN+{number - signal.SIGRTMIN}"


def _text(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _forked() -> None:
    # Copies of the pipes: while the child has them, commands of the parent would not see the end of their input.
    for session in sessions:
        session.abandon()
    sessions.clear()


os.register_at_fork(after_in_child=_forked)
