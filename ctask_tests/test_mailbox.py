# SPDX-License-Identifier: Apache-2.0
"""The owner's side: lines whatever the chunks, who is called when, and credit that is neither lost nor leaked."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctask import mailbox
from ctask.buffers import STDERR, STDOUT, BufferStore, Capture, Loose, MemoryBudget, Output
from ctask.delivery import LONGEST_LINE, Delivery, LineCutter
from ctask.gate import AFLOAT, AWAY, SHARE, WIDER, Gate
from ctask.handler import Handlers
from ctask.mailbox import Mailbox


class Worker:
    """What the mailbox needs of a worker."""

    def __init__(self, **callbacks: Any) -> None:
        self.handlers = Handlers()
        self.last: tuple[str, str, Output] = ("", "", Output(b""))
        self.last_rc: int | None = None
        for event, callback in callbacks.items():
            self.handlers.add(event, callback)


class Session:
    """Somebody who waits for credit."""

    def __init__(self) -> None:
        self.given = 0

    def give(self) -> None:
        self.given += 1


def give_all(sessions: list[Any]) -> None:
    for session in sessions:
        session.give()


class Clock:
    """The time as a test has it, and the calls that are to be made later."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.calls: list[tuple[float, Callable[[], None]]] = []

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        self.calls.append((self.now + seconds, call))

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        due = [call for when, call in self.calls if when <= self.now]
        self.calls = [(when, call) for when, call in self.calls if when > self.now]
        for call in due:
            call()


def gate_of(limit: int, clock: Clock | None = None) -> Gate:
    clock = clock or Clock()
    return Gate(limit, give_all, clock.later, lambda: clock.now)


def box(limit: int = 1 << 20) -> tuple[Mailbox, Gate]:
    gate = gate_of(limit)
    return Mailbox(gate), gate


def feed(box: Mailbox, delivery: Delivery, capture: Capture | Loose, data: bytes, stream: int = STDOUT) -> None:
    if delivery.reader is None:
        delivery.reader = capture.reader()
    capture.append(stream, data)
    box.readable(delivery, len(data))


class Waiting:
    """Somebody who asks for a session of which so much waits for handlers."""

    def __init__(self, size: int = 1 << 30) -> None:
        self.size = size
        self.given_at = 0.0

    def waiting(self) -> int:
        return self.size


def loose() -> Loose:
    return Loose(BufferStore(MemoryBudget(1 << 30), gather=False))


def capture() -> Capture:
    return Capture(BufferStore(MemoryBudget(1 << 30)))


@given(st.binary(max_size=300).map(lambda b: b.replace(b"\x01", b"\n")), st.lists(st.integers(1, 20), max_size=60))
def test_e03_any_chunks_give_the_same_lines_and_lose_nothing(data: bytes, sizes: list[int]) -> None:
    cutter, lines, at = LineCutter(), [], 0
    for size in [*sizes, len(data)]:
        lines += cutter.cut(data[at : at + size])
        at += size
    lines += cutter.rest()
    wanted = data.split(b"\n")
    rest = wanted.pop()
    assert lines == [w.removesuffix(b"\r") for w in wanted] + ([rest] if rest else [])


def test_e07_an_empty_line_is_kept_and_the_last_line_needs_no_end() -> None:
    cutter = LineCutter()
    assert cutter.cut(b"\n\na") == [b"", b""]
    assert cutter.rest() == [b"a"]
    assert cutter.rest() == []


def test_a_carriage_return_on_its_own_is_data_also_at_the_end_of_a_chunk() -> None:
    cutter = LineCutter()
    assert cutter.cut(b"1\r2\r") == []
    assert cutter.cut(b"\nx\r\n") == [b"1\r2", b"x"]
    assert cutter.cut(b"y\r") == []
    assert cutter.rest() == [b"y\r"]


