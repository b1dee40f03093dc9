# SPDX-License-Identifier: Apache-2.0
"""The ways to a node. `base` is the Protocol that all of them are; none is imported before it is used."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

from ctask.errors import OptionError
from ctask.options import TRANSPORTS

__all__ = ["close", "end_local", "in_use", "register", "settle", "transport"]

_OWN = ("local", "ssh")
_registered: dict[str, Any] = {}


def transport(name: str) -> Any:
    """Return the process's transport of that name: `ssh`, `local`, or a registered one. Any thread.

    Raises:
        OptionError: there is none of that name.
    """
    found = _registered.get(name)
    if found is not None:
        return found
    if name == "local":
        from ctask.transports import local

        return local.transport()
    if name == "ssh":
        from ctask.transports import ssh

        return ssh.transport()
    raise OptionError(f"there is no transport {name!r} (any more); there are: {', '.join(sorted(TRANSPORTS))}")


def in_use() -> dict[str, Any]:
    """Return the transports that anything may have used by now, by name; none is loaded for this. Any thread."""
    loaded = {name: getattr(sys.modules.get(f"ctask.transports.{name}"), "transport", None) for name in _OWN}
    return {name: made() for name, made in loaded.items() if made is not None and name not in _registered} | _registered


def register(name: str, made: Any) -> None:
    """Add a transport that the option `transport` can name from now on, or put one in place of `ssh` or `local`.

    What was submitted before keeps the one that it had. Any thread.

    Args:
        name: printable text.
        made: see `ctask.transports.base.Transport`; None takes the one of that name away again.

    Raises:
        OptionError: no such name can be, or `made` lacks a part of a transport.
    """
    if not name or not name.isprintable():
        raise OptionError(f"a transport's name is printable text, not {name!r}")
    if made is None:
        _registered.pop(name, None)
        if name not in _OWN:
            TRANSPORTS.discard(name)
        return
    from ctask.transports.base import PARTS

    lacks = [part for part in PARTS if not hasattr(made, part)]
    if lacks:
        raise OptionError(f"{made!r} is no transport: it lacks {', '.join(lacks)}: see ctask.transports.base")
    _registered[name] = made
    TRANSPORTS.add(name)


def settle(call: Callable[[], None]) -> None:
    """Make a call once the threads that read have taken what has come by now from nodes and local commands.

    Any thread; never waits. The call is made in any thread, at once where nothing is read.
    """
    found = [sys.modules.get(f"ctask.transports.{name}") for name in ("ssh", "watcher")]
    parts = [part for one in found if (part := getattr(one, "settle", None)) is not None]
    left = [None] * len(parts)
    lock = threading.Lock()

    def settled() -> None:
        with lock:
            left.pop()
            last = not left
        if last:
            call()

    for part in parts:
        part(settled)
    if not parts:
        call()


def end_local(grace: float) -> None:
    """End all local commands: TERM now, KILL after `grace` seconds. Waits for them."""
    local = sys.modules.get("ctask.transports.local")
    if local is not None:
        local.transport().terminate_all(grace)


def close() -> None:
    """Close all kept connections and the watcher. A transport that was never used is not loaded for it."""
    made = getattr(sys.modules.get("ctask.transports.ssh"), "transport", None)  # None as well: it is being loaded
    if made is not None:
        made().close_all()
    watcher = sys.modules.get("ctask.transports.watcher")
    if watcher is not None:
        watcher.close_watcher()
