# SPDX-License-Identifier: Apache-2.0
"""Output that is above the ceiling, in a private temporary file.

The dispatcher writes. Any thread reads, by `pread`: no offset is shared, with a forked child neither. A slot of the
file comes back from the destructor of its `Place`, in any thread, through a queue that the dispatcher takes from. The
descriptor is closed when the last place is gone.

The file has no name where the system can make one so; elsewhere its name is removed at once. So nobody else can open
it, and it is gone however the process ends.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from pathlib import Path

from ctask.errors import LocalResource

__all__ = ["SLOT", "Place", "SpillFile", "files", "folder"]

#: Bytes of a slot. What is shorter leaves a hole, for which no file system of today takes space.
SLOT = 65_536

_open: set[int] = set()


def files() -> int:
    """Return how many descriptors are taken by such files in this process. Any thread."""
    return len(_open)


def folder() -> str:
    """Return where such files are made: in $TMPDIR if that is set, else in /var/tmp, else where Python makes its own.

    /var/tmp before /tmp, because /tmp is memory on many systems, which would move the output from memory to memory.
    """
    chosen = os.environ.get("TMPDIR")
    if chosen:
        return chosen
    lasting = "/var/tmp"  # noqa: S108 (no name is made there that could be guessed)
    if os.access(lasting, os.W_OK | os.X_OK):
        return lasting
    import tempfile  # a tenth of what `import ctask` would take

    return tempfile.gettempdir()


class Place:
    """At most `SLOT` bytes in a file; the slot is used again when the object is gone. Immutable; any thread."""

    __slots__ = ("_file", "_number", "size")

    def __init__(self, file: SpillFile, number: int, size: int) -> None:
        self._file = file
        self._number = number
        self.size = size

    def read(self) -> bytes:
        """Return the bytes.

        Raises:
            LocalResource: they cannot be read.
        """
        return self._file.read(self._number * SLOT, self.size)

    def __del__(self) -> None:
        self._file.free.append(self._number)


class SpillFile:
    """One file.

    Attributes:
        free: slots that may be written again; any thread appends.

    Raises:
        LocalResource: it cannot be made.
    """

    __slots__ = ("_fd", "_folder", "_next", "free")

    def __init__(self) -> None:
        self._fd = -1
        self._folder = folder()
        self._next = 0
        self.free: deque[int] = deque()
        try:
            self._fd = _private(self._folder)
        except OSError as error:
            raise self._failure(error) from error.with_traceback(None)
        _open.add(self._fd)

    def put(self, data: bytes) -> Place:
        """Write at most `SLOT` bytes. Dispatcher.

        Raises:
            LocalResource: they cannot be written; the disk is full, as a rule.
        """
        number = self.free.popleft() if self.free else self._next
        try:
            self._write(data, number * SLOT)
        except OSError as error:
            if number != self._next:
                self.free.append(number)
            # Its frames would keep the file open for as long as somebody keeps the error.
            raise self._failure(error) from error.with_traceback(None)
        self._next = max(self._next, number + 1)
        return Place(self, number, len(data))

    def _write(self, data: bytes, offset: int) -> None:
        view = memoryview(data)
        while view:  # a disk that is nearly full takes a part
            count = os.pwrite(self._fd, view, offset)
            view, offset = view[count:], offset + count

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes that were written there. Any thread.

        Raises:
            LocalResource: they cannot be read.
        """
        parts = []
        while size:
            try:
                part = os.pread(self._fd, size, offset)
            except OSError as error:
                raise self._failure(error) from error
            if not part:
                raise LocalResource(f"output that was kept in {self._folder} is gone", kind="output is gone")
            parts.append(part)
            size, offset = size - len(part), offset + len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _failure(self, error: OSError) -> LocalResource:
        reason = (error.strerror or str(error)).lower()
        return LocalResource(
            f"output above output_memory cannot be kept in a file in {self._folder}: {reason}. "
            "Set TMPDIR to a folder with room, or raise output_memory",
            kind=f"no file for output: {reason}",
        )

    def __del__(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            _open.discard(fd)
            os.close(fd)


def _private(where: str) -> int:
    """Return the descriptor of a new file that only this account can read, from its birth on."""
    try:
        # O_EXCL: nobody can give it a name later on.
        return os.open(where, os.O_TMPFILE | os.O_RDWR | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise
    # A file system that has no files without names: NFS, and some that are stacked.
    import tempfile

    fd, name = tempfile.mkstemp(prefix="ctask-", dir=where)
    try:
        Path(name).unlink()
    except OSError:
        os.close(fd)
        raise
    return fd
