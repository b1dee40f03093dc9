# SPDX-License-Identifier: Apache-2.0
"""The script that ends sessions, by itself: under each shell that this machine has, without SSH.

A shell stands for the connection's process on the node: it starts commands that lead sessions, and the script after
them, as sshd does. Runs in the thread of pytest.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ctask_tests.fix_leaks import process_table, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

SCRIPT = files("ctask.transports.ssh").joinpath("end.sh").read_text()
SHELLS = [[name] for name in ("dash", "bash", "mksh", "ksh", "yash") if shutil.which(name)]
if busybox := shutil.which("busybox"):
    SHELLS.append([busybox, "sh"])

SLEEPS = "echo $$; exec sleep 60"
STUBBORN = "trap '' TERM; echo $$; exec sleep 60"


class Node:
    """A shell that has started commands in sessions of their own, and starts the script when it is told to."""

    def __init__(self, folder: Path, *commands: str) -> None:
        self._folder = folder
        lines = [f"setsid sh -c {quoted(command)} &" for command in commands]
        lines += ['while read -r line; do eval "$line"; done', "kill -s KILL 0"]
        self._shell = subprocess.Popen(
            ["setsid", "sh", "-c", "\n".join(lines)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._shell.stdout is not None
        self.pids = [int(self._shell.stdout.readline()) for _ in commands]
        # By their numbers, which are those of their order: they were started within a moment.
        self.pids.sort()

    def script(self, shell: list[str], arguments: str, text: str = SCRIPT, *, leads: bool = True) -> list[str]:
        """What the script says, with these arguments after the word; without the word."""
        path = self._folder / "end.sh"
        path.write_text(text)
        said = self._folder / "said"
        start = "setsid" if leads else ""
        assert self._shell.stdin is not None
        assert self._shell.stdout is not None
        command = f"{start} {' '.join(shell)} -s w0rd {arguments} <{path} >{said} & wait $!; echo done"
        self._shell.stdin.write(command + "\n")
        self._shell.stdin.flush()
        assert self._shell.stdout.readline() == "done\n"
        lines = said.read_text(encoding="latin-1").splitlines()
        assert all(line.startswith("w0rd ") for line in lines), lines
        return [line.removeprefix("w0rd ") for line in lines]

    def alive(self) -> list[int]:
        """Those of the commands' processes that live."""
        table = process_table()
        return [pid for pid in self.pids if pid in table and table[pid].state != "Z"]

    def close(self) -> None:
        """End all that was started."""
        for pid in self.alive():
            subprocess.run(["kill", "-s", "KILL", "--", f"-{pid}"], check=False)
        assert self._shell.stdin is not None
        assert self._shell.stdout is not None
        self._shell.stdin.close()
        self._shell.wait()
        self._shell.stdout.close()


def quoted(text: str) -> str:
    return "'" + text.replace("'", "'\"'\"'") + "'"


@pytest.fixture(params=SHELLS, ids=[Path(shell[0]).name for shell in SHELLS])
def shell(request: pytest.FixtureRequest) -> list[str]:
    found: list[str] = request.param
    return found


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[Node]]:
    """The nodes that a test has made, which are closed after it."""
    made: list[Node] = []
    yield made
    for node in made:
        node.close()


def make(nodes: list[Node], folder: Path, *commands: str) -> Node:
    nodes.append(Node(folder, *commands))
    return nodes[-1]


def test_it_ends_one_of_three(nodes: list[Node], tmp_path: Path, shell: list[str]) -> None:
    node = make(nodes, tmp_path, SLEEPS, SLEEPS, SLEEPS)
    assert node.script(shell, "kill 100 3 2") == ["ending", "told 2 1", "gone 2"]
    assert node.alive() == [node.pids[0], node.pids[2]]
    assert node.script(shell, "kill 100 2 1 2") == ["ending", "told 1 1", "told 2 1", "gone 1", "gone 2"]


