# SPDX-License-Identifier: Apache-2.0
"""What is typed in a shell: the line "safe to repeat", pasted as it stands, and the examples of help and pages."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ctask.cli import arguments, main, nodes
from ctask.errors import ConnectRefused
from ctask.nodes import NodeSet
from ctask.testing import FakeTransport
from ctask_tests.cli_program import ROOT

SHELLS = [shell for shell in ("bash", "zsh") if shutil.which(shell)]
#: With globbing, history and all that a person's shell has, and nothing of anybody's configuration.
INTERACTIVE = {"bash": ["bash", "--noprofile", "--norc", "-i"], "zsh": ["zsh", "-fi"]}
#: Files that an unquoted pattern of the tests and examples would match, as logs that are named after nodes are.
FILES = ("n1", "n7", "n17", "n40", "r1", "=ls", "rack1", "login1", "login", "a", "compute", "broken.txt")


def pasted(shell: str, lines: list[str], where: Path) -> list[list[str]]:
    """Return the words that `ctask` is given by each of these lines."""
    for name in FILES:
        (where / name).touch()
    script = "ctask() { printf '%s\\0' \"$@\"; printf '\\0\\n\\0'; }\n" + "\n".join([*lines, ""])
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "HISTFILE": "/dev/null", "HOME": str(where), "PS1": ""}
    done = subprocess.run(
        INTERACTIVE[shell], input=script.encode(), cwd=where, env=environment, capture_output=True,
        timeout=20, check=False, start_new_session=True,
    )  # fmt: skip
    calls = done.stdout.decode("utf-8", "surrogateescape").split("\0\0\n\0")[:-1]
    assert len(calls) == len(lines), done.stderr.decode()
    return [call.split("\0") for call in calls]


Repeat = Callable[..., str]


@pytest.fixture
def repeat(capfd: pytest.CaptureFixture[str]) -> Repeat:
    """Run a command on nodes none of which is reached, and return what is said to be safe to repeat."""

    def repeat(*words: str) -> str:
        with FakeTransport(lambda *_: [], refuse=lambda *_: ConnectRefused("refused", phase="tcp", kind="refused")):
            assert main([*words, "uptime", "-x"]) in (3, 255)
        lines = capfd.readouterr().err.splitlines()
        return next(line for line in lines if "safe to repeat:" in line).partition(":")[2].strip()

    return repeat


#: What was typed, and what of it is repeated before `-w`.
TYPED: list[tuple[list[str], list[str]]] = [
    ([], []),
    (["-n"], ["-n"]),
    (["-bSn"], ["-b", "-S", "-n"]),
    (["-u30", "-t=5"[:2], "7"], ["-u", "30", "-t", "7"]),
    (["--stop=term", "--stop-grace", "3", "--raw"], ["--stop", "term", "--stop-grace", "3", "--raw"]),
    (["-o", "Port 2222", "-oPort=23"], ["-o", "Port 2222", "-o", "Port=23"]),
    (
        ["-o", "UserKnownHostsFile=/tmp/a b /tmp/it's"],
        ["-o", "UserKnownHostsFile=/tmp/a b /tmp/it's"],
    ),
    (["-oUserKnownHostsFile=$HOME/`id`/\"x\"\\!"], ["-o", "UserKnownHostsFile=$HOME/`id`/\"x\"\\!"]),
    (["-o", "UserKnownHostsFile /tmp/schlüssel ☃"], ["-o", "UserKnownHostsFile /tmp/schlüssel ☃"]),
    (["-o", "UserKnownHostsFile /tmp/a\nb\tc\x1b[1m"], ["-o", "UserKnownHostsFile /tmp/a\nb\tc\x1b[1m"]),
    (
        ["-o", "UserKnownHostsFile /tmp/\udcff\udcfe7 it's"],
        ["-o", "UserKnownHostsFile /tmp/\udcff\udcfe7 it's"],
    ),
    (["--expect", "6", "-f", "8"], ["-f", "8"]),
    (["-x", "r9", "--expect=6", "-u", "4"], ["-u", "4"]),
    (["-l", "root", "-l", "ops"], ["-l", "root", "-l", "ops"]),
    (["-o", "UserKnownHostsFile=it's!!a!u"], ["-o", "UserKnownHostsFile=it's!!a!u"]),
    (["-i", "-k\n'!u'!1\\'!2"], ["-i", "-k\n'!u'!1\\'!2"]),
    (["-i", "=ls", "-i", "~/k", "-i", ""], ["-i", "=ls", "-i", "~/k", "-i", ""]),
]
SET = "r[1-4],~x,=ls"


@pytest.mark.parametrize("shell", SHELLS)
def test_the_line_to_repeat_is_pasted_as_it_stands(shell: str, repeat: Repeat, tmp_path: Path) -> None:
    lines = [repeat(*words, "-n", "-w", SET).replace("…", "uptime") for words, _ in TYPED]
    for (_, kept), words in zip(TYPED, pasted(shell, lines, tmp_path), strict=True):
        assert words[:-3] == [*kept, "-n"]
        assert words[-3::2] == ["-w", "uptime"]
        assert NodeSet(words[-2]) == NodeSet(SET)


ODD = ("=ls", "~", "~root", "%1", "+x", "#n", "n1", "10.0.0.1", "fe80::1%eth0", "_", "=", "a=~", "a#b", "~+", "9")


@pytest.mark.parametrize("shell", SHELLS)
def test_odd_names_are_words_of_a_shell(shell: str, repeat: Repeat, tmp_path: Path) -> None:
    lines = [repeat("-n", "-w", node).replace("…", "uptime") for node in ODD]
    assert pasted(shell, lines, tmp_path) == [["-n", "-w", node, "uptime"] for node in ODD]


@pytest.mark.parametrize("shell", SHELLS)
def test_a_long_set_is_pasted_whole(shell: str, repeat: Repeat, tmp_path: Path) -> None:
    names = NodeSet.fromlist(f"rack{number * 7919 % 10_007}-{number % 7}" for number in range(2000))
    listed = tmp_path / "nodes"
    listed.write_text("\n".join(names))
    line = repeat("-n", "--hostfile", str(listed)).replace("…", "uptime")
    assert len(line) > 4096  # what a terminal takes as a line without an editor
    [words] = pasted(shell, [line], tmp_path)
    assert (words[:2], words[-1]) == (["-n", "-w"], "uptime")
    assert NodeSet(words[2]) == names


def test_the_set_stands_for_all_options_that_named_nodes(repeat: Repeat, tmp_path: Path) -> None:
    listed, conf = tmp_path / "nodes", tmp_path / "groups.conf"
    listed.write_text("r3 # r9\n")
    conf.write_text("[site]\nmapall: echo 'a: r[1-2]'; echo 'b: r2'; echo 'c: r4'\nall: echo 'r[1-5]'\n")
    conf.chmod(0o600)
    words = ["--groupsconf", str(conf), "-s", "site"]
    due = f"ctask --groupsconf {conf} -s site -u 5 -n -w {{}} …"
    assert repeat(*words, "-g", "a", "-X", "b", "--hostfile", str(listed), "-u", "5", "-n") == due.format("'r[1,3]'")
    assert repeat(*words, "-a", "-x", "@c", "--expect", "4", "-u5", "-n") == due.format("'r[1-3,5]'")
    assert repeat(*words, "--all", "--group=a", "-u5", "-n") == due.format("'r[1-5]'")


# -- examples ------------------------------------------------------------------------------------------------------


def examples() -> list[tuple[str, str]]:
    """Return the command lines that pages and help show, with where they stand."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    texts = [(page.name, page.read_text()) for page in pages if page.name != "CHANGELOG.md"]
    texts += [("ctask --help", arguments.HELP), ("ctask nodes --help", nodes.HELP)]
    found = []
    for where, text in texts:
        # A line that begins with it, and what stands behind it after a gap; or a piece of a sentence.
        found += [(where, line) for line in re.findall(r"(?m)^ *(ctask (?!knows|runs|is\b).*?)(?=   |$)", text)]
        found += [(where, line) for line in re.findall(r"`(ctask [^`]*)`", text)]
    return [(where, line) for where, line in found if re.match(r"ctask (-|nodes|run)", line)]


def test_examples_are_found() -> None:
    assert len(examples()) > 12
    assert {where for where, _ in examples()} >= {"README.md", "groups.md", "ctask --help", "ctask nodes --help"}


@pytest.mark.parametrize("shell", SHELLS)
def test_examples_reach_ctask_as_they_are_written(shell: str, tmp_path: Path) -> None:
    lines = [line for _, line in examples()]
    for (where, line), words in zip(examples(), pasted(shell, lines, tmp_path), strict=True):
        expected = shlex.split(line.partition(" < ")[0], comments=True)[1:]
        assert [word.replace(str(tmp_path), "~") for word in words] == expected, where
