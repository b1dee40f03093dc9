# SPDX-License-Identifier: Apache-2.0
"""The house's own rules: who may import whom, what `import ctask` costs, how long a file may be.

The table below is the list of rooms. A new module has to be named in it: whoever adds one says on which
floor it stands. Imports inside functions count like any other; only those under `if TYPE_CHECKING:` are
exempt.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ctask import logs

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "ctask"

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
#: Files that are longer, until their rooms are divided.
LIMITS = {
    "ctask/transports/ssh/channel.py": 545,
    "ctask/transports/local/processes.py": 520,
    "ctask/transports/ssh/ending.py": 620,
    "ctask/transports/ssh/transport.py": 610,
    "ctask/job.py": 575,
    "ctask/options.py": 520,
    "ctask/task.py": 675,
    "ctask/worker.py": 640,
}

#: The public face, `ctask/__init__.py`.
FACE = "ctask"

#: Room → floor. A room is a module or a folder right under ctask/; each transport is a room of its own.
FLOORS = {
    "children": 0,
    "errors": 0,
    "logs": 0,
    "numeric": 0,
    "nodes": 0,
    "options": 1,
    "events": 1,
    "result": 1,
    "states": 1,
    "buffers": 1,
    "interpreter": 1,
    "handler": 1,
    "retry": 1,
    "command": 1,
    "standstill": 0,
    "threads": 0,
    "failures": 2,
    "plan": 2,
    "gate": 1,
    "delivery": 2,
    "mailbox": 2,
    "dispatcher": 2,
    "aio": 3,
    "transports": 3,
    "transports.base": 3,
    "transports.watcher": 3,
    "transports.local": 3,
    "transports.openssh": 3,
    "transports.ssh": 3,
    "runtime": 4,
    "feed": 4,
    "intake": 4,
    "attempt": 4,
    "tries": 4,
    "making": 4,
    "ending": 4,
    "job": 4,
    "transfer": 4,
    "engine": 5,
    "future": 5,
    "gather": 5,
    "worker": 5,
    "ownthread": 5,
    "roster": 6,
    "submission": 6,
    "task": 6,
    "executor": 7,
    "closing": 7,
    FACE: 7,
    "display": 7,
    "compat": 7,
    "testing": 7,
    "cli": 8,
    "__main__": 9,
}

RECORDS = {"errors", "nodes", "options", "events", "result", "states"}

#: What users may import: the face, and the names that they meet in signatures.
PUBLIC = RECORDS | {FACE, "buffers", "failures", "handler", "retry", "future", "worker", "task"}

#: Rooms that may know less than every floor below them (and their own).
ONLY = {
    "children": set[str](),
    "errors": set[str](),
    "nodes": {"errors", "children", "numeric"},
    "buffers": {"errors"},
    "handler": RECORDS | {"buffers"},
    "numeric": {"errors"},
    "retry": {"errors", "numeric", "states"},
    "command": {"errors", "options"},
    "failures": RECORDS,
    "plan": RECORDS,
    "delivery": RECORDS | {"buffers", "handler"},
    "mailbox": RECORDS | {"buffers", "delivery", "gate"},
    "aio": {"mailbox"},
    "job": {room for room, floor in FLOORS.items() if floor <= 2}
    | {"transports.base", "runtime", "feed", "attempt", "ending", "intake", "tries"},
    "transfer": {room for room, floor in FLOORS.items() if floor <= 2} | {"transports.base", "job"},
    "compat": PUBLIC,
    "testing": PUBLIC | {"closing", "transports", "transports.base"},
    "cli": PUBLIC | {"children", "display", "testing"},
}

#: Who alone may import a third-party package.
OWNERS = {
    "paramiko": {"transports.ssh", "testing"},
    "tenacity": {"retry"},
    "yaml": {"nodes"},
}


@dataclass(frozen=True)
class Import:
    """One import as it is written: `module` imports `target`, at `line`."""

    module: str
    target: str
    line: int
    typing_only: bool
    at_top: bool

    def __str__(self) -> str:
        return f"{self.module.replace('.', '/')} line {self.line} imports {self.target}"


def module_name(path: Path) -> str:
    """`ctask/nodes/__init__.py` → `ctask.nodes`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def source_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def room_of(module: str) -> str:
    """Return the room of one of our modules: the longest name in the table that it is, or lies in."""
    name = module.removeprefix("ctask.")
    while name not in FLOORS and "." in name:
        name = name.rpartition(".")[0]
    return name


