# SPDX-License-Identifier: Apache-2.0
"""Standard input that no node gets: what is said of it, when, and where the run is refused."""

from __future__ import annotations

import os
import pty
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ctask.cli import main
from ctask.cli.feed import Unread, unread
from ctask.testing import FakeTransport, Step
from ctask_tests.cli_program import ROOT, Cli
from ctask_tests.fake_nodes import nodes, says
from ctask_tests.fix_sshd import Sshd

MENTIONED = "ctask: standard input is {} with data that no node gets; --stdin sends it, -n keeps this quiet\n"
REFUSED = (
    "ctask: standard input is a file, and no node would get it: --stdin sends it to the command, -n runs the command "
    "without it. Nothing was run\n"
)
PIPE, SOCKET, BEGUN = Unread("a pipe"), Unread("a socket"), Unread("a file")
WHOLE = Unread("a file", untouched=True)


# -- what it is ----------------------------------------------------------------------------------------------------


def _pipe(data: bytes, *, ended: bool) -> list[int]:
    reader, writer = os.pipe()
    os.write(writer, data)
    if ended:
        os.close(writer)
    return [reader] if ended else [reader, writer]


def _socket(data: bytes, kind: int = socket.SOCK_STREAM) -> list[int]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    if data:
        ours.send(data)
    return [theirs.detach(), ours.detach()]


def _file(data: bytes, *, at: int = 0, flags: int = os.O_RDONLY) -> list[int]:
    made, path = tempfile.mkstemp()
    try:
        os.write(made, data)
        os.close(made)
        fd = os.open(path, flags)
    finally:
        os.unlink(path)
    os.lseek(fd, at, os.SEEK_SET)
    return [fd]


def _listening() -> list[int]:
    return [socket.create_server(("127.0.0.1", 0)).detach()]


def _typed_ahead() -> list[int]:
    leader, follower = pty.openpty()
    os.write(leader, b"data\n")
    return [follower, leader]


KINDS: list[tuple[str, Callable[[], list[int]], Unread | None]] = [
    ("a pipe with data", lambda: _pipe(b"x", ended=False), PIPE),
    ("a pipe with data, whose writer is gone", lambda: _pipe(b"x", ended=True), PIPE),
    ("a pipe whose writer is slow", lambda: _pipe(b"", ended=False), None),
    ("an empty pipe", lambda: _pipe(b"", ended=True), None),
    ("a socket with data, as sshd gives", lambda: _socket(b"x"), SOCKET),
    ("datagrams", lambda: _socket(b"x", socket.SOCK_DGRAM), SOCKET),
    ("an idle socket", lambda: _socket(b""), None),
    ("a socket that listens, as inetd gives", _listening, None),
    ("a terminal with something typed ahead", _typed_ahead, None),
    ("a file from its start", lambda: _file(b"ab"), WHOLE),
    ("a file that was begun", lambda: _file(b"ab", at=1), BEGUN),
    ("a file at its end", lambda: _file(b"ab", at=2), None),
    ("a file beyond its end", lambda: _file(b"ab", at=9), None),
    ("an empty file", lambda: _file(b""), None),
    ("a file for reading and writing", lambda: _file(b"ab", flags=os.O_RDWR), WHOLE),
    ("a log that is appended to", lambda: _file(b"ab", flags=os.O_WRONLY | os.O_APPEND), None),
    ("a log from its start", lambda: _file(b"ab", flags=os.O_RDWR | os.O_APPEND), WHOLE),
    ("a log at its end", lambda: _file(b"ab", at=2, flags=os.O_RDWR | os.O_APPEND), None),
    ("a file of the kernel, whose size is 0", lambda: [os.open("/proc/cpuinfo", os.O_RDONLY)], WHOLE),
    ("/dev/null", lambda: [os.open("/dev/null", os.O_RDONLY)], None),
    ("/dev/null as nohup gives it", lambda: [os.open("/dev/null", os.O_WRONLY)], None),
    ("/dev/zero", lambda: [os.open("/dev/zero", os.O_RDONLY)], None),
    ("a folder", lambda: [os.open("/", os.O_RDONLY)], None),
]


@pytest.mark.parametrize(("make", "due"), [kind[1:] for kind in KINDS], ids=[kind[0] for kind in KINDS])
def test_what_standard_input_is(
    make: Callable[[], list[int]], due: Unread | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    descriptors = make()

    class Stdin:
        def fileno(self) -> int:
            return descriptors[0]

    monkeypatch.setattr(sys, "stdin", Stdin())
    try:
        assert unread() == due
        assert unread() == due  # the look takes nothing
    finally:
        for fd in descriptors:
            os.close(fd)


def test_what_is_no_file_of_the_system_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert unread() is None


# -- what is done about it -----------------------------------------------------------------------------------------


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[list[int]], None]]:
    opened: list[int] = []

    def given(descriptors: list[int]) -> None:
        opened.extend(descriptors)
        monkeypatch.setattr(sys, "stdin", os.fdopen(descriptors[0], closefd=False))

    yield given
    for fd in opened:
        os.close(fd)


