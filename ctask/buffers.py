# SPDX-License-Identifier: Apache-2.0
"""What nodes print: kept once for all nodes that print the same, and read while it still grows.

The store is a trie of blocks: a block knows its parent, and the index (parent, bytes) -> block makes two nodes
that print the same end at the same block. One thread writes (the dispatcher). Readers need no lock: a stream's
state is one attribute, replaced whole, and a tail only grows; every read is of a snapshot.
"""

from __future__ import annotations

import weakref
from array import array
from collections import deque
from typing import Any, Protocol, Self, SupportsIndex

from ctask.errors import LocalResource

__all__ = [
    "BLOCK",
    "STDERR",
    "STDOUT",
    "BufferStore",
    "Capture",
    "Loose",
    "MemoryBudget",
    "Output",
    "Reader",
    "view",
]

#: Bytes of a full block. Two MB/ms are hashed, so its size hardly costs; smaller ones cost objects.
BLOCK = 65_536

#: Stream numbers, as file descriptors count them.
STDOUT = 1
STDERR = 2


class Output(bytes):
    r"""Bytes that take text wherever bytes take bytes (as UTF-8), and whose `str()` is text.

    Bytes that are no UTF-8 show as ``\xNN`` in the text. Immutable, safe in any thread.
    """

    __slots__ = ()

    @property
    def text(self) -> str:
        """The text without its last newline."""
        return str(self).removesuffix("\n")

    def lines(self) -> list[Output]:
        """Return the lines without their ends; a bare carriage return ends none."""
        parts = self.replace(b"\r\n", b"\n").split(b"\n")
        if not parts[-1]:
            parts.pop()
        return [Output(part) for part in parts]

    def __str__(self) -> str:
        return self.decode("utf-8", "backslashreplace")

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    def __eq__(self, other: object) -> bool:
        return bytes.__eq__(self, other.encode() if isinstance(other, str) else other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = bytes.__hash__

    def __contains__(self, item: Any) -> bool:
        return bytes.__contains__(self, _bytes(item))

    def find(self, sub: Any, start: SupportsIndex | None = None, end: SupportsIndex | None = None) -> int:
        """As `bytes.find`; takes text."""
        return bytes.find(self, _bytes(sub), start, end)

    def index(self, sub: Any, start: SupportsIndex | None = None, end: SupportsIndex | None = None) -> int:
        """As `bytes.index`; takes text."""
        return bytes.index(self, _bytes(sub), start, end)

    def count(self, sub: Any, start: SupportsIndex | None = None, end: SupportsIndex | None = None) -> int:
        """As `bytes.count`; takes text."""
        return bytes.count(self, _bytes(sub), start, end)

    def startswith(
        self, prefix: Any, start: SupportsIndex | None = None, end: SupportsIndex | None = None
    ) -> bool:
        """As `bytes.startswith`; takes text, or a tuple."""
        return bytes.startswith(self, _bytes(prefix), start, end)

    def endswith(
        self, suffix: Any, start: SupportsIndex | None = None, end: SupportsIndex | None = None
    ) -> bool:
        """As `bytes.endswith`; takes text, or a tuple."""
        return bytes.endswith(self, _bytes(suffix), start, end)

    def split(self, sep: Any = None, maxsplit: SupportsIndex = -1) -> list[Output]:  # type: ignore[override]
        """As `bytes.split`; takes text; the parts are `Output`."""
        return [Output(part) for part in bytes.split(self, None if sep is None else _bytes(sep), maxsplit)]

    def replace(self, old: Any, new: Any, count: SupportsIndex = -1) -> Output:
        """As `bytes.replace`; takes text; the result is `Output`."""
        return Output(bytes.replace(self, _bytes(old), _bytes(new), count))


def _bytes(item: Any) -> Any:
    if isinstance(item, str):
        return item.encode()
    if isinstance(item, tuple):
        return tuple(_bytes(part) for part in item)
    return item


def view(data: bytes) -> Output:
    r"""Return what people see of exact bytes: without the last newline, with `\r\n` as `\n`."""
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n")
    return Output(data[:-1] if data[-1:] == b"\n" else data)


class MemoryBudget:
    """The ceiling of one task's stored output, over all its workers' stores. Dispatcher only.

    `_charged` may lie above the truth, since stores that the program dropped are not told: it is counted anew
    before anybody is refused.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._charged = 0
        self._stores: weakref.WeakSet[BufferStore] = weakref.WeakSet()

    def join(self, store: BufferStore) -> None:
        """Count a store in, as long as it lives."""
        self._stores.add(store)

    def charge(self, count: int) -> None:
        """Account for `count` bytes more.

        Raises:
            LocalResource: the ceiling is reached.
        """
        self._charged += count
        if self._charged > self.limit:
            self._charged = sum(store.held for store in list(self._stores))
            if self._charged > self.limit:
                raise LocalResource(
                    f"output of this task is over output_memory ({self.limit:,} bytes); "
                    "raise it, or submit with gather=False",
                    kind="output is over output_memory",
                )


class Block:
    """At most `BLOCK` bytes after those of `parent`."""

    __slots__ = ("__weakref__", "carriage", "data", "end", "parent")

    def __init__(self, parent: Block | None, data: bytes) -> None:
        self.parent = parent
        self.data = data
        self.end: int = (parent.end if parent is not None else 0) + len(data)
        # Whether a view may differ from the bytes by more than the last newline.
        self.carriage: bool = b"\r" in data or (parent is not None and parent.carriage)


class BufferStore:
    """The blocks of one worker. The index lives as long as its jobs run; results keep their own chains."""

    __slots__ = ("__weakref__", "_budget", "_index", "held", "root")

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self._index: dict[tuple[Block, bytes], Block] = {}
        self.root = Block(None, b"")
        #: bytes in blocks and tails
        self.held = 0
        budget.join(self)

    def charge(self, count: int) -> None:
        """Account for `count` bytes that a tail took in, which are kept; raises as `MemoryBudget.charge`."""
        self.held += count
        self._budget.charge(count)

    def child(self, parent: Block, data: bytes) -> Block:
        """Return the block with `data` after `parent`, the same one for the same bytes."""
        key = (parent, data)
        block = self._index.get(key)
        if block is None:
            block = self._index[key] = Block(parent, data)
        else:
            self.held -= len(data)
        return block

    def close(self) -> None:
        """Forget the index: nothing more will be stored."""
        self._index = {}


class Stream:
    """What one node printed on one stream in one attempt."""

    __slots__ = ("_held", "_store", "state", "total")

    def __init__(self, store: BufferStore) -> None:
        self._store: BufferStore | None = store
        #: (last block, chunks after it, whether a newline that is not in them follows); replaced whole
        self.state: tuple[Block, list[bytes], bool] = (store.root, [], False)
        self._held = 0
        self.total = 0

    def append(self, chunk: bytes) -> None:
        assert self._store is not None
        self.state[1].append(chunk)
        self._held += len(chunk)
        self.total += len(chunk)
        # Strictly more than a block: the last byte of a stream is always in the tail when it is sealed, so
        # that the newline that is not part of the key can be taken off.
        if self._held > BLOCK:
            self._cut(self._store)

    def _cut(self, store: BufferStore) -> None:
        block, tail, _ = self.state
        data = b"".join(tail)
        full = (len(data) - 1) // BLOCK * BLOCK
        for start in range(0, full, BLOCK):
            block = store.child(block, data[start : start + BLOCK])
        self.state = (block, [data[full:]], False)
        self._held = len(data) - full

    def seal(self) -> None:
        """End the stream: its tail becomes a block, and its last newline a bit."""
        store, self._store = self._store, None
        if store is None:
            return
        block, tail, _ = self.state
        data = b"".join(tail)
        newline = data[-1:] == b"\n"
        if newline:
            data = data[:-1]
        if data:
            block = store.child(block, data)
        self.state = (block, [], newline)
        self._held = 0

    def bytes(self) -> bytes:
        """Return all that is there now. Any thread."""
        block: Block | None
        block, tail, newline = self.state
        parts = [b"".join(tail[:]) + (b"\n" if newline else b"")]
        while block is not None:
            parts.append(block.data)
            block = block.parent
        parts.reverse()
        return b"".join(parts)


class Capture:
    """What one attempt printed: both streams apart, and the order in which they came.

    `switches` are offsets in the whole at which the stream changes, beginning with stdout; there is none until
    the first byte of stderr.
    """

    __slots__ = ("_store", "err", "out", "switches", "total")

    def __init__(self, store: BufferStore) -> None:
        self._store = store
        self.out: Stream | None = None
        self.err: Stream | None = None
        self.switches: array[int] | None = None
        #: bytes stored; grows after they are there, so that a reader that goes by it never reads ahead
        self.total = 0

    # -- the dispatcher's -----------------------------------------------------------------------------------

    def append(self, stream: int, chunk: bytes) -> None:
        """Store a chunk.

        Raises:
            LocalResource: it is stored, and with it the task's ceiling is passed.
        """
        if stream == STDOUT:
            if self.out is None:
                self.out = Stream(self._store)
            if self.switches is not None and len(self.switches) % 2 == 1:
                self.switches.append(self.total)
            self.out.append(chunk)
        else:
            if self.err is None:
                self.switches = array("Q")
                self.err = Stream(self._store)
            assert self.switches is not None
            if len(self.switches) % 2 == 0:
                self.switches.append(self.total)
            self.err.append(chunk)
        self.total += len(chunk)
        self._store.charge(len(chunk))

    def seal(self) -> None:
        """End both streams."""
        for stream in (self.out, self.err):
            if stream is not None:
                stream.seal()

    def reader(self) -> Reader:
        """Return a cursor of its own over what was and will be stored. Owner."""
        return _Cursors(self)

    # -- anybody's ------------------------------------------------------------------------------------------

    def stdout(self) -> bytes:
        return self.out.bytes() if self.out is not None else b""

    def stderr(self) -> bytes:
        return self.err.bytes() if self.err is not None else b""

    def output(self) -> bytes:
        """Return both streams in order of arrival."""
        if self.err is None:
            return self.stdout()
        end = self.total
        assert self.switches is not None
        offsets = [0, *self.switches.tolist(), end]
        sources = (self.stdout(), self.stderr())
        taken = [0, 0]
        parts = []
        for run in range(len(offsets) - 1):
            size, which = offsets[run + 1] - offsets[run], run % 2
            parts.append(sources[which][taken[which] : taken[which] + size])
            taken[which] += size
        return b"".join(parts)

    def key(self, stream: int = 0) -> tuple[object, ...]:
        """Return what is equal for two sealed captures of one store that look the same.

        Args:
            stream: STDOUT or STDERR alone, 0 for both in order of arrival.
        """
        out = None if self.out is None or stream == STDERR else self.out.state[0]
        err = None if self.err is None or stream == STDOUT else self.err.state[0]
        order = self.switches.tobytes() if stream == 0 and self.switches is not None else b""
        return out, err, order

    def plain(self, stream: int = 0) -> bool:
        """Whether `key` alone decides: one stream, and nothing that a view would change inside."""
        if stream == 0 and self.err is not None:
            return False
        source = self.err if stream == STDERR else self.out
        return source is None or not source.state[0].carriage

    def empty(self, stream: int = 0) -> bool:
        """Whether nothing was printed there."""
        if stream == STDERR:
            return self.err is None
        return self.out is None if stream == STDOUT else self.total == 0

    def get(self, stream: int = 0) -> bytes:
        """Return the exact bytes of one stream, or of both in order of arrival (0)."""
        return (self.output, self.stdout, self.stderr)[stream]()


class Reader(Protocol):
    """Takes what was stored, once, in order of arrival. Owner only, but for `unread`."""

    def take(self, limit: int) -> list[tuple[int, bytes]]:
        """Return at most about `limit` bytes that were not taken yet, as runs of one stream each."""

    def unread(self) -> bool:
        """Whether there is more to take."""


class _Cursors:
    """Over a `Capture`, which keeps what was read."""

    __slots__ = ("_at", "_capture", "_cursors", "_run")

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._at = 0
        self._run = 0
        self._cursors: dict[int, _Cursor] = {}

    def unread(self) -> bool:
        return self._at < self._capture.total

    def take(self, limit: int) -> list[tuple[int, bytes]]:
        # The total is read first: what lies below it, and the switches among it, are there already.
        total = self._capture.total
        switches = self._capture.switches
        stop = min(total, self._at + limit)
        runs = []
        while self._at < stop:
            if switches is not None and self._run < len(switches) and switches[self._run] <= self._at:
                self._run += 1
                continue
            end = stop
            if switches is not None and self._run < len(switches):
                end = min(stop, switches[self._run])
            number = STDERR if self._run % 2 else STDOUT
            runs.append((number, self._cursor(number).take(end - self._at)))
            self._at = end
        return runs

    def _cursor(self, number: int) -> _Cursor:
        cursor = self._cursors.get(number)
        if cursor is None:
            stream = self._capture.out if number == STDOUT else self._capture.err
            assert stream is not None
            cursor = self._cursors[number] = _Cursor(stream)
        return cursor


class _Cursor:
    """A place in one stream."""

    __slots__ = ("_ahead", "_at", "_seen", "_stream", "_tail")

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._at = 0
        self._ahead: deque[bytes] = deque()
        # The tail that the last snapshot saw, and how many of its chunks: a long tail of small chunks is not
        # copied again for each of them.
        self._tail: list[bytes] | None = None
        self._seen = 0

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes, which are known to be there."""
        parts = []
        while count:
            if not self._ahead:
                self._snapshot()
            chunk = self._ahead.popleft()
            if len(chunk) > count:
                self._ahead.appendleft(chunk[count:])
                chunk = chunk[:count]
            parts.append(chunk)
            count -= len(chunk)
            self._at += len(chunk)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _snapshot(self) -> None:
        block: Block | None
        block, tail, newline = self._stream.state
        if tail is self._tail:
            fresh = tail[self._seen :]
            self._seen += len(fresh)
            self._ahead.extend(fresh)
            return
        behind = []
        position = block.end
        while block is not None and block.end > self._at:
            behind.append(block.data)
            block = block.parent
        chunks = tail[:]
        self._tail, self._seen = tail, len(chunks)
        start = block.end if block is not None else 0
        for chunk in (*reversed(behind), *chunks, *((b"\n",) if newline else ())):
            end = start + len(chunk)
            if end > self._at:
                self._ahead.append(chunk[self._at - start :] if start < self._at else chunk)
            start = end
        assert position <= start


class Loose:
    """`gather=False`: chunks wait here for their handlers and are gone when they have had them."""

    __slots__ = ("_chunks", "total")

    def __init__(self) -> None:
        self._chunks: deque[tuple[int, bytes]] = deque()
        self.total = 0

    def append(self, stream: int, chunk: bytes) -> None:
        """Add a chunk. Dispatcher."""
        self._chunks.append((stream, chunk))
        self.total += len(chunk)

    def reader(self) -> Self:
        return self

    def unread(self) -> bool:
        return bool(self._chunks)

    def take(self, limit: int) -> list[tuple[int, bytes]]:
        runs: list[tuple[int, bytes]] = []
        while self._chunks and limit > 0:
            run = self._chunks.popleft()
            limit -= len(run[1])
            runs.append(run)
        return runs
