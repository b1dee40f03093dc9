# SPDX-License-Identifier: Apache-2.0
"""paramiko's `Transport`, made fit for many connections in one process and many sessions on each.

A `Link` is the connection's thread. What it changes: nobody waits for a re-key (what is to be sent meanwhile
is parked), the thread never waits for another one that waits for the node, its end is told to every session
exactly once, and nothing polls.

Guards: `lock` (paramiko's) orders the registering of sessions with `dead`; `clear_to_send_lock` (paramiko's)
orders sending with the re-key, and what is parked. Both are held for the time of a computation only, since
the `Wire` never blocks a sender. Order, where two are held: `lock`, `clear_to_send_lock`, the packetizer's
write lock, the wire's.
"""

from __future__ import annotations

import abc
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import paramiko
from paramiko.common import (
    MSG_CHANNEL_CLOSE,
    MSG_CHANNEL_DATA,
    MSG_CHANNEL_EOF,
    MSG_CHANNEL_EXTENDED_DATA,
    MSG_CHANNEL_FAILURE,
    MSG_CHANNEL_OPEN_FAILURE,
    MSG_CHANNEL_OPEN_SUCCESS,
    MSG_CHANNEL_REQUEST,
    MSG_CHANNEL_SUCCESS,
    MSG_CHANNEL_WINDOW_ADJUST,
)
from paramiko.message import Message
from paramiko.ssh_exception import IncompatiblePeer

from ctask.transports.ssh.mapping import HostKeyChanged, NoCommonAlgorithm, quoted
from ctask.transports.ssh.packets import Packet, WirePacketizer, differences
from ctask.transports.ssh.wire import Wire

__all__ = ["Link", "OwnChannel"]

_logger = logging.getLogger("ctask.ssh")

#: Messages below are those of transport and key exchange: the only ones that may be sent during a re-key.
_FIRST_USER_MESSAGE = 50


class OwnChannel(abc.ABC):
    """What a `Link` asks of a channel of ours, beside the handlers of paramiko's `Channel`."""

    __slots__ = ("chanid", "close_sent")

    def __init__(self) -> None:
        #: its number here; given when it is enlisted
        self.chanid = -1
        #: CLOSE was sent, or waits for the end of a re-key; guarded by the link's `clear_to_send_lock`
        self.close_sent = False

    @abc.abstractmethod
    def confirmed(self, remote: int, window: int, packet: int) -> None:
        """The node opened it. Connection's thread; no re-key is under way."""

    @abc.abstractmethod
    def refused(self, code: int, text: bytes) -> None:
        """The node did not open it. Connection's thread."""

    @abc.abstractmethod
    def lost(self) -> None:
        """The connection is gone. Connection's thread, its last act."""

    def _unlink(self) -> None:
        # paramiko's own sweep, which comes before the connection is marked as dead: a job told now could find
        # the same connection again. `lost` follows.
        return