def test_it_is_told_once_before_anything_is_sent(
    given: Callable[[list[int]], None], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    steps = [
        Step("call", call=lambda: told.append(capfd.readouterr().err)),
        *says(b"ok\n", 7),
    ]
    given(_pipe(b"data\n", ended=False))
    with FakeTransport(nodes(steps)):
        assert main(["-S", "-w", "n1", "cat > /etc/f"]) == 7
    assert told == [MENTIONED.format("a pipe")]
    out, err = capfd.readouterr()
    assert out == "n1: ok\n"
    assert "standard input" not in err


def test_a_pipe_whose_writer_is_slow_is_told_of_at_the_end(
    given: Callable[[list[int]], None], capfd: pytest.CaptureFixture[str]
) -> None:
    descriptors = _pipe(b"", ended=False)
    given(descriptors)
    steps = [Step("call", call=lambda: os.write(descriptors[1], b"late\n")), *says(b"ok\n")]
    with FakeTransport(nodes(steps)):
        assert main(["-w", "n1", "cat > /etc/f"]) == 0
    assert capfd.readouterr().err == MENTIONED.format("a pipe")


def test_a_file_from_its_start_is_refused(
    given: Callable[[list[int]], None], capfd: pytest.CaptureFixture[str]
) -> None:
    given(_file(b"data\n"))
    with FakeTransport(nodes()) as fake:
        assert main(["-w", "n1", "cat > /etc/f"]) == 2
        assert capfd.readouterr() == ("", REFUSED)
        assert fake.sessions == []
        assert main(["-n", "-w", "n1", "cat > /etc/f"]) == 0
        assert capfd.readouterr() == ("n1: ok\n", "")
        assert len(fake.sessions) == 1
        os.read(sys.stdin.fileno(), 100)
        assert main(["-w", "n1", "true"]) == 0  # it is at its end now
    assert capfd.readouterr() == ("n1: ok\n", "")


def test_a_file_that_was_begun_belongs_to_a_loop(
    given: Callable[[list[int]], None], capfd: pytest.CaptureFixture[str]
) -> None:
    given(_file(b"n1\nn2\n", at=3))
    with FakeTransport(nodes(says(b"ok\n", 1))):
        assert main(["-w", "n1", "cat"]) == 1
    assert capfd.readouterr().err.startswith(MENTIONED.format("a file"))


def test_nothing_is_said_where_the_nodes_were_read_from_it(
    given: Callable[[list[int]], None], capfd: pytest.CaptureFixture[str]
) -> None:
    given(_file(b"n1 # n2\n"))
    with FakeTransport(nodes()):
        assert main(["-w", "-", "true"]) == 0
    assert capfd.readouterr() == ("n1: ok\n", "")


@pytest.fixture
def cli(sshd: Sshd) -> Iterator[Cli]:
    yield Cli(sshd)
    sshd.wait_idle()


def test_a_command_that_would_empty_a_file_is_not_sent(cli: Cli, sshd: Sshd, tmp_path: Path) -> None:
    target = tmp_path / "f"
    source = tmp_path / "input"
    source.write_text("data\n")
    before = len(sshd.log())
    with source.open() as file:
        assert cli("-w", "127.0.1.1", f"cat > {target}", stdin=file) == (2, b"", REFUSED)
    assert "Connection from" not in sshd.log(before)
    assert not target.exists()


@pytest.mark.parametrize("shell", ["bash", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sh", "zsh"))])
def test_loops_go_on_and_lose_nothing(cli: Cli, shell: str, tmp_path: Path) -> None:
    if not shutil.which(shell):
        pytest.skip(f"there is no {shell}")
    (tmp_path / "nodes").write_text("127.0.1.1\n127.0.1.2\n")
    loop = 'while read -r n; do "$@" -w "$n" "cat; echo got; exit 5" || echo $?; done'
    due = "".join(f"127.0.1.{number}: got\n1\n" for number in (1, 2))
    for script, what in ((f"cat nodes | {loop}", ""), (f"{loop} <nodes", MENTIONED.format("a file"))):
        words = [shell, "-c", script, shell, sys.executable, "-m", "ctask", *cli.way]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=30, check=False
        )
        assert done.stdout == due
        assert what in done.stderr


@pytest.mark.parametrize("shell", ["bash", "sh", "zsh"])
def test_here_documents_are_pipes_or_files(cli: Cli, shell: str) -> None:
    if not shutil.which(shell):
        pytest.skip(f"there is no {shell}")
    script = 'exec "$@" -w 127.0.1.1 "cat; echo got" <<E\ndata\nE'
    words = [shell, "-c", script, shell, sys.executable, "-m", "ctask", *cli.way]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    told = (done.returncode, done.stdout, done.stderr)
    assert told in ((2, "", REFUSED), (0, "127.0.1.1: got\n", MENTIONED.format("a pipe")))
