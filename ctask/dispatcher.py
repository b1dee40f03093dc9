# SPDX-License-Identifier: Apache-2.0
"""The dispatcher: one thread per task, through which everything that happens to its jobs passes, one at a time.

It takes posts from one queue, and deadlines from one heap; after each batch it asks the plan what is to be done and
carries that out. It never waits: not for a node, nor for a lock under which anybody sends, waits or calls out.
What it calls (jobs, connections in the making) is handed to it; it knows none of their rooms.

A deadline that is noticed late says nothing about a node: this process may have stood still, and what the node said
lies in a socket. So before one is judged that is late, the threads that read take what has come (`settle`).

When it ends (it was stopped, or by an error that is no `Exception`, or by one of the plan's), `_over` is set *before*
the queue is emptied for the last time, and who posts looks at it *after* posting: each post is carried out or returned.
Posts are returned in one thread at a time: `_returning` is only ever tried, and who had it looks again after it.
"""

from __future__ import annotations

import heapq
import logging
import queue
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from ctask.standstill import TICK, Standstills, standstills
from ctask.threads import begin

__all__ = ["LATE", "Deadline", "Dispatcher", "Post", "Subject"]

log = logging.getLogger("ctask.dispatcher")

#: Posts that are carried out between two looks at deadlines and plan: a flood of one node must not hold up either.
BATCH = 200
#: Seconds by which a deadline is late when what has come is let in first: more than a thread waits for its turn.
LATE = 0.05
#: Seconds that this may take at most, since a flood never ends; the second after a standstill.
SETTLE = (0.25, 1.0)


class Subject(Protocol):
    """Whom a post or a deadline is for."""

    def broken(self, error: Exception) -> None:
        """Carrying it out raised: end with that error."""


#: Whom it is for, the call, and its arguments.
Post = tuple[Subject | None, Callable[..., object], tuple[Any, ...]]


class Deadline:
    """A call at a time; `cancel()` it in the dispatcher."""

    __slots__ = ("_heap", "args", "call", "lost", "subject", "when")

    def __init__(
        self,
        heap: _Heap,
        when: float,
        subject: Subject | None,
        call: Callable[..., object],
        args: tuple[Any, ...],
        lost: float | None = None,
    ) -> None:
        self._heap = heap
        self.when = when
        #: seconds lost in standstills until it was made, where such do not count for it
        self.lost = lost
        self.subject = subject
        self.call: Callable[..., object] | None = call
        self.args = args

    def cancel(self) -> None:
        """Forget the call; doing it twice, or after it was made, is harmless."""
        if self.call is not None:
            self.call = None
            self.subject = None
            self.args = ()
            self._heap.cancelled()


