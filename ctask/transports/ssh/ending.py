# SPDX-License-Identifier: Apache-2.0
"""The ending of commands on their node: by a script on a second channel of their connection, else by signal requests.

A command has no mark and no wrapper. The script finds it as the K-th of the N that its own parent, the connection's
process on the node, runs; K and N are counted when the script is asked for, by the thread that sends all requests in
their order. So commands that end meanwhile make another count, and another script, and those that begin meanwhile
come after it.

`end` runs in pool threads. `_Words` and what `_Script` overrides run in the connection's thread; the words cross by a
queue. The connection's `guard` guards how many scripts run. Nothing here waits for the socket.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.resources
import queue
import secrets
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from ctask.errors import NodeError
from ctask.errors.text import printable
from ctask.options import Command, Stop
from ctask.result import Ending, RemoteProcess
from ctask.standstill import awake
from ctask.transports.base import STDOUT, Session
from ctask.transports.ssh.channel import SshSession
from ctask.transports.watcher import watcher

if TYPE_CHECKING:
    from ctask.transports.ssh.connection import SshConnection

__all__ = ["SCRIPTS", "end"]

#: Scripts at a time on one connection: with the 8 places of the pool, sshd's MaxSessions of 10.
SCRIPTS = 2
#: Seconds from the request for a script to its first word; most take 30 ms. Then the server is asked to signal. Where
#: it granted the script, the word is waited for all the same: it is the login shell that takes its time.
FIRST_WORD = 1.0
#: Seconds after a command is gone in which the rest of its output may come; most take none.
_LAST_OUTPUT = 0.25
#: Seconds that one more ending waits for a script to be over; most are by then.
_TURN = 0.25
#: How often another script is asked for because the node found another number of commands.
RECOUNTS = 5
#: Seconds that a command's output may stay open after a signal ended the command; and in how many steps a script is
#: asked for after that.
_CLOSED = 0.5
_LOOKS = 10
#: Bytes that are read of a script's own lines, or of a line of anything; and of all that comes: a login shell prints
#: what it likes.
_WORDS_LIMIT = 65_536
_NOISE_LIMIT = 16 << 20
#: Processes of one session that are told of; the script names as many.
_PROCESSES = 16
#: Characters of a name; the kernel has 15, or 63 for its own threads.
_NAME = 64
_LONGEST_GRACE = 10_000_000.0


def end(
    connection: SshConnection,
    sessions: Sequence[SshSession],
    stop: Stop,
    within: float,
    told: Callable[[Session, Ending], None] | None = None,
) -> dict[Session, Ending]:
    """End what runs in these sessions; see `base.Connection.end`.

    What the states mean here:

    * `gone`: the script saw nothing left of the session, or of the family where the server makes none; or the node said
      how the command ended before anything was sent to end it (what such a command left in the background is its own
      affair); or it was never sent. The end of a command that got a signal of ours says nothing of its children: then a
      script, where one can be had afterwards, has to find nothing left of it.
    * `alive`: `processes` were there when the script last looked, after TERM.
    * `left`: by the policy `leave`. A command with a terminal is hung up by the server all the same.
    * `unknown`: the node did not answer, cannot be asked, or shows only a part; it ended by a signal request, and
      nothing tells of the rest.

    A process that has left its session (`setsid`) is not ended. What sudo, su and runuser run in a session of its own
    is a part of the command, for they wait for it.
    """
    return _Ender(connection, sessions, stop, awake() + within, told).run()


class _Ender:
    """One call of `end`."""

    def __init__(
        self,
        connection: SshConnection,
        sessions: Sequence[SshSession],
        stop: Stop,
        deadline: float,
        told: Callable[[Session, Ending], None] | None,
    ) -> None:
        self._connection = connection
        self._link = connection.link
        self._sessions = sessions
        self._open = list(sessions)
        self._stop = stop
        self._deadline = deadline
        self._told = told
        self._answers: dict[SshSession, Ending] = {}
        #: those that are gone and may still have something to say, and until when that is waited for
        self._draining: dict[SshSession, float] = {}
        #: set when a command or a session ends
        self._changed = threading.Event()
        self._words: _Words | None = None
        #: sessions that are closed later, when their KILL is due
        self._later: list[SshSession] = []
        #: those whose process group the server was asked to signal: how the command ends is no word about the rest
        self._signalled: set[SshSession] = set()
        #: those that ended so
        self._doubtful: list[SshSession] = []
        #: whether scripts answer here, as far as is known
        self._scripts = stop.by != "signal" and not connection.link.forced_command

    def run(self) -> dict[Session, Ending]:
        """End them, by one way or another; returns by the deadline."""
        for session in self._sessions:
            session.drop()
            session.watch(self._wake)
        self._sort()
        if self._stop.policy == "leave":
            self._answer_all(Ending("left"))
        elif self._open and (not self._scripts or self._link.uncounted or not self._by_script()):
            self._by_signal()
        self._answer_all(Ending("unknown"))
        if self._doubtful:
            self._look()
        while self._draining:
            self._changed.clear()
            now = awake()
            self._changed.wait(self._drain(now) - now)
        self._close()
        return {session: self._answers[session] for session in self._sessions}

    def _wake(self) -> None:
        """A command or a session has ended. Connection's thread."""
        self._changed.set()
        if self._words is not None:
            self._words.wake()

    def _sort(self, besides: Collection[SshSession] = ()) -> None:
        """Answer what needs no ending any more, and what cannot be ended."""
        for session in list(self._open):
            if session in besides:
                continue
            if session.never_ran or (session._exited and session not in self._signalled):
                self._answer(session, Ending("gone"))
            elif session._exited:
                self._doubt(session)
            elif not session.counts or self._link.dead:
                self._answer(session, Ending("unknown"))

    def _signal(self, name: bytes) -> None:
        """Ask the server to signal the process groups of those that are open."""
        for session in self._open:
            self._signalled.add(session)
            session.signal(name)

    def _doubt(self, session: SshSession) -> None:
        """Note that a command ended by a signal of ours: what it started may live."""
        self._open.remove(session)
        self._doubtful.append(session)

    def _answer(self, session: SshSession, ending: Ending) -> None:
        if session in self._open:
            self._open.remove(session)
        self._answers[session] = ending
        if ending.state == "gone":
            # What the command said at last comes by another channel than the word that it is gone.
            self._draining[session] = min(awake() + _LAST_OUTPUT, self._deadline)

    def _drain(self, now: float) -> float:
        """Tell of those that are gone and have said all; return when the next one's time is up."""
        for session, until in list(self._draining.items()):
            if session._over or session.never_ran or now >= until:
                del self._draining[session]
                session.ask_close(gone=True)
                if self._told is not None:
                    self._told(session, self._answers[session])
        return min(self._draining.values(), default=now)

    def _answer_all(self, ending: Ending) -> None:
        for session in list(self._open):
            self._answer(session, ending)

    def _close(self) -> None:
        for session, answer in self._answers.items():
            if session not in self._later:
                session.ask_close(gone=answer.state == "gone")
        if any(answer.state != "gone" for answer in self._answers.values()):
            self._link.uncounted = True
            self._connection.retire()

    # --- by the script

    def _by_script(self) -> bool:
        """End by the script; False: it cannot be had, and those that are still open need another way."""
        for _ in range(1 + RECOUNTS):
            self._sort()
            if not self._open:
                return True
            script = _Script(self._connection, self._open, self._stop)
            if not script.ask(min(awake() + _TURN, self._deadline)):
                return False
            answered = self._follow(script)
            if answered is not None:
                return answered
        self._scripts = False
        return False

    def _follow(self, script: _Script) -> bool | None:
        """Take a script's words; True: all has been said, False: it can do nothing, None: ask again."""
        words = self._words = script.words
        if (first := self._first_word(script)) is None:
            return True
        if first != b"ending":
            self._sort()
            if first == b"recount" or script.unheard:
                return None
            self._scripts = not script._running
            return False
        # What it counted is its own to tell of: the end of a command says nothing of its children that ignore TERM.
        self._sort(besides=words.numbers.values())
        reports = {number: _Report(session) for number, session in words.numbers.items()}
        while self._open:
            try:
                word = self._next(words, self._deadline)
            except queue.Empty:
                break
            if word is None:
                break
            if len(word) > 1 and (report := reports.get(_number(word[1]))) and report.session in self._open:
                self._hear(report, word[0], word[2:])
        for report in reports.values():
            if report.session in self._open:
                self._answer(report.session, Ending("unknown") if self._link.dead else report.so_far())
        return True

    def _first_word(self, script: _Script) -> bytes | None:
        """Return `ending`, `recount`, or nothing of use; None: it did not come, or nobody is left to hear it."""
        until = min(awake() + FIRST_WORD, self._deadline)
        recount = signalled = False
        while self._open:
            try:
                word = self._next(script.words, until)
            except queue.Empty:
                if signalled:
                    return None
                # sshd itself can still tell the commands to end.
                self._signal(b"TERM")
                if not script._running:
                    return None  # it is the node that does not answer, and not a slow login shell
                signalled, until = True, self._deadline
                continue
            if word is None:
                return b"recount" if recount else b""
            if signalled and not word:
                for session in list(self._open):
                    if session._exited and session._over:
                        self._doubt(session)
            elif word[:1] == [b"ending"]:
                return b"ending"
            recount = recount or word[:1] == [b"recount"]
        return None

    def _next(self, words: _Words, until: float) -> list[bytes] | None:
        """Return the next line of a script, empty where a command ended, and tell meanwhile of those that are gone.

        Raises:
            queue.Empty: nothing came by then.
        """
        while True:
            now = awake()
            due = self._drain(now) if self._draining else until
            try:
                return words.next(min(due, until))
            except queue.Empty:
                if now >= until:
                    raise

    def _hear(self, report: _Report, verb: bytes, rest: list[bytes]) -> None:
        final = report.hear(verb, rest)
        if final is not None:
            self._answer(report.session, final)
        elif verb == b"left" and self._told is not None and report.so_far().state == "alive":
            self._told(report.session, report.so_far())

    def _look(self) -> None:
        """Have the node say whether anything is left of those that ended by a signal of ours."""
        clean = False
        tries = _LOOKS if self._scripts else 0
        while tries and not clean and not self._link.dead:
            tries -= 1
            script = _Script(self._connection, (), self._stop)
            if not script.ask(self._deadline):
                break
            self._words = script.words
            clean = self._is_clean(script.words)
            if script._running or not tries:
                break
            # A server that allows one session may take a moment until it has forgotten the one that was closed.
            self._changed.clear()
            self._changed.wait(min(_CLOSED / _LOOKS, max(0.0, self._deadline - awake())))
        for session in self._doubtful:
            self._answer(session, Ending("gone" if clean else "unknown"))

    def _is_clean(self, words: _Words) -> bool:
        while True:
            try:
                word = self._next(words, self._deadline)
            except queue.Empty:
                return False
            if word is None:
                return False
            if word:
                return word[0] == b"clean"

    # --- by signal requests

    def _by_signal(self) -> None:
        """Ask the server to signal the commands' process groups; only it knows them then."""
        self._sort()
        self._signal(b"TERM")
        due = awake() + min(self._stop.grace, _LONGEST_GRACE)
        killed = False
        exits: dict[SshSession, float] = {}
        while True:
            self._changed.clear()
            now = awake()
            self._judge(exits, now)
            drained = self._drain(now)
            if not self._open or now >= self._deadline:
                break
            if now >= due and not killed:
                if self._stop.policy != "kill":
                    break
                killed = True
                self._signal(b"KILL")
            ends = [self._deadline, *(at + _CLOSED for at in exits.values() if at + _CLOSED > now)]
            if self._draining:
                ends.append(drained)
            self._changed.wait(min([*ends, due] if not killed else ends) - now)
        if self._open and self._stop.policy == "kill" and not killed:
            self._kill_later(due)

    def _judge(self, exits: dict[SshSession, float], now: float) -> None:
        """Answer the sessions of which the node will say no more."""
        for session in list(self._open):
            if session._exited:
                # One whose output is open holds the only place of a server that allows one session.
                if session._over or now >= exits.setdefault(session, now) + _CLOSED:
                    self._doubt(session)
            elif session._over or session._signal_refused or self._link.dead:
                self._answer(session, Ending("unknown"))

    def _kill_later(self, due: float) -> None:
        """Have the KILL sent after the grace, if the connection stands by then: it may have other jobs."""
        sessions = self._later = list(self._open)

        def kill() -> None:
            for session in sessions:
                session.signal(b"KILL")
                session.ask_close()

        try:
            watcher().at(time.monotonic() + due - awake(), kill)
        except (RuntimeError, OSError):  # no thread or descriptor for a watcher
            self._later = []


