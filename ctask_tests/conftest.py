# SPDX-License-Identifier: Apache-2.0
"""What all tests stand on: a private home, and the fixtures of the `fix_*` modules.

Runs in the main thread of pytest, and once more in each worker of pytest-xdist.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from hypothesis import settings

from ctask.nodes.groups import config as groups_config

if TYPE_CHECKING:
    import pytest

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


def pytest_configure(config: pytest.Config) -> None:
    """Give the whole process, and what it starts, a home of its own and no agent."""
    home = tempfile.mkdtemp(prefix="ctask-home-")
    config.add_cleanup(lambda: shutil.rmtree(home, ignore_errors=True))
    os.environ["HOME"] = home
    os.environ.pop("SSH_AUTH_SOCK", None)
    for name in ("XDG_CONFIG_HOME", "CLUSTERSHELL_CFGDIR", "CTASK_CFGDIR"):  # what tells of node groups
        os.environ.pop(name, None)
    groups_config.SYSTEM_FOLDERS = (Path(home, "etc"),)
