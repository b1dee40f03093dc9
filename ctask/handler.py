# SPDX-License-Identifier: Apache-2.0
"""Handlers: objects with `ev_…` methods, functions per event, and the older signatures of ClusterShell.

What a worker's handlers are is decided once, when they are registered, never per event. Handlers are called in the
owner's thread only, one at a time, by the mailbox.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypedDict

from ctask.buffers import Output
from ctask.errors import NodeError, OptionError
from ctask.result import NodeResult

if TYPE_CHECKING:
    from ctask.worker import Worker

__all__ = ["EVENTS", "Callbacks", "EventHandler", "Handlers"]

#: Event -> how many arguments its callbacks take, the worker included.
EVENTS = {"start": 1, "pickup": 2, "read": 4, "retry": 5, "hup": 3, "done": 3, "close": 2}

#: Events whose handlers may have the signature of ClusterShell before 1.8: `(self, worker)` alone.
_OLDER = frozenset(("pickup", "read", "hup", "close"))


class EventHandler:
    """The base of handler objects: each method does nothing. Any object with some of these methods will do.

    All are called in the thread that owns the task, one at a time. One that raises is logged and called again;
    the run goes on, and `run()` raises `HandlerError` at its end.
    """

    def ev_start(self, worker: Worker) -> None:
        """Called once per worker, before its first `ev_pickup`."""

    def ev_pickup(self, worker: Worker, node: str) -> None:
        """Called once per node, when its job begins to be carried out."""

    def ev_read(self, worker: Worker, node: str, sname: str, msg: Output) -> None:
        """Called for each line, without its end; `sname` is `stdout` or `stderr`."""

    def ev_retry(self, worker: Worker, node: str, attempt: int, error: NodeError, delay: float) -> None:
        """Called between two tries: try number `attempt` (from 1) ended by `error`, the next is in `delay` seconds.

        All lines of that try have been read by then. A command that exited with a status that is tried again has the
        error `CommandFailed`, with its status in the text.
        """

    def ev_hup(self, worker: Worker, node: str, rc: int) -> None:
        """Called when the node's command ended; with 255 where the node was not reached, or lost."""

    def ev_done(self, worker: Worker, node: str, result: NodeResult) -> None:
        """Called once per node, however its job ended, after its last `ev_read` and `ev_hup`."""

    def ev_close(self, worker: Worker, timedout: bool) -> None:
        """Called once per worker, last; `timedout` if any node's job timed out."""


class Callbacks(TypedDict, total=False):
    """The per-event callbacks that `shell`, `run` and `submit` take."""

    on_start: Callable[[Worker], object]
    on_pickup: Callable[[Worker, str], object]
    on_read: Callable[[Worker, str, str, Output], object]
    on_retry: Callable[[Worker, str, int, NodeError, float], object]
    on_hup: Callable[[Worker, str, int], object]
    on_done: Callable[[Worker, str, NodeResult], object]
    on_close: Callable[[Worker, bool], object]


class Handlers:
    """The callbacks of one worker, by event, in order of registration. Owner only.

    The lists are replaced whole when one is added, so that an event that is being delivered is not disturbed.

    Attributes:
        errors_only: `read` is of standard error alone, where it is told apart: no line is cut from standard output.
    """

    __slots__ = ("close", "done", "errors_only", "hup", "pickup", "read", "retry", "start")

    def __init__(self) -> None:
        self.errors_only = False
        for event in EVENTS:
            setattr(self, event, ())

    start: tuple[Callable[..., object], ...]
    pickup: tuple[Callable[..., object], ...]
    read: tuple[Callable[..., object], ...]
    retry: tuple[Callable[..., object], ...]
    hup: tuple[Callable[..., object], ...]
    done: tuple[Callable[..., object], ...]
    close: tuple[Callable[..., object], ...]

    def __bool__(self) -> bool:
        return any(getattr(self, event) for event in EVENTS)

    def add(self, event: str, callback: object) -> None:
        """Register a function for an event.

        Raises:
            OptionError: no such event, or not a function that can take its arguments.
        """
        if event not in EVENTS:
            raise OptionError(f"no such event: {event!r}; there are: {', '.join(EVENTS)}")
        if not callable(callback):
            raise OptionError(f"the callback of {event!r} is a function, not {callback!r}")
        if inspect.iscoroutinefunction(callback) or inspect.iscoroutinefunction(type(callback).__call__):
            raise OptionError(
                f"the callback of {event!r} is a plain function, and this is a coroutine function, which nobody would "
                f"await: let it make a task (asyncio.create_task), or use `async for result in worker`: {callback!r}"
            )
        if not _takes(callback, EVENTS[event]):
            raise OptionError(f"the callback of {event!r} is called with {EVENTS[event]} arguments: {callback!r}")
        setattr(self, event, (*getattr(self, event), callback))

    def add_object(self, handler: object) -> None:
        """Register the `ev_…` methods that an object has of its own; those of `EventHandler` do nothing."""
        methods = [(event, getattr(handler, f"ev_{event}", None)) for event in EVENTS]
        if not any(callable(method) for _, method in methods):
            raise OptionError(f"a handler has ev_… methods (see ctask.EventHandler); {handler!r} has none")
        for event, method in methods:
            if callable(method) and getattr(method, "__func__", None) is not getattr(EventHandler, f"ev_{event}"):
                older = event in _OLDER and not _takes(method, EVENTS[event])
                self.add(event, _older(method) if older else method)


def _older(method: Callable[..., object]) -> Callable[..., object]:
    """Call a method of the older signature with the worker alone; it asks the worker for the rest."""

    def call(worker: Worker, *_: Any) -> object:
        return method(worker)

    return call


def _takes(function: Callable[..., object], count: int) -> bool:
    """Whether `function` can be called with `count` arguments."""
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature: it is taken at its word
        return True
    return True
