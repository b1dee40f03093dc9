# SPDX-License-Identifier: Apache-2.0
"""From the arguments of `shell`, `run` and `submit` to a worker with its jobs; bad input ends here.

Runs in the thread that submits, before anything is sent.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
import os
import re
import shlex
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ctask.buffers import BufferStore, MemoryBudget, Output
from ctask.command import command_of
from ctask.errors import CommandError, NodeSetError, NodeSetExternalError, OptionError, UsageError
from ctask.feed import Feed
from ctask.handler import EVENTS, Handlers
from ctask.job import Job
from ctask.nodes import NodeSet, NodesLike
from ctask.nodes.names import check as check_name
from ctask.numeric import shown, whole
from ctask.options import Call, Command, JobOptions, Options, Target
from ctask.runtime import Runtime
from ctask.worker import Worker

__all__ = ["GIVEN_NOT", "MOST_NODES", "CommandLike", "Stdin", "Submitter", "node_set", "read_once"]

#: More nodes than that in one command are refused by arithmetic, before they are spelled out.
MOST_NODES = 100_000

#: What targets are checked by, once for each sort: all but the address. Left out and not listed, so that no field that
#: a check goes by can be forgotten.
_SORT = operator.attrgetter(*(field.name for field in dataclasses.fields(Target) if field.name != "address"))

#: `nodes` was not given at all: a local command. `stdin` was not: see `Worker.admit`. None is an error for both.
GIVEN_NOT: Any = type("NotGiven", (), {"__repr__": lambda self: "not given"})()

_PLACEHOLDER = re.compile(r"%(?:%|\{(\w*)\}|(host|rank|h|n)(?![A-Za-z])|(.?))", re.DOTALL)

#: What a session can run: text or bytes for a shell, or a list of words.
CommandLike = str | bytes | Sequence[str | bytes | os.PathLike[str]]
#: What standard input can be; a file object or a function of the node besides.
Stdin = bool | bytes | str | os.PathLike[str] | Any


class Submitter:
    """Makes the workers of one task."""

    def __init__(self, run: Runtime, options: Options, budget: MemoryBudget) -> None:
        self._run = run
        self._options = options
        self._budget = budget
        self._numbers = itertools.count(1)  # in one step, whichever threads submit

    def make(
        self,
        task: Any,
        command: CommandLike,
        *,
        nodes: NodesLike,
        key: Hashable,
        handler: object,
        stdin: Stdin,
        expect: int | None,
        allow_empty: bool,
        arguments: dict[str, object],
    ) -> Worker:
        """Return a worker whose jobs wait to be submitted.

        Raises:
            UsageError: something in it cannot be right.
        """
        callbacks = {name: arguments.pop(name) for name in list(arguments) if name.startswith("on_")}
        call = self._options.call(arguments)
        handlers = Handlers()
        _add_handlers(handlers, handler, callbacks)
        remote = nodes is not GIVEN_NOT
        if remote and key is not None:
            raise OptionError("key is the label of a local command; a command on nodes has none")
        names = _names(nodes, expect, allow_empty) if remote else NodeSet()
        worker = Worker(
            task,
            self._run,
            next(self._numbers),
            _text_of(command),
            remote=remote,
            apart=call.get("stderr"),
            ok_codes=call.get("ok_codes"),
            handlers=handlers,
            store=BufferStore(self._budget, gather=call.get("gather")),
            may_open=stdin is GIVEN_NOT,
        )
        if remote:
            worker.assign(self._remote_jobs(worker, command, names, call, stdin), names)
        else:
            node = worker if key is None else key
            target, limits = call.local()
            line = command_of(command, remote=False, stdin=_kept_open(stdin), pty=call.get("pty"))
            now = self._run.dispatcher.clock()
            worker.assign([self._job(worker, node, target, line, limits, now, stdin)], [node])
        return worker

    def _job(
        self, worker: Worker, node: Any, target: Target, command: Command, limits: JobOptions, now: float, stdin: Stdin
    ) -> Job:
        feed = _feed(stdin, node, again=limits.retry is not None and limits.retry.idempotent)
        if feed is None and command.stdin:  # a function gave this node none: it is to read its end at once
            command = dataclasses.replace(command, stdin=False)
        return Job(self._run, worker, node, target, command, limits, now, feed)

    def _remote_jobs(self, worker: Worker, command: Any, names: NodeSet, call: Call, stdin: Stdin) -> list[Job]:
        now = self._run.dispatcher.clock()
        keep_open = _kept_open(stdin)
        pty = call.get("pty")
        line = command_of(command, remote=True, stdin=keep_open, pty=pty)
        lines: Callable[[int, str], Command] | None = None
        checked: set[tuple[object, ...]] = set()
        first: list[Job] = []
        last: list[Job] = []
        for rank, node in enumerate(names):
            target, limits = call.resolve(node)
            if target.transport == "local":
                lines = lines or _per_node(command, len(names), stdin=keep_open, pty=pty)
                first.append(self._job(worker, node, Target("local"), lines(rank, node), limits, now, stdin))
                continue
            transport = self._run.transport(target.transport)
            sort = _SORT(target)
            if sort not in checked:
                transport.check(target)
                checked.add(sort)
            job = self._job(worker, node, target, line, limits, now, stdin)
            (last if transport.shunned(target, now) else first).append(job)
        return first + last


def node_set(nodes: NodesLike) -> NodeSet:
    """Return a node set from its text, or from names.

    Raises:
        NodeSetError: it cannot be read; nothing was run.
    """
    try:
        return NodeSet(nodes) if isinstance(nodes, (str, NodeSet)) else NodeSet.fromlist(nodes)
    except NodeSetExternalError as error:
        raise error.before_anything() from error.__cause__


def _names(nodes: Any, expect: int | None, allow_empty: bool) -> NodeSet:
    try:
        return _checked_names(nodes, expect, allow_empty)
    except NodeSetExternalError as error:
        raise error.before_anything() from error.__cause__


def _checked_names(nodes: Any, expect: int | None, allow_empty: bool) -> NodeSet:
    if nodes is None:
        raise UsageError("nodes=None: say which nodes; leave nodes out to run the command on this machine")
    if isinstance(nodes, (str, NodeSet)):
        found = NodeSet(nodes)
    elif isinstance(nodes, Iterable):
        found = NodeSet.fromlist(nodes)
    else:
        raise UsageError(f"nodes is a node set or names of nodes, not {nodes!r}")
    count = len(found)
    if not count and not allow_empty:
        raise UsageError(f"the node set is empty ({nodes!r}): nothing was run; allow_empty=True if it may be")
    if count > MOST_NODES:
        raise NodeSetError(str(nodes)[:80], None, f"{count:,} nodes are more than {MOST_NODES:,}; submit it in parts")
    if expect is not None and count != whole("expect", expect, 0):
        raise UsageError(f"expected {shown(expect)} nodes, and there are {count}: {found}. Nothing was run")
    for node in found:
        check_name(node)
    return found


def _per_node(command: Any, count: int, *, stdin: bool, pty: bool) -> Callable[[int, str], Command]:
    """Return what makes the local command of one node: %h its name, %n its rank, %% a percent sign."""
    plain = command_of(command, remote=False, stdin=stdin, pty=pty)
    words = [word.decode("utf-8", "surrogateescape") for word in (plain.argv or (plain.line,))]
    seen = any("h" in (match[2] or match[1] or "")[:1] for word in words for match in _PLACEHOLDER.finditer(word))
    if count > 1 and not seen:
        raise CommandError(
            f"this command does not name the node (%h) and would run {count} times on this machine. "
            'Did you mean to leave out transport="local"?'
        )

    def make(rank: int, node: str) -> Command:
        def value(match: re.Match[str]) -> str:
            name = match[1] if match[1] is not None else match[2]
            if match[0] == "%%":
                return "%"
            if name in ("h", "host"):
                return node
            if name in ("n", "rank"):
                return str(rank)
            raise CommandError(f"{match[0]!r} is no placeholder of a local command (%h, %n); use %% for a '%'")

        filled = tuple(_PLACEHOLDER.sub(value, word).encode("utf-8", "surrogateescape") for word in words)
        if plain.argv:
            return Command(argv=filled, stdin=stdin, pty=pty)
        return Command(line=filled[0], stdin=stdin, pty=pty)

    return make


def _feed(stdin: Stdin, node: Any, *, again: bool) -> Feed | None:
    """Return what feeds one job's standard input; None where it is closed from the start."""
    if callable(stdin):
        stdin = stdin(node)
    if stdin is False or stdin is None or stdin is GIVEN_NOT:
        return None
    feed = Feed(again=again)
    if stdin is True:
        return feed
    if isinstance(stdin, (bytes, bytearray, memoryview)):
        feed.put(bytes(stdin))
    elif isinstance(stdin, (str, os.PathLike)):
        path = Path(stdin)
        if not path.is_file() or not os.access(path, os.R_OK):
            raise OptionError(f"stdin={str(path)!r} is not a file that can be read")
        feed.put(path)
    else:
        raise OptionError(f"stdin is True, False, bytes, a path, a file or a function of the node, not {stdin!r}")
    feed.end()
    return feed


