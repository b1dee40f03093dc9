# SPDX-License-Identifier: Apache-2.0
"""known_hosts files: every line as OpenSSH reads it, each file read once, bad lines that harm no other."""

from __future__ import annotations

import base64
import concurrent.futures
import hmac
import logging
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctask.errors import HostKeyError, HostKeyMismatch, HostKeyRevoked, OptionError, UnknownHostKey
from ctask.options import Target
from ctask.transports.ssh import hashed as hashed_lines
from ctask.transports.ssh import hostkeys, knownhosts
from ctask_tests.known_lines import ED, hashed, key, line, verify, write

pytestmark = pytest.mark.timeout(60)

SSH_KEYGEN = shutil.which("ssh-keygen") or ""
needs_ssh_keygen = pytest.mark.skipif(not SSH_KEYGEN and "CI" not in os.environ, reason="no ssh-keygen")


def numbers(path: str, name: str) -> list[int]:
    return [found.number for found in knownhosts.read(path).find(name)]


# --- what the lines say


def test_names_hashes_patterns_and_ports_are_found(tmp_path: Path) -> None:
    one, two, three, four = (key(str(i)) for i in range(4))
    path = write(
        tmp_path / "known_hosts",
        "# comment",
        "",
        line("Alpha,10.0.0.1,alpha.example", one),
        line("[beta]:2222,[10.0.0.2]:2222", two),
        line(hashed("gamma"), three),
        line("*.cluster,!bad*.cluster", four),
    )
    verify(path, "alpha", one)
    verify(path, "ALPHA.example", one)
    verify(path, "10.0.0.1", one)
    verify(path, "beta", two, port=2222)
    verify(path, "gamma", three)
    verify(path, "n1.cluster", four)
    for name, blob, port in (
        ("beta", two, 22),
        ("alpha", one, 2222),
        ("[beta]", two, 22),
        ("bad1.cluster", four, 22),
        ("cluster", four, 22),
        ("gammA2", three, 22),
    ):
        with pytest.raises(UnknownHostKey):
            verify(path, name, blob, port=port)


def test_a_bracket_in_a_pattern_is_no_character_class(tmp_path: Path) -> None:
    path = write(tmp_path / "known_hosts", line("[n*]:2222", key("a")), line("n[12]*", key("b")))
    verify(path, "n7", key("a"), port=2222)
    with pytest.raises(UnknownHostKey):
        verify(path, "n1x", key("b"))


def test_several_keys_of_a_node_are_all_good_and_give_the_preferred_types(tmp_path: Path) -> None:
    rsa, opaque = key("r", "ssh-rsa"), key("x", "future-key@example.org")
    first = write(tmp_path / "a", line("n1", rsa), line("n*", opaque), line("n2", key("2")))
    second = write(tmp_path / "b", line("n1", key("1")), line("n1", rsa))
    for blob in (rsa, opaque, key("1")):
        verify((first, second), "n1", blob)
    known = hostkeys.load((first, second))
    assert known.key_types("n1", 22) == ["ssh-rsa", "future-key@example.org", ED]
    assert known.key_types("N2", 22) == ["future-key@example.org", ED]
    assert known.key_types("n1", 2222) == []


def test_the_algorithm_of_an_rsa_key_may_be_sha2(tmp_path: Path) -> None:
    rsa = key("r", "ssh-rsa")
    path = write(tmp_path / "known_hosts", line("n1", rsa))
    target = Target(address="n1", known_hosts=(path,))
    hostkeys.load((path,)).verify(target, "rsa-sha2-512", rsa)
    with pytest.raises(HostKeyError, match="refused: ValueError: a key of type ssh-rsa was shown") as caught:
        hostkeys.load((path,)).verify(target, "ssh-ed25519", rsa)
    assert type(caught.value) is HostKeyError


def test_the_type_of_a_revoked_key_is_not_asked_for(tmp_path: Path) -> None:
    path = write(
        tmp_path / "known_hosts",
        line("n1", key("old", "ssh-rsa")),
        line("n1", key("1")),
        line("*", key("old", "ssh-rsa"), "@revoked"),
    )
    assert hostkeys.load((path,)).key_types("n1", 22) == [ED]


def test_a_type_that_is_only_guessed_from_hashes_comes_last(tmp_path: Path) -> None:
    guess = write(tmp_path / "hashed", line(hashed("n1"), key("h", "ssh-rsa")))
    sure = write(tmp_path / "plain", line("n1", key("1")))
    assert hostkeys.load((guess, sure)).key_types("n1", 22) == [ED, "ssh-rsa"]


