# SPDX-License-Identifier: Apache-2.0
"""What all tests stand on: a private home, the signals of a shell, and the fixtures of the `fix_*` modules.

Runs in the main thread of pytest, and once more in each worker of pytest-xdist.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import settings

from ctask.nodes.groups import config as groups_config

# In CI the same examples each time: what fails there has failed for its change. Elsewhere they are drawn by chance.
settings.register_profile("ctask", deadline=None)
settings.register_profile("ctask-ci", deadline=None, derandomize=True, database=None)
settings.load_profile("ctask-ci" if os.environ.get("CI") else "ctask")

# In the order in which they import each other: pytest rewrites the asserts of what it imports first itself.
pytest_plugins = [
    "ctask_tests.fix_leaks",
    "ctask_tests.fix_sshd",
    "ctask_tests.fix_proxy",
    "ctask_tests.fix_banner",
    "ctask_tests.fix_hostile",
]


#: When the first test of several rounds began.
_began = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Say how often the tests are run, and for how long (`tools/load.sh`)."""
    parser.addoption("--rounds", type=int, default=1, help="run all tests so often, one round after the other")
    parser.addoption("--rounds-time", type=float, help="begin no test after so many seconds; it is skipped")


def pytest_configure(config: pytest.Config) -> None:
    """Give the whole process, and what it starts, a home of its own, no agent, and signals that work."""
    # A run in the background or under nohup ignores some of them, and so would all that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    os.umask(0o022)
    home = tempfile.mkdtemp(prefix="ctask-home-")
    config.add_cleanup(lambda: shutil.rmtree(home, ignore_errors=True))
    os.environ["HOME"] = home
    os.environ.pop("SSH_AUTH_SOCK", None)
    for name in ("XDG_CONFIG_HOME", "CLUSTERSHELL_CFGDIR", "CTASK_CFGDIR"):  # what tells of node groups
        os.environ.pop(name, None)
    groups_config.SYSTEM_FOLDERS = (Path(home, "etc"),)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test of its own of each round."""
    rounds = metafunc.config.getoption("rounds")
    if rounds > 1:
        metafunc.fixturenames.append("round_number")
        metafunc.parametrize("round_number", range(1, rounds + 1), ids=lambda number: f"round{number}")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put one round behind the other: where time is short, each test has had its share."""
    if config.getoption("rounds") > 1:
        items.sort(key=lambda item: item.callspec.params["round_number"])  # type: ignore[attr-defined]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what would begin after `--rounds-time`."""
    limit = item.config.getoption("rounds_time")
    if limit is not None and time.monotonic() - item.config.stash.setdefault(_began, time.monotonic()) > limit:
        pytest.skip(f"{limit:g} s are over")
