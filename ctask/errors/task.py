# SPDX-License-Identifier: Apache-2.0
"""What goes wrong with a task as a whole, and with many of its jobs.

Any thread; nothing is shared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ctask.errors.node import Curable, NodeError
from ctask.errors.usage import CtaskError

__all__ = [
    "AlreadyRunningError",
    "HandlerError",
    "JobsFailed",
    "TaskError",
    "TaskFailed",
    "TaskTimeout",
    "WrongThread",
]


class JobsFailed(CtaskError):
    """Raised once, at the end, by `check=True` and `worker.check()`.

    Attributes:
        failures: the `Failures`: (phase, error class name, text) -> the `NodeSet` that it holds for.
    """

    def __init__(self, message: str, failures: Mapping[tuple[str, str, str], Any]) -> None:
        super().__init__(message)
        self.failures = failures

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0], self.failures)


class TaskError(CtaskError):
    """The task, not one of its nodes."""


class TaskFailed(NodeError, TaskError):
    """The task itself ended by an error (its `__cause__`) before the node's command had: it may still run."""

    default_reason = "the task itself failed"
    curable = Curable.NEVER


class AlreadyRunningError(TaskError):
    """`run()` or `resume()` inside a handler of the same task."""


class TaskTimeout(TaskError, TimeoutError):
    """The `deadline` of `run()` or `resume()` has passed; results so far are kept."""


class WrongThread(TaskError):
    """A call that waits, made where nothing may wait: in a done-callback."""


class HandlerError(TaskError, ExceptionGroup[Exception]):
    """Raised at the end of a run in which handlers raised; the run itself went on."""

    def derive(self, excs: Sequence[Exception]) -> HandlerError:  # type: ignore[override]  # never BaseExceptions
        return HandlerError(self.message, excs)
