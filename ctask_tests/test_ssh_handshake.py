# SPDX-License-Identifier: Apache-2.0
"""From a connected socket to a login: every way in which it fails, and that it leaves nothing behind.

Runs in the thread of pytest; where a handshake is to be broken off, a second thread connects.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from ctask.errors import (
    AuthRejected,
    BannerError,
    ConnectError,
    ConnectionLost,
    HandshakeError,
    HostKeyError,
    HostKeyMismatch,
    LocalResource,
    NoCredentials,
    NodeError,
    UnknownHostKey,
)
from ctask.transports.ssh import SshTransport
from ctask.transports.ssh import pool as pool_module
from ctask.transports.ssh.hostkeys import KnownHosts
from ctask_tests.fix_banner import endless_line, http_answer, many_lines, nul_in_banner, old_version
from ctask_tests.fix_hostile import Script
from ctask_tests.fix_leaks import wait_until
from ctask_tests.fix_proxy import Fin, OnMessage, Rst, Rule, Stall, Xor, silent
from ctask_tests.ssh_sink import connected, dial, run, target_for

if TYPE_CHECKING:
    from pathlib import Path

    from ctask.options import Target
    from ctask_tests.fix_banner import BannerServerFactory
    from ctask_tests.fix_hostile import HostileFactory
    from ctask_tests.fix_proxy import ProxyFactory
    from ctask_tests.fix_sshd import Sshd, SshdFactory, SshdOptions


def refusal(target: Target) -> NodeError:
    """The error of a connect that must fail; the socket is closed by it."""
    transport = SshTransport()
    sock = dial(target)
    with pytest.raises(NodeError) as caught:
        transport.connect(target, sock, lambda name: None)
    assert sock.fileno() == -1
    assert not transport.pool._links
    return caught.value


def banner_target(options: SshdOptions, endpoint: tuple[str, int]) -> Target:
    return target_for(options, endpoint[0], port=endpoint[1])


def test_phases_are_told_in_order_from_the_thread_that_connects(sshd: Sshd) -> None:
    target = target_for(sshd.options(), sshd.address(1))
    told: list[tuple[str, int]] = []
    transport = SshTransport()
    transport.connect(target, dial(target), lambda name: told.append((name, threading.get_ident())))
    here = threading.get_ident()
    assert told == [("kex", here), ("hostkey", here), ("auth", here)]
    assert transport.close_all(5.0)


def test_the_thread_is_named_after_the_node(sshd: Sshd) -> None:
    with connected(target_for(sshd.options(), sshd.address(7))) as connection:
        assert connection.link.name == f"ctask/ssh {sshd.address(7)}:{sshd.port}"
        assert connection.link.agreed_on_strict_kex
        assert connection.link.local_cipher == "aes128-gcm@openssh.com"


def test_without_gcm_it_is_ctr_with_a_mac(sshd_factory: SshdFactory) -> None:
    server = sshd_factory("Ciphers aes256-ctr,aes128-cbc")
    with connected(target_for(server.options(), server.address(1))) as connection:
        assert run(connection, b"head -c 200000 /dev/zero").size == 200_000
        assert connection.link.local_cipher == "aes256-ctr"
        assert connection.link.local_mac.startswith("hmac-sha2-")


@pytest.mark.parametrize(
    ("words", "kind"),
    [(b"", BannerError), (b"Exceeded MaxStartups\r\n", BannerError), (b"Not allowed at this time\r\n", BannerError)],
)
def test_a_busy_server_is_told_by_its_words(sshd: Sshd, words: bytes, kind: type[NodeError]) -> None:
    with socket.create_server(("127.0.4.1", 0)) as listener, ThreadPoolExecutor(1) as threads:

        def drop() -> None:
            peer, _ = listener.accept()
            peer.sendall(words)
            peer.shutdown(socket.SHUT_WR)
            peer.recv(1)
            peer.close()

        threads.submit(drop)
        error = refusal(banner_target(sshd.options(), listener.getsockname()))
    assert type(error) is kind
    assert error.phase == "banner"
    assert "MaxStartups is full? Lower the fan-out, or raise MaxStartups" in str(error)
    assert words.decode().strip() in str(error)
    assert error.kind == "connection dropped by the server"


@pytest.mark.parametrize(
    ("game", "kind", "word"),
    [
        (endless_line(), BannerError, "8192 bytes"),
        (http_answer(), HandshakeError, "HTTP/1.1 400"),
        (old_version(), HandshakeError, "SSH-1.5"),
        (nul_in_banner(), HandshakeError, r"\\x00"),
        (many_lines(5_000), BannerError, "8192 bytes"),
    ],
)
def test_b06_what_is_no_ssh_server(
    sshd: Sshd, banner_server: BannerServerFactory, game: object, kind: type[NodeError], word: str
) -> None:
    server = banner_server(game)  # type: ignore[arg-type]
    error = refusal(banner_target(sshd.options(), server.endpoint))
    assert type(error) is kind
    assert error.phase == "banner"
    assert word.replace("\\\\", "\\") in str(error)
    assert str(error).isprintable()


def test_lines_before_the_version_are_allowed(sshd: Sshd, banner_server: BannerServerFactory) -> None:
    lines: list[bytes | float] = [b"welcome\r\n" * 20 + b"SSH-2.0-x\r\n"]
    server = banner_server(lambda: lines)
    target = banner_target(sshd.options(), server.endpoint)
    told: list[str] = []
    answered = lambda: "kex" in told and b"SSH-2.0-" in server.received  # noqa: E731 (what is waited for)
    assert isinstance(broken_off(target, told, answered), HandshakeError)


def broken_off(target: Target, told: list[str], ready: object) -> NodeError:
    """Connect in a second thread, shut the socket once `ready()`, return the error."""
    sock = dial(target)
    with ThreadPoolExecutor(1) as threads:
        making = threads.submit(SshTransport().connect, target, sock, told.append)
        wait_until(ready)  # type: ignore[arg-type]
        sock.shutdown(socket.SHUT_RDWR)
        error = making.exception(timeout=5)
    assert isinstance(error, NodeError)
    return error


def test_b05_a_silent_server_is_left_by_a_shut_socket(sshd: Sshd) -> None:
    told: list[str] = []
    with silent() as endpoint:
        error = broken_off(banner_target(sshd.options(), endpoint), told, lambda: True)
    assert isinstance(error, BannerError)
    assert told == []


def test_b14_a_stalled_key_exchange_is_left_by_a_shut_socket(sshd: Sshd, fault_proxy: ProxyFactory) -> None:
    proxy = fault_proxy((sshd.address(1), sshd.port), Rule("down", OnMessage(20), Stall()))
    told: list[str] = []
    error = broken_off(banner_target(sshd.options(), (proxy.address, proxy.port)), told, lambda: told)
    assert isinstance(error, HandshakeError)
    assert not error.integrity
    assert error.phase == "kex"


@pytest.mark.parametrize("do", [Fin(), Rst()])
@pytest.mark.parametrize("number", [20, 31])
def test_b07_a_connection_that_ends_in_the_key_exchange(
    sshd: Sshd, fault_proxy: ProxyFactory, number: int, do: Fin | Rst
) -> None:
    proxy = fault_proxy((sshd.address(1), sshd.port), Rule("down", OnMessage(number), do))
    error = refusal(banner_target(sshd.options(), (proxy.address, proxy.port)))
    assert type(error) is HandshakeError
    assert error.phase == "kex"
    assert not error.integrity


def test_a_forged_key_exchange_is_an_integrity_failure(sshd: Sshd, fault_proxy: ProxyFactory) -> None:
    # Inside the server's ephemeral key or its signature.
    proxy = fault_proxy((sshd.address(1), sshd.port), Rule("down", OnMessage(31), Xor(offset=150)))
    error = refusal(banner_target(sshd.options(), (proxy.address, proxy.port)))
    assert isinstance(error, HandshakeError)
    assert error.integrity


def test_b12_no_common_cipher_names_both_lists(sshd_factory: SshdFactory) -> None:
    server = sshd_factory("Ciphers chacha20-poly1305@openssh.com")
    error = refusal(target_for(server.options(), server.address(1)))
    assert type(error) is HandshakeError
    assert "no common cipher: the server has chacha20-poly1305@openssh.com; ctask has aes128-gcm" in str(error)


def test_b15_noise_before_the_login_is_bounded(hostile: HostileFactory) -> None:
    server = hostile(Script(noise=10_000))
    error = refusal(target_for(server.options(), server.address))
    assert isinstance(error, ConnectionLost)
    assert "packets before the login" in str(error)


def test_b15_noise_in_a_strict_key_exchange_is_an_integrity_failure(hostile: HostileFactory) -> None:
    server = hostile(Script(noise_in_kex=1))
    error = refusal(target_for(server.options(), server.address))
    assert isinstance(error, HandshakeError)
    assert error.integrity


def test_a_little_noise_does_no_harm(hostile: HostileFactory) -> None:
    server = hostile(Script(noise=50))
    with connected(target_for(server.options(), server.address)) as connection:
        assert run(connection, b"x").status == 0


def test_c01_nothing_is_offered_to_an_unknown_node(hostile: HostileFactory, tmp_path: Path) -> None:
    server = hostile(Script())
    nobody = tmp_path / "known_hosts"
    nobody.touch()
    error = refusal(target_for(server.options(), server.address, known_hosts=(str(nobody),)))
    assert type(error) is UnknownHostKey
    assert error.phase == "hostkey"
    assert server.seen.auths == []


def test_c02_a_changed_key_is_a_mismatch(sshd: Sshd, hostile: HostileFactory) -> None:
    server = hostile(Script())
    known = server.known_hosts
    with open(known) as file:
        name = file.read().split()[0]
    with open(known, "w") as file:
        file.write(f"{name} {sshd.host_key_lines[0]}\n")
    error = refusal(target_for(server.options(), server.address, host_key_policy="accept-new"))
    assert type(error) is HostKeyMismatch
    assert server.seen.auths == []


def test_c06_the_known_type_of_key_is_asked_for(sshd_factory: SshdFactory) -> None:
    server = sshd_factory(host_keys=("ed25519", "ecdsa", "rsa"))
    for line, algorithm in zip(
        server.host_key_lines, ("ssh-ed25519", "ecdsa-sha2-nistp256", "rsa-sha2-512"), strict=True
    ):
        known = server.folder / "one"
        known.write_text(f"[{server.address(1)}]:{server.port} {line}\n")
        target = target_for(server.options(), server.address(1), known_hosts=(str(known),))
        with connected(target) as connection:
            assert connection.link.host_key_type == algorithm


def test_c10_a_defect_in_the_check_is_a_refusal(sshd: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise MemoryError("no room for a thought")

    monkeypatch.setattr(KnownHosts, "verify", broken)
    error = refusal(target_for(sshd.options(), sshd.address(1)))
    assert isinstance(error, HostKeyError)
    assert isinstance(error.__cause__, MemoryError)


def test_c11_each_key_is_offered_once_in_order(sshd: Sshd) -> None:
    keys = tuple(sshd.new_key(f"wrong_{os.getpid()}_{n}") for n in range(3))
    since = len(sshd.log())
    target = target_for(sshd.options(), sshd.address(1), identities=(keys[0], *keys))
    error = refusal(target)
    assert type(error) is AuthRejected
    assert error.phase == "auth"
    text = str(error)
    assert f"refused for {target.user}. offered: ed25519 SHA256:" in text
    assert text.count("SHA256:") == 3
    assert "server allows: publickey" in text
    sshd.wait_log(r"Connection closed by authenticating user", since=since)
    assert sshd.log(since).count("Failed publickey") == 3
    assert "Failed none" not in sshd.log(since)


def test_a_later_key_gets_in(sshd: Sshd) -> None:
    wrong = sshd.new_key(f"wrong_{os.getpid()}_later")
    with connected(target_for(sshd.options(), sshd.address(1), identities=(wrong, sshd.identity))) as connection:
        assert run(connection, b"exit 3").status == 3


def test_an_rsa_key_signs_with_sha2(sshd_factory: SshdFactory) -> None:
    server = sshd_factory()
    key = server.new_key("rsa", kind="rsa")
    server.authorize(key)
    with connected(target_for(server.options(), server.address(1), identities=(key,))) as connection:
        assert run(connection, b"true").status == 0


def test_too_many_keys_are_a_refused_login(sshd_factory: SshdFactory) -> None:
    server = sshd_factory("MaxAuthTries 2")
    keys = tuple(server.new_key(f"wrong_{n}") for n in range(4))
    error = refusal(target_for(server.options(), server.address(1), identities=keys))
    assert type(error) is AuthRejected
    assert "refused for" in str(error)


def test_c14_a_key_that_is_not_enough(sshd_factory: SshdFactory) -> None:
    server = sshd_factory("AuthenticationMethods publickey,password", "PasswordAuthentication yes")
    error = refusal(target_for(server.options(), server.address(1)))
    assert type(error) is NoCredentials
    assert "a key was accepted" in str(error)
    assert "password" in str(error)


def test_two_keys_where_the_server_wants_two(sshd_factory: SshdFactory) -> None:
    server = sshd_factory("AuthenticationMethods publickey,publickey", user_keys=2)
    target = target_for(server.options(), server.address(1), identities=tuple(server.identities))
    with connected(target) as connection:
        assert run(connection, b"true").status == 0


def test_no_key_at_all(sshd: Sshd, tmp_path: Path) -> None:
    since = len(sshd.log())
    missing = (str(tmp_path / "id"),)
    error = refusal(target_for(sshd.options(), sshd.address(1), identities=missing, named_identities=False))
    assert type(error) is NoCredentials
    assert "Failed" not in sshd.log(since)


def test_p24_a_connection_lost_in_the_login_says_nothing_of_the_key(hostile: HostileFactory) -> None:
    server = hostile(Script(on_auth="hang_up"))
    error = refusal(target_for(server.options(), server.address))
    assert type(error) is ConnectionLost
    assert error.phase == "auth"


def test_no_more_threads_is_a_lack_of_this_machine(sshd: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    def reader() -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(pool_module, "Reader", reader)
    error = refusal(target_for(sshd.options(), sshd.address(1)))
    assert type(error) is LocalResource
    assert "threads" in str(error)


def test_a_defect_elsewhere_closes_the_socket_too(sshd: Sshd) -> None:
    target = target_for(sshd.options(), sshd.address(1))
    sock = dial(target)

    def broken(name: str) -> None:
        if name == "auth":
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        SshTransport().connect(target, sock, broken)
    assert sock.fileno() == -1


def test_nothing_is_logged_above_debug_and_nothing_raw(
    banner_server: BannerServerFactory, sshd: Sshd, caplog: pytest.LogCaptureFixture
) -> None:
    server = banner_server(lambda: iter([b"SSH-2.0-\x7e\r\n" + b"\x00\xff\x1b[31m" * 100]))
    with caplog.at_level(logging.DEBUG):
        error = refusal(banner_target(sshd.options(), server.endpoint))
    assert isinstance(error, ConnectError)
    records = [record for record in caplog.records if not record.name.startswith("paramiko")]
    assert records
    assert {record.name for record in caplog.records} == {"ctask.ssh"}
    assert all(record.levelno == logging.DEBUG and record.getMessage().isprintable() for record in records)
