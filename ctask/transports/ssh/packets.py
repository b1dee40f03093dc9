# SPDX-License-Identifier: Apache-2.0
"""Packets of one connection: paramiko's packetizer on a `Wire`, bounded; and what is used of its inside.

Reading runs in the connection's thread, sending in any; paramiko's own write lock guards the cipher.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from paramiko.packet import Packetizer

from ctask.transports.ssh.mapping import TooMuch, quoted
from ctask.transports.ssh.wire import Wire

if TYPE_CHECKING:
    from paramiko.message import Message

__all__ = ["PRIVATE", "Packet", "WirePacketizer", "differences"]

#: Every private attribute of paramiko that this room uses or overrides, and where it is in paramiko 5.1.0. A
#: test looks at each: when one moves, everything that says its name in this room has to be read again.
PRIVATE = {
    "Transport._preferred_ciphers": "transport.py:176",
    "Transport._preferred_macs": "transport.py:187",
    "Transport._preferred_keys": "transport.py:198",
    "Transport._handler_table": "transport.py:556",
    "Transport._channel_handler_table": "transport.py:3023",
    "Transport._channels": "transport.py:512",
    "Transport._channel_counter": "transport.py:515",
    "Transport._next_channel": "transport.py:1797",
    "Transport._log": "transport.py:1786",
    "Transport._send_message": "transport.py:1810",
    "Transport._send_user_message": "transport.py:1813",
    "Transport._send_kex_init": "transport.py:2260",
    "Transport._check_banner": "transport.py:2217",
    "Transport._parse_kex_init": "transport.py:2356",
    "Transport._really_parse_kex_init": "transport.py:2331",
    "Transport._latest_kex_init": "transport.py:2328",
    "Transport._parse_newkeys": "transport.py:2755",
    "Transport._parse_debug": "transport.py:3008",
    "Transport._parse_disconnect": "transport.py:2783",
    "Transport._parse_channel_open_success": "transport.py:2836",
    "Transport._parse_channel_open_failure": "transport.py:2858",
    "Transport._verify_key": "transport.py:1854",
    "Packetizer._Packetizer__write_lock": "packet.py:125",
    "Packetizer._Packetizer__aead_out": "packet.py:119",
    "Packetizer._Packetizer__block_size_out": "packet.py:100",
    "Packetizer._build_packet": "packet.py:676",
    "AuthHandler._parse_userauth_failure": "auth_handler.py:537",
    "Channel._request_success": "channel.py:1023",
    "Channel._request_failed": "channel.py:1029",
    "Channel._feed": "channel.py:1039",
    "Channel._feed_extended": "channel.py:1047",
    "Channel._window_adjust": "channel.py:1060",
    "Channel._handle_request": "channel.py:1071",
    "Channel._handle_eof": "channel.py:1163",
    "Channel._handle_close": "channel.py:1176",
    "Channel._unlink": "channel.py:1262",
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
    """paramiko's packets, read from a `Wire`, bounded, and without the timer of the handshake."""

    def __init__(self, wire: Wire) -> None:
        super().__init__(wire)
        self._wire = wire
        self._allowed = HANDSHAKE_PACKETS
        self.write_lock: Any = self._Packetizer__write_lock
        self._random = b""
        self._random_at = 0
        # On the object until the login is done; afterwards packets pay nothing for it.
        self.read_message = self._read_counted

    def _read_counted(self) -> tuple[int, Message]:
        self._allowed -= 1
        if self._allowed < 0:
            raise TooMuch(f"more than {HANDSHAKE_PACKETS} packets before the login was done")
        return super().read_message()  # type: ignore[no-any-return]

    def trust(self) -> None:
        """Count no more."""
        self.__dict__.pop("read_message", None)

    def read_all(self, n: int, check_rekey: bool = False) -> bytes:  # noqa: FBT002  # paramiko's own
        """Return `n` bytes; a re-key that is due never breaks a read, it waits for the next packet."""
        if not 0 <= n <= PACKET_LIMIT:
            raise TooMuch(f"a packet of {n} bytes")
        return self._wire.read(n)

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
        return head + payload + self._random[start : self._random_at]

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
            offers = quoted(", ".join(other), 400)[1:-1]
            return f"no common {kind}: the server has {offers}; ctask has {', '.join(mine)}"
    return ""
