# SPDX-License-Identifier: Apache-2.0
"""Numbers at the edges: times that are huge, tiny or no number, waits of 0 seconds, exit statuses of 32 bits.

On fake nodes and on this machine. Runs in the thread of pytest, which owns the task.
"""

from __future__ import annotations

import concurrent.futures
import math
import threading
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest

import ctask
from ctask import ClusterExecutor, OptionError, Retry, Task, UsageError, Worker, task_self
from ctask.nodes.groups.upcall import UpcallGroupSource
from ctask.numeric import LONGEST, duration, limit, patience, shown, whole
from ctask.testing import FakeTransport, Step
from ctask_tests.fake_nodes import HANGS, nodes, says

#: Larger than any clock, lock, queue or epoll takes; some are no float either.
HUGE: list[Any] = [10**400, 10**5000, 1e300, 1e10, threading.TIMEOUT_MAX * 2, Fraction(10**400), Decimal("1e300")]
TINY = [5e-324, Fraction(1, 10**400), Decimal("1e-999")]
NEGATIVE = [-1, -(10**5000), -math.inf, Fraction(-1, 10**400)]
WRONG: list[Any] = [math.nan, True, "3", b"3", 2j, [1], Decimal("NaN"), Decimal("sNaN"), float]
LIMITS = ["connect_timeout", "timeout", "idle_timeout", "deadline", "drain_timeout", "alive_interval"]


@pytest.fixture
def fake() -> Iterator[FakeTransport]:
    with FakeTransport(nodes(hang=HANGS, big=says(rc=2**32 - 1), windows=says(rc=3221225472))) as transport:
        yield transport


@pytest.fixture
def task(fake: FakeTransport) -> Task:
    return task_self()


@pytest.fixture
def hanging(task: Task) -> Iterator[Worker]:
    worker = task.submit("x", nodes="hang")
    yield worker
    worker.abort()
    worker.wait()


# -- what a number may be ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", HUGE, ids=lambda value: shown(value)[:16])
def test_a_time_that_is_longer_than_a_life_is_no_limit(value: Any) -> None:
    assert limit("x", value) is None
    assert patience("x", value) is None
    assert duration("x", value) == LONGEST


@pytest.mark.parametrize("value", TINY, ids=repr)
def test_a_time_that_is_hardly_one_is_not_taken_for_none(value: Any) -> None:
    for parse in (limit, patience, duration):
        parsed = parse("x", value)
        assert parsed is not None
        assert 0 < parsed < 1e-300


@pytest.mark.parametrize("value", [Decimal("1.5"), Fraction(3, 2), 1.5])
def test_numbers_of_all_kinds_are_taken(value: Any) -> None:
    assert limit("x", value) == patience("x", value) == duration("x", value) == 1.5


@pytest.mark.parametrize("value", [*WRONG, *NEGATIVE], ids=lambda value: shown(value)[:16])
def test_what_is_no_time_is_refused_with_its_name(value: Any) -> None:
    for parse in (limit, patience, duration):
        with pytest.raises(OptionError, match=r"^the_name "):
            parse("the_name", value)


def test_a_message_does_not_print_thousands_of_digits() -> None:
    for value in (-(10**300), 10**300):
        with pytest.raises(OptionError, match=r"\(30[12] characters\)") as caught:
            whole("port", value, 1, 65_535)
        assert len(str(caught.value)) < 200
    for count in (10**400, 10**5000):
        with pytest.raises(UsageError, match=r"and there are 1: n1\. Nothing was run") as refused:
            task_self().run("x", nodes="n1", expect=count)
        assert len(str(refused.value)) < 200


