# SPDX-License-Identifier: Apache-2.0
"""What was typed: from words to a request that can be right.

Options end at the first word of the command, as for ssh and clush, so that the command's own options need no `--`;
the table of them is what is read, and what `--help` prints. In the main thread; lists of nodes are read here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ctask.cli import groups, openssh
from ctask.cli.listed import ITS_NAMES, STANDARD_INPUT, Lists, Word, node_set
from ctask.cli.words import Option, Table
from ctask.display import shell_word
from ctask.errors import CommandError, NodeSetExternalError, OptionError, UsageError
from ctask.nodes import NodeSet
from ctask.options import parse_option

__all__ = ["HELP", "USAGE", "Request", "Typed", "read", "request"]


OPTIONS = (
    Option("-w", "NODES", "the nodes: 'n[1-40]', '@rack3!n7', 'login*', or - to read them; may be repeated"),
    Option("-x", "NODES", "not on these, or - to read them; may be repeated"),
    Option("-g", "GROUPS", "the nodes of these groups, without @: 'rack[1-3],login'; may be repeated; also --group"),
    Option("-X", "GROUPS", "not on the nodes of these groups; may be repeated"),
    Option("-a", "", "all nodes that the source of groups knows; also --all"),
    Option("-s", "SOURCE", "the source of groups that are named without one; also --groupsource"),
    Option("--groupsconf", "FILE", "node groups by this groups.conf, and no other"),
    Option("--hostfile", "FILE", "nodes from a file (or -): words, and # begins a comment; may be repeated"),
    Option("--expect", "N", "refuse to run unless there are exactly N nodes"),
    Option("-b", "", "gather standard output: each distinct one once, at the end, under its nodes"),
    Option("-B", "", "gather standard output and standard error, as they came"),
    Option("-S", "", "exit with the largest status of the nodes; 255 where one has none"),
    Option("--raw", "", "pass on what nodes print byte by byte, terminal controls included"),
    Option("-f", "FANOUT", "on how many nodes at a time (64)"),
    Option("-t", "SECS", "time for a node to be reached, until it starts the command (10); 0 is no limit"),
    Option("-u", "SECS", "time for the command to run on a node (no limit)"),
    Option("--stop", "POLICY", "how to end what is stopped: kill (TERM, then KILL), term, or leave it running (kill)"),
    Option("--stop-grace", "SECS", "time between TERM and KILL (5)"),
    Option("-l", "USER", "log in as USER"),
    Option("-i", "IDENTITY", "a private key file to log in with; may be repeated"),
    Option("-o", "OPTION=VALUE", f"as for ssh; may be repeated; takes {openssh.TAKEN}"),
    Option("--stdin", "", "send standard input to the command on every node (512 MiB at most); else no node gets it"),
    Option("-n", "", "say nothing of standard input that no node gets, and do not refuse to run for it"),
    Option("-h", "", "this text; also --help"),
    Option("--version", "", "which ctask this is"),
)
_SPELLINGS = {
    "--help": "-h",
    "--group": "-g",
    "--all": "-a",
    "--groupsource": "-s",
}
_TABLE = Table(OPTIONS, _SPELLINGS, "ctask --help")

USAGE = "usage: ctask [run] -w NODES [options] [--] COMMAND…"

_HEAD = f"""\
{USAGE}

Run a command on many nodes at once, over SSH.

  ctask -w 'n[1-40]' uname -r         each line as it comes, behind the name of its node
  ctask -b -w 'n[1-40]' uname -r      nodes that say the same stand together
  ctask -w 'n[1-40]' -x n7 -u 30 'df /scratch | tail -n 1'
  ctask nodes -f n1 n2 n3             count, fold and combine node sets: ctask nodes --help

Brackets and stars stand in quotes, else the shell reads them before ctask does.

What commands print goes to standard output, and their standard error to standard error, line by line as it comes;
-b keeps the former to the end, -B both of them, for standard output. How it went is told on standard error at the end,
on a terminal always, else where not all nodes exited with 0 and printed something: each of those once, and whether the
command ran there. On a terminal one line says meanwhile who is waited for.

"""
_FOOT = """
Host keys are verified as ssh does with StrictHostKeyChecking=yes: a node whose key is not in known_hosts is refused.
What nodes print is escaped, so that it cannot act on the terminal; colours are left out. Of an option that is given
twice the last one counts, unless it may be repeated.

Standard input that is a pipe or a file with something in it, and is sent to no node, is mentioned before anything is
sent; a file that nothing was read from yet is refused (2), since the command was probably meant to get it.

Exit status: 0 the command exited with 0 on every node; 1 it ran everywhere, and not all exited with 0; 3 some were
not reached, timed out or were lost; 2 what was asked for cannot be right, and nothing was sent; 130 after Ctrl-C
(129 a hang-up, 143 TERM); 141 when the reader of the output has gone. With -S a status above 255 makes it 255.

