# SPDX-License-Identifier: Apache-2.0
"""Where the output of one job goes: into the store of its worker, and to its handlers.

A job's own. Runs in the dispatcher, but for what says otherwise.
"""

from __future__ import annotations

from typing import Any

from ctask.buffers import Capture, Loose
from ctask.delivery import Delivery
from ctask.errors import LocalResource, NodeError
from ctask.result import NodeResult
from ctask.runtime import Runtime, Submission

__all__ = ["Intake"]


class Intake:
    """What the current try of a job has printed, and what its handlers are still to hear."""

    __slots__ = ("_delivery", "_run", "_store", "_work")

    def __init__(self, run: Runtime, work: Submission, node: Any) -> None:
        self._run = run
        self._work = work
        self._store = self._empty()
        self._delivery = Delivery(work, node, apart=work.apart)

    @property
    def capture(self) -> Capture | None:
        """What the node printed; None where nothing is gathered. Any thread."""
        return self._store if isinstance(self._store, Capture) else None

    @property
    def waiting(self) -> int:
        """How many bytes wait for handlers. Any thread; of a moment ago."""
        return self._delivery.waiting()

    def submitted(self) -> None:
        """The job is on its way: only an abort from now on keeps its lines from its handlers."""
        self._delivery.epoch = self._run.mailbox.epoch

    def mute(self) -> None:
        """Give its handlers no line any more."""
        self._delivery.mute()

    def keep(self, box: list[tuple[int, bytes]]) -> None:
        """Store output, and tell the mailbox where somebody reads it.

        Raises:
            LocalResource: it could not be kept; what came before it is, and is delivered.
        """
        store, delivery = self._store, self._delivery
        listened = bool(self._work.handlers.read) and not delivery.muted
        before, failure = store.total, None
        try:
            if isinstance(store, Capture) or listened:
                for stream, chunk in box:
                    store.append(stream, chunk)
        except LocalResource as error:
            failure = error.with_traceback(None)  # its frames hold what was stored, and this error
        if listened:
            if delivery.reader is None:
                # Whoever listens from now on hears from the start, as far as it is kept.
                delivery.reader = store.reader()
                before = 0
            self._run.mailbox.readable(delivery, store.total - before)
        if failure is not None:
            raise failure

    def seal(self) -> None:
        """Nothing more comes of this try."""
        if isinstance(self._store, Capture):
            self._store.seal()

    def again(self, attempt: int, error: NodeError, delay: float) -> None:
        """Begin anew for another try; handlers hear of the one that was."""
        self._run.mailbox.retried(self._delivery, attempt, error, delay)
        self._delivery = self._delivery.again()
        self._store = self._empty()

    def ended(self, result: NodeResult) -> None:
        """Tell the end."""
        self._run.mailbox.ended(self._delivery, result.rc, result)

    def _empty(self) -> Capture | Loose:
        store = self._work.store
        return Capture(store) if store.gather else Loose(store)
