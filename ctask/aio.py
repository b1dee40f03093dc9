# SPDX-License-Identifier: Apache-2.0
"""Waiting under asyncio: a coroutine that waits for a worker leaves its loop to others, and handlers run meanwhile.

Runs in the thread of the loop, but for what is marked as told: that comes in the dispatcher, in other threads and in
signal handlers, and only posts to the loop. Loaded by the first `await`, since `import ctask` loads no asyncio.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from ctask.mailbox import Mailbox

__all__ = ["wait_until"]

#: Seconds for which handlers have the loop before others have their turn. (One handler may take longer by itself.)
TURN = 0.01


async def wait_until(
    done: Callable[[], bool],
    *,
    mailbox: Mailbox,
    owner: threading.Thread,
    told: list[Callable[[], None]],
) -> None:
    """Wait until `done()`. On a loop of the owner's thread, the task's handlers run meanwhile, each in its turn.

    Args:
        done: quick, and may be asked in any thread.
        mailbox: of the task.
        owner: the task's thread.
        told: what the dispatcher calls when something may have come to be done; used on loops of other threads.

    Raises:
        TaskError: the task has failed, and what is waited for will never come.
    """
    if done():
        return
    if threading.current_thread() is not owner:
        await _told(done, told)
        return
    loop = asyncio.get_running_loop()
    while isinstance(mailbox.notify, _Turns) and mailbox.notify.idle():
        mailbox.notify = mailbox.notify.before
    turns = mailbox.notify
    if not isinstance(turns, _Turns) or turns.loop is not loop:
        turns = mailbox.notify = _Turns(mailbox, loop)
    await turns.wait(done)
    if not done():
        mailbox.check()


class _Turns:
    """Stands in `Mailbox.notify` while coroutines of a loop in the owner's thread wait: a notice makes a turn there.

    It passes each notice on to what stood there before: to the bell, which a call that blocks waits for, or to another
    loop of the same thread. `_asked` is set by who notifies and cleared by the loop *before* it looks, so that what
    comes after that asks anew; two that ask at once cost one idle turn.
    """

    def __init__(self, mailbox: Mailbox, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.before = mailbox.notify
        self._mailbox = mailbox
        self._waiting: dict[asyncio.Future[None], Callable[[], bool]] = {}
        self._asked = False

    def __call__(self) -> None:
        """Any thread, and signal handlers."""
        self.before()
        if self._waiting and not self._asked:
            self._ask()

    def idle(self) -> bool:
        """Whether nobody waits here any more."""
        return not self._waiting or self.loop.is_closed()

    async def wait(self, done: Callable[[], bool]) -> None:
        """Wait until `done()`, or until the task has failed."""
        waiter = self.loop.create_future()
        self._waiting[waiter] = done
        self._ask()  # for what came before this stood here
        try:
            await waiter
        finally:
            self._waiting.pop(waiter, None)
            if not self._waiting and self._mailbox.notify is self:
                self._mailbox.notify = self.before

    def _ask(self) -> None:
        self._asked = True
        try:
            self.loop.call_soon_threadsafe(self._turn)
        except RuntimeError:  # the loop was closed under its coroutines
            self._waiting.clear()

    def _turn(self) -> None:
        self._asked = False
        if not self._waiting:
            return
        more = True
        try:
            more = self._mailbox.turn(TURN)
        finally:  # also when an interrupt comes out of a handler
            for waiter, done in list(self._waiting.items()):
                if not waiter.done() and (done() or self._mailbox.failure is not None):
                    waiter.set_result(None)
            if more:
                self._ask()


async def _told(done: Callable[[], bool], told: list[Callable[[], None]]) -> None:
    """Wait for what another thread's task does; its handlers run there."""
    loop = asyncio.get_running_loop()
    waiter = loop.create_future()

    def tell() -> None:  # dispatcher
        if done():
            try:
                loop.call_soon_threadsafe(_wake, waiter)
            except RuntimeError:  # the loop was closed under its coroutines
                pass

    told.append(tell)
    try:
        if not done():
            await waiter
    finally:
        told.remove(tell)


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