def test_it_kills_after_the_grace_and_not_before(nodes: list[Node], tmp_path: Path, shell: list[str]) -> None:
    node = make(nodes, tmp_path, STUBBORN)
    began = time.monotonic()
    said = node.script(shell, "kill 30 1 1")
    assert 0.3 <= time.monotonic() - began < 1.8
    assert [line.split()[0] for line in said] == ["ending", "told", "proc", "left", "gone"]
    number, pid, state, _, name = said[2].split()[1:]
    assert (number, int(pid), state, name) == ("1", node.pids[0], "S", "sleep")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("a) S 1 2 (b$*\\", "a) S 1 2 (b$*\\"),
        ("x\n1 (y", "y"),
        ("\n1 (x) S 1 1 1 ", "x) S 1 1 1"),
        ("\xff \xe9\t", "\xff \xe9\t"),
    ],
    ids=["fields", "line", "fields-in-a-line", "bytes"],
)
def test_a_name_is_only_a_name(nodes: list[Node], tmp_path: Path, shell: list[str], name: str, told: str) -> None:
    odd = tmp_path.joinpath(os.fsdecode(name.encode("latin-1")))
    shutil.copy(shutil.which("sleep") or "", odd)
    path = tmp_path / "command"
    path.write_bytes(b"trap '' TERM; echo $$; exec " + os.fsencode(quoted(str(odd))) + b" 60")
    node = make(nodes, tmp_path, f". {path}")
    wait_until(lambda: process_table()[node.pids[0]].name != "sh", what="the odd name")
    said = node.script(shell, "term 10 1 1")
    assert said[:2] == ["ending", "told 1 1"]
    assert said[2].startswith(f"proc 1 {node.pids[0]} S ")
    assert said[2].endswith(f" {told}")
    assert said[3:] == ["left 1 1", "alive 1"]
    assert node.alive() == node.pids


def test_it_takes_every_process_of_the_session(nodes: list[Node], tmp_path: Path, shell: list[str]) -> None:
    node = make(nodes, tmp_path, "timeout 60 sleep 50 & sleep 60 & trap 'exit 0' TERM; sleep 0.05; echo $$; wait")
    said = node.script(shell, "kill 100 1 1")
    assert said[:2] == ["ending", "told 1 4"]
    assert said[-1] == "gone 1"
    table = process_table()
    assert not [each for each in table.values() if each.name in {"timeout", "sleep"} and each.parent == node.pids[0]]


def test_what_su_waits_for_is_a_part_of_the_command(nodes: list[Node], tmp_path: Path, shell: list[str]) -> None:
    su = tmp_path / "su"
    shutil.copy(shutil.which("dash") or shutil.which("sh") or "", su)
    # By the name: what another shell starts so has left on purpose.
    inner = quoted(f"setsid sh -c {quoted(STUBBORN)} & wait")
    node = make(nodes, tmp_path, f"exec {su} -c {inner}")
    said = node.script(shell, "kill 30 1 1")
    assert said[:2] == ["ending", "told 1 2"]
    assert {line.split()[2] for line in said if line.startswith("proc")} >= {str(node.pids[0])}
    assert said[-1] == "gone 1"
    assert node.alive() == []


@pytest.mark.parametrize("count", [0, 1, 3])
def test_another_number_of_commands_ends_none(
    nodes: list[Node], tmp_path: Path, shell: list[str], count: int
) -> None:
    node = make(nodes, tmp_path, SLEEPS, SLEEPS)
    assert node.script(shell, f"kill 10 {count} 1") == ["recount 2"]
    assert node.alive() == node.pids


def test_behind_a_wrapper_it_ends_nothing(nodes: list[Node], tmp_path: Path, shell: list[str]) -> None:
    node = make(nodes, tmp_path, SLEEPS)
    assert node.script(shell, "kill 10 1 1", leads=False) == ["unsure"]
    assert node.alive() == node.pids


