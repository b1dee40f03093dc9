# SPDX-License-Identifier: Apache-2.0
"""The examples of README.md and docs/ are typed: Python into the prompt of `make shell`, commands into bash.

A fence's word says what it is: `python` and `sh` are typed, `ini` and `yaml` are read as groups, and `text` is what
cannot be typed by itself.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from ctask.nodes import NodeSet
from ctask.nodes.groups import GroupResolverConfig

pytestmark = pytest.mark.timeout(120)

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / name for name in ("README.md", "SECURITY.md", "CONTRIBUTING.md", "benchmarks/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))

WORDS = {"python", "sh", "ini", "yaml", "text"}

#: The command line, on an embedded cluster; it leaves the words that it was given in a file.
CTASK = """#!{python}
import json, os, shutil, sys
from pathlib import Path
from ctask import task_self
from ctask.cli import main
from ctask.testing import EmbeddedCluster

Path(os.environ["WORDS"]).write_text(json.dumps(sys.argv[1:]))
if sys.argv[1:2] == ["nodes"]:
    sys.exit(main())
with EmbeddedCluster("n[1-40],db[1-2]", user="root") as cluster:
    cluster.use(task_self())
    cluster.command(cluster.nodes, "rpm", "echo kernel-6.1.0-41")
    (Path.home() / ".ssh").mkdir(exist_ok=True)
    shutil.copy(cluster.identity, Path.home() / ".ssh/id_cluster")
    status = main()
sys.exit(status)
"""

#: The files that the commands of README.md name.
FILES = {"nodes.txt": "# the first rack\nn[1-4]\nn5  # spare\n", "broken.txt": "n2\n"}
#: And those that a pattern of theirs would match, if it were not quoted.
FILES |= dict.fromkeys(("n1", "n2", "n", "db1"), "")

#: What the groups that README.md names are, in the test.
SITE = "site:\n  compute: n[1-8]\n  down: n3\n"


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    line: int
    word: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(*words: str) -> list[Block]:
    found = []
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(r"^```(.*)\n((?:(?!```).*\n)*)```$", text, re.MULTILINE):
            line = text.count("\n", 0, match.start()) + 2
            found.append(Block(str(path.relative_to(ROOT)), line, match[1], match[2]))
    return [block for block in found if not words or block.word in words]


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """An environment with an empty home, and a `ctask` in its PATH that has the nodes of the pages."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ctask").write_text(CTASK.format(python=sys.executable))
    (folder / "ctask").chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("CTASK", "CLUSTERSHELL"))}
    environment |= {
        "HOME": str(tmp_path),
        "XDG_CONFIG_HOME": str(tmp_path / ".config"),
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "WORDS": str(tmp_path / "words"),
    }
    return environment


def test_each_fence_says_what_it_is() -> None:
    unknown = [str(block) for block in blocks() if block.word not in WORDS]
    assert unknown == []
    fences = sum(path.read_text(encoding="utf-8").count("\n```") for path in PAGES)
    assert fences == 2 * len(blocks())
    assert len(blocks("python")) >= 9
    assert len(blocks("sh")) >= 2


@pytest.mark.slow
def test_python_can_be_typed_as_it_stands(home: dict[str, str]) -> None:
    """As a reader does it: all blocks one after the other into one prompt, with an empty line behind each."""
    typed = blocks("python")
    text = "".join(f"print('=== {number}')\n{block.text}\n" for number, block in enumerate(typed))
    done = subprocess.run(
        [sys.executable, ROOT / "examples/demo.py", "--shell"],
        input=f"{text}\nprint('=== end')\n",
        env=home,
        cwd=home["HOME"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    _, *said, end = re.split(r"^(?:>>> |\.\.\. )*=== \w+$", done.stdout, flags=re.MULTILINE)
    assert (done.returncode, done.stderr.strip()) == (0, ""), done.stdout
    assert "nothing is left behind" in end
    for block, output in zip(typed, said, strict=True):
        printed = re.sub(r"^(>>> |\.\.\. )+", "", output, flags=re.MULTILINE).strip()
        assert "print(" not in block.text or printed, f"{block} printed nothing"
        # what a comment behind a print says that it prints
        for due in re.findall(r"print\(.*\) +# (demo\[.*)$", block.text, re.MULTILINE):
            assert re.sub(r"\d+\.\d+\.\d+\S*", "", due).strip() in printed, f"{block} printed {printed}"


def commands(block: Block) -> list[str]:
    return [line for line in block.text.replace("\\\n", "").splitlines() if line and not line.startswith("#")]


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks("sh"), ids=str)
def test_commands_can_be_typed_as_they_stand(home: dict[str, str], block: Block) -> None:
    """Also in a folder with files whose names a pattern without quotes would match."""
    groups = next((one.text for one in blocks("yaml") if one.page == block.page), SITE)
    write(Path(home["HOME"], ".config/ctask/groups.d/site.yaml"), groups)
    for name, text in FILES.items():
        write(Path(home["HOME"], name), text)
    for command in commands(block):
        done = subprocess.run(
            ["bash", "--norc", "-c", command],
            env=home,
            cwd=home["HOME"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{block}: {command}\n{done.stderr}"
        assert done.stdout, f"{block}: {command}"
        if command.startswith("ctask ") and not set("|<>;&$`") & set(command):
            given = [word.replace("~", home["HOME"]) for word in shlex.split(command, comments=True)[1:]]
            assert json.loads(Path(home["WORDS"]).read_text()) == given, f"{block}: a shell reads {command} otherwise"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_files_of_groups_are_read_as_they_stand(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with_sources = {"README.md": ["slurm"], "docs/groups.md": ["site", "slurm"]}
    for block in blocks("ini"):
        folder = tmp_path / block.page
        write(folder / "groups.conf", block.text)
        for other in blocks("yaml"):
            if other.page == block.page:
                write(folder / "groups.d/site.yaml", other.text)
        resolver = GroupResolverConfig([folder / "groups.conf"])
        assert resolver.sources() == with_sources[block.page]
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_what_groups_md_says_of_its_own_file_is_so(tmp_path: Path) -> None:
    (block,) = blocks("yaml")
    write(tmp_path / "groups.d/site.yaml", block.text)
    resolver = GroupResolverConfig([tmp_path / "groups.conf"])
    assert sorted(resolver.node_groups("n130")) == ["all", "compute", "rack3"]
    assert not NodeSet("@broken", resolver=resolver)
    assert len(NodeSet("@*", resolver=resolver)) == 514


def test_no_page_names_a_package_that_is_not_to_be_had() -> None:
    assert shutil.which("bash")
    for path in [*PAGES, *(ROOT / "ctask").rglob("*.py")]:
        assert "install 'ctask" not in path.read_text(encoding="utf-8"), path
