# SPDX-License-Identifier: Apache-2.0
"""The Python below: its switches, interpreters that are refused, and a paramiko that is missing, old or half there.

The rows H17, I06 and I07 of the fault matrix, in processes of their own. Runs in the thread of pytest.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ctask import NodeSet, Task, TaskError
from ctask.transports.ssh import _paramiko

ROOT = Path(__file__).resolve().parent.parent


def python(program: str, *switches: str, path: Path | None = None, **environment: str) -> tuple[int, str, str]:
    """Run a program; return its status, and what it wrote to standard output and standard error."""
    places = os.pathsep.join(str(place) for place in (path, ROOT) if place is not None)
    done = subprocess.run(
        [sys.executable, *switches, "-c", program],
        env={**os.environ, "PYTHONPATH": places, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=25,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


# -- H17: interpreters -------------------------------------------------------------------------------------------


def test_h17_without_a_gil_a_task_is_refused_and_node_sets_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: False, raising=False)
    with pytest.raises(TaskError, match=r"without its GIL.*-X gil=1 or PYTHON_GIL=1"):
        Task()
    assert len(NodeSet("n[1-3]")) == 3


@pytest.mark.parametrize("kind", ["isolated", "legacy"])
def test_h17_in_a_subinterpreter_a_task_is_refused_and_node_sets_are_not(kind: str) -> None:
    program = f"""
import os, sys
try:
    import _interpreters as interpreters
    made = interpreters.create({kind!r})
except ImportError:
    import _xxsubinterpreters as interpreters
    made = interpreters.create(isolated={kind == "isolated"})
failed = interpreters.run_string(made, '''
from ctask import NodeSet, TaskError, task_self
print(NodeSet("n2,n1"))
for _ in range(2):
    try:
        task_self()
    except TaskError as error:
        print(error, flush=True)
''')
print(failed, flush=True)
os._exit(0)  # what an early Python 3.12 does at the end of extension modules is its own matter
"""
    status, out, err = python(program)
    refusal = (
        "ctask runs in the main interpreter of a process only, and this is a subinterpreter: "
        "use a thread of the main one, or a process of its own"
    )
    assert (status, out.splitlines(), err) == (0, ["n[1-2]", refusal, refusal, "None"], "")


# -- I06: switches -----------------------------------------------------------------------------------------------

#: Outcomes of several kinds, on nodes and on this machine, waited for in several ways.
EVERYTHING = """
import asyncio
from ctask import *
from ctask.testing import EmbeddedCluster
task = task_self()
def names(worker):
    return [result.outcome.name for result in worker.results()]
async def waits():
    return [result.rc for result in await task.submit("exit 3", nodes="n2")]
with EmbeddedCluster("n[1-3]").use(task):
    worker = task.run("echo out; echo err >&2; exit 1", nodes="n[1-3]")
    print(task.max_retcode(), worker.node_buffer("n1").split())
    print(names(task.run("sleep 9", nodes="n1", timeout=0.1, stop_grace=0)))
    later = task.submit("sleep 9", nodes="n2")
    later.abort()
    print(names(later))
    print(names(task.run("true", nodes="n9", address="127.0.0.1", port=1)))
    print(task.run("echo here", key="local").node_buffer("local"))
    print(asyncio.run(waits()))
    try:
        task.run("true", nodes="n1", timeout=-1)
    except OptionError:
        print("refused")
"""


SAID = """\
1 [b'out', b'err']
['TIMEOUT']
['ABORTED']
['UNREACHED']
here
[3]
refused
"""


def test_i06_no_switch_of_python_changes_what_happens() -> None:
    assert python(EVERYTHING, "-O", "-W", "error", "-X", "dev", PYTHONASYNCIODEBUG="1") == (0, SAID, "")


# -- I07: paramiko -----------------------------------------------------------------------------------------------

ASKS = """
import sys
{before}
from ctask import *
task = task_self()
print(task.run("echo local", key="here").node_buffer("here"))
try:
    task.run("true", nodes="127.0.0.1", port=1)
except ImportError as error:
    print(error)
"""


def test_i07_without_paramiko_nodes_are_refused_with_what_to_do_and_this_machine_is_not() -> None:
    status, out, err = python(ASKS.format(before="sys.modules['paramiko'] = None"))
    assert (status, err) == (0, "")
    local, text = out.splitlines()
    assert local == "local"
    assert text.startswith("ctask reaches nodes by paramiko (5.1 or newer, below 6), which cannot be imported (")
    assert text.endswith("): pip install 'paramiko>=5.1,<6'")


@pytest.mark.parametrize("version", ["5.0.9", "6.0rc1"])
def test_i07_another_paramiko_is_refused_by_its_version(tmp_path: Path, version: str) -> None:
    (tmp_path / "paramiko").mkdir()
    (tmp_path / "paramiko" / "__init__.py").write_text(f"__version__ = {version!r}\n")
    text = (
        f"ctask needs paramiko 5.1 or newer, below 6, and this Python has {version} ({tmp_path / 'paramiko'}): "
        "pip install 'paramiko>=5.1,<6'"
    )
    assert python(ASKS.format(before=""), path=tmp_path) == (0, f"local\n{text}\n", "")
    command = "from ctask.cli import main; raise SystemExit(main(['-w', '127.0.0.1', 'true']))"
    assert python(command, path=tmp_path) == (2, "", f"ctask: {text}\n"), "no traceback"


def test_i07_the_versions_are_those_that_are_installed() -> None:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (needed,) = (text for text in dependencies if text.startswith("paramiko"))
    least, not_yet = re.findall(r"[\d.]+", needed)
    assert least == ".".join(map(str, _paramiko.LEAST))
    assert not_yet == ".".join(map(str, _paramiko.NOT_YET))
    assert needed in _paramiko._HELP


def test_i07_what_paramiko_can_do_without_ctask_can_too() -> None:
    absent = "".join(f"sys.modules[{name!r}] = None\n" for name in ("invoke", "gssapi", "sspi", "pyasn1", "yaml"))
    assert python("import sys\n" + absent + EVERYTHING) == (0, SAID, "")
