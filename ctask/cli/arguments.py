# SPDX-License-Identifier: Apache-2.0
"""What was typed: from words to a request that can be right.

Options end at the first word of the command, as for ssh and clush, so that the command's own options need no `--`;
the table of them is what is read, and what `--help` prints. Pure functions, in the main thread; files named by
`--hostfile` are read here.
"""

from __future__ import annotations

import difflib
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ctask.cli import openssh
from ctask.errors import CommandError, NodeNameError, NodeSetError, OptionError, UsageError
from ctask.nodes import NodeSet
from ctask.options import parse_option

__all__ = ["HELP", "USAGE", "Request", "Typed", "read", "request"]


@dataclass(frozen=True, slots=True)
class Option:
    """One option, as it is typed and as `--help` tells it; a switch has no value."""

    name: str
    value: str
    text: str


OPTIONS = (
    Option("-w", "NODES", "the nodes: n[1-40], login1,login2; may be repeated"),
    Option("-x", "NODES", "not on these; may be repeated"),
    Option("--hostfile", "FILE", "nodes from a file, separated by white space; lines that begin with # are skipped"),
    Option("--expect", "N", "refuse to run unless there are exactly N nodes"),
    Option("-b", "", "gather: each distinct output once, at the end, under its nodes"),
    Option("-S", "", "exit with the largest status of the nodes; 255 where one has none"),
    Option("--raw", "", "pass on what nodes print byte by byte, terminal controls included"),
    Option("-f", "FANOUT", "on how many nodes at a time (64)"),
    Option("-t", "SECS", "time for a node to be reached, until it starts the command (10); 0 is no limit"),
    Option("-u", "SECS", "time for the command to run on a node (no limit)"),
    Option("--stop", "POLICY", "how to end what is stopped: kill (TERM, then KILL), term, or leave it running (kill)"),
    Option("--stop-grace", "SECS", "time between TERM and KILL (5)"),
    Option("-l", "USER", "log in as USER"),
    Option("-i", "IDENTITY", "a private key file to log in with; may be repeated"),
    Option("-o", "OPTION=VALUE", f"as for ssh; takes {openssh.TAKEN}"),
    Option("--stdin", "", "send standard input to the command on every node (512 MiB at most); else it is not read"),
    Option("-n", "", "do not read standard input, and do not mention it"),
    Option("-h", "", "this text; also --help"),
    Option("--version", "", "which ctask this is"),
)
_TABLE = {option.name: option for option in OPTIONS}
_SPELLINGS = {"--help": "-h"}

USAGE = "usage: ctask [run] -w NODES [options] [--] COMMAND…"

_HEAD = f"""\
{USAGE}

Run a command on many nodes at once, over SSH.

  ctask -w n[1-40] uname -r         each line as it comes, behind the name of its node
  ctask -b -w n[1-40] uname -r      nodes that say the same stand together
  ctask -w n[1-40] -x n7 -u 30 'df /scratch | tail -n 1'

What nodes print goes to standard output, and their errors to standard error. How it went, where not all went well,
is told on standard error at the end: every node once, and whether the command ran there.

"""
_FOOT = """
Host keys are verified as ssh does with StrictHostKeyChecking=yes: a node whose key is not in known_hosts is refused.
What nodes print is escaped, so that it cannot act on the terminal; colours are left out. Of an option that is given
twice the last one counts.

Exit status: 0 the command exited with 0 on every node; 1 it ran everywhere, and not all exited with 0; 3 some were
not reached, timed out or were lost; 2 what was asked for cannot be right, and nothing was sent; 130 after Ctrl-C;
141 when nobody reads the output any more. On a terminal the first Ctrl-C tells who is waited for, and a second one
within 2 s ends them with TERM.
"""


def _help() -> str:
    width = max(len(f"{option.name} {option.value}") for option in OPTIONS) + 4
    lines = []
    for option in OPTIONS:
        first = f"  {option.name} {option.value}".ljust(width)
        lines.append(textwrap.fill(option.text, 110, initial_indent=first, subsequent_indent=" " * width))
    return _HEAD + "\n".join(lines) + "\n" + _FOOT


HELP = _help()