def test_hashed_types_are_exact_where_they_differ(tmp_path: Path) -> None:
    path = write(
        tmp_path / "h",
        line(hashed("n1"), key("1")),
        line(hashed("n2"), key("2", "ssh-rsa")),
        line("n3", key("3")),
    )
    known = hostkeys.load((path,))
    assert known.key_types("n1", 22) == [ED]
    assert known.key_types("n2", 22) == ["ssh-rsa"]
    assert known.key_types("n9", 22) == []


# --- files that are not as they should be


def test_c04_bad_lines_are_skipped_with_one_warning_and_the_others_work(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "known_hosts"
    good = [line(f"n{i}", key(str(i))).encode() for i in range(4)]
    path.write_bytes(
        b"\n".join(
            [
                good[0] + b"\r",
                b"junk",
                b"n9 ssh-ed25519 not*base64",
                b"n9 ssh-ed25519 " + base64.b64encode(key("9", "ssh-rsa")),
                b"@unknown-marker " + good[1],
                good[1] + b" comment \xff\xfe\0",
                b"\xff\xfe,n5 ssh-ed25519 " + base64.b64encode(key("5")),
                b"n9\0 ssh-ed25519 " + base64.b64encode(key("9")),
                b"n9 1024 35 1234567890",
                b"|1|short|hash ssh-ed25519 " + base64.b64encode(key("9")),
                b"@cert-authority * " + good[2].split(b" ", 1)[1],
                b"\t " + good[2],
                b"\0" * 5000,
                good[3],
            ]
        )
    )
    with caplog.at_level(logging.WARNING, "ctask.ssh"):
        for i in range(4):
            verify(str(path), f"n{i}", key(str(i)))
        verify(str(path), "n5", key("5"))
        os.utime(path, (1, 1))
        with pytest.raises(UnknownHostKey):
            verify(str(path), "n9", key("9"))
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: 8 lines not understood and skipped, first 2"
    ]


def test_a_certificate_authority_knows_no_plain_key(tmp_path: Path) -> None:
    path = write(tmp_path / "known_hosts", line("n*", key("ca"), "@cert-authority"))
    for blob in (key("ca"), key("1")):
        with pytest.raises(UnknownHostKey):
            verify(path, "n1", blob)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    junk=st.lists(
        st.one_of(
            st.binary(max_size=60),
            st.sampled_from([b"@revoked", b"@cert-authority x", b"|1|", b"|1||", b"a ssh-rsa AAAA="]),
        ),
        max_size=8,
    )
)
def test_c04_no_bytes_break_the_lines_around_them(tmp_path: Path, junk: list[bytes]) -> None:
    good = line("node-that-is-good", key("good")).encode()
    file = knownhosts.HostsFile("x", b"\n".join([*junk, good, *junk]))
    assert [found.blob for found in file.find("node-that-is-good") if found.blob == key("good")]


def test_a_missing_default_file_is_no_word_worth(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "b", line("n1", key("1")))
    files = (str(tmp_path / "none"), path)
    hostkeys.load(files).verify(Target(address="n1", known_hosts=files), ED, key("1"))
    hostkeys.check(Target(address="n1", known_hosts=files))
    assert not caplog.records


def test_a_default_file_that_cannot_be_read_is_told_once_and_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "b", line("n1", key("1")))
    os.mkfifo(tmp_path / "fifo")
    files = (str(tmp_path), str(tmp_path / "fifo"), path)
    target = Target(address="n1", known_hosts=files)
    for _ in range(2):
        hostkeys.check(target)
        hostkeys.load(files).verify(target, ED, key("1"))
    assert [record.getMessage() for record in caplog.records] == [
        f"known_hosts {tmp_path} is a directory, not a file; it is not used",
        f"known_hosts {tmp_path}/fifo is not a regular file; it is not used",
    ]


def named(path: object, policy: str = "verify") -> Target:
    return Target(address="n1", known_hosts=(str(path),), named_known_hosts=True, host_key_policy=policy)


