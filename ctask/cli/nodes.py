# SPDX-License-Identifier: Apache-2.0
"""`ctask nodes`: node sets from the command line, with the letters of ClusterShell's `nodeset`.

Runs in the main thread. Nothing is sent anywhere; standard input is read where it is asked for, or where no node set
stands on the line.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from ctask.cli import groups
from ctask.cli.listed import STANDARD_INPUT, Lists, Word, node_set
from ctask.cli.terminal import Terminal
from ctask.cli.words import Option, Table
from ctask.display import one_line
from ctask.errors import NodeNameError, OptionError, UsageError
from ctask.nodes import NodeSet, RangeSet, Resolver, std_group_resolver

__all__ = ["HELP", "nodes"]

#: what a node set on the line can be: of nodes, or with `-R` of numbers
Set = NodeSet | RangeSet

#: Names that are written at a time.
_AT_ONCE = 4096

TABLE = Table(
    (
        Option("-c", "", "how many nodes; also --count"),
        Option("-e", "", "their names, one by one; also --expand"),
        Option("-f", "", "as one folded node set; also --fold"),
        Option("-r", "", "as groups, as far as whole ones are in it; also --regroup"),
        Option("-l", "", "groups of one source (-ll: with their nodes, -lll: and counts); those of the nodes, if any"),
        Option("-L", "", "the same of all sources; also --list-all"),
        Option("--index", "NODE", "the place of NODE in the set, from 0; status 1 if it is not in it"),
        Option("--list-sources", "", "the sources of groups; also --groupsources"),
        Option("-x", "NODES", "without these; also --exclude"),
        Option("-i", "NODES", "only what is in these as well; also --intersection"),
        Option("-X", "NODES", "what is on one of both sides only; also --xor"),
        Option("-a", "", "all nodes of the source, before anything else; also --all"),
        Option("-R", "", "sets of numbers (1-9,12) in place of nodes; also --rangeset"),
        Option("-s", "SOURCE", "the source of groups that are named without one; also --groupsource"),
        Option("--groupsconf", "FILE", "this groups.conf, and no other"),
        Option("-G", "", "leave out the source before groups; also --groupbase"),
        Option("-I", "INDEXES", "only the nodes at these places: 0-9,12; also --slice"),
        Option("--pick", "N", "N of them, at random"),
        Option("--split", "N", "in N parts, each on a line"),
        Option("--contiguous", "", "in parts without gaps, each on a line"),
        Option("-S", "TEXT", "what stands between names (a blank); \\n, \\t and the like are understood"),
        Option("-O", "FORMAT", "how each name is written, as in '%s-ib'; also --output-format"),
        Option("--autostep", "N", "fold N or more numbers at equal distances as 1-9/2; N, a share (50%), or auto (3)"),
        Option("--axis", "AXES", "fold these dimensions only: 1 is the first, -1 the last"),
        Option("-q", "", "leave out what is not the answer itself; also --quiet"),
        Option("-h", "", "this text; also --help"),
    ),
    {
        "--count": "-c",
        "--expand": "-e",
        "--fold": "-f",
        "--regroup": "-r",
        "--list": "-l",
        "--list-all": "-L",
        "--groupsources": "--list-sources",
        "--exclude": "-x",
        "--intersection": "-i",
        "--xor": "-X",
        "--all": "-a",
        "--rangeset": "-R",
        "--groupsource": "-s",
        "--groupbase": "-G",
        "--slice": "-I",
        "--separator": "-S",
        "--output-format": "-O",
        "--quiet": "-q",
        "--help": "-h",
    },
    "ctask nodes --help",
)
COMMANDS = ("-c", "-e", "-f", "-r", "-l", "-L", "--index", "--list-sources")
_OPERATIONS = ("-x", "-i", "-X")

HELP = f"""\
usage: ctask nodes -c|-e|-f|-r|-l|-L|--index NODE|--list-sources [options] [NODES…] [-x|-i|-X NODES]…

Count, expand, fold and combine node sets, and look groups up. What stands on the line is taken from left to right;
`-` is standard input, which is also read where there are no NODES at all: words, and # begins a comment.

  ctask nodes -f n1 n2 n3                n[1-3]
  ctask nodes -e @rack3 -x @down         the names of rack3 that are not down
  ctask nodes -c 'n[1-9]' -i 'n[5-20]'   5

{TABLE.told()}
Options may stand behind node sets as well. `--` ends them.

Exit status: 0 done; 1 the answer is no (--index); 2 what was asked for cannot be right.
"""


@dataclass(slots=True)
class Asked:
    """The words apart: options, and what is to be combined, in order, each with its operation ("" adds)."""

    options: dict[str, list[str]] = field(default_factory=dict)
    steps: list[tuple[str, str]] = field(default_factory=list)

    def last(self, name: str) -> str | None:
        """Return an option's value, the last one; None where it was not given."""
        return self.options.get(name, [None])[-1]

    def count(self, name: str) -> int | None:
        """Return an option's value as a whole number, 1 or more; None where it was not given."""
        text = self.last(name)
        if text is not None and not (text.isascii() and text.isdecimal() and len(text) < 19 and int(text)):
            raise OptionError(f"{name} takes a whole number, 1 or more, not {text!r}")
        return None if text is None else int(text)


