# SPDX-License-Identifier: Apache-2.0
"""paramiko's `Transport` without its thread and its readers: algorithms, key exchange, login, one packet at a time.

paramiko's is a thread that waits for packets; an `Exchange` is handed them by the thread that reads the connection:
first the thread that connects, later the reader. All of it runs there, but for what `_compute` is given; there is no
state that another thread writes. `Fields` reads every message, and each message is taken in its phase only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

import paramiko
from paramiko.common import (
    MSG_CHANNEL_FAILURE,
    MSG_CHANNEL_OPEN,
    MSG_DEBUG,
    MSG_DISCONNECT,
    MSG_EXT_INFO,
    MSG_GLOBAL_REQUEST,
    MSG_IGNORE,
    MSG_KEXINIT,
    MSG_NEWKEYS,
    MSG_REQUEST_FAILURE,
    MSG_REQUEST_SUCCESS,
    MSG_SERVICE_ACCEPT,
    MSG_UNIMPLEMENTED,
    MSG_USERAUTH_BANNER,
    MSG_USERAUTH_FAILURE,
    MSG_USERAUTH_SUCCESS,
)
from paramiko.ssh_exception import MessageOrderError, SSHException

from ctask.options import GROUP_EXCHANGE
from ctask.transports.ssh import keyexchange, messages
from ctask.transports.ssh.fields import Fields, Malformed
from ctask.transports.ssh.mapping import HostKeyChanged, NoCommonAlgorithm, TooMuch, quoted, says_forced_command
from ctask.transports.ssh.packets import Packet, WirePacketizer, differences
from ctask.transports.ssh.wire import Wire

__all__ = ["ALLOWED", "HELLO", "Exchange", "Login"]

_logger = logging.getLogger("ctask.ssh")

#: The client's version line. The dial sends it as soon as the connection stands: some servers, and what stands before
#: some, wait for it; and where the queue of a server is full the kernel forgets a client that says nothing.
HELLO = f"SSH-2.0-paramiko_{paramiko.__version__}\r\n".encode()

#: RFC 4250 4.1.2: their meaning depends on the method of key exchange.
_OF_KEY_EXCHANGE = range(30, 50)
#: Messages that go with every phase; in a strict first key exchange DISCONNECT alone.
_ANYWHERE = (MSG_DISCONNECT, MSG_IGNORE, MSG_UNIMPLEMENTED, MSG_DEBUG)
#: phase → what the node may send in it, beside `_ANYWHERE` and what a key exchange under way expects. Until the first
#: keys there is nothing else; `service` lasts until the node offers the login, `login` until it lets us in.
ALLOWED: dict[str, frozenset[int]] = {
    "keys": frozenset(),
    "service": frozenset({MSG_KEXINIT, MSG_EXT_INFO, MSG_SERVICE_ACCEPT}),
    "login": frozenset(
        {MSG_KEXINIT, MSG_EXT_INFO, MSG_USERAUTH_FAILURE, MSG_USERAUTH_SUCCESS, MSG_USERAUTH_BANNER}
    ),
    # EXT_INFO is not read any more: RFC 8308 2.4 allows none, and some servers repeat theirs with each new keys.
    "open": frozenset(
        {MSG_KEXINIT, MSG_EXT_INFO, MSG_GLOBAL_REQUEST, MSG_REQUEST_SUCCESS, MSG_REQUEST_FAILURE}
        | set(range(MSG_CHANNEL_OPEN, MSG_CHANNEL_FAILURE + 1))
    ),
}
#: Numbers that have a meaning, so that they break the protocol elsewhere. RFC 4253 11.4 has an answer to the others.
_KNOWN = frozenset((*range(1, 9), *range(20, 22), *_OF_KEY_EXCHANGE, *range(50, 80), *range(80, 83), *range(90, 101)))
#: What the phases are called where something is out of its own.
_PHASES = {
    "keys": "before the first keys",
    "service": "before the login",
    "login": "in the login",
    "open": "after the login",
}
#: Messages to debuggers that are looked at; sshd sends about two for each key.
_DEBUGS = 64
#: Breaches of the protocol that are logged of one connection.
_OBJECTIONS = 20
#: New keys that a node may ask for before the login is done; OpenSSH's does not.
_EARLY_KEYS = 2
#: Bytes of the lists of algorithms; OpenSSH's have about 1,500.
_LONGEST_LISTS = 32_768
#: Extensions that are looked at (RFC 8308); there are about five.
_EXTENSIONS = 64
#: the lists of a KEXINIT in their order, by the names that `differences` knows
_LISTS = (
    "kex_algo_list",
    "server_key_algo_list",
    "client_encrypt_algo_list",
    "server_encrypt_algo_list",
    "client_mac_algo_list",
    "server_mac_algo_list",
    "client_compress_algo_list",
    "server_compress_algo_list",
)


class Login(Protocol):
    """What takes the messages of a login, from SERVICE_ACCEPT to USERAUTH_BANNER."""

    def packet(self, kind: int, fields: Fields) -> None:
        """Deal with one."""


class Exchange(paramiko.Transport):  # type: ignore[misc]  # paramiko has no types
    """The protocol below channels (RFC 4253 and 4252), as a client. Never started as a thread.

    Attributes:
        phase: which messages the node may send now; a key of `ALLOWED`.
        login: takes the messages of the login; None before and after it.
        farewell: (code, text) of the server's DISCONNECT; (0, "") where it sent none.
        forced_command: the server said that it runs one command for this login, whatever is asked for.
    """

    _expected_packet: tuple[int, ...]
    host_key: paramiko.PKey | None
    host_key_type: str
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

    def __init__(
        self, wire: Wire, version: str, key_types: tuple[str, ...], kex_algorithms: tuple[str, ...]
    ) -> None:
        super().__init__(wire, packetizer_class=WirePacketizer)
        self.wire = wire
        self.phase = "keys"
        self.login: Login | None = None
        self.farewell = (0, "")
        self.forced_command = False
        self._debugs = self._objections = self._early_keys = 0
        self.local_version = HELLO.decode().rstrip()
        self.remote_version = version  # read and judged already: a server that says nothing costs nothing of this
        self.packetizer.set_log(None)
        self._preferred_keys = key_types
        # What OpenSSL cannot compute here is left out.
        self._preferred_kex = tuple(name for name in kex_algorithms if name in keyexchange.METHODS)
        self._handlers: dict[int, Callable[[bytes], None]] = {
            MSG_KEXINIT: self._on_kexinit,
            MSG_NEWKEYS: self._on_newkeys,
            MSG_EXT_INFO: self._on_extensions,
            MSG_SERVICE_ACCEPT: self._on_login,
            MSG_USERAUTH_FAILURE: self._on_login,
            MSG_USERAUTH_SUCCESS: self._on_login,
            MSG_USERAUTH_BANNER: self._on_login,
        }

    @property
    def preferred_keys(self) -> tuple[str, ...]:
        """Host key algorithms. Without paramiko's certificates: it accepts them unchecked."""
        return self._preferred_keys

    def _greet(self) -> None:
        # Our version line is sent already: see HELLO.
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
        """Deal with one packet.

        Raises:
            EOFError: the server has said goodbye.
            SSHException: a packet that may not come now, or one that cannot be read.
        """
        kind = payload[0]
        if kind in _ANYWHERE:
            self._on_anywhere(kind, payload)
            return
        if self._expected_packet:
            if kind not in self._expected_packet:
                raise self._out_of_place(kind, "in the middle of a key exchange")
            self._expected_packet = ()
            if kind in _OF_KEY_EXCHANGE:
                self._compute(lambda: self._on_key_exchange(kind, payload))
                return
        elif kind not in ALLOWED[self.phase]:
            if kind in _KNOWN:
                raise self._out_of_place(kind, _PHASES[self.phase])
            self.object_to("message %d, which has no meaning", kind)
            self._send_message(Packet(messages.unimplemented(self.packetizer.sequence)))
            return
        self._handlers[kind](payload)

    def _out_of_place(self, kind: int, where: str) -> SSHException:
        wrong = MessageOrderError if self._is_strict() else SSHException
        return wrong(f"the node sent message {kind}, which may not come {where}")

    def _is_strict(self) -> bool:
        """Whether nothing but the key exchange may come: CVE-2023-48795."""
        return bool(self.agreed_on_strict_kex and not self.initial_kex_done)

    def object_to(self, what: str, *values: object) -> None:
        """Leave a debug line of something that is against the protocol, and is ignored."""
        if self._objections < _OBJECTIONS:
            self._objections += 1
            more = "; further ones are not logged" if self._objections == _OBJECTIONS else ""
            self._log(logging.DEBUG, f"ignored from the node: {what % values}{more}")

    def _on_anywhere(self, kind: int, payload: bytes) -> None:
        if kind == MSG_DISCONNECT:
            self._on_disconnect(payload)
            raise EOFError("the node disconnected")
        if self._is_strict():
            raise self._out_of_place(kind, "in the middle of a strict key exchange")
        if kind == MSG_DEBUG:
            self._on_debug(payload)
        elif kind == MSG_UNIMPLEMENTED:
            self.object_to("it does not know a message that was sent")

    def _on_debug(self, payload: bytes) -> None:
        """See whether a forced command is told; the rest is for people who debug their server."""
        if self._debugs < _DEBUGS and not self.forced_command:
            self._debugs += 1
            fields = Fields(payload, "a DEBUG message")
            fields.boolean()
            self.forced_command = says_forced_command(fields.string())

    def _on_disconnect(self, payload: bytes) -> None:
        fields = Fields(payload, "a DISCONNECT")
        try:
            self.farewell = (fields.u32(), fields.string()[:200].decode("utf-8", "replace").strip())
        except Malformed as error:  # it ends the connection, whatever else it says
            self.object_to("%s", error)

    # --- keys

    def _send_kex_init(self) -> None:
        super()._send_kex_init()
        if not self.initial_kex_done:
            self.wire.uncork()

    def _compute(self, step: Callable[[], None]) -> None:
        """Carry out a step of a key exchange, which costs; where the reader reads, in another thread."""
        step()

    def _on_kexinit(self, payload: bytes) -> None:
        if self.phase in ("service", "login"):
            self._early_keys += 1
            if self._early_keys > _EARLY_KEYS:
                raise TooMuch("the node asked for new keys again and again before the login was done")
        self._compute(lambda: self._negotiate(payload))

    def _negotiate(self, payload: bytes) -> None:
        with self.clear_to_send_lock:
            self.clear_to_send.clear()
        if self.local_kex_init is None:
            self._send_kex_init()  # the node asks for new keys
        self._agree(payload)
        self.kex_engine.start_kex()

    def _agree(self, payload: bytes) -> None:
        """Choose the algorithms (RFC 4253 7.1): of each kind our first that the node has, too."""
        if len(payload) > _LONGEST_LISTS:
            raise TooMuch(f"lists of algorithms of {len(payload)} bytes")
        theirs, self.remote_kex_init = _lists(payload)
        offered = theirs["kex_algo_list"]
        if not self.initial_kex_done:
            self.agreed_on_strict_kex = "kex-strict-s-v00@openssh.com" in offered
            if self.agreed_on_strict_kex and self.packetizer.sequence != 0:
                raise MessageOrderError("the node sent a message before the key exchange, which is a strict one")
        ours, _ = _lists(self._latest_kex_init)
        chosen = {kind: _first_common(ours[kind], theirs[kind]) for kind in _LISTS}
        for direction in ("client", "server"):
            if (chosen[f"{direction}_encrypt_algo_list"] or "").endswith("-gcm@openssh.com"):
                # AES-GCM authenticates by itself: which MACs the node has says nothing, as for OpenSSH.
                chosen[f"{direction}_mac_algo_list"] = self._preferred_macs[0]
        agreed = [name for name in chosen.values() if name is not None]
        if len(agreed) < len(chosen):
            lacking = {kind: theirs[kind] if name is None else ours[kind] for kind, name in chosen.items()}
            advice = ""
            if chosen["kex_algo_list"] is None and GROUP_EXCHANGE in theirs["kex_algo_list"]:
                advice = f". An old node? Allow it: kex_algorithms='+{GROUP_EXCHANGE}'"
            raise NoCommonAlgorithm(differences(ours, lacking) + advice)
        method, self.host_key_type, self.local_cipher, self.remote_cipher, *rest = agreed
        self.local_mac, self.remote_mac, self.local_compression, self.remote_compression = rest
        self.kex_engine = keyexchange.METHODS[method](self)
        self._log(logging.DEBUG, "keys: " + ", ".join(agreed))

    def _on_key_exchange(self, kind: int, payload: bytes) -> None:
        try:
            self.kex_engine.parse_next(kind, Fields(payload, "a message of the key exchange"))
        except (SSHException, EOFError, OSError):
            raise
        except Exception as error:  # what cryptography says of numbers that are none, each in its own way
            raise SSHException("the node's part of the key exchange cannot be") from error

    def _verify_key(self, host_key: bytes, sig: bytes) -> None:
        key = keyexchange.verified_key(self.host_key_type, host_key, sig, self.H)
        if self.host_key is not None and self.host_key.asbytes() != key.asbytes():
            raise HostKeyChanged("the host key changed in the middle of the connection")
        self.host_key = key

    def proven_key(self) -> bytes:
        """Return the host key with which the node signed the key exchange."""
        assert self.host_key is not None
        key: bytes = self.host_key.asbytes()
        return key

    def _on_newkeys(self, payload: bytes) -> None:
        if not self.initial_kex_done:  # a re-key is to show the same key, so it is to use the same algorithm
            self._preferred_keys = (self.host_key_type,)
            self.phase = "service"
        super()._parse_newkeys(None)

    # --- extensions and the login

    def _on_extensions(self, payload: bytes) -> None:
        if self.phase == "open":
            self.object_to("extensions after the login")
            return
        fields = Fields(payload, "a list of extensions")
        count = fields.u32()
        if count > _EXTENSIONS:
            raise TooMuch(f"the node sent a list of {count} extensions")
        self.server_extensions = {fields.string().decode("ascii", "replace"): fields.string() for _ in range(count)}

    def _on_login(self, payload: bytes) -> None:
        if self.login is None:
            raise self._out_of_place(payload[0], "before it was asked for")
        self.login.packet(payload[0], Fields(payload, "an answer to the login"))

    def _log(self, _: int, msg: Any, *args: Any) -> None:
        # Never above DEBUG: what ends a connection is told by errors, once, and not by tracebacks on stderr.
        if _logger.isEnabledFor(logging.DEBUG):
            for text in msg if isinstance(msg, list) else [str(msg) % args if args else str(msg)]:
                try:
                    _logger.debug("%s: %s", self.name, quoted(text, 200))
                except Exception:  # noqa: BLE001, S110 (a program's log handler is none of the node's affairs)
                    pass


def _first_common(ours: tuple[str, ...], theirs: tuple[str, ...]) -> str | None:
    there = set(theirs)
    return next((name for name in ours if name in there), None)


def _lists(payload: bytes) -> tuple[dict[str, tuple[str, ...]], bytes]:
    """Return the lists of a KEXINIT, and of the message what both sides hash."""
    fields = Fields(payload, "a list of algorithms")
    fields.skip(16)  # the cookie
    lists = {kind: fields.names() for kind in _LISTS}
    fields.skip_string()  # languages
    fields.skip_string()
    fields.boolean()  # a server's guess: it never begins, in none of our methods
    fields.u32()
    # Servers are known that send a byte more, which is not hashed.
    return lists, fields.so_far()
