# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks [PROGRAM]`: parses the command line and runs one program, or all; without a name lists them.

Runs in the main thread; there is no state.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial

from benchmarks import events, fanout, flow, gather, head, hostile, idle, imports, late, local, memory, nodesets
from benchmarks.contest import Program, compete
from benchmarks.measure import BenchmarkError

__all__ = ["PROGRAMS", "main"]

PROGRAMS: dict[str, Program] = {
    module.PROGRAM.name: module.PROGRAM
    for module in (fanout, idle, flow, gather, events, memory, nodesets, local, imports, late, hostile, head)
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program that `argv` names.

    Returns:
        1 where something could not be measured; a target that is lost is told in the table, and is no failure.
    """
    arguments = _parser().parse_args(argv)
    if arguments.program is None:
        print(*(f"{name:<8} {program.title}" for name, program in PROGRAMS.items()), sep="\n")
        print(f"{'all':<8} one after the other")
        return 0
    try:
        return _all(arguments) if arguments.program == "all" else _one(arguments)
    except BenchmarkError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _one(arguments: argparse.Namespace) -> int:
    program = PROGRAMS[arguments.program]
    defaults = program.quick if arguments.quick else program.full
    sizes = {name: getattr(arguments, name) or default for name, default in defaults.items()}
    _, failed = compete(program, sizes, arguments.peers)
    return 1 if failed else 0


def _all(arguments: argparse.Namespace) -> int:
    lines: list[str] = []
    status = 0
    for program in PROGRAMS.values():
        try:
            said, failed = compete(program, program.quick if arguments.quick else program.full, list(program.peers))
        except BenchmarkError as error:
            said, failed = [f"benchmarks: {program.name}: {error}"], True
        lines += said
        status = 1 if failed else status
        print(flush=True)
    print(*lines, sep="\n")
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="ctask beside other programs")
    programs = parser.add_subparsers(dest="program", metavar="PROGRAM")
    for program in PROGRAMS.values():
        options = programs.add_parser(program.name, help=program.title)
        for name, default in program.full.items():
            options.add_argument(f"--{name}", type=_number, metavar="N", help=f"default {default}")
        names = list(program.peers)
        options.add_argument(
            "--peers", type=partial(_peers, names), metavar="A,B", default=names, help=f"of {', '.join(names)}"
        )
        _quick(options, " ".join(f"--{name} {size}" for name, size in program.quick.items()))
    _quick(programs.add_parser("all", help="one after the other"), "each its own")
    return parser


def _quick(parser: argparse.ArgumentParser, sizes: str) -> None:
    parser.add_argument("--quick", action="store_true", help=f"smaller sizes: {sizes}")


def _number(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("1 or more")
    return number


def _peers(known: Sequence[str], text: str) -> list[str]:
    names = list(dict.fromkeys(filter(None, text.split(","))))
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"no such peer: {', '.join(unknown)}; there are {', '.join(known)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