@pytest.mark.parametrize("policy", ["verify", "accept-new", "insecure-ignore"])
def test_c04_a_named_file_that_cannot_be_read_is_refused_in_the_caller_and_at_the_handshake(
    tmp_path: Path, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "fifo")
    secret = write(tmp_path / "secret", line("n1", key("1")))
    real = os.open

    def forbidding(path: Any, *args: Any, **kwargs: Any) -> int:
        if path == secret:
            raise PermissionError(13, "Permission denied", path)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", forbidding)
    for path, text in (
        (str(tmp_path), "is a directory, not a file"),
        (str(tmp_path / "fifo"), "is not a regular file"),
        (secret, "cannot be read: Permission denied"),
    ):
        with pytest.raises(OptionError, match=f"^known_hosts {re.escape(path)} {text}$"):
            hostkeys.check(named(path, policy))
        with pytest.raises(HostKeyError, match=text) as caught:
            verify(path, "n1", key("1"), policy)
        assert caught.value.phase == "hostkey"


def test_a_named_file_that_does_not_exist_is_refused_unless_something_makes_it(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"does not exist: name one that does, or say .*'accept-new'"):
        hostkeys.check(named(tmp_path / "none"))
    hostkeys.check(named(tmp_path / "none", "accept-new"))
    hostkeys.check(named(tmp_path / "none", "insecure-ignore"))
    both = (write(tmp_path / "a"), "/etc/ssh/ssh_known_hosts2", str(Path("~/.ssh/known_hosts").expanduser()))
    hostkeys.check(Target(address="n1", known_hosts=both, named_known_hosts=True))


def test_dev_null_is_an_empty_file_that_takes_everything() -> None:
    hostkeys.check(named(os.devnull))
    verify(os.devnull, "n1", key("1"), "accept-new")
    verify(os.devnull, "n1", key("2"), "accept-new")
    with pytest.raises(UnknownHostKey):
        verify(os.devnull, "n1", key("1"))


# --- read once, found at once


def test_a_file_is_read_once_for_all_threads_and_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "known_hosts", line("n1", key("1")))
    reads = []
    real = knownhosts.read_regular

    def counting(path: str) -> tuple[os.stat_result, bytes]:
        reads.append(path)
        return real(path)

    monkeypatch.setattr(knownhosts, "read_regular", counting)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda _: verify(path, "n1", key("1")), range(64)))
    assert len(reads) == 1


def test_a_change_that_no_time_tells_is_seen_where_the_file_was_just_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Same length, same inode, and changed within the same tick of the clock.
    real = knownhosts.stamp_of
    monkeypatch.setattr(knownhosts, "stamp_of", lambda status: (*real(status)[:3], 0, 0))
    monkeypatch.setattr(time, "time_ns", lambda: 0)
    for seed in ("1", "2", "3"):
        path = write(tmp_path / "known_hosts", line("n1", key(seed)))
        verify(path, "n1", key(seed))


def test_what_was_added_is_known_without_reading_the_file_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "known_hosts", *(line(f"o{i}", key("o")) for i in range(50)))
    verify(path, "o1", key("o"))
    monkeypatch.setattr(knownhosts, "read_regular", None)
    for i in range(50):
        verify(path, f"n{i}", key(str(i)), "accept-new")
    for i in range(50):
        verify(path, f"n{i}", key(str(i)))
    monkeypatch.undo()
    os.utime(path, (1, 1))
    assert numbers(path, "n49") == [100]


def test_p19_4000_lines_load_in_linear_time(tmp_path: Path) -> None:
    lines = (line(f"n{i},10.0.{i >> 8}.{i & 255}", key(str(i))) for i in range(4000))
    path = write(tmp_path / "known_hosts", *lines)
    begun = time.process_time()
    verify(path, "n3999", key("3999"))
    for i in range(4000):
        verify(path, f"n{i}", key(str(i)))
    # 0.02 s for the file, 0.1 s for the lookups; paramiko's reader takes 2 s and 4 s.
    assert time.process_time() - begun < 1.5


def test_c08_hashed_names_cost_their_hmacs_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "known_hosts", *(line(hashed(f"n{i}"), key(str(i))) for i in range(2000)))
    counted = []
    real = hmac.digest

    def counting(*args: Any) -> bytes:
        counted.append(1)
        return real(*args)

    monkeypatch.setattr(hmac, "digest", counting)
    for i in range(500):
        hostkeys.load((path,)).key_types(f"n{i}", 22)
        verify(path, f"n{i}", key(str(i)))
    # Who shows a key that is in the file is looked for under that key alone.
    assert len(counted) == 500
    for _ in range(3):
        with pytest.raises(HostKeyMismatch):
            verify(path, "n1", key("other"))
    assert len(counted) == 500 + 2000


