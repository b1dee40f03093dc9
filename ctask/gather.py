# SPDX-License-Identifier: Apache-2.0
"""What many nodes printed and how they ended, put together: the views that a worker and a task share.

Any thread may look at any time: what runs still shows what is there now.
"""

from __future__ import annotations

import abc
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Any, Protocol

from ctask.buffers import STDERR, STDOUT, Capture, Look, Output, view
from ctask.errors import JobsFailed
from ctask.failures import Failures, failure_of, named
from ctask.nodes import NodeSet
from ctask.result import Group, NodeResult
from ctask.states import Outcome

__all__ = ["Cell", "Gathered", "Source", "counts", "exit_code", "groups", "in_order"]


class Cell(Protocol):
    """One job, as far as its looks are concerned."""

    @property
    def node(self) -> Any: ...
    @property
    def capture(self) -> Capture | None: ...
    @property
    def result(self) -> NodeResult | None: ...


class Source(Protocol):
    """One worker, as far as its looks are concerned; cells stand in the order in which they start."""

    @property
    def nodes(self) -> Any: ...
    @property
    def cells(self) -> Sequence[Cell]: ...
    @property
    def remote(self) -> bool: ...
    @property
    def apart(self) -> bool: ...


def in_order(source: Source) -> list[Cell]:
    """Return the cells in the order of their nodes."""
    place = {node: number for number, node in enumerate(source.nodes)}
    return sorted(source.cells, key=lambda cell: place[cell.node])


class _Pile:
    """Nodes that printed the same: where the first of them stands, what it printed, and the nodes."""

    __slots__ = ("first", "look", "nodes", "remote")

    def __init__(self, first: tuple[int, int], source: Source, look: Look) -> None:
        self.first = first
        self.look = look
        self.remote = source.remote
        self.nodes: list[Any] = []


def _piles(sources: Sequence[Source], errors: bool, match: Container[Any] | None) -> list[_Pile]:
    """Return what was printed, each distinct output once, largest pile first, then by first node."""
    piles: dict[object, _Pile] = {}
    alike = True  # whether equal keys are all that makes equal output
    for order, source in enumerate(sources):
        if errors and not source.apart:
            continue
        stream = (STDERR if errors else STDOUT) if source.apart else 0
        alike = alike and (order == 0 or not piles)
        for place, cell in enumerate(source.cells):
            capture = cell.capture
            if capture is None or capture.empty(stream) or (match is not None and cell.node not in match):
                continue
            ended = cell.result is not None
            alike = alike and ended and capture.plain(stream)
            # A capture that still grows is compared by its bytes of this moment.
            key: object = (order, *capture.key(stream)) if ended else (order, place)
            pile = piles.get(key)
            if pile is None:
                pile = piles[key] = _Pile((order, place), source, capture.look(stream))
            pile.nodes.append(cell.node)
    found = list(piles.values()) if alike else _merged(piles.values())
    found.sort(key=lambda pile: (-len(pile.nodes), pile.first))
    return found


def _merged(piles: Iterable[_Pile]) -> list[_Pile]:
    """Put together what looks the same though its bytes, or its stores, differ."""
    looks: dict[bytes, _Pile] = {}
    for pile in piles:
        twin = looks.setdefault(pile.look.digest(), pile)
        if twin is not pile:
            known = set(twin.nodes)
            twin.nodes.extend(node for node in pile.nodes if node not in known)
            twin.remote = twin.remote and pile.remote
    return list(looks.values())


class Gathered(abc.ABC):
    """Results of one or several workers. The names are ClusterShell's.

    Thread safety: every method may be called in any thread, also while commands run.
    """

    @abc.abstractmethod
    def _sources(self) -> Sequence[Source]:
        """Return the workers that are looked at."""

    def _cells(self, match: Container[Any] | None = None) -> Iterator[tuple[Source, Cell]]:
        for source in self._sources():
            for cell in source.cells:
                if match is None or cell.node in match:
                    yield source, cell

    def iter_buffers(self, match_keys: object = None) -> Iterator[tuple[Output, Any]]:
        """Yield (output, nodes) for each distinct output: most nodes first, then by first node.

        Output is without its last newline; nodes are a NodeSet, for local commands a list of keys. Nodes that
        printed nothing are in none. With `stderr=True` it is standard output alone.

        Args:
            match_keys: only these nodes: a node set, or anything that has `in`.
        """
        for pile in _piles(self._sources(), errors=False, match=_match(match_keys)):
            yield pile.look.view(), named(pile.nodes, pile.remote)

    def iter_errors(self, match_keys: object = None) -> Iterator[tuple[Output, Any]]:
        """As `iter_buffers`, of standard error; of workers with `stderr=True` only."""
        for pile in _piles(self._sources(), errors=True, match=_match(match_keys)):
            yield pile.look.view(), named(pile.nodes, pile.remote)

    def node_buffer(self, node: Any) -> Output:
        """Return what a node printed, without the last newline; several workers' outputs joined by a newline."""
        return self._node_output(node, errors=False)

    def node_error(self, node: Any) -> Output:
        """Return what a node printed on standard error, where that is told apart (`stderr=True`)."""
        return self._node_output(node, errors=True)

    def _node_output(self, node: Any, *, errors: bool) -> Output:
        found = []
        for source, cell in self._cells((node,)):
            if cell.capture is not None and (source.apart or not errors):
                stream = (STDERR if errors else STDOUT) if source.apart else 0
                if not cell.capture.empty(stream):
                    found.append(view(cell.capture.get(stream)))
        return found[0] if len(found) == 1 else Output(b"\n".join(found))

    def node_retcode(self, node: Any) -> int:
        """Return a node's exit status, the largest of several workers'; 255 where it was not reached, or lost.

        Raises:
            KeyError: no such node, or none of its commands has ended by itself (timeout, abort).
        """
        codes = [cell.result.rc for _, cell in self._cells((node,)) if cell.result is not None]
        known = [code for code in codes if code is not None]
        if not known:
            raise KeyError(node)
        return max(known)

    def iter_retcodes(self, match_keys: object = None) -> Iterator[tuple[int, Any]]:
        """Yield (exit status, nodes), by status."""
        found: dict[int, dict[Any, bool]] = {}
        for source, cell in self._cells(_match(match_keys)):
            if cell.result is not None and cell.result.rc is not None:
                found.setdefault(cell.result.rc, {})[cell.node] = source.remote
        for code in sorted(found):
            yield code, named(found[code], all(found[code].values()))

    def max_retcode(self) -> int | None:
        """Return the largest exit status; None where no command has ended by itself."""
        return max((code for code, _ in self.iter_retcodes()), default=None)

    def num_timeout(self) -> int:
        """Return how many jobs timed out."""
        return sum(1 for _ in self.iter_keys_timeout())

    def iter_keys_timeout(self) -> Iterator[Any]:
        """Yield the node of each job that timed out."""
        for _, cell in self._cells():
            if cell.result is not None and cell.result.outcome is Outcome.TIMEOUT:
                yield cell.node

    def failures(self) -> Failures:
        """Return what went wrong, folded: (phase, error class, text) -> nodes; what has not ended is in none."""
        return Failures.fold(
            (cell.result, source.remote)
            for source in self._sources()
            for cell in in_order(source)
            if cell.result is not None
        )

    def check(self) -> None:
        """Return if every job has ended well.

        Raises:
            JobsFailed: the folded failures.
        """
        failures = self.failures()
        if failures:
            raise JobsFailed(str(failures), failures)