# -- everywhere that takes one -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [*HUGE, math.inf], ids=lambda value: shown(value)[:16])
def test_no_option_overflows_neither_in_the_call_nor_later(task: Task, value: Any) -> None:
    retry = Retry(3, idempotent=True, exit_codes={75}, wait=0.001)
    options: dict[str, Any] = dict.fromkeys(LIMITS, value)
    if value != math.inf:
        options.update(dict.fromkeys(("keep", "stop_grace"), value))
    places: list[dict[str, Any]] = [{"nodes": "n[1-2]"}, {}]
    for place in places:
        worker = task.run("true", retry=retry, **options, **place)
        assert worker.exit_code() == 0
        assert worker.wait(value)
        assert [result.rc for result in worker.results(value)] == [0] * len(worker)
        for future in worker:
            assert future.result(value).rc == 0
            assert future.exception(value) is None
        assert not ctask.wait(worker, value).not_done
        assert len(list(ctask.as_completed(worker, value))) == len(worker)
    assert task.join(value)
    task.resume(value)
    task.run(timeout=value)
    for name, one in options.items():
        task.set_info(name, one)
        task.node_options("n1", **{name: one})
    assert task.run("true", nodes="n1", check=True).exit_code() == 0


@pytest.mark.parametrize("value", HUGE, ids=lambda value: shown(value)[:16])
def test_nor_where_it_is_waited_for(task: Task, value: Any) -> None:
    # In other threads the waits are the standard library's, on which these numbers fall straight through.
    failed: list[BaseException] = []

    def elsewhere() -> None:
        try:
            worker = task.submit("x", nodes="slow", timeout=value, idle_timeout=value, deadline=value)
            assert worker.futures["slow"].result(value).rc == 0
            worker = task.submit("x", nodes="slow")
            assert worker.wait(value)
            worker = task.submit("x", nodes="slow")
            assert len(list(worker.results(value))) == 1
            worker = task.submit("x", nodes="slow")
            assert len(list(ctask.as_completed(worker, value))) == 1
            with ClusterExecutor() as executor:
                assert [one.rc for one in executor.map("x", "slow", timeout=value)] == [0]
        except BaseException as error:  # noqa: BLE001 (the main thread tells)
            failed.append(error)

    with FakeTransport(nodes(slow=says(after=0.02))):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert failed == []
        worker = task.submit("x", nodes="slow")
        assert worker.wait(value)


@pytest.mark.parametrize("value", [10**400, 10**18, 2**63])
def test_counts_may_be_as_large_as_they_like(task: Task, value: int) -> None:
    for name in ("fanout", "queue_limit", "output_memory"):
        task.set_info(name, value)
    worker = task.run("true", nodes="n[1-3]", retry=Retry(value))
    assert worker.exit_code() == 0
    assert repr(task)
    worker = task.run("true", nodes="n1", retry=value)
    with pytest.raises(OptionError, match="port is a whole number"):
        task.run("true", nodes="n1", port=value)
    with pytest.raises(ctask.UsageError, match="expected 1"):
        task.run("true", nodes="n[1-2]", expect=1)
    for expect in (True, -1, 1.0, "2"):
        with pytest.raises(OptionError, match="expect is a whole number"):
            task.run("true", nodes="n[1-2]", expect=expect)


def test_a_policy_takes_huge_numbers_and_gives_up_on_none(task: Task) -> None:
    for value in HUGE:
        policy = Retry(2, wait=value, budget=value)
        assert (policy.wait, policy.budget) == (LONGEST, LONGEST)
    with FakeTransport(nodes(), refuse=lambda *_: ctask.BannerError("busy", curable=ctask.Curable.BUSY)):
        worker = task.submit("x", nodes="n1", retry=Retry(2, wait=10**400))
        assert not worker.wait(0.05)  # it waits its 31 years, and holds nobody up
        worker.abort()
        assert worker.wait(5)


@pytest.mark.parametrize("value", HUGE, ids=lambda value: shown(value)[:16])
def test_a_group_source_waits_as_long_as_it_is_told(value: Any) -> None:
    # It closes its output before it ends, so that both its output and its end are waited for.
    command = "sleep 0.05; echo n[1-3]; exec >&- 2>&-; sleep 0.05"
    source = UpcallGroupSource("slow", map_upcall=command, timeout=value, cache_time=value)
    assert source.resolv_map("any") == ["n[1-3]"]
    for wrong in (math.nan, -1, True):
        with pytest.raises(ctask.GroupSourceError, match="timeout"):
            UpcallGroupSource("slow", map_upcall="true", timeout=wrong)


# -- waits of 0 seconds ------------------------------------------------------------------------------------------


