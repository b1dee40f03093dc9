# SPDX-License-Identifier: Apache-2.0
"""Node groups: where `@group` in a node set comes from. docs/groups.md tells how they are configured.

From the ground up: `trust` (whose files are read), `source` (groups in memory, and what every source answers),
`shell` (a command of a source, with a deadline, and how names reach it), `upcall` (groups that commands tell),
`yamlfile` (groups in a YAML file), `resolver` (sources under their names), `config` (`groups.conf` and `groups.d`).

Runs in any thread that reads a node set; each class says what guards its caches. Upcalls are child processes of the
thread that asks, which waits for them; there are no threads here, and no sockets.
"""

from ctask.nodes.groups.config import GroupResolverConfig, config_paths, set_std_group_resolver_config
from ctask.nodes.groups.resolver import ILLEGAL_GROUP_CHARS, GroupResolver
from ctask.nodes.groups.source import FileGroupSource, Groups, GroupSource, Words
from ctask.nodes.groups.upcall import UpcallGroupSource
from ctask.nodes.groups.yamlfile import YAMLGroupLoader

__all__ = [
    "ILLEGAL_GROUP_CHARS",
    "FileGroupSource",
    "GroupResolver",
    "GroupResolverConfig",
    "GroupSource",
    "Groups",
    "UpcallGroupSource",
    "Words",
    "YAMLGroupLoader",
    "config_paths",
    "set_std_group_resolver_config",
]
