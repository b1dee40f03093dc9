# SPDX-License-Identifier: Apache-2.0
"""P11: how long an import takes, over a Python that imports nothing.

Runs in the main thread of a peer's process, and starts a Python for each import; nothing is shared.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from functools import partial

from benchmarks.contest import Program
from benchmarks.measure import Sample, Setup
from benchmarks.report import Figure, Target

__all__ = ["PROGRAM"]


def sample(statement: str, setup: Setup) -> Sample:
    """Compare Pythons with the import and without it, in turn; the first of each writes and warms caches."""
    pairs = [(_seconds("pass"), _seconds(statement)) for _ in range(1 + setup.sizes["repeats"])][1:]
    return {"import": statistics.median(other - bare for bare, other in pairs) * 1000}


def _seconds(statement: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - began


PROGRAM = Program(
    name="imports",
    title="P11: how long `import ctask` takes",
    heading="an import in a fresh Python, less the time of a Python that imports nothing; median of {repeats}",
    figures=[Figure("import", "ms", 1)],
    targets=[Target("P11", "import", 0.5, "ClusterShell")],
    peers={
        "ctask": partial(sample, "import ctask"),
        "ClusterShell": partial(sample, "import ClusterShell.Task"),
        "asyncssh": partial(sample, "import asyncssh"),
        "parallel-ssh": partial(sample, "import pssh.clients"),
    },
    full={"repeats": 15, "rounds": 3},
    quick={"repeats": 3, "rounds": 1},
)
