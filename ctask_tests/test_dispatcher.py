# SPDX-License-Identifier: Apache-2.0
"""The dispatcher: order, deadlines behind what is queued, and nothing that is swallowed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from ctask.dispatcher import Deadline, Dispatcher, Post, _Heap


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


# -- F10: many deadlines, storms of cancels, callbacks that raise -----------------------------------------------------


def test_f10_ten_thousand_deadlines_each_once_and_in_order(lab: Lab) -> None:
    wanted = list(range(10_000))
    mixed = sorted(wanted, key=lambda n: n * 7919 % 10_007)

    def make() -> None:
        for n in mixed:
            lab.dispatcher.at(101.0 + n / 1000, None, lab.seen.append, n)

    lab.dispatcher.post(None, make)
    lab.sync()
    assert lab.seen == []
    lab.now = 106.0
    lab.sync()
    assert lab.seen == wanted[:5001]
    lab.now = 1000.0
    lab.sync()
    assert lab.seen == wanted
    assert len(lab.dispatcher._heap) == 0


def test_f10_storms_of_cancels_leave_a_small_heap(lab: Lab) -> None:
    """As jobs do: each makes a deadline far away, and cancels it soon; some are cancelled when they are due."""
    most = 0

    def storm() -> None:
        nonlocal most
        made = [lab.dispatcher.at(1e6 + n, None, lab.seen.append, n) for n in range(100)]
        for deadline in made:
            deadline.cancel()
            deadline.cancel()
        most = max(most, len(lab.dispatcher._heap))

    for _ in range(100):
        lab.dispatcher.post(None, storm)
    lab.dispatcher.post(None, lab.dispatcher.at, 105.0, None, lab.seen.append, "kept")
    lab.sync()
    assert most < 400
    lab.now = 2e6
    lab.sync()
    assert lab.seen == ["kept"]


def test_f10_deadlines_that_raise_end_their_subject_and_no_other(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    class Subject:
        def __init__(self, n: int) -> None:
            self.n = n

        def broken(self, error: Exception) -> None:
            lab.seen.append((self.n, str(error)))
            if self.n % 200 == 0:
                raise RuntimeError("its end raises as well")

        def due(self) -> None:
            if self.n % 2 == 0:
                raise ValueError("even")
            lab.seen.append(self.n)

    def make() -> None:
        for n in range(1000):
            subject = Subject(n)
            lab.dispatcher.at(101.0, subject, subject.due)

    with caplog.at_level(logging.CRITICAL + 1, logger="ctask.dispatcher"):
        lab.dispatcher.post(None, make)
        lab.sync()
        lab.now = 102.0
        lab.sync()
    assert lab.seen == [(n, "even") if n % 2 == 0 else n for n in range(1000)]
    assert lab.dispatcher.alive()


# -- H14: the thread ends by an error ---------------------------------------------------------------------------------


class Mortal:
    """A dispatcher that can die; what it tells then is kept."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.plan: list[BaseException] = []
        self.dispatcher = Dispatcher(
            "ctask-test/mortal", self._step, lambda: None, died=self.told.append, returned=self._returned
        )
        self.dispatcher.start()

    def _step(self, now: float) -> None:
        if self.plan:
            raise self.plan.pop()

    def _returned(self, post: Post) -> None:
        self.told.append(post[2][0])


def raises(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()], ids=repr)
def test_h14_an_error_that_is_no_exception_ends_it_and_no_post_is_lost(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    mortal = Mortal()
    block = threading.Event()
    mortal.dispatcher.post(None, block.wait, 10)
    mortal.dispatcher.post(None, raises, error)
    mortal.dispatcher.post(None, print, "queued")
    block.set()
    assert mortal.dispatcher.join(10)
    assert mortal.dispatcher.error is error
    mortal.dispatcher.post(None, print, "late")
    assert mortal.told == ["queued", error, "late"]
    assert "ends by an error" in caplog.text


def test_h14_a_plan_that_raises_ends_it(caplog: pytest.LogCaptureFixture) -> None:
    mortal = Mortal()
    error = ValueError("lost its way")
    mortal.plan.append(error)
    mortal.dispatcher.post(None, print, "carried out")
    assert mortal.dispatcher.join(10)
    assert mortal.told == [error]


def test_h14_posts_from_many_threads_come_back_each_once(caplog: pytest.LogCaptureFixture) -> None:
    mortal = Mortal()
    carried: list[int] = []
    start = threading.Barrier(5)

    def post(first: int) -> None:
        start.wait(10)
        for n in range(first, first + 500):
            mortal.dispatcher.post(None, carried.append, n)

    threads = [threading.Thread(target=post, args=(first * 500,)) for first in range(4)]
    for thread in threads:
        thread.start()
    start.wait(10)
    mortal.dispatcher.post(None, raises, SystemExit())
    for thread in threads:
        thread.join(10)
    assert mortal.dispatcher.join(10)
    returned = [one for one in mortal.told if not isinstance(one, BaseException)]
    assert sorted(carried + returned) == list(range(2000))
