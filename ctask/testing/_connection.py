# SPDX-License-Identifier: Apache-2.0
"""One SSH connection to a node of an embedded cluster.

Two threads: paramiko's own reads and decrypts packets, does the key exchange and the login, and posts what
belongs to channels; the *pump* owns the channels and sends for them. So the reading thread never waits for a
re-key that it must carry out itself, and a client that does not read delays its own connection only.

The inbox and its wake-up descriptor are guarded by one lock; everything else has one thread.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator

import paramiko
from paramiko import Message
from paramiko.common import (
    AUTH_FAILED,
    AUTH_SUCCESSFUL,
    MSG_CHANNEL_CLOSE,
    MSG_CHANNEL_DATA,
    MSG_CHANNEL_EOF,
    MSG_CHANNEL_EXTENDED_DATA,
    MSG_CHANNEL_FAILURE,
    MSG_CHANNEL_OPEN,
    MSG_CHANNEL_REQUEST,
    MSG_CHANNEL_SUCCESS,
    MSG_CHANNEL_WINDOW_ADJUST,
    OPEN_FAILED_CONNECT_FAILED,
    cMSG_CHANNEL_FAILURE,
    cMSG_CHANNEL_OPEN_FAILURE,
    cMSG_CHANNEL_OPEN_SUCCESS,
    cMSG_CHANNEL_SUCCESS,
)
from paramiko.packet import Packetizer

from ctask.testing._channel import PACKET, SIGNALS, WINDOW, Channel, ProtocolError
from ctask.testing._session import EXITED, MAX_MESSAGE

__all__ = ["Connection"]

#: Linux takes no longer argument.
_MAX_COMMAND = 128 * 1024

#: What the pump gets, besides the numbers of SSH's messages.
_ENDED = -1


class Connection:
    """A connection from its accept to its end.

    Guarantees: `on_end` is called exactly once, after `start`, when the client can hear nothing more.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        key: paramiko.PKey,
        user: str,
        login: paramiko.PKey,
        max_sessions: int | None,
        begin_session: Callable[[socket.socket], None],
        on_end: Callable[[Connection], None],
    ) -> None:
        self._sock = sock
        self._max_sessions = max_sessions
        self._begin_session = begin_session
        self._on_end = on_end
        self._door = _Door(user, login)
        self._transport = _Transport(sock, self._post, self._ended)
        self._transport.add_server_key(key)
        # guarded by _lock: whether the pump was begun, and whether it takes posts
        self._lock = threading.Lock()
        self._begun = False
        self._inbox: queue.SimpleQueue[tuple[int, Message | None]] = queue.SimpleQueue()
        self._bell = -1
        # the pump's own
        self._selector: selectors.BaseSelector
        self._control: socket.socket
        self._channels: dict[int, Channel] = {}
        self._opened = 0

    def start(self) -> None:
        """Begin to serve, in threads of the connection's own."""
        self._transport.start_server(event=threading.Event(), server=self._door)

    def cut(self) -> None:
        """End the connection, from any thread: the client sees the end of the stream."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    # -- paramiko's thread --

    def _post(self, kind: int, message: Message | None) -> None:
        with self._lock:
            if self._bell < 0:
                if kind != MSG_CHANNEL_OPEN or self._begun:
                    return
                self._begin()
            self._inbox.put((kind, message))
            os.eventfd_write(self._bell, 1)

    def _begin(self) -> None:
        # The first session of a connection that has logged in: from now on there is a process for it.
        self._begun = True
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._control.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MAX_MESSAGE)
            self._begin_session(theirs)
        self._selector = selectors.DefaultSelector()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        threading.Thread(target=self._pump, name="pump", daemon=True).start()

    def _ended(self) -> None:
        self._post(_ENDED, None)
        self._on_end(self)

    # -- the pump --

    def _pump(self) -> None:
        self._selector.register(self._bell, selectors.EVENT_READ)
        self._selector.register(self._control, selectors.EVENT_READ)
        # A broken connection, a killed session process, a client that breaks the rules: the same end for all.
        with contextlib.suppress(EOFError, OSError, paramiko.SSHException, ProtocolError):
            while self._turn():
                pass
        self.cut()
        with self._lock:
            os.close(self._bell)
            self._bell = -1
        for channel in self._channels.values():
            channel.release()
        self._control.close()  # which ends the session process
        self._selector.close()

    def _turn(self) -> bool:
        due = [channel.eof_due for channel in self._channels.values() if channel.eof_due is not None]
        wait = max(0.0, min(due) - time.monotonic()) if due else None
        told = False
        for key, events in self._selector.select(wait):
            if isinstance(key.data, Channel):
                key.data.ready(key.fd, events)
            elif key.fd == self._bell:
                os.eventfd_read(key.fd)
                told = True
            else:
                self._take_exits()
        if due:
            now = time.monotonic()
            for channel in self._channels.values():
                channel.tick(now)
        if told:
            for kind, message in self._posted():
                if message is None:
                    return False
                self._take(kind, message)
        for number in [number for number, channel in self._channels.items() if channel.gone]:
            del self._channels[number]
        return True

    def _posted(self) -> Iterator[tuple[int, Message | None]]:
        with contextlib.suppress(queue.Empty):
            while True:
                yield self._inbox.get_nowait()

    def _take_exits(self) -> None:
        report = self._control.recv(EXITED.size)
        if not report:
            raise EOFError  # somebody killed the session process, and the connection with it
        number, status = EXITED.unpack(report)
        self._channels[number].on_exit(status)

    def _take(self, kind: int, message: Message) -> None:
        if kind == MSG_CHANNEL_OPEN:
            self._open(message)
            return
        number = message.get_int()
        channel = self._channels.get(number)
        if channel is None or channel.peer_closed:
            if number >= self._opened:
                raise ProtocolError("a channel that was never opened")
            return
        if kind == MSG_CHANNEL_REQUEST:
            self._request(channel, message)
        elif kind == MSG_CHANNEL_DATA:
            channel.on_data(message.get_binary())
        elif kind == MSG_CHANNEL_WINDOW_ADJUST:
            channel.on_window(message.get_int())
        elif kind == MSG_CHANNEL_EOF:
            channel.on_eof()
        elif kind == MSG_CHANNEL_CLOSE:
            channel.on_close()

    def _open(self, message: Message) -> None:
        kind = message.get_text()
        peer, window, packet = message.get_int(), message.get_int(), message.get_int()
        answer = Message()
        sessions = sum(not channel.gone for channel in self._channels.values())
        full = self._max_sessions is not None and sessions >= self._max_sessions
        if kind != "session" or full:
            answer.add_byte(cMSG_CHANNEL_OPEN_FAILURE)
            answer.add_int(peer)
            answer.add_int(OPEN_FAILED_CONNECT_FAILED)
            answer.add_string("open failed")
            answer.add_string("")
        else:
            number, self._opened = self._opened, self._opened + 1
            self._channels[number] = Channel(
                number, peer, window, packet, send=self._send, selector=self._selector
            )
            answer.add_byte(cMSG_CHANNEL_OPEN_SUCCESS)
            for value in (peer, number, WINDOW, PACKET):
                answer.add_int(value)
        self._send(answer)

    def _request(self, channel: Channel, message: Message) -> None:
        kind, wants_answer = message.get_text(), message.get_boolean()
        done = not channel.closed and self._carry_out(channel, kind, message)
        if wants_answer and not channel.closed:
            channel.send(cMSG_CHANNEL_SUCCESS if done else cMSG_CHANNEL_FAILURE)

    def _carry_out(self, channel: Channel, kind: str, message: Message) -> bool:
        if kind == "exec":
            return self._run(channel, {}, message.get_binary())
        if kind == "shell":
            return self._run(channel, {"login": True}, b"")
        if kind == "pty-req" and not channel.running and channel.terminal is None:
            name, columns, rows = message.get_text(), message.get_int(), message.get_int()
            channel.open_terminal(name, columns, rows)
            return True
        if kind == "window-change":
            channel.resize(message.get_int(), message.get_int())
            return True
        if kind == "signal":
            return self._signal(channel, message.get_text())
        return False  # `env` and the forwardings among them, as with sshd's default configuration

    def _run(self, channel: Channel, how: dict[str, object], command: bytes) -> bool:
        if channel.running or len(command) > _MAX_COMMAND:
            return False
        how |= {"run": channel.number, "terminal": channel.terminal_path, "term": channel.terminal_name}
        streams = channel.attach()
        try:
            socket.send_fds(self._control, [json.dumps(how).encode(), b"\0", command], streams)
        finally:
            for stream in streams:
                os.close(stream)
        return True

    def _signal(self, channel: Channel, name: str) -> bool:
        if name not in SIGNALS or not channel.running or channel.exited:
            return False
        self._control.send(json.dumps({"signal": channel.number, "name": name}).encode())
        return True

    def _send(self, message: Message) -> None:
        self._transport.send_for_channel(message)


class _Packets(Packetizer):  # type: ignore[misc]
    """paramiko's packets, without a timer thread per handshake and without a log."""

    def start_handshake(self, timeout: float) -> None:
        pass

    def complete_handshake(self) -> None:
        pass

    def _log(self, level: int, msg: object) -> None:
        pass


