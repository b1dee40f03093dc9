# SPDX-License-Identifier: Apache-2.0
"""Text for terminals: what nodes said, made harmless; outputs under their nodes; the account of a run.

Pure functions over what a worker says at the moment; they run in any thread and keep nothing.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ctask.buffers import STDOUT, Look, view
from ctask.errors import AuthError, BannerError, HandshakeError, HostKeyError, LocalResource, SessionError
from ctask.failures import failure_of, named
from ctask.gather import Cell, in_order
from ctask.nodes import NodeSet
from ctask.result import Ending, Group, NodeResult, processes_text, status_text
from ctask.states import Outcome
from ctask.worker import Worker

__all__ = ["account", "escape", "gathered", "gathered_blocks", "one_line", "repetition", "shell_word"]

#: What a terminal would act on: colours (SGR), then all controls but newline and tab, the characters that turn
#: the direction of writing, the line separators of Unicode, and surrogates, which stand for bytes that are no text.
_UNSAFE = re.compile(
    r"(?P<colour>(?:\x1b\[|\x9b)[0-9;:]*m)"
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
_RULE = "-" * 15
#: Characters of one word on a command line: Linux takes 131,072 bytes with the zero behind them.
_LONGEST_WORD = 100_000
#: Columns are padded up to this width; a longer entry pushes the rest of its own line only.
_WIDEST = 40
#: Failures whose texts say more than the fold of them, and are worth a line of their own.
_EXPLAINED = (HostKeyError, AuthError, BannerError, HandshakeError, SessionError, LocalResource)
#: `remote_state` of what ctask stopped, in words.
_STATES = {
    "gone": "ended: seen to be gone",
    "alive": "told to end, and still there",
    "left": "left running",
    "unknown": "unknown whether it still runs",
}


def escape(text: str | bytes, *, raw: bool = False, colour: Literal["drop", "keep"] = "drop") -> str:
    r"""Return text that does nothing to a terminal but show; of bytes, as UTF-8.

    Newlines and tabs stay. Colours are dropped; every other control byte and every byte that is no UTF-8 shows as
    ``\xNN``, characters that turn the direction of writing as ``\u{…}``. What was escaped once stays as it is.

    Args:
        raw: change nothing; bytes that are no UTF-8 become surrogates, as `surrogateescape` has it, so that
            encoding with it gives the exact bytes again.
        colour: `keep` lets colours through.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8", "surrogateescape")
    if raw or text.isprintable():
        return text
    return _UNSAFE.sub(_kept if colour == "keep" else _shown, text)


def _kept(match: re.Match[str]) -> str:
    return match["colour"] or _shown(match)


def _shown(match: re.Match[str]) -> str:
    if match["colour"]:
        return ""
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{{{code:04x}}}"


def one_line(text: str) -> str:
    r"""Return text escaped for one line: newlines and tabs show as ``\\x0a`` and ``\\x09``, too."""
    return escape(text).replace("\n", "\\x0a").replace("\t", "\\x09")


def shell_word(text: str) -> str:
    """Return text as one word for a shell, whatever is in it; on one line, and harmless to a terminal.

    As `shlex.quote` has it, but for two kinds: a word that begins with `=` is quoted (zsh would look for a program of
    that name), and control characters and bytes that are no UTF-8 are written as ``$'…'``, which sh does not know.
    """
    if one_line(text) != text:
        return "$'" + "".join(map(_ansi_c, text.encode("utf-8", "surrogateescape"))) + "'"
    return f"'{text}'" if text.startswith("=") and shlex.quote(text) == text else shlex.quote(text)


def gathered(source: Worker | Iterable[Group], *, raw: bool = False) -> str:
    """Return each distinct output once, under the nodes that printed it and their number, as clush does.

    Nodes stand together if they printed the same *and* ended the same way, which is said behind their number where
    that is not an exit status of 0: half an output that happens to look like a whole one is not mixed with it. By exit
    status, those without one last; then largest first, and by the first node's name. Nodes that printed nothing are
    left out.

    Args:
        raw: do not escape what the nodes printed.
    """
    return "\n".join(gathered_blocks(source, raw=raw))


def gathered_blocks(source: Worker | Iterable[Group], *, raw: bool = False) -> Iterator[str]:
    """Yield the parts of `gathered` one by one, each without its last newline; one output at a time is in memory."""
    groups = _with_empty_lines(source) if isinstance(source, Worker) else source
    for group in sorted(groups, key=_as_clush):
        output = group.output
        # Of a worker, what printed nothing is left out already; others cannot tell an empty line from nothing.
        if output or isinstance(source, Worker):
            yield f"{_RULE}\n{_header(group)}\n{_RULE}\n{escape(output, raw=raw)}"