class _Report:
    """What a script said of one session."""

    def __init__(self, session: SshSession) -> None:
        self.session = session
        self._told: int | None = None
        self._now: list[RemoteProcess] = []
        self._seen: tuple[RemoteProcess, ...] = ()

    def hear(self, verb: bytes, rest: list[bytes]) -> Ending | None:
        """Take a word; return the answer if it is the last."""
        if verb == b"told" and rest:
            told = _number(rest[0])
            self._told = told if told >= 0 else None
        elif verb == b"proc" and len(rest) > 2 and len(self._now) < _PROCESSES:
            self._now.append(_process(rest))
        elif verb == b"left":
            self._seen, self._now = tuple(self._now), []
        elif verb == b"gone":
            return Ending("gone", self._told)
        elif verb == b"alive":
            return self.so_far()
        elif verb == b"hidden":
            return Ending("unknown", self._told)
        return None

    def so_far(self) -> Ending:
        """Return what is known without a last word."""
        return Ending("alive" if self._seen else "unknown", self._told, self._seen)


class _Words:
    """The sink of a script: takes its lines, bounded, and keeps those with the word before them."""

    def __init__(self, script: _Script) -> None:
        #: K -> session, as they were counted; written before the first word can come
        self.numbers: dict[int, SshSession] = {}
        self._script = script
        self._word = script.word + b" "
        self._lines: queue.SimpleQueue[list[bytes] | None] = queue.SimpleQueue()
        self._tail = b""
        self._room = _WORDS_LIMIT
        self._noise = _NOISE_LIMIT
        self._over = False

    def next(self, until: float) -> list[bytes] | None:
        """Return the next line in parts, without its word; None after the last that is listened to.

        Raises:
            queue.Empty: none came by then.
        """
        return self._lines.get(timeout=max(0.0, until - awake()))

    def phase(self, name: str) -> None:
        """Nothing: the first word tells that it runs."""

    def data(self, stream: int, chunk: bytes) -> None:
        self._noise -= len(chunk)
        if stream == STDOUT and self._listens():
            self._tail += chunk

    def flush(self) -> None:
        *lines, self._tail = self._tail.split(b"\n")
        for line in lines:
            # The word may stand behind what a shell prints without an end of line, such as the title of a terminal.
            if self._word in line and self._room > 0:
                said = line.rpartition(self._word)[2]
                self._room -= len(self._word) + len(said) + 1
                if self._room >= 0:
                    self._lines.put(said.rstrip(b"\r").split(None, 5))
        if self._over or not self._listens():
            self._lines.put(None)

    def _listens(self) -> bool:
        return self._room > 0 and self._noise > 0 and len(self._tail) <= _WORDS_LIMIT

    def wake(self) -> None:
        """Have `next` return an empty line."""
        self._lines.put([])

    def widen(self, size: int) -> int:
        """What it says is little."""
        return 0

    def may(self, session: Session) -> bool:
        return self._listens()

    def writable(self) -> None:
        self._script.feed()

    def exited(self, status: int | None, signal: str | None) -> None:
        """Nothing: what counts is what it said."""

    def ended(self, error: NodeError | None) -> None:
        self._over = True
        self._script.release()


