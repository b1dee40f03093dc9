# SPDX-License-Identifier: Apache-2.0
"""The store: what nodes print is kept once for all nodes that print the same.

It is a trie of blocks: a block knows its parent, and the index (parent, bytes) -> block makes two nodes that print the
same end at the same block. One thread writes (the dispatcher). Readers need no lock: a stream's state is one
attribute, replaced whole, and a tail only grows; every read is of a snapshot. A block is in memory or in a file for as
long as it lives, so that it never moves under a reader.
"""

from __future__ import annotations

import hashlib
import os
from array import array

from ctask.buffers.budget import MemoryBudget
from ctask.buffers.readers import CaptureReader, Look, Reader
from ctask.buffers.spill import Place, SpillFile
from ctask.errors import LocalResource

__all__ = ["BLOCK", "OVERHEAD", "PIECES", "STDERR", "STDOUT", "WORTH", "Block", "BufferStore", "Capture", "Stream"]

#: Bytes of a full block, at most a slot of the file. Two MB/ms are hashed, so its size hardly costs; smaller ones cost
#: objects.
BLOCK = 65_536
#: Chunks of a tail that are joined, since a chunk of two bytes takes fifty.
PIECES = 512
#: Bytes that a block costs beside its data: the object, its number, its key and its place in the index.
OVERHEAD = 384
#: What is shorter stays in memory: its place in a file, and the digest by which it is found, would cost as much.
WORTH = 256

#: Stream numbers, as file descriptors count them.
STDOUT = 1
STDERR = 2

#: Nobody who does not know it can make two blocks of the same digest.
_KEY = os.urandom(32)


class Block:
    """At most `BLOCK` bytes after those of `parent`. Immutable, but for `cost`, which is the dispatcher's."""

    __slots__ = ("_budget", "carriage", "cost", "data", "end", "parent")

    def __init__(self, budget: MemoryBudget, parent: Block | None, data: bytes | Place, size: int, carriage: bool):
        self._budget = budget
        self.parent = parent
        self.data = data
        self.end: int = (parent.end if parent is not None else 0) + size
        # Whether a view may differ from the bytes by more than the last newline.
        self.carriage: bool = carriage or (parent is not None and parent.carriage)
        #: what the budget gets back with its end
        self.cost = 0

    @property
    def start(self) -> int:
        """Where its bytes begin in their stream."""
        return self.parent.end if self.parent is not None else 0

    def read(self) -> bytes:
        """Return its bytes. Any thread.

        Raises:
            LocalResource: they lie in a file and cannot be read.
        """
        data = self.data
        return data if isinstance(data, bytes) else data.read()

    def __del__(self) -> None:
        if self.cost:
            self._budget.give_back(self.cost)


class BufferStore:
    """The blocks of one worker. The index lives as long as its jobs run; results keep their own chains.

    Args:
        gather: whether what nodes print is kept; else it waits for its handlers only.
    """

    __slots__ = ("_file", "_index", "_spilled", "budget", "gather", "root")

    def __init__(self, budget: MemoryBudget, *, gather: bool = True) -> None:
        self.budget = budget
        self.gather = gather
        self._index: dict[tuple[Block, bytes], Block] = {}
        self._spilled: dict[tuple[Block, bytes], Block] = {}
        self._file: SpillFile | None = None
        self.root = Block(budget, None, b"", 0, carriage=False)

    def child(self, parent: Block, data: bytes, *, anyhow: bool = False) -> Block:
        """Return the block with `data` after `parent`, the same one for the same bytes.

        The bytes are charged already, by the tail that they come from. In memory they are their own key; what is in
        the file goes by a digest.

        Args:
            anyhow: keep it in memory where the file cannot take it.

        Raises:
            LocalResource: the ceiling is reached, and the file cannot take it. Nothing has changed.
        """
        block = self._index.get((parent, data))
        digest = b""
        if block is None and self._spilled:
            digest = _digest(data)
            block = self._spilled.get((parent, digest))
        if block is not None:
            self.budget.charge(-len(data))
            return block
        place: Place | None = None
        if self.budget.over() and len(data) >= WORTH:
            try:
                place = self.spill(data)
            except LocalResource:
                if not anyhow:
                    raise
        block = Block(self.budget, parent, data if place is None else place, len(data), b"\r" in data)
        if place is None:
            self._index[parent, data] = block
            block.cost = len(data) + OVERHEAD
        else:
            self._spilled[parent, digest or _digest(data)] = block
            self.budget.charge(-len(data))
            block.cost = OVERHEAD
        self.budget.charge(OVERHEAD)
        return block

    def spill(self, data: bytes) -> Place:
        """Write to the worker's file, which is made at the first need.

        Raises:
            LocalResource: no file, or no room in it.
        """
        if self._file is None:
            self._file = SpillFile()
        return self._file.put(data)

    def close(self) -> None:
        """Forget the index and the file, which its blocks hold: nothing more will be stored."""
        self._index = {}
        self._spilled = {}
        self._file = None


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=32, key=_KEY).digest()