def test_a_login_shell_that_stays_is_passed_by(nodes: list[Node], tmp_path: Path, shell: list[str]) -> None:
    node = make(nodes, tmp_path, SLEEPS, STUBBORN)
    stays = ["env", "SSH_CONNECTION='127.0.0.9 1 127.0.0.9 2'", "sh", "-c", quoted('"$@"; exit'), "login", *shell]
    assert node.script(stays, "kill 100 2 1") == ["ending", "told 1 1", "gone 1"]
    assert node.alive() == node.pids[1:]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("true", "clean"),
        ("sleep 60", "clean"),  # it runs on, and is no matter
        ("sleep 60 & exit", "unclean"),
        ("setsid sleep 60 & sleep 0.1; exit", "unclean"),  # perhaps by sudo, which is no more
    ],
    ids=["nothing", "running", "child", "leader"],
)
def test_a_look_finds_what_is_left_of_commands_that_have_ended(
    tmp_path: Path, shell: list[str], command: str, said: str
) -> None:
    # In a process table of its own, for there are strangers in this machine's.
    alone = ["unshare", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*alone, "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("only root gives a test a process table of its own")
    (tmp_path / "end.sh").write_text(SCRIPT)
    (tmp_path / "connection").write_text(
        f"setsid sh -c {quoted(command)} >/dev/null 2>&1 &\nsleep 0.3\n"
        f"setsid {' '.join(shell)} -s w0rd look 0 0 <{tmp_path}/end.sh\n:\n"
    )
    done = subprocess.run(
        [*alone, "sh", "-c", f"sh {tmp_path}/connection; :"], check=True, capture_output=True, text=True, timeout=20
    )
    assert (done.stdout, done.stderr) == (f"w0rd {said}\n", "")


def test_a_script_that_was_cut_off_does_nothing(nodes: list[Node], tmp_path: Path, shell: list[str]) -> None:
    node = make(nodes, tmp_path, SLEEPS)
    last = SCRIPT.rindex("ctask_end")
    for end in [100, len(SCRIPT) // 3, len(SCRIPT) // 2, last - 200, last]:
        assert node.script(shell, "kill 10 1 1", SCRIPT[:end]) == []
    assert node.alive() == node.pids


def test_without_proc_it_asks_ps(nodes: list[Node], tmp_path: Path, shell: list[str]) -> None:
    if len(shell) > 1:
        pytest.skip("busybox's own ps knows no sessions, and its sh may prefer it")
    bare = SCRIPT.replace("/proc/", "/nowhere/")
    node = make(nodes, tmp_path, STUBBORN)
    said = node.script(shell, "kill 100 1 1", bare)
    assert [line.split()[0] for line in said] == ["ending", "told", "proc", "left", "gone"]
    assert said[2] == f"proc 1 {node.pids[0]} S 0 sleep"
    two = make(nodes, tmp_path, SLEEPS, SLEEPS)
    assert two.script(shell, "kill 10 2 1", bare) == ["unsure"]  # ps does not tell which was first
    assert two.alive() == two.pids


def test_it_needs_no_pgrep_and_no_children_files() -> None:
    said = "\n".join(line for line in SCRIPT.splitlines() if not line.lstrip().startswith("#"))
    assert set(re.findall(r"/proc/[\w$*]*(?:\[0-9\]\*)?/?\w*", said)) <= {
        "/proc/uptime", "/proc/1/stat", "/proc/$ME/stat", "/proc/[0-9]*/stat", "/proc/$PID/wchan", "/proc/",
        "/proc/$", "/proc/$1/environ", "/proc/$1/fd", "/proc/$1/cgroup", "/proc/$ME/cgroup",
    }
    assert not re.search(r"\b(pgrep|pkill|pidof|killall)\b", said)


def test_a_sleep_without_fractions_will_do(nodes: list[Node], tmp_path: Path) -> None:
    whole = 'sleep() { case $1 in *.*) return 1 ;; esac; command sleep "$1"; }\n' + SCRIPT
    node = make(nodes, tmp_path, SLEEPS)
    assert node.script(["sh"], "kill 300 1 1", whole) == ["ending", "told 1 1", "gone 1"]
