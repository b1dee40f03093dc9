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

import concurrent.futures
import enum
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the records stand above this room; only the checker may look up
    from ctask.result import Attempt, NodeResult

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


class CtaskError(Exception):
    """The base of all that ctask raises."""


class UsageError(CtaskError, ValueError):
    """Raised in the caller's thread, before a packet is sent, when a request cannot be right."""


class NodeSetError(UsageError):
    """A node set that cannot be read.

    Args:
        text: the whole input.
        position: index of the character that is wrong, from 0 (the text counts from 1); None: no place is to blame.
        reason: what is wrong with it, and what to do.
    """

    #: what the text should have been
    subject = "node set"

    def __init__(self, text: str, position: int | None, reason: str) -> None:
        where = "" if position is None else f" at position {position + 1}"
        super().__init__(f"bad {self.subject} {_quoted(text)}{where}: {reason}")
        self.text = text
        self.position = position
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.text, self.position, self.reason)


class NodeSetParseError(NodeSetError):
    """Text that is no node set; `position` is where it stops being one."""


class NodeSetParseRangeError(NodeSetParseError):
    """Numbers of a node set that are none, or that are in no order."""


class RangeSetParseError(NodeSetParseRangeError):
    """Text that is no `RangeSet`."""

    subject = "range set"


class NodeSetExternalError(NodeSetError):
    """What a node set needs of node groups cannot be had: the message is `reason` alone.

    Args:
        reason: what happened, and what to do.
        text: the group, as `@group` or `@source:group`, or whatever else was asked for.
    """

    def __init__(self, reason: str, text: str = "") -> None:
        super().__init__(text, None, reason)
        self.args = (printable(reason),)

    def before_anything(self) -> NodeSetExternalError:
        """Return the error with the word that nothing was run; for who was about to run something."""
        end = "" if self.reason.endswith(("?", ".")) else "."
        return type(self)(f"{self.reason}{end} Nothing was run.", self.text)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, self.text)


class NoSuchGroup(NodeSetExternalError):
    """A group that its source has not."""


class GroupSourceError(NodeSetExternalError):
    """A source of node groups that cannot answer."""


class GroupSourceNoUpcall(GroupSourceError):
    """A source that has nothing to answer such a question with: no command in its section, say."""


class GroupSourceQueryFailed(GroupSourceError):
    """A source whose command failed, did not end in time, or printed what it should not."""


class GroupResolverError(NodeSetExternalError):
    """A question about node groups that no source was asked."""


class GroupResolverSourceError(GroupResolverError):
    """A source of node groups that is not there."""


class GroupResolverIllegalCharError(GroupResolverError):
    """A name of a group, or of a node, with characters in it that it may not have there."""


class GroupResolverConfigError(GroupResolverError):
    """`groups.conf`, or a file that it names, cannot be used as it is; the message says which, and what to do."""


class NodeNameError(UsageError):
    """A name that no node may have: it would be read as an option, a path or a shell word somewhere."""


class CommandError(UsageError):
    """A command that cannot be sent as it stands (empty, with a NUL, too long, not encodable)."""


class OptionError(UsageError):
    """An option that is unknown, or that has no such value."""


class Curable(enum.IntEnum):
    """Whether the same may go well a moment later; what a `ctask.Retry` goes by."""

    NEVER = 0
    """Not tried again by any policy: a key that was refused is refused again, and counts there."""
    NAMED = 1
    """Tried again only where a policy names it."""
    MAYBE = 2
    """Tried again by a policy that names nothing."""
    BUSY = 3
    """The sign of a busy server: tried again without being asked."""


class NodeError(CtaskError):
    """What kept one node's command from running to its end.

    Attributes:
        node: name of the node; filled in by the job that the error ends.
        phase: where the attempt was (one of `ctask.states.PHASES`).
        reason: the text without node and phase, one line.
        kind: the text that folds with the same failure of other nodes: `reason` without addresses and times.
        curable: whether the same may go well a moment later.
        attempts: one `Attempt` for each try, the last one included.
        result: the `NodeResult` with what had been printed until then; None until the job has ended.
    """

    #: said where an error is raised without a text of its own
    default_reason = "failed"
    curable = Curable.NAMED

    def __init__(
        self, reason: str = "", *, node: str = "", phase: str = "", kind: str = "", curable: Curable | None = None
    ) -> None:
        self.node = node
        self.phase = phase
        self.reason = reason or self.default_reason
        self.kind = kind or self.reason
        if curable is not None:
            self.curable = curable
        self.attempts: tuple[Attempt, ...] = ()
        self.result: NodeResult | None = None
        super().__init__(self.reason)

    def copy(self) -> NodeError:
        """Return an error of its own with the same class and text, for another node that shares the failure."""
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.args = self.args
        twin.__cause__ = self.__cause__
        return twin

    def add(self, text: str) -> None:
        """Add to the text of this node; what folds with other nodes stays as it is."""
        self.reason = f"{self.reason}. {text}"
        self.args = (self.reason,)

    def tried(self, count: int, seconds: float) -> None:
        """Say how often it was tried, before the advice that follows the first sentence."""
        first, stop, advice = self.reason.partition(". ")
        self.reason = f"{first} ({count} tries, {seconds:.1f} s){stop}{advice}"
        self.args = (self.reason,)

    def why(self) -> str:
        """Return `phase: reason`, or the reason alone where the phase says nothing more."""
        return self._in_phase(self.reason)

    def folded(self) -> str:
        """Return `phase: kind`, or the kind alone: the text that the same failure of other nodes has as well."""
        return self._in_phase(self.kind)

    def _in_phase(self, text: str) -> str:
        return printable(text if not self.phase or self.phase in _SAYS_NOTHING else f"{self.phase}: {text}")

    def __str__(self) -> str:
        return printable(f"{self.node}: {self.why()}" if self.node else self.why())

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