def polls(worker: Worker) -> dict[str, Callable[[], object]]:
    future = next(iter(worker))
    return {
        "wait": lambda: worker.wait(0),
        "join": lambda: worker.task.join(0),
        "result": lambda: future.result(0),
        "exception": lambda: future.exception(0),
        "worker.result": lambda: worker.result("hang", 0),
        "results": lambda: next(worker.results(0)),
        "ctask.wait": lambda: not ctask.wait(worker, 0).not_done,
        "as_completed": lambda: next(ctask.as_completed(worker, 0)),
    }


NAMES = ["wait", "join", "result", "exception", "worker.result", "results", "ctask.wait", "as_completed"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["owner", "elsewhere", "handler", "done-callback"])
def test_0_looks_once(task: Task, hanging: Worker, name: str, where: str) -> None:
    outcome: list[object] = []

    def look(*_: object) -> None:
        began = time.monotonic()
        try:
            outcome.append(polls(hanging)[name]())
        except TimeoutError:
            outcome.append(False)
        except BaseException as error:  # noqa: BLE001 (the main thread tells)
            outcome.append(error)
        outcome.append(time.monotonic() - began < 1)

    if where == "owner":
        look()
    elif where == "elsewhere":
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    elif where == "handler":
        task.submit("x", nodes="n1", on_done=look).wait()
    else:
        future = task.submit("x", nodes="slow").futures["slow"]
        future.add_done_callback(look)
        future.result()
        while len(outcome) < 2:
            time.sleep(0.001)
    assert outcome == [False, True]
    assert not hanging.done()


@pytest.mark.parametrize("name", NAMES)
def test_0_finds_what_has_ended(task: Task, name: str) -> None:
    worker = task.submit("x", nodes="n1")
    worker.wait()
    poll = polls(worker)[name] if name != "worker.result" else lambda: worker.result("n1", 0)
    assert poll() is not False


def test_polling_comes_to_an_end_and_runs_the_handlers(task: Task) -> None:
    heard: list[Any] = []
    with FakeTransport(nodes(slow=[Step("running"), Step("out", b"a\nb\n"), Step("exit", after=0.05)])):
        worker = task.submit("x", nodes="slow", on_read=lambda *what: heard.append(what[3]))
        while not worker.wait(0):
            time.sleep(0.001)
        assert heard == ["a", "b"]
        worker = task.submit("x", nodes="slow", on_read=lambda *what: heard.append(what[3]))
        while not task.join(0):
            time.sleep(0.001)
    assert heard == ["a", "b", "a", "b"]
    assert [str(output) for output, _ in task.iter_buffers()] == ["a\nb"], "the last look is at the same run"


def test_a_poll_of_what_is_only_scheduled_finds_nothing(task: Task) -> None:
    worker = task.shell("x", nodes="n1")
    assert not worker.wait(0)
    with pytest.raises(TimeoutError):
        worker.result("n1", 0)
    with pytest.raises(ctask.TaskError, match="resume"):
        worker.wait(1)
    task.resume()
    assert worker.wait(0)


def test_a_run_whose_deadline_is_0_has_none(task: Task) -> None:
    with FakeTransport(nodes(slow=says(after=0.05))):
        task.shell("x", nodes="slow")
        task.resume(0)
        assert task.run("x", nodes="slow", deadline=0).exit_code() == 0
        task.shell("x", nodes="slow")
        task.run(timeout=0)


def test_past_is_now_where_the_standard_library_says_so(task: Task, hanging: Worker) -> None:
    future = hanging.futures["hang"]
    for call in (future.result, future.exception):
        with pytest.raises(TimeoutError):
            call(-1)
    assert not ctask.wait(hanging, -0.5).done
    with pytest.raises(TimeoutError):
        next(ctask.as_completed(hanging, -1))
    for other in (hanging.wait, task.join, hanging.results):
        with pytest.raises(OptionError, match="cannot be -1"):
            other(-1)


