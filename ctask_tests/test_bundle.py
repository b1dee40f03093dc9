# SPDX-License-Identifier: Apache-2.0
"""`make bundle`: what is in the tar installs without a network, and works."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


def output(*command: str | Path, **environment: str) -> str:
    done = run(*command, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a bundle, unpacked."""
    folder = tmp_path_factory.mktemp("bundle")
    output("make", "-C", ROOT, "bundle", f"PYTHON={sys.executable}", f"DIST={folder}")
    (archive,) = folder.glob("ctask-*-bundle.tar")
    output("tar", "-C", folder, "-xf", archive)
    return folder / archive.stem


def test_the_bundle_installs_without_a_network_and_works(bundle: Path, tmp_path: Path) -> None:
    venv = tmp_path / "ctask"
    # An index that cannot be reached, were it asked; and again, over what is there.
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": ""}
    for _ in range(2):
        said = output(bundle / "install.sh", venv, sys.executable, **nowhere)
        assert said.endswith(f"is installed: {venv}/bin/ctask\n")

    program = (
        "import ctask, importlib.metadata as m, importlib.resources as r, paramiko, tenacity;"
        "files = ('py.typed', 'transports/ssh/end.sh');"
        "print(m.version('ctask') == ctask.__version__, all(r.files('ctask').joinpath(f).is_file() for f in files),"
        " ctask.__file__)"
    )
    version_is_one, typed, file = output(venv / "bin" / "python", "-I", "-c", program).split()
    assert (version_is_one, typed) == ("True", "True")
    assert Path(file).is_relative_to(venv)
    assert "usage" in output(venv / "bin" / "ctask", "--help").lower()
    installed = {path.name.partition("-")[0] for path in venv.glob("lib/*/site-packages/*.dist-info")}
    assert not {"pytest", "hypothesis", "pip"} & installed


def test_the_installer_says_what_is_wrong_and_touches_nothing(bundle: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "letter").write_text("mine")
    refused = run(bundle / "install.sh", full, sys.executable)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "is there already" in refused.stderr
    assert [path.name for path in full.iterdir()] == ["letter"]

    assert "usage" in run(bundle / "install.sh").stderr

    nothing = run(bundle / "install.sh", tmp_path / "venv", "/nonexistent/python3")
    assert nothing.returncode == 1
    assert "no Python by the name '/nonexistent/python3'" in nothing.stderr
    assert not (tmp_path / "venv").exists()