class Link(paramiko.Transport):  # type: ignore[misc]  # paramiko has no types
    """One SSH connection: its thread, its keys and the table of its channels.

    Attributes:
        dead: the connection is gone; set under `lock`, once, by its own thread.
        closed_here: it was ended by `close`.
        farewell: (code, text) of the server's DISCONNECT; (0, "") where it sent none.
        on_dead: called once, by the thread, after `dead` was set and before the sessions are told.
    """

    # GCM is the fastest there is (no MAC of its own); CBC and 3DES are left out for CVE-2023-48795.
    _preferred_ciphers = (
        "aes128-gcm@openssh.com",
        "aes256-gcm@openssh.com",
        "aes128-ctr",
        "aes192-ctr",
        "aes256-ctr",
    )
    _preferred_macs = (
        "hmac-sha2-256-etm@openssh.com",
        "hmac-sha2-512-etm@openssh.com",
        "hmac-sha2-256",
        "hmac-sha2-512",
    )

    def __init__(self, wire: Wire, version: str, name: str, key_types: tuple[str, ...]) -> None:
        super().__init__(wire, packetizer_class=WirePacketizer)
        self.name = name
        self.wire = wire
        self.dead = False
        self.closed_here = False
        self.farewell = (0, "")
        self.on_dead: Callable[[], None] | None = None
        self._version = version
        self._waiter: threading.Event | None = None
        self._parked: deque[Callable[[], None]] = deque()
        self.packetizer.set_log(None)
        self._preferred_keys = key_types
        # A strong map: paramiko's weak one sends CLOSE from whatever thread collects a channel.
        self._channels = _Channels()
        self.channels_seen: Any = _BelowCounter(self)
        self._channel_handler_table = _LATE
        self._handler_table[MSG_CHANNEL_OPEN_SUCCESS] = self._opened
        self._handler_table[MSG_CHANNEL_OPEN_FAILURE] = self._open_failed

    # --- the handshake: the thread that connects

    def handshake(self) -> bool:
        """Start the thread and wait for the first keys; False: the connection ended before them.

        No deadline: shutting the wire ends it.

        Raises:
            RuntimeError: no thread can be started.
        """
        done = self._waiter = threading.Event()
        # Our version and KEXINIT leave in one piece, drawn by `_send_kex_init`.
        self.wire.cork()
        self.start_client(event=done)
        done.wait()
        self.completion_event = None
        # A connection that ended right after them ended in the login, and is told there, as always.
        return bool(self.initial_kex_done)

    def await_event(self, done: threading.Event, ask: Callable[[], None]) -> None:
        """Call `ask`, and wait for `done` or for the connection's end."""
        self._waiter = done
        with contextlib.suppress(EOFError, OSError):  # a dead connection is told by `dead`
            ask()
        # The end may have come before `_waiter` was set, and paramiko forgets events of that moment.
        if self.dead:
            done.set()
        done.wait()

    def logged_in(self) -> None:
        """End the counting of packets: what comes now, comes from a node that knows us."""
        self._waiter = None
        self.packetizer.trust()

    @property
    def preferred_keys(self) -> tuple[str, ...]:
        """Host key algorithms. Without paramiko's certificates: it accepts them unchecked."""
        return self._preferred_keys

    # --- sending

    def enlist(self, channel: OwnChannel) -> bool:
        """Number `channel` and put it where packets and the end find it; False: the connection is dead."""
        with self.lock:
            if self.dead:
                return False
            self._enlist(channel)
            return True

    def _enlist(self, channel: OwnChannel) -> None:
        channel.chanid = self._next_channel()
        self._channels.put(channel.chanid, channel)

    def delist(self, channel: OwnChannel) -> None:
        """Forget `channel`; packets for its number are ignored from now on."""
        self._channels.delete(channel.chanid)

    def send(self, channel: OwnChannel, *payloads: bytes) -> None:
        """Send messages of `channel` in one piece, or park them while keys are changed; any thread.

        Never waits for the node or a re-key; another thread than the connection's flushes the wire
        afterwards, and may wait there. After the channel's CLOSE nothing is sent: a word for a channel that
        the node has forgotten would make sshd end the whole connection.

        Raises:
            EOFError: the connection is gone; its thread tells everybody.
        """
        with self.clear_to_send_lock:
            if not channel.close_sent:
                self._send_or_park(payloads)

    def send_close(self, channel: OwnChannel, payload: bytes) -> bool:
        """Send the last message of `channel`; False: it was sent before."""
        with self.clear_to_send_lock:
            if channel.close_sent:
                return False
            channel.close_sent = True
            self._send_or_park((payload,))
            return True

    def send_now(self, channel: OwnChannel, payload: bytes) -> bool:
        """Send a message of `channel`, or return False while keys are changed."""
        with self.clear_to_send_lock:
            if not self.clear_to_send.is_set():
                return False
            if not channel.close_sent:
                self.packetizer.send_message(Packet(payload))
            return True

    def _send_or_park(self, payloads: tuple[bytes, ...]) -> None:
        if not self.clear_to_send.is_set():
            self._parked.append(partial(self._send_all, payloads))
        else:
            self._send_all(payloads)

    def _send_all(self, payloads: tuple[bytes, ...]) -> None:
        if len(payloads) == 1:
            self.packetizer.send_message(Packet(payloads[0]))
            return
        # A send costs more than the encryption of what it carries.
        self.wire.cork()
        try:
            for payload in payloads:
                self.packetizer.send_message(Packet(payload))
        finally:
            self.wire.uncork()

    def park(self, what: Callable[[], None]) -> bool:
        """Have `what` called by the connection's thread after the re-key; False: there is none."""
        with self.clear_to_send_lock:
            if self.clear_to_send.is_set():
                return False
            self._parked.append(what)
            return True

    def when_clear(self, what: Callable[[], None]) -> None:
        """Call `what` now, or after the re-key that is under way. Connection's thread."""
        # Only this thread clears the flag, so it cannot change in between.
        if self.clear_to_send.is_set():
            what()
        else:
            self._parked.append(what)

    def try_open(self, channel: OwnChannel, make: Callable[[], bytes]) -> bool:
        """Enlist `channel` and send the packet that opens it, or return False and have changed nothing.

        Takes every lock without waiting, and needs a socket with room and no re-key under way. The
        dispatcher.
        """
        write_lock = self.packetizer.write_lock
        if not self.clear_to_send.is_set() or not self.lock.acquire(blocking=False):
            return False
        try:
            if self.dead or not self.clear_to_send_lock.acquire(blocking=False):
                return False
            try:
                if not self.clear_to_send.is_set() or not write_lock.acquire(blocking=False):
                    return False
                try:
                    return self._open_now(channel, make)
                finally:
                    write_lock.release()
            finally:
                self.clear_to_send_lock.release()
        finally:
            self.lock.release()

    def _open_now(self, channel: OwnChannel, make: Callable[[], bytes]) -> bool:
        if not self.wire.writable(idle=not self._channels):
            return False
        self._enlist(channel)
        # Enlisted is started: whatever comes now, the connection's thread tells its end.
        with contextlib.suppress(EOFError, OSError):
            self.packetizer.send_message(Packet(make()))
        return True

    def _send_message(self, data: Any) -> None:
        # The connection's thread answers packets in the middle of a re-key as well. RFC 4253 7.1 forbids all
        # but transport messages then, and waiting here for the re-key would be waiting for itself.
        if (
            threading.get_ident() == self.ident
            and self.initial_kex_done
            and not self.clear_to_send.is_set()
            and data.asbytes()[0] >= _FIRST_USER_MESSAGE
        ):
            self._parked.append(partial(self._send_message, data))
        else:
            self.packetizer.send_message(data)

    def _send_user_message(self, data: Any) -> None:
        # paramiko's own Channels answer by this in the connection's thread, too.
        if threading.get_ident() == self.ident:
            self._send_message(data)
        else:
            super()._send_user_message(data)
            self.wire.flush()

    # --- the connection's thread

    def run(self) -> None:
        """Carry the connection until it ends, then tell everybody."""
        try:
            super().run()
        finally:
            self._die()

    def _die(self) -> None:
        with self.lock:
            self.dead = True
        if self.on_dead is not None:
            self.on_dead()
        for channel in self._channels.values():
            try:
                channel.lost() if isinstance(channel, OwnChannel) else channel._unlink()
            except Exception:  # one job's defect must not keep the others from hearing of their end
                _logger.exception("a session could not be told that its connection is lost")
        try:
            self.wire.dry()
        finally:
            self._parked.clear()
            self.wire.close()
            if self._waiter is not None:
                self._waiter.set()
            self._untie()

    def _untie(self) -> None:
        """Let go of what leads back here, so that a lost connection is freed at once and not by a later collection."""
        self._handler_table: dict[int, Any] = {}
        self._channels.clear()
        self.channels_seen = {}
        self.on_dead = None
        if self.saved_exception is not None:
            self.saved_exception.__traceback__ = None

    def _check_banner(self) -> None:
        # Read and judged already, by the thread that connects: a server that says nothing costs no second
        # one.
        self.remote_version = self._version

    def _send_kex_init(self) -> None:
        super()._send_kex_init()
        if not self.initial_kex_done:
            self.wire.uncork()

    def _parse_kex_init(self, m: Message) -> None:
        try:
            super()._parse_kex_init(m)
        except IncompatiblePeer as error:
            m.rewind()
            theirs = self._really_parse_kex_init(m)
            ours = self._really_parse_kex_init(Message(self._latest_kex_init), ignore_first_byte=True)
            raise NoCommonAlgorithm(differences(ours, theirs) or str(error)) from error

    def _verify_key(self, host_key: bytes, sig: bytes) -> None:
        old = self.host_key
        super()._verify_key(host_key, sig)
        if old is not None and old.asbytes() != self.host_key.asbytes():
            raise HostKeyChanged("the host key changed in the middle of the connection")

    def _parse_newkeys(self, m: Message) -> None:
        first = not self.initial_kex_done
        if first:  # a re-key is to show the same key, so it is to use the same algorithm
            self._preferred_keys = (self.host_key_type,)
        super()._parse_newkeys(m)
        # Nobody parks any more: the flag was set under the lock.
        while self._parked:
            self._parked.popleft()()

    def _parse_debug(self, m: Message) -> None:
        """Nothing: what a server tells debuggers is not read (paramiko would decode and format it)."""

    def _parse_disconnect(self, m: Message) -> None:
        code = m.get_int()
        self.farewell = (code, m.get_string()[:200].decode("utf-8", "replace").strip())

    def _opened(self, m: Message) -> None:
        channel = self._channels.get(m.get_int())
        if isinstance(channel, OwnChannel):
            # Without paramiko's `lock` around it, under which `try_open` would find no moment.
            numbers = m.get_int(), m.get_int(), m.get_int()
            self.when_clear(partial(channel.confirmed, *numbers))
        else:
            m.rewind()
            super()._parse_channel_open_success(m)

    def _open_failed(self, m: Message) -> None:
        channel = self._channels.get(m.get_int())
        if isinstance(channel, OwnChannel):
            # paramiko keeps the reason in one place for all channels, where concurrent opens mix them up.
            channel.refused(m.get_int(), m.get_string()[:200])
        else:
            m.rewind()
            super()._parse_channel_open_failure(m)

    def stop_thread(self) -> None:
        """End the connection; any thread. paramiko's own closes the descriptor under its reader."""
        self.wire.shut()

    def close(self) -> None:
        """End the connection; any thread, never waits."""
        self.closed_here = True
        self.wire.shut()

    def _log(self, _: int, msg: Any, *args: Any) -> None:
        # Never above DEBUG: what ends a connection is told by errors, once, and not by tracebacks on stderr.
        if _logger.isEnabledFor(logging.DEBUG):
            for text in msg if isinstance(msg, list) else [str(msg) % args if args else str(msg)]:
                _logger.debug("%s: %s", self.name, quoted(text, 200))


