# SPDX-License-Identifier: Apache-2.0
"""The public API at its edges: older handlers, workers of no nodes, output as text, disconnect, map of an executor.

On fake nodes and on this machine. Runs in the thread of pytest, which owns the task.
"""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import ctask
from ctask import ClusterExecutor, EventHandler, Output, Retry, Task, Worker, task_self
from ctask.nodes import groups as node_groups
from ctask.nodes import set_std_group_resolver
from ctask.testing import FakeTransport, Step
from ctask_tests.fake_nodes import HANGS, Recorder, nodes, says
from ctask_tests.fix_leaks import wait_until


@pytest.fixture
def fake() -> Iterator[FakeTransport]:
    with FakeTransport(nodes(says(b"line\n"), hang=HANGS, sick=says(b"line\n", rc=2))) as transport:
        yield transport


@pytest.fixture
def task(fake: FakeTransport) -> Task:
    return task_self()


# -- handlers of the older signature -----------------------------------------------------------------------------


class Older(EventHandler):
    """What each event finds when it asks the worker, as handlers of the older signature do."""

    def __init__(self) -> None:
        self.found: list[tuple[str, Any, bytes, int | None]] = []

    def _note(self, event: str, worker: Worker) -> None:
        self.found.append((event, worker.current_node, worker.current_msg, worker.current_rc))

    def ev_pickup(self, worker: Worker) -> None:  # type: ignore[override]
        self._note("pickup", worker)

    def ev_read(self, worker: Worker) -> None:  # type: ignore[override]
        self._note("read", worker)

    def ev_hup(self, worker: Worker) -> None:  # type: ignore[override]
        self._note("hup", worker)

    def ev_done(self, worker: Worker, node: str, result: Any) -> None:
        self._note("done", worker)

    def ev_retry(self, worker: Worker, node: str, attempt: int, error: Exception, delay: float) -> None:
        self._note("retry", worker)


def test_current_node_is_that_of_the_event(task: Task) -> None:
    handler = Older()
    task.set_info("fanout", 1)
    again = Retry(2, wait=0, exit_codes={2}, idempotent=True)
    task.run("x", nodes="n1,sick", handler=handler, retry=again)
    assert handler.found == [
        ("pickup", "n1", b"", None),
        ("read", "n1", b"line", None),
        ("hup", "n1", b"line", 0),
        ("done", "n1", b"line", 0),
        ("pickup", "sick", b"", None),
        ("read", "sick", b"line", None),
        ("retry", "sick", b"line", None),
        ("read", "sick", b"line", None),
        ("hup", "sick", b"line", 2),
        ("done", "sick", b"line", 2),
    ]


def test_current_node_of_nodes_that_print_nothing_and_are_cut_off(fake: FakeTransport) -> None:
    handler, task = Older(), task_self()
    with FakeTransport(nodes([Step("running"), Step("exit")], hang=HANGS)):
        task.run("x", nodes="n[1-5],hang", handler=handler, timeout=0.05, stop="leave")
    found = [(event, node) for event, node, *_ in handler.found]
    assert sorted(node for event, node in found if event == "pickup") == ["hang", *(f"n{i}" for i in range(1, 6))]
    assert sorted(node for event, node in found if event == "done") == ["hang", *(f"n{i}" for i in range(1, 6))]
    assert [rc for event, node, _, rc in handler.found if node == "hang"] == [None, None]


# -- a worker of no nodes ----------------------------------------------------------------------------------------


def by_run(task: Task, options: dict[str, Any]) -> Worker:
    return task.run("x", **options)


def by_resume(task: Task, options: dict[str, Any]) -> Worker:
    worker = task.shell("x", **options)
    assert options["handler"].names() == []
    task.resume()
    return worker


def by_wait(task: Task, options: dict[str, Any]) -> Worker:
    worker = task.submit("x", **options)
    assert worker.wait()
    return worker


def by_join(task: Task, options: dict[str, Any]) -> Worker:
    worker = task.submit("x", **options)
    assert task.join()
    return worker


def by_block(task: Task, options: dict[str, Any]) -> Worker:
    with task.submit("x", **options) as worker:
        pass
    return worker


def by_await(task: Task, options: dict[str, Any]) -> Worker:
    async def main() -> Worker:
        worker = task.submit("x", **options)
        assert await worker == []
        return worker

    return asyncio.run(main())


def by_handler(task: Task, options: dict[str, Any]) -> Worker:
    made: list[Worker] = []
    task.run("x", nodes="n1", on_done=lambda *_: made.append(task.shell("x", **options)))
    return made[0]


WAYS = [by_run, by_resume, by_wait, by_join, by_block, by_await, by_handler]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_worker_of_no_nodes_starts_and_closes(
    task: Task, fake: FakeTransport, way: Callable[[Task, dict[str, Any]], Worker]
) -> None:
    heard = Recorder()
    worker = way(task, {"nodes": "", "allow_empty": True, "handler": heard})
    assert heard.events == [("start", None, None), ("close", None, False)]
    assert worker.closed
    assert worker.wait(0)
    assert (worker.exit_code(), list(worker.results()), worker.counts()) == (0, [], "no nodes")
    assert not ctask.wait(worker).not_done
    assert list(ctask.as_completed(worker)) == []
    assert task.run("x", nodes="n1", check=True).exit_code() == 0
    assert heard.names() == ["start", "close"], "once"


def test_a_worker_of_no_nodes_in_a_task_with_its_own_thread(fake: FakeTransport) -> None:
    task, heard = Task(), Recorder()
    worker = task.shell("x", nodes=[], allow_empty=True, handler=heard)
    task.resume()
    assert task.join(5)
    assert worker.closed
    assert heard.names() == ["start", "close"]
    assert heard.threads == {task.thread}


