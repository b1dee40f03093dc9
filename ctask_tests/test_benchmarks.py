# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run: small ones, with ctask as the only peer, since the others are installed by `make bench`."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as program
from benchmarks import fanout
from benchmarks.measure import BenchmarkError, Setup
from benchmarks.peers import expect
from benchmarks.report import Figure, Samples, Target, table, verdicts
from ctask_tests.fix_sshd import find_sshd

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["fanout", "--nodes", "3", "--fanout", "2", "--rounds", "1", "--repeats", "1"]

#: Program -> the smallest sizes at which it says something, and the figures of its table.
PROGRAMS = {
    "idle": (["--nodes", "3", "--seconds", "1"], ["CPU"]),
    "flow": (
        ["--megabytes", "1"],
        ["cold gathered", "gathered", "cold in one piece", "in one piece", "cold CPU", "CPU"],
    ),
    "gather": (["--nodes", "2", "--lines", "500"], ["cold", "warm", "cold CPU", "warm CPU"]),
    "events": (["--lines", "500"], ["lines", "CPU"]),
    "memory": (["--nodes", "4"], ["same", "different"]),
    "nodesets": (
        ["--names", "300", "--nodes", "200", "--grid", "50", "--xnames", "100"],
        [f"fold{what}" for what in ("", " scattered", " 2-D", " 4-D")]
        + ["iterate", "folded operators", "scattered operators", "small", "memory"],
    ),
    "local": (["--commands", "3"], ["wall", "CPU"]),
    "imports": (["--repeats", "1"], ["import"]),
    "late": (["--nodes", "2"], ["node", "nodes at once", "local"]),
    "hostile": (["--floods", "1", "--repeats", "3"], ["alone", "beside one", "beside many"]),
    "head": (["--jobs", "50"], ["submit", "CPU", "wall"]),
}


def only_ctask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing be installed that is compared with ctask."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: real(name) if name == "ctask" else None)


def test_fanout_measures_ctask_and_says_which_peers_are_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_sshd()
    only_ctask(monkeypatch)
    assert program.main(SMALL) == 0
    said = capsys.readouterr()
    assert said.out.startswith("fanout: 3 nodes on one sshd, fan-out 2")
    assert re.search(r"^cold CPU +ctask +\d+\.\d\d .* ms/node +1\.00$", said.out, re.MULTILINE)
    assert re.search(r"^warm wall +ctask +\d+\.\d\d\d .* s +1\.00$", said.out, re.MULTILINE)
    assert said.out.count("not measured") == 9
    missing = re.findall(r"^(\S+) is not installed", said.err, re.MULTILINE)
    assert missing == ["ClusterShell", "asyncssh", "parallel-ssh"]


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_measures_ctask(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    sizes, figures = PROGRAMS[name]
    if program.PROGRAMS[name].arena.__module__ != "benchmarks.contest":  # one that has a server
        find_sshd()
    assert program.main([name, *sizes, "--rounds", "1", "--peers", "ctask"]) == 0
    rows = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines() if " ctask " in line]
    assert rows == figures


def test_a_peer_that_fails_is_told_and_not_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_sshd()
    # The child cannot log in: it is given a user who does not exist.
    monkeypatch.setattr("benchmarks.server.Setup", partial(_made_for_nobody, Setup))
    assert program.main([*SMALL, "--peers", "ctask"]) == 1
    said = capsys.readouterr()
    assert "round 1  ctask         failed with status 1:" in said.err
    assert "3 of 3 nodes did not exit with 0 after b'ok'" in said.err
    assert said.out.count("not measured") == 9