def _match(keys: object) -> Container[Any] | None:
    if keys is None or isinstance(keys, (NodeSet, set, frozenset, dict)):
        return keys
    if isinstance(keys, str):
        return NodeSet(keys)
    if isinstance(keys, Iterable):
        return list(keys)
    if isinstance(keys, Container):
        return keys
    raise TypeError(f"match_keys is a node set or a collection of keys, not {keys!r}")


class _Seen:
    """What cells look the same by: their place in the store, or where that is not enough a digest of what is seen."""

    def __init__(self, cells: Sequence[Cell], stream: int) -> None:
        self._stream = stream
        # One cell that has to be compared by what is seen of it makes all of them so.
        captures = [cell.capture for cell in cells if cell.capture is not None]
        ended = all(cell.result is not None for cell in cells)
        self._alike = (
            ended
            and len({id(capture.store) for capture in captures}) <= 1
            and all(capture.plain(stream) for capture in captures)
        )
        self._digests: dict[object, bytes] = {}

    def of(self, cell: Cell) -> tuple[object, Look | None]:
        """Return the key of a cell, and what it printed; None for nothing, and for an empty line."""
        capture, ended = cell.capture, cell.result is not None
        look = capture.look(self._stream) if capture is not None else None
        if capture is None or look is None or (look.size <= 2 and not look.view()):
            return None, None
        key: object = capture.key(self._stream)
        if self._alike and ended:
            return key, look
        if not ended:
            return look.digest(), look
        digest = self._digests.get(key)
        if digest is None:
            digest = self._digests[key] = look.digest()
        return digest, look


def groups(source: Source) -> list[Group]:
    """Return every node in exactly one group: same output, status and reason; largest first, by first node."""
    piles: dict[object, tuple[int, list[Any], Look | None, Cell]] = {}
    stream = STDOUT if source.apart else 0
    seen = _Seen(source.cells, stream)
    for place, cell in enumerate(source.cells):
        result = cell.result
        key, look = seen.of(cell)
        end = (result.outcome, result.rc, failure_of(result) if not result.ok else ()) if result is not None else None
        pile = piles.setdefault((end, key), (place, [], look, cell))
        pile[1].append(cell.node)
    found = []
    for _, nodes, look, cell in sorted(piles.values(), key=lambda pile: (-len(pile[1]), pile[0])):
        result = cell.result
        output = look if look is not None else Output(b"")
        why = failure_of(result)[2] if result is not None and result.error is not None else ""
        if result is not None and result.error is None:
            why = result.why
        outcome, rc = (result.outcome, result.rc) if result is not None else (None, None)
        found.append(Group(named(nodes, source.remote), output, rc, outcome, why))
    return found


def exit_code(results: Iterable[NodeResult | None]) -> int:
    """Return 0: all ok; 1: some exited otherwise, or by a signal; 3: some not run, timed out, lost or not ended."""
    code = 0
    for result in results:
        if result is None or result.outcome not in (Outcome.EXITED, Outcome.SIGNALED):
            return 3
        if not result.ok:
            code = 1
    return code


def counts(results: Iterable[NodeResult | None]) -> str:
    """Return how jobs stand, in a few words: ``89 exit 0 · 1 exit 1 · 1 running · 5 in trouble``."""
    exits: Counter[int] = Counter()
    trouble = running = 0
    for result in results:
        if result is None:
            running += 1
        elif result.outcome is Outcome.EXITED and result.rc is not None:
            exits[result.rc] += 1
        else:
            trouble += 1
    parts = [f"{exits[code]} exit {code}" for code in sorted(exits)]
    parts += [f"{running} running"] * bool(running) + [f"{trouble} in trouble"] * bool(trouble)
    return " · ".join(parts) or "no nodes"
