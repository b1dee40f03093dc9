# SPDX-License-Identifier: Apache-2.0
"""Where the output of one job goes: into the store of its worker, and to its handlers.

A job's own. Runs in the dispatcher, but for what says otherwise.
"""

from __future__ import annotations

import weakref
from typing import Any

from ctask.buffers import Capture, Loose
from ctask.delivery import Delivery
from ctask.errors import LocalResource, NodeError
from ctask.result import NodeResult
from ctask.runtime import Runtime, Submission

__all__ = ["Intake"]


class Intake:
    """What the current try of a job has printed, and what its handlers are still to hear."""

    __slots__ = ("_delivery", "_left", "_run", "_store", "_work")

    def __init__(self, run: Runtime, work: Submission, node: Any) -> None:
        self._run = run
        self._work = work
        self._store = self._empty()
        self._delivery: Delivery | None = Delivery(work, node, apart=work.apart)
        self._left: weakref.ref[Delivery] | None = None

    @property
    def capture(self) -> Capture | None:
        """What the node printed; None where nothing is gathered. Any thread."""
        return self._store if isinstance(self._store, Capture) else None

    @property
    def waiting(self) -> int:
        """How many bytes wait for handlers. Any thread; of a moment ago."""
        delivery = self._delivery
        return delivery.waiting() if delivery is not None else 0

    def submitted(self) -> None:
        """The job is on its way: only an abort from now on keeps its lines from its handlers."""
        assert self._delivery is not None
        self._delivery.epoch = self._run.mailbox.epoch

    def mute(self) -> None:
        """Give its handlers no line any more."""
        delivery = self._delivery or (self._left() if self._left is not None else None)
        if delivery is not None:
            delivery.mute()

    def keep(self, box: list[tuple[int, bytes]]) -> None:
        """Store output, and tell the mailbox where somebody reads it.

        Raises:
            LocalResource: it could not be kept; what came before it is, and is delivered.
        """
        store, delivery = self._store, self._delivery
        assert delivery is not None
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
        assert self._delivery is not None
        self._run.mailbox.retried(self._delivery, attempt, error, delay)
        self._delivery = self._delivery.again()
        self._store = self._empty()

    def ended(self, result: NodeResult) -> None:
        """Tell the end."""
        if self._delivery is not None:
            self._run.mailbox.ended(self._delivery, result.rc, result)

    def over(self) -> None:
        """The job has ended: keep what was printed, and of what is still to be delivered only a look at it.

        The mailbox holds that as long as it is needed, and with it the worker, which holds the job.
        """
        if self._delivery is not None:
            self._left, self._delivery = weakref.ref(self._delivery), None
            del self._work

    def _empty(self) -> Capture | Loose:
        store = self._work.store
        return Capture(store) if store.gather else Loose(store)
