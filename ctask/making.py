# SPDX-License-Identifier: Apache-2.0
"""One connection in the making: dialed by the watcher, shaken hands with by the pool, awaited by jobs.

All methods run in the dispatcher, but for those that say otherwise: these only post.
"""

from __future__ import annotations

import socket
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ctask.errors import ConnectError, Curable, LocalResource, NodeError
from ctask.errors.text import told
from ctask.options import Target
from ctask.plan import Making, Stage
from ctask.runtime import Runtime
from ctask.threads import NO_THREAD, NoThread
from ctask.transports.base import Connection, Transport
from ctask.transports.watcher import Dial, watcher

if TYPE_CHECKING:
    from ctask.job import Job  # noqa: F401 (the parameter of the base class)

__all__ = ["ConnectionMaking"]


class ConnectionMaking(Making["Job"]):
    """A connection in the making.

    It has no deadline: each job leaves at its own, and the last one to leave cancels it.
    """

    def __init__(self, run: Runtime, way: Transport, target: Target) -> None:
        super().__init__(target)
        self._run = run
        self._transport = way
        self._dial: Dial | None = None
        self._sock: socket.socket | None = None
        # Whether a thread of the pool has come to it; that thread's.
        self._begun = False
        # Whether the descriptor that the plan reserved for the dial is still ours to give back.
        self._reserved = True
        #: it waits for its turn at an address that answers others: that is not the jobs' time to connect
        self.held_back = False
        #: where it is, in the words of `ctask.states.PHASES`; `queued` while it waits for its slot
        self.where = "queued"
        # Phases that other threads have come to, with their times. They are not posts: a cold connection would make
        # five, and nothing follows from them but what timings and errors say.
        self._stamps: deque[tuple[str, float]] = deque()

    # -- what the plan says ----------------------------------------------------------------------------------

    def dial(self) -> None:
        """Begin to connect."""
        hello = getattr(self._transport, "hello", b"")
        try:
            # What is made once for the process comes first, before threads of the pool and of the resolver.
            getattr(self._transport, "prepare", _nothing)()
            self._dial = watcher().dial(self.target.address, self.target.port, self, hello)
        except NoThread as error:
            self.broken(error)
        except OSError as error:
            text = f"no descriptor left to begin with: {error.strerror}"
            self._failed(LocalResource(text, phase=self.where, curable=Curable.BUSY))

    def shake(self, now: float) -> None:
        """There is a slot: shake hands."""
        sock = self._dial.take() if self._dial is not None else None
        self._dial = None  # it is over, or about to say so
        if sock is None:
            self._hung_up()
            return
        self._sock = sock
        self._enter("banner", now)
        for job in self.jobs:
            job.clock.run(now)
        self._run.work(self._connect, sock)

    def returned(self, call: Callable[..., object], args: tuple[Any, ...]) -> None:
        """A post of its own comes back from a dispatcher that has ended: leave nothing of what it brought.

        In the thread that the engine returns posts in; its jobs have their end from the engine.
        """
        if call == self._made:
            self._reserved, self._sock = False, None
            self._transport.keep(args[0])
        elif call in (self._failed, self._hung_up):
            self._unreserve()

    def cancel(self) -> None:
        """Nobody waits any more: break it off. The plan has let go of it."""
        if self._sock is not None:
            self._break(self._sock)
        elif self._dial is not None:
            self._dial.drop()
            self._dial = None  # they hold each other
            self._unreserve()
        else:  # it was not begun, or has told its end already
            self._unreserve()

    def _break(self, sock: socket.socket) -> None:
        # The pool's thread, or the connection's, is in a read of it, or will be, and wakes with an error. Who closes it
        # is that thread: its number could be another's descriptor by now.
        try:
            sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the peer was quicker

    def broken(self, error: Exception) -> None:
        """Something in here raised, or no thread can be started: the jobs that wait end with it."""
        if self._sock is not None:
            self._break(self._sock)
            if not self._begun:
                self._sock.close()  # no thread has come to it, or ever will
        if isinstance(error, NoThread):
            self._failed(LocalResource(NO_THREAD, phase=self.where, curable=Curable.BUSY))
        else:
            self._failed(LocalResource(f"ctask failed: {told(error)}", phase=self.where))

    # -- the watcher's listener: called in the watcher's thread --------------------------------------------------

    def phase(self, name: str) -> None:
        """The dial has come to `resolve`, `tcp` or `banner`. The handshake says it from the pool's thread."""
        self._stamps.append((name, time.monotonic()))

    def spoke(self) -> None:
        """The server's first byte is there."""
        self._run.post(self, self._spoke)

    def failed(self, error: NodeError) -> None:
        """There will be no connection."""
        self._run.post(self, self._failed, error)

    def hung_up(self) -> None:
        """The server went away while it waited for its slot."""
        self._run.post(self, self._hung_up)

    def held(self, waits: bool) -> None:
        """The dial waits for its turn, or does no longer."""
        self._run.post(self, self._held, waits)

    # -- the pool's ------------------------------------------------------------------------------------------

    def _connect(self, sock: socket.socket) -> None:
        self._begun = True
        try:
            connection = self._transport.connect(self.target, sock, self.phase)
        except NodeError as error:
            _let_go(error)
            self._run.post(self, self._failed, error)
        except Exception as error:  # noqa: BLE001 (whose ever it is, it must not leave the jobs waiting)
            failure = ConnectError(f"the handshake failed: {told(error)}", phase=self.where)
            failure.__cause__ = error
            self._run.post(self, self._failed, failure)
        else:
            self._run.post(self, self._made, connection)

    # -- facts -----------------------------------------------------------------------------------------------

    def _enter(self, name: str, now: float) -> None:
        if self.stage is Stage.OVER or name == self.where:
            return
        self.where = name
        for job in self.jobs:
            job.timeline.enter(name, now)

    def _unreserve(self) -> None:
        if self._reserved:
            self._reserved = False
            self._transport.unreserve()

    def catch_up(self) -> None:
        """Enter the phases that other threads have stamped."""
        while self._stamps:
            self._enter(*self._stamps.popleft())

    def now_in(self) -> str:
        """Return where it is. Any thread; of a moment ago."""
        try:
            return self._stamps[-1][0]
        except IndexError:
            return self.where

    def _spoke(self) -> None:
        if self.stage is not Stage.DIALING:
            return
        self.catch_up()
        now = self._run.dispatcher.clock()
        self._enter("queued", now)
        for job in self.jobs:
            job.clock.pause(now)
        self._run.plan.spoke(self)

    def _held(self, waits: bool) -> None:
        if self.stage is not Stage.DIALING:
            return
        self.held_back = waits
        now = self._run.dispatcher.clock()
        for job in self.jobs:
            if waits:
                job.clock.pause(now)
            else:
                job.clock.run(now)

    def _hung_up(self) -> None:
        if self.stage not in (Stage.SPOKE, Stage.SHAKING):
            return
        self._dial = None
        self.catch_up()
        now = self._run.dispatcher.clock()
        self._unreserve()
        for job in self.jobs:
            job.left_making(now)
        self._run.plan.hung_up(self)

    def _failed(self, error: NodeError) -> None:
        if self._sock is None and self.stage is Stage.OVER:
            return  # dropped while the watcher's word was under way: cancel() has seen to the rest
        self._dial = None
        self._unreserve()
        if self.stage is Stage.OVER:
            return
        self.catch_up()
        self._transport.unreachable(self.target, self._run.dispatcher.clock())
        jobs = list(self.jobs)
        self._run.plan.over(self)
        self.jobs.clear()
        error.phase = error.phase or self.where
        for number, job in enumerate(jobs):
            # One whose end raises keeps none of the others from theirs.
            self._run.dispatcher.carry_out(job, job.not_connected, error if number == 0 else error.copy())

    def _made(self, connection: Connection) -> None:
        # Also when nobody waits any more: it stands, and the next one may use it.
        self._reserved = False  # it is the connection's now
        self._transport.keep(connection, alone=any(job.fresh for job in self.jobs))
        if self.stage is Stage.OVER:
            return
        self.catch_up()
        now = self._run.dispatcher.clock()
        for job in self.jobs:
            job.left_making(now, connection)
            job.fresh = False
        self._run.plan.made(self)


def _nothing() -> None:
    """Prepare a transport that needs nothing."""


def _let_go(error: NodeError) -> None:
    """Drop what the frames of a failure hold: who keeps the error must not keep its connection and its worker."""
    error.__traceback__ = None
    cause = error.__cause__ or error.__context__
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__
