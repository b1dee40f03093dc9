# SPDX-License-Identifier: Apache-2.0
"""Standard input of one job: what the owner writes, bytes, or a file, on its way into a session.

`Feed` holds the pieces: the dispatcher puts them in, one pool thread at a time moves them on, and a deque between
them needs no lock. `Feeder` decides when that thread is asked for; it is the dispatcher's.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from ctask.dispatcher import Subject
from ctask.runtime import Runtime
from ctask.transports.base import Session

__all__ = ["Feed", "Feeder", "Moved"]

#: Bytes that are read from a file at a time.
SLICE = 256 * 1024


class Moved(enum.Enum):
    """Why the moving stopped."""

    IDLE = enum.auto()
    BLOCKED = enum.auto()
    CLOSED = enum.auto()


class Feed:
    """The pieces of one job's standard input, in order; a path is read when its turn comes.

    Args:
        again: keep what was moved, since the command may be started again.

    Attributes:
        written: `Worker.write()` was called; read and set under the worker's `Admission.lock`.
    """

    __slots__ = ("_all", "_closed", "_file", "_pieces", "_rest", "written")

    def __init__(self, *, again: bool = False) -> None:
        self._all: list[bytes | Path | None] | None = [] if again else None
        self._pieces: deque[bytes | Path | None] = deque()
        self._rest: memoryview | None = None
        self._file: BinaryIO | None = None
        self._closed = False
        self.written = False

    def put(self, piece: bytes | Path) -> None:
        """Add a piece. Dispatcher, or before the job is submitted."""
        self._add(piece)

    def end(self) -> None:
        """End of file after what was put. As `put`."""
        self._add(None)

    def _add(self, piece: bytes | Path | None) -> None:
        if self._closed:  # after the end it is harmless
            return
        self._closed = piece is None
        self._pieces.append(piece)
        if self._all is not None:
            self._all.append(piece)

    def rewind(self) -> None:
        """Begin again with the first piece. Dispatcher, while nothing moves."""
        if self._all is not None:
            self._close()
            self._pieces = deque(self._all)

    def waiting(self) -> bool:
        """Whether there is something to move. Dispatcher, while nothing moves."""
        return bool(self._pieces) or self._rest is not None or self._file is not None

    def move(self, session: Session) -> Moved:
        """Write into the session until it takes no more. Pool, one thread at a time.

        Raises:
            OSError: a file could not be read.
        """
        while True:
            if self._rest is None and not self._load(session):
                return Moved.IDLE
            if self._rest is None:
                return Moved.CLOSED
            taken = session.write(self._rest)
            if taken < len(self._rest):
                self._rest = self._rest[taken:]
                return Moved.BLOCKED
            self._rest = None

    def discard(self) -> None:
        """Forget what is left, and close the file. Pool."""
        self._pieces.clear()
        self._all = None
        self._close()

    def _close(self) -> None:
        self._rest = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def _load(self, session: Session) -> bool:
        """Put the next bytes into `_rest`; False: there are none now. True without bytes: it was the end."""
        while True:
            if self._file is not None:
                data = self._file.read(SLICE)
                if data:
                    self._rest = memoryview(data)
                    return True
                self._file.close()
                self._file = None
            if not self._pieces:
                return False
            piece = self._pieces.popleft()
            if piece is None:
                session.close_stdin()
                return True
            if isinstance(piece, Path):
                self._file = piece.open("rb")
            elif piece:
                self._rest = memoryview(piece)
                return True


class Feeder:
    """Moves a feed into the session of a job's attempt, as the session has room. Dispatcher.

    Args:
        job: whose posts these are.
        failed: told when the feed itself could not be read.
    """

    def __init__(self, run: Runtime, job: Subject, feed: Feed, failed: Callable[[Exception], None]) -> None:
        self._run = run
        self._job = job
        self._feed = feed
        self._failed = failed
        self._session: Session | None = None
        self._moving = False
        self._blocked = False
        # Room came while the pool's thread was on its way back with the word that there was none.
        self._room = False
        # The command is to be started again, once the thread that moves has come back.
        self._anew = False

    def waiting(self) -> bool:
        """Whether there is something to move from the start."""
        return self._feed.waiting()

    def put(self, data: bytes | None) -> None:
        """Add bytes; None: the end."""
        if data is None:
            self._feed.end()
        else:
            self._feed.put(data)
        self._move()

    def connect(self, session: Session) -> None:
        """The command runs: what waits may go."""
        self._session = session
        self._move()

    def writable(self) -> None:
        """There is room again."""
        self._room = True
        self._blocked = False
        self._move()

    def stop(self) -> None:
        """Nothing more is moved, and what is left is thrown away."""
        self._session = None
        self._anew = False
        if not self._moving and self._feed.waiting():
            self._run.work(self._feed.discard)

    def again(self) -> None:
        """The session is over, and the command will be started again: it gets all from the beginning."""
        self._session = None
        self._blocked = False
        self._anew = True
        if not self._moving:
            self._rewind()

    def _rewind(self) -> None:
        self._anew = False
        self._feed.rewind()
        self._move()

    def _move(self) -> None:
        session = self._session
        if session is not None and not self._moving and not self._blocked and self._feed.waiting():
            self._moving, self._room = True, False
            self._run.work(self._move_slowly, session)

    def _move_slowly(self, session: Session) -> None:
        """Pool."""
        moved: Moved | Exception
        try:
            moved = self._feed.move(session)
        except Exception as error:  # noqa: BLE001 (posted)
            moved = error
        self._run.post(self._job, self._moved, moved)

    def _moved(self, moved: Moved | Exception) -> None:
        self._moving = False
        if self._anew:
            self._rewind()
        elif self._session is None:
            self.stop()
        elif isinstance(moved, Exception):
            self._failed(moved)
        else:
            self._blocked = moved is Moved.BLOCKED and not self._room
            self._move()
