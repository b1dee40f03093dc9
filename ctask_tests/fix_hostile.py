# SPDX-License-Identifier: Apache-2.0
"""SSH servers that misbehave by a script, in this process: from the key exchange to the end of a command.

Each server has one thread that accepts; each connection has paramiko's thread, and one more for every command
whose steps are being played. What a server saw is appended to lists by those threads and read by the test.
Closing joins all of them. The scripts' words are in `hostile_script.py`, and are to be had from here.
"""

from __future__ import annotations

import contextlib
import io
import socket
import struct
import threading
from typing import TYPE_CHECKING, Any, Protocol

import paramiko
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from paramiko import common

from ctask_tests.fix_banner import PATIENCE, Listener, join_threads
from ctask_tests.fix_sshd import SshdOptions, write_known_hosts
from ctask_tests.hostile_script import (
    Await,
    Close,
    Eof,
    Err,
    HangUp,
    OpenToClient,
    Out,
    Pause,
    Raw,
    Reply,
    Script,
    Seen,
    Signal,
    Status,
    Step,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

__all__ = [
    "Await",
    "Close",
    "Eof",
    "Err",
    "HangUp",
    "HostileFactory",
    "HostileServer",
    "OpenToClient",
    "Out",
    "Pause",
    "Raw",
    "Script",
    "Seen",
    "Signal",
    "Status",
    "Step",
]

#: SO_LINGER on, 0 seconds: close() sends a reset.
RESET = struct.pack("ii", 1, 0)


class HostileFactory(Protocol):
    """Start a hostile server for this test: `hostile(script, …)`, its arguments those of `HostileServer`."""

    def __call__(self, *scripts: Script) -> HostileServer: ...


class HostileServer(Listener):
    """An SSH server that follows a script, and keeps what it saw.

    It has a fresh host key, and accepts one fresh key (`identity`) for any user. `known_hosts` is a file that
    knows it; both are written to `folder`. The n-th connection goes by the n-th script, later ones by
    the last.

    Thread safety: `close` is for the thread that made it; `seen` may be read at any time.
    """

    def __init__(self, folder: Path, *scripts: Script) -> None:
        self.scripts = scripts or (Script(),)
        self.seen = Seen()
        self.host_key, _ = _make_key()
        self.user_key, pem = _make_key()
        self._transports: list[_HostileTransport] = []
        super().__init__("hostile")
        self.host_key_line = f"{self.host_key.get_name()} {self.host_key.get_base64()}"
        self.known_hosts = write_known_hosts(
            folder / f"known_hosts-{self.port}", [self.endpoint], [self.host_key_line]
        )
        key_file = folder / f"id-{self.port}"
        key_file.touch(mode=0o600)
        key_file.write_text(pem)
        self.identity = str(key_file)

    def options(self) -> SshdOptions:
        """The options by which ctask reaches this server."""
        return SshdOptions(
            user="anyone", port=self.port, identity=self.identity, known_hosts=self.known_hosts
        )

    def serve(self, sock: socket.socket, number: int) -> None:
        transport = _HostileTransport(sock, self, self.scripts[min(number, len(self.scripts) - 1)])
        transport.name = f"{self.name}/{number}"
        self._transports.append(transport)
        transport.start_server(event=threading.Event(), server=transport.interface)

    def _end_connections(self) -> None:
        for transport in self._transports:
            transport.close()
        for transport in self._transports:
            join_threads([transport, *transport.players])


class _QuietPacketizer(paramiko.Packetizer):  # type: ignore[misc]  # paramiko has no types
    """Without the timer of the handshake, whose thread would outlive the connection by 15 s."""

    def start_handshake(self, timeout: float) -> None:
        pass


class _Interface(paramiko.ServerInterface):  # type: ignore[misc]  # paramiko has no types
    """The answers to logins and channel-opens; runs in the connection's thread."""

    def __init__(self, transport: _HostileTransport) -> None:
        self._transport = transport

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_auth_none(self, username: str) -> int:
        self._transport.server.seen.auths.append(("none", username, ""))
        self._transport.make_noise()
        return int(common.AUTH_FAILED)

    def check_auth_password(self, username: str, password: str) -> int:
        self._transport.server.seen.auths.append(("password", username, ""))
        self._transport.make_noise()
        return int(common.AUTH_FAILED)

    def check_auth_publickey(self, username: str, key: Any) -> int:
        transport = self._transport
        transport.server.seen.auths.append(("publickey", username, key.fingerprint))
        transport.make_noise()
        if not transport.agrees(transport.script.on_auth) or key != transport.server.user_key:
            return int(common.AUTH_FAILED)
        return int(common.AUTH_SUCCESSFUL)

    def check_channel_request(self, kind: str, chanid: int) -> int:
        answer = self._transport.script.on_open
        if self._transport.opens_honestly():
            self._transport.honest.add(chanid)
            return int(common.OPEN_SUCCEEDED)
        if isinstance(answer, int):
            return answer
        if not self._transport.agrees(answer):
            return int(common.OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED)
        return int(common.OPEN_SUCCEEDED)

    def check_channel_pty_request(self, *_: object) -> bool:
        return True


class _HostileTransport(paramiko.Transport):  # type: ignore[misc]  # paramiko has no types
    """One connection, going by its script."""

    _channel_handler_table = {  # noqa: RUF012 - paramiko's form
        **paramiko.Transport._channel_handler_table,
        common.MSG_CHANNEL_REQUEST: lambda channel, message: channel.transport._on_request(channel, message),
    }

    def __init__(self, sock: socket.socket, server: HostileServer, script: Script) -> None:
        # A reset throws away what the kernel still holds, as it would small segments that are not acknowledged.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().__init__(sock, packetizer_class=_QuietPacketizer)
        self.server = server
        self.script = script
        self.interface = _Interface(self)
        self.players: list[threading.Thread] = []
        self._noise = script.noise
        self._sent: set[str] = set()
        self._rekeys = script.rekeys
        self._opened = 0
        self.honest: set[int] = set()  # the numbers of the channels that go well
        self.add_server_key(server.host_key)
        self._handler_table.update(
            {common.MSG_KEXINIT: self._on_kexinit, common.MSG_CHANNEL_OPEN: self._on_open}
        )

    def _log(self, level: int, msg: object, *args: object) -> None:
        """Say nothing: what happens here is meant to happen."""

    def make_noise(self) -> None:
        """Send the script's noise, once."""
        count, self._noise = self._noise, 0
        self._send_noise(count)
        self.send_raw("login")

    def send_raw(self, moment: str) -> None:
        """Send the script's messages of this moment, once."""
        for raw in [raw for when, raw in self.script.raw if when == moment and moment not in self._sent]:
            self.play_raw(raw)
        self._sent.add(moment)

    def play_raw(self, raw: Raw) -> None:
        """Send one message as often as it says."""
        message = paramiko.Message(raw.payload)
        for _ in range(raw.count):
            if self.server.stopping.is_set():
                return
            self._send_message(message)

    def agrees(self, reply: Reply) -> bool:
        """Act on a reply; runs in the connection's thread, which ends by an EOFError."""
        if reply == "silent":
            self.server.stopping.wait()
        if reply in {"silent", "hang_up"}:
            self.hang_up(reset=False)
            raise EOFError("by the script")
        return reply == "accept"

    def opens_honestly(self) -> bool:
        """Whether the channel that is being opened is one of the first, which go well."""
        return self._opened <= self.script.honest

    def hang_up(self, *, reset: bool) -> None:
        """End the connection."""
        if reset:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            self.close()
        else:
            # Only our half: what was sent is delivered, then the end. What the client still says is read, for
            # unread it would be answered by a reset, which can overtake the client's reading.
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_WR)

    def _send_noise(self, count: int) -> None:
        for number in range(count):
            message = paramiko.Message()
            if number % 2:
                message.add_byte(common.cMSG_IGNORE)
                message.add_string("x")
            else:
                message.add_byte(common.cMSG_DEBUG)
                message.add_boolean(False)
                message.add_string("x")
                message.add_string("")
            self._send_message(message)

    def _on_kexinit(self, message: Any) -> None:
        if self._rekeys < 0 and self.initial_kex_done:
            return
        self._send_noise(self.script.noise_in_kex)
        self.send_raw("keys")
        self._negotiate_keys(message)

    def _parse_newkeys(self, m: Any) -> None:
        super()._parse_newkeys(m)
        self.server.seen.keys += 1
        self.send_raw("service")
        if self.server.seen.commands:
            self._ask_for_keys()

    def _ask_for_keys(self) -> None:
        if self._rekeys > 0:
            self._rekeys -= 1
            self._send_kex_init()

    def _on_open(self, message: Any) -> None:
        self._opened += 1
        if "open" not in self._sent:
            self.send_raw("open")
        self.server.seen.opens.append(paramiko.Message(message.get_remainder()).get_text())
        if self.script.on_open != "silent" or self.opens_honestly():
            self._parse_channel_open(message)

    def _on_request(self, channel: paramiko.Channel, message: Any) -> None:
        peek = paramiko.Message(message.get_remainder())
        name = peek.get_text()
        if name != "exec":
            self.server.seen.requests.append(name)
            channel._handle_request(message)
            return
        wants_reply = peek.get_boolean()
        self.server.seen.commands.append(peek.get_string())
        honest = channel.chanid in self.honest
        if self.script.on_exec == "silent" and not honest:
            return
        accepted = honest or self.agrees(self.script.on_exec)
        if wants_reply:
            reply = paramiko.Message()
            reply.add_byte(common.cMSG_CHANNEL_SUCCESS if accepted else common.cMSG_CHANNEL_FAILURE)
            reply.add_int(channel.remote_chanid)
            self._send_message(reply)
        if accepted:
            self._ask_for_keys()
            player = _Player(self, channel, Script().steps if honest else self.script.steps)
            self.players.append(player)
            player.start()


