# SPDX-License-Identifier: Apache-2.0
"""The store: exact bytes, one copy of what is the same, readers beside the writer, the ceiling."""

from __future__ import annotations

import gc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctask.buffers import BLOCK, STDERR, STDOUT, BufferStore, Capture, Loose, MemoryBudget, Output, view

chunks = st.lists(st.tuples(st.sampled_from((STDOUT, STDERR)), st.binary(min_size=1, max_size=40)), max_size=40)


def store(limit: int = 1 << 30) -> BufferStore:
    return BufferStore(MemoryBudget(limit))


def fill(where: BufferStore, parts: list[tuple[int, bytes]]) -> Capture:
    capture = Capture(where)
    for stream, data in parts:
        capture.append(stream, data)
    return capture


@given(chunks)
def test_every_stream_is_exact_before_and_after_its_end(parts: list[tuple[int, bytes]]) -> None:
    capture = fill(store(), parts)
    for _ in range(2):
        assert capture.stdout() == b"".join(data for stream, data in parts if stream == STDOUT)
        assert capture.stderr() == b"".join(data for stream, data in parts if stream == STDERR)
        assert capture.output() == b"".join(data for _, data in parts)
        capture.seal()


@given(chunks, st.integers(1, 64), st.data())
def test_a_reader_takes_each_byte_once_in_order_of_arrival(
    parts: list[tuple[int, bytes]], limit: int, data: st.DataObject
) -> None:
    capture = Capture(store())
    reader = capture.reader()
    taken: list[tuple[int, bytes]] = []
    for stream, chunk in parts:
        capture.append(stream, chunk)
        if data.draw(st.booleans()):
            taken += reader.take(limit)
    capture.seal()
    while reader.unread():
        taken += reader.take(limit)
    assert reader.take(limit) == []
    for wanted in (STDOUT, STDERR):
        assert b"".join(d for s, d in taken if s == wanted) == b"".join(d for s, d in parts if s == wanted)
    assert b"".join(d for _, d in taken) == b"".join(d for _, d in parts)


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 7])
@pytest.mark.parametrize("step", [1000, BLOCK, 5 * BLOCK])
def test_blocks_are_cut_at_the_same_places_whatever_the_chunks(size: int, step: int) -> None:
    where = store()
    data = bytes(range(256)) * (size // 256) + bytes(size % 256)
    whole = fill(where, [(STDOUT, data)] if data else [])
    parts = fill(where, [(STDOUT, data[at : at + step]) for at in range(0, size, step)])
    ended = fill(where, [(STDOUT, data[at : at + step]) for at in range(0, size, step)] + [(STDOUT, b"\n")])
    for capture in (whole, parts, ended):
        capture.seal()
    assert whole.key() == parts.key()
    assert whole.stdout() == parts.stdout() == data
    if size:
        assert ended.key() == whole.key(), "the last newline is a bit, not part of the key"
    assert ended.stdout() == data + b"\n"
    reader = ended.reader()
    assert b"".join(d for _, d in reader.take(1 << 30)) == data + b"\n"


def test_e08_identical_output_of_many_nodes_is_one_copy() -> None:
    where = store()
    body = b"x" * 10_000
    captures = [fill(where, [(STDOUT, body + (b"\n" if n % 2 else b""))]) for n in range(1000)]
    captures += [fill(where, [(STDOUT, b"odd %d" % n)]) for n in range(3)]
    for capture in captures:
        capture.seal()
    assert len({capture.key() for capture in captures}) == 4
    assert where.budget.held < 20_000


@given(st.dictionaries(st.integers(0, 20), st.lists(st.binary(max_size=6), max_size=4), max_size=12))
def test_two_nodes_group_together_exactly_when_they_printed_the_same(
    nodes: dict[int, list[bytes]],
) -> None:
    where = store()
    captures = {}
    for node, parts in nodes.items():
        captures[node] = fill(where, [(STDOUT, part) for part in parts if part])
        captures[node].seal()
    for one, first in captures.items():
        for other, second in captures.items():
            same = b"".join(nodes[one]).removesuffix(b"\n") == b"".join(nodes[other]).removesuffix(b"\n")
            empty = first.empty() or second.empty()  # nothing at all and a lone newline are told apart by `empty`
            if not empty:
                assert (first.key() == second.key()) is same


@pytest.mark.parametrize("ended", [True, False])
def test_what_the_program_dropped_does_not_count(ended: bool) -> None:
    budget = MemoryBudget(100)
    for _ in range(10):
        capture = fill(BufferStore(budget), [(STDOUT, b"x" * 90), (STDERR, b"y" * 90), (STDOUT, b"z")])
        if ended:
            capture.seal()
        assert 181 <= budget.held < 3000
        del capture
        assert budget.held == 0


def test_a_result_that_is_kept_counts_and_keeps_nothing_else() -> None:
    budget = MemoryBudget(1 << 30)
    where = BufferStore(budget)
    kept = fill(where, [(STDOUT, b"k" * BLOCK * 2)])
    dropped = fill(where, [(STDOUT, b"d" * BLOCK * 9)])
    for capture in (kept, dropped):
        capture.seal()
    where.close()
    assert budget.held > 11 * BLOCK
    del dropped, capture
    assert 2 * BLOCK <= budget.held < 3 * BLOCK
    assert kept.stdout() == b"k" * BLOCK * 2


def test_small_chunks_are_charged_by_their_bytes_and_joined() -> None:
    where = store()
    capture = Capture(where)
    reader = capture.reader()
    taken = []
    for number in range(10_000):
        capture.append(STDOUT, b"%d" % (number % 10))
        if number % 7 == 0:
            taken += [data for _, data in reader.take(1 << 20)]
    assert capture.out is not None
    assert len(capture.out.state[1]) < 1_000
    taken += [data for _, data in reader.take(1 << 20)]
    assert b"".join(taken) == capture.stdout() == b"0123456789" * 1_000


def test_a_result_outlives_its_store() -> None:
    where = store()
    capture = fill(where, [(STDOUT, b"a" * BLOCK * 2)])
    capture.seal()
    where.close()
    del where
    gc.collect()
    assert capture.stdout() == b"a" * BLOCK * 2


def test_loose_output_is_gone_when_it_was_taken() -> None:
    budget = MemoryBudget(1 << 30)
    loose = Loose(BufferStore(budget, gather=False))
    loose.append(STDOUT, b"abc")
    loose.append(STDERR, b"def")
    assert loose.take(2) == [(STDOUT, b"abc")]
    assert loose.unread()
    assert loose.take(100) == [(STDERR, b"def")]
    assert not loose.unread()
    assert budget.held == 0


@given(st.lists(st.one_of(st.integers(1, 60), st.tuples(st.sampled_from((STDOUT, STDERR)), st.binary(min_size=1)))))
def test_loose_output_comes_whole_and_in_order(steps: list[int | tuple[int, bytes]]) -> None:
    loose = Loose(BufferStore(MemoryBudget(1 << 30), gather=False))
    put: list[tuple[int, bytes]] = []
    taken: list[tuple[int, bytes]] = []
    for step in steps:
        if isinstance(step, int):
            taken += loose.take(step)
        else:
            loose.append(*step)
            put.append(step)
    taken += loose.take(1 << 30)
    assert [(s, byte) for s, data in taken for byte in data] == [(s, byte) for s, data in put for byte in data]
    assert loose.total == sum(len(data) for _, data in put)


def test_output_reads_as_text_and_is_bytes() -> None:
    out = Output("größe: 5\nel5.x86\n".encode())
    assert out == "größe: 5\nel5.x86\n"
    assert out != "other"
    assert "el5" in out  # type: ignore[comparison-overlap]
    assert b"el5" in out  # type: ignore[comparison-overlap]
    assert out.find(".el7") < 0 <= out.find("el5")
    assert out.startswith("größe")
    assert out.endswith(("x86\n", "nothing"))
    assert out.split("\n")[0] == "größe: 5"
    assert out.replace("el5", "el9").count("el9") == 1
    assert out.index("el5") == bytes(out).index(b"el5")
    assert str(out) == f"{out}" == "größe: 5\nel5.x86\n"
    assert out.text == "größe: 5\nel5.x86"
    assert out.lines() == ["größe: 5", "el5.x86"]
    assert f"{Output(b'ab'):>4}" == "  ab"
    assert {out: 1}[Output(bytes(out))] == 1
    assert str(Output(b"\xff")) == "\\xff"


def test_a_view_trims_what_people_do_not_mean() -> None:
    assert view(b"a\r\nb\r\n") == b"a\nb"
    assert view(b"a\rb\n") == b"a\rb", "a bare carriage return is data"
    assert view(b"\n") == b""
    assert view(b"a\n\n") == b"a\n"