def is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def walk(
    node: ast.AST, *, typing_only: bool = False, at_top: bool = True
) -> Iterator[tuple[ast.AST, bool, bool]]:
    """Yield all below `node` with: is it for type checkers only, does it run when the module is loaded."""
    for child in ast.iter_child_nodes(node):
        inside = at_top and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield child, typing_only, at_top
        if isinstance(child, ast.If) and is_type_checking(child.test):
            for part in child.body:
                yield part, True, inside
                yield from walk(part, typing_only=True, at_top=inside)
            for part in child.orelse:
                yield part, typing_only, inside
                yield from walk(part, typing_only=typing_only, at_top=inside)
        else:
            yield from walk(child, typing_only=typing_only, at_top=inside)


def targets(node: ast.AST, package: str) -> Iterator[str]:
    """Yield the modules that a statement imports; `from ctask import errors` is `ctask.errors`."""
    match node:
        case ast.Import(names=names):
            yield from (alias.name for alias in names)
        case ast.ImportFrom(module=module, names=names, level=level):
            base = module or ""
            if level:
                above = package.split(".")[: len(package.split(".")) - level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in names:
                submodule = f"{base}.{alias.name}"
                yield submodule if base.startswith("ctask") and is_module(submodule) else base
        case ast.Call(
            func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
            args=[ast.Constant(value=str(name)), *_],
        ):
            yield name


def imports_of(source: str, module: str, *, is_package: bool) -> Iterator[Import]:
    package = module if is_package else module.rpartition(".")[0]
    for node, typing_only, at_top in walk(ast.parse(source)):
        for target in dict.fromkeys(targets(node, package)):
            line = getattr(node, "lineno", 0)
            yield Import(module, target, line, typing_only=typing_only, at_top=at_top)


@cache
def all_imports() -> tuple[Import, ...]:
    return tuple(
        found
        for path in source_files()
        for found in imports_of(
            path.read_text(encoding="utf-8"), module_name(path), is_package=path.name == "__init__.py"
        )
    )


def is_ours(name: str) -> bool:
    return name == "ctask" or name.startswith("ctask.")


def breach(found: Import) -> str | None:
    """Say what is wrong with an import of ours between two rooms, or None."""
    above, below = room_of(found.module), room_of(found.target)
    if above == below:
        return None
    if FLOORS[below] > FLOORS[above]:
        return f"{found}: floor {FLOORS[above]} may not know floor {FLOORS[below]}"
    if above in ONLY and below not in ONLY[above]:
        return f"{found}: {above} may know only {', '.join(sorted(ONLY[above])) or 'nothing'}"
    return None


def cycle(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_every_module_stands_in_the_table_of_rooms() -> None:
    homeless = [str(path) for path in source_files() if room_of(module_name(path)) not in FLOORS]
    assert not homeless, "name these in FLOORS above, on the lowest floor that they can do with"


def test_imports_go_from_a_higher_room_to_a_lower_one() -> None:
    between = [found for found in all_imports() if is_ours(found.target) and not found.typing_only]
    assert between, "no imports were found: the check looks in the wrong place"
    assert [text for found in between if (text := breach(found))] == []


def test_no_two_rooms_import_each_other() -> None:
    graph: dict[str, set[str]] = {}
    for found in all_imports():
        above, below = room_of(found.module), room_of(found.target)
        if is_ours(found.target) and not found.typing_only and above != below:
            graph.setdefault(above, set()).add(below)
    assert cycle(graph) == []


def test_no_two_modules_import_each_other_when_loaded() -> None:
    graph: dict[str, set[str]] = {}
    for found in all_imports():
        if is_ours(found.target) and found.at_top and not found.typing_only and found.module != found.target:
            graph.setdefault(found.module, set()).add(found.target)
    assert cycle(graph) == []


@pytest.mark.parametrize("package", OWNERS)
def test_third_party_packages_stay_in_their_room(package: str) -> None:
    # Here TYPE_CHECKING is no excuse: a room whose types are paramiko's knows paramiko.
    strangers = [
        str(found)
        for found in all_imports()
        if found.target.partition(".")[0] == package and room_of(found.module) not in OWNERS[package]
    ]
    assert strangers == []


def test_import_ctask_is_light() -> None:
    heavy = ("paramiko", "cryptography", "tenacity", "asyncio", "yaml")
    program = f"import sys, ctask; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=20, check=False
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    long = [
        f"{node.name}: {length} lines"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]
    assert long == []
    assert len(source.splitlines()) <= LIMITS.get(str(path.relative_to(ROOT)), MAX_FILE_LINES)


def test_every_logger_is_guarded() -> None:
    """What a program's log handler raises must not break what is being done in our threads."""
    named = {
        node.args[0].value if isinstance(node.args[0], ast.Constant) else ast.unparse(node)
        for path in source_files()
        if path.name != "logs.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("getLogger")
    }
    assert named == set(logs.NAMES), "ctask/logs.py names every logger of the package"


def test_every_source_file_names_its_license() -> None:
    folders = ("ctask", "ctask_tests", "benchmarks", "examples")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    naked = [
        str(path.relative_to(ROOT))
        for path in files
        if "# SPDX-License-Identifier: Apache-2.0" not in path.read_text(encoding="utf-8").splitlines()[:2]
    ]
    assert naked == []


def test_the_table_of_faults_names_tests_that_there_are() -> None:
    table = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [A-I]\d\d \|.*$", table, re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`(test_\w+\.py)::(test_\w+\*?)`", row)]
    assert len(rows) > 60
    assert [row for row in rows if "`test_" not in row] == []
    for file, name in named:
        source = (ROOT / "ctask_tests" / file).read_text(encoding="utf-8")
        tests = re.findall(r"^ *def (test_\w+)", source, re.MULTILINE)
        assert any(fnmatchcase(test, name) for test in tests), f"{file}::{name}"


