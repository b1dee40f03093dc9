# SPDX-License-Identifier: Apache-2.0
"""One SSH connection with its channels, made fit for many connections in one process and many sessions on each.

The thread that connects reads until the login is done; then the process's reader does, for all connections. "The
connection's thread" is who reads now. Nobody waits for a re-key (what is to be sent meanwhile is parked), the
connection's thread never waits for another one that waits for the node, its end is told to every session exactly once,
and nothing polls.

Guards: `lock` (paramiko's) orders the registering of sessions with `dead`; `clear_to_send_lock` (paramiko's)
orders sending with the re-key, and what is parked. Both are held for the time of a computation only, since
the `Wire` never blocks a sender. Order, where two are held: `lock`, `clear_to_send_lock`, the packetizer's
write lock, the wire's.
"""

from __future__ import annotations

import abc
import contextlib
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from paramiko.common import (
    MSG_CHANNEL_FAILURE,
    MSG_CHANNEL_OPEN,
    MSG_CHANNEL_OPEN_FAILURE,
    MSG_CHANNEL_OPEN_SUCCESS,
    MSG_CHANNEL_WINDOW_ADJUST,
    MSG_GLOBAL_REQUEST,
    MSG_REQUEST_FAILURE,
    MSG_REQUEST_SUCCESS,
)
from paramiko.ssh_exception import SSHException

from ctask.transports.ssh import messages, rekey
from ctask.transports.ssh.alive import Doubt
from ctask.transports.ssh.exchange import Exchange
from ctask.transports.ssh.fields import Fields
from ctask.transports.ssh.keyexchange import OFFERED
from ctask.transports.ssh.mapping import TooMuch
from ctask.transports.ssh.packets import Packet
from ctask.transports.ssh.reader import Readable, Reader
from ctask.transports.ssh.wire import BACKLOG_LIMIT, Wire
from ctask.transports.watcher import watcher

__all__ = ["Link", "OwnChannel"]

_logger = logging.getLogger("ctask.ssh")

#: Messages below are those of transport and key exchange: the only ones that may be sent during a re-key.
_FIRST_USER_MESSAGE = 50
_NAME = b"keepalive@openssh.com"
_KEEPALIVE = bytes((MSG_GLOBAL_REQUEST,)) + len(_NAME).to_bytes(4, "big") + _NAME + b"\1"
#: Seconds of a turn: for so long the packets of one connection are dealt with before those of others. The clock is
#: looked at after every so many packets, whose largest take half a millisecond together.
_TURN = 0.002
_LOOK = 16
#: What a message that is parked during a re-key counts beside its bytes.
_PARKED = 256
#: A node earns new keys by so many seconds, and by so many bytes that came and went; it may have some ahead, and waits
#: where it has none. (sshd asks twice for each RekeyLimit, which may be as little as 16K or a second; a connection is
#: not to stand still for that, nor for as long as an answer is waited for. `rekey` bounds what all of them cost.)
_REKEY_SECONDS = 2.0
_REKEY_BYTES = 4 * 1024
_REKEYS_AHEAD = 8


class OwnChannel(abc.ABC):
    """What a `Link` asks of a channel of ours."""

    __slots__ = ("chanid", "close_sent")

    def __init__(self) -> None:
        #: its number here; given when it is enlisted
        self.chanid = -1
        #: CLOSE was sent, or waits for the end of a re-key; guarded by the link's `clear_to_send_lock`
        self.close_sent = False

    @abc.abstractmethod
    def packet(self, kind: int, payload: bytes) -> None:
        """A message for it, from WINDOW_ADJUST to FAILURE, with its first five bytes. Connection's thread."""

    @abc.abstractmethod
    def confirmed(self, remote: int, window: int, packet: int) -> None:
        """The node opened it. Connection's thread; no re-key is under way."""

    @abc.abstractmethod
    def refused(self, code: int, text: bytes) -> None:
        """The node did not open it. Connection's thread; no re-key is under way."""

    @abc.abstractmethod
    def lost(self) -> None:
        """The connection is gone. Connection's thread, its last act."""


