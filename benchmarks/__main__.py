# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks PROGRAM`: parses the command line and runs one program.

Runs in the main thread; there is no state.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks import fanout
from benchmarks.measure import BenchmarkError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program that `argv` names and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="ctask beside other programs")
    programs = parser.add_subparsers(required=True, metavar="PROGRAM")
    fanout.add_parser(programs)
    arguments = parser.parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except BenchmarkError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