class _Script(SshSession):
    """The session of a script. It goes on until it is done, also when its listeners have gone.

    Args:
        targets: what it is to end; nothing: it only looks whether anything is left of commands that have ended.
    """

    __slots__ = ("_connection", "_stop", "_targets", "_unsent", "word", "words")

    def __init__(self, connection: SshConnection, targets: Sequence[SshSession], stop: Stop) -> None:
        self.word = secrets.token_hex(8).encode()
        self.words = _Words(self)
        super().__init__(connection, Command(line=b":", stdin=True), self.words)
        self._connection = connection
        self._targets = frozenset(targets)
        self._stop = stop
        self._unsent = memoryview(_script())
        self._starved = True  # so that `writable` is told as soon as the node takes input

    def ask(self, until: float) -> bool:
        """Ask for the channel; False: too many scripts run until then, or the connection is gone."""
        over = self._connection.script_over
        with over:
            if not over.wait_for(lambda: self._connection.scripts < SCRIPTS, max(0.0, until - awake())):
                return False
            self._connection.scripts += 1
            self._started = True
        if not self._link.enlist(self):
            self.release()
            return False
        self._send(self._opening())
        return True

    @property
    def unheard(self) -> bool:
        """Whether the node closed its session and answered nothing.

        dropbear (until 2024) does so where another command ends while a session has not begun (its commit 71521d1b).
        """
        return self._over and self._error is None and not (self._running or self._link.dead)

    def release(self) -> None:
        """Let another script be asked for."""
        over = self._connection.script_over
        with over:
            self._connection.scripts -= 1
            over.notify()

    def _send_command(self) -> None:
        # All requests leave by this thread: what was sent before this one runs before it, and counts.
        running = [each for each in self._link.channels() if isinstance(each, SshSession) and each.counts]
        running.sort(key=lambda session: session._committed)
        numbers = {n: session for n, session in enumerate(running, 1) if session in self._targets}
        if numbers or not self._targets:
            self.words.numbers = numbers
            self._command = Command(line=self._line(numbers, len(running)), stdin=True)
        else:
            self.drop()  # they have ended by themselves
        super()._send_command()

    def _line(self, numbers: dict[int, SshSession], count: int) -> bytes:
        stop = self._stop
        grace = round(min(stop.grace, _LONGEST_GRACE) * 100)
        which = " ".join(map(str, numbers))
        policy = stop.policy if self._targets else "look"
        words = f"exec /bin/sh -s {self.word.decode()} {policy} {grace} {count} {which}"
        return words.encode()

    def feed(self) -> None:
        """Send of the script what the node takes, and then the end of input. Connection's thread."""
        while self._unsent:
            size = self._claim(len(self._unsent))
            if size <= 0:
                return
            piece, self._unsent = self._unsent[:size], self._unsent[size:]
            with contextlib.suppress(EOFError, OSError):
                self._link.send(self, self._input(piece))
        self.close_stdin()


@functools.cache
def _script() -> bytes:
    return importlib.resources.files("ctask.transports.ssh").joinpath("end.sh").read_bytes()


def _number(text: bytes) -> int:
    """Return a number that a node says, or -1."""
    return int(text) if len(text) <= 9 and text.isdigit() else -1


def _process(parts: list[bytes]) -> RemoteProcess:
    """Return the process of a line `PID STATE WCHAN NAME`."""
    pid, state, waits_in, *name = parts
    waits_in = b"" if waits_in == b"0" else waits_in
    return RemoteProcess(_number(pid), _text(b" ".join(name)), _text(state[:1]), _text(waits_in))


def _text(raw: bytes) -> str:
    return printable(raw[:_NAME].decode("utf-8", "backslashreplace"))[:_NAME]