@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_no_wait_takes_what_is_no_time(task: Task, hanging: Worker, value: Any) -> None:
    future = hanging.futures["hang"]
    calls: list[Callable[[Any], object]] = [hanging.wait, task.join, task.resume, hanging.results]
    calls += [future.result, future.exception, lambda time: hanging.result("hang", time)]
    calls += [lambda time: ctask.wait(hanging, time), lambda time: ctask.as_completed(hanging, time)]
    calls += [lambda time: task.run("true", nodes="n1", deadline=time), lambda time: task.run(timeout=time)]
    with ClusterExecutor(task) as executor:
        calls.append(lambda time: executor.map("x", "n1", timeout=time))
        for call in calls:
            with pytest.raises(OptionError, match=r"deadline|timeout"):
                call(value)
        hanging.abort()


def test_what_has_ended_by_the_deadline_of_a_wait_is_heard(task: Task) -> None:
    for deadline in (0, 0.05):
        heard: list[str] = []
        worker = task.submit("x", nodes="n[1-4]", on_done=lambda worker, node, result, heard=heard: heard.append(node))
        concurrent.futures.wait(worker.futures.values())
        assert worker.wait(deadline)
        assert sorted(heard) == ["n1", "n2", "n3", "n4"]
        heard.clear()
        worker = task.submit("x", nodes="n[1-4]", on_done=lambda worker, node, result, heard=heard: heard.append(node))
        while not worker.wait(deadline):
            pass
        assert sorted(heard) == ["n1", "n2", "n3", "n4"]


def test_a_look_says_in_every_thread_what_has_not_ended(task: Task) -> None:
    future = task.submit("x", nodes="hang").futures["hang"]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        for ask in (future.result, future.exception):
            for elsewhere in (False, True):
                with pytest.raises(TimeoutError, match="hang: not ended within 0 s; the job goes on"):
                    pool.submit(ask, 0).result() if elsewhere else ask(0)
    task.abort()


def test_results_takes_the_time_between_two_of_them(task: Task) -> None:
    script = nodes(n1=says(after=0.1), n2=says(after=0.2), n3=says(after=0.3), hang=HANGS)
    for elsewhere in (False, True):
        with FakeTransport(script):
            worker = task.submit("x", nodes="n[1-3],hang")
            came: list[str] = []

            def take(worker: Worker = worker, came: list[str] = came) -> None:
                began = time.monotonic()
                with pytest.raises(TimeoutError, match="1 jobs have not ended, and go on"):
                    came.extend(result.node for result in worker.results(0.25))
                assert 0.5 <= time.monotonic() - began < 5

            if elsewhere:
                with concurrent.futures.ThreadPoolExecutor(1) as pool:
                    pool.submit(take).result()
            else:
                take()
            assert came == ["n1", "n2", "n3"]
            assert not worker.done()
            assert len(list(zip(range(3), worker.results(), strict=False))) == 3, "another call begins anew"


# -- exit statuses of 32 bits ------------------------------------------------------------------------------------


def test_an_exit_status_has_32_bits(task: Task) -> None:
    worker = task.run("x", nodes="big,windows,n1", ok_codes={0, 3221225472})
    assert str(worker.ok) == "n1,windows"
    assert (task.node_retcode("big"), task.node_retcode("windows")) == (2**32 - 1, 3221225472)
    assert task.max_retcode() == worker.max_retcode() == 2**32 - 1
    assert [code for code, _ in task.iter_retcodes()] == [0, 3221225472, 2**32 - 1]
    assert {group.rc for group in worker.groups()} == {0, 3221225472, 2**32 - 1}
    assert str(worker.failures()) == "exit 4294967295: big"
    assert "exit 3221225472" in repr(worker)
    task.set_info("ok_codes", 2**32 - 1)
    task.run("x", nodes="big", check=True)
    for wrong in (2**32, -1, True, "0", [0, 2**32], 1.0, None):
        with pytest.raises(OptionError, match="4294967295"):
            task.run("x", nodes="big", ok_codes=wrong)


def test_a_policy_knows_exit_statuses_of_32_bits(task: Task) -> None:
    policy = Retry(3, wait=0, exit_codes={3221225472}, idempotent=True)
    worker = task.run("x", nodes="windows,big", retry=policy)
    assert [attempt.rc for attempt in worker.result("windows").attempts] == [3221225472] * 3
    assert len(worker.result("big").attempts) == 1
