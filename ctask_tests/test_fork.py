# SPDX-License-Identifier: Apache-2.0
"""A program that forks: the child begins with no task, and the parent's runs are its own."""

from __future__ import annotations

import subprocess
import sys

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
