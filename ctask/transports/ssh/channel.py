# SPDX-License-Identifier: Apache-2.0
"""One command on an SSH connection: the `Session` of the Protocol, and the channel object of the `Link`.

`start`, `write`, `close_stdin`, `give` and `close` run in pool threads, `try_start` and `drop` in the
dispatcher; everything that packets call runs in the connection's
thread, and that alone talks to the sink, but for the `ended` of a session whose connection was dead before it
started.

Guards: `_guard`, one small lock per connection, is for what two threads write: `_started`, `_dropped`,
`_committed`, `_over`, `_remote`, the end of input, and the counters of credit and of room. It is never held
while anything is sent or called. `close_sent` is the link's. What only the connection's thread writes needs
no guard.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from paramiko.common import (
    MSG_CHANNEL_CLOSE,
    MSG_CHANNEL_DATA,
    MSG_CHANNEL_EOF,
    MSG_CHANNEL_EXTENDED_DATA,
    MSG_CHANNEL_FAILURE,
    MSG_CHANNEL_REQUEST,
    MSG_CHANNEL_SUCCESS,
    MSG_CHANNEL_WINDOW_ADJUST,
)
from paramiko.ssh_exception import SSHException

from ctask.errors import NodeError
from ctask.options import Command
from ctask.transports.base import STDERR, STDOUT, Sink
from ctask.transports.ssh import mapping, messages
from ctask.transports.ssh.fields import Fields
from ctask.transports.ssh.transport import Link, OwnChannel

if TYPE_CHECKING:
    from ctask.transports.ssh.connection import SshConnection

__all__ = ["WINDOW", "SshSession"]

#: Bytes that a node may send ahead of us at first, so that 64 nodes at a time bring 4 MiB; and at most: each credit
#: that is given at once doubles it, as far as the sink has room. (Alone: 64 KiB 162 MB/s, 256 KiB 309, 2 MiB 317.)
WINDOW = 64 * 1024
WIDEST = 2 * 1024 * 1024
#: What a person types to end the input of a command on a terminal: once at the start of a line, else twice, since the
#: first one ends the line.
_TERMINAL_END = b"\4\4"
#: Bytes of standard input in a packet; the rest of 32 KiB is for its header.
_INPUT = messages.PACKET - 64
#: Bytes that a node has to take in a packet. RFC 4253 6.1 has 32,768; each packet costs us the same, however small.
_LEAST = 256
_MOST_ROOM = 0xFFFF_FFFF


class SshSession(OwnChannel):
    """One command on one channel; made by `SshConnection.prepare`."""

    __slots__ = (
        "_asked",  # what the node has not answered yet: "", "pty" or "exec"
        "_command",
        "_committed",  # the command is being sent, or was: its number among those of the connection; else 0
        "_complete",  # the node said that all output was sent
        "_dropped",
        "_eof_sent",
        "_eof_wanted",
        "_error",  # why it will end, where that is known before it does
        "_exited",
        "_given",  # bytes that the node was allowed to send, all in all
        "_guard",
        "_held",  # bytes that were taken, and for which no new credit was given yet
        "_line_start",  # standard input is at the start of a line
        "_link",
        "_marked",
        "_over",
        "_packet",
        "_remote",
        "_room",  # bytes of standard input that the node takes
        "_running",
        "_seen",  # bytes that the node sent, all in all
        "_sent",  # the command was sent: what follows it may be
        "_signal_refused",
        "_sink",
        "_started",
        "_starved",  # the last write took less than it was given
        "_taken",  # bytes that were handed on since credit was asked for
        "_watch",  # whom the end of the command interests beside the sink
        "_window",  # bytes that it may send ahead of us now
    )

    def __init__(self, connection: SshConnection, command: Command, sink: Sink) -> None:
        super().__init__()
        self._link: Link = connection.link
        self._guard: threading.Lock = connection.guard
        self._command = command
        self._sink = sink
        self._remote = -1
        self._packet = _INPUT
        self._asked = ""
        self._error: NodeError | None = None
        self._given = self._window = WINDOW
        self._seen = self._taken = self._held = self._room = 0
        self._committed = 0
        self._watch: Callable[[], None] | None = None
        self._started = self._dropped = self._running = self._signal_refused = False
        self._sent = self._exited = self._complete = self._over = self._marked = False
        self._eof_sent = self._eof_wanted = self._starved = False
        self._line_start = True

    def __repr__(self) -> str:
        state = "running" if self._running else "started" if self._started else "new"
        if self._over:
            state = "over"
        return f"<SshSession {self.chanid} on {self._link.name}, {state}>"

    # --- the Protocol: dispatcher and pool

    def start(self) -> None:
        """Open the session; the command follows by itself. May wait for the socket; pool."""
        with self._guard:
            if self._dropped or self._started:
                return
            self._started = True
        if self._link.settle() and self._link.enlist(self):
            self._send(self._opening())
        else:
            # The connection's thread has told everybody that it knew of, and is gone.
            self._end(self._lost())
            self._sink.flush()

    def try_start(self) -> bool:
        """Open the session without waiting for anything, or return False; dispatcher."""
        # No packet can come for it before the open was sent, and `drop` is the same thread's.
        if self._dropped or not self._link.try_open(self, self._opening):
            return False
        self._started = True
        return True

    def drop(self) -> bool:
        """Give it up unless its command is on the way; dispatcher."""
        with self._guard:
            if not self._committed:
                self._dropped = True
            return self._dropped

    def write(self, view: memoryview) -> int:
        """Send what the node takes of `view`; one thread at a time, pool."""
        sent = 0
        while sent < len(view):
            size = self._claim(len(view) - sent)
            if size < 0:
                return len(view)  # nobody reads it any more: as if it had been read
            if not size:
                break
            payload = self._input(view[sent : sent + size])
            try:
                if not self._send_input(payload, size):
                    break
                # A writer that waits, waits here, holding nothing.
                self._link.wire.flush()
            except (EOFError, OSError):
                return len(view)
            sent += size
            self._line_start = payload[-1] == b"\n"[0]
        return sent

    def _input(self, piece: memoryview) -> bytes:
        return messages.data(self._remote, bytes(piece))

    def _claim(self, wanted: int) -> int:
        """Take bytes off the room and return how many; -1 where input is over."""
        with self._guard:
            if self._over or self._dropped or self.close_sent or self._eof_sent or self._eof_wanted:
                return -1
            size = min(wanted, self._room, self._packet) if self._sent else 0
            self._room -= size
            self._starved = not size
            return size

    def _send_input(self, payload: bytes, size: int) -> bool:
        """Send, or return False while keys are changed: the writer is called back after that.

        It does not park the bytes: eight writers with 2 MiB of room each would fill the wire's backlog.
        """
        while not self._link.send_now(self, payload):
            self._unclaim(size, starved=True)
            if self._link.park(self._wake_writer):
                return False
            self._unclaim(-size, starved=False)
        return True

    def _unclaim(self, size: int, *, starved: bool) -> None:
        with self._guard:
            self._room += size
            self._starved = starved

    def close_stdin(self) -> None:
        """Send the end of input after what was written; pool."""
        with self._guard:
            if self._over or self._eof_sent or self._eof_wanted:
                return
            self._eof_wanted = True
            if not self._sent:
                return  # it leaves with the command, or right after it
        self._end_input()

    def _end_input(self) -> None:
        """Send the end that is wanted, where it has not left; on a terminal, when there is room. Any thread."""
        packets = [messages.eof(self._remote)]
        with self._guard:
            if not (self._sent and self._eof_wanted) or self._eof_sent:
                return
            if self._types_end():
                typed = _TERMINAL_END[: 1 if self._line_start else 2]
                if self._room < len(typed):
                    return
                self._room -= len(typed)
                packets.insert(0, messages.data(self._remote, typed))
            self._eof_sent = True
        self._send(*packets)

    def _types_end(self) -> bool:
        """Whether the end of input is typed: sshd tells no command on a terminal of the channel's end.

        Only behind input that was given. Unasked it would show: sudo with a terminal of its own passes a ^D that comes
        before it is ready on as a NUL. `ssh -tt` types none either.
        """
        return self._command.pty and self._command.stdin

    def give(self) -> None:
        """Let the node send as much again as was withheld; any thread."""
        with self._guard:
            size, self._held = self._held, 0
            if not size or self._over or self.close_sent:
                return
            self._given += size
        self._send(messages.adjust(self._remote, size))

    def close(self) -> None:
        """Close the channel; what runs goes on running. May wait for the socket; pool."""
        if self.ask_close():
            self._link.wire.flush()

    def ask_close(self, *, gone: bool = False) -> bool:
        """Close the channel without waiting; the caller flushes the wire. False: nothing was to be sent.

        Args:
            gone: the node said that the command is; else it may run on, and the connection's are counted no more.
        """
        if self.counts and not gone:
            self._link.uncounted = True
        with self._guard:
            self._dropped = self._dropped or not self._committed
            if self._over or self._remote < 0:
                return False  # one that was not confirmed yet answers the confirmation with CLOSE
        with contextlib.suppress(EOFError, OSError):
            return self._link.send_close(self, messages.close(self._remote))
        return False

    # --- what the ending of commands asks; any thread, the truth of a moment

    @property
    def never_ran(self) -> bool:
        """Whether the command will not be sent any more, or was refused."""
        return self._error is not None or (self._dropped and not self._committed)

    @property
    def counts(self) -> bool:
        """Whether the command runs on the node, as far as is known."""
        return self._committed > 0 and not (self._exited or self._over or self.close_sent)

    def watch(self, call: Callable[[], None]) -> None:
        """Have `call` called, by the connection's thread, when command or session end, or a signal is refused."""
        self._watch = call

    def signal(self, name: bytes) -> None:
        """Ask the node to signal the command's process group (RFC 4254 6.9), without waiting."""
        request = messages.signal(self._remote, name)
        with contextlib.suppress(EOFError, OSError):
            self._link.send(self, request)

    def _opening(self) -> bytes:
        return messages.open_session(self.chanid, WINDOW)

    def _send(self, *payloads: bytes) -> None:
        # A connection that is gone is told by its thread, which the failed send has woken.
        with contextlib.suppress(EOFError, OSError):
            self._link.send(self, *payloads)

    # --- what the Link calls: the connection's thread

    def confirmed(self, remote: int, window: int, packet: int) -> None:
        """The node opened the session: send the command, unless it was given up."""
        self._look_new()
        if packet < _LEAST:
            raise SSHException(f"the node takes packets of at most {packet} bytes, which is less than {_LEAST}")
        self._packet = min(packet, _INPUT)
        with self._guard:
            self._remote = remote
            # In a re-key the confirmation waits, and what widens the window does not.
            self._room = min(self._room + window, _MOST_ROOM)
            dropped = self._dropped
        if dropped or not self._command.pty:
            self._send_command()
        else:
            # The command waits for the answer: where there is no terminal, sshd would run it without.
            self._asked = "pty"
            self._link.send(self, messages.terminal(remote))

    def _send_command(self) -> None:
        with self._guard:
            dropped = self._dropped
            self._committed = 0 if dropped else next(self._link.orders)
        if dropped:
            self._reply_close()
            return
        self._sink.phase("exec")
        request = messages.execute(self._remote, self._command.line)
        end = messages.eof(self._remote)
        with self._guard:
            self._eof_wanted = self._eof_wanted or not self._command.stdin
            both = self._eof_sent = self._eof_wanted and not self._types_end()
        self._asked = "exec"
        self._link.send(self, request, *([end] if both else []))
        with self._guard:
            # Input that came before the command would be lost.
            self._sent = True
        self._end_input()
        self._wake_writer()

    def refused(self, code: int, text: bytes) -> None:
        """The node did not open the session."""
        self._look_new()
        self._end(mapping.open_refused(code, text))
        self._mark()

    def _look_new(self) -> None:
        if self._remote >= 0 or self._over:
            raise SSHException("the node answered twice to the opening of a session")

    def lost(self) -> None:
        """The connection is gone."""
        self._end(self._lost())
        self._mark()

    def flush_sink(self) -> None:
        """The socket ran dry: hand on, then ask whether the node may send on."""
        self._marked = False
        self._sink.flush()
        if self._taken >= self._window // 2 and not self._over:
            wider = 0
            may = self._sink.may(self)
            if may and self._window < WIDEST:
                wider = self._sink.widen(min(self._window, WIDEST - self._window))
                self._window += wider
            with self._guard:
                self._held += self._taken + wider
            self._taken = 0
            if may:
                self.give()

    def _lost(self) -> NodeError:
        link = self._link
        return mapping.lost(link.verdict or link.saved_exception, link.farewell[1], here=link.closed_here)

    def _reply_close(self) -> None:
        self._link.send_close(self, messages.close(self._remote))

    def _mark(self) -> None:
        if not self._marked:
            self._marked = True
            self._link.wire.mark(self)

    def _run(self) -> None:
        """The node runs the command: it said so, or it sends what the command says."""
        if not self._committed:
            raise SSHException("the node answered a command that was not sent")
        self._running = True
        self._asked = ""
        self._sink.phase("running")
        self._mark()

    def _wake_writer(self) -> None:
        with self._guard:
            wake = self._starved and self._sent and self._room > 0 and not self._over
            self._starved = self._starved and not wake
        if wake:
            self._sink.writable()
            self._mark()

    def _end(self, error: NodeError | None) -> None:
        """Tell the end, once; its thread, or `start` on a connection that is dead."""
        with self._guard:
            if self._over:
                return
            self._over = True
        self._link.delist(self)
        if self._exited and self._complete:
            error = None  # what ended the connection later is nothing to it
        elif self._error is not None:
            error = self._error
        self._sink.ended(error)
        if self._watch is not None:
            self._watch()

    # --- packets: the connection's thread

    def packet(self, kind: int, payload: bytes) -> None:
        """Deal with a message; see `OwnChannel`."""
        if kind == MSG_CHANNEL_DATA:
            self._take(STDOUT, payload, 5)
        elif kind == MSG_CHANNEL_EXTENDED_DATA:
            self._take(STDERR if payload[5:9] == messages.ERROR_OUTPUT else 0, payload, 9)
        else:
            _HANDLERS[kind](self, payload)

    def _take(self, stream: int, payload: bytes, at: int) -> None:
        size = int.from_bytes(payload[at : at + 4], "big")
        chunk = payload[at + 4 : at + 4 + size]
        self._seen += size
        # Also what is thrown away counts: a node that ignores its window is a flood.
        if len(chunk) != size or len(payload) < at + 4:
            raise Fields(payload, "output").malformed(f"it claims {size} bytes and has {len(chunk)}")
        if self._seen > self._given:
            raise mapping.TooMuch("the node sent more output than it may")
        if self._over or self.close_sent:
            return
        if not self._running:
            self._run()
        self._taken += size
        if stream and chunk:
            self._sink.data(stream, chunk)
        if not self._marked:
            self._mark()

    def _window_adjusted(self, payload: bytes) -> None:
        size = Fields(payload, "a window", 5).u32()
        with self._guard:
            self._room = min(self._room + size, _MOST_ROOM)
        if self._eof_wanted and not self._eof_sent:
            self._end_input()
        if self._starved:
            self._wake_writer()

    def _granted(self, _: bytes) -> None:
        asked, self._asked = self._asked, ""
        if asked == "pty":
            self._send_command()
        elif asked == "exec":
            self._run()

    def _denied(self, _: bytes) -> None:
        asked, self._asked = self._asked, ""
        if asked:
            self._error = mapping.no_terminal() if asked == "pty" else mapping.exec_refused()
            self._reply_close()
            return
        # A signal that was refused says nothing about the command, which goes on.
        self._signal_refused = True
        if self._watch is not None:
            self._watch()

    def _requested(self, payload: bytes) -> None:
        fields = Fields(payload, "a request of a session", 5)
        kind, wanted = fields.string(), fields.boolean()
        if kind == b"exit-status":
            self._ended_with(fields.u32(), None)
        elif kind == b"exit-signal":
            name = fields.string()[:64].decode("utf-8", "backslashreplace")
            fields.boolean()  # whether it dumped core
            fields.skip_string()  # words, and their language
            fields.skip_string()
            self._ended_with(None, name)
        if wanted:
            # sshd's ClientAliveInterval asks this way, and hangs up on one who never answers.
            self._link.when_clear(self._say_no)

    def _say_no(self) -> None:
        if self._remote < 0:
            raise SSHException("the node sent a request of a session that is not open")
        self._link.send(self, messages.failure(self._remote))

    def _ended_with(self, status: int | None, signal: str | None) -> None:
        if self._exited or self._over or self.close_sent:
            return
        if not self._running:
            self._run()
        self._exited = True
        self._sink.exited(status, signal)
        self._mark()
        if self._watch is not None:
            self._watch()

    def _ended_output(self, _: bytes) -> None:
        self._complete = True  # and no more: output that ended is no command that ended

    def _closed_there(self, _: bytes) -> None:
        self._link.when_clear(self._closed)

    def _closed(self) -> None:
        if self._remote < 0:
            raise SSHException("a session was closed before it was opened")
        self._complete = True
        # Where we closed it first, nothing is missing.
        error = None if self.close_sent else mapping.no_exit_status()
        if self.counts:
            self._link.uncounted = True  # nobody said that its command ended
        try:
            # Before the job hears of it: its next command would meet MaxSessions.
            self._reply_close()
        finally:
            self._end(error)
            self._mark()


_HANDLERS = {
    MSG_CHANNEL_WINDOW_ADJUST: SshSession._window_adjusted,
    MSG_CHANNEL_REQUEST: SshSession._requested,
    MSG_CHANNEL_SUCCESS: SshSession._granted,
    MSG_CHANNEL_FAILURE: SshSession._denied,
    MSG_CHANNEL_EOF: SshSession._ended_output,
    MSG_CHANNEL_CLOSE: SshSession._closed_there,
}
