# SPDX-License-Identifier: Apache-2.0
"""The ways to a node. `base` is the Protocol that all of them are; none is imported before it is used."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["close", "end_local", "register", "transport"]

_registered: dict[str, Any] = {}


def transport(name: str) -> Any:
    """Return the process's transport of that name: `ssh`, `local`, or a registered one. Any thread."""
    found = _registered.get(name)
    if found is not None:
        return found
    if name == "local":
        from ctask.transports import local

        return local.transport()
    from ctask.transports import ssh

    return ssh.transport()


def register(name: str, made: Any) -> None:
    """Put a transport in place of the one of that name; None takes it away again. For tests of programs."""
    if made is None:
        _registered.pop(name, None)
    else:
        _registered[name] = made


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
