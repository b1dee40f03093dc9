# SPDX-License-Identifier: Apache-2.0
"""Packets of one connection: paramiko's packetizer on a `Wire`, and what is used of its inside.

Reading is our own, since paramiko's waits in the middle of a packet; it runs in the thread that reads. Sending is
paramiko's, in any thread; its write lock guards the cipher.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Callable
from typing import Any

from paramiko.packet import Packetizer
from paramiko.ssh_exception import SSHException

from ctask.transports.ssh.mapping import TooMuch, quoted
from ctask.transports.ssh.wire import Wire

__all__ = ["PRIVATE", "Packet", "WirePacketizer", "differences"]

#: Every private attribute of paramiko that this room uses or overrides, and where it is in paramiko 5.1.0. A
#: test looks at each: when one moves, everything that says its name in this room has to be read again.
PRIVATE = {
    "Transport._preferred_ciphers": "transport.py:176",
    "Transport._preferred_macs": "transport.py:187",
    "Transport._preferred_keys": "transport.py:198",
    "Transport._handler_table": "transport.py:556",
    "Transport._channels": "transport.py:512",
    "Transport._channel_counter": "transport.py:515",
    "Transport._next_channel": "transport.py:1797",
    "Transport._log": "transport.py:1786",
    "Transport._send_message": "transport.py:1810",
    "Transport._send_kex_init": "transport.py:2260",
    "Transport._expect_packet": "transport.py:1848",
    "Transport._expected_packet": "transport.py:507",
    "Transport._latest_kex_init": "transport.py:2328",
    "Transport._parse_newkeys": "transport.py:2755",
    "Transport._verify_key": "transport.py:1854",
    "Transport._set_K_H": "transport.py:1839",
    "Transport._activate_outbound": "transport.py:2648",
    "Transport._key_info": "transport.py:299",
    "Transport._preferred_kex": "transport.py:215",
    "Packetizer._Packetizer__write_lock": "packet.py:125",
    "Packetizer._Packetizer__aead_out": "packet.py:119",
    "Packetizer._Packetizer__block_size_out": "packet.py:100",
    "Packetizer._Packetizer__sent_bytes": "packet.py:92",
    "Packetizer._trigger_rekey": "packet.py:694",
    "Packetizer._build_packet": "packet.py:676",
}

#: Packets before the login is done; sshd sends about ten, and a flood of them would be free for the server.
HANDSHAKE_PACKETS = 1_000
#: Bytes that are drawn for the padding of packets at a time.
RANDOM = 1024
#: OpenSSH's own limit of one packet. paramiko has none: four bytes of a stranger could ask for 4 GiB.
PACKET_LIMIT = 256 * 1024 + 64


class Packet:
    """A message that is packed already, in the form that paramiko's packetizer takes."""

    __slots__ = ("data",)

    def __init__(self, data: bytes) -> None:
        self.data = data

    def asbytes(self) -> bytes:
        """Return the payload."""
        return self.data


