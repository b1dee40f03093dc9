# SPDX-License-Identifier: Apache-2.0
"""How stored output is read while it grows: cursors for the owner, looks for anybody.

Neither takes a lock: each read is of a snapshot of `Stream.state`. What lies in a file is read when its turn comes,
a block at a time.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from ctask.buffers.text import Output, view

if TYPE_CHECKING:
    from ctask.buffers.store import Block, Capture, Stream

__all__ = ["CaptureReader", "Look", "Reader"]

#: Bytes that are looked at a time: as many as a block has, so that a block is not copied.
_STEP = 65_536


class Reader(Protocol):
    """Takes what was stored, once, in order of arrival. Owner only, but for `unread`."""

    def take(self, limit: int) -> list[tuple[int, bytes]]:
        """Return at most about `limit` bytes that were not taken yet, as runs of one stream each."""

    def unread(self) -> bool:
        """Whether there is more to take."""


class CaptureReader:
    """Over a `Capture`, which keeps what was read."""

    __slots__ = ("_at", "_capture", "_cursors", "_run")

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._at = 0
        self._run = 0
        self._cursors: dict[bool, StreamReader] = {}

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
            errors = self._run % 2 == 1
            runs.append((2 if errors else 1, self._cursor(errors).take(end - self._at)))
            self._at = end
        return runs

    def _cursor(self, errors: bool) -> StreamReader:
        cursor = self._cursors.get(errors)
        if cursor is None:
            stream = self._capture.err if errors else self._capture.out
            assert stream is not None
            cursor = self._cursors[errors] = StreamReader(stream)
        return cursor


class StreamReader:
    """A place in one stream."""

    __slots__ = ("_ahead", "_at", "_seen", "_stream", "_tail")

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._at = 0
        # Blocks stand here unread, so that of a long way behind only one at a time is in memory.
        self._ahead: deque[bytes | Block] = deque()
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
            chunk = self._ahead[0]
            if not isinstance(chunk, bytes):
                start = chunk.start
                chunk = chunk.read()
                if start < self._at:
                    chunk = chunk[self._at - start :]
            self._ahead.popleft()
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
        start = block.end
        while block is not None and block.end > self._at:
            self._ahead.appendleft(block)
            block = block.parent
        chunks = tail[:]
        self._tail, self._seen = tail, len(chunks)
        for chunk in (*chunks, *((b"\n",) if newline else ())):
            end = start + len(chunk)
            if end > self._at:
                self._ahead.append(chunk[self._at - start :] if start < self._at else chunk)
            start = end


class Look:
    """What a capture holds at this moment, to be read when it is asked for; holds no copy.

    Args:
        stream: 1 standard output, 2 standard error, 0 both in order of arrival.

    Attributes:
        size: the number of its exact bytes.

    Two looks are equal when people see the same. Immutable; any thread.
    """

    __slots__ = ("_capture", "_number", "size")

    def __init__(self, capture: Capture, stream: int) -> None:
        self._capture = capture
        self._number = stream
        one = capture.err if stream == 2 else capture.out
        self.size: int = capture.total if stream == 0 else one.total if one is not None else 0

    def pieces(self) -> Iterator[bytes]:
        """Yield the exact bytes, in pieces."""
        left = self.size
        if self._number == 0:
            reader = CaptureReader(self._capture)
            while left:
                for _, piece in reader.take(min(left, _STEP)):
                    left -= len(piece)
                    yield piece
            return
        stream = self._capture.err if self._number == 2 else self._capture.out
        if stream is not None:
            cursor = StreamReader(stream)
            while left:
                piece = cursor.take(min(left, _STEP))
                left -= len(piece)
                yield piece

    def seen(self) -> Iterator[bytes]:
        r"""Yield what people see, in pieces: without the last newline, with `\r\n` as `\n`."""
        held = b""
        for piece in self.pieces():
            data = held + piece if held else piece
            # What the next piece, or the end, decides about.
            held = next((end for end in (b"\r\n", b"\n", b"\r") if data.endswith(end)), b"")
            data = data[: len(data) - len(held)] if held else data
            if data:
                yield data.replace(b"\r\n", b"\n") if b"\r" in data else data
        if held == b"\r":
            yield held

    def view(self) -> Output:
        """Return what people see."""
        return view(b"".join(self.pieces()))

    def digest(self) -> bytes:
        """Return what is equal for all that people see the same of."""
        digest = hashlib.blake2b(digest_size=32)
        for piece in self.seen():
            digest.update(piece)
        return digest.digest()

    def length(self) -> int:
        """Return the number of bytes that people see."""
        return sum(map(len, self.seen()))

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Look) and self.digest() == other.digest())

    def __hash__(self) -> int:
        return hash(self.digest())
