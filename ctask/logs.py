# SPDX-License-Identifier: Apache-2.0
"""ctask's loggers, which raise nothing: a program's handlers and filters run in our threads, in the midst of our work.

Loaded with `ctask`, before anything of it logs. Any thread; nothing is shared.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import traceback
from typing import Any

__all__ = ["NAMES", "guard"]

#: Every logger of ours; a module that wants another one adds it here.
NAMES = (
    "ctask",
    "ctask.closing",
    "ctask.dispatcher",
    "ctask.engine",
    "ctask.future",
    "ctask.handler",
    "ctask.job",
    "ctask.nodes.groups",
    "ctask.retry",
    "ctask.ssh",
    "ctask.task",
    "ctask.testing",
    "ctask.threads",
    "ctask.watcher",
    "ctask.worker",
)


class _Guarded(logging.Logger):
    """A logger whose methods return, whatever the program's handlers, filters and record factories do."""

    def _log(self, level: int, msg: object, args: Any, *, stacklevel: int = 1, **how: Any) -> None:  # type: ignore[override]
        # Under all of `debug()` to `exception()`: the record is made in it, filtered, and handed to the handlers.
        try:
            super()._log(level, msg, args, stacklevel=stacklevel + 1, **how)
        except Exception:  # noqa: BLE001 (told as the standard library tells it of a handler)
            _tell()
        except BaseException:
            # `sys.exit()` in a handler is meant for a thread of the program's, not for one that others wait for.
            if not threading.current_thread().name.startswith("ctask"):
                raise
            _tell()


def _tell() -> None:
    """Say on standard error what logging has raised, unless the program wants no such words (`raiseExceptions`)."""
    if logging.raiseExceptions and sys.stderr is not None:
        with contextlib.suppress(Exception):
            sys.stderr.write("--- Logging error: a handler, filter or record factory raised; ctask goes on ---\n")
            traceback.print_exc(file=sys.stderr)


def guard(name: str) -> None:
    """Have the logger of that name raise nothing, whatever its class is."""
    logger = logging.getLogger(name)
    kind = type(logger)
    if not issubclass(kind, _Guarded):
        logger.__class__ = type(kind.__name__, (_Guarded, kind), {})


for _name in NAMES:
    guard(_name)