def nodes(words: Sequence[str], terminal: Terminal) -> int:
    """Do what the words say, print the answer, and return the exit status.

    Raises:
        UsageError: it cannot be right.
        SystemExit: standard output cannot be written to any more.
    """
    asked = _read(words)
    if "-h" in asked.options:
        terminal.out(HELP)
        return 0
    given = [command for command in COMMANDS if command in asked.options]
    if len(given) != 1:
        what = f"{' and '.join(given)} are two" if given else "say what is to be done"
        raise OptionError(f"{what}: one of {', '.join(COMMANDS)}; ctask nodes --help tells more")
    return _Answer(asked, terminal).give(given[0])


def _read(words: Sequence[str]) -> Asked:
    asked, rest = Asked(), list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            asked.steps += [("", word) for word in rest]
            break
        if not word.startswith("-") or word == "-":
            asked.steps.append(("", word))
            continue
        for name, value in TABLE.take(word, rest):
            if name in _OPERATIONS:
                asked.steps.append((name, value))
            else:
                asked.options.setdefault(name, []).append(value)
    return asked


class _Answer:
    """One question, and who knows the groups."""

    def __init__(self, asked: Asked, terminal: Terminal) -> None:
        self._asked = asked
        self._terminal = terminal
        self._lists = Lists(terminal.say)
        self._ranges = "-R" in asked.options
        self._source = asked.last("-s")
        self._bare = "-G" in asked.options
        self._resolver: Resolver = groups.resolver(asked.last("--groupsconf"), self._source) or std_group_resolver()

    def give(self, command: str) -> int:
        """Print the answer and return the exit status."""
        if command == "--list-sources":
            self._list_sources()
        elif command in ("-l", "-L"):
            self._list_groups(command)
        elif command == "--index":
            return self._index(self._combined())
        else:
            give: Callable[[Set], None] = {
                "-c": self._count, "-e": self._expand, "-f": self._fold, "-r": self._regroup,
            }[command]  # fmt: skip
            for part in self._parts(self._chosen(self._combined())):
                give(part)
        return 0

    # What is meant

    def _combined(self) -> Set:
        """Return what the line says, from left to right."""
        steps, options, reader = self._asked.steps, self._asked.options, "-"
        found: Set | None = None
        if "-a" in options:
            if self._ranges:
                raise OptionError("-a is all nodes, and -R knows numbers only")
            found = NodeSet.fromall(resolver=self._resolver)
        elif not any(operation == "" for operation, _ in steps):
            steps, reader = [("", STANDARD_INPUT), *steps], "no node set on the line"
        for operation, group in itertools.groupby(steps, lambda step: step[0]):
            if not operation:
                more = self._set([text for _, text in group], reader)
                found = more if found is None else found | more
                continue
            for _, text in group:
                if found is None:
                    raise UsageError(f"{operation} {text}: no nodes stand before it; nodes are combined left to right")
                found = _OPERATE[operation](found, self._set([text], f"{operation} -"))
        assert found is not None
        return found

    def _set(self, texts: Sequence[str], reader: str) -> Set:
        """Return the union of sets on the line; `-` is standard input, which is read for the option `reader`."""
        words: list[Word] = []
        for text in texts:
            if text == STANDARD_INPUT:
                words += self._lists.words(text, reader)
            elif text.strip():
                words.append(Word(text))
        if self._ranges:
            return RangeSet.fromlist(word.text for word in words)
        return node_set(words, self._resolver)

    def _chosen(self, found: Set) -> Set:
        """Return what is left of a set by `-I` and `--pick`."""
        indexes = self._asked.last("-I")
        if indexes is not None:
            whole, found = found, found[0:0]
            for one in RangeSet(indexes).slices():
                found = found | whole[one]
        count = self._asked.count("--pick")
        if count is not None and count < len(found):
            names = [found[place] for place in random.sample(range(len(found)), count)]
            found = type(found).fromlist(names)
        return found

    def _parts(self, found: Set) -> Iterable[Set]:
        """Return the parts that are told each on a line, in the style that is asked for."""
        self._style(found)
        count = self._asked.count("--split")
        if count is not None and "--contiguous" in self._asked.options:
            raise OptionError("--split and --contiguous are two ways to make parts; give one of them")
        if count is not None:
            return found.split(count) if found else ()
        return found.contiguous() if "--contiguous" in self._asked.options else (found,)

    def _style(self, found: Set) -> None:
        step, axis = self._asked.last("--autostep"), self._asked.last("--axis")
        if step is not None:
            found.autostep = _autostep(step, len(found))
        if axis is not None:
            if not isinstance(found, NodeSet):
                raise OptionError("--axis is of nodes, and -R knows numbers only")
            found.fold_axis = _axes(axis)

    # What is told

    def _count(self, part: Set) -> None:
        self._say(self._formatted(str(len(part))))

    def _fold(self, part: Set) -> None:
        if self._asked.last("-O") is None:
            self._say(str(part))
            return
        try:
            formatted = type(part).fromlist(map(self._formatted, part))
        except NodeNameError as error:
            raise OptionError(f"-O: what it makes cannot be folded ({error}); -e writes it one by one") from error
        self._style(formatted)
        self._say(str(formatted))

    def _expand(self, part: Set) -> None:
        """Write names in slices: there can be more of them than memory."""
        separator = _unescaped(self._asked.last("-S") or "") if "-S" in self._asked.options else " "
        names = map(self._formatted, part)
        before = ""
        while some := list(itertools.islice(names, _AT_ONCE)):
            self._terminal.out(before + separator.join(some))
            before = separator
        self._terminal.out("\n")

    def _regroup(self, part: Set) -> None:
        if not isinstance(part, NodeSet):
            raise OptionError("-r is of nodes, and -R knows numbers only")
        self._say(one_line(part.regroup(self._source, noprefix=self._bare)))

    def _index(self, found: Set) -> int:
        node = self._asked.last("--index") or ""
        if len(type(found)(node)) != 1:
            raise UsageError(f"--index takes one node, not {node!r}")
        if node not in found:
            self._terminal.say(f"ctask: {node} is not in the node set")
            return 1
        self._say(str(found.index(node)))
        return 0

    def _list_sources(self) -> None:
        default = None if "-q" in self._asked.options else self._resolver.default_source_name
        for name in self._resolver.sources():
            self._say(one_line(name) + (" (default)" if name == default else ""))

    def _list_groups(self, command: str) -> None:
        level = len(self._asked.options[command])
        default = self._resolver.default_source_name
        if command == "-l":
            sources: list[tuple[str | None, str]] = [(self._source, self._prefix(self._source))]
        else:
            sources = [(name, self._prefix(None if name == default else name)) for name in self._resolver.sources()]
        wanted = self._combined() if self._asked.steps or "-a" in self._asked.options else None
        for source, prefix in sources:
            lines = self._all_groups(source) if wanted is None else self._groups_of(wanted, source)
            for name, held, count in lines:
                # What a source calls its groups is not ours, and a node set has no place for such a name.
                self._say(" ".join([one_line(f"{prefix}{name}"), str(held), count][:level]))

    def _all_groups(self, source: str | None) -> Iterator[tuple[str, NodeSet, str]]:
        inside = "" if source is None else f"{source}:"
        bare = len(self._asked.options.get("-l", self._asked.options.get("-L", []))) < 2
        for name in sorted(self._resolver.grouplist(source)):
            # names alone need no look at every group
            held = NodeSet() if bare else NodeSet(f"@{inside}{name}", resolver=self._resolver)
            yield name, held, str(len(held))

    def _groups_of(self, wanted: Set, source: str | None) -> Iterator[tuple[str, NodeSet, str]]:
        if not isinstance(wanted, NodeSet):
            raise OptionError("groups are of nodes, and -R knows numbers only")
        found = wanted.groups(source, noprefix=True)
        for name in sorted(found):
            group, held = found[name]
            yield name.removeprefix("@"), held, f"{len(held)}/{len(group)}"

    def _prefix(self, source: str | None) -> str:
        return "@" if source is None or self._bare else f"@{source}:"

    def _formatted(self, name: str) -> str:
        return _with(self._asked.last("-O") or "%s", name)

    def _say(self, line: str) -> None:
        self._terminal.out(line + "\n")


