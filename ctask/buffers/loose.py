# SPDX-License-Identifier: Apache-2.0
"""Output that nobody gathers: it waits for its handlers, in memory or above the ceiling in a file, and is gone then.

The dispatcher appends, the owner takes. What both could touch is a deque of runs, and each run belongs to who has
taken it out.
"""

from __future__ import annotations

from collections import deque
from typing import Self

from ctask.buffers.budget import MemoryBudget
from ctask.buffers.spill import SLOT, Place
from ctask.buffers.store import OVERHEAD, PIECES, BufferStore
from ctask.errors import LocalResource

__all__ = ["Loose"]


class Loose:
    """What one attempt printed and no handler has had yet.

    Attributes:
        total: bytes that were ever stored.
    """

    __slots__ = ("_full", "_runs", "_store", "total")

    def __init__(self, store: BufferStore) -> None:
        self._store = store
        self._full = False
        self._runs: deque[_Run] = deque()
        self.total = 0

    def append(self, stream: int, chunk: bytes) -> None:
        """Add a chunk, unless an earlier one has failed. Dispatcher.

        Raises:
            LocalResource: as `Capture.append`.
        """
        if self._full:
            return
        # Out of the owner's reach while it changes. The owner may find nothing for that moment: it is told of new
        # output after this.
        run = self._last(stream)
        runs = [run]
        try:
            run.add(chunk)
            self.total += len(chunk)
            if run.size >= SLOT and self._store.budget.over():
                runs = self._spilled(run)
        except LocalResource:
            self._full = True
            raise
        except MemoryError as error:
            self._full = True
            raise LocalResource("no memory for its output", kind="no memory") from error
        finally:
            self._runs.extend(runs)

    def _last(self, stream: int) -> _Run:
        try:
            run = self._runs.pop()
        except IndexError:
            return _Run(self._store.budget, stream)
        if run.stream == stream and run.size < SLOT:
            return run
        self._runs.append(run)
        return _Run(self._store.budget, stream)

    def _spilled(self, run: _Run) -> list[_Run]:
        """Write the full slots of a run; return what stands for it, with what is left of it in memory."""
        data = run.read()
        full = len(data) // SLOT * SLOT
        parts: list[bytes | Place] = [self._store.spill(data[at : at + SLOT]) for at in range(0, full, SLOT)]
        if full < len(data):
            parts.append(data[full:])
        return [_Run(run.budget, run.stream, part) for part in parts]

    def reader(self) -> Self:
        return self

    def unread(self) -> bool:
        return bool(self._runs)

    def take(self, limit: int) -> list[tuple[int, bytes]]:
        """Return at most about `limit` bytes, which are gone from here. Owner."""
        runs: list[tuple[int, bytes]] = []
        while limit > 0:
            try:
                run = self._runs.popleft()
            except IndexError:
                break
            data = run.read()
            limit -= len(data)
            runs.append((run.stream, data))
        return runs


class _Run:
    """Bytes of one stream, in the pieces in which they came or in a file. Belongs to one thread at a time."""

    __slots__ = ("_data", "budget", "size", "stream")

    def __init__(self, budget: MemoryBudget, stream: int, data: bytes | Place = b"") -> None:
        self.budget = budget
        self.stream = stream
        self._data: list[bytes] | Place = data if isinstance(data, Place) else [data]
        #: of what is in a file as well; a run there takes no more
        self.size = data.size if isinstance(data, Place) else len(data)
        budget.charge(self._cost())

    def _cost(self) -> int:
        return OVERHEAD + (self.size if isinstance(self._data, list) else 0)

    def add(self, chunk: bytes) -> None:
        """Add to a run in memory. Dispatcher."""
        assert isinstance(self._data, list)
        self._data.append(chunk)
        self.size += len(chunk)
        self.budget.charge(len(chunk))
        if len(self._data) > PIECES:
            self._data = [b"".join(self._data)]

    def read(self) -> bytes:
        data = self._data
        return b"".join(data) if isinstance(data, list) else data.read()

    def __del__(self) -> None:
        self.budget.give_back(self._cost())
