# SPDX-License-Identifier: Apache-2.0
"""Host keys: whom ctask refuses and how it tells it, and what `accept-new` adds."""

from __future__ import annotations

import base64
import fcntl
import hashlib
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ctask.errors import HostKeyError, HostKeyMismatch, HostKeyRevoked, UnknownHostKey
from ctask.options import Target
from ctask.transports.ssh import hostkeys, knownhosts
from ctask_tests.known_lines import ED, accept_all, hashed, key, line, ssh_string, verify, write

pytestmark = pytest.mark.timeout(60)


# --- who is refused, and how it is told


def test_c01_an_unknown_key_tells_fingerprint_files_and_the_line_to_add(tmp_path: Path) -> None:
    path = write(tmp_path / "known_hosts", line("other", key("o")))
    with pytest.raises(UnknownHostKey) as caught:
        verify(path, "127.0.1.5", key("5"), port=2222)
    error = caught.value
    digest = base64.b64encode(hashlib.sha256(key("5")).digest()).decode().rstrip("=")
    assert error.fingerprint == f"SHA256:{digest}"
    assert error.key_type == "ed25519"
    assert error.line == f"[127.0.1.5]:2222 ssh-ed25519 {base64.b64encode(key('5')).decode()}"
    assert error.files == (path,)
    assert error.phase == "hostkey"
    assert error.kind == "host key not known"
    assert error.reason == (
        f"host key not known; nothing was sent (SHA256:{digest} ed25519; looked in {path})"
    )
    write(tmp_path / "known_hosts", error.line)
    verify(path, "127.0.1.5", key("5"), port=2222)


def test_where_no_file_is_there_the_text_says_so(tmp_path: Path) -> None:
    path = str(tmp_path / "none")
    with pytest.raises(UnknownHostKey, match=re.escape(f"looked in {path}, which does not exist)")):
        verify(path, "n1", key("1"))


@pytest.mark.parametrize("policy", ["verify", "accept-new"])
def test_c02_a_changed_key_is_refused_even_with_accept_new(tmp_path: Path, policy: str) -> None:
    path = write(tmp_path / "known_hosts", line("other", key("o")), line("n1", key("old")))
    before = Path(path).read_bytes()
    with pytest.raises(HostKeyMismatch) as caught:
        verify(path, "n1", key("new"), policy)
    old, new = hostkeys.fingerprint(key("old")), hostkeys.fingerprint(key("new"))
    assert caught.value.reason == f"HOST KEY CHANGED. known {old} ({path}:2), shown {new}. Not connected."
    assert caught.value.kind == "host key changed"
    assert caught.value.fingerprint == new
    assert Path(path).read_bytes() == before


def test_c06_a_key_of_another_type_than_the_known_one_is_a_changed_key(tmp_path: Path) -> None:
    path = write(tmp_path / "known_hosts", line("n1", key("old", "ssh-rsa")))
    with pytest.raises(HostKeyMismatch, match=r"known \S+ rsa \(.*:1\), shown \S+ ed25519\. Not"):
        verify(path, "n1", key("new"))


@pytest.mark.parametrize("policy", ["verify", "accept-new", "insecure-ignore"])
@pytest.mark.parametrize("names", ["n1", "n*", hashed("n1")], ids=["plain", "wildcard", "hashed"])
def test_c03_a_revoked_key_is_refused_though_other_lines_accept_it(
    tmp_path: Path, names: str, policy: str
) -> None:
    accepts = write(tmp_path / "a", line("n1,n2", key("1")))
    revokes = write(tmp_path / "b", line(names, key("1"), "@revoked"))
    with pytest.raises(HostKeyRevoked, match=f"revoked in {re.escape(revokes)}:1"):
        verify((accepts, revokes), "n1", key("1"), policy)
    if names != "n*":
        verify((accepts, revokes), "n2", key("1"), policy)


def test_a_revoked_line_makes_no_other_key_known_or_changed(tmp_path: Path) -> None:
    path = write(tmp_path / "known_hosts", line("*", key("bad"), "@revoked"))
    with pytest.raises(UnknownHostKey):
        verify(path, "n1", key("1"))


def test_insecure_ignore_accepts_unknown_and_changed_keys_and_writes_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "known_hosts", line("n1", key("old")))
    verify(path, "n1", key("new"), "insecure-ignore")
    verify(path, "n2", key("new"), "insecure-ignore")
    assert Path(path).read_text() == line("n1", key("old")) + "\n"


def test_c10_a_failure_of_the_check_is_a_refusal_that_keeps_its_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "known_hosts", line("n1", key("1")))
    for broken in (MemoryError("no more"), ValueError("a\x1b[2Jb\nc"), RecursionError()):

        def fail(*_: Any, broken: Exception = broken) -> None:
            raise broken

        for policy in ("verify", "accept-new", "insecure-ignore"):
            with monkeypatch.context() as patch:
                patch.setattr(knownhosts.HostsFile, "find_key", fail)
                with pytest.raises(HostKeyError) as caught:
                    verify(path, "n1", key("1"), policy)
            assert caught.value.__cause__ is broken
            assert caught.value.phase == "hostkey"
            assert caught.value.reason.isprintable()


@pytest.mark.parametrize("blob", [b"", b"\0\0\0\x0bssh-ed", b"\xff" * 8, ssh_string(b"a b\n") + b"x"])
def test_a_blob_that_is_no_key_is_refused(tmp_path: Path, blob: bytes) -> None:
    path = write(tmp_path / "known_hosts")
    target = Target(address="n1", known_hosts=(path,), host_key_policy="accept-new")
    with pytest.raises(HostKeyError, match="could not be checked"):
        hostkeys.load((path,)).verify(target, ED, blob)
    assert Path(path).read_bytes() == b""


