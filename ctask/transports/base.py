# SPDX-License-Identifier: Apache-2.0
"""The Protocol between a job and the way to its node: sessions *push* what nodes say into sinks.

Nothing here runs. Who calls what: the dispatcher takes and gives back places, prepares, `try_start`s and drops;
the pool's threads connect, start, write and end; the connection's thread calls the sink. Local processes,
SSH, the fake transport of the tests and, later, SFTP are all this one shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from socket import socket
from typing import Protocol

from ctask.buffers import STDERR, STDOUT
from ctask.errors import NodeError
from ctask.options import Command, Stop, Target
from ctask.result import Ending

__all__ = ["PARTS", "STDERR", "STDOUT", "Connection", "Session", "Sink", "Transport"]


class Sink(Protocol):
    """What one session tells; never two calls at once, all from the connection's thread.

    Order: `phase("exec")`, `phase("running")`, then `data` in order of arrival over both streams; `exited` before
    or between the last `data` (an exit status overtakes output); exactly one `ended`, last. Whatever is told is
    followed by a `flush`.
    """

    def phase(self, name: str) -> None:
        """`exec` the moment before the command is sent, `running` with the reply."""

    def data(self, stream: int, chunk: bytes) -> None:
        """Bytes of `STDOUT` or `STDERR`; cheap: an append."""

    def flush(self) -> None:
        """The socket ran dry: what was appended is posted now, once."""

    def may(self, session: Session) -> bool:
        """May the node send more? Asked per half window, perhaps before `start` has returned.

        False: credit is withheld; `session.give()` follows later, from another thread.
        """

    def widen(self, size: int) -> int:
        """Return by how much further ahead the node may send from now on: at most `size` bytes, perhaps none."""

    def writable(self) -> None:
        """After a `write` that took less than all: there is room again."""

    def exited(self, status: int | None, signal: str | None) -> None:
        """The command ended: its status, or the name of the signal without `SIG`."""

    def ended(self, error: NodeError | None) -> None:
        """The session is over.

        Args:
            error: where it ended otherwise than by the node's own close; the job fills in its phase and node. After
                `exited` it tells that the last output may be missing.
        """


class Session(Protocol):
    """One command on a connection, from `Connection.prepare` on."""

    def start(self) -> None:
        """Send the request to open it; may wait (a re-key, a full socket). Pool.

        Returns when it is sent; the command follows from the connection's thread the moment that the open is
        confirmed. Does nothing for one that was dropped. After it, exactly one `ended` is owed, whatever comes:
        a connection that is dead already is told by `ended` (`ConnectionLost`), not raised.
        """

    def try_start(self) -> bool:
        """Start without waiting for anything, or return False and have changed nothing. Dispatcher."""

    def write(self, view: memoryview) -> int:
        """Send bytes of standard input; return how many were taken (0: `sink.writable()` follows). Pool."""

    def close_stdin(self) -> None:
        """Send end of file after what was written. Pool."""

    def give(self) -> None:
        """Give the credit that was withheld. Pool, or the connection's thread."""

    def drop(self) -> bool:
        """Give the session up while its command was not sent. Never waits. Dispatcher.

        True: the command has not been sent and never will be. False: too late, it must be ended.
        """

    def close(self) -> None:
        """Give up what may still come; what runs goes on running. May wait for the socket. Pool."""


class Connection(Protocol):
    """A way to one target that carries sessions."""

    target: Target

    def prepare(self, command: Command, sink: Sink) -> Session:
        """Make a session for `command`; sends nothing, never waits."""

    def end(
        self,
        sessions: Sequence[Session],
        stop: Stop,
        within: float,
        told: Callable[[Session, Ending], None] | None = None,
    ) -> dict[Session, Ending]:
        """End what runs in these sessions on the node, by the policy of `stop`. Pool.

        Returns after `within` seconds at the latest, with what is known of each. What was begun goes on without us:
        the KILL that is due after the grace comes, also where the connection is closed meanwhile. The sessions are
        closed, and the connection is retired where the answer is not `gone`.

        Args:
            told: called in any thread for a session that is gone, perhaps before the others are: nobody waits for
                another one's grace. And, with `alive`, for one in which something was seen that is still there.
        """

    def retire(self) -> None:
        """Take no new sessions; close once every place was given back. Never waits."""


class Transport(Protocol):
    """A kind of way, one object per process, and the connections that it keeps."""

    #: whether a connection begins with a socket that the watcher dials; where it does not, a job starts as soon as
    #: `take` gives it a place, and all that is about dials (`connect`, `keep`, `reserve`, `unreserve`, `fresh=True`)
    #: never comes to pass
    dials: bool
    #: what the watcher sends as soon as such a socket is connected, before `connect` gets it; may be left out
    hello: bytes

    def check(self, target: Target) -> None:
        """Raise `OptionError` in the caller where the target can never work (an unreadable key file). Submit.

        Called once for all targets of a call that differ in nothing but their address.
        """

    def take(self, target: Target) -> Connection | None:
        """Take a place on a kept connection to `target`; None where none has room. Never waits. Dispatcher."""

    def give_back(self, connection: Connection) -> None:
        """Give a place back, with the outcome of the job that had it. Never waits. Dispatcher."""

    def connect(self, target: Target, sock: socket, on_phase: Callable[[str], None]) -> Connection:
        """Make a connection over a socket that is connected, and on which `hello` was sent: handshake, login. Pool.

        Blocks, without a deadline of its own: it ends when `sock` is shut (`shutdown(SHUT_RDWR)`) from
        elsewhere. `on_phase` hears `kex`, `hostkey` and `auth` from this thread. The socket is closed where it
        fails. The connection has no place taken; `keep` makes it one that `take` finds.

        Raises:
            NodeError: the failure, with its phase.
        """

    def keep(self, connection: Connection, *, alone: bool = False) -> None:
        """Add a connection to those that `take` finds; `alone` retires the older ones to its target.

        The reservation of its dial becomes the connection's. Never waits. Dispatcher.
        """

    def disconnect(self, targets: Iterable[Target] | None = None) -> None:
        """Close the kept connections to the addresses and ports of these targets, or all; busy ones after their jobs.

        Never waits. Any thread.
        """

    def reserve(self) -> bool:
        """Take a descriptor for a dial, closing an idle connection for it; False where none can be had.

        Never waits. Dispatcher.
        """

    def unreserve(self) -> None:
        """A dial that was reserved for has ended without a connection. Never waits. Dispatcher."""

    def when_room(self, call: Callable[[], None]) -> None:
        """Call `call` once, from any thread, when `take` or `reserve` may succeed again. Never waits. Dispatcher.

        At once only where something has changed since they did not: who calls back otherwise is asked less often.
        """

    def unreachable(self, target: Target, now: float) -> None:
        """Remember that `target` could not be reached. Dispatcher."""

    def shunned(self, target: Target, now: float) -> bool:
        """Whether `target` could not be reached lately and has not been since: its jobs start last. Submit."""


#: What a transport has, by name; one that keeps no connections can do without `disconnect`. It may have `by_files`
#: besides: True says that its room is bounded by the descriptors that this process may open, which is then told as the
#: reason.
_MAY_LACK = ("disconnect",)
PARTS = ("dials", *sorted(name for name in vars(Transport) if not name.startswith("_") and name not in _MAY_LACK))