class Stream:
    """What one node printed on one stream in one attempt."""

    __slots__ = ("_store", "held", "state", "total")

    def __init__(self, store: BufferStore) -> None:
        self._store = store
        #: (last block, chunks after it, whether a newline that is not in them follows); replaced whole
        self.state: tuple[Block, list[bytes], bool] = (store.root, [], False)
        #: bytes in the tail
        self.held = 0
        self.total = 0

    def append(self, chunk: bytes) -> None:
        """Add to the tail; raises as `BufferStore.child`, with the chunk added."""
        tail = self.state[1]
        tail.append(chunk)
        size = len(chunk)
        self.held += size
        self.total += size
        # Strictly more than a block: the last byte of a stream is always in the tail when it is sealed, so
        # that the newline that is not part of the key can be taken off.
        if self.held > BLOCK:
            self._cut()
        elif len(tail) > PIECES:
            self.state = (self.state[0], [b"".join(tail)], False)

    def _cut(self) -> None:
        block, (*head, last), _ = self.state
        at, need = 0, BLOCK - (self.held - len(last))
        try:
            while len(last) - at > need:
                block = self._store.child(block, b"".join((*head, last[at : at + need])))
                head, at, need = [], at + need, BLOCK
        finally:
            tail = [*head, last[at:]]
            self.state = (block, tail, False)
            self.held = sum(map(len, tail))

    def seal(self) -> None:
        """End the stream: its tail becomes a block, and its last newline a bit."""
        block, tail, newline = self.state
        if newline or not tail:
            return
        data = b"".join(tail)
        newline = data[-1:] == b"\n"
        if newline:
            data = data[:-1]
            self._store.budget.charge(-1)
        for start in range(0, len(data), BLOCK):  # one, but where the file has failed before
            block = self._store.child(block, data[start : start + BLOCK], anyhow=True)
        self.state = (block, [], newline)
        self.held = 0

    def bytes(self) -> bytes:
        """Return all that is there now. Any thread."""
        block: Block | None
        block, tail, newline = self.state
        parts = [b"".join(tail[:]) + (b"\n" if newline else b"")]
        while block is not None:
            parts.append(block.read())
            block = block.parent
        parts.reverse()
        return b"".join(parts)