class Link(Exchange):
    """One SSH connection: the table of its channels, and what is sent on it.

    Attributes:
        dead: the connection is gone; set under `lock`, once, by its own thread.
        over: everybody has been told, and the descriptor is closed.
        closed_here: it was ended by `close`.
        verdict: why it was ended by `give_up`.
        doubt: it rested for so long that it is asked before it is used; set by the pool, settled by who starts on it.
        on_dead: called once, by the thread, after `dead` was set and before the sessions are told.
        uncounted: a command may run on the node that has no session here any more; once set, it stays.
        orders: numbers for exec requests, in the order in which they are sent; its thread.
    """

    def __init__(
        self,
        wire: Wire,
        version: str,
        name: str,
        key_types: tuple[str, ...],
        kex_algorithms: tuple[str, ...] = OFFERED,
    ) -> None:
        super().__init__(wire, version, key_types, kex_algorithms)
        self.name = name
        self.dead = False
        self.over = False
        self.closed_here = False
        self.doubt: Doubt | None = None
        self.verdict: Exception | None = None
        self.on_dead: Callable[[], None] | None = None
        self.uncounted = False
        self.orders = itertools.count(1)
        self._fd = wire.fileno()
        self._reader: Reader | None = None
        self._parked: deque[Callable[[], None]] = deque()
        self._parked_bytes = 0
        #: packets that have come wait for another turn; the connection's thread
        self._behind = False
        #: not read until new keys are computed, or may be asked for; the connection's thread
        self._paused = False
        #: the request for new keys that came too early
        self._held: bytes | None = None
        self._keys_at = 0.0
        self._rekeys_ahead = _REKEYS_AHEAD
        #: whom the answers to our global requests interest, in the order of the questions (RFC 4254 4)
        self._questions: deque[Callable[[], None]] = deque()
        # A strong map: paramiko's weak one sends CLOSE from whatever thread collects a channel.
        self._channels = _Channels()
        self._handlers[MSG_CHANNEL_OPEN] = self._on_open
        self._handlers[MSG_CHANNEL_OPEN_SUCCESS] = self._on_opened
        self._handlers[MSG_CHANNEL_OPEN_FAILURE] = self._on_open_failed
        self._handlers[MSG_GLOBAL_REQUEST] = self._on_global_request
        self._handlers[MSG_REQUEST_SUCCESS] = self._handlers[MSG_REQUEST_FAILURE] = self._on_answer
        for kind in range(MSG_CHANNEL_WINDOW_ADJUST, MSG_CHANNEL_FAILURE + 1):
            self._handlers[kind] = self._on_channel

    # --- the handshake: the thread that connects

    def handshake(self) -> bool:
        """Exchange the first keys; False: the connection ended before them. No deadline: shutting the wire ends it."""
        self.active = True
        # Our version and KEXINIT leave in one piece, drawn by `_send_kex_init`.
        self.wire.cork()
        return self._guarded(self._greet) and self.drive(lambda: self.initial_kex_done)

    def drive(self, done: Callable[[], bool]) -> bool:
        """Read and deal with packets until `done()`; False: the connection ended before. May wait for the node."""
        return self._guarded(partial(self._drive, done))

    def hand_over(self, add: Callable[[int, Readable], None]) -> bool:
        """Let the reader read from now on, to which `add` gives it; False: the connection has ended.

        Raises:
            RuntimeError, OSError: there is no thread or descriptor for a reader; the connection is still the caller's.
        """
        self.packetizer.trust()
        # What came with the login's last packet would not wake the reader.
        self._behind = True
        while self._behind:
            if not self._guarded(self._deal):
                return False
        add(self._fd, self)
        # Only now is there something to arm. What waited already is asked for here.
        reader = self._reader
        if reader is not None:
            self.wire.attend(lambda out: reader.arm(self._fd, out=out))
        return True

    def adopted(self, reader: Reader) -> None:
        """See `Readable`."""
        self._reader = reader

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

    def channels(self) -> list[OwnChannel]:
        """Return the channels of this moment."""
        return self._channels.values()

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
            self._park(partial(self._send_all, payloads), sum(map(len, payloads)))
        else:
            self._send_all(payloads)

    def _park(self, what: Callable[[], None], size: int = 0) -> None:
        """Keep `what` until the re-key is over. All that is kept counts as what waits on the wire does."""
        self._parked_bytes += size + _PARKED
        if self._parked_bytes > BACKLOG_LIMIT:
            self.give_up(TooMuch("the node makes us say too much in the middle of a key exchange"))
        else:
            self._parked.append(what)

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
            self._park(what)
            return True

    def when_clear(self, what: Callable[[], None]) -> None:
        """Call `what` now, or after the re-key that is under way. Connection's thread."""
        # Only this thread clears the flag, so it cannot change in between.
        if self.clear_to_send.is_set():
            what()
        else:
            self._park(what)

    def ask(self, answered: Callable[[], None]) -> None:
        """Ask the node for a sign of life; `answered` is called with it, or with the end. Any thread, never waits.

        Not by paramiko's `global_request`, all of whose callers share one event.
        """
        with contextlib.suppress(EOFError, OSError), self.clear_to_send_lock:
            self._questions.append(answered)
            self._send_or_park((_KEEPALIVE,))
        if self.dead:  # it may have died before the question was noted
            answered()

    def settle(self) -> bool:
        """Ask a connection that is in doubt; False: it does not answer, and is given up. May wait; pool."""
        doubt = self.doubt
        if doubt is None:
            return True
        stands = doubt.stands()
        if stands:
            self.doubt = None
        return stands

    def try_open(self, channel: OwnChannel, make: Callable[[], bytes]) -> bool:
        """Enlist `channel` and send the packet that opens it, or return False and have changed nothing.

        Takes every lock without waiting, and needs a socket with room and no re-key under way. The
        dispatcher.
        """
        write_lock = self.packetizer.write_lock
        if self.doubt is not None or not self.clear_to_send.is_set() or not self.lock.acquire(blocking=False):
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
        payload = data.asbytes()
        if self.initial_kex_done and payload[0] >= _FIRST_USER_MESSAGE and not self.clear_to_send.is_set():
            self._park(partial(self._send_message, data), len(payload))
        else:
            self.packetizer.send_message(data)

    # --- the connection's thread

    def readable(self) -> bool:
        """See `Readable`."""
        return self._guarded(self._read) and self._behind

    def writable(self) -> None:
        """See `Readable`."""
        self.wire.push()

    def hung_up(self) -> None:
        """See `Readable`."""
        if self._held is not None:
            self._held = None
            self._go_on(EOFError("the connection was closed"))

    def _read(self) -> None:
        if self._paused:
            self._pause()  # an event that was on its way
        elif self._behind or self.wire.fill_now():
            self._deal()

    def _deal(self) -> None:
        """Deal with the packets that have come, for a turn at most; then hand on what they brought."""
        packetizer = self.packetizer
        if packetizer.need_rekey() and not self.in_kex:
            self._send_kex_init()
        channels = self._channels
        until = time.monotonic() + _TURN
        count = 0
        self._behind = False
        while not self._paused and (payload := packetizer.next_payload()) is not None:
            kind = payload[0]
            channel = None
            if MSG_CHANNEL_WINDOW_ADJUST <= kind <= MSG_CHANNEL_FAILURE and not self._expected_packet:
                channel = channels.get(int.from_bytes(payload[1:5], "big")) if len(payload) > 4 else None
            if channel is not None:
                channel.packet(kind, payload)
            else:
                self._dispatch(payload)
            count += 1
            if count >= _LOOK:
                count = 0
                if time.monotonic() >= until:
                    self._behind = True
                    break
        self.wire.dry()

    # --- new keys, while the reader carries the connection

    def _compute(self, step: Callable[[], None]) -> None:
        if self._reader is None:
            step()
        else:
            self._pause()
            rekey.compute(partial(self._compute_elsewhere, step))

    def _compute_elsewhere(self, step: Callable[[], None]) -> None:
        failure: Exception | None = None
        try:
            step()
        except Exception as error:  # noqa: BLE001 (it ends the connection, in its own thread)
            failure = error
        reader = self._reader
        if reader is not None:
            reader.call(partial(self._go_on, failure))

    def _on_kexinit(self, payload: bytes) -> None:
        if self._reader is not None and self.local_kex_init is None:
            early = self._keys_at + _REKEY_SECONDS - time.monotonic()
            # The request itself earns nothing.
            earned = (self.packetizer.moved - len(payload)) // _REKEY_BYTES + (2 if early <= 0 else 0)
            self._rekeys_ahead = min(self._rekeys_ahead + max(0, earned), _REKEYS_AHEAD)
            if not self._rekeys_ahead:
                self._hold(payload, early)
                return
            self._rekeys_ahead -= 1
        super()._on_kexinit(payload)

    def _hold(self, payload: bytes, seconds: float) -> None:
        """Read no more until the node may have new keys. Nothing is lost, and what we send still goes."""
        self.object_to("asking for new keys %.3g s too early: it is read again then", seconds)
        self._pause()
        self._held = payload
        reader = self._reader
        assert reader is not None
        watcher().at(time.monotonic() + seconds, lambda: reader.call(self._stop_holding))

    def _stop_holding(self) -> None:
        held, self._held = self._held, None
        if held is not None and not self.dead:
            self._paused = False
            self._guarded(partial(super()._on_kexinit, held))
            if not self._paused:
                self._go_on(None)

    def _pause(self) -> None:
        self._paused = True
        if self._reader is not None:
            self._reader.pause(self._fd)

    def _go_on(self, failure: Exception | None) -> None:
        """Read on after a pause; the connection's thread."""
        reader = self._reader
        if self.dead or reader is None:
            return
        self._paused = False
        if self._guarded(partial(self._deal_after, failure)) and not self._paused:
            reader.resume(self._fd, self, behind=self._behind)
            self.wire.rearm()

    def _deal_after(self, failure: Exception | None) -> None:
        if failure is not None:
            raise failure
        self._deal()

    def _guarded(self, step: Callable[[], None]) -> bool:
        """Carry out a step; whatever it raises ends the connection. Returns whether it lives."""
        try:
            step()
        except Exception as error:  # noqa: BLE001 (a node can make anything in here fail; it is told by `lost`)
            self.saved_exception = error
            if not isinstance(error, (EOFError, OSError)):
                self._log(logging.DEBUG, f"connection ended by {error!r}")
            self._die()
        return not self.dead

    def _on_channel(self, payload: bytes) -> None:
        """A message for a channel, from WINDOW_ADJUST to FAILURE."""
        number = Fields(payload, "a message for a session").u32()
        channel = self._channels.get(number)
        if channel is not None:
            channel.packet(payload[0], payload)
        elif number >= self._channel_counter:
            raise SSHException(f"the node sent a message for session {number}, which there never was")
        else:
            self.object_to("a message for session %d, which is over", number)

    def _die(self) -> None:
        with self.lock:
            if self.dead:
                return
            self.dead = True
            self.active = False
        if self.on_dead is not None:
            self.on_dead()
        for channel in self._channels.values():
            try:
                channel.lost()
            except Exception:  # one job's defect must not keep the others from hearing of their end
                _logger.exception("a session could not be told that its connection is lost")
        while self._questions:
            self._questions.popleft()()
        try:
            self.wire.dry()
        finally:
            self._parked.clear()
            if self._reader is not None:
                self._reader.remove(self._fd)
            self.wire.close()
            self._untie()
            self.over = True

    def _untie(self) -> None:
        """Let go of what leads back here, so that a lost connection is freed at once and not by a later collection."""
        self._handler_table: dict[int, Any] = {}
        self._handlers.clear()
        self._channels.clear()
        self._reader = self.doubt = self.kex_engine = None
        self.on_dead = None
        if self.saved_exception is not None:
            self.saved_exception.__traceback__ = None

    def _on_newkeys(self, payload: bytes) -> None:
        super()._on_newkeys(payload)
        self._keys_at = time.monotonic()
        # Nothing is parked any more: the flag was set under the lock.
        self._parked_bytes = 0
        while self._parked:
            self._parked.popleft()()

    def _on_answer(self, _: bytes) -> None:
        if self._questions:
            self._questions.popleft()()
        else:
            self.object_to("an answer to no question")

    def _on_global_request(self, payload: bytes) -> None:
        """Say no (RFC 4254 4): there is none that a client has to know."""
        fields = Fields(payload, "a request")
        fields.skip_string()
        if fields.boolean():
            self._send_message(Packet(messages.NO_TO_REQUEST))

    def _on_open(self, payload: bytes) -> None:
        """Say no to a channel that the node wants to open: nothing is forwarded here."""
        fields = Fields(payload, "an opening of a channel")
        fields.skip_string()
        number = fields.u32()
        fields.skip(8)  # its window, its largest packet
        self.object_to("the opening of a channel to us")
        self._send_message(Packet(messages.no_channel(number)))

    def _on_opened(self, payload: bytes) -> None:
        fields = Fields(payload, "a confirmation of a session")
        number, remote, window, size = fields.u32(), fields.u32(), fields.u32(), fields.u32()
        channel = self._channels.get(number)
        if channel is not None:
            self.when_clear(partial(channel.confirmed, remote, window, size))
        else:
            self._on_channel(payload)

    def _on_open_failed(self, payload: bytes) -> None:
        fields = Fields(payload, "a refusal of a session")
        number, code, text = fields.u32(), fields.u32(), fields.string()
        fields.skip_string()  # its language
        channel = self._channels.get(number)
        if channel is not None:
            self.when_clear(partial(channel.refused, code, text[:200]))
        else:
            self._on_channel(payload)

    def abandon(self) -> None:
        """End the connection here and now; the thread that connects, which has not handed it over."""
        self._die()

    def give_up(self, why: Exception) -> None:
        """End the connection as one that is lost, and for this reason; any thread, never waits."""
        self.verdict = why
        self.wire.shut()

    def close(self) -> None:
        """End the connection; any thread, never waits."""
        self.closed_here = True
        self.wire.shut()


class _Channels(dict[int, OwnChannel]):
    """Number -> channel, as paramiko's weak map has it; each operation is one of a dict's own."""

    def put(self, chanid: int, channel: OwnChannel) -> None:
        """Add one."""
        self[chanid] = channel

    def delete(self, chanid: int) -> None:
        """Remove one, if it is there."""
        self.pop(chanid, None)

    def values(self) -> list[OwnChannel]:  # type: ignore[override]  # a copy: the map changes while it is looped over
        """Return the channels."""
        return list(super().values())