class _Channels(dict[int, Any]):
    """Number -> channel, as paramiko's weak map has it; each operation is one of a dict's own."""

    def put(self, chanid: int, channel: Any) -> None:
        """Add one."""
        self[chanid] = channel

    def delete(self, chanid: int) -> None:
        """Remove one, if it is there."""
        self.pop(chanid, None)

    def values(self) -> list[Any]:  # type: ignore[override]  # a copy: the map changes while it is looped over
        """Return the channels."""
        return list(super().values())


class _BelowCounter:
    """In place of paramiko's dict of all numbers ever used, which grows for as long as a connection lives.

    A packet for a number that was never given ends the connection, one for a number of the past is ignored.
    """

    __slots__ = ("_link",)

    def __init__(self, link: Link) -> None:
        self._link = link

    def __contains__(self, chanid: int) -> bool:
        return bool(chanid < self._link._channel_counter)

    def __setitem__(self, chanid: int, value: bool) -> None:
        return


#: paramiko's table holds the functions of its own class; these look the handler up on the channel, so that
#: paramiko's Channels (SFTP, jump hosts) and ours live side by side.
_LATE: dict[int, Callable[[Any, Message], None]] = {
    MSG_CHANNEL_SUCCESS: lambda channel, m: channel._request_success(m),
    MSG_CHANNEL_FAILURE: lambda channel, m: channel._request_failed(m),
    MSG_CHANNEL_DATA: lambda channel, m: channel._feed(m),
    MSG_CHANNEL_EXTENDED_DATA: lambda channel, m: channel._feed_extended(m),
    MSG_CHANNEL_WINDOW_ADJUST: lambda channel, m: channel._window_adjust(m),
    MSG_CHANNEL_REQUEST: lambda channel, m: channel._handle_request(m),
    MSG_CHANNEL_EOF: lambda channel, m: channel._handle_eof(m),
    MSG_CHANNEL_CLOSE: lambda channel, m: channel._handle_close(m),
}