def _with_empty_lines(worker: Worker) -> Iterator[Group]:
    """Yield the groups that printed something; those of nodes that printed an empty line without the silent ones."""
    stream = STDOUT if worker.apart else 0
    captures = {cell.node: cell.capture for cell in worker.cells}
    for group in worker.groups():
        if isinstance(group.shown, Look):
            yield group
            continue
        nodes = [node for node in group.nodes if (kept := captures[node]) is not None and not kept.empty(stream)]
        if nodes:
            yield dataclasses.replace(group, nodes=named(nodes, worker.remote))


def _as_clush(group: Group) -> tuple[bool, int, int, str]:
    """Return what the order of blocks goes by; of as many nodes, by the first one's name as text: n10 before n2."""
    return group.rc is None, group.rc or 0, -len(group.nodes), str(group.nodes[0])


def _header(group: Group) -> str:
    count = len(group.nodes)
    how = group.why or ("" if group.rc == 0 else status_text(group.outcome, group.rc))
    if how:
        return f"{_names(group.nodes)} ({count}): {one_line(how)}"
    return f"{_names(group.nodes)} ({count})" if count > 1 else _names(group.nodes)


def repetition(repeat: str, nodes: Any) -> str:
    """Return a line for a shell that repeats a command on these nodes; ``…`` stands for the command.

    Args:
        repeat: what comes before the node set, with its option last; a set too long for one word is given in several.
    """
    texts, count = [_names(nodes)], 1
    while isinstance(nodes, NodeSet) and max(map(len, texts)) > _LONGEST_WORD:
        count *= 2
        texts = [str(part) for part in nodes.split(count)]
    option = repeat.rpartition(" ")[2]
    return f"{repeat} {f' {option} '.join(map(shell_word, texts))} …"


def account(
    worker: Worker,
    *,
    prefix: str = "",
    notes: bool = False,
    repeat: str = "",
    printed: Container[Any] | None = None,
) -> str:
    """Return how a run went: one line for the whole, then a row for all that was not a plain success.

    A plain success is an exit status of 0 with output. Every other node stands in exactly one row: what happened,
    which nodes, and whether it ran there. Node sets are never cut. A worker that has not ended may be asked, too.

    Args:
        prefix: stands before the first line.
        notes: add, under its row, what a failure says beyond its name.
        repeat: what comes before a node set to repeat the command on it, ready for a shell, with the option of the
            node set last; adds a last row with the nodes on which nothing ran.
        printed: the nodes that printed something, where the worker did not gather it (otherwise silent nodes that
            exited with 0 are plain successes then), or where an empty line counts, since it is shown.
    """
    rows = _rows(worker, printed)
    not_run = worker.not_run
    cells = [(row.what, _names(named(row.nodes, worker.remote)), row.about()) for row in rows]
    if repeat and not_run:
        cells.append(("safe to repeat:", repetition(repeat, not_run), ""))
    lines = [prefix + _headline(worker)]
    for number, text in enumerate(_table(cells)):
        lines.append(text)
        if notes and number < len(rows):
            lines += rows[number].notes()
    return "\n".join(lines)


@dataclass(slots=True)
class _Row:
    """Nodes to which the same happened."""

    what: str
    detail: str
    nodes: list[Any] = field(default_factory=list)
    results: list[NodeResult] = field(default_factory=list)

    def about(self) -> str:
        """Return the last column. Times differ from node to node, so they are put in here and not folded by."""
        if not self.results or self.results[0].outcome is not Outcome.SIGNALED:
            return self._become()
        spent = [result.timings.get("running", 0.0) + result.timings.get("closing", 0.0) for result in self.results]
        low, high = f"{min(spent):.1f}", f"{max(spent):.1f}"
        # Nobody else sends KILL unasked as often as the kernel does when memory runs out.
        hint = "; OOM?" if self.results[0].signal == "KILL" else ""
        return f"ran {low} s{hint}" if low == high else f"ran {low} to {high} s{hint}"

    def _become(self) -> str:
        """Return what became of them, with the numbers that are the same for all."""
        if not self.results:
            return self.detail
        counts = {result.ending.gone for result in self.results if result.ending is not None}
        count = counts.pop() if len(counts) == 1 else None
        return _detail(self.results[0], count=count, pid=len(self.results) == 1)

    def notes(self) -> list[str]:
        errors = [result.error for result in self.results]
        # What the row says already is not said again.
        texts = [e.reason.removeprefix(e.kind).lstrip(".,;: ") for e in errors if isinstance(e, _EXPLAINED)]
        distinct = list(dict.fromkeys(one_line(text) for text in texts if text))
        more = f" (and {len(distinct) - 1} more texts like it)" if len(distinct) > 1 else ""
        return [f"      {text}{more}" for text in distinct[:1]]


