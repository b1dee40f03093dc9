# SPDX-License-Identifier: Apache-2.0
"""How a program is run: one peer after the other, round by round (A B C D A B C D …), each in a fresh process.

`Program` is the record that every program is; `compete` carries it out. Runs in the main thread of
`python -m benchmarks`; nothing is shared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from benchmarks.measure import BenchmarkError, Sample, Setup
from benchmarks.report import Figure, Samples, Target, table, verdicts

__all__ = ["Arena", "Program", "alone", "compete", "installed"]

ROOT = Path(__file__).resolve().parent.parent

#: Seconds after which one peer's process is given up.
PATIENCE = 300.0

#: Distribution -> the module without which it is not installed; who is not here needs nothing.
MODULES = {
    "ctask": "ctask",
    "ClusterShell": "ClusterShell",
    "asyncssh": "asyncssh",
    "parallel-ssh": "pssh",
}


class Arena:
    """What the peers compete on: the setup for all of them, and what is done before each."""

    def __init__(self, setup: Setup, ready: Callable[[], object] = lambda: None) -> None:
        self.setup = setup
        #: waits until what the peer before has left is gone
        self.ready = ready


@contextlib.contextmanager
def alone(sizes: Mapping[str, int]) -> Iterator[Arena]:
    """Yield an arena without a server."""
    yield Arena(Setup(sizes))


@dataclasses.dataclass(frozen=True)
class Program:
    """One program: what it measures, on what, and who takes part.

    Attributes:
        name: of the program, and of its module.
        title: one line for the list of programs.
        heading: the first line above its table, with the names of sizes in braces.
        peers: name -> what carries out one round of it in a process of its own.
        full, quick: the sizes by default and under `--quick`; `rounds` is one of them.
        arena: makes what the peers compete on.
    """

    name: str
    title: str
    heading: str
    figures: Sequence[Figure]
    targets: Sequence[Target]
    peers: Mapping[str, Callable[[Setup], Sample]]
    full: Mapping[str, int]
    quick: Mapping[str, int]
    arena: Callable[[Mapping[str, int]], AbstractContextManager[Arena]] = alone


def compete(program: Program, sizes: Mapping[str, int], wanted: Sequence[str]) -> tuple[list[str], bool]:
    """Measure and print the table; return the lines of its targets, and whether a peer failed."""
    peers = installed(wanted)
    print(_heading(program, peers, sizes), flush=True)
    samples = Samples()
    failed: set[str] = set()
    with program.arena(sizes) as arena:
        for number in range(sizes["rounds"]):
            for peer in peers:
                if peer not in failed and not _round(program, peer, arena, samples, f"round {number + 1}"):
                    failed.add(peer)
    said = list(verdicts(program.figures, program.targets, samples))
    print("", *table(program.figures, samples), sep="\n")
    print(*([""] if said else []), *said, sep="\n", flush=True)
    return said, bool(failed)


def installed(wanted: Sequence[str]) -> list[str]:
    """Return those of the peers that can be measured, and say which cannot."""
    peers = []
    for peer in wanted:
        if peer in MODULES and importlib.util.find_spec(MODULES[peer]) is None:
            print(f"{peer} is not installed and left out (pip install {peer})", file=sys.stderr)
        else:
            peers.append(peer)
    return peers


def _round(program: Program, peer: str, arena: Arena, samples: Samples, title: str) -> bool:
    """Measure one peer once; False: it failed, which is told."""
    arena.ready()
    try:
        sample = _child(program.name, peer, arena.setup)
    except BenchmarkError as error:
        print(f"{title}  {peer:<13} {error}", file=sys.stderr)
        samples.drop(peer)
        return False
    samples.add(peer, sample)
    shown = [
        f"{figure.name} {sample[figure.name]:.{figure.digits}f} {figure.unit}"
        for figure in program.figures
        if figure.name in sample
    ]
    print(f"{title}  {peer:<13} {' · '.join(shown)}", file=sys.stderr, flush=True)
    return True


def _child(program: str, peer: str, setup: Setup) -> Sample:
    """Run one peer in a fresh process, with an empty home and without an agent."""
    kept = ("PATH", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    try:
        child = subprocess.run(
            [sys.executable, "-m", "benchmarks.child", program, peer],
            input=json.dumps(dataclasses.asdict(setup)),
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**environment, "HOME": "/nonexistent"},
            timeout=PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise BenchmarkError(f"has not ended after {PATIENCE:g} s") from None
    if child.returncode:
        raise BenchmarkError(f"failed with status {child.returncode}:\n{child.stderr.strip()[-2000:]}")
    sample: Sample = json.loads(child.stdout.splitlines()[-1])
    return sample


def _heading(program: Program, peers: Sequence[str], sizes: Mapping[str, int]) -> str:
    versions = ", ".join(f"{peer} {_version(peer)}".rstrip() for peer in peers)
    client = subprocess.run(["ssh", "-V"], capture_output=True, text=True, check=False).stderr.strip()
    return (
        f"{program.name}: {program.heading.format(**sizes)}; {sizes['rounds']} rounds\n"
        f"{versions}; {client}; Python {platform.python_version()}, {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f}"
    )


def _version(peer: str) -> str:
    if peer == "ctask":  # it may run from a checkout, and is not installed then
        import ctask

        return ctask.__version__
    return importlib.metadata.version(peer) if peer in MODULES else ""