class Capture:
    """What one attempt printed: both streams apart, and the order in which they came.

    `switches` are offsets in the whole at which the stream changes, beginning with stdout; there is none until
    the first byte of stderr.
    """

    __slots__ = ("_budget", "_full", "err", "out", "store", "switches", "total")

    def __init__(self, store: BufferStore) -> None:
        #: within which captures are compared by `key`
        self.store = store
        self._budget = store.budget
        self._full = False
        self.out: Stream | None = None
        self.err: Stream | None = None
        self.switches: array[int] | None = None
        #: bytes stored; grows after they are there, so that a reader that goes by it never reads ahead
        self.total = 0

    # -- the dispatcher's -----------------------------------------------------------------------------------

    def append(self, stream: int, chunk: bytes) -> None:
        """Store a chunk, unless an earlier one has failed.

        Raises:
            LocalResource: neither memory nor the file has room for more; what was stored, with this chunk as a rule,
                is kept.
        """
        if self._full:
            return
        try:
            target = self.out  # as it is, as a rule: there is stdout, and nothing but that
            if target is None or self.switches is not None or stream != STDOUT:
                target = self._out() if stream == STDOUT else self._err()
            self._budget.charge(len(chunk))
            target.append(chunk)
            self.total += len(chunk)
        except (LocalResource, MemoryError) as error:
            self._full = True
            self.total = sum(stream.total for stream in (self.out, self.err) if stream is not None)
            if isinstance(error, LocalResource):
                raise
            raise LocalResource("no memory for its output", kind="no memory") from error

    def _out(self) -> Stream:
        if self.out is None:
            self.out = Stream(self.store)
        switches = self.switches
        if switches is not None and len(switches) % 2 == 1:
            switches.append(self.total)
            self._budget.charge(switches.itemsize)
        return self.out

    def _err(self) -> Stream:
        if self.err is None or self.switches is None:
            self.switches = array("Q")
            self.err = Stream(self.store)
        if len(self.switches) % 2 == 0:
            self.switches.append(self.total)
            self._budget.charge(self.switches.itemsize)
        return self.err

    def seal(self) -> None:
        """End both streams; never raises."""
        for stream in (self.out, self.err):
            try:
                if stream is not None:
                    stream.seal()
            except MemoryError:
                pass  # it stays in the pieces in which it came, and is compared by its bytes

    def __del__(self) -> None:
        held = sum(stream.held for stream in (self.out, self.err) if stream is not None)
        if self.switches is not None:
            held += self.switches.itemsize * len(self.switches)
        if held:
            self._budget.give_back(held)

    def reader(self) -> Reader:
        """Return a cursor of its own over what was and will be stored. Owner."""
        return CaptureReader(self)

    # -- anybody's ------------------------------------------------------------------------------------------

    def stdout(self) -> bytes:
        return self.out.bytes() if self.out is not None else b""

    def stderr(self) -> bytes:
        return self.err.bytes() if self.err is not None else b""

    def output(self) -> bytes:
        """Return both streams in order of arrival."""
        return self.stdout() if self.err is None else b"".join(self.look().pieces())

    def look(self, stream: int = 0) -> Look:
        """Return what is there now, to be read later: STDOUT or STDERR alone, 0 for both in order of arrival."""
        return Look(self, stream)

    def key(self, stream: int = 0) -> tuple[object, ...]:
        """Return what is equal for two sealed captures of one store that look the same. Reads nothing.

        Args:
            stream: STDOUT or STDERR alone, 0 for both in order of arrival.
        """
        out = None if self.out is None or stream == STDERR else self.out.state[0]
        err = None if self.err is None or stream == STDOUT else self.err.state[0]
        order = b""
        if stream == 0 and self.switches is not None:
            order = hashlib.blake2b(self.switches, digest_size=32).digest()
        return out, err, order

    def plain(self, stream: int = 0) -> bool:
        """Whether `key` alone decides: one stream, and nothing that a view would change inside."""
        if stream == 0 and self.err is not None:
            return False
        source = self.err if stream == STDERR else self.out
        return source is None or not (source.state[0].carriage or source.state[1])

    def empty(self, stream: int = 0) -> bool:
        """Whether nothing was printed there."""
        if stream == STDERR:
            return self.err is None
        return self.out is None if stream == STDOUT else self.total == 0

    def get(self, stream: int = 0) -> bytes:
        """Return the exact bytes of one stream, or of both in order of arrival (0)."""
        return (self.output, self.stdout, self.stderr)[stream]()