@dataclass(slots=True)
class Typed:
    """The words apart: options with their values in order, and the command."""

    options: dict[str, list[str]] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)

    @property
    def help(self) -> bool:
        """Whether help is asked for."""
        return "-h" in self.options

    @property
    def version(self) -> bool:
        """Whether the version is asked for."""
        return "--version" in self.options

    def last(self, name: str) -> str | None:
        """Return an option's value, the last one; None where it was not given."""
        return self.options.get(name, [None])[-1]


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be run, checked as far as that goes without the task.

    Attributes:
        options: of the call, by ctask's names.
    """

    nodes: NodeSet
    command: bytes
    options: dict[str, Any]
    fanout: int | None = None
    expect: int | None = None
    gather: bool = False
    max_status: bool = False
    raw: bool = False
    stdin: bool = False
    hush_stdin: bool = False


def read(words: Sequence[str]) -> Typed:
    """Tell the options from the command; `run` in front is understood.

    Raises:
        OptionError: no such option, or one without its value.
    """
    typed = Typed()
    rest = list(words)
    if rest and not rest[0].startswith("-") and rest.pop(0) != "run":
        raise OptionError(f"no such command of ctask: {words[0]!r}; to run it on nodes: ctask -w NODES {words[0]} …")
    while rest and rest[0].startswith("-") and rest[0] != "-":
        word = rest.pop(0)
        if word == "--":
            break
        if word.startswith("--"):
            _long(typed, word, rest)
        else:
            _short(typed, word, rest)
    typed.command = rest
    return typed


def _long(typed: Typed, word: str, rest: list[str]) -> None:
    """`--name`, `--name value` or `--name=value`."""
    name, equals, value = word.partition("=")
    option = _known(name)
    if option.value:
        _add(typed, option, value if equals else None, rest)
    elif equals:
        raise OptionError(f"{name} takes no value")
    else:
        _add(typed, option, "", rest)


def _short(typed: Typed, word: str, rest: list[str]) -> None:
    """`-b`, `-bS`, `-w value` or `-wvalue`."""
    letters = word[1:]
    while letters:
        option = _known(f"-{letters[0]}")
        letters = letters[1:]
        if option.value:
            _add(typed, option, letters or None, rest)
            return
        _add(typed, option, "", rest)


def _known(name: str) -> Option:
    option = _TABLE.get(_SPELLINGS.get(name, name))
    if option is None:
        near = difflib.get_close_matches(name, [*_TABLE, *_SPELLINGS], 1) if name.startswith("--") else []
        hint = f"did you mean {near[0]}?" if near else "ctask --help lists them"
        raise OptionError(f"no such option: {name}; {hint}")
    return option


def _add(typed: Typed, option: Option, value: str | None, rest: list[str]) -> None:
    if value is None:
        if not rest:
            raise OptionError(f"{option.name} takes a value: {option.name} {option.value}")
        value = rest.pop(0)
    typed.options.setdefault(option.name, []).append(value)


def request(typed: Typed) -> Request:
    """Return what the words ask for.

    Raises:
        UsageError: it cannot be right.
    """
    if typed.last("--stdin") is not None and typed.last("-n") is not None:
        raise OptionError("--stdin and -n contradict each other")
    nodes = _nodes(typed)
    if not typed.command:
        raise CommandError("the command is missing: ctask -w NODES COMMAND…")
    options: dict[str, Any] = openssh.options(typed.options.get("-o", []))
    for name, flag in (("connect_timeout", "-t"), ("timeout", "-u")):
        text = typed.last(flag)
        if text is not None:
            options[name] = _seconds(flag, text)
    policy, grace = typed.last("--stop"), typed.last("--stop-grace")
    if policy is not None:
        options["stop"] = parse_option("stop", policy)[1]
    if grace is not None:
        options["stop_grace"] = parse_option("stop_grace", _seconds("--stop-grace", grace))[1]
    user = typed.last("-l")
    if user is not None:
        options["user"] = parse_option("user", user)[1]
    if "-i" in typed.options:
        options["identity"] = typed.options["-i"]
    return Request(
        nodes=nodes,
        # As ssh and clush put the words together; their bytes are those that were typed, whatever the locale.
        command=os.fsencode(" ".join(typed.command)),
        options=options,
        fanout=_count(typed, "-f"),
        expect=_count(typed, "--expect"),
        gather="-b" in typed.options,
        max_status="-S" in typed.options,
        raw="--raw" in typed.options,
        stdin="--stdin" in typed.options,
        hush_stdin="-n" in typed.options,
    )


def _nodes(typed: Typed) -> NodeSet:
    named, files = typed.options.get("-w", []), typed.options.get("--hostfile", [])
    if not named and not files:
        raise UsageError("say on which nodes: -w NODES, or --hostfile FILE")
    nodes = NodeSet()
    for text in named:
        nodes.update(NodeSet(text))
    for path in files:
        nodes.update(_hostfile(path))
    if not nodes:
        raise UsageError(f"no nodes in {' '.join([*(f'-w {text!r}' for text in named), *files])}. Nothing was run")
    without = NodeSet()
    for text in typed.options.get("-x", []):
        without.update(NodeSet(text))
    if nodes <= without:
        raise UsageError(f"no nodes are left: -x takes out all of {nodes}. Nothing was run")
    return nodes - without


def _hostfile(path: str) -> NodeSet:
    try:
        text = Path(path).read_bytes().decode("utf-8", "backslashreplace")
    except (OSError, ValueError) as error:
        raise OptionError(f"--hostfile {path}: {getattr(error, 'strerror', None) or error}") from error
    lines = [line.split() for line in text.split("\n")]
    kept = [(number, line) for number, line in enumerate(lines, 1) if line and not line[0].startswith("#")]
    try:
        return NodeSet.fromlist(word for _, line in kept for word in line)
    except (NodeSetError, NodeNameError):
        for number, line in kept:
            _named_on(line, f"{path}:{number}")
        raise


def _named_on(words: list[str], where: str) -> None:
    """Raise with the place if one of the words names no nodes."""
    for word in words:
        try:
            NodeSet(word)
        except (NodeSetError, NodeNameError) as error:
            raise OptionError(f"{where}: {error}") from error


def _seconds(flag: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:  # NaN is not either
        zero = "" if flag == "--stop-grace" else ", 0 for no limit"
        raise OptionError(f"{flag} takes seconds{zero}, not {text!r}")
    return value


def _count(typed: Typed, flag: str) -> int | None:
    text = typed.last(flag)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 19 and int(text)):
        raise OptionError(f"{flag} takes a whole number, 1 or more, not {text!r}")
    return int(text)
