# SPDX-License-Identifier: Apache-2.0
"""Nodes that cannot prove who they are, and logins that are refused (faults C01, C02, C10, C11), on a real sshd.

Runs in the thread of pytest, over the public Task API; what was sent is read in sshd's log.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ctask import (
    AuthRejected,
    HostKeyError,
    HostKeyMismatch,
    NoCredentials,
    OptionError,
    Outcome,
    UnknownHostKey,
)
from ctask.transports.ssh import hostkeys
from ctask.transports.ssh.hostkeys import KnownHosts
from ctask_tests.fix_sshd import fingerprint, known_hosts_line, make_key, public_key, write_known_hosts
from ctask_tests.sick_node import (
    SICK,
    WELL,
    Course,
    accepted,
    dialogues,
    takes,
    task_for,
    tried_keys,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from ctask import NodeResult
    from ctask_tests.fix_sshd import Sshd, SshdFactory

#: The n-th address of sshd that is the sick node here; the healthy one is the first.
NODE = 9


def course(sshd: Sshd, **sick: Any) -> Course:
    options = {"address": sshd.address(NODE), **sick}
    with takes(0.0):
        return Course(task_for(sshd, sick=options), [SICK, WELL]).end()


def unreached(sick: NodeResult, phase: str) -> None:
    """Nothing was run, and it is safe to repeat."""
    assert (sick.outcome, sick.rc, sick.ran, sick.phase) == (Outcome.UNREACHED, 255, False, phase)


def nothing_was_offered(sshd: Sshd, since: int) -> None:
    """One connection, which came to its end before a login."""
    assert tried_keys(sshd, sshd.address(NODE), since) == [[]]
    (text,) = dialogues(sshd, sshd.address(NODE), since)
    assert sshd.user not in text


def keyfile(sshd: Sshd, name: str, **options: str) -> str:
    """A key that sshd does not accept."""
    path = sshd.folder / name
    return str(path) if path.exists() else make_key(path, **options)


def key_fingerprint(path: str) -> str:
    return fingerprint(public_key(path))


# --- C01, C02: host keys


def test_c01_an_unknown_host_key_is_refused_before_anything_is_offered(sshd: Sshd, tmp_path: Path) -> None:
    nobody = tmp_path / "known_hosts"
    nobody.write_text(known_hosts_line("127.0.1.1", sshd.port, sshd.host_key_lines[0]) + "\n")
    before = nobody.read_bytes()
    since = len(sshd.log())
    ran = course(sshd, known_hosts=nobody)
    unreached(ran.sick, "hostkey")
    error = ran.sick.error
    assert type(error) is UnknownHostKey
    assert error.fingerprint == fingerprint(sshd.host_key_lines[0])
    assert error.key_type == "ed25519"
    assert error.files == (str(nobody),)
    assert ran.sick.why.startswith("host key not known; nothing was sent")
    assert error.fingerprint in ran.sick.why
    assert str(nobody) in ran.sick.why
    assert list(ran.worker.failures()) == [("hostkey", "UnknownHostKey", "host key not known")]
    nothing_was_offered(sshd, since)
    assert nobody.read_bytes() == before
    # The line that it names is the one that accepts the node.
    nobody.write_text(error.line + "\n")
    assert course(sshd, known_hosts=nobody).sick.ok


@pytest.mark.parametrize("policy", ["verify", "accept-new"])
def test_c02_a_changed_host_key_is_refused_under_every_policy(sshd: Sshd, tmp_path: Path, policy: str) -> None:
    old = public_key(make_key(tmp_path / "old"))
    end = (sshd.address(NODE), sshd.port)
    known = Path(write_known_hosts(tmp_path / "known_hosts", [(sshd.address(1), sshd.port), end], [old]))
    before = known.read_bytes()
    since = len(sshd.log())
    ran = course(sshd, known_hosts=known, host_key_policy=policy)
    unreached(ran.sick, "hostkey")
    error = ran.sick.error
    assert type(error) is HostKeyMismatch
    shown = fingerprint(sshd.host_key_lines[0])
    text = f"HOST KEY CHANGED. known {fingerprint(old)} ({known}:2), shown {shown}. Not connected."
    assert ran.sick.why == text
    assert error.fingerprint == shown
    assert list(ran.worker.failures()) == [("hostkey", "HostKeyMismatch", "host key changed")]
    nothing_was_offered(sshd, since)
    assert known.read_bytes() == before


def test_c02_a_host_key_that_changes_between_two_commands(sshd_factory: SshdFactory, sshd: Sshd) -> None:
    server = sshd_factory()
    known = server.known_hosts_for()
    task = task_for(sshd, sick={**server.options(), "address": server.address(1), "known_hosts": known})
    assert Course(task, [SICK, WELL]).end().sick.ok
    task.disconnect(SICK)
    other = public_key(make_key(server.folder / "other"))
    write_known_hosts(Path(known), [(server.address(1), server.port)], [other])
    assert type(Course(task, [SICK, WELL]).end().sick.error) is HostKeyMismatch


def test_accept_new_by_choice_adds_the_line_that_openssh_finds(sshd: Sshd, tmp_path: Path) -> None:
    known = tmp_path / "known_hosts"
    nodes = [f"new{number}" for number in range(1, 13)]
    task = task_for(sshd, known_hosts=str(known), host_key_policy="accept-new")
    for number, node in enumerate(nodes, 1):
        task.node_options(node, address=sshd.address(20 + number))
    assert len(Course(task, nodes).end().worker.ok) == 12
    assert stat.S_IMODE(known.stat().st_mode) == 0o600
    names = [line.split()[0] for line in known.read_text().splitlines()]
    assert sorted(names) == sorted(f"[{sshd.address(20 + number)}]:{sshd.port}" for number in range(1, 13))
    for name in (names[0], names[-1]):
        said = subprocess.run(["ssh-keygen", "-F", name, "-f", known], check=True, capture_output=True, text=True)
        assert sshd.host_key_lines[0] in said.stdout
    # Known from now on, also to who verifies; and to be changed never again.
    assert len(Course(task, nodes, host_key_policy="verify").end().worker.ok) == 12
    assert len(known.read_text().splitlines()) == 12


# --- C10: an exception in the check is a refusal


@pytest.mark.parametrize("policy", ["verify", "accept-new"])
@pytest.mark.parametrize("failure", [MemoryError("no room"), ValueError("what?"), AssertionError()])
def test_c10_a_check_that_raises_is_a_refusal(
    sshd: Sshd, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failure: Exception, policy: str
) -> None:
    real = KnownHosts.verify

    def verify(self: KnownHosts, target: Any, key_type: str, blob: bytes) -> None:
        if target.address == sshd.address(NODE):
            raise failure
        real(self, target, key_type, blob)

    monkeypatch.setattr(KnownHosts, "verify", verify)
    known = tmp_path / "known_hosts"
    known.touch()
    since = len(sshd.log())
    sick = course(sshd, known_hosts=known, host_key_policy=policy).sick
    refused_for(sick, failure)
    nothing_was_offered(sshd, since)
    assert known.read_bytes() == b""


def test_c10_a_parser_that_raises_is_a_refusal(sshd: Sshd, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = hostkeys.load
    failure = RecursionError("too deep")
    known = write_known_hosts(tmp_path / "known_hosts", [(sshd.address(NODE), sshd.port)], sshd.host_key_lines)

    def load(paths: tuple[str, ...], *, named: bool = False) -> KnownHosts:
        if known in paths:
            raise failure
        return real(paths, named=named)

    monkeypatch.setattr(hostkeys, "load", load)
    since = len(sshd.log())
    sick = course(sshd, known_hosts=known).sick
    refused_for(sick, failure)
    nothing_was_offered(sshd, since)


def refused_for(sick: NodeResult, failure: Exception) -> None:
    unreached(sick, "hostkey")
    assert type(sick.error) is HostKeyError
    assert sick.error.__cause__ is failure
    assert sick.why.startswith("host key could not be checked, so it is refused: " + type(failure).__name__)


# --- C11: refused logins, each credential once


def test_c11_wrong_keys_are_offered_once_each_and_never_again(sshd: Sshd) -> None:
    wrong = [keyfile(sshd, f"refused_{number}") for number in (1, 2)]
    since = len(sshd.log())
    ran = course(sshd, identity=[*wrong, wrong[0]])
    unreached(ran.sick, "auth")
    assert type(ran.sick.error) is AuthRejected
    offered = ", ".join(f'ed25519 {key_fingerprint(path)} "{Path(path).name}"' for path in wrong)
    assert ran.sick.why == f"auth: refused for {sshd.user}. offered: {offered}. server allows: publickey."
    assert list(ran.worker.failures()) == [("auth", "AuthRejected", f"auth: refused for {sshd.user}")]
    assert tried_keys(sshd, sshd.address(NODE), since) == [["publickey", "publickey"]]
    assert accepted(sshd, sshd.address(1), since) == 1


@pytest.mark.parametrize("how", ["no such account", "locked account"])
def test_c11_a_login_that_sshd_does_not_let_in(sshd: Sshd, sshd_factory: SshdFactory, how: str) -> None:
    # To sshd, a user that is denied is the same as a locked one, without an account to lock.
    server = sshd_factory("LogLevel DEBUG1", f"DenyUsers {sshd.user}")
    user = "nobody-of-that-name" if how == "no such account" else sshd.user
    with takes(0.0):
        task = task_for(sshd, sick={**server.options(), "address": server.address(NODE), "user": user})
        sick = Course(task, [SICK, WELL]).end().sick
    unreached(sick, "auth")
    assert type(sick.error) is AuthRejected
    offered = f'ed25519 {key_fingerprint(server.identity)} "id_0"'
    assert sick.why == f"auth: refused for {user}. offered: {offered}. server allows: publickey."
    server.wait_idle()
    # At VERBOSE, sshd does not say what such users have tried.
    tries = re.findall(r"userauth-request for user (\S+) service \S+ method (\S+)", server.log())
    assert tries == [(user, "publickey")]


def test_c11_a_key_with_a_passphrase_is_not_asked_for(sshd: Sshd) -> None:
    locked = keyfile(sshd, "encrypted", passphrase="open sesame")
    since = len(sshd.log())
    sick = course(sshd, identity=locked).sick
    unreached(sick, "auth")
    assert type(sick.error) is NoCredentials
    assert sick.why.startswith(f"auth: nothing to offer for {sshd.user}. ")
    assert f"{locked}: encrypted; not asked for" in sick.why
    assert "sesame" not in sick.why
    assert tried_keys(sshd, sshd.address(NODE), since) == [[]]


def test_c11_the_next_key_is_offered_in_place_of_an_encrypted_one(sshd: Sshd) -> None:
    since = len(sshd.log())
    locked = keyfile(sshd, "encrypted", passphrase="open sesame")
    assert course(sshd, identity=[locked, sshd.identity]).sick.ok
    assert accepted(sshd, sshd.address(NODE), since) == 1


def test_c11_without_any_key_there_is_nothing_to_offer(sshd: Sshd) -> None:
    task = task_for(sshd, sick={"address": sshd.address(NODE), "identity": []})
    since = len(sshd.log())
    sick = Course(task, [SICK, WELL]).end().sick
    unreached(sick, "auth")
    assert type(sick.error) is NoCredentials
    assert tried_keys(sshd, sshd.address(NODE), since) == [[]]


def open_to_all(path: Path) -> None:
    make_key(path)
    path.chmod(0o644)


def public_half(path: Path) -> None:
    path.write_text(public_key(make_key(path.with_name("other"))))
    path.chmod(0o600)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (open_to_all, "is open to other users (mode 0644), as no private key may be: chmod 600 it"),
        (os.mkfifo, "is not a regular file"),
        (Path.mkdir, "is a directory, not a file"),
        (lambda path: None, "does not exist"),
        (public_half, "is a public key: name the private one"),
    ],
    ids=["mode 0644", "fifo", "folder", "missing", "public"],
)
def test_c11_a_key_file_that_cannot_do_is_told_in_the_caller(
    sshd: Sshd, tmp_path: Path, make: Callable[[Path], None], words: str
) -> None:
    path = tmp_path / "key"
    make(path)
    task = task_for(sshd, sick={"address": sshd.address(NODE), "identity": path})
    since = len(sshd.log())
    with takes(0.0), pytest.raises(OptionError) as caught:
        task.run("echo ok", nodes=[SICK, WELL])
    assert str(caught.value) == f"identity {path} {words}"
    assert Course(task, [WELL]).end().worker.exit_code() == 0
    assert dialogues(sshd, sshd.address(NODE), since) == []  # no socket was opened