class _Player(threading.Thread):
    """Play the steps of one command."""

    def __init__(
        self, transport: _HostileTransport, channel: paramiko.Channel, steps: Sequence[Step]
    ) -> None:
        super().__init__(name=f"{transport.name}/player-{len(transport.players)}")
        self._transport = transport
        self._channel = channel
        self._steps = steps

    def run(self) -> None:
        # The client may hang up in the middle of any step.
        with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
            for step in self._steps:
                if self._transport.server.stopping.is_set():
                    return
                self._play(step)

    def _play(self, step: Step) -> None:  # noqa: C901 (one line for each step)
        stopping = self._transport.server.stopping
        match step:
            case Raw():
                self._transport.play_raw(step)
            case Out(data):
                self._channel.sendall(data)
            case Err(data):
                self._channel.sendall_stderr(data)
            case Eof():
                self._channel.shutdown_write()
            case Status(code):
                self._channel.send_exit_status(code)
            case Signal():
                self._send_signal(step)
            case Close():
                self._channel.close()
            case HangUp(reset):
                self._transport.hang_up(reset=reset)
            case Pause(seconds):
                stopping.wait(seconds)
            case Await(event):
                while not (event.wait(0.02) or stopping.is_set() or not self._transport.is_active()):
                    pass
            case OpenToClient(kind):
                self._open(kind)

    def _send_signal(self, signal: Signal) -> None:
        message = paramiko.Message()
        message.add_byte(common.cMSG_CHANNEL_REQUEST)
        message.add_int(self._channel.remote_chanid)
        message.add_string("exit-signal")
        message.add_boolean(False)
        message.add_string(signal.name)
        message.add_boolean(signal.core)
        message.add_string(signal.message)
        message.add_string("")
        self._transport._send_user_message(message)

    def _open(self, kind: str) -> None:
        here = ("127.0.0.1", 1)
        answer: str | int = "accepted"
        try:
            self._transport.open_channel(kind, dest_addr=here, src_addr=here, timeout=PATIENCE)
        except paramiko.ChannelException as refusal:
            answer = refusal.code
        self._transport.server.seen.answers.append((kind, answer))


@pytest.fixture
def hostile(tmp_path: Path) -> Iterator[HostileFactory]:
    """Start hostile servers, closed when the test ends."""
    with contextlib.ExitStack() as stack:
        yield lambda *scripts: stack.enter_context(HostileServer(tmp_path, *scripts))


def _make_key() -> tuple[Any, str]:
    """Make an ed25519 key: paramiko's object, and the text of its file."""
    raw = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    pem = raw.decode()
    return paramiko.Ed25519Key(file_obj=io.StringIO(pem)), pem
