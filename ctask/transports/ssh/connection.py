# SPDX-License-Identifier: Apache-2.0
"""One SSH connection of the Protocol: how it is made, and what is asked of it afterwards.

`connect` and `end` run in pool threads, `prepare` and `retire` in the dispatcher; `died` in the connection's
thread. `guard` is the small lock of all its sessions; what the pool of connections notes on it is guarded by
that pool's.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import paramiko

from ctask.errors import NodeError
from ctask.options import Command, Stop, Target
from ctask.result import Ending
from ctask.transports.base import Session, Sink
from ctask.transports.ssh import ending, hostkeys, mapping
from ctask.transports.ssh.alive import Pulse
from ctask.transports.ssh.auth import log_in
from ctask.transports.ssh.channel import SshSession
from ctask.transports.ssh.hostkeys import KnownHosts
from ctask.transports.ssh.transport import Link
from ctask.transports.ssh.wire import NoVersion, Wire
from ctask.transports.watcher import Timer

if TYPE_CHECKING:
    from ctask.transports.ssh.pool import ConnectionPool

__all__ = ["SshConnection", "connect"]

#: Seconds that the closing of sessions may wait for the socket.
_CLOSING = 1.0
#: known_hosts has a key's type, a handshake the algorithm of the signature.
_ALGORITHMS = {"ssh-rsa": ("rsa-sha2-512", "rsa-sha2-256")}


class SshConnection:
    """A connection that is logged in.

    Attributes:
        scripts: how many scripts end sessions on it now; `guard` guards it, and `script_over` tells of each end.
        places: jobs that have a place on it; the pool's lock guards it, and the following ones.
        kept: the pool has it.
        retired: it takes no new jobs.
        idle_since: when its last place came back.
        timer: when the pool looks at it next; 0 for never.
        alarm: the watcher's timer for that.
        pulse: whether it lives; the watcher's.
    """

    def __init__(self, pool: ConnectionPool, target: Target, link: Link) -> None:
        self.target = target
        self.link = link
        self.guard = threading.Lock()
        self.scripts = 0
        self.script_over = threading.Condition(self.guard)
        self.places = 0
        self.kept = False
        self.retired = False
        self.idle_since = 0.0
        self.timer = 0.0
        self.alarm: Timer | None = None
        self.pulse = Pulse()
        self._pool = pool

    def __repr__(self) -> str:
        state = "dead" if self.dead else "retired" if self.retired else f"{self.places} jobs"
        return f"<SshConnection to {self.target.user}@{self.target.where()}, {state}>"

    @property
    def dead(self) -> bool:
        """Whether the connection is gone."""
        return self.link.dead

    def prepare(self, command: Command, sink: Sink) -> SshSession:
        """Make a session; sends nothing, never waits."""
        return SshSession(self, command, sink)

    def end(
        self,
        sessions: Sequence[Session],
        stop: Stop,
        within: float,
        told: Callable[[Session, Ending], None] | None = None,
    ) -> dict[Session, Ending]:
        """End what runs in these sessions; see `base.Connection.end`, and `ending.end` for what the states mean."""
        own = [cast("SshSession", session) for session in sessions]
        return ending.end(self, own, stop, within, told)

    def retire(self) -> None:
        """Take no new sessions; close once every place was given back. Never waits."""
        self._pool.retire(self)

    def close(self) -> None:
        """End the connection under whatever is on it. Any thread, never waits; its thread does the rest."""
        self.link.close()

    def died(self) -> None:
        """Leave the pool; the connection's thread, before the sessions are told."""
        self._pool.gone(self)


def connect(
    pool: ConnectionPool, target: Target, sock: socket.socket, on_phase: Callable[[str], None]
) -> SshConnection:
    """Make a connection over a socket on which our version line was sent; see `base.Transport.connect`."""
    making = _Making(pool, target, sock)
    try:
        return making.run(on_phase)
    except NodeError:
        making.undo()
        raise
    except Exception as error:
        making.undo()
        here = mapping.local_resource(error, making.phase)
        if here is None:
            raise
        raise here from error
    except BaseException:
        making.undo()
        raise


class _Making:
    """A connection in the making, and what is to be undone where it fails."""

    def __init__(self, pool: ConnectionPool, target: Target, sock: socket.socket) -> None:
        self.phase = "banner"
        self._pool = pool
        self._target = target
        self._wire = Wire(sock)
        self._link: Link | None = None

    def run(self, on_phase: Callable[[str], None]) -> SshConnection:
        """Go through the phases."""
        version = self._read_version()
        self._enter("kex", on_phase)
        known = self._known_hosts(on_phase)
        link = self._handshake(version, known)
        self._enter("hostkey", on_phase)
        self._verify(link, known)
        self._enter("auth", on_phase)
        log_in(link, self._target)
        connection = SshConnection(self._pool, self._target, link)
        link.on_dead = connection.died
        if not link.hand_over(self._pool.read):
            raise mapping.auth_lost(link.saved_exception, link.farewell[1])
        return connection

    def _enter(self, phase: str, on_phase: Callable[[str], None]) -> None:
        self.phase = phase
        on_phase(phase)

    def _read_version(self) -> str:
        try:
            line = self._wire.read_version()
        except NoVersion as error:
            raise mapping.no_version(error) from error.__cause__
        # 1.99 is how RFC 4253 5.1 writes "2.0, and older ones as well".
        text = line.decode("ascii", "replace")
        if not text.startswith(("SSH-2.0-", "SSH-1.99-")) or not text.isascii() or not text.isprintable():
            raise mapping.wrong_version(line)
        return text

    def _known_hosts(self, on_phase: Callable[[str], None]) -> KnownHosts:
        target = self._target
        try:
            return hostkeys.load(target.known_hosts, named=target.named_known_hosts)
        except Exception as error:
            self._enter("hostkey", on_phase)
            raise mapping.host_key_unchecked(error) from error

    def _handshake(self, version: str, known: KnownHosts) -> Link:
        target = self._target
        types = _key_types(known.key_types(target.address, target.port))
        link = Link(self._wire, version, f"ctask/ssh {target.where()}", types, target.kex_algorithms)
        self._pool.born(link)
        self._link = link
        if not link.handshake():
            raise mapping.handshake_failed(link.saved_exception, link.farewell[1])
        return link

    def _verify(self, link: Link, known: KnownHosts) -> None:
        try:
            known.verify(self._target, link.host_key_type, link.proven_key())
        except NodeError:
            raise
        except Exception as error:
            raise mapping.host_key_unchecked(error) from error

    def undo(self) -> None:
        """Close the socket. Nobody else reads it yet."""
        if self._link is None:
            self._wire.close()
        else:
            self._link.abandon()
            self._pool.unborn(self._link)


def _key_types(known: Sequence[str]) -> tuple[str, ...]:
    """Return the host key algorithms to ask for, first those of the keys that known_hosts has."""
    all_types: tuple[str, ...] = paramiko.Transport._preferred_keys
    first = [name for key_type in known for name in _ALGORITHMS.get(key_type, (key_type,))]
    return tuple(dict.fromkeys([name for name in first if name in all_types] + list(all_types)))
