# SPDX-License-Identifier: Apache-2.0
"""What keeps one node's command from running to its end.

Made where it happens, filled in by the job that it ends; any thread.
"""

from __future__ import annotations

import concurrent.futures
import enum
import weakref
from typing import TYPE_CHECKING, Any, Protocol

from ctask.errors.text import printable
from ctask.errors.usage import CtaskError

if TYPE_CHECKING:  # the records stand above this room; only the checker may look up
    from ctask.result import Attempt, NodeResult

__all__ = [
    "Aborted",
    "AuthError",
    "AuthRejected",
    "AuthTimeout",
    "BannerError",
    "CommandFailed",
    "CommandTimeout",
    "ConnectError",
    "ConnectRefused",
    "ConnectTimeout",
    "ConnectionLost",
    "Curable",
    "ExecRefused",
    "HandshakeError",
    "HandshakeTimeout",
    "HostKeyError",
    "HostKeyMismatch",
    "HostKeyRevoked",
    "IdleTimeout",
    "LocalResource",
    "NoCredentials",
    "NodeError",
    "ResolveError",
    "SessionError",
    "SessionRefused",
    "SessionTimeout",
    "UnknownHostKey",
]

#: Phases that say nothing more than the reasons of the errors that end an attempt there.
_SAYS_NOTHING = frozenset(("queued", "hostkey", "running", "closing"))


class Record(Protocol):
    """What a job has come to, but for the error that it ended by."""

    def attempts(self, error: NodeError) -> tuple[Attempt, ...]: ...
    def result(self, error: NodeError) -> NodeResult: ...


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
        result: the `NodeResult` with what had been printed until then; None until the job has ended. An error that
            is all that is kept of a job makes it anew.
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
        # What the job has come to, but for this error. The result holds the error and not the other way round: a ring
        # of the two would keep what was printed until the collector comes by.
        self._record: Record | None = None
        self._result: weakref.ref[NodeResult] | None = None
        super().__init__(self.reason)

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        return self._record.attempts(self) if self._record is not None else ()

    @property
    def result(self) -> NodeResult | None:
        result = self._result() if self._result is not None else None
        if result is None and self._record is not None:
            result = self._record.result(self)
            self._result = weakref.ref(result)
        return result

    def settle(self, record: Record) -> NodeResult:
        """Note what the job has come to; return its result. By the maker of the error."""
        self._record, self._result = record, None
        result = record.result(self)
        self._result = weakref.ref(result)
        return result

    def copy(self) -> NodeError:
        """Return an error of its own with the same class and text, for another node that shares the failure."""
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._result = None  # noqa: SLF001 (of the same class)
        twin.args = self.args
        twin.__cause__ = self.__cause__
        return twin

    def again(self) -> NodeError:
        """Return a copy for raising: the traceback, and the frames in it, are then not kept with the job."""
        twin = self.copy()
        twin._result = self._result  # noqa: SLF001 (of the same class)
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
        return _rebuild, (type(self), self.args, {**self.__dict__, "_result": None})


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


def _rebuild(kind: type[NodeError], args: tuple[Any, ...], state: dict[str, Any]) -> NodeError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error
