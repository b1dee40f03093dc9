# SPDX-License-Identifier: Apache-2.0
"""A slip in the name of a group that was to be left out: the run is refused before anything is sent."""

from ctask import NodeSetError, task_self
from ctask.nodes import set_std_group_resolver
from ctask.nodes.groups import GroupResolver, GroupSource

groups = {"all": "demo[1-16]", "prod": "demo[1-12]", "test": "@all!@prod"}
set_std_group_resolver(GroupResolver(GroupSource("site", groups)))

task = task_self()
try:
    task.run("reboot", nodes="@all!@pord")
except NodeSetError as error:
    print(f"NodeSetError: {error}")
