# SPDX-License-Identifier: Apache-2.0
"""One round of one peer, in a process of its own: `python -m benchmarks.child PROGRAM PEER`, a `Setup` on stdin.

Runs in the main thread of that process, with the threads and processes that the peer makes.
"""

from __future__ import annotations

import gc
import importlib
import json
import sys

from benchmarks.contest import Program
from benchmarks.measure import BenchmarkError, Setup

__all__ = ["main"]


def main() -> None:
    """Carry out the round, and print what it took as the last line."""
    program: Program = importlib.import_module(f"benchmarks.{sys.argv[1]}").PROGRAM
    setup = Setup(**json.load(sys.stdin))
    # Else the collection that the imports have brought near falls into the work of some peers and not of others.
    gc.collect()
    try:
        sample = program.peers[sys.argv[2]](setup)
    except BenchmarkError as error:
        sys.exit(str(error))
    print(json.dumps(sample))


if __name__ == "__main__":
    main()
