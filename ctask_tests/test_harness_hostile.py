# SPDX-License-Identifier: Apache-2.0
"""The harness itself: hostile servers, as the ssh program sees them.

Runs in the thread of pytest.
"""

from __future__ import annotations

import socket
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ctask_tests.fix_banner import (
    dripped_banner,
    endless_line,
    http_answer,
    many_lines,
    nul_in_banner,
    old_version,
)
from ctask_tests.fix_hostile import (
    Await,
    Close,
    Eof,
    Err,
    HangUp,
    HostileServer,
    OpenToClient,
    Out,
    Pause,
    Script,
    Signal,
    Status,
    Step,
)
from ctask_tests.fix_leaks import wait_until
from ctask_tests.fix_sshd import Sshd, fingerprint, write_known_hosts
from ctask_tests.plain_ssh import Answer, ssh, ssh_command

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from ctask_tests.fix_banner import BannerServerFactory
    from ctask_tests.fix_hostile import HostileFactory


def test_hostile_server_can_be_honest(hostile: HostileFactory) -> None:
    server = hostile(Script(steps=(Out(b"out\n"), Err(b"err\n"), Status(3), Eof(), Close())))
    answer = ssh(server.options(), server.address, "some command")
    assert answer == Answer(3, "out\n", "err\n")
    assert server.seen.commands == [b"some command"]
    assert server.seen.auths[-1] == ("publickey", "anyone", fingerprint(public_line(server)))
    assert server.connections == 1


def public_line(server: HostileServer) -> str:
    return f"{server.user_key.get_name()} {server.user_key.get_base64()}"


def test_hostile_server_accepts_its_own_key_only(hostile: HostileFactory, sshd: Sshd) -> None:
    server = hostile()
    options = server.options()
    options["identity"] = sshd.identity
    assert "Permission denied" in ssh(options, server.address, "true").err
    assert server.seen.commands == []
    options["known_hosts"] = write_known_hosts(
        Path(server.known_hosts), [server.endpoint], sshd.host_key_lines
    )
    assert "HOST IDENTIFICATION HAS CHANGED" in ssh(options, server.address, "true").err


#: What ssh says of a connection that is gone, in its different phases.
GONE = "closed|reset|Broken pipe"

HOSTILE = {
    "login refused": (Script(on_auth="refuse"), 255, "Permission denied"),
    "hung up on in auth": (Script(on_auth="hang_up"), 255, GONE),
    "open prohibited": (Script(on_open=1), 255, "administratively prohibited"),
    "open short of resources": (Script(on_open=4), 255, "resource shortage"),
    "hung up on at open": (Script(on_open="hang_up"), 255, GONE),
    "exec refused": (Script(on_exec="refuse"), 255, "exec request failed"),
    "hung up on at exec": (Script(on_exec="hang_up"), 255, GONE),
    "hung up on before the first byte": (Script(steps=(HangUp(),)), 255, GONE),
    "reset in a line": (Script(steps=(Out(b"some"), HangUp(reset=True))), 255, GONE),
    "hung up on before the status": (Script(steps=(Out(b"some\n"), HangUp())), 255, GONE),
    "hung up on after the status": (Script(steps=(Status(4), HangUp())), 4, GONE),
    "close without a status": (Script(steps=(Out(b"some\n"), Close())), 255, ""),
    "end of output before the status": (Script(steps=(Eof(), Pause(0.05), Status(5), Close())), 5, ""),
    "killed by a signal": (Script(steps=(Signal("TERM"), Close())), 255, ""),
    "killed by no signal that we know": (Script(steps=(Signal("FOO@x", core=True), Close())), 255, ""),
    "noise": (Script(noise=10_000), 0, ""),
    "noise in the key exchange": (Script(noise_in_kex=1), 255, "strict KEX"),
}


@pytest.mark.parametrize(("script", "rc", "text"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_scripts(hostile: HostileFactory, script: Script, rc: int, text: str) -> None:
    server = hostile(script)
    answer = ssh(server.options(), server.address, "true")
    assert answer.rc == rc
    assert not text or any(word in answer.err for word in text.split("|")), answer.err


@pytest.mark.parametrize(
    "script",
    [
        Script(on_auth="silent"),
        Script(on_open="silent"),
        Script(on_exec="silent"),
        Script(steps=(Await(threading.Event()),)),
    ],
    ids=["auth", "open", "exec", "command"],
)
def test_hostile_silence_ends_with_the_server(hostile: HostileFactory, script: Script) -> None:
    server = hostile(script)
    client = subprocess.Popen(
        ssh_command(server.options(), server.address, "true"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    with client:
        seen = server.seen
        look: Callable[[], Iterable[object]] = lambda: (  # noqa: E731 - the place where the script falls silent
            [auth for auth in seen.auths if auth[0] == "publickey"]
            if script.on_auth == "silent"
            else seen.opens
            if script.on_open == "silent"
            else seen.commands
        )
        wait_until(look)
        with pytest.raises(subprocess.TimeoutExpired):
            client.wait(0.05)
        server.close()
        assert client.wait(10) == 255


def test_hostile_server_asks_the_client_for_channels(hostile: HostileFactory) -> None:
    kinds = ("x11", "forwarded-tcpip", "auth-agent@openssh.com")
    steps: tuple[Step, ...] = (*(OpenToClient(kind) for kind in kinds), Status(0), Close())
    server = hostile(Script(steps=steps))
    assert ssh(server.options(), server.address, "true").rc == 0
    assert [kind for kind, _ in server.seen.answers] == list(kinds)
    assert "accepted" not in [answer for _, answer in server.seen.answers]


def test_hostile_scripts_by_connection_and_honest_channels(hostile: HostileFactory) -> None:
    server = hostile(Script(on_open=1), Script(on_exec="refuse", honest=1))
    assert ssh(server.options(), server.address, "true").rc == 255
    assert ssh(server.options(), server.address, "true").rc == 0
    assert server.connections == 2


@pytest.mark.parametrize(
    ("game", "text"),
    [
        (http_answer(), "HTTP|banner|closed"),
        (old_version(), "protocol|version"),
        (many_lines(2000), "banner|identification|closed|reset"),
        (nul_in_banner(), "banner|identification|invalid|closed|reset"),
        (endless_line(), "banner|identification|closed|reset"),
    ],
    ids=["http", "ssh-1.5", "many lines", "nul", "endless line"],
)
def test_banner_games(
    banner_server: BannerServerFactory, sshd: Sshd, game: Callable[[], Iterator[bytes | float]], text: str
) -> None:
    server = banner_server(game)
    options = sshd.options()
    options["port"] = server.port
    client = ssh(options, server.address, "true", "ConnectTimeout=1")
    assert client.rc == 255
    assert any(word in client.err for word in text.split("|")), client.err
    assert server.connections == 1
    assert server.sent < 10 * 1024 * 1024 + 1


def test_dripped_banner(banner_server: BannerServerFactory) -> None:
    server = banner_server(dripped_banner(0.01))
    with socket.create_connection(server.endpoint, 5) as sock:
        with sock.makefile("rb") as stream:
            assert stream.read(10) == b"SSH-2.0-xx"
        sock.sendall(b"client's")
