# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run: small ones, with ctask as the only peer, since the others are installed by `make bench`."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import __main__ as program
from benchmarks.measure import Cost
from benchmarks.report import Samples, table, verdicts
from ctask_tests.fix_sshd import find_sshd

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["fanout", "--nodes", "3", "--fanout", "2", "--rounds", "1", "--repeats", "1"]


def test_fanout_measures_ctask_and_says_which_peers_are_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_sshd()
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: real(name) if name == "ctask" else None)
    assert program.main(SMALL) == 0
    said = capsys.readouterr()
    assert said.out.startswith("3 nodes on one sshd, fan-out 2, 1 rounds")
    assert re.search(r"^cold +ctask +\d+\.\d\d .* 1\.00$", said.out, re.MULTILINE)
    assert re.search(r"^warm +ctask +\d+\.\d\d .* 1\.00$", said.out, re.MULTILINE)
    assert said.out.count("not measured") == 9
    missing = re.findall(r"^(\S+) is not installed", said.err, re.MULTILINE)
    assert missing == ["ClusterShell", "asyncssh", "parallel-ssh"]


def test_a_peer_that_fails_is_told_and_not_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_sshd()
    # The child cannot log in: it is given a user who does not exist.
    monkeypatch.setattr("benchmarks.fanout.Setup", _nobody)
    assert program.main([*SMALL, "--peers", "ctask"]) == 1
    said = capsys.readouterr()
    assert "round 1  ctask         failed with status 1:" in said.err
    assert "3 of 3 nodes did not answer (0, 'ok')" in said.err
    assert said.out.count("not measured") == 9


def test_bad_sizes_and_peers_are_refused() -> None:
    command = [sys.executable, "-m", "benchmarks", "fanout"]
    for arguments, text in (
        (["--peers", "clush"], "no such peer: clush; there are ctask, ClusterShell, asyncssh, parallel-ssh"),
        (["--nodes", "255"], "--nodes is at most 254"),
        (["--rounds", "0"], "1 or more"),
    ):
        done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert text in done.stderr


def test_a_target_that_is_missed_is_shown_as_lost() -> None:
    samples = Samples(10)
    for _ in range(3):
        samples.add("ctask", Cost(cpu=0.02, wall=0.3), Cost(cpu=0.005, wall=0.1))
        samples.add("asyncssh", Cost(cpu=0.04, wall=0.2), Cost(cpu=0.005, wall=0.1))
    lines = {tuple(line.split()[:3]): line.split()[-2:] for line in verdicts(samples) if "asyncssh" in line}
    assert lines == {
        ("P1", "cold", "cpu"): ["0.500", "reached"],
        ("P2", "cold", "wall"): ["1.500", "LOST"],
        ("P3", "warm", "cpu"): ["1.000", "LOST"],
    }
    cells = [line.split() for line in table(samples)]
    assert cells[2] == ["asyncssh", "4.00", "4.00..4.00", "2.00", "0.200", "0.200..0.200", "0.67"]


def test_ratios_compare_rounds_and_not_medians() -> None:
    samples = Samples(1)
    # Twice as slow as the other in every round, on a machine that was busy in two of three rounds.
    for own, other in ((1.0, 0.5), (8.0, 4.0), (9.0, 4.5)):
        samples.add("ctask", Cost(own, own), Cost(own, own))
        samples.add("asyncssh", Cost(other, other), Cost(other, other))
    assert samples.ratio("ctask", "cold", "cpu", "asyncssh") == 2.0
    assert samples.spread("ctask", "cold", "cpu").median == 8.0


def _nobody(nodes: list[str], **options: object) -> object:
    from benchmarks.peers import Setup

    return Setup(nodes, **{**options, "user": "nobody-of-that-name"})  # type: ignore[arg-type]