class ConnectError(NodeError):
    """The node could not be connected to; nothing was run."""


class ResolveError(ConnectError):
    """The node's name has no address."""

    default_reason = "the name has no address"


class ConnectRefused(ConnectError):
    """The node answered that nobody listens there."""

    default_reason = "refused"
    curable = Curable.MAYBE


class ConnectTimeout(ConnectError):
    """Nothing answered within `connect_timeout`, or there is no way to the node."""

    default_reason = "no answer"
    curable = Curable.MAYBE


class BannerError(ConnectError):
    """What answered hung up, or said nothing, before it named its SSH version."""

    curable = Curable.MAYBE


class HandshakeError(ConnectError):
    """The key exchange failed.

    Attributes:
        integrity: the failure is one of signature, order or MAC: never to be tried again.
    """

    integrity = False


class HandshakeTimeout(ConnectError):
    """The key exchange did not end within `connect_timeout`."""

    curable = Curable.MAYBE


class HostKeyError(NodeError):
    """The node could not prove that it is itself; no credentials were sent.

    Attributes:
        fingerprint: of the key that was shown, as `ssh-keygen -l` prints it (``SHA256:…``).
        key_type: its short name (``ed25519``, ``rsa``, ``ecdsa``).
        line: the known_hosts line that would accept it.
        files: the files that were looked in.
    """

    curable = Curable.NEVER
    fingerprint = ""
    key_type = ""
    line = ""
    files: tuple[str, ...] = ()


class UnknownHostKey(HostKeyError):
    """No known_hosts file knows the node."""


class HostKeyMismatch(HostKeyError):
    """A known_hosts file knows the node by another key."""


class HostKeyRevoked(HostKeyError):
    """A known_hosts file marks the key that was shown as revoked."""


class AuthError(NodeError):
    """The node did not let the user in; nothing was run."""


class AuthRejected(AuthError):
    """The node refused every credential that was offered, each once."""

    curable = Curable.NEVER


class AuthTimeout(AuthError):
    """The node did not answer a login within `connect_timeout`."""


class NoCredentials(AuthError):
    """There was nothing to offer that the node would take."""

    curable = Curable.NEVER


class SessionError(NodeError):
    """The connection stands, but no command could be started on it."""


class SessionRefused(SessionError):
    """The node refused to open a session."""

    curable = Curable.MAYBE


class SessionTimeout(SessionError):
    """The node did not answer the opening of a session within `connect_timeout`."""

    curable = Curable.MAYBE


class ExecRefused(SessionError):
    """The node opened a session and refused to run the command."""


class ConnectionLost(NodeError):
    """The connection ended under the command: it may have run, or may still run."""

    default_reason = "connection lost"
    curable = Curable.MAYBE


class CommandTimeout(NodeError):
    """The command, or the run, took longer than the caller allowed; what it had printed is kept."""


class IdleTimeout(CommandTimeout):
    """The node printed nothing for `idle_timeout`; what it had printed is kept."""


class LocalResource(NodeError):
    """This machine has no more descriptors, threads, memory or disk for the job."""


class CommandFailed(NodeError):
    """The command ran and did not succeed. Raised by `NodeResult.check()` only."""


class Aborted(NodeError, concurrent.futures.CancelledError):
    """The caller took the job back."""

    default_reason = "aborted"
    curable = Curable.NEVER


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


#: Phases that say nothing more than the reasons of the errors that end an attempt there.
_SAYS_NOTHING = frozenset(("queued", "hostkey", "running", "closing"))


def printable(text: str) -> str:
    """Return text of a node, or a name, on one line and without a character that a terminal would act on."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _quoted(text: str) -> str:
    """Return `text` in double quotes, without control characters, at most 200 characters of it."""
    shown = text if len(text) <= 200 else text[:197] + "..."
    return '"' + shown.encode("unicode_escape").decode("ascii").replace('"', '\\"') + '"'


def _rebuild(kind: type[NodeError], args: tuple[Any, ...], state: dict[str, Any]) -> NodeError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error
