# SPDX-License-Identifier: Apache-2.0
"""The dispatcher: order, deadlines behind what is queued, and nothing that is swallowed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from ctask.dispatcher import Deadline, Dispatcher, _Heap


class Lab:
    """A dispatcher without a plan, whose clock is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0
        self.seen: list[Any] = []
        self.steps = 0
        self.dispatcher = Dispatcher("ctask-test/dispatcher", self._step, lambda: None, lambda: self.now)
        self.dispatcher.start()

    def _step(self, now: float) -> None:
        self.steps += 1

    def sync(self) -> None:
        """Wait until all that was posted, and what it led to, is carried out."""
        for _ in range(3):
            done = threading.Event()
            self.dispatcher.post(None, done.set)
            assert done.wait(10)


@pytest.fixture
def lab() -> Iterator[Lab]:
    lab = Lab()
    yield lab
    lab.dispatcher.stop()
    assert lab.dispatcher.join(10)


def test_posts_are_carried_out_in_order(lab: Lab) -> None:
    for n in range(1000):
        lab.dispatcher.post(None, lab.seen.append, n)
    lab.sync()
    assert lab.seen == list(range(1000))


def test_f09_deadlines_follow_the_dispatchers_clock_only(lab: Lab) -> None:
    lab.dispatcher.post(None, lab.dispatcher.at, 105.0, None, lab.seen.append, "late")
    lab.dispatcher.post(None, lab.dispatcher.at, 101.0, None, lab.seen.append, "early")
    lab.sync()
    assert lab.seen == []
    lab.now = 1000.0  # a suspended machine: one late tick, each once, in order
    lab.sync()
    assert lab.seen == ["early", "late"]


def test_an_end_that_was_posted_first_stands(lab: Lab) -> None:
    ended: list[str] = []

    def first(name: str) -> None:
        if not ended:
            ended.append(name)

    block = threading.Event()
    lab.dispatcher.post(None, lab.dispatcher.at, 101.0, None, first, "deadline")
    lab.sync()
    lab.dispatcher.post(None, block.wait, 10)
    lab.now = 102.0
    lab.dispatcher.post(None, first, "exit")
    block.set()
    lab.sync()
    assert ended == ["exit"]


def test_a_cancelled_deadline_is_not_called(lab: Lab) -> None:
    made: list[Deadline] = []
    lab.dispatcher.post(None, lambda: made.append(lab.dispatcher.at(101.0, None, lab.seen.append, "x")))
    lab.sync()
    lab.dispatcher.post(None, made[0].cancel)
    lab.dispatcher.post(None, made[0].cancel)
    lab.now = 200.0
    lab.sync()
    assert lab.seen == []


def test_f10_cancelled_deadlines_do_not_pile_up() -> None:
    heap = _Heap()
    for n in range(10_000):
        deadline = Deadline(heap, float(n), None, lambda: None, ())
        heap.push(deadline)
        if n % 100:
            deadline.cancel()
    assert len(heap) < 400
    due = []
    while (deadline := heap.pop_due(1e9)) is not None:  # type: ignore[assignment]
        due.append(deadline.when)
    assert due == [float(n) for n in range(0, 10_000, 100)]


def test_what_raises_ends_its_subject_and_nobody_else(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    class Subject:
        def broken(self, error: Exception) -> None:
            lab.seen.append(repr(error))

        def fail(self) -> None:
            raise ValueError("wrong")

    with caplog.at_level(logging.ERROR):
        subject = Subject()
        lab.dispatcher.post(subject, subject.fail)
        lab.dispatcher.post(None, lab.seen.append, "next")
        lab.sync()
    assert lab.seen == ["ValueError('wrong')", "next"]
    assert "wrong" in caplog.text


def test_posting_wakes_it_however_far_its_next_deadline_is(lab: Lab) -> None:
    lab.dispatcher.post(None, lab.dispatcher.at, 1e9, None, lab.seen.append, "never")
    lab.sync()
    assert lab.steps
