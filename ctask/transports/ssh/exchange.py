# SPDX-License-Identifier: Apache-2.0
"""paramiko's `Transport` without its thread: algorithms, key exchange, login, one packet at a time.

paramiko's is a thread that waits for packets; an `Exchange` is handed them, by whoever reads the connection: first the
thread that connects, later the reader. All of it runs there; there is no state that another thread writes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import paramiko
from paramiko.common import (
    MSG_CHANNEL_FAILURE,
    MSG_CHANNEL_WINDOW_ADJUST,
    MSG_DEBUG,
    MSG_DISCONNECT,
    MSG_IGNORE,
    MSG_KEXINIT,
    MSG_UNIMPLEMENTED,
)
from paramiko.message import Message
from paramiko.ssh_exception import IncompatiblePeer, MessageOrderError, SSHException

from ctask.transports.ssh.mapping import HostKeyChanged, NoCommonAlgorithm, quoted, says_forced_command
from ctask.transports.ssh.packets import Packet, WirePacketizer, differences
from ctask.transports.ssh.wire import Wire

__all__ = ["Exchange"]

_logger = logging.getLogger("ctask.ssh")

#: RFC 4250 4.1.2: their meaning depends on the method of key exchange.
_OF_KEY_EXCHANGE = range(30, 42)
#: Messages to debuggers that are looked at; sshd sends about two for each key.
_DEBUGS = 64


class Exchange(paramiko.Transport):  # type: ignore[misc]  # paramiko has no types
    """The protocol below channels (RFC 4253 and 4252), as a client. Never started as a thread.

    Attributes:
        farewell: (code, text) of the server's DISCONNECT; (0, "") where it sent none.
        forced_command: the server said that it runs one command for this login, whatever is asked for.
    """

    _expected_packet: tuple[int, ...]
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

    def __init__(self, wire: Wire, version: str, key_types: tuple[str, ...]) -> None:
        super().__init__(wire, packetizer_class=WirePacketizer)
        self.wire = wire
        self.farewell = (0, "")
        self.forced_command = False
        self._debugs = 0
        self.remote_version = version  # read and judged already: a server that says nothing costs nothing of this
        self.packetizer.set_log(None)
        self._preferred_keys = key_types

    @property
    def preferred_keys(self) -> tuple[str, ...]:
        """Host key algorithms. Without paramiko's certificates: it accepts them unchecked."""
        return self._preferred_keys

    def _greet(self) -> None:
        self.packetizer.write_all(f"{self.local_version}\r\n".encode())
        self._send_kex_init()
        self._expect_packet(MSG_KEXINIT)

    def _drive(self, done: Callable[[], bool]) -> None:
        while not done():
            payload = self.packetizer.next_payload()
            if payload is not None:
                self._dispatch(payload)
            else:
                self.wire.fill()

    def _dispatch(self, payload: bytes) -> None:
        """Deal with one packet as paramiko's own loop does, in its order.

        Raises:
            EOFError: the server has said goodbye.
            SSHException: a packet that may not come now.
        """
        kind = payload[0]
        if kind in (MSG_IGNORE, MSG_DEBUG):
            self._enforce_strict_kex(kind)
            if kind == MSG_DEBUG:
                self._parse_debug(self._message(payload))
            return
        if kind == MSG_DISCONNECT:
            self._parse_disconnect(self._message(payload))
            raise EOFError("the node disconnected")
        if self._expected_packet:
            if kind not in self._expected_packet:
                wrong = MessageOrderError if self.agreed_on_strict_kex else SSHException
                raise wrong(f"packet {kind} came where {self._expected_packet} was due")
            self._expected_packet = ()
            if kind in _OF_KEY_EXCHANGE:
                self.kex_engine.parse_next(kind, self._message(payload))
                return
        if kind in self._handler_table:
            self._handler_table[kind](self._message(payload))
        elif MSG_CHANNEL_WINDOW_ADJUST <= kind <= MSG_CHANNEL_FAILURE:
            self._to_channel(kind, payload)
        elif self.auth_handler is not None and kind in self.auth_handler._handler_table:
            self.auth_handler._handler_table[kind](self._message(payload))
        elif kind != MSG_UNIMPLEMENTED:
            self._send_message(Packet(bytes((MSG_UNIMPLEMENTED,)) + self.packetizer.sequence.to_bytes(4, "big")))

    def _message(self, payload: bytes) -> Message:
        message = Message(payload[1:])
        message.seqno = self.packetizer.sequence
        return message

    def _to_channel(self, kind: int, payload: bytes) -> None:
        """A message for a channel, from WINDOW_ADJUST to FAILURE."""
        raise NotImplementedError

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
        if not self.initial_kex_done:  # a re-key is to show the same key, so it is to use the same algorithm
            self._preferred_keys = (self.host_key_type,)
        super()._parse_newkeys(m)

    def _parse_debug(self, m: Message) -> None:
        """See whether a forced command is told; else it is not read (paramiko would decode and format it)."""
        if self._debugs < _DEBUGS and not self.forced_command:
            self._debugs += 1
            m.get_boolean()
            self.forced_command = says_forced_command(m.get_string())

    def _parse_disconnect(self, m: Message) -> None:
        code = m.get_int()
        self.farewell = (code, m.get_string()[:200].decode("utf-8", "replace").strip())

    def _log(self, _: int, msg: Any, *args: Any) -> None:
        # Never above DEBUG: what ends a connection is told by errors, once, and not by tracebacks on stderr.
        if _logger.isEnabledFor(logging.DEBUG):
            for text in msg if isinstance(msg, list) else [str(msg) % args if args else str(msg)]:
                _logger.debug("%s: %s", self.name, quoted(text, 200))