def test_without_a_name_the_programs_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main([]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == ["fanout", *PROGRAMS, "all"]


def test_all_goes_on_after_a_program_that_cannot_be_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[str] = []

    def compete(which: Any, sizes: Any, peers: Any) -> tuple[list[str], bool]:
        done.append(which.name)
        if which.name == "idle":
            raise BenchmarkError("no sshd")
        return [f"{which.name} reached"], False

    monkeypatch.setattr(program, "compete", compete)
    assert program.main(["all", "--quick"]) == 1
    assert done == list(program.PROGRAMS)
    said = capsys.readouterr().out.splitlines()
    assert said[-len(done) :] == [
        "benchmarks: idle: no sshd" if name == "idle" else f"{name} reached" for name in done
    ]


def test_bad_sizes_and_peers_are_refused() -> None:
    command = [sys.executable, "-m", "benchmarks", "fanout"]
    for arguments, text in (
        (["--peers", "clush"], "no such peer: clush; there are ctask, ClusterShell, asyncssh, parallel-ssh"),
        (["--nodes", "1001"], "--nodes is at most 1000"),
        (["--rounds", "0"], "1 or more"),
    ):
        done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert text in done.stderr


def test_a_wrong_answer_is_no_measurement() -> None:
    setup = Setup({}, nodes=["n1", "n2"])
    expect(setup, {"n1": (0, b"ok"), "n2": (0, "ok\n")}, b"ok\n")
    for answers in ({"n1": (0, b"ok")}, {"n1": (0, b"ok"), "n2": (0, b"o")}, {"n1": (0, b"ok"), "n2": (1, b"ok")}):
        with pytest.raises(BenchmarkError, match="1 of 2 nodes did not exit with 0 after b'ok'"):
            expect(setup, answers, b"ok\n")  # type: ignore[arg-type]


def test_a_target_that_is_missed_is_shown_as_lost() -> None:
    samples = Samples()
    for _ in range(3):
        samples.add("ctask", {"cold CPU": 2.0, "cold wall": 0.3, "warm CPU": 0.5})
        samples.add("asyncssh", {"cold CPU": 4.0, "cold wall": 0.2, "warm CPU": 0.5})
    targets = [target for target in fanout.PROGRAM.targets if target.peer == "asyncssh"]
    lines = {line.split()[0]: line.split()[-2:] for line in verdicts(fanout.PROGRAM.figures, targets, samples)}
    assert lines == {"P1": ["0.500", "reached"], "P2": ["1.500", "LOST"], "P3": ["1.000", "LOST"]}
    cells = [line.split() for line in table(fanout.PROGRAM.figures, samples)]
    assert cells[2] == ["asyncssh", "4.00", "4.00..4.00", "ms/node", "2.00"]


def test_targets_can_be_least_values_and_plain_numbers() -> None:
    figures = [Figure("lines", "lines/s"), Figure("grown", "MB more", 1)]
    targets = [
        Target("A", "lines", 25.0, "other", least=True),
        Target("B", "lines", 24.0, "other", least=True),
        Target("C", "grown", 20.0),
        Target("D", "grown", 30.0),
        Target("E", "lines", 1.0, "nobody", least=True),
    ]
    samples = Samples()
    samples.add("ctask", {"lines": 240.0, "grown": 25.0})
    samples.add("other", {"lines": 10.0})
    said = list(verdicts(figures, targets, samples))
    assert [line.split()[-1] for line in said] == ["LOST", "reached", "LOST", "reached", "measured"]
    assert said[2].split() == ["C", "grown", "at", "most", "20.00", "MB", "more", "25.000", "LOST"]
    # A peer that does not give a figure has no row there.
    assert [line.split()[0:2] for line in table(figures, samples)][1:] == [
        ["lines", "ctask"],
        ["other", "10.00"],
        ["grown", "ctask"],
    ]


def test_ratios_compare_rounds_and_not_medians() -> None:
    samples = Samples()
    # Twice as slow as the other in every round, on a machine that was busy in two of three rounds.
    for own, other in ((1.0, 0.5), (8.0, 4.0), (9.0, 4.5)):
        samples.add("ctask", {"cold CPU": own})
        samples.add("asyncssh", {"cold CPU": other})
    assert samples.ratio("ctask", "cold CPU", "asyncssh") == 2.0
    assert samples.spread("ctask", "cold CPU").median == 8.0


def _made_for_nobody(make: Callable[..., Setup], *arguments: Any, **options: Any) -> Setup:
    return replace(make(*arguments, **options), user="nobody-of-that-name")
