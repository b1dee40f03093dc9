# SPDX-License-Identifier: Apache-2.0
"""What went wrong, folded: the one place that says which failures are the same, and how a report of them reads.

Frozen records and pure functions; any thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ctask.errors.text import printable
from ctask.nodes import NodeSet
from ctask.result import NodeResult

__all__ = ["Failures", "failure_of", "named"]


class Failures(Mapping[tuple[str, str, str], Any]):
    """What went wrong, as a mapping: (phase, error class, text) -> the nodes that it went wrong on.

    The text is `result.why` without node, address and measured time, so that what is the same is one entry. Nodes are a
    `NodeSet`, for local commands a list of keys. The entry with the most nodes comes first, then by first node.
    `str()` is the report, on one line that is fit for a terminal: ``exit 2: n[3,9] · tcp: refused: rack7-[1-40]``.

    Compares equal to a dict of the same. Thread safety: it never changes; a later look is another object.
    """

    __slots__ = ("_folded",)

    def __init__(self, folded: Mapping[tuple[str, str, str], Any]) -> None:
        self._folded = dict(folded)

    @classmethod
    def fold(cls, results: Iterable[tuple[NodeResult, bool]]) -> Failures:
        """Return the failures among results, each of which comes with whether its node is a remote one.

        Results come in the order of their nodes: of entries with as many nodes, the one that is met first comes first.
        """
        found: dict[tuple[str, str, str], dict[Any, bool]] = {}
        for result, remote in results:
            if not result.ok:
                found.setdefault(failure_of(result), {})[result.node] = remote
        # The sort is stable: equals stay in the order in which they were met.
        largest = sorted(found.items(), key=lambda item: -len(item[1]))
        return cls({failure: named(nodes, all(nodes.values())) for failure, nodes in largest})

    def __getitem__(self, failure: tuple[str, str, str]) -> Any:
        return self._folded[failure].copy()

    def __iter__(self) -> Iterator[tuple[str, str, str]]:
        return iter(self._folded)

    def __len__(self) -> int:
        return len(self._folded)

    def __str__(self) -> str:
        return " · ".join(f"{text}: {_listed(nodes)}" for (_, _, text), nodes in self._folded.items())

    def __repr__(self) -> str:
        return f"<Failures of {sum(map(len, self._folded.values()))} jobs: {self}>" if self else "<Failures: none>"


def failure_of(result: NodeResult) -> tuple[str, str, str]:
    """Return the entry of `Failures` that a result which is not ok belongs to."""
    error = result.error
    if error is None:
        return "running", "CommandFailed", result.why or "exit 0, which is not in ok_codes"
    return error.phase, type(error).__name__, error.folded()


def named(nodes: Iterable[Any], remote: bool) -> Any:
    """Return a NodeSet of nodes, or a list of the keys of local commands."""
    return NodeSet.fromlist(nodes) if remote else list(nodes)


def _listed(nodes: Any) -> str:
    # A local command without a key is known by its worker, and people know that by what it runs.
    names = [str(getattr(node, "command", node)) for node in nodes] if not isinstance(nodes, NodeSet) else [str(nodes)]
    return printable(",".join(names))