_OPERATE: dict[str, Callable[[Set, Set], Set]] = {
    "-x": lambda left, right: left - right,
    "-i": lambda left, right: left & right,
    "-X": lambda left, right: left ^ right,
}


def _with(text: str, name: str) -> str:
    """Return a format filled with a name: %s, or %% for a percent sign."""
    if not re.fullmatch(r"(?:[^%]|%[s%])*", text, re.DOTALL):
        raise OptionError(f"-O {text!r}: %s is the name, %% a percent sign, and there are no others")
    return re.sub("%[s%]", lambda found: name if found[0] == "%s" else "%", text)


def _unescaped(text: str) -> str:
    r"""Return text with `\n`, `\t`, `\0`, `\\` as the characters that they stand for."""
    known = {"n": "\n", "t": "\t", "r": "\r", "0": "\0", "\\": "\\"}
    return re.sub(r"\\([ntr0\\])", lambda found: known[found[1]], text)


def _autostep(text: str, count: int) -> float:
    if text == "auto":
        return 3
    share = text.removesuffix("%")
    if not (share.isascii() and share.isdecimal() and len(share) < 19):
        raise OptionError(f"--autostep takes a number of nodes, a share (50%) or auto, not {text!r}")
    return int(text) if share == text else max(3, count * int(share) / 100)


def _axes(text: str) -> list[int]:
    """Return dimensions as `NodeSet.fold_axis` has them: from 0, or from -1 backwards."""
    if re.fullmatch(r"-\d+", text):
        return [int(text)]
    axes = [int(axis) for axis in RangeSet(text).striter()]
    if 0 in axes:
        raise OptionError("--axis 0: the first dimension is 1")
    return [axis - 1 if axis > 0 else axis for axis in axes]
