# SPDX-License-Identifier: Apache-2.0
"""Workers under asyncio: awaited without blocking the loop, with handlers in its thread; a cancellation ends no job."""

from __future__ import annotations

import asyncio
import concurrent.futures
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from ctask import (
    Aborted,
    ConnectionLost,
    NodeResult,
    NodeSet,
    Outcome,
    Output,
    Task,
    TaskError,
    Worker,
    task_self,
)
from ctask.testing import FakeTransport, Step, close_everything
from ctask_tests.fake_nodes import HANGS, Recorder, act, nodes, says
from ctask_tests.fix_leaks import wait_until
from ctask_tests.fix_sshd import Sshd

SCRIPTS = {
    "bad": says(b"out\n", 7),
    "hang": HANGS,
    "h1": HANGS,
    "h2": HANGS,
    "late": says(b"late\n", after=0.1),
    "lost": [Step("running"), Step("out", b"half"), Step("lost", error=ConnectionLost("reset"))],
}


@pytest.fixture
def task() -> Task:
    return task_self()


@pytest.fixture
def fake() -> Iterator[FakeTransport]:
    with FakeTransport(nodes(**SCRIPTS)) as fake:
        yield fake
        close_everything()


def run(main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Run it on a loop that complains of what takes long, and of what is never awaited."""
    return asyncio.run(main(), debug=True)


async def sleep_until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def sent(fake: FakeTransport) -> int:
    """How many commands have reached their nodes."""
    return sum(session.sent for session in fake.sessions)


# -- what it gives ---------------------------------------------------------------------------------------------------


def test_await_gives_every_result_in_the_order_of_the_nodes(task: Task, fake: FakeTransport) -> None:
    async def main() -> list[NodeResult]:
        return await task.submit("x", nodes="n[1-3],bad,late,lost")

    results = run(main)
    assert [result.node for result in results] == list(NodeSet("n[1-3],bad,late,lost"))
    ended = {result.node: result.outcome for result in results}
    assert ended == dict.fromkeys(("n1", "n2", "n3", "bad", "late"), Outcome.EXITED) | {"lost": Outcome.LOST}
    assert {result.node: result.rc for result in results}["bad"] == 7


def test_results_come_as_they_end_and_never_raise(task: Task, fake: FakeTransport) -> None:
    async def main() -> list[str]:
        worker = task.submit("x", nodes="n1,late,lost")
        first = [result.node async for result in worker]
        again = [result.node async for result in worker]  # at once, in the same order
        assert first == again
        return first

    assert run(main)[-1] == "late"


def test_leaving_an_async_for_ends_nothing(task: Task, fake: FakeTransport) -> None:
    async def main() -> None:
        worker = task.submit("x", nodes="n1,hang")
        async for result in worker:
            assert result.node == "n1"
            break
        assert worker.pending == NodeSet("hang")
        (hanging,) = [one for one in fake.sessions if one.connection.target.address == "hang"]
        act(fake, hanging, Step("exit"), Step("end"))
        assert [result.node for result in await worker] == ["hang", "n1"]

    run(main)


def test_a_local_command_is_awaited_as_well(task: Task) -> None:
    async def main() -> list[NodeResult]:
        return await task.submit("echo here", key="laptop")

    (result,) = run(main)
    assert (result.node, str(result.stdout)) == ("laptop", "here\n")


def test_an_empty_worker_is_done(task: Task, fake: FakeTransport) -> None:
    async def main() -> list[NodeResult]:
        worker = task.submit("x", nodes=[], allow_empty=True)
        assert [result async for result in worker] == []
        return await worker

    assert run(main) == []


def test_several_workers_are_gathered(task: Task, fake: FakeTransport) -> None:
    async def main() -> list[list[NodeResult]]:
        return await asyncio.gather(*(task.submit("x", nodes=f"n{number},late") for number in range(40)))

    assert [sorted(result.node for result in results) for results in run(main)] == [
        ["late", f"n{number}"] for number in range(40)
    ]


# -- the loop and the handlers ---------------------------------------------------------------------------------------


def test_the_loop_goes_on_while_a_worker_is_awaited(task: Task, fake: FakeTransport) -> None:
    async def main() -> None:
        worker = task.submit("x", nodes="hang")
        awaited = asyncio.ensure_future(worker)
        for _ in range(50):
            await asyncio.sleep(0)
        assert not awaited.done()
        await sleep_until(lambda: sent(fake))
        act(fake, fake.sessions[0], Step("exit"), Step("end"))
        assert [result.rc for result in await awaited] == [0]

    run(main)


def test_handlers_run_in_the_loops_thread_and_before_the_await_returns(task: Task, fake: FakeTransport) -> None:
    story = Recorder()

    async def main() -> None:
        await task.submit("x", nodes="n[1-50],late", handler=story)
        assert story.names().count("done") == 51
        assert story.names()[-1] == "close"

    run(main)
    assert story.threads == {threading.current_thread()}
    assert story.names("late") == ["pickup", "read", "hup", "done"]


def test_handlers_leave_the_loop_its_turn(task: Task) -> None:
    heard = 0
    turns: list[int] = []

    def slow(worker: Worker, node: str, sname: str, line: Output) -> None:
        nonlocal heard
        heard += 1
        time.sleep(0.001)

    async def tick(worker: Worker) -> None:
        while not worker.closed:
            turns.append(heard)
            await asyncio.sleep(0)

    async def main() -> None:
        worker = task.submit("x", nodes="n1", on_read=slow)
        await asyncio.gather(worker, tick(worker))

    with FakeTransport(nodes(says(b"line\n" * 200))):
        run(main)
    assert heard == 200
    # Between two turns of the loop there are as many lines as have place in a turn, and never all of them.
    assert len({count for count in turns if 0 < count < 200}) >= 3


def test_no_handler_runs_while_nobody_awaits(task: Task, fake: FakeTransport) -> None:
    story = Recorder()

    async def main() -> None:
        worker = task.submit("x", nodes="n1", handler=story)
        await sleep_until(worker.done)
        assert story.events == []
        await worker
        assert story.names("n1") == ["pickup", "read", "hup", "done"]

    run(main)


def test_a_handler_may_submit_and_start_coroutines(task: Task, fake: FakeTransport) -> None:
    more: list[asyncio.Task[Any]] = []

    async def look(node: str) -> list[NodeResult]:
        return await task.submit("y", nodes=f"{node}0")

    def done(worker: Worker, node: str, result: NodeResult) -> None:
        more.append(asyncio.get_running_loop().create_task(look(node)))

    async def main() -> None:
        await task.submit("x", nodes="n[1-3]", on_done=done)
        seen = [result.node for results in await asyncio.gather(*more) for result in results]
        assert sorted(seen) == ["n10", "n20", "n30"]

    run(main)


def test_a_handler_that_raises_does_not_end_the_await(
    task: Task, fake: FakeTransport, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> list[NodeResult]:
        return await task.submit("x", nodes="n[1-3]", on_done=lambda *_: 1 // 0)

    assert len(run(main)) == 3
    assert caplog.text.count("raised") == 3
    caplog.clear()


def test_an_interrupt_in_a_handler_leaves_the_loop(task: Task, fake: FakeTransport) -> None:
    def leave(worker: Worker, node: str, result: NodeResult) -> None:
        raise KeyboardInterrupt

    async def main() -> None:
        await task.submit("x", nodes="n1", on_done=leave)

    with pytest.raises(KeyboardInterrupt):
        run(main)
    assert task.submit("x", nodes="n2").wait(10)


# -- waiting is not owning -------------------------------------------------------------------------------------------


def test_a_timeout_only_stops_the_waiting(task: Task, fake: FakeTransport) -> None:
    async def main() -> None:
        worker = task.submit("x", nodes="n1,hang")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await worker
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(worker, 0.05)
        seen = []
        with pytest.raises(TimeoutError):  # noqa: PT012 (as people write it)
            async with asyncio.timeout(0.05):
                async for result in worker:
                    seen += [result.node]
        assert seen == ["n1"]
        assert worker.pending == NodeSet("hang")
        assert fake.ends == []

    run(main)
    assert task._mailbox.notify == task._mailbox.ring  # nothing of the loop stays in the task


def test_cancelling_what_awaits_only_stops_the_waiting(task: Task, fake: FakeTransport) -> None:
    async def main() -> None:
        worker = task.submit("x", nodes="hang")
        first, second = asyncio.ensure_future(worker), asyncio.ensure_future(worker)
        await sleep_until(lambda: sent(fake))
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert worker.pending == NodeSet("hang")
        act(fake, fake.sessions[0], Step("exit"), Step("end"))
        assert [result.rc for result in await second] == [0]  # who waits beside it goes on

    run(main)


def test_async_with_waits_on_leaving(task: Task, fake: FakeTransport) -> None:
    async def main() -> None:
        async with task.submit("x", nodes="n1,late") as worker:
            assert not worker.done()
        assert worker.closed
        assert len(worker.ok) == 2

    run(main)


@pytest.mark.parametrize("inside", [True, False], ids=["in the block", "while it waits on leaving"])
def test_async_with_aborts_when_a_timeout_leaves_it(task: Task, fake: FakeTransport, inside: bool) -> None:
    async def main() -> Worker:
        worker = task.submit("x", nodes="n1,hang")
        await sleep_until(lambda: sent(fake) == 2)
        with pytest.raises(TimeoutError):  # noqa: PT012 (as people write it)
            async with asyncio.timeout(0.1), worker:
                if inside:
                    await asyncio.sleep(60)
        assert worker.done()
        return worker

    worker = run(main)
    assert worker.ok == NodeSet("n1")
    assert worker.futures["hang"].cancelled()
    assert [end.stop.policy for end in fake.ends] == ["term"]  # a cancellation may be a Ctrl-C


def test_async_with_aborts_when_an_exception_leaves_it(task: Task, fake: FakeTransport) -> None:
    async def main() -> None:
        async with task.submit("x", nodes="hang") as worker:
            await sleep_until(lambda: sent(fake) == 1)
            raise LookupError(worker)

    with pytest.raises(LookupError) as caught:
        run(main)
    assert caught.value.args[0].futures["hang"].cancelled()
    assert [end.stop.policy for end in fake.ends] == ["kill"]


def test_a_coroutine_that_is_closed_aborts_without_waiting(task: Task, fake: FakeTransport) -> None:
    workers: list[Worker] = []

    async def hold() -> None:
        async with task.submit("x", nodes="hang") as worker:
            workers.append(worker)
            await worker

    async def main() -> None:
        coroutine = hold()
        coroutine.send(None)
        await sleep_until(lambda: sent(fake))
        coroutine.close()
        await workers[0]

    run(main)
    assert workers[0].futures["hang"].cancelled()


def test_a_task_group_that_fails_aborts_what_its_blocks_run(task: Task, fake: FakeTransport) -> None:
    workers: list[Worker] = []

    async def hold(node: str) -> None:
        async with task.submit("x", nodes=node) as worker:
            workers.append(worker)
            if node == "bad":
                (await worker)[0].check()

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            for node in ("hang", "bad"):
                group.create_task(hold(node))

    with pytest.raises(ExceptionGroup, match="unhandled"):
        run(main)
    assert {str(worker.nodes): worker.futures[str(worker.nodes)].cancelled() for worker in workers} == {
        "hang": True,
        "bad": False,
    }


def test_ctrl_c_under_asyncio_run_sends_no_kill(task: Task, fake: FakeTransport) -> None:
    workers: list[Worker] = []

    async def main() -> None:
        async with task.submit("x", nodes="hang") as worker:
            workers.append(worker)
            await sleep_until(lambda: sent(fake) == 1)
            signal.raise_signal(signal.SIGINT)
            await worker

    with pytest.raises(KeyboardInterrupt):
        run(main)
    assert workers[0].futures["hang"].cancelled()
    assert [end.stop.policy for end in fake.ends] == ["term"]


# -- futures of the standard library ---------------------------------------------------------------------------------


def test_wrapped_futures_are_awaited_as_any_other(task: Task, fake: FakeTransport) -> None:
    async def main() -> None:
        worker = task.submit("x", nodes="n1,bad,late,lost")
        assert (await asyncio.wrap_future(worker.futures["bad"])).rc == 7
        wrapped = {node: asyncio.wrap_future(future) for node, future in worker.futures.items()}
        async with asyncio.timeout(10):
            done, pending = await asyncio.wait(wrapped.values())
        assert (len(done), len(pending)) == (4, 0)
        with pytest.raises(ConnectionLost) as caught:
            await wrapped["lost"]
        assert caught.value.result is not None
        assert caught.value.result.stdout == "half"
        gathered = await asyncio.gather(*map(asyncio.wrap_future, worker), return_exceptions=True)
        assert [isinstance(one, NodeResult) for one in gathered].count(False) == 1

    run(main)


def test_cancelling_a_wrapped_future_ends_its_job(task: Task, fake: FakeTransport) -> None:
    # As the standard has it: a cancelled wrapper cancels what it wraps; shield() and await of the worker do not.
    async def main() -> None:
        worker = task.submit("x", nodes="h1,h2")
        await sleep_until(lambda: sent(fake) == 2)
        one, two = worker.futures.values()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await asyncio.shield(asyncio.wrap_future(one))
        assert not one.done()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await asyncio.wrap_future(two)
        await sleep_until(two.done)
        assert two.cancelled()
        assert isinstance(two.exception(), Aborted)
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wrap_future(two)
        assert not one.done()
        act(fake, fake.sessions[0], Step("exit"), Step("end"))
        await worker

    run(main)


# -- other threads, other loops --------------------------------------------------------------------------------------


def test_a_worker_of_another_threads_task(fake: FakeTransport) -> None:
    story = Recorder()
    own = Task()

    async def main() -> None:
        worker = own.submit("x", nodes="n[1-3],late", handler=story)
        assert [result.node async for result in worker][-1] == "late"
        assert len(await worker) == 4
        hanging = own.submit("x", nodes="hang")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(hanging, 0.1)
        assert not hanging.done()
        assert hanging._told == []
        async with hanging:
            hanging.abort()

    run(main)
    own.join()
    assert story.threads == {own.thread}
    assert story.names()[-1] == "close"


def test_a_worker_is_awaited_on_two_loops_at_once(task: Task, fake: FakeTransport) -> None:
    worker = task.submit("x", nodes="n[1-200],late")

    async def main() -> list[str]:
        return [result.node for result in await worker]

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        elsewhere = [pool.submit(lambda: asyncio.run(main())) for _ in range(2)]
        here = run(main)
        assert [one.result(10) for one in elsewhere] == [here, here]
    assert len(here) == 201


def test_a_loop_that_is_closed_meanwhile_hurts_nobody(task: Task, fake: FakeTransport) -> None:
    story = Recorder()
    worker = task.submit("x", nodes="n1,hang", handler=story)
    own = Task()
    other = own.submit("x", nodes="hang")
    loop = asyncio.new_event_loop()
    left = [loop.create_task(one._awaited()) for one in (worker, other)]
    loop.run_until_complete(asyncio.sleep(0.05))
    loop.close()
    wait_until(lambda: sent(fake) == 3)
    for session in fake.sessions:
        act(fake, session, Step("exit"), Step("end"))
    assert worker.wait(10)
    assert other.wait(10)
    assert story.names()[-1] == "close"
    for one in left:
        one._log_destroy_pending = False  # type: ignore[attr-defined]  # it never ends: its loop is closed

    async def main() -> list[NodeResult]:
        return await task.submit("x", nodes="n1,late")

    assert len(run(main)) == 2
    assert task._mailbox.notify == task._mailbox.ring


def test_two_loops_of_one_thread_take_turns(task: Task, fake: FakeTransport) -> None:
    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
    try:
        waiting = first.create_task(task.submit("x", nodes="hang")._awaited())
        first.run_until_complete(sleep_until(lambda: sent(fake)))
        assert len(second.run_until_complete(task.submit("x", nodes="n1,late")._awaited())) == 2
        act(fake, fake.sessions[0], Step("exit"), Step("end"))
        assert [result.node for result in first.run_until_complete(waiting)] == ["hang"]
    finally:
        first.close()
        second.close()
    assert task._mailbox.notify == task._mailbox.ring


def test_a_call_that_blocks_is_woken_beside_the_loop(task: Task, fake: FakeTransport) -> None:
    async def main() -> None:
        waiting = asyncio.ensure_future(task.submit("x", nodes="late"))
        await asyncio.sleep(0)
        assert task.submit("x", nodes="n1,late").wait(10)  # blocks the loop, and nothing else
        assert len(await waiting) == 1

    run(main)


# -- what cannot be --------------------------------------------------------------------------------------------------


def test_what_is_only_scheduled_is_refused(task: Task, fake: FakeTransport) -> None:
    async def main() -> None:
        worker = task.shell("x", nodes="n1")
        with pytest.raises(TaskError, match=r"submit\(\) in place of shell\(\)"):
            await worker
        with pytest.raises(TaskError, match="scheduled"):
            await anext(aiter(worker))
        with pytest.raises(TaskError, match="scheduled"):
            async with worker:
                pass
        assert worker.futures["n1"].cancelled()

    run(main)


def test_a_task_that_fails_tells_who_awaits(task: Task, fake: FakeTransport, caplog: pytest.LogCaptureFixture) -> None:
    def leave(future: Any) -> None:
        raise SystemExit(3)

    async def main() -> list[NodeResult]:
        worker = task.submit("x", nodes="late,hang")
        worker.futures["late"].add_done_callback(leave)
        return await worker

    results = run(main)
    assert {result.node: result.outcome for result in results} == {"late": Outcome.EXITED, "hang": Outcome.LOST}
    wait_until(lambda: task.failed)
    caplog.clear()


# -- real nodes ------------------------------------------------------------------------------------------------------


def test_a_timeout_ends_the_sessions_of_real_nodes(task: Task, sshd: Sshd) -> None:
    lines: list[str] = []

    async def main() -> Worker:
        worker = task.submit("echo up; sleep 60", nodes=sshd.nodes(3), **sshd.options())
        worker.on("read", lambda worker, node, sname, line: lines.append(node))
        with pytest.raises(TimeoutError):  # noqa: PT012 (as people write it)
            async with asyncio.timeout(None) as limit, worker:
                awaited = asyncio.ensure_future(worker)
                await sleep_until(lambda: len(lines) == 3)
                limit.reschedule(asyncio.get_running_loop().time())
                await asyncio.shield(awaited)
        await awaited
        return worker

    worker = run(main)
    results = list(worker.results())
    assert sorted(lines) == sorted(worker.nodes)
    assert {(result.outcome, result.remote_state) for result in results} == {(Outcome.ABORTED, "gone")}
