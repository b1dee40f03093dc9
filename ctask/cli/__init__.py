# SPDX-License-Identifier: Apache-2.0
"""The command line: `python -m ctask`, and the console script `ctask`.

From the ground up: `terminal` (what is written where), `words` (options and their values), `groups` (which node groups
are meant), `listed` (nodes in files and on standard input), `arguments` (what was typed), `progress` and `feed` (the
line that shrinks; standard input), `run` (the command itself); `nodes` (`ctask nodes`, which runs nothing).

Runs in the main thread, on its task; `progress` and `feed` have a thread each while a command runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ctask import __version__, children
from ctask.cli import arguments
from ctask.cli.listed import Lists
from ctask.cli.run import run
from ctask.cli.terminal import Terminal
from ctask.display import one_line
from ctask.errors import CtaskError, NodeSetError, UsageError

__all__ = ["main"]

#: How far a line with a wrong node set is indented, and how much of it is shown before and behind the fault.
_INDENT = 14
_AROUND = 60


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the words say, the program's own if there are none given; return the exit status.

    Raises:
        SystemExit: standard output cannot be written to any more.
    """
    children.start_as_program()
    terminal = Terminal()
    words = sys.argv[1:] if argv is None else argv
    try:
        if words and words[0] == "nodes":
            from ctask.cli.nodes import nodes  # on demand: a run needs nothing of it

            return nodes(words[1:], terminal)
        asked = arguments.read(words)
        if asked.help:
            terminal.out(arguments.HELP)
        elif asked.version:
            terminal.out(f"ctask {__version__}\n")
        elif not words:
            terminal.say(f"ctask: {arguments.USAGE}\n       ctask --help tells more")
            return 2
        else:
            return run(arguments.request(asked, Lists(terminal.say)), terminal)
    except UsageError as error:
        terminal.say(_complaint(error))
        return 2
    except CtaskError as error:
        terminal.say(f"ctask: {one_line(str(error))}")
        return 1
    except ImportError as error:
        if error.name != "paramiko":
            raise
        terminal.say(f"ctask: {error}")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _complaint(error: UsageError) -> str:
    """Return a usage error with, under a bad node set, a caret where it is bad."""
    # What was typed, and the names of files, must not make a line of their own.
    text = f"ctask: {one_line(str(error))}"
    fault = error if isinstance(error, NodeSetError) else error.__cause__
    if not isinstance(fault, NodeSetError) or fault.position is None:
        return text
    start = max(0, fault.position - _AROUND)
    before, after = _plain(fault.text[start : fault.position]), _plain(fault.text[fault.position :][:_AROUND])
    indent = " " * _INDENT
    return f"{text}\n{indent}{before}{after}\n{indent}{' ' * len(before)}^"


def _plain(text: str) -> str:
    """Return text in which every character is one column wide."""
    return text.encode("unicode_escape").decode("ascii")
