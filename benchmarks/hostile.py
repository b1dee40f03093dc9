# SPDX-License-Identifier: Apache-2.0
"""What a node that floods with tiny packets costs a healthy one: `true` beside one and beside many, over `true` alone.

Runs in the main thread of a peer's process; each flood comes from a server in a process of its own.
"""

from __future__ import annotations

import contextlib
import statistics
import struct
import tempfile
import time
from pathlib import Path

from benchmarks.contest import Program
from benchmarks.measure import Sample, Setup
from benchmarks.peers import Ctask
from benchmarks.report import Figure, Target
from benchmarks.server import served

__all__ = ["PROGRAM"]

_NONE = struct.pack(">I", 0)
#: What a flood is made of: packets that carry nothing, each of another kind.
TINY = (
    b"\x02" + _NONE,  # IGNORE
    b"\x50" + struct.pack(">I", 1) + b"x\1",  # a request that wants an answer
    b"\x5e" + _NONE + _NONE,  # no output
)


def sample(setup: Setup) -> Sample:
    """Measure `true`, each time anew, alone, beside one flood of each kind, and beside many."""
    from ctask_tests.hostile_process import hostile_process
    from ctask_tests.hostile_script import Out, Raw, Script

    peer = Ctask(setup)
    node = peer.nodes[:1]
    peer.run("true")

    def median() -> float:
        times = []
        for _ in range(setup.sizes["repeats"]):
            began = time.perf_counter()
            # Not `run`, which would wait for the floods as well.
            worker = peer.task.submit("true", nodes=node, timeout=30, stdin=False)
            worker.wait(30)
            worker.check()
            times.append(time.perf_counter() - began)
        return statistics.median(times) * 1000

    alone = median()
    found = {"alone": alone}
    scripts = [Script(steps=(Out(b"x\n"), Raw(payload, 100_000_000))) for payload in TINY]
    with tempfile.TemporaryDirectory(prefix="ctask-hostile-") as folder, contextlib.ExitStack() as servers:
        for number, script in enumerate(scripts):
            place = Path(folder, str(number))
            place.mkdir()
            peer.task.node_options(f"flood{number}", **servers.enter_context(hostile_process(place, script)))
        found["beside one"] = max(_beside(peer, [f"flood{n}"], median) / alone for n in range(len(scripts)))
        many = [f"flood{number}" for number in range(len(scripts)) for _ in range(setup.sizes["floods"])]
        found["beside many"] = _beside(peer, many, median)
    peer.close()
    return found


def _beside(peer: Ctask, floods: list[str], median: object) -> float:
    """Return what `median` measures while these nodes flood; a name that stands twice is two connections."""
    begun: list[str] = []
    workers = [
        peer.task.submit(
            "x", nodes=name, stdin=False, fresh=True, gather=False, on_read=lambda _, node, *more: begun.append(node)
        )
        for name in floods
    ]
    deadline = time.monotonic() + 30
    while len(begun) < len(floods) and time.monotonic() < deadline:
        workers[0].wait(0.05)
    measured: float = median()  # type: ignore[operator]
    for worker in workers:
        worker.abort()
    for worker in workers:
        worker.wait(10)
    return measured


PROGRAM = Program(
    name="hostile",
    title="a healthy node beside nodes that flood with tiny packets",
    heading="`true` on a kept connection, the median of {repeats}; beside one flood, the worst of three kinds, as a"
    " multiple of alone; beside {floods} of each at once",
    figures=[Figure("alone", "ms", 2), Figure("beside one", "× alone", 1), Figure("beside many", "ms", 1)],
    targets=[Target("hostile", "beside one", 10.0)],
    peers={"ctask": sample},
    full={"nodes": 1, "floods": 10, "repeats": 40, "rounds": 3},
    quick={"nodes": 1, "floods": 2, "repeats": 10, "rounds": 1},
    arena=served,
)