def test_every_test_of_a_fault_is_in_the_table() -> None:
    table = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([A-I]\d\d) \|(.*)$", table, re.MULTILINE))
    for path in (ROOT / "ctask_tests").glob("test_*.py"):
        source = path.read_text(encoding="utf-8")
        for test, name in re.findall(r"^ *def (test_([a-i]\d\d)_\w+)", source, re.MULTILINE):
            if name[0] in "cg":
                continue  # these are not in the table yet
            named = re.findall(rf"`{path.name}::(test_\w+\*?)`", rows.get(name.upper(), ""))
            assert any(fnmatchcase(test, one) for one in named), f"{path.name}::{test}: not in row {name.upper()}"


SAMPLES = [
    ("from ctask.task import Task", "ctask.plan", False, "ctask.task"),
    ("def f():\n    import ctask.task", "ctask.plan", False, "ctask.task"),
    ("from .. import errors", "ctask.nodes.sets", False, "ctask.errors"),
    ("from .sets import NodeSet", "ctask.nodes", True, "ctask.nodes.sets"),
    ("from . import plan", "ctask.dispatcher", False, "ctask"),
    ("import importlib\nimportlib.import_module('ctask.task')", "ctask.plan", False, "ctask.task"),
]


@pytest.mark.parametrize(("source", "module", "is_package", "expected"), SAMPLES)
def test_the_check_sees_every_form_of_import(
    monkeypatch: pytest.MonkeyPatch, source: str, module: str, is_package: bool, expected: str
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "is_module", lambda name: name == "ctask.errors")
    seen = [found.target for found in imports_of(source, module, is_package=is_package)]
    assert seen[-1] == expected


def test_the_check_exempts_type_checking_and_nothing_beside_it() -> None:
    source = (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from ctask.task import Task\nelse:\n    import ctask.worker\n"
    )
    seen = {found.target: found.typing_only for found in imports_of(source, "ctask.plan", is_package=False)}
    assert seen == {"typing": False, "ctask.task": True, "ctask.worker": False}


def test_the_check_refuses_what_the_design_refuses() -> None:
    def says(module: str, target: str) -> str | None:
        return breach(Import(module, target, 1, typing_only=False, at_top=True))

    assert says("ctask.plan", "ctask.task")
    assert says("ctask.job", "ctask.transports.ssh.pool")
    assert says("ctask.nodes.sets", "ctask.options")
    assert says("ctask.transports.ssh.channel", "ctask.job")
    assert says("ctask.worker", "ctask")
    assert says("ctask.cli.run", "ctask.dispatcher")
    assert says("ctask.task", "ctask.transports.ssh.pool") is None
    assert says("ctask.cli.run", "ctask") is None
    assert says("ctask.job", "ctask.transports.base") is None