On a terminal the first Ctrl-C tells who is waited for, and a second one within 2 s ends them with TERM.
"""


HELP = _HEAD + _TABLE.told() + _FOOT

#: Options that a repetition leaves out: its node set stands for them.
_OF_NODES = frozenset(("-w", "-x", "-g", "-X", "-a", "--hostfile", "--expect"))


@dataclass(slots=True)
class Typed:
    """The words apart: options with their values in order, and the command."""

    options: dict[str, list[str]] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)
    #: the options once more, in the order in which they were typed
    given: list[tuple[str, str]] = field(default_factory=list)

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

    def repeat(self) -> str:
        """Return the words, for a shell, that stand before the node set of a run with the same options."""
        words = ["ctask"]
        for name, value in self.given:
            if name not in _OF_NODES:
                words += [name, shell_word(value)] if _TABLE.valued(name) else [name]
        return " ".join([*words, "-w"])


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be run, checked as far as that goes without the task.

    Attributes:
        options: of the call, by ctask's names.
        gather: show each distinct standard output once, at the end.
        errors: standard error is gathered with it.
        stdin: send standard input to the nodes.
        stdin_minded: it may be looked at, and told of, where it is not sent.
        repeat: what stands before the node set of a run with the same options, as `account` takes it.
    """

    nodes: NodeSet
    command: bytes
    options: dict[str, Any]
    fanout: int | None = None
    expect: int | None = None
    gather: bool = False
    errors: bool = False
    max_status: bool = False
    raw: bool = False
    stdin: bool = False
    stdin_minded: bool = True
    repeat: str = "ctask -w"


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
        for name, value in _TABLE.take(word, rest):
            typed.options.setdefault(name, []).append(value)
            typed.given.append((name, value))
    typed.command = rest
    return typed


def request(typed: Typed, lists: Lists | None = None) -> Request:
    """Return what the words ask for.

    Args:
        lists: reads the lists of nodes.

    Raises:
        UsageError: it cannot be right.
    """
    lists = Lists() if lists is None else lists
    if "--stdin" in typed.options:
        _refuse_second_use(typed)
    nodes = _nodes(typed, lists)
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
        gather="-b" in typed.options or "-B" in typed.options,
        errors="-B" in typed.options,
        max_status="-S" in typed.options,
        raw="--raw" in typed.options,
        stdin="--stdin" in typed.options,
        stdin_minded=lists.taken_by is None and not typed.options.keys() & {"--stdin", "-n"},
        repeat=typed.repeat(),
    )


def _refuse_second_use(typed: Typed) -> None:
    if "-n" in typed.options:
        raise OptionError("--stdin and -n contradict each other")
    for option, value in typed.given:
        if (option in ("-w", "-x") and value == STANDARD_INPUT) or (option == "--hostfile" and value in ITS_NAMES):
            raise OptionError(f"{option} {value} reads the nodes from standard input, and --stdin sends it to them")


def _nodes(typed: Typed, lists: Lists) -> NodeSet:
    try:
        return _NodesAsked(typed, lists).nodes()
    except NodeSetExternalError as error:
        raise error.before_anything() from error.__cause__


class _NodesAsked:
    """The options that name nodes, and who knows the groups in them."""

    def __init__(self, typed: Typed, lists: Lists) -> None:
        self._typed = typed
        self._lists = lists
        self._resolver = groups.resolver(typed.last("--groupsconf"), typed.last("-s"))

    def nodes(self) -> NodeSet:
        """Return the nodes that are asked for; exclusions always win."""
        options = self._typed.options
        named = [f"{flag} {text!r}" for flag in ("-w", "-g", "--hostfile") for text in options.get(flag, [])]
        named += ["-a"] if "-a" in options else []
        if not named:
            raise UsageError("say on which nodes: -w NODES, -g GROUPS, -a, or --hostfile FILE")
        found = self._named("-w", "-g", "--hostfile")
        if "-a" in options:
            found.update(NodeSet.fromall(resolver=self._resolver))
        if not found:
            raise UsageError(f"no nodes in {' '.join(named)}. Nothing was run")
        without = self._named("-x", "-X")
        if found <= without:
            flags = " and ".join(flag for flag in ("-x", "-X") if flag in options)
            verb = "takes" if len(flags) == 2 else "take"
            raise UsageError(f"no nodes are left: {flags} {verb} out all of {found}. Nothing was run")
        return found - without

    def _named(self, by_nodes: str, by_groups: str, by_files: str = "") -> NodeSet:
        options = self._typed.options
        words: list[Word] = []
        for text in options.get(by_nodes, []):
            if text == STANDARD_INPUT:
                words += self._lists.words(text, f"{by_nodes} -")
            elif text.strip():
                words.append(Word(text))
        words += [Word(groups.named(text)) for text in options.get(by_groups, [])]
        for path in options.get(by_files, []):
            words += self._lists.words(path, f"{by_files} {path!r}")
        return node_set(words, self._resolver)


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
