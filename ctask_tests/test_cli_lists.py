# SPDX-License-Identifier: Apache-2.0
"""Nodes that are listed in files and on standard input: who is named, who is not, and what is no list."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ctask.cli import arguments, listed, main
from ctask.cli.listed import Lists
from ctask.errors import OptionError, UsageError
from ctask_tests.cli_program import ROOT

#: What stands in a list, and the nodes that it names.
LISTS: list[tuple[bytes, str]] = [
    (b"# rack 1\nn1\nn2 # n3\n", "n[1-2]"),
    (b"n1\n#n2\n # n3 n4\nn5#n6\nn7 ## n8 # n9\n", "n[1,5,7]"),
    (b"n1 # was: n[5\n", "n1"),
    (b"n1 # was: @pord\n", "n1"),
    (b"n1 # ;rm -rf /\n", "n1"),
    (b"n1\r\nn2 # n3\r\n\r\nn4\r\n", "n[1-2,4]"),
    (b"\xef\xbb\xbfn1\nn2\n", "n[1-2]"),
    (b"\xef\xbb\xbf# n1\nn2\n", "n2"),
    (b"\n\n  \t n[1-2]\tn7 \n\v\n\fn9", "n[1-2,7,9]"),
    (b"n[1-9]!n[2-8]\nm[1-2/1]\n", "m[1-2],n[1,9]"),
    (b"n1 # Ger\xe4t \xff\n", "n1"),
    ("n1 # Gerät №2\u2028 n2\n".encode(), "n1"),
    (b"n1 #", "n1"),
    (b"n1 # a\r", "n1"),
    (b"n1\rn2\r", "n[1-2]"),
]

#: What is refused, and what is said of it behind the name of the list.
REFUSED: list[tuple[bytes, str]] = [
    (b"n1\nn2 n[3 # x\n", ":2: bad node set"),
    (b"# n1\n\nn2;reboot\n", ":3: bad node name 'n2;reboot'"),
    (b"n1\n-oProxyCommand=x\n", ":2: bad node name"),
    (b"n1\nger\xe4t\n", ":2: bad node name"),
    (b"n1\0n2\n", ":1: no list of nodes"),
    (b"n1\nn2 # \0\n", ":2: no list of nodes"),
    ("n1\n".encode("utf-16"), ":1: no list of nodes"),
    (b"n1\r# n2\rn3\r", ":1: a carriage return stands in a comment"),
    (b"n1 # n2\r n3\n", ":1: a carriage return stands in a comment"),
]


def asked(*words: str) -> arguments.Request:
    return arguments.request(arguments.read(words))


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    def typed(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    return typed


@pytest.mark.parametrize(("data", "due"), LISTS)
def test_every_reader_of_lists_takes_the_same_nodes(
    data: bytes, due: str, tmp_path: Path, typed: Callable[[bytes], None], capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "nodes"
    path.write_bytes(data)
    assert str(asked("--hostfile", str(path), "true").nodes) == due
    for words in (("--hostfile", "-"), ("-w", "-"), ("--hostfile=/dev/stdin",), ("-w-",)):
        typed(data)
        assert str(asked(*words, "true").nodes) == due
    typed(data)
    everything = asked("-w", "n[1-99],m[1-99]", "true").nodes
    assert asked("-w", "n[1-99],m[1-99]", "-x", "-", "true").nodes == everything - asked("-w", due, "true").nodes
    for more in ([], ["-"]):
        typed(data)
        assert main(["nodes", "-f", *more]) == 0
        assert capfd.readouterr() == (f"{due}\n", "")


@pytest.mark.parametrize(("data", "text"), REFUSED)
def test_what_is_no_list_is_refused_with_its_place(
    data: bytes, text: str, tmp_path: Path, typed: Callable[[bytes], None], capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "nodes"
    path.write_bytes(data)
    with pytest.raises(OptionError) as caught:
        asked("--hostfile", str(path), "true")
    assert str(caught.value).startswith(f"{path}{text}")
    typed(data)
    with pytest.raises(OptionError) as caught:
        asked("-w", "n1", "-x", "-", "true")
    assert str(caught.value).startswith(f"standard input{text}")
    typed(data)
    assert main(["nodes", "-f"]) == 2
    assert capfd.readouterr().err.startswith(f"ctask: standard input{text}")


def test_lists_add_up_and_are_taken_out(tmp_path: Path, typed: Callable[[bytes], None]) -> None:
    for name, text in (("a", "n[1-4] # n9\n"), ("b", "m1\n")):
        (tmp_path / name).write_text(text)
    typed(b"n[2-3] # n1\n")
    files = ["--hostfile", str(tmp_path / "a"), "--hostfile", str(tmp_path / "b")]
    assert str(asked(*files, "-w", "k1", "-x", "-", "true").nodes) == "k1,m1,n[1,4]"


def test_groups_and_expressions_stand_in_lists(tmp_path: Path) -> None:
    conf, path = tmp_path / "groups.conf", tmp_path / "nodes"
    conf.write_text("[s]\nmapall: echo 'a: n[1-9]'; echo 'b: n[3-4]'\nall: echo 'n[1-9]'\n")
    conf.chmod(0o600)
    path.write_text("@a!@b!n5  # @c\nm[1-2]&m2\n")
    words = ["--groupsconf", str(conf), "--hostfile", str(path)]
    assert str(asked(*words, "true").nodes) == "m2,n[1-2,6-9]"
    path.write_text("n1 # x\nn2 @c\n")
    with pytest.raises(OptionError, match=rf"^{path}:2: no such group: @c "):
        asked(*words, "true")


@pytest.mark.parametrize("data", [b"", b"\n", b"# n1\n", b"\xef\xbb\xbf"])
def test_an_empty_list_names_nobody(data: bytes, tmp_path: Path, typed: Callable[[bytes], None]) -> None:
    path = tmp_path / "nodes"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=r"no nodes in --hostfile .*Nothing was run"):
        asked("--hostfile", str(path), "true")
    typed(data)
    with pytest.raises(UsageError, match=r"no nodes in -w '-'\. Nothing was run"):
        asked("-w", "-", "true")
    typed(data)
    assert str(asked("-w", "n1", "-x", "-", "true").nodes) == "n1"


def test_files_that_cannot_be_read_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, text in (
        (str(tmp_path), "Is a directory"),
        (str(tmp_path / "none"), "No such file"),
        ("", "No such file"),
        ("a\0b", "null byte"),
    ):
        with pytest.raises(OptionError, match=text) as caught:
            asked("--hostfile", path, "true")
        assert str(caught.value).startswith(f"--hostfile {path!r}: ")
    monkeypatch.setattr(listed, "MOST", 1 << 20)
    with pytest.raises(OptionError, match="longer than 1 MiB"):
        asked("--hostfile", "/dev/zero", "true")


def test_a_named_pipe_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)

    def write() -> None:
        with path.open("wb", buffering=0) as pipe:
            pipe.write(b"n1\nn")
            time.sleep(0.05)  # as two programs would write; nothing depends on it
            pipe.write(b"2 # n3\n")

    writer = threading.Thread(target=write)
    writer.start()
    assert str(asked("--hostfile", str(path), "true").nodes) == "n[1-2]"
    writer.join()


def test_standard_input_that_does_not_block_is_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    # Half of an exclusion is worse than none. `ssh` and others leave a shared pipe like this.
    reader, writer = os.pipe()
    fcntl.fcntl(reader, fcntl.F_SETFL, fcntl.fcntl(reader, fcntl.F_GETFL) | os.O_NONBLOCK)

    def end() -> None:
        os.write(writer, b"2\nn3\n")
        os.close(writer)

    late = threading.Timer(0.1, end)
    with os.fdopen(reader) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        os.write(writer, b"n1\nn")
        late.start()
        assert str(asked("-w", "n[1-9]", "-x", "-", "true").nodes) == "n[4-9]"
    late.join()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["-w", "-", "-x", "-"], "-w - and -x - both read standard input, which can be read once"),
        (["-w", "-", "--hostfile", "-"], "-w - and --hostfile '-' both read"),
        (["--hostfile", "/dev/stdin", "-x", "-"], "--hostfile '/dev/stdin' and -x - both read"),
        (["--stdin", "-w", "-"], "-w - reads the nodes from standard input, and --stdin sends it"),
        (["--stdin", "-w", "n1", "-x", "-"], "-x - reads the nodes"),
        (["--stdin", "--hostfile", "-"], "--hostfile - reads the nodes"),
        (["--stdin", "--hostfile", "/dev/stdin"], "--hostfile /dev/stdin reads the nodes"),
    ],
)
def test_standard_input_has_one_reader(typed: Callable[[bytes], None], words: list[str], text: str) -> None:
    typed(b"n1\n")
    with pytest.raises(OptionError) as caught:
        asked(*words, "true")
    assert text in str(caught.value)


def test_standard_input_has_one_reader_in_nodes_too(
    typed: Callable[[bytes], None], capfd: pytest.CaptureFixture[str]
) -> None:
    for words, first in ((["-", "-x", "-"], "-"), (["-x", "-"], "no node set on the line")):
        typed(b"n1\n")
        assert main(["nodes", "-f", *words]) == 2
        assert f"ctask: {first} and -x - both read standard input" in capfd.readouterr().err


def run(*words: str, **arguments: object) -> tuple[int, str, str]:
    done = subprocess.run(
        [*words], cwd=ROOT, capture_output=True, text=True, timeout=20, check=False, **arguments  # type: ignore[call-overload]
    )
    return done.returncode, done.stdout, done.stderr


def test_a_closed_standard_input_has_no_nodes() -> None:
    command = 'exec "$@" <&-'
    words = ["sh", "-c", command, "sh", sys.executable, "-m", "ctask"]
    assert run(*words, "-w", "-", "true") == (2, "", "ctask: -w -: standard input is closed\n")
    said = "ctask: no node set on the line: standard input is closed\n"
    assert run(*words, "nodes", "-f") == (2, "", said)


def test_a_socket_is_read_by_its_name_as_well() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(b"n1 # n2\n")
        ours.shutdown(socket.SHUT_WR)
        words = [sys.executable, "-m", "ctask", "--hostfile", "/dev/stdin", "--expect", "2", "true"]
        code, _, err = run(*words, stdin=theirs)
    assert (code, err) == (2, "ctask: expected 2 nodes, and there are 1: n1. Nothing was run\n")


def test_on_a_terminal_the_nodes_are_asked_for() -> None:
    leader, follower = pty.openpty()
    try:
        os.write(leader, b"n[1-2] # n3\n\x04")
        words = [sys.executable, "-m", "ctask", "nodes", "-f", "-"]
        code, out, err = run(*words, stdin=follower)
    finally:
        os.close(leader)
        os.close(follower)
    assert (code, out, err) == (0, "n[1-2]\n", "ctask: type the nodes; Ctrl-D on a line of its own ends them\n")


def test_many_nodes_are_read_at_once(tmp_path: Path) -> None:
    path = tmp_path / "nodes"
    path.write_text("".join(f"n{number} # rack {number // 40}\n" for number in range(30_000)))
    assert len(asked("--hostfile", str(path), "true").nodes) == 30_000
    assert Lists().words(str(path), "--hostfile")[-1].where == f"{path}:30000"


def test_e04_a_name_of_a_file_makes_no_line_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--hostfile", "a\nctask: all is well\x1b[2J", "true"]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert err[:-1].isprintable()
