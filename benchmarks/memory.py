# SPDX-License-Identifier: Apache-2.0
"""P8: how much memory the output of many nodes takes, where all print the same and where each prints its own.

On a real sshd and not over the fake transport: what is on its way belongs to it, the windows of all that run at a
time included. Runs in the main thread of a process per figure, since the most memory that a process had never
shrinks; nothing is shared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.contest import Arena, Program
from benchmarks.measure import BenchmarkError, Sample, Setup, memory
from benchmarks.peers import Ctask
from benchmarks.report import Figure, Target
from benchmarks.server import served

__all__ = ["PROGRAM"]

#: Bytes that a node prints, and of the file out of which it takes them.
OUTPUT = 1_000_000
FILE = 256_000_000

#: Names of nodes per address: an address has two processes of sshd, and a connection takes eight jobs.
NAMES = 4

SAME = f"head -c {OUTPUT} {{path}}"
#: Where in the file it begins to read, and then what stands there: no two that run have the same number.
OTHER = (
    "n=$(($$ * 6007 % 200000000)); echo $n; "
    f"dd if={{path}} iflag=skip_bytes,count_bytes bs=65536 skip=$n count={OUTPUT} status=none"
)

MIB = 1 << 20


@contextlib.contextmanager
def arena(sizes: Mapping[str, int]) -> Iterator[Arena]:
    """Yield a server on which the file lies."""
    with served(sizes, nodes=max(1, sizes["nodes"] // NAMES)) as found:
        path = Path(found.setup.folder) / "output"
        path.write_bytes(os.urandom(FILE))
        path.chmod(0o644)
        found.setup = dataclasses.replace(found.setup, more={"path": str(path)})
        yield found


def sample(setup: Setup) -> Sample:
    """Measure each figure in a process of its own."""
    given = json.dumps(dataclasses.asdict(setup))
    found: Sample = {}
    for figure in ("same", "different"):
        child = subprocess.run(
            [sys.executable, "-m", "benchmarks.memory", figure],
            input=given,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if child.returncode:
            raise BenchmarkError(f"{figure}: ended with status {child.returncode}")
        found.update(json.loads(child.stdout.splitlines()[-1]))
    return found


def _grow(figure: str, setup: Setup) -> Sample:
    """Return by how much the process grew, in MB, from where all connections stand."""
    peer = Ctask(setup)
    names = [f"n{number}" for number in range(1, setup.sizes["nodes"] + 1)]
    for number, name in enumerate(names):
        peer.task.node_options(name, address=setup.nodes[number % len(setup.nodes)])
    peer.nodes = names
    if figure == "different":
        peer.task.set_info("output_memory", setup.sizes["ceiling"] * MIB)
    answers = peer.run("true")
    before = memory("VmRSS")
    worker = peer.task.shell((SAME if figure == "same" else OTHER).format(**setup.more), nodes=names)
    peer.task.resume()
    grown = memory("VmHWM") - before
    bad = _unlike(figure, worker, setup)
    if bad or len(answers) != len(names):
        raise BenchmarkError(f"{figure}: {len(bad)} of {len(names)} nodes have not printed what they should: {bad[:5]}")
    peer.close()
    return {figure: grown / 1e6}


def _unlike(figure: str, worker: Any, setup: Setup) -> list[str]:
    """Return the nodes whose output is not what they printed."""
    bad = []
    with Path(setup.more["path"]).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        for result in worker.results():
            start, said = 0, bytes(result.stdout)
            if figure == "different":
                first, _, said = said.partition(b"\n")
                start = int(first or b"0")
            if result.rc != 0 or said != whole[start : start + OUTPUT]:
                bad.append(f"{result.node}: rc {result.rc}, {len(said)} bytes, {result.why}")
    return bad


def main() -> None:
    """Measure the figure that is named on the command line; print it as the last line."""
    try:
        found = _grow(sys.argv[1], Setup(**json.load(sys.stdin)))
    except BenchmarkError as error:
        sys.exit(str(error))
    print(json.dumps(found))


PROGRAM = Program(
    name="memory",
    title="P8: what the output of many nodes takes",
    heading="{nodes} nodes, 1 MB of each, fan-out {fanout}; `different` with output_memory {ceiling} MiB",
    figures=[Figure("same", "MB more", 1), Figure("different", "MB more", 1)],
    targets=[Target("P8", "same", 20.0), Target("P8", "different", 64 * MIB / 1e6)],
    peers={"ctask": sample},
    full={"nodes": 1000, "fanout": 64, "ceiling": 64, "rounds": 3},
    quick={"nodes": 200, "fanout": 64, "ceiling": 64, "rounds": 1},
    arena=arena,
)

if __name__ == "__main__":
    main()
