# SPDX-License-Identifier: Apache-2.0
"""P4: what connections cost while nobody uses them.

Runs in the main thread of a peer's process; nothing is shared.
"""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path

from benchmarks.contest import Program
from benchmarks.measure import BenchmarkError, Sample, Setup, cpu
from benchmarks.peers import PEERS, expect
from benchmarks.report import Figure, Target
from benchmarks.server import served

__all__ = ["PROGRAM"]

COMMAND = "echo ok"
ANSWER = b"ok\n"

#: Seconds for which connections that were just used are left alone before the measurement.
SETTLE = 1.0


def sample(name: str, setup: Setup) -> Sample:
    """Connect to all nodes, and measure a time in which nothing is asked of them."""
    peer = PEERS[name](setup)
    expect(setup, peer.run(COMMAND), ANSWER)
    peer.rest(SETTLE)
    before, began = cpu(), time.perf_counter()
    peer.rest(setup.sizes["seconds"])
    spent, lasted = cpu() - before, time.perf_counter() - began
    # A client that has closed its connections is idle in another sense.
    kept = _sockets()
    if kept < len(setup.nodes):
        raise BenchmarkError(f"{kept} of {len(setup.nodes)} connections are left")
    expect(setup, peer.run(COMMAND), ANSWER)
    peer.close()
    return {"CPU": spent / lasted * 100}


def _sockets() -> int:
    """How many sockets this process has."""
    count = 0
    for fd in Path("/proc/self/fd").iterdir():
        try:
            count += os.readlink(fd).startswith("socket:")
        except OSError:  # the one by which the folder is read
            pass
    return count


PROGRAM = Program(
    name="idle",
    title="P4: what idle connections cost",
    heading="{nodes} connections, each used once, then left alone for {seconds} s",
    figures=[Figure("CPU", "% of a core", 3)],
    targets=[Target("P4", "CPU", 0.1)],
    # ClusterShell keeps no connection.
    peers={name: partial(sample, name) for name in PEERS if name != "ClusterShell"},
    full={"nodes": 300, "fanout": 64, "seconds": 20, "rounds": 3},
    quick={"nodes": 60, "fanout": 32, "seconds": 3, "rounds": 1},
    arena=served,
)
