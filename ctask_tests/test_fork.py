# SPDX-License-Identifier: Apache-2.0
"""A program that forks: the child begins with no task, and the parent's runs are its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ctask_tests.child import Child
from ctask_tests.fix_sshd import Sshd

#: 3.12 and later warn of any fork beside threads
WARNINGS = ("-W", "error", "-W", "ignore::DeprecationWarning")

PROGRAM = """
import os
from ctask import task_self

worker = task_self().submit("sleep 0.5; echo parent", key="slow")
child = os.fork()
if child == 0:
    task = task_self()
    assert task is not worker.task
    mine = task.run("echo child", key="k")
    os.write(1, bytes(mine.result("k").output))
    os._exit(mine.exit_code())
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
worker.wait()
os.write(1, bytes(worker.result("slow").output))
assert worker.task is task_self()
"""


def test_h11_a_forked_child_runs_its_own_tasks_and_the_parents_go_on() -> None:
    told = subprocess.run(
        [sys.executable, *WARNINGS, "-c", PROGRAM], capture_output=True, text=True, timeout=20, check=False
    )
    assert (told.returncode, told.stdout, told.stderr) == (0, "child\nparent\n", "")


def test_a_child_that_leaves_by_the_interpreters_end_does_not_hang() -> None:
    program = PROGRAM.replace("os._exit(mine.exit_code())", "raise SystemExit(0)")
    told = subprocess.run(
        [sys.executable, *WARNINGS, "-c", program], capture_output=True, text=True, timeout=20, check=False
    )
    assert (told.returncode, told.stdout, told.stderr) == (0, "child\nparent\n", "")


#: The parent runs on a real node while it forks; what the child may and may not do.
DURING = r"""
import multiprocessing
def told(process):
    process.join(15)
    assert process.exitcode == 0, process.exitcode
def child_work(node, options):
    mine = task_self()
    assert mine is not task
    refused = (worker.wait, lambda: worker.result(node), lambda: task.submit("true", nodes=node), task.join)
    for call in refused:
        try:
            call()
        except TaskError as error:
            assert "fork" in str(error), error
        else:
            raise AssertionError("the parent's task worked in the child")
    assert mine.run("echo child", nodes=node, **options).result(node).stdout == b"child\n"
    local = mine.run("echo here", key="k")
    assert local.result("k").output == b"here\n"

nodes, options = GIVEN["nodes"], GIVEN["options"]
for name, value in options.items():
    task.set_info(name, value)
heard = []
def read(worker, node, sname, msg):
    heard.append(str(msg))
worker = task.submit("echo one; read line; echo $line", nodes=nodes, stdin=True, on_read=read)
wait_until(lambda: all(job.capture and b"one" in job.capture.output() for job in worker.jobs))
how = GIVEN["how"]
if how == "multiprocessing":
    told_of = multiprocessing.get_context("fork").Process(target=child_work, args=(nodes[0], options))
    told_of.start()
    told(told_of)
else:
    child = os.fork()
    if child == 0:
        child_work(nodes[0], options)
        if how == "_exit":
            os._exit(0)
        raise SystemExit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, status
worker.write("two\n")
assert worker.wait(10)
assert all(result.ok and result.stdout == b"one\ntwo\n" for result in worker.results()), list(worker.results())
assert sorted(heard) == ["one"] * len(nodes) + ["two"] * len(nodes), heard
assert task_self() is task
say("intact")
"""


@pytest.mark.parametrize("how", ["exit", "_exit", "multiprocessing"])
def test_h11_a_fork_during_a_run_leaves_it_intact(sshd: Sshd, how: str) -> None:
    program = "import warnings; warnings.simplefilter('ignore', DeprecationWarning)\n" + DURING
    with Child(program, how=how, nodes=sshd.nodes(3), options=dict(sshd.options())) as child:
        assert child.line() == "intact", child.errors()
        assert child.end() == 0, child.errors()
        assert child.errors() == ""