def test_a_worker_of_no_nodes_that_is_only_scheduled_or_taken_back(task: Task) -> None:
    heard = Recorder()
    worker = task.shell("x", nodes="", allow_empty=True, handler=heard)
    assert worker.wait()  # there is nothing to wait for
    task.abort()
    task.resume()
    assert heard.names() == ["start", "close"]
    assert task.join()


def test_without_handlers_it_holds_nobody_up(task: Task) -> None:
    worker = task.run("x", nodes="", allow_empty=True, check=True)
    assert worker.closed
    assert task.submit("x", nodes="", allow_empty=True).wait(5)
    assert task.join(5)


# -- output as text ----------------------------------------------------------------------------------------------


def test_output_equals_text_and_is_found_by_its_bytes() -> None:
    output = Output("größe".encode())
    assert output == "größe"
    assert output == "größe".encode()
    assert hash(output) == hash("größe".encode())
    found: dict[Any, str] = {output: "by bytes"}
    assert found[Output("größe".encode())] == found["größe".encode()] == "by bytes"
    assert "größe" not in found, "no hash is that of both text and bytes: .text is the key for text"
    assert {output.text: 1}["größe"] == 1


def test_output_takes_text_wherever_bytes_take_bytes() -> None:
    output = Output("  key = größe = 5\n".encode())
    assert (output.rfind("="), output.rindex("="), output.find("größe")) == (16, 16, 8)
    assert output.partition("=")[2] == " größe = 5\n"
    assert output.rpartition("=")[0] == "  key = größe "
    assert output.strip() == "key = größe = 5"
    assert output.lstrip(" ") == "key = größe = 5\n"
    assert output.rstrip("\n 5") == "  key = größe ="
    assert output.removeprefix("  k") == "ey = größe = 5\n"
    assert output.removesuffix("5\n") == "  key = größe = "
    assert [str(part) for part in output.rsplit("=", 1)] == ["  key = größe ", " 5\n"]
    for part in (output.strip(), *output.partition("="), *output.rsplit()):
        assert isinstance(part, Output)
    assert Output(b"\xff") == "\udcff"
    assert Output(b"\xff") != "\ud800"


# -- disconnect --------------------------------------------------------------------------------------------------


def test_disconnect_is_asked_of_the_transport_that_stands(task: Task, fake: FakeTransport) -> None:
    for count, which in enumerate(["n1", None, "n2"]):
        task.run("x", nodes="n[1-2]")
        before = {session.connection for session in fake.sessions}
        task.disconnect(which)
        task.run("x", nodes="n[1-2]")
        fresh = {session.connection.target.address for session in fake.sessions if session.connection not in before}
        assert fresh == [{"n1"}, {"n1", "n2"}, {"n2"}][count]


def test_disconnect_lets_what_runs_go_on(task: Task, fake: FakeTransport) -> None:
    worker = task.submit("x", nodes="hang")
    wait_until(lambda: bool(fake.sessions) and fake.sessions[0].sent)
    task.disconnect("hang")
    assert not worker.done()
    worker.abort()
    worker.wait()


def test_disconnect_loads_nothing_and_closes_nothing_where_nothing_was_used() -> None:
    program = (
        "import sys, ctask; task = ctask.task_self(); task.disconnect(); task.disconnect('n1');"
        "task.run('true'); task.node_options('n2', transport='local'); task.disconnect('n2'); task.disconnect();"
        "print([name for name in ('paramiko', 'ctask.transports.ssh') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


# -- map of an executor ------------------------------------------------------------------------------------------


def test_map_reads_a_node_set_once(fake: FakeTransport) -> None:
    answers = iter([["n1", "n2"], ["n3"], ["n4"]])

    class Source(node_groups.GroupSource):
        def resolv_map(self, group: str) -> list[str]:
            return next(answers)

    set_std_group_resolver(node_groups.GroupResolver(Source("moving")))
    try:
        with ClusterExecutor() as executor:
            assert [result.node for result in executor.map("x", "@any")] == ["n1", "n2"]
            assert [result.node for result in executor.map("x", ["n9", "@any"])] == ["n9", "n3"]
            names = (name for name in ("n3", "n1", ctask.NodeSet("n[5-6]"), "n1"))
            assert [result.node for result in executor.map("x", names)] == ["n3", "n1", "n5", "n6", "n1"]
            with pytest.raises(ctask.UsageError, match="node set or names"):
                executor.map("x", 5)  # type: ignore[arg-type]
    finally:
        set_std_group_resolver(None)


@pytest.mark.parametrize("how", ["dropped", "closed", "in a cycle"])
def test_a_map_that_nobody_asks_is_withdrawn_when_it_is_dropped(task: Task, fake: FakeTransport, how: str) -> None:
    task.set_info("fanout", 1)
    with ClusterExecutor(task) as executor:
        results: Any = executor.map("x", "hang,n[1-3]")
        wait_until(lambda: len(fake.sessions) == 1)
        if how == "closed":
            results.close()
        elif how == "in a cycle":
            cycle: list[Any] = [results]
            cycle.append(cycle)
            del cycle
        del results
        gc.collect()
        worker = task.unfinished()[0]
        wait_until(lambda: sum(future.done() for future in worker) == 3)
        assert [future.node for future in worker if not future.done()] == ["hang"]
        worker.abort()
    assert len(fake.sessions) == 1


def test_a_map_that_is_used_up_withdraws_nothing(task: Task) -> None:
    threads = threading.active_count()
    with ClusterExecutor(task) as executor:
        assert [result.rc for result in executor.map("x", "n[1-3]")] == [0, 0, 0]
    assert threading.active_count() <= threads + 1
