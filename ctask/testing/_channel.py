# SPDX-License-Identifier: Apache-2.0
"""One session of a connection to an embedded node: its windows, and the pipes or terminal of its command.

Runs in the connection's pump thread only (`ctask.testing._connection`), which owns all of its state.

What is sent, and in which order, follows OpenSSH's sshd: output as the client's window allows, the status
when the command ends, EOF when nobody holds the output open any more, CLOSE when both are done.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import termios
import time
from collections import deque
from collections.abc import Callable

from paramiko import Message
from paramiko.common import (
    cMSG_CHANNEL_CLOSE,
    cMSG_CHANNEL_DATA,
    cMSG_CHANNEL_EOF,
    cMSG_CHANNEL_EXTENDED_DATA,
    cMSG_CHANNEL_REQUEST,
    cMSG_CHANNEL_WINDOW_ADJUST,
)

__all__ = ["PACKET", "SIGNALS", "WINDOW", "Channel", "ProtocolError"]

#: What a client may send before it is given more, and in one packet: OpenSSH's numbers.
WINDOW, PACKET = 2 * 1024 * 1024, 32 * 1024

#: The signals that SSH has names for (RFC 4254, 6.10).
SIGNALS = frozenset(
    ("ABRT", "ALRM", "FPE", "HUP", "ILL", "INT", "KILL", "PIPE", "QUIT", "SEGV", "TERM", "USR1", "USR2")
)

#: How long EOF waits for the status after the last byte: where a command just ends, sshd sends that first.
_STATUS_WITHIN = 0.02


class ProtocolError(Exception):
    """Raised when the client breaks the rules: its connection is ended."""


class Channel:
    """A session channel, from its open to both CLOSEs and the end of its command."""

    def __init__(
        self,
        number: int,
        peer: int,
        window: int,
        packet: int,
        *,
        send: Callable[[Message], None],
        selector: selectors.BaseSelector,
    ) -> None:
        self.number = number
        self.running = self.exited = False
        self.closed = self.peer_closed = False
        self.eof_due: float | None = None
        self.terminal: int | None = None
        self.terminal_path = ""
        self.terminal_name = "dumb"
        self._slave: int | None = None
        self._peer = peer
        self._send = send
        self._selector = selector
        self._window = window
        self._chunk = max(1, min(packet, PACKET))
        self._outputs: dict[int, int] = {}  # descriptor → type of extended data, 0 for standard output
        self._stdin: int | None = None
        self._unwritten: deque[bytes] = deque()
        self._stdin_ends = False
        self._credit = WINDOW
        self._consumed = 0
        self._eof_sent = False

    @property
    def gone(self) -> bool:
        """True when nothing more can come of it: it counts as a session until then."""
        return self.closed and self.peer_closed and (self.exited or not self.running)

    # -- the command's side --

    def open_terminal(self, name: str, columns: int, rows: int) -> None:
        """Make the pseudo-terminal that the command will have."""
        self.terminal, self._slave = os.openpty()
        self.terminal_path, self.terminal_name = os.ttyname(self._slave), name
        self.resize(columns, rows)

    def resize(self, columns: int, rows: int) -> None:
        """Tell the terminal its size; a foolish one is left out."""
        if self.terminal is not None and 0 < columns < 65536 and 0 < rows < 65536:
            termios.tcsetwinsize(self.terminal, (rows, columns))

    def attach(self) -> list[int]:
        """Return the command's ends of its streams, to be handed over and closed; none with a terminal."""
        self.running = True
        if self.terminal is not None:
            os.set_blocking(self.terminal, False)
            self._outputs = {self.terminal: 0}
            self._stdin = self.terminal
            self.listen()
            return []
        theirs, self._stdin = os.pipe()
        output, their_output = os.pipe()
        errors, their_errors = os.pipe()
        for ours in (self._stdin, output, errors):
            os.set_blocking(ours, False)
        self._outputs = {output: 0, errors: 1}
        if self._stdin_ends:
            self._discard_stdin()
        self.listen()
        return [theirs, their_output, their_errors]

    def listen(self) -> None:
        """Have the selector watch what can make progress, and nothing else."""
        wanted: dict[int, int] = {}
        if self._window > 0 and not self.closed:
            wanted = dict.fromkeys(self._outputs, selectors.EVENT_READ)
        if self._stdin is not None and self._unwritten:
            wanted[self._stdin] = wanted.get(self._stdin, 0) | selectors.EVENT_WRITE
        watched = self._selector.get_map()
        for fd in {*self._outputs, *([] if self._stdin is None else [self._stdin])}:
            events = wanted.get(fd, 0)
            if fd in watched and watched[fd].events == events:
                continue
            if fd in watched:
                self._selector.unregister(fd)
            if events:
                self._selector.register(fd, events, self)

    def ready(self, fd: int, events: int) -> None:
        """Move bytes, for the selector says that `fd` can."""
        if events & selectors.EVENT_WRITE:
            self._write()
        if events & selectors.EVENT_READ and fd in self._outputs:
            self._read(fd)
        self.listen()

    def on_exit(self, status: int) -> None:
        """Tell how the command ended."""
        self.exited = True
        self._discard_stdin()
        if not self.closed:
            self._send_status(status)
        if self._slave is not None:
            os.close(self._slave)
            self._slave = None
        self._read_last_words()
        self._end_output()
        self.listen()

    # -- the client's side --

    def on_data(self, data: bytes) -> None:
        """Take standard input."""
        self._credit -= len(data)
        if self._credit < 0:
            raise ProtocolError("more data than the window allows")
        if self._stdin is None or self._stdin_ends:
            self._give(len(data))
            return
        self._unwritten.append(data)
        self._write()
        self.listen()

    def on_eof(self) -> None:
        """End standard input after what is still to be written. A terminal has no such end."""
        self._stdin_ends = True
        if not self._unwritten and self.terminal is None:
            self._discard_stdin()

    def on_window(self, size: int) -> None:
        """Take the client's credit."""
        self._window += size
        self._read_last_words()
        self.listen()

    def on_close(self) -> None:
        """Answer the client's CLOSE, and let go of the command: its input ends, or its terminal hangs up."""
        self.peer_closed = True
        self.close()

    def close(self) -> None:
        """Send CLOSE, once, and close what is open here."""
        if not self.closed:
            self.closed = True
            self.release()
            self._send(self._message(cMSG_CHANNEL_CLOSE))

    def release(self) -> None:
        """Close all descriptors, without a word."""
        self.closed = True
        self.eof_due = None
        self._discard_stdin()
        for fd in list(self._outputs):
            self._drop(fd)
        for end in (self._slave, self.terminal):
            if end is not None:
                os.close(end)
        self._slave = self.terminal = None

    def tick(self, now: float) -> None:
        """Send the EOF that waited for the status in vain: the command has closed its output and runs on."""
        if self.eof_due is not None and now >= self.eof_due:
            self._send_eof()

    # -- within --

    def _read_last_words(self) -> None:
        # What an ended command left in its terminal is read; nobody waits for others who hold it.
        if self.exited and self.terminal is not None and self.terminal in self._outputs:
            self._read(self.terminal)

    def _read(self, fd: int) -> None:
        last_words = self.exited and fd == self.terminal
        turns = 4  # then others on this connection have theirs
        while self._window > 0 and (turns or last_words):
            turns -= 1
            try:
                data = os.read(fd, min(self._window, self._chunk))
            except BlockingIOError:
                if not last_words:
                    return
                data = b""
            except OSError:  # EIO: nobody has the terminal open any more
                data = b""
            if not data:
                self._drop(fd)
                self._end_output()
                return
            self._window -= len(data)
            self._send_data(self._outputs[fd], data)
            if len(data) < self._chunk and not last_words:
                return

    def _write(self) -> None:
        while self._unwritten and self._stdin is not None:
            data = self._unwritten[0]
            try:
                size = os.write(self._stdin, data)
            except BlockingIOError:
                return
            except OSError:  # nobody reads it: sshd takes and drops the rest, too
                self._discard_stdin()
                return
            if size == len(data):
                self._unwritten.popleft()
            else:
                self._unwritten[0] = data[size:]
            self._give(size)
        if self._stdin_ends and self.terminal is None:
            self._discard_stdin()

    def _discard_stdin(self) -> None:
        self._give(sum(map(len, self._unwritten)))
        self._unwritten.clear()
        if self._stdin is not None and self._stdin != self.terminal:
            self._forget(self._stdin)
            os.close(self._stdin)
        self._stdin = None

    def _drop(self, fd: int) -> None:
        self._forget(fd)
        del self._outputs[fd]
        if fd != self.terminal:
            os.close(fd)

    def _forget(self, fd: int) -> None:
        with contextlib.suppress(KeyError):
            self._selector.unregister(fd)

    def _end_output(self) -> None:
        if self._outputs or self.closed:
            return
        if self.exited:
            self._send_eof()
            self.close()
        elif not self._eof_sent and self.eof_due is None:
            self.eof_due = time.monotonic() + _STATUS_WITHIN

    # -- packets --

    def send(self, kind: bytes) -> None:
        """Send a message that says nothing but its kind."""
        self._send(self._message(kind))

    def _message(self, kind: bytes) -> Message:
        message = Message()
        message.add_byte(kind)
        message.add_int(self._peer)
        return message

    def _send_data(self, extended: int, data: bytes) -> None:
        message = self._message(cMSG_CHANNEL_EXTENDED_DATA if extended else cMSG_CHANNEL_DATA)
        if extended:
            message.add_int(extended)
        message.add_string(data)
        self._send(message)

    def _give(self, size: int) -> None:
        self._consumed += size
        if self._consumed > 3 * PACKET and not self.closed:
            message = self._message(cMSG_CHANNEL_WINDOW_ADJUST)
            message.add_int(self._consumed)
            self._credit += self._consumed
            self._consumed = 0
            self._send(message)

    def _send_status(self, status: int) -> None:
        message = self._message(cMSG_CHANNEL_REQUEST)
        if os.WIFSIGNALED(status):
            message.add_string("exit-signal")
            message.add_boolean(False)
            message.add_string(_signal_name(os.WTERMSIG(status)))
            message.add_boolean(os.WCOREDUMP(status))
            message.add_string("")
            message.add_string("")
        else:
            message.add_string("exit-status")
            message.add_boolean(False)
            message.add_int(os.WEXITSTATUS(status))
        self._send(message)

    def _send_eof(self) -> None:
        self.eof_due = None
        if not self._eof_sent:
            self._eof_sent = True
            self._send(self._message(cMSG_CHANNEL_EOF))


def _signal_name(number: int) -> str:
    names = {int(known): known.name.removeprefix("SIG") for known in signal.Signals}
    name = names.get(number)
    return name if name in SIGNALS else "SIG@openssh.com"  # as sshd says it