def _kept_open(stdin: Stdin) -> bool:
    """Return whether a command has a standard input from the start; one that is not given may be opened later."""
    return stdin is not False and stdin is not GIVEN_NOT


def read_once(stdin: Stdin) -> Stdin:
    """Return the bytes of a file object, which many jobs cannot share; anything else as it is.

    Raises:
        OptionError: a file object that gives text that cannot be encoded.
    """
    if stdin is None:
        raise OptionError("stdin is True, False, bytes, a path, a file or a function of the node, not None")
    read = getattr(stdin, "read", None)
    if read is None:
        return stdin
    data = read()
    return data.encode() if isinstance(data, str) else data


def _text_of(command: Any) -> str:
    """Return a command as people read it."""
    if isinstance(command, (list, tuple)):
        return shlex.join(str(Output(word)) if isinstance(word, bytes) else str(word) for word in command)
    return str(Output(command)) if isinstance(command, bytes) else str(command)


def _add_handlers(handlers: Handlers, handler: object, callbacks: dict[str, object]) -> None:
    """Register an object, then functions given as `on_read=…`."""
    if handler is not None:
        handlers.add_object(handler)
    for name, callback in callbacks.items():
        event = name.removeprefix("on_")
        if event not in EVENTS:
            raise OptionError(f"no such event: {name}; there are: {', '.join('on_' + event for event in EVENTS)}")
        if callback is not None:
            handlers.add(event, callback)
