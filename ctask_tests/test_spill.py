# SPDX-License-Identifier: Apache-2.0
"""Output above the ceiling: the same bytes, the same groups, one copy, whether it lies in memory or in the file.

Runs in the thread of pytest, which is the writer and the reader here.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctask import LocalResource, gather
from ctask.buffers import (
    STDERR,
    STDOUT,
    BufferStore,
    Capture,
    Look,
    Loose,
    MemoryBudget,
    Output,
    loose,
    spill,
    store,
    view,
)
from ctask.buffers.spill import Place
from ctask.result import Group

BLOCK = store.BLOCK


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


@dataclass
class Cell:
    """A job, as far as views look at it."""

    node: Any
    capture: Capture | None
    result: Any = None


@dataclass
class Source:
    cells: list[Cell]
    remote: bool = False
    apart: bool = False

    @property
    def nodes(self) -> list[Any]:
        return [cell.node for cell in self.cells]


@dataclass
class Ended:
    """A result, as far as views look at it."""

    rc: int = 0
    ok: bool = True
    outcome: Any = "EXITED"
    error: Any = None
    why: str = ""


def nodes_of(group: Group) -> list[Any]:
    return list(group.nodes)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 bytes, and slots of 16 for what nobody gathers."""
    monkeypatch.setattr(store, "BLOCK", 16)
    monkeypatch.setattr(store, "WORTH", 0)
    monkeypatch.setattr(loose, "SLOT", 16)
    monkeypatch.setattr(spill, "SLOT", 16)


# -- the same, in memory or in a file ----------------------------------------------------------------------------

ROWS = st.sampled_from([b"", b"a", b"\n", b"ab\n", b"abcdefgh" * 3, b"0123456789abcdef", b"x\r\n", b"\r", b"y" * 40])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 4), st.sampled_from((STDOUT, STDERR)), ROWS),
        st.tuples(st.just("end"), st.integers(0, 4)),
        st.tuples(st.just("read"), st.integers(0, 4), st.integers(1, 50)),
        st.tuples(st.just("groups")),
        st.tuples(st.just("limit"), st.sampled_from((0, 1 << 10, 1 << 30))),
    ),
    max_size=40,
)


class Model:
    """Five nodes as plain bytes, beside a store of a tiny ceiling."""

    def __init__(self) -> None:
        self.budget = MemoryBudget(1 << 10)
        self.store = BufferStore(self.budget)
        self.cells = [Cell(node, Capture(self.store)) for node in range(5)]
        self.pieces: list[list[tuple[int, bytes]]] = [[] for _ in range(5)]
        self.taken: list[list[tuple[int, bytes]]] = [[] for _ in range(5)]
        self.readers = [cell.capture.reader() for cell in self.cells if cell.capture is not None]

    def capture(self, node: int) -> Capture:
        capture = self.cells[node].capture
        assert capture is not None
        return capture

    def add(self, node: int, stream: int, data: bytes) -> None:
        if self.cells[node].result is None and data:
            self.capture(node).append(stream, data)
            self.pieces[node].append((stream, data))

    def end(self, node: int) -> None:
        self.capture(node).seal()
        self.cells[node].result = Ended()

    def read(self, node: int, limit: int) -> None:
        self.taken[node] += self.readers[node].take(limit)

    def limit(self, limit: int) -> None:
        self.budget.limit = limit

    def bytes(self, node: int, *streams: int) -> bytes:
        return b"".join(data for stream, data in self.pieces[node] if stream in streams)

    def groups(self) -> None:
        seen: dict[tuple[bytes, bool], set[int]] = {}
        for node, cell in enumerate(self.cells):
            shown = bytes(view(self.bytes(node, STDOUT, STDERR)))
            seen.setdefault((shown, cell.result is None), set()).add(node)
        found = {
            (bytes(group.output), group.outcome is None): set(nodes_of(group))
            for group in gather.groups(Source(self.cells))
        }
        assert found == seen

    def check(self) -> None:
        for node in range(5):
            capture = self.capture(node)
            assert capture.stdout() == self.bytes(node, STDOUT)
            assert capture.stderr() == self.bytes(node, STDERR)
            assert capture.output() == self.bytes(node, STDOUT, STDERR)
            self.read(node, 1 << 20)
            runs = [(stream, byte) for stream, data in self.taken[node] for byte in data]
            assert runs == [(stream, byte) for stream, data in self.pieces[node] for byte in data]
        self.groups()


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STEPS)
def test_the_store_is_the_model_whether_spilled_or_not(small: None, steps: list[tuple[Any, ...]]) -> None:
    model = Model()
    for name, *given_ in steps:
        getattr(model, name)(*given_)
    model.check()
    for node in range(5):
        model.end(node)
    model.store.close()
    model.check()
    budget = model.budget
    del model
    assert budget.held == 0


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(st.integers(1, 60), st.tuples(st.sampled_from((STDOUT, STDERR)), st.binary(min_size=1)))))
def test_loose_output_that_waits_in_the_file_comes_whole_and_in_order(
    small: None, steps: list[int | tuple[int, bytes]]
) -> None:
    where = over(gather=False)
    waiting = Loose(where)
    put: list[tuple[int, int]] = []
    taken: list[tuple[int, int]] = []
    for step in [*steps, 1 << 20]:
        if isinstance(step, int):
            taken += [(stream, byte) for stream, data in waiting.take(step) for byte in data]
        else:
            waiting.append(*step)
            put += [(step[0], byte) for byte in step[1]]
    assert taken == put
    assert where.budget.held < 1_000, "the store's own"