# --- accept-new


def test_accept_new_makes_the_file_and_its_folder_private_from_birth(tmp_path: Path) -> None:
    path = tmp_path / "home" / ".ssh" / "known_hosts"
    before = os.umask(0)
    try:
        verify(str(path), "127.0.1.5", key("5"), "accept-new", port=2222)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert path.read_text() == line("[127.0.1.5]:2222", key("5")) + "\n"
    verify(str(path), "127.0.1.5", key("5"), port=2222)
    with pytest.raises(HostKeyMismatch):
        verify(str(path), "127.0.1.5", key("6"), "accept-new", port=2222)


def test_accept_new_ends_a_last_line_that_has_no_end(tmp_path: Path) -> None:
    path = tmp_path / "known_hosts"
    path.write_text(f"# mine\n{line('n1', key('1'))}")
    verify(str(path), "n2", key("2"), "accept-new")
    verify(str(path), "n3", key("3"), "accept-new")
    assert path.read_text().splitlines()[1:] == [line(f"n{i}", key(str(i))) for i in (1, 2, 3)]
    assert [found.number for found in knownhosts.read(str(path)).find("n3")] == [4]


def test_accept_new_hashes_where_the_file_is_hashed(tmp_path: Path) -> None:
    path = write(tmp_path / "known_hosts", line(hashed("n1"), key("1")))
    verify(path, "n2", key("2"), "accept-new")
    added = Path(path).read_text().splitlines()[1]
    assert re.fullmatch(r"\|1\|\S{28}\|\S{28} ssh-ed25519 \S+", added)
    assert added.startswith("|1|")  # a salt and a digest, in which any two letters can stand
    verify(path, "n2", key("2"))
    os.utime(path, (1, 1))
    verify(path, "n2", key("2"))
    verify(path, "n1", key("1"))


def test_accept_new_adds_to_the_first_file_and_follows_a_symbolic_link(tmp_path: Path) -> None:
    real = write(tmp_path / "real")
    link = tmp_path / "link"
    link.symlink_to(real)
    second = write(tmp_path / "second", line("n2", key("2")))
    verify((str(link), second), "n1", key("1"), "accept-new")
    verify((str(link), second), "n2", key("2"), "accept-new")
    assert link.is_symlink()
    assert Path(real).read_text() == line("n1", key("1")) + "\n"


def test_a_key_that_cannot_be_added_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    target = Target(
        address="n1", known_hosts=(str(tmp_path / "file" / "known_hosts"),), host_key_policy="accept-new"
    )
    with pytest.raises(HostKeyError, match=r"could not be added to /.*, so it is refused: File exists$"):
        hostkeys.load(target.known_hosts).verify(target, ED, key("1"))


def test_c07_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "known_hosts", line("n1", key("1")))
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:20]))
    with pytest.raises(HostKeyError, match="No space left"):
        verify(path, "n2", key("2"), "accept-new")
    monkeypatch.undo()
    assert Path(path).read_text() == line("n1", key("1")) + "\n"
    verify(path, "n2", key("2"), "accept-new")
    assert len(Path(path).read_text().splitlines()) == 2


def test_c07_64_threads_that_accept_at_once_write_each_line_once(tmp_path: Path) -> None:
    path = tmp_path / "known_hosts"
    accept_all(str(path), 32, 64)
    assert sorted(path.read_text().splitlines()) == sorted(line(f"n{i}", key(str(i))) for i in range(32))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_c07_several_processes_that_accept_at_once_write_each_line_once(tmp_path: Path) -> None:
    path = tmp_path / "known_hosts"
    code = "from ctask_tests.known_lines import accept_all; import sys; accept_all(sys.argv[1], 16, 8)"
    root = str(Path(__file__).resolve().parent.parent)
    children = [subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=root) for _ in range(3)]
    assert [child.wait(30) for child in children] == [0, 0, 0]
    assert sorted(path.read_text().splitlines()) == sorted(line(f"n{i}", key(str(i))) for i in range(16))


def test_a_lock_that_another_process_keeps_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "known_hosts")
    monkeypatch.setattr(knownhosts, "LOCK_WAIT", 0.05)
    with open(path) as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(HostKeyError, match="kept it locked"):
            verify(path, "n1", key("1"), "accept-new")
    verify(path, "n1", key("1"), "accept-new")


def test_a_file_that_was_replaced_while_its_lock_was_awaited_is_opened_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "known_hosts"
    write(path, line("n1", key("1")))
    real = knownhosts._flock

    def replacing(*args: Any) -> None:
        monkeypatch.setattr(knownhosts, "_flock", real)
        write(tmp_path / "new", line("n1", key("1")), line("n2", key("2")))
        (tmp_path / "new").rename(path)
        real(*args)

    monkeypatch.setattr(knownhosts, "_flock", replacing)
    verify(str(path), "n3", key("3"), "accept-new")
    assert path.read_text().splitlines() == [line(f"n{i}", key(str(i))) for i in (1, 2, 3)]


@pytest.mark.parametrize(
    ("kind", "short"),
    [
        ("ssh-ed25519", "ed25519"),
        ("ssh-rsa", "rsa"),
        ("rsa-sha2-512", "rsa"),
        ("ecdsa-sha2-nistp256", "ecdsa"),
        ("sk-ssh-ed25519@openssh.com", "ed25519-sk"),
        ("sk-ecdsa-sha2-nistp256@openssh.com", "ecdsa-sk"),
        ("ssh-ed25519-cert-v01@openssh.com", "ed25519"),
        ("ssh-dss", "dsa"),
        ("future-key@example.org", "future-key@example.org"),
    ],
)
def test_short_names_of_key_types(kind: str, short: str) -> None:
    assert hostkeys.short_type(kind) == short