def _rows(worker: Worker, printed: Container[Any] | None) -> list[_Row]:
    rows: dict[tuple[tuple[int, int], str, str], _Row] = {}
    for cell in in_order(worker):
        what = _what(cell, printed)
        if what:
            result = cell.result
            # By status where there is one, which can have 32 bits; the others in the order of their first nodes.
            rank = (2, 0) if result is None else (0, result.rc or 0) if result.outcome is Outcome.EXITED else (1, 0)
            detail = _detail(result) if result is not None else ""
            row = rows.setdefault((rank, what, detail), _Row(what, detail))
            row.nodes.append(cell.node)
            if result is not None:
                row.results.append(result)
    return [rows[key] for key in sorted(rows, key=lambda key: key[0])]


def _what(cell: Cell, printed: Container[Any] | None) -> str:
    """Return what happened to a node; nothing for a plain success."""
    result = cell.result
    if result is None:
        return "not ended"
    if not result.ok:
        return one_line(failure_of(result)[2])
    if result.rc == 0:
        return "exit 0, no output" if _silent(cell, printed) else ""
    return status_text(result.outcome, result.rc)


def _silent(cell: Cell, printed: Container[Any] | None) -> bool:
    if printed is not None:
        return cell.node not in printed
    capture = cell.capture
    if capture is None:
        return False
    # An empty line is nothing to show either; two bytes can be one.
    return capture.total <= 2 and not view(capture.get())


def _detail(result: NodeResult, *, count: int | None = None, pid: bool = False) -> str:
    """Return whether it ran, and what became of it.

    Args:
        count: processes that were ended.
        pid: with the numbers of those that are still there; they differ from node to node.
    """
    state = _state(result.ending, count, pid) if result.ending is not None else ""
    if result.ran is False:
        return "not run, nothing was sent" if isinstance(result.error, HostKeyError) else "not run"
    if result.outcome is Outcome.LOST:
        return f"may have run; {state}" if state else "may have run, and may still run"
    if result.outcome in (Outcome.TIMEOUT, Outcome.ABORTED):
        if result.ran is None:
            return f"may have run; {state or 'unknown whether it did'}"
        return f"ran; {state}" if result.ending is not None and result.ending.processes else state or "ran"
    return ""


def _state(ending: Ending, count: int | None, pid: bool) -> str:
    """Return what became of what was ended."""
    if ending.processes:
        seen = "; ".join(process.told(pid=pid) for process in ending.processes)
        return f"{f'ended {processes_text(count)}' if count else 'told to end'}; still there: {seen}"
    if ending.state == "gone" and count:
        return f"ended: {processes_text(count)}, seen to be gone"
    return _STATES.get(ending.state, "")


def _headline(worker: Worker) -> str:
    results = [cell.result for cell in worker.cells]
    good = sum(result is not None and result.ok for result in results)
    bad = [result for result in results if result is not None and not result.ok]
    parts = [f"{good or 'none'} {'exit 0' if worker.ok_codes == {0} else 'ok'}"]
    if bad:
        ended = any(result.outcome in (Outcome.EXITED, Outcome.SIGNALED) for result in bad)
        parts.append(f"{len(bad)} {'not' if ended else 'in trouble'}")
    left = results.count(None)
    if left:
        parts.append(f"{left} not ended")
    nodes = "1 node" if len(results) == 1 else f"{len(results)} nodes"
    return f"{nodes} in {worker.elapsed:.1f} s: {' · '.join(parts)}"


def _table(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    first = max((len(row[0]) for row in rows if len(row[0]) <= _WIDEST), default=0)
    second = max((len(row[1]) for row in rows if row[2] and len(row[1]) <= _WIDEST), default=0)
    return [f"  {what:<{first}}  {nodes:<{second}}  {detail}".rstrip() for what, nodes, detail in rows]


def _names(nodes: Any) -> str:
    """Return a node set folded, or the keys of local commands; a command without a key goes by its text."""
    if isinstance(nodes, list):
        return ",".join(one_line(node.command if isinstance(node, Worker) else str(node)) for node in nodes)
    return str(nodes)


def _ansi_c(code: int) -> str:
    """Return a byte as it stands in ``$'…'``.

    Octal, since hexadecimal digits would run on into those that follow; bash's history takes a quote for the end even
    behind a backslash, and then a `!` for an event.
    """
    character = chr(code)
    return character if " " <= character <= "~" and character not in "\\'!" else f"\\{code:03o}"
