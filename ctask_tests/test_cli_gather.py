# SPDX-License-Identifier: Apache-2.0
"""`-b` and `-B` beside the released `clush` of ClusterShell 1.10.1, as a black box; and the exit statuses of both."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ctask.cli import main
from ctask.errors import ConnectionLost
from ctask.testing import FakeTransport, Step
from ctask_tests.cli_program import ROOT, Cli
from ctask_tests.fake_nodes import HANGS, nodes, says
from ctask_tests.fix_sshd import Sshd

CLUSH = Path(sys.executable).with_name("clush")

#: How a command knows which node it is on: by ssh, and as a local command of clush.
OURS, THEIRS = "set -- $SSH_CONNECTION; n=${3##*.}\n", "n=%h; n=${n##*.}\n"
#: What each node prints and exits with; node numbers before the parenthesis. Pauses keep two streams in order.
SCRIPT = r"""
case $n in
1|2|13) echo same; echo "of $n" >&2;;
3) printf same;;
4) printf 'same\r\n';;
5) printf 'same\n\n';;
6) echo;;
7) printf '\n\n';;
8) true;;
9) echo only an error >&2;;
10) echo out; sleep 0.3; echo err >&2; sleep 0.3; echo out again;;
11|12) echo failed; echo why >&2; exit 3;;
14) echo same; exit 3;;
15) echo same; exit 1;;
16) printf 'no end' >&2;;
17) echo other; kill -9 $$;;
18) printf '\303\251 \t \342\202\254\n';;
esac
"""
NODES = "127.0.1.[1-18]"
#: How a block whose nodes did not exit with 0 says so; clush says it on standard error.
HOW = re.compile(r"(?m)^(\S+) \((\d+)\): (?:exit \d+|killed by SIG[A-Z]+)$")


@pytest.fixture
def cli(sshd: Sshd) -> Iterator[Cli]:
    yield Cli(sshd)
    sshd.wait_idle()


def clush(*words: str) -> subprocess.CompletedProcess[bytes]:
    if not CLUSH.exists():
        pytest.skip("ClusterShell's clush is not installed beside this Python")
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    command = [str(CLUSH), "-n", "-f", "64", "-R", "exec", *words[:-1], THEIRS + words[-1]]
    return subprocess.run(command, capture_output=True, timeout=25, check=False, cwd="/", env=environment)


def without_statuses(out: bytes) -> str:
    """Return gathered output as clush has it: the count of one node is not told."""
    return HOW.sub(lambda found: found[1] if found[2] == "1" else f"{found[1]} ({found[2]})", out.decode())


@pytest.mark.parametrize("option", ["-b", "-B", "-bB"])
def test_blocks_are_those_of_clush(cli: Cli, option: str) -> None:
    theirs = clush(option, "-w", NODES, SCRIPT)
    code, out, err = cli(option, "--raw", "-w", NODES, OURS + SCRIPT)
    assert code == 1
    assert without_statuses(out) == theirs.stdout.decode()
    assert theirs.stdout.count(b"---------------\n") > 16
    # What the nodes print there, and not how each of the two tells of statuses.
    said = {line for line in theirs.stderr.decode().splitlines() if line.startswith("127")}
    assert {line for line in err.splitlines() if line.startswith("127")} == said
    assert len(said) == (8 if option == "-b" else 0)
    blocks = [line for line in out.decode().splitlines() if line.startswith("127")]
    assert [line for line in blocks if ": " in line] == [
        "127.0.1.15 (1): exit 1",
        "127.0.1.[11-12] (2): exit 3",
        "127.0.1.14 (1): exit 3",
        "127.0.1.17 (1): killed by SIGKILL",
    ]


@pytest.mark.parametrize(
    "command",
    [
        "exit 0",
        "exit $n",
        "case $n in 1) exit 4;; 2) exit 200;; esac",
        "exit 255",
        "kill -9 $$",
        "case $n in 1) kill -15 $$;; *) exit 150;; esac",
        "case $n in 1) kill -15 $$;; *) exit 140;; esac",
        "case $n in 1) exec sleep 9;; *) exit 4;; esac",
    ],
)
def test_the_largest_status_is_that_of_clush(cli: Cli, command: str) -> None:
    words = ["-S", "-u", "1", "-w", "127.0.1.[1-3]"]
    code, _, err = cli(*words, OURS + command)
    assert code == clush(*words, command).returncode
    assert err.endswith(f"ctask: exit {code}\n" if code else "  127.0.1.[1-3]\n")


# -- on fake nodes -------------------------------------------------------------------------------------------------


def statuses(*words: str, **scripts: list[Step]) -> int:
    with FakeTransport(nodes(**scripts)):
        return main(["-n", *words, "-w", ",".join(scripts), "cmd"])


@pytest.mark.parametrize("status", [256, 512, 65_536, 3_221_225_472, 2**32 - 1])
def test_a_status_that_the_system_cannot_pass_on_is_told(status: int, capfd: pytest.CaptureFixture[str]) -> None:
    assert statuses("-S", n1=says(b"x\n", status), n2=says(b"x\n", 2), n3=says(b"x\n")) == 255
    assert capfd.readouterr().err.splitlines()[-1] == f"ctask: exit 255 (the largest status is {status})"
    assert statuses(n1=says(b"x\n", status)) == 1
    assert capfd.readouterr().err.splitlines()[-1] == "ctask: exit 1"
    program = "import sys; from ctask.cli import main; from ctask.testing import FakeTransport, Step\n"
    program += f"with FakeTransport(lambda *_: [Step('exit', status={status})]): sys.exit(main())"
    words = [sys.executable, "-c", program, "-n", "-S", "-w", "n1", "cmd"]
    assert subprocess.run(words, cwd=ROOT, capture_output=True, timeout=20, check=False).returncode == 255


def test_a_node_without_a_status_counts_as_255(capfd: pytest.CaptureFixture[str]) -> None:
    lost = [Step("running"), Step("lost", error=ConnectionLost(phase="running"))]
    assert statuses("-S", "-u", "0.2", n1=says(b"x\n", 3), n2=HANGS) == 255
    assert capfd.readouterr().err.splitlines()[-1] == "ctask: exit 255"
    assert statuses("-S", n1=says(b"x\n", 3), n2=lost) == 255
    assert capfd.readouterr().err.splitlines()[-1] == "ctask: exit 255"
    assert statuses("-S", "-u", "0.2", n1=says(b"x\n", 300), n2=HANGS) == 255
    assert capfd.readouterr().err.splitlines()[-1] == "ctask: exit 255 (the largest status is 300)"
    assert statuses("-S", n1=says(b"x\n", 255)) == 255
    assert capfd.readouterr().err.splitlines()[-1] == "ctask: exit 255"


def test_a_block_says_how_its_nodes_ended(capfd: pytest.CaptureFixture[str]) -> None:
    same = Step("out", b"same\n")
    assert statuses(
        "-b", "-u", "0.3",
        n1=says(b"same\n"), n2=says(b"same\n", 1), n3=[Step("running"), same, Step("end", after=600)],
        n4=[Step("running"), same, Step("lost", error=ConnectionLost(phase="running"))],
        n5=[Step("running"), same, Step("signal", b"SEGV")],
    ) == 3  # fmt: skip
    out = capfd.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("n")] == [
        "n1",
        "n2 (1): exit 1",
        "n5 (1): killed by SIGSEGV",
        "n4 (1): connection lost",
        "n3 (1): timeout after 0.3 s",
    ]
    assert out.count("same\n") == 5


def test_an_empty_line_is_shown_and_silence_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    scripts = {"n1": says(b"\n"), "n2": says(), "n3": says(err=b"\n")}
    assert statuses("-b", **scripts) == 0
    out, err = capfd.readouterr()
    assert out == "---------------\nn1\n---------------\n\n"
    assert err.splitlines()[0] == "n3: "
    assert err.splitlines()[2:] == ["  exit 0, no output  n2"]


def test_standard_error_is_passed_on_while_the_command_runs(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    seen = b""

    def look() -> None:
        nonlocal seen
        while seen.count(b"\n") < 2:
            seen += os.read(reader, 100)

    hasty = [Step("running"), Step("out", b"a\nb\n"), Step("err", b"e1\ne2\n\x1b[2Je3"), Step("out", b"c\n")]
    with os.fdopen(reader), os.fdopen(writer, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        # It ends when both lines were read, and not before.
        assert statuses("-b", n1=[*hasty, Step("call", call=look), Step("exit")]) == 0
        assert seen == b"n1: e1\nn1: e2\n"
        assert os.read(reader, 100) == b"n1: \\x1b[2Je3\n"
    assert capfd.readouterr().out == "---------------\nn1\n---------------\na\nb\nc\n"
