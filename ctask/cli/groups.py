# SPDX-License-Identifier: Apache-2.0
"""Which node groups a command line means: `--groupsconf`, `-s`, and group names without their `@`.

Pure functions, in the main thread; configuration is read when the first group is looked up.
"""

from __future__ import annotations

import re
from pathlib import Path

from ctask.errors import OptionError
from ctask.nodes import Resolver

__all__ = ["named", "resolver"]

# an operator, or none at the beginning; those between brackets separate numbers
_BEFORE_OPERAND = re.compile(r"(^|[,!&^](?![^[]*\]))\s*@?")


def resolver(conf: str | None, source: str | None) -> Resolver | None:
    """Return who knows the groups: None is the process's resolver.

    Raises:
        OptionError: there is no such file, or it is not a regular one.
        NodeSetExternalError: there is no such source, or the configuration cannot be used.
    """
    if conf is None and source is None:
        return None
    if conf is not None and not Path(conf).is_file():
        why = "it is not a regular file" if Path(conf).exists() else "there is no such file"
        raise OptionError(f"--groupsconf {conf}: {why}")
    from ctask.nodes.groups import GroupResolverConfig  # on demand: most runs name no group

    made = GroupResolverConfig(None if conf is None else [conf])
    if source is not None:
        made.default_source_name = source
    return made


def named(groups: str) -> str:
    """Return the node set of groups that are named without `@`: `rack[1-3],web` is `@rack[1-3],@web`."""
    return _BEFORE_OPERAND.sub(r"\1@", groups)
