# SPDX-License-Identifier: Apache-2.0
"""The file that output above the ceiling goes to: private, without a name, gone in time; and what a full disk does.

Runs in the thread of pytest, which is the writer and the reader here.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ctask import LocalResource
from ctask.buffers import BLOCK, STDERR, STDOUT, BufferStore, Capture, Loose, MemoryBudget, spill
from ctask.buffers.spill import SpillFile, files, folder
from ctask_tests.fix_leaks import wait_until


def over(*, gather: bool = True) -> BufferStore:
    """A store whose ceiling is reached from the first byte on."""
    return BufferStore(MemoryBudget(1), gather=gather)


def fill(where: BufferStore, data: bytes, *, step: int = 30_000, sealed: bool = True) -> Capture:
    capture = Capture(where)
    for at in range(0, len(data), step):
        capture.append(STDOUT, data[at : at + step])
    if sealed:
        capture.seal()
    return capture


def numbered(size: int) -> bytes:
    return b"".join(b"%07d\n" % number for number in range(size // 8 + 1))[:size]


def descriptors(where: Path) -> list[int]:
    """This process's descriptors of files in a folder, with or without a name."""
    found = []
    for entry in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{entry}")
        except OSError:
            continue
        if target.startswith(f"{where}/"):
            found.append(int(entry))
    return found


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def no_nameless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that makes no file without a name."""
    opening = os.open

    def refuse(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return opening(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refuse)


@pytest.mark.parametrize("nameless", [True, False])
def test_the_file_is_private_and_has_no_name(room: Path, monkeypatch: pytest.MonkeyPatch, nameless: bool) -> None:
    if not nameless:
        no_nameless(monkeypatch)
    before = files()
    where = over()
    assert descriptors(room) == [], "made at the first need"
    capture = fill(where, numbered(3 * BLOCK))
    assert list(room.iterdir()) == []
    (fd,) = descriptors(room)
    assert files() == before + 1
    seen = os.fstat(fd)
    assert (seen.st_nlink, stat.S_IMODE(seen.st_mode)) == (0, 0o600)
    assert not os.get_inheritable(fd)
    if nameless:  # what another process would do to give it a name
        with pytest.raises(OSError, match=r"."):
            os.link(f"/proc/self/fd/{fd}", room / "name", follow_symlinks=True)
    where.close()
    del where
    assert capture.stdout() == numbered(3 * BLOCK), "a result keeps the file"
    del capture
    assert descriptors(room) == []
    assert files() == before


def test_the_file_is_made_where_the_user_says_else_on_a_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert folder() == str(tmp_path)
    monkeypatch.delenv("TMPDIR")
    assert folder() == "/var/tmp"
    monkeypatch.setattr(os, "access", lambda *args: False)
    assert folder() == tempfile.gettempdir()


def test_each_worker_has_a_file_of_its_own(room: Path) -> None:
    first, second = over(), over()
    kept, dropped = fill(first, numbered(BLOCK)), fill(second, numbered(BLOCK))
    assert len(descriptors(room)) == 2
    for where in (first, second):
        where.close()
    del second, dropped
    assert len(descriptors(room)) == 1
    assert kept.stdout() == numbered(BLOCK)


def test_loose_output_uses_the_file_again_once_it_was_read(room: Path) -> None:
    where = over(gather=False)
    waiting = Loose(where)
    for number in range(50):
        for at in range(4):
            waiting.append(STDOUT, bytes([number, at]) * 16_384)
        got = b"".join(data for _, data in waiting.take(1 << 20))
        assert got == b"".join(bytes([number, at]) * 16_384 for at in range(4))
    (fd,) = descriptors(room)
    assert os.fstat(fd).st_size == 2 * spill.SLOT


def test_a_long_chain_goes_away_at_once() -> None:
    where = over()
    block = where.root
    for number in range(50_000):
        data = b"%08d" % number * 32
        where.budget.charge(len(data))
        block = where.child(block, data)
    where.close()
    budget = where.budget
    del block, where
    assert budget.held == 0


def test_a_forked_child_reads_and_disturbs_nothing(room: Path) -> None:
    where = over()
    data = numbered(4 * BLOCK)
    captures = [fill(where, data), fill(where, b"z" * BLOCK)]
    child = os.fork()
    if child == 0:
        try:
            fine = captures[0].stdout() == data
            del captures[:]
            os._exit(0 if fine else 1)
        finally:
            os._exit(2)
    captures.append(fill(where, b"after" * BLOCK))
    assert os.waitpid(child, 0)[1] == 0
    assert [capture.stdout() for capture in captures] == [data, b"z" * BLOCK, b"after" * BLOCK]


# -- a disk that takes no more -----------------------------------------------------------------------------------


def failing(monkeypatch: pytest.MonkeyPatch, number: int, *, after: int = 0) -> Callable[[], None]:
    """Let writes fail from the `after`-th on, having taken half of it; return what mends the disk."""
    writing = os.pwrite
    state = {"left": after, "full": True}

    def write(fd: int, data: Any, offset: int) -> int:
        if not state["full"]:
            return writing(fd, data, offset)
        state["left"] -= 1
        if state["left"] < 0:
            raise OSError(number, os.strerror(number))
        return writing(fd, memoryview(data)[: max(1, len(data) // 2)], offset)

    monkeypatch.setattr(os, "pwrite", write)
    return lambda: state.update(full=False)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG])
def test_a_full_disk_is_told_to_who_needed_it_and_what_was_stored_is_kept(
    room: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    where = over()
    early = fill(where, numbered(2 * BLOCK), sealed=False)
    mend = failing(monkeypatch, number, after=25)
    sick = Capture(where)
    stored: list[bytes] = []

    def flood() -> None:
        for at in range(100):
            stored.append(bytes([at]) * 30_000)
            sick.append(STDOUT, stored[-1])

    with pytest.raises(LocalResource, match=os.strerror(number).lower()) as caught:
        flood()
    whole = b"".join(stored)
    assert str(room) in str(caught.value)
    assert "TMPDIR" in str(caught.value)
    del caught  # and with it the frames that hold the file
    sick.append(STDOUT, b"too late")
    assert len(whole) > 2 * BLOCK
    assert sick.stdout() == whole
    assert b"".join(data for _, data in sick.reader().take(1 << 30)) == whole
    early.seal()
    sick.seal()
    assert sick.stdout() == whole
    assert early.stdout() == numbered(2 * BLOCK), "the end of another is none of its business"
    mend()
    late = fill(where, b"later" * BLOCK)
    assert late.stdout() == b"later" * BLOCK
    assert sick.stdout() == whole


def test_a_full_disk_is_told_where_nothing_is_gathered(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = over(gather=False)
    sick, well = Loose(where), Loose(where)
    sick.append(STDOUT, b"a" * 100_000)
    mend = failing(monkeypatch, errno.ENOSPC)
    with pytest.raises(LocalResource, match="no space left"):
        sick.append(STDERR, b"b" * 100_000)
    sick.append(STDERR, b"too late")
    mend()
    well.append(STDOUT, b"c" * 100_000)
    taken = sick.take(1 << 30)
    assert b"".join(data for stream, data in taken if stream == STDOUT) == b"a" * 100_000
    assert b"".join(data for stream, data in taken if stream == STDERR) == b"b" * 100_000
    assert b"".join(data for _, data in well.take(1 << 30)) == b"c" * 100_000


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.EACCES])
def test_no_file_is_a_lack_of_this_machine(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*args: Any, **named: Any) -> int:
        raise OSError(number, os.strerror(number))

    where = over()
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(LocalResource, match=os.strerror(number).lower()):
            fill(where, numbered(3 * BLOCK))
    assert fill(where, numbered(3 * BLOCK)).stdout() == numbered(3 * BLOCK), "the next one may find room"


def test_a_file_that_lost_its_bytes_is_told(room: Path) -> None:
    capture = fill(over(), numbered(2 * BLOCK))
    (fd,) = descriptors(room)
    os.ftruncate(fd, 100)
    with pytest.raises(LocalResource, match="is gone"):
        capture.stdout()


def test_a_spill_file_gives_slots_back_in_any_thread() -> None:
    file = SpillFile()
    places = [file.put(bytes([n]) * 10) for n in range(10)]
    thread = threading.Thread(target=places.clear)
    thread.start()
    thread.join()
    wait_until(lambda: len(file.free) == 10)
    again = [file.put(b"again") for _ in range(10)]
    assert file._next == 10
    assert all(place.read() == b"again" for place in again)
