# SPDX-License-Identifier: Apache-2.0
"""ctask: run commands on many machines at once over SSH; gather, react, wait on futures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ctask import closing as _closing  # registers the end of the interpreter
from ctask import logs as _logs  # noqa: F401 (guards the loggers of all rooms)
from ctask.buffers import Output
from ctask.errors import (
    Aborted,
    AlreadyRunningError,
    AuthError,
    AuthRejected,
    AuthTimeout,
    BannerError,
    CommandError,
    CommandFailed,
    CommandTimeout,
    ConnectError,
    ConnectionLost,
    ConnectRefused,
    ConnectTimeout,
    CtaskError,
    Curable,
    ExecRefused,
    GroupResolverConfigError,
    GroupResolverError,
    GroupResolverIllegalCharError,
    GroupResolverSourceError,
    GroupSourceError,
    GroupSourceNoUpcall,
    GroupSourceQueryFailed,
    HandlerError,
    HandshakeError,
    HandshakeTimeout,
    HostKeyError,
    HostKeyMismatch,
    HostKeyRevoked,
    IdleTimeout,
    JobsFailed,
    LocalResource,
    NoCredentials,
    NodeError,
    NodeNameError,
    NodeSetError,
    NodeSetExternalError,
    NodeSetParseError,
    NodeSetParseRangeError,
    NoSuchGroup,
    OptionError,
    RangeSetParseError,
    ResolveError,
    SessionError,
    SessionRefused,
    SessionTimeout,
    TaskError,
    TaskFailed,
    TaskTimeout,
    UnknownHostKey,
    UsageError,
    WrongThread,
)
from ctask.executor import ClusterExecutor
from ctask.failures import Failures
from ctask.future import Future, as_completed, wait
from ctask.handler import Callbacks, EventHandler
from ctask.nodes import NodeSet, expand, fold, grouplist
from ctask.result import Attempt, Group, NodeResult, Timings
from ctask.retry import Retry
from ctask.states import Outcome
from ctask.task import Task, task_self
from ctask.worker import Worker

if TYPE_CHECKING:
    from ctask.nodes import RangeSet, RangeSetND

__version__ = "0.1.0"

del _closing

__all__ = [  # noqa: RUF022 (grouped as people look for them)
    # the task
    "Task",
    "task_self",
    "Worker",
    # futures
    "Future",
    "wait",
    "as_completed",
    "ClusterExecutor",
    # events
    "EventHandler",
    "Callbacks",
    # results
    "NodeResult",
    "Outcome",
    "Output",
    "Group",
    "Failures",
    "Attempt",
    "Timings",
    # trying again
    "Retry",
    "Curable",
    # node sets
    "NodeSet",
    "RangeSet",
    "RangeSetND",
    "expand",
    "fold",
    "grouplist",
    # errors, as the tree in ctask.errors has them
    "CtaskError",
    "UsageError",
    "NodeSetError",
    "NodeSetParseError",
    "NodeSetParseRangeError",
    "RangeSetParseError",
    "NodeSetExternalError",
    "NoSuchGroup",
    "GroupSourceError",
    "GroupSourceNoUpcall",
    "GroupSourceQueryFailed",
    "GroupResolverError",
    "GroupResolverSourceError",
    "GroupResolverIllegalCharError",
    "GroupResolverConfigError",
    "NodeNameError",
    "CommandError",
    "OptionError",
    "NodeError",
    "ConnectError",
    "ResolveError",
    "ConnectRefused",
    "ConnectTimeout",
    "BannerError",
    "HandshakeError",
    "HandshakeTimeout",
    "HostKeyError",
    "UnknownHostKey",
    "HostKeyMismatch",
    "HostKeyRevoked",
    "AuthError",
    "AuthRejected",
    "AuthTimeout",
    "NoCredentials",
    "SessionError",
    "SessionRefused",
    "SessionTimeout",
    "ExecRefused",
    "ConnectionLost",
    "CommandTimeout",
    "IdleTimeout",
    "LocalResource",
    "CommandFailed",
    "Aborted",
    "TaskFailed",
    "JobsFailed",
    "TaskError",
    "AlreadyRunningError",
    "TaskTimeout",
    "WrongThread",
    "HandlerError",
]


def __getattr__(name: str) -> object:
    """Load what most programs do not use when it is first asked for."""
    if name in ("RangeSet", "RangeSetND"):
        from ctask import nodes

        return getattr(nodes, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