@pytest.mark.parametrize("order", ["as in the file", "backwards", "any"])
def test_c08_a_key_that_all_nodes_share_costs_few_hmacs_a_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    count = 2000
    path = write(tmp_path / "known_hosts", *(line(hashed(f"n{i}"), key("clone")) for i in range(count)))
    counted = 0
    real = hashed_lines._first

    def counting(text: bytes, entries: list[Any], begin: int, end: int) -> int | None:
        nonlocal counted
        found = real(text, entries, begin, end)
        counted += (end if found is None else found + 1) - begin
        return found

    monkeypatch.setattr(hashed_lines, "_first", counting)
    asked = list(range(0, count, 8))
    if order == "any":
        random.Random(4).shuffle(asked)
    for i in reversed(asked) if order == "backwards" else asked:
        verify(path, f"n{i}", key("clone"))
    assert counted < count * len(asked) / 8  # half of all, if each were looked for from the beginning
    before = counted
    for i in asked:
        verify(path, f"n{i}", key("clone"))
    assert counted == before + len(asked)
    # and a node that is not there is looked for everywhere
    for name in ("n2000", "N1", "[n1]:2222", "n01", "m1"):
        if name != "N1":
            with pytest.raises(UnknownHostKey):
                verify(path, name, key("clone"))
    verify(path, "N1", key("clone"))


def test_a_node_with_keys_of_several_types_in_hashed_lines_is_asked_for_the_best(tmp_path: Path) -> None:
    rsa, ed = key("r", "ssh-rsa"), key("e")
    path = write(tmp_path / "a", *(line(hashed(f"n{i}"), blob) for i in range(3) for blob in (rsa, ed)))
    assert hostkeys.load((path,)).key_types("n1", 22) == [ED]
    # one that is revoked, here or in another file, is not asked for
    for revoking in (line("*", ed, "@revoked"), line(hashed("n1"), ed, "@revoked")):
        other = write(tmp_path / "b", revoking)
        assert hostkeys.load((path, other)).key_types("n1", 22) == ["ssh-rsa"]
        with pytest.raises(HostKeyRevoked):
            verify((path, other), "n1", ed)
        verify((path, other), "n1", rsa)


def test_a_line_that_is_added_between_two_looks_is_known(tmp_path: Path) -> None:
    path = write(tmp_path / "a", *(line(hashed(f"n{i}"), key(seed)) for i in range(3) for seed in ("x", "y")))
    file = knownhosts.read(path)
    assert file.find_key("n9", key("x")) == []
    file.add(f"{line(hashed('n9'), key('x'))}\n".encode())  # as by another thread that accepts it
    assert file.find("n9", without=key("x")) == ()
    assert [one.number for one in file.find_key("n9", key("x"))] == [7]