@pytest.mark.parametrize("step", [1000, LONGEST_LINE // 2, 3 * LONGEST_LINE + 5])
def test_events_split_a_line_after_a_mebibyte(step: int) -> None:
    data = b"z" * (3 * LONGEST_LINE + 5)
    cutter, lines = LineCutter(), []
    for at in range(0, len(data), step):
        lines += cutter.cut(data[at : at + step])
    lines += cutter.cut(b"\n")
    assert b"".join(lines) == data
    assert max(map(len, lines)) == LONGEST_LINE
    assert [len(line) for line in lines[:-1]] == [LONGEST_LINE] * 3


def test_lines_come_before_the_end_and_in_order() -> None:
    seen: list[object] = []
    worker = Worker(
        read=lambda w, node, sname, msg: seen.append((sname, str(msg))),
        hup=lambda w, node, rc: seen.append(rc),
        done=lambda w, node, result: seen.append("done"),
    )
    post, _ = box()
    what, delivery = capture(), Delivery(worker, "n1", apart=False)
    feed(post, delivery, what, b"one\ntw")
    feed(post, delivery, what, b"o\nthree", STDERR)
    what.seal()
    post.ended(delivery, 0, None)  # type: ignore[arg-type]
    post.pump(lambda: "done" in seen)
    assert seen == [("stdout", "one"), ("stdout", "two"), ("stdout", "three"), 0, "done"]


def test_streams_apart_are_cut_apart() -> None:
    seen: list[object] = []
    worker = Worker(read=lambda w, node, sname, msg: seen.append((sname, str(msg))), done=lambda *_: seen.append("."))
    post, _ = box()
    what, delivery = capture(), Delivery(worker, "n1", apart=True)
    feed(post, delivery, what, b"o")
    feed(post, delivery, what, b"e\n", STDERR)
    feed(post, delivery, what, b"ut\n")
    what.seal()
    post.ended(delivery, None, None)  # type: ignore[arg-type]
    post.pump(lambda: "." in seen)
    assert seen == [("stderr", "e"), ("stdout", "out"), "."]


def test_what_is_muted_is_not_delivered_but_done_is() -> None:
    seen: list[object] = []
    worker = Worker(read=lambda w, n, s, msg: seen.append(msg), done=lambda *_: seen.append("done"))
    post, gate = box(limit=10)
    what, delivery = capture(), Delivery(worker, "n1", apart=False)
    feed(post, delivery, what, b"line\n" * 100)
    delivery.mute()
    post.ended(delivery, None, None)  # type: ignore[arg-type]
    post.pump(lambda: "done" in seen)
    assert seen == ["done"]
    gate.begin()
    assert gate.ask(Session(), Waiting()), "what is never read does not hold back others"


def test_h01_a_callback_that_raises_is_called_again_and_its_error_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("slip")

    post, _ = box()
    worker = Worker(read=fail, done=lambda *_: None)
    what, delivery = loose(), Delivery(worker, "n1", apart=False)
    with caplog.at_level(logging.ERROR):
        feed(post, delivery, what, b"a\nb\nc\n")
        post.pump(lambda: len(post.errors) == 3)
    assert [str(error) for error in post.errors] == ["slip"] * 3
    assert sum("Traceback" in (record.exc_text or "") for record in caplog.records) == 1


def test_an_interrupt_out_of_a_handler_loses_no_line() -> None:
    seen: list[str] = []

    def read(worker: Any, node: str, sname: str, msg: Output) -> None:
        seen.append(str(msg))
        if msg == "3":
            raise KeyboardInterrupt

    post, _ = box()
    delivery = Delivery(Worker(read=read), "n1", apart=False)
    feed(post, delivery, loose(), b"".join(b"%d\n" % n for n in range(10)))
    with pytest.raises(KeyboardInterrupt):
        post.pump(lambda: len(seen) == 10)
    post.pump(lambda: len(seen) == 10)
    assert seen == [str(n) for n in range(10)]


def test_a_pump_with_slow_handlers_looks_at_its_deadline() -> None:
    seen: list[Output] = []

    def slow(worker: Any, node: str, sname: str, msg: Output) -> None:
        seen.append(msg)
        time.sleep(0.01)

    post, _ = box()
    delivery = Delivery(Worker(read=slow), "n1", apart=False)
    feed(post, delivery, loose(), b"x\n" * 5000)
    began = time.monotonic()
    assert not post.pump(lambda: False, began + 0.2)
    assert 0.2 <= time.monotonic() - began < 1.2
    assert 0 < len(seen) < 500
    until = len(seen) + 5
    assert post.pump(lambda: len(seen) >= until), "and goes on where it stopped"


def test_a_handler_that_waits_does_not_run_others() -> None:
    seen: list[str] = []
    post, _ = box()
    flag = threading.Event()

    def wake() -> None:
        flag.set()
        post.ring()

    def read(worker: Any, node: str, sname: str, msg: Output) -> None:
        seen.append(f"in {msg}")
        if msg == "1":
            flag_setter = threading.Timer(0.02, wake)
            flag_setter.start()
            assert post.pump(flag.is_set, time.monotonic() + 10)
            flag_setter.join()
        seen.append(f"out {msg}")

    delivery = Delivery(Worker(read=read), "n1", apart=False)
    feed(post, delivery, loose(), b"1\n2\n")
    post.pump(lambda: len(seen) == 4)
    assert seen == ["in 1", "out 1", "in 2", "out 2"]


def test_lines_of_one_node_give_way_to_those_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailbox, "TURN", 0.0)
    seen: list[str] = []
    post, _ = box()
    worker = Worker(read=lambda w, n, s, msg: seen.append(f"{n}{msg}"), done=lambda w, n, r: seen.append(f"{n} ends"))
    long, short, ended = (Delivery(worker, node, apart=False) for node in "abc")
    feed(post, long, capture(), b"1\n2\n3\n")
    feed(post, short, capture(), b"1\n")
    feed(post, ended, capture(), b"1\n2\n3")
    post.ended(ended, 0, None)  # type: ignore[arg-type]
    post.ended(long, 0, None)  # type: ignore[arg-type]
    assert post.pump(lambda: "a ends" in seen)
    assert seen[:3] == ["a1", "b1", "c1"]
    for node, lines in (("a", 3), ("c", 3)):
        assert [said for said in seen if said[0] == node] == [*(f"{node}{n + 1}" for n in range(lines)), f"{node} ends"]


def test_credit_is_withheld_only_while_the_owner_delivers() -> None:
    clock, session = Clock(), Session()
    gate = gate_of(100, clock)
    gate.more(200)
    assert gate.ask(session, Waiting()), "the owner computes: credit is given"
    gate.begin()
    assert not gate.ask(session, Waiting())
    assert gate.withholds(session)
    gate.less(100)
    assert session.given == 0
    gate.less(60)
    assert session.given == 1, "below half of the limit it flows again"
    assert not gate.withholds(session)
    gate.more(200)
    assert not gate.ask(session, Waiting())
    gate.end()
    assert session.given == 1, "a program that waits in a loop is back in a moment"
    clock.sleep(AWAY)
    assert session.given == 2, "nobody delivers any more"
    gate.more(200)
    assert gate.ask(session, Waiting())
    assert not clock.calls


def test_an_owner_who_waits_in_a_loop_is_not_away() -> None:
    clock, session = Clock(), Session()
    gate = gate_of(100, clock)
    gate.begin()
    gate.more(200)
    for _ in range(20):
        assert not gate.ask(session, Waiting())
        gate.end()
        clock.sleep(AWAY * 0.4)
        gate.more(1)
        gate.begin()
        clock.sleep(AWAY * 0.4)
        assert len(clock.calls) <= 1
    assert session.given == 0
    gate.end()
    clock.sleep(AWAY)
    clock.sleep(AWAY)
    assert session.given == 1
    assert not clock.calls


def test_a_node_of_which_little_waits_is_not_held_back_by_the_flood_of_another() -> None:
    gate, quiet, busy = gate_of(100), Session(), Session()
    reader = Waiting(SHARE)
    gate.more(200 + SHARE)
    gate.begin()
    assert gate.ask(Session(), Waiting(SHARE - 1))
    assert not gate.ask(busy, Waiting())
    assert not gate.ask(quiet, reader)
    gate.less(1)
    assert (quiet.given, busy.given) == (0, 0)
    reader.size = 0
    gate.less(1)
    assert (quiet.given, busy.given) == (1, 0), "its own lines have been read"
    gate.less(200 + SHARE)
    assert (quiet.given, busy.given) == (1, 1)


def test_credit_is_withheld_while_too_much_is_on_its_way_to_the_store() -> None:
    gate, session = gate_of(100), Session()
    gate.posted(AFLOAT + 1)
    assert not gate.ask(session, Waiting())
    gate.landed(AFLOAT // 4)
    assert session.given == 0
    gate.landed(AFLOAT // 2)
    assert session.given == 1


def test_a_flood_into_a_slow_handler_is_read_to_the_last_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that is held back by the gate, a dispatcher, an owner: in the end everything was delivered."""
    monkeypatch.setattr(mailbox, "SLICE", 4096)
    seen: list[int] = []
    post, gate = box(limit=20_000)
    worker = Worker(read=lambda w, n, s, msg: seen.append(len(msg)), done=lambda *_: seen.append(-1))
    what, delivery = capture(), Delivery(worker, "n1", apart=False)
    credit = threading.Semaphore(4)

    class Node:
        def give(self) -> None:
            credit.release()

    node, line = Node(), b"y" * 99 + b"\n"

    def flood() -> None:
        for _ in range(200):
            assert credit.acquire(timeout=10)
            feed(post, delivery, what, line * 50)
            if gate.ask(node, Waiting()):
                credit.release()
        what.seal()
        post.ended(delivery, 0, None)  # type: ignore[arg-type]

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        assert post.pump(lambda: -1 in seen, time.monotonic() + 20)
    finally:
        thread.join()
    assert seen == [99] * 10_000 + [-1]


def test_windows_share_what_they_may_be_wider() -> None:
    gate = gate_of(100)
    assert gate.widen(WIDER - 10) == WIDER - 10
    assert [gate.widen(100), gate.widen(100)] == [10, 0]
    gate.narrow(60)
    assert gate.widen(100) == 60