def test_what_is_the_same_is_one_copy_in_the_file_too() -> None:
    where = over()
    data = numbered(3 * BLOCK + 1000)
    captures = [fill(where, data) for _ in range(20)]
    assert len({capture.key() for capture in captures}) == 1
    assert where._file is not None
    assert where._file._next == 4, "slots: three blocks and the rest"
    assert where.budget.held < 10_000
    assert captures[7].stdout() == data


def test_what_came_before_the_ceiling_is_found_after_it() -> None:
    where = BufferStore(MemoryBudget(1 << 30))
    data = numbered(5 * BLOCK)
    first = fill(where, data[: 2 * BLOCK + 5], sealed=False)
    where.budget.limit = 1
    second = fill(where, data)
    first.append(STDOUT, data[2 * BLOCK + 5 :])
    first.seal()
    where.budget.limit = 1 << 30
    third = fill(where, data)
    assert first.key() == second.key() == third.key()
    assert first.stdout() == second.stdout() == third.stdout() == data
    assert where._file is not None
    assert where._file._next == 3


# -- E09: made to be taken for one another -----------------------------------------------------------------------


def test_e09_near_duplicates_are_told_apart(small: None) -> None:
    where = over()
    same = numbered(200)
    variants = [same[:at] + bytes([same[at] ^ 1]) + same[at + 1 :] for at in range(len(same))]
    captures = [fill(where, data) for data in (same, *variants, same)]
    assert [capture.stdout() for capture in captures] == [same, *variants, same]
    assert len({capture.key() for capture in captures}) == len(variants) + 1
    assert captures[0].key() == captures[-1].key()


def test_e09_outputs_of_one_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store.Block, "__hash__", lambda self: 7)
    monkeypatch.setattr(Output, "__hash__", lambda self: 7)
    monkeypatch.setattr(Look, "__hash__", lambda self: 7)
    where = BufferStore(MemoryBudget(1 << 30))
    data = [b"line %d" % (number % 50) for number in range(100)]
    cells = [Cell(number, fill(where, text), Ended()) for number, text in enumerate(data)]
    found = gather.groups(Source(cells))
    assert {bytes(group.output): nodes_of(group) for group in found} == {
        data[number]: [number, number + 50] for number in range(50)
    }


def test_e09_a_digest_nobody_can_make_twice_depends_on_a_key() -> None:
    first = store._digest(b"x")
    assert len(first) == 32
    assert first != hashlib.blake2b(b"x", digest_size=32).digest()