def test_a_fork_leaves_the_locks_free(tmp_path: Path) -> None:
    path = write(tmp_path / "known_hosts", line("n1", key("1")))
    code = """
import os, sys
from ctask_tests.known_lines import key, knownhosts, verify
with knownhosts._cache_lock, knownhosts._append_lock:
    pid = os.fork()
    if pid == 0:
        verify(sys.argv[1], "n2", key("2"), "accept-new")
        os._exit(7)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    root = str(Path(__file__).resolve().parent.parent)
    done = subprocess.run([sys.executable, "-c", code, path], check=False, cwd=root, timeout=20)
    assert done.returncode == 7


# --- as OpenSSH reads them


def found_by_ssh_keygen(path: Path, name: str) -> list[int]:
    """The lines that ssh-keygen finds for a name, but for those of certificate authorities."""
    done = subprocess.run(
        [SSH_KEYGEN, "-F", name, "-f", str(path)], check=False, capture_output=True, text=True
    )
    heads = re.findall(r"^# Host .* found: line (\d+)( CA)?", done.stdout, re.MULTILINE)
    return [int(number) for number, authority in heads if not authority]


LABELS = st.text("ab1.-", min_size=1, max_size=4).filter(lambda text: not text.startswith("-"))
NAMES = LABELS | LABELS.map(lambda text: f"[{text}]:2222")
PATTERNS = st.text("ab1.*?[]:2", min_size=1, max_size=5) | st.sampled_from(["*", "[*]:2222", "a*b?*"])
HOSTS = st.lists(NAMES | PATTERNS | PATTERNS.map("!{}".format), min_size=1, max_size=3).map(",".join)
LINES = st.tuples(st.sampled_from(["", "", "", "@revoked", "@cert-authority"]), HOSTS | NAMES.map(hashed))


@needs_ssh_keygen
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(LINES, min_size=1, max_size=6), names=st.lists(NAMES, min_size=1, max_size=3))
def test_lines_are_found_as_ssh_keygen_finds_them(
    tmp_path: Path, lines: list[tuple[str, str]], names: list[str]
) -> None:
    path = tmp_path / "known_hosts"
    text = "".join(f"{line(hosts, key(str(i)), marker)}\n" for i, (marker, hosts) in enumerate(lines))
    path.write_text(text)
    file = knownhosts.HostsFile(str(path), text.encode())
    said = {host for _, hosts in lines for host in hosts.split(",") if not set("|*?!") & set(host)}
    for name in {*names, *said}:
        assert [found.number for found in file.find(name)] == found_by_ssh_keygen(path, name)


# Few names, ports and keys, so that lines, revocations and questions meet.
FEW = st.integers(0, 11).map("n{}".format) | st.integers(0, 3).map("[n{}]:2222".format)
CLONES = st.lists(
    st.tuples(
        st.sampled_from(["", "", "", "", "@revoked", "@cert-authority"]), FEW, st.booleans(), st.sampled_from("ab")
    ),
    min_size=1,
    max_size=24,
)


@needs_ssh_keygen
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=CLONES, more=CLONES, asked=st.lists(FEW, min_size=1, max_size=4, unique=True))
@pytest.mark.parametrize("begin_after", [0, 2])
def test_keys_that_many_nodes_share_are_found_as_ssh_keygen_finds_them(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    begin_after: int,
    lines: list[tuple[str, str, bool, str]],
    more: list[tuple[str, str, bool, str]],
    asked: list[str],
) -> None:
    """In whatever order nodes are asked for, and with lines that are added meanwhile."""
    monkeypatch.setattr(hashed_lines, "NEAR", (1, 2))
    monkeypatch.setattr(hashed_lines, "BEGIN_AFTER", begin_after)
    path, file = tmp_path / "known_hosts", knownhosts.HostsFile("x")
    path.write_text("")
    blobs: dict[int, tuple[bytes, bool]] = {}
    for part in (lines, more):
        text = ""
        for marker, name, hide, seed in part:
            blob = key(seed, ED if seed == "a" else "ssh-rsa")
            blobs[len(blobs) + 1] = blob, marker == "@revoked"
            text += line(hashed(name) if hide else name, blob, marker) + "\n"
        with path.open("a") as out:
            out.write(text)
        file.add(text.encode())
        numbered = {name: found_by_ssh_keygen(path, name) for name in asked}
        for name in asked:
            there = [blobs[number] for number in numbered[name]]
            for blob in {blob for blob, _ in blobs.values()}:
                found = file.find_key(name, blob)
                assert {one.revoked for one in found} == {revoked for same, revoked in there if same == blob}
            # Those that could be asked for: all of them, or one of the best type.
            types = {one.key_type for one in file.find_cheaply(name) if not one.revoked}
            known = {knownhosts.type_of(blob).decode() for blob, revoked in there if not revoked}
            assert types == known or file.only_hashed_type or ED in types <= known
        for name in asked:
            assert [one.number for one in file.find(name)] == numbered[name]


@needs_ssh_keygen
def test_a_file_that_ssh_keygen_hashed_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "known_hosts"
    names = [f"n{i}" for i in range(20)] + ["[n1]:2222", "10.0.0.1"]
    write(path, *(line(name, key(name)) for name in names))
    subprocess.run([SSH_KEYGEN, "-H", "-f", str(path)], check=True, capture_output=True)
    assert "n1 " not in path.read_text()
    for name in names:
        assert [found.blob for found in knownhosts.read(str(path)).find(name)] == [key(name)]
    verify(str(path), "n99", key("n99"), "accept-new")
    assert found_by_ssh_keygen(path, "n99") == [len(names) + 1]


@needs_ssh_keygen
def test_fingerprints_are_ssh_keygens(tmp_path: Path) -> None:
    path = tmp_path / "known_hosts"
    write(path, line("n1", key("1")))
    shown = subprocess.run([SSH_KEYGEN, "-lf", str(path)], capture_output=True, text=True, check=True).stdout
    assert shown.split()[1] == hostkeys.fingerprint(key("1"))
