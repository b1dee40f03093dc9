# SPDX-License-Identifier: Apache-2.0
"""Interpreters that ctask does not run in: those without a GIL, and all but a process's first.

Runs in the thread that makes a task. Nothing here changes.
"""

from __future__ import annotations

import sys
from importlib import import_module

from ctask.errors import TaskError

__all__ = ["check_interpreter"]


def check_interpreter() -> None:
    """Refuse an interpreter in which a task cannot be relied on.

    Raises:
        TaskError: it is free-threaded, and its GIL is off; or it is a subinterpreter. Node sets work in both.
    """
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        # That one thread writes a value and others read it is enough with a GIL only.
        raise TaskError("this Python runs without its GIL, and ctask needs it: start it with -X gil=1 or PYTHON_GIL=1")
    if _is_subinterpreter():
        # Its end does not wait for daemon threads and finds them running: the whole process is aborted.
        raise TaskError(
            "ctask runs in the main interpreter of a process only, and this is a subinterpreter: "
            "use a thread of the main one, or a process of its own"
        )


def _is_subinterpreter() -> bool:
    # Python has no public way to ask before 3.14; the first name is that of 3.13 and later.
    for name in ("_interpreters", "_xxsubinterpreters"):
        try:
            module = import_module(name)
            return bool(module.get_current() != module.get_main())
        except (ImportError, AttributeError):
            continue
    return False
