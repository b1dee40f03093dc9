# SPDX-License-Identifier: Apache-2.0
"""Everything that ctask raises, as one tree.

::

    CtaskError
    ├─ UsageError(ValueError)          what the caller asked for cannot be right; raised in the caller, before a packet
    │  ├─ NodeSetError                 a node set that cannot be read
    │  │  ├─ NodeSetParseError         its text; `position` says where
    │  │  │  └─ NodeSetParseRangeError the numbers in it
    │  │  │     └─ RangeSetParseError  the text of a `RangeSet`
    │  │  └─ NodeSetExternalError      its groups: a source that is not there, or that does not answer
    │  │     ├─ NoSuchGroup            a group that its source has not
    │  │     ├─ GroupSourceError       a source of groups that cannot answer
    │  │     │  ├─ GroupSourceNoUpcall    it has nothing to answer with
    │  │     │  └─ GroupSourceQueryFailed its command failed
    │  │     └─ GroupResolverError     what was asked for cannot be looked up
    │  │        ├─ GroupResolverSourceError       no such source
    │  │        ├─ GroupResolverIllegalCharError  a name that no group may have
    │  │        └─ GroupResolverConfigError       groups.conf, or a file that it names
    │  ├─ NodeNameError                a name that no node may have
    │  ├─ CommandError                 a command that cannot be sent
    │  └─ OptionError                  an option that is unknown, or has no such value
    ├─ NodeError                       one node, one attempt: `node`, `phase`, `attempts`, `result`
    │  ├─ ConnectError                 before the handshake was done
    │  │  ├─ ResolveError
    │  │  ├─ ConnectRefused
    │  │  ├─ ConnectTimeout
    │  │  ├─ BannerError
    │  │  ├─ HandshakeError
    │  │  └─ HandshakeTimeout
    │  ├─ HostKeyError
    │  │  ├─ UnknownHostKey
    │  │  ├─ HostKeyMismatch
    │  │  └─ HostKeyRevoked
    │  ├─ AuthError
    │  │  ├─ AuthRejected
    │  │  ├─ AuthTimeout
    │  │  └─ NoCredentials
    │  ├─ SessionError
    │  │  ├─ SessionRefused
    │  │  ├─ SessionTimeout
    │  │  └─ ExecRefused
    │  ├─ ConnectionLost               after a connection stood; after exec was sent, nobody knows what ran
    │  ├─ CommandTimeout
    │  │  └─ IdleTimeout
    │  ├─ LocalResource                descriptors, threads, memory or disk of this machine
    │  ├─ CommandFailed                a status that is not in `ok_codes`, or a signal; only from `result.check()`
    │  ├─ Aborted(CancelledError)
    │  └─ TaskFailed(TaskError)        the task itself ended by an error, under all of its jobs
    ├─ JobsFailed                      of `check=True` and `worker.check()`: the folded failures
    └─ TaskError
       ├─ AlreadyRunningError
       ├─ TaskTimeout(TimeoutError)    the run's own deadline; no NodeError is a TimeoutError
       ├─ WrongThread
       └─ HandlerError(ExceptionGroup)

Runs in any thread; the classes hold no shared state.
"""

from __future__ import annotations

from ctask.errors.node import (
    Aborted,
    AuthError,
    AuthRejected,
    AuthTimeout,
    BannerError,
    CommandFailed,
    CommandTimeout,
    ConnectError,
    ConnectionLost,
    ConnectRefused,
    ConnectTimeout,
    Curable,
    ExecRefused,
    HandshakeError,
    HandshakeTimeout,
    HostKeyError,
    HostKeyMismatch,
    HostKeyRevoked,
    IdleTimeout,
    LocalResource,
    NoCredentials,
    NodeError,
    ResolveError,
    SessionError,
    SessionRefused,
    SessionTimeout,
    UnknownHostKey,
)
from ctask.errors.task import (
    AlreadyRunningError,
    HandlerError,
    JobsFailed,
    TaskError,
    TaskFailed,
    TaskTimeout,
    WrongThread,
)
from ctask.errors.usage import (
    CommandError,
    CtaskError,
    GroupResolverConfigError,
    GroupResolverError,
    GroupResolverIllegalCharError,
    GroupResolverSourceError,
    GroupSourceError,
    GroupSourceNoUpcall,
    GroupSourceQueryFailed,
    NodeNameError,
    NodeSetError,
    NodeSetExternalError,
    NodeSetParseError,
    NodeSetParseRangeError,
    NoSuchGroup,
    OptionError,
    RangeSetParseError,
    UsageError,
)

__all__ = [
    "Aborted",
    "AlreadyRunningError",
    "AuthError",
    "AuthRejected",
    "AuthTimeout",
    "BannerError",
    "CommandError",
    "CommandFailed",
    "CommandTimeout",
    "ConnectError",
    "ConnectRefused",
    "ConnectTimeout",
    "ConnectionLost",
    "CtaskError",
    "Curable",
    "ExecRefused",
    "GroupResolverConfigError",
    "GroupResolverError",
    "GroupResolverIllegalCharError",
    "GroupResolverSourceError",
    "GroupSourceError",
    "GroupSourceNoUpcall",
    "GroupSourceQueryFailed",
    "HandlerError",
    "HandshakeError",
    "HandshakeTimeout",
    "HostKeyError",
    "HostKeyMismatch",
    "HostKeyRevoked",
    "IdleTimeout",
    "JobsFailed",
    "LocalResource",
    "NoCredentials",
    "NoSuchGroup",
    "NodeError",
    "NodeNameError",
    "NodeSetError",
    "NodeSetExternalError",
    "NodeSetParseError",
    "NodeSetParseRangeError",
    "OptionError",
    "RangeSetParseError",
    "ResolveError",
    "SessionError",
    "SessionRefused",
    "SessionTimeout",
    "TaskError",
    "TaskFailed",
    "TaskTimeout",
    "UnknownHostKey",
    "UsageError",
    "WrongThread",
]