class _Transport(paramiko.Transport):  # type: ignore[misc]
    """paramiko's transport, which posts what belongs to channels in place of keeping Channels of its own."""

    def __init__(
        self, sock: socket.socket, post: Callable[[int, Message], None], on_end: Callable[[], None]
    ) -> None:
        super().__init__(sock, packetizer_class=_Packets)
        sock.settimeout(None)  # with a timeout, paramiko looks around ten times a second
        self._on_end = on_end
        for kind in (
            MSG_CHANNEL_OPEN,
            MSG_CHANNEL_REQUEST,
            MSG_CHANNEL_DATA,
            MSG_CHANNEL_EXTENDED_DATA,
            MSG_CHANNEL_WINDOW_ADJUST,
            MSG_CHANNEL_EOF,
            MSG_CHANNEL_CLOSE,
            MSG_CHANNEL_SUCCESS,
            MSG_CHANNEL_FAILURE,
        ):
            self._handler_table[kind] = lambda message, kind=kind: post(kind, message)

    def run(self) -> None:
        try:
            super().run()
        finally:
            self._on_end()

    def send_for_channel(self, message: Message) -> None:
        """Send, after a re-key that is under way. Not for the thread of this transport."""
        self._send_user_message(message)

    def _log(self, level: int, msg: object, *args: object) -> None:
        pass


class _Door(paramiko.ServerInterface):  # type: ignore[misc]
    """Lets one user in, by one key."""

    def __init__(self, user: str, login: paramiko.PKey) -> None:
        self._user = user
        self._login = login.asbytes()

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        known = username == self._user and key.asbytes() == self._login
        return int(AUTH_SUCCESSFUL if known else AUTH_FAILED)