class _Heap:
    """Deadlines by time. Cancelled ones stay until they come up, or until they are the most of it."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Deadline]] = []
        self._count = 0
        self._dead = 0

    def push(self, deadline: Deadline) -> None:
        self._count += 1
        heapq.heappush(self._heap, (deadline.when, self._count, deadline))

    def cancelled(self) -> None:
        self._dead += 1
        if self._dead > 64 and self._dead * 2 > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[2].call is not None]
            heapq.heapify(self._heap)
            self._dead = 0

    def next(self) -> float | None:
        """Return when the earliest is due."""
        while self._heap and self._heap[0][2].call is None:
            heapq.heappop(self._heap)
            self._dead = max(0, self._dead - 1)
        return self._heap[0][0] if self._heap else None

    def pop_due(self, now: float) -> Deadline | None:
        due = self.next()
        return heapq.heappop(self._heap)[2] if due is not None and due <= now else None

    def __len__(self) -> int:
        return len(self._heap)


class Dispatcher:
    """The thread and its queue.

    Guarantees: posts are carried out in the order in which they were put, in one thread; a deadline that passes
    becomes a post, behind those that are queued already, so that an end that was posted first stands. What a
    carried-out call raises ends its subject; nothing is swallowed. An error that is no `Exception`, and whatever
    the plan raises, ends the thread: `returned` hears of every post that was not carried out, `died` of the error.

    Args:
        name: of the thread.
        step: asks the plan and carries out its actions; given the time.
        due: when the plan wants to be asked again though nothing happened.
        clock: monotonic seconds; the one place where a task takes its time.
        returned: given each post that is not carried out, one at a time: in the thread that ends, later in one that
            posts. What it raises is logged.
        died: given the error that the thread ends by, where it is one, while nothing else is returned.
        dead: given the same, when what was posted meanwhile has been returned; the thread's last act.
        settle: given a call, has the threads that read take all that has come, and makes the call then, in any thread.

    Attributes:
        error: what the thread has ended by; None: it has not, or it was stopped.
        lost: seconds in which this process stood still while deadlines ran; the dispatcher's.
    """

    def __init__(
        self,
        name: str,
        step: Callable[[float], None],
        due: Callable[[], float | None],
        clock: Callable[[], float] = time.monotonic,
        *,
        died: Callable[[BaseException], object] = lambda error: None,
        dead: Callable[[BaseException], object] = lambda error: None,
        returned: Callable[[Post], object] = lambda post: None,
        settle: Callable[[Callable[[], None]], None] = lambda call: call(),
    ) -> None:
        # SimpleQueue.put is reentrant: posting is safe in signal handlers and in destructors.
        self._queue: queue.SimpleQueue[Post] = queue.SimpleQueue()
        self._heap = _Heap()
        self._step = step
        self._due = due
        self._died = died
        self._dead = dead
        self._returned = returned
        self._settle = settle
        self.clock = clock
        # A clock that is set by hand says nothing about the process.
        self._standstills = standstills if clock is time.monotonic else Standstills()
        self._ticking = False
        self._noticed = 0.0
        self.lost = 0.0
        # Until when deadlines wait for what has come, and what else does; the count tells one such time from the next.
        self._settling: float | None = None
        self._settled = 0
        self._in_at = clock() - LATE
        self._behind: list[Post] = []
        self.error: BaseException | None = None
        self._stopped = False
        self._over = False
        self._returning = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread.

        Raises:
            NoThread: this process can have no more of them.
        """
        begin(self._thread)

    @property
    def ident(self) -> int | None:
        """Identifier of the thread."""
        return self._thread.ident

    def post(self, subject: Subject | None, call: Callable[..., object], *args: Any) -> None:
        """Have `call(*args)` carried out. Any thread; never waits."""
        self._queue.put((subject, call, args))
        if self._over:
            self._return_posts()

    def at(self, when: float, subject: Subject | None, call: Callable[..., object], *args: Any) -> Deadline:
        """Have `call(*args)` carried out at `when` (monotonic seconds). Dispatcher."""
        deadline = Deadline(self._heap, when, subject, call, args)
        self._heap.push(deadline)
        return deadline

    def after(self, seconds: float, subject: Subject | None, call: Callable[..., object], *args: Any) -> Deadline:
        """Have `call(*args)` carried out in so many seconds, not counting those in which the process stood still.

        For what depends on an exchange with a node: neither side could go on meanwhile. Dispatcher.
        """
        deadline = Deadline(self._heap, self.clock() + seconds, subject, call, args, self.lost)
        self._heap.push(deadline)
        return deadline

    def behind(self, subject: Subject | None, call: Callable[..., object], *args: Any) -> None:
        """Have `call(*args)` carried out behind all that has come from nodes by now. Dispatcher."""
        self._behind.append((subject, call, args))
        self._let_in(self.clock(), SETTLE[0])

    def stop(self) -> None:
        """End the thread after what is queued. Any thread."""
        self.post(None, self._stop)

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the thread's end; return whether it has ended."""
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def alive(self) -> bool:
        """Whether posts are carried out."""
        return self._thread.is_alive()

    def _stop(self) -> None:
        self._stopped = True

    def _run(self) -> None:
        try:
            while not self._stopped:
                self._turn()
        except BaseException as error:  # noqa: BLE001 (nobody is above: whoever waits has to be told)
            self.error = error
        self._tick(False)
        for post in self._behind:
            self._queue.put(post)
        try:
            # What is posted meanwhile is left in the queue: the thread that posts finds this one at it.
            with self._returning:
                self._over = True
                self._hand_back()
                if self.error is not None:
                    self._die(self.error)
            self._return_posts()
        finally:
            if self.error is not None:
                self._dead(self.error)

    def _turn(self) -> None:
        post = self._next()
        self._look(self.clock())
        count = 0
        while post is not None:
            self.carry_out(post[0], post[1], *post[2])
            count += 1
            if count >= BATCH or self._stopped:
                break
            try:
                post = self._queue.get_nowait()
            except queue.Empty:
                break
        del post  # what it holds is not to live until the next one
        now = self.clock()
        self._expire_due(now)
        # A plan that has raised has lost jobs on the way: going on would leave them waiting for ever.
        self._step(now)

    def _look(self, now: float) -> None:
        """Notice that the process stood still."""
        if self._ticking and (noticed := self._standstills.look(now)) != self._noticed:
            self.lost += noticed - self._noticed
            self._noticed = noticed
            self._let_in(now, SETTLE[1])

    def _let_in(self, now: float, most: float) -> None:
        """Have deadlines wait until what has come from nodes is posted."""
        if self._settling is not None:
            return
        self._settling, self._in_at = now + most, now
        self._settled += 1
        try:
            self._settle(partial(self.post, None, self._let_go, self._settled))
        except Exception:
            log.exception("%s: what has come could not be asked for", self._thread.name)
            self._let_go(self._settled)

    def _let_go(self, number: int) -> None:
        if self._settling is not None and number == self._settled:
            self._settling = None
            behind, self._behind = self._behind, []
            for post in behind:
                self._queue.put(post)

    def _expire_due(self, now: float) -> None:
        """Put the deadlines that have passed behind what is queued."""
        if self._settling is not None and now >= self._settling:
            self._let_go(self._settled)
        due = self._heap.next()
        if due is not None and now - due > LATE and self._in_at < due:
            self._let_in(now, SETTLE[0])
        while self._settling is None and (deadline := self._heap.pop_due(now)) is not None:
            self._queue.put((deadline.subject, self._expire, (deadline,)))

    def _die(self, error: BaseException) -> None:
        try:
            log.critical("%s ends by an error", self._thread.name, exc_info=error)
        finally:
            self._died(error)

    def _return_posts(self) -> None:
        """Hand back what is queued, unless a thread is at it, which then sees what was put in meanwhile."""
        while not self._queue.empty() and self._returning.acquire(blocking=False):
            try:
                self._hand_back()
            finally:
                self._returning.release()

    def _hand_back(self) -> None:
        while True:
            try:
                post = self._queue.get_nowait()
            except queue.Empty:
                return
            try:
                self._returned(post)
            except Exception:
                log.exception("handing back %r failed", post[1])
            del post

    def _next(self) -> Post | None:
        """Wait for a post, at most until something else is due."""
        due = self._heap.next() if self._settling is None else self._settling
        times = [when for when in (due, self._due()) if when is not None]
        self._tick(bool(times))
        try:
            if not times:
                return self._queue.get()
            left = min(min(times) - self.clock(), TICK)
            return self._queue.get(timeout=left) if left > 0 else self._queue.get_nowait()
        except queue.Empty:
            return None

    def _tick(self, ticking: bool) -> None:
        """Say whether this thread looks at the clock while it waits: only while there is something to wait for."""
        if ticking != self._ticking:
            self._ticking = ticking
            if ticking:
                now = self.clock()
                self._standstills.begin(now)
                self._noticed = self._standstills.look(now)
            else:
                self._standstills.end()

    def _expire(self, deadline: Deadline) -> None:
        if deadline.lost is not None and deadline.call is not None:
            more = self.lost - deadline.lost
            if more > 0:
                deadline.when, deadline.lost = deadline.when + more, self.lost
                self._heap.push(deadline)
                return
        call, args = deadline.call, deadline.args
        if call is not None:  # not cancelled while it stood in the queue
            deadline.call = None
            call(*args)

    def carry_out(self, subject: Subject | None, call: Callable[..., object], *args: Any) -> None:
        """Make a call; what it raises is logged and ends its subject, and nobody else. Dispatcher."""
        try:
            call(*args)
        except Exception as error:
            log.error("carrying out %r failed", getattr(call, "__qualname__", call), exc_info=True)
            if subject is not None:
                try:
                    subject.broken(error)
                except Exception:
                    log.critical("%r could not be ended", subject, exc_info=True)
