# SPDX-License-Identifier: Apache-2.0
"""The line that shrinks while a command runs: how many nodes have ended, and who is waited for.

Runs in a thread of its own, while a person looks on; it reads the worker and writes to the terminal, and both allow it.
"""

from __future__ import annotations

import contextlib
import threading
from types import TracebackType
from typing import Any, Self

from ctask.cli.terminal import Terminal
from ctask.nodes import NodeSet
from ctask.worker import Worker

__all__ = ["Progress"]

#: Seconds before the line is shown at all: most commands are over by then.
_AFTER = 1.0
#: Seconds between two looks.
_EVERY = 0.5


class Progress:
    """Shows the line as long as a `with` block lasts; nowhere but on a terminal."""

    def __init__(self, worker: Worker, terminal: Terminal) -> None:
        self._worker = worker
        self._terminal = terminal
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="ctask-cli/progress", daemon=True)

    def __enter__(self) -> Self:
        if self._terminal.watched:
            with contextlib.suppress(RuntimeError):  # no thread to be had: there is no line, and all else goes on
                self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._terminal.clear()

    def _look(self) -> None:
        wait = _AFTER
        while not self._over.wait(wait):
            wait = _EVERY
            self._terminal.progress(progress_line(self._worker))


def progress_line(worker: Worker) -> str:
    """Return ``ctask: 93/96  waiting 12 s for n[43,45-46]  (running n43 · tcp n[45-46])``."""
    phases: dict[str, list[Any]] = {}
    for job in worker.jobs:
        if job.result is None:
            phases.setdefault(job.phase, []).append(job.node)
    pending = [node for nodes in phases.values() for node in nodes]
    where = " · ".join(f"{phase} {NodeSet.fromlist(nodes)}" for phase, nodes in phases.items())
    done = f"ctask: {len(worker) - len(pending)}/{len(worker)}"
    if not pending:
        return done
    return f"{done}  waiting {worker.elapsed:.0f} s for {NodeSet.fromlist(pending)}  ({where})"