class WirePacketizer(Packetizer):  # type: ignore[misc]  # paramiko has no types
    """paramiko's packets, read from what a `Wire` has, bounded, and without the timer of the handshake.

    Attributes:
        sequence: number of the packet that was read last (RFC 4253 6.4).
    """

    def __init__(self, wire: Wire) -> None:
        super().__init__(wire)
        self._wire = wire
        self._allowed = HANDSHAKE_PACKETS + 1
        self.write_lock: Any = self._Packetizer__write_lock
        self._random = b""
        self._random_at = 0
        self.sequence = -1
        # Of what comes in since the last keys: how much, and how much of it since new ones were asked for.
        self._bytes = self._packets = 0
        self._late_bytes = self._late_packets = 0
        self._open: Callable[[], bytes | None] = self._open_plain
        self._engine: Any = None
        self._mac_of: Callable[[bytes], bytes] = bytes
        self._mac_size = 0
        self._block_size = 8
        # AES-GCM: what stands still of the nonce, and its counter (RFC 5647 7.1)
        self._nonce = b""
        self._count = 0
        # The first block of a packet whose length is encrypted, and that has not come whole.
        self._first = b""

    # --- reading

    def next_payload(self) -> bytes | None:
        """Return the payload of the next packet that has come whole, else None; never waits.

        Raises:
            SSHException: what came is no packet of this connection.
            InvalidTag: the same, found by AES-GCM.
        """
        plain = self._open()
        if plain is None:
            return None
        self.sequence = self.sequence + 1 & 0xFFFF_FFFF
        if self._allowed:
            self._count_handshake()
        end = len(plain) - plain[0] if plain else 0
        if end < 2:
            raise SSHException("a packet without a payload")
        payload = plain[1:end]
        self._bytes += len(plain) + 20
        self._packets += 1
        if self._bytes >= self.REKEY_BYTES or self._packets >= self.REKEY_PACKETS:
            self._rekey(len(plain))
        return payload

    @property
    def moved(self) -> int:
        """Bytes that came and went since the last keys, about."""
        return self._bytes + int(self._Packetizer__sent_bytes)

    def trust(self) -> None:
        """Count no more: what comes now, comes from a node that knows us."""
        self._allowed = 0

    def _count_handshake(self) -> None:
        self._allowed -= 1
        if not self._allowed:
            raise TooMuch(f"more than {HANDSHAKE_PACKETS} packets before the login was done")

    def _rekey(self, size: int) -> None:
        """Ask for new keys, once; a peer that does not give them for long is not listened to any more."""
        if not self.need_rekey():
            self._late_bytes = self._late_packets = 0
            self._trigger_rekey()
            return
        self._late_bytes += size
        self._late_packets += 1
        if self._late_packets >= self.REKEY_PACKETS_OVERFLOW_MAX or self._late_bytes >= self.REKEY_BYTES_OVERFLOW_MAX:
            raise SSHException("the node ignores requests for new keys")

    def _size(self, extra: int) -> int:
        """Return the length of the packet that begins at the wire's place, if all of it is there, else -1.

        Args:
            extra: bytes that follow what the length counts.
        """
        wire = self._wire
        at = wire.at
        if len(wire.ahead) - at < 4:
            return -1
        size = int.from_bytes(wire.ahead[at : at + 4], "big")
        if size > PACKET_LIMIT:
            raise TooMuch(f"a packet of {size} bytes")
        return size if at + 4 + size + extra <= len(wire.ahead) else -1

    def _open_plain(self) -> bytes | None:
        size = self._size(0)
        if size < 0:
            return None
        wire = self._wire
        at = wire.at + 4
        wire.at = at + size
        return wire.ahead[at : wire.at]

    def _open_gcm(self) -> bytes | None:
        size = self._size(16)
        if size < 0:
            return None
        wire = self._wire
        ahead, at = wire.ahead, wire.at
        wire.at = end = at + size + 20
        nonce = self._nonce + self._count.to_bytes(8, "big")
        self._count += 1
        plain: bytes = self._engine.decrypt(nonce, ahead[at + 4 : end], ahead[at : at + 4])
        return plain

    def _open_etm(self) -> bytes | None:
        size = self._size(self._mac_size)
        if size < 0:
            return None
        wire = self._wire
        at, end = wire.at, wire.at + 4 + size
        wire.at = end + self._mac_size
        packet = wire.ahead[at:end]
        self._check(packet, wire.ahead[end : wire.at])
        plain: bytes = self._engine.update(packet[4:])
        return plain

    def _open_mac(self) -> bytes | None:
        """The MAC is of what is encrypted, its length as well: the first block has to be opened to know it."""
        wire = self._wire
        if not self._first:
            if len(wire.ahead) - wire.at < self._block_size:
                return None
            end = wire.at + self._block_size
            self._first = self._engine.update(wire.ahead[wire.at : end])
            wire.at = end
        size = int.from_bytes(self._first[:4], "big")
        rest = size + 4 - len(self._first)
        if not 0 <= rest <= PACKET_LIMIT:
            raise TooMuch(f"a packet of {size} bytes")
        end = wire.at + rest
        if end + self._mac_size > len(wire.ahead):
            return None
        packet: bytes = self._first + self._engine.update(wire.ahead[wire.at : end])
        self._first = b""
        wire.at = end + self._mac_size
        self._check(packet, wire.ahead[end : wire.at])
        return packet[4:]

    def _check(self, packet: bytes, mac: bytes) -> None:
        number = (self.sequence + 1 & 0xFFFF_FFFF).to_bytes(4, "big")
        if not hmac.compare_digest(self._mac_of(number + packet)[: self._mac_size], mac):
            raise SSHException("Mismatched MAC")

    # --- what paramiko calls when keys change

    def set_inbound_cipher(
        self,
        block_engine: Any,
        block_size: int,
        mac_engine: Any,
        mac_size: int,
        mac_key: bytes,
        etm: bool = False,  # noqa: FBT002  # paramiko's own
        aead: bool = False,  # noqa: FBT002
        iv_in: bytes | None = None,
    ) -> None:
        """Take over the keys of what comes from now on."""
        super().set_inbound_cipher(block_engine, block_size, mac_engine, mac_size, mac_key, etm, aead, iv_in)
        self._engine, self._block_size, self._mac_size = block_engine, block_size, mac_size
        self._bytes = self._packets = 0
        if iv_in is not None:
            self._nonce, self._count = iv_in[:4], int.from_bytes(iv_in[4:], "big")
            self._open = self._open_gcm
        else:
            self._mac_of = lambda data: hmac.digest(mac_key, data, mac_engine)
            self._open = self._open_etm if etm else self._open_mac

    def reset_seqno_in(self) -> None:
        """Count from 0 again: strict key exchange, after NEWKEYS."""
        super().reset_seqno_in()
        self.sequence = -1

    # --- sending

    def _build_packet(self, payload: bytes) -> bytes:
        """Frame a payload (RFC 4253, 6). paramiko asks the kernel for each packet's padding, and lets go of the GIL."""
        if not self._Packetizer__aead_out:
            return super()._build_packet(payload)  # type: ignore[no-any-return]
        block: int = self._Packetizer__block_size_out
        padding = 3 + block - ((len(payload) + 4) % block)
        if self._random_at + padding > len(self._random):
            self._random, self._random_at = os.urandom(RANDOM), 0
        start, self._random_at = self._random_at, self._random_at + padding
        head = (len(payload) + padding + 1).to_bytes(4, "big") + bytes((padding,))
        packet: bytes = head + payload + self._random[start : self._random_at]
        return packet

    def start_handshake(self, timeout: float) -> None:
        """Nothing: paramiko's timer is a thread per connection; ours is the job's deadline."""

    def complete_handshake(self) -> None:
        """Nothing; called after every packet."""


#: the lists of a KEXINIT, by paramiko's names, and what a person calls them
_KINDS = {
    "kex_algo_list": "key exchange algorithm",
    "server_key_algo_list": "host key algorithm",
    "client_encrypt_algo_list": "cipher",
    "server_encrypt_algo_list": "cipher",
    "client_mac_algo_list": "MAC",
    "server_mac_algo_list": "MAC",
    "client_compress_algo_list": "compression",
    "server_compress_algo_list": "compression",
}


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Return what has nothing in common, with both lists; empty where all kinds have something."""
    for key, kind in _KINDS.items():
        mine, other = (
            [name for name in lists[key] if not name.startswith(("ext-info-", "kex-strict-"))]
            for lists in (ours, theirs)
        )
        if not set(mine) & set(other):
            offers = quoted(", ".join(other), 400)[1:-1] or "nothing"
            return f"no common {kind}: the server has {offers}; ctask has {', '.join(mine)}"
    return ""
