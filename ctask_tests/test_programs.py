# SPDX-License-Identifier: Apache-2.0
"""The programs that ClusterShell's own page shows, as they stand, on SSH nodes of those names."""

from __future__ import annotations

import platform
import re
import runpy
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ctask import EventHandler, NodeSet, Outcome, Output, Task, task_self
from ctask.testing import EmbeddedCluster
from ctask_tests.fake_nodes import Recorder

GREEN = "green[36-39,133]"
NODES = ["green36", "green37", "green38", "green39", "green133"]
RELEASE = platform.release()
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def cluster() -> Iterator[EmbeddedCluster]:
    with EmbeddedCluster(GREEN) as cluster:
        yield cluster


@pytest.fixture
def task(cluster: EmbeddedCluster) -> Task:
    task = task_self()
    cluster.use(task)
    return task


def processor() -> str:
    return subprocess.run(["/bin/uname", "-p"], capture_output=True, check=True, text=True).stdout.strip()


def test_run_then_iter_buffers(task: Task, capsys: pytest.CaptureFixture[str]) -> None:
    task.run("/bin/uname -r", nodes="green[36-39,133]")
    for buf, nodes in task.iter_buffers():
        print(nodes, buf)
    assert capsys.readouterr().out == f"{GREEN} {RELEASE}\n"
    for _, nodes in task.iter_buffers():
        print(NodeSet.fromlist(nodes))  # as the ancestor's programs fold them
    assert capsys.readouterr().out == f"{GREEN}\n"


def test_two_commands_and_one_resume(task: Task, capsys: pytest.CaptureFixture[str]) -> None:
    task.shell("/bin/uname -r", nodes="green[36-39,133]")
    task.shell("/bin/uname -p", nodes="green[36-39,133]")
    assert list(task.iter_buffers()) == []  # nothing runs before resume()
    task.resume()
    for buf, nodes in task.iter_buffers():
        print(nodes, buf)
    assert capsys.readouterr().out == f"{GREEN} {RELEASE}\n{GREEN} {processor()}\n"


def test_a_handler_of_the_short_signature(task: Task, capsys: pytest.CaptureFixture[str]) -> None:
    class MyHandler(EventHandler):
        def ev_read(self, worker):  # type: ignore[no-untyped-def, override]
            node, buf = worker.last_read()
            if buf.find(".el5") < 0:
                print("%s: %s" % (node, buf))  # noqa: UP031

    task.shell("/bin/uname -r", nodes="green[36-39,133]", handler=MyHandler())
    task.resume()
    lines = capsys.readouterr().out.splitlines()
    assert sorted(lines) == sorted(f"{node}: {RELEASE}" for node in NODES)


def test_text_is_found_where_it_is(task: Task, capsys: pytest.CaptureFixture[str]) -> None:
    class MyHandler(EventHandler):
        def ev_read(self, worker, node, sname, msg):  # type: ignore[no-untyped-def]
            if msg.find(".el5") < 0:
                print("%s: %s" % (node, msg))  # noqa: UP031

    task.run("echo 2.6.18-8.el5; echo 5.14.0", nodes="green[36-39,133]", handler=MyHandler())
    lines = capsys.readouterr().out.splitlines()
    assert sorted(lines) == sorted(f"{node}: 5.14.0" for node in NODES)


def check_story(story: Recorder, task: Task) -> None:
    """Every event in the promised order, with what it promises to bring, in the task's own thread."""
    assert story.threads == {task.thread}
    assert story.names()[0] == "start"
    assert story.names()[-1] == "close"
    assert story.names().count("start") == story.names().count("close") == 1
    for node in NODES:
        assert story.names(node) == ["pickup", "read", "hup", "done"]
    assert {node for _, node, _ in story.events} == {None, *NODES}
    for sname, msg in story.given("read"):
        assert sname == "stdout"
        assert isinstance(msg, Output)
        assert msg == RELEASE
        assert msg == RELEASE.encode()
    assert story.given("hup") == [0] * len(NODES)
    assert [result.outcome for result in story.given("done")] == [Outcome.EXITED] * len(NODES)
    assert [result.stdout for result in story.given("done")] == [f"{RELEASE}\n"] * len(NODES)
    assert story.given("close") == [False]


def test_a_handler_of_the_full_signatures(task: Task) -> None:
    story = Recorder()
    task.shell("/bin/uname -r", nodes="green[36-39,133]", handler=story)
    assert story.events == []
    task.resume()
    check_story(story, task)


def test_functions_in_place_of_the_object(task: Task) -> None:
    story = Recorder()
    worker = task.shell(
        "/bin/uname -r", nodes="green[36-39,133]", on_start=story.ev_start, on_read=story.ev_read
    )
    worker.on("pickup", story.ev_pickup).on("hup", story.ev_hup)
    worker.on("done", story.ev_done).on("close", story.ev_close)
    task.resume()
    check_story(story, task)


def test_several_of_an_event_are_called_in_the_order_of_registration(task: Task) -> None:
    heard: list[str] = []

    class Mine(EventHandler):
        def ev_hup(self, worker: Any, node: str, rc: int) -> None:
            heard.append("object")

    worker = task.shell("true", nodes="green36", handler=Mine(), on_hup=lambda *_: heard.append("argument"))
    worker.on("hup", lambda worker, node, rc: heard.append("on"))
    task.resume()
    assert heard == ["object", "argument", "on"]


@pytest.mark.parametrize("name", ["awaiting", "executor"])
def test_the_examples_with_futures_print_a_line_per_node(
    task: Task, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    runpy.run_path(str(EXAMPLES / f"{name}.py"))
    printed = capsys.readouterr().out.splitlines()
    said = [f"{node}: {RELEASE}" for node in NODES]
    if name == "awaiting":
        assert sorted(printed[:-1]) == sorted(said)
        assert printed[-1] == "4 4"
    else:
        assert printed == [*said, processor()]


@pytest.mark.parametrize("name", ["uname_gather", "uname_two", "events_short", "events_full", "events_callbacks"])
def test_the_examples_are_these_programs(task: Task, capsys: pytest.CaptureFixture[str], name: str) -> None:
    runpy.run_path(str(EXAMPLES / f"{name}.py"))
    printed = capsys.readouterr().out.splitlines()
    said = sorted(f"{node}: {RELEASE}" for node in NODES)
    expected = {
        "uname_gather": [f"{GREEN} {RELEASE}"],
        "uname_two": [f"{GREEN} {RELEASE}", f"{GREEN} {processor()}"],
    }
    if name in expected:
        assert printed == expected[name]
    else:
        assert sorted(printed[: len(NODES)]) == said


README = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = [block for block in re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL) if "demo[" in block]


@pytest.mark.slow
def test_the_programs_of_the_readme_run_as_they_stand(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(BLOCKS) >= 6, "these are the programs that can be typed in `make shell`"
    with EmbeddedCluster("demo[1-16]") as cluster:
        cluster.use(task_self())
        for block in BLOCKS:
            exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})
            assert capsys.readouterr().out, block