@pytest.mark.slow
def test_e09_a_hundred_thousand_lines_take_linear_time() -> None:
    def spent(count: int) -> float:
        where = over()
        began = time.process_time()
        cells = [Cell(n, fill(where, b"the load is %d\n" % n), Ended()) for n in range(count)]
        assert len(gather.groups(Source(cells))) == count
        return time.process_time() - began

    few = spent(10_000)
    assert spent(100_000) < 30 * few + 0.5


# -- what nobody asks for is not read ----------------------------------------------------------------------------


def test_views_compare_what_is_in_the_file_without_reading_it(monkeypatch: pytest.MonkeyPatch) -> None:
    where = over()
    outputs = [numbered(2 * BLOCK), b"x" * (BLOCK + 900), numbered(2 * BLOCK)]
    source = Source([Cell(n, fill(where, data), Ended()) for n, data in enumerate(outputs)])
    reads: list[int] = []
    read = Place.read

    def counted(place: Place) -> bytes:
        reads.append(place.size)
        return read(place)

    monkeypatch.setattr(Place, "read", counted)
    found = gather.groups(source)
    assert [nodes_of(group) for group in found] == [[0, 2], [1]]
    view_ = gather._piles([source], errors=False, match=None)
    assert [pile.nodes for pile in view_] == [[0, 2], [1]]
    assert reads == []
    assert found[1].output == outputs[1]
    assert len(reads) == 2
    assert repr(found[1]).endswith(f"{BLOCK + 900} bytes>")


def test_two_stores_are_compared_a_block_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    data = numbered(40 * BLOCK)
    sources = [Source([Cell(n, fill(over(), data), Ended())]) for n in range(2)]
    live: set[int] = set()
    peak = 0
    read = Place.read

    class Piece(bytes):
        def __del__(self) -> None:
            live.discard(id(self))

    def counted(place: Place) -> bytes:
        nonlocal peak
        piece = Piece(read(place))
        live.add(id(piece))
        peak = max(peak, len(live))
        return piece

    monkeypatch.setattr(Place, "read", counted)
    piles = gather._piles(sources, errors=False, match=None)
    assert [pile.nodes for pile in piles] == [[0, 1]]
    assert peak <= 4


def test_a_group_of_what_still_grows_shows_what_was_compared() -> None:
    where = over()
    capture = fill(where, b"first\n", sealed=False)
    group = gather.groups(Source([Cell("n", capture)]))[0]
    capture.append(STDOUT, numbered(BLOCK * 2))
    assert group.output == b"first"
    assert isinstance(group, Group)


def test_a_cursor_far_behind_reads_as_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    where = over()
    data = numbered(50 * BLOCK)
    capture = fill(where, data)
    reader = capture.reader()
    reads: list[int] = []
    read = Place.read

    def counted(place: Place) -> bytes:
        reads.append(place.size)
        return read(place)

    monkeypatch.setattr(Place, "read", counted)
    assert reader.take(100_000) == [(STDOUT, data[:100_000])]
    assert len(reads) == 2
    rest = b"".join(part for _ in range(100) for _, part in reader.take(100_000))
    assert rest == data[100_000:]
    assert len(reads) == 50


def test_no_memory_ends_one_and_is_compared_by_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    where = BufferStore(MemoryBudget(1 << 30))
    well = fill(where, b"w" * 3 * BLOCK)
    sick = Capture(where)
    sick.append(STDOUT, b"w" * 30_000)
    with monkeypatch.context() as patch:
        patch.setattr(store.BufferStore, "child", lambda *args, **named: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(LocalResource, match="no memory"):
            sick.append(STDOUT, b"w" * (3 * BLOCK - 30_000))
        sick.seal()
    assert sick.stdout() == well.stdout()
    cells = [Cell(n, capture, Ended()) for n, capture in enumerate((well, sick))]
    assert [nodes_of(group) for group in gather.groups(Source(cells))] == [[0, 1]]
