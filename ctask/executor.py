# SPDX-License-Identifier: Apache-2.0
"""The standard library's Executor, of commands in place of functions.

Used by any thread. One condition guards whether it is shut down and what is on its way; nothing is called under it.
"""

from __future__ import annotations

import concurrent.futures
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, cast

from ctask.errors import CommandError, HandlerError, OptionError, TaskTimeout, UsageError
from ctask.future import Condition, Future
from ctask.nodes import NodeSet, NodesLike
from ctask.numeric import patience
from ctask.result import NodeResult
from ctask.submission import CommandLike, node_set
from ctask.task import Task
from ctask.threads import NoThread, start
from ctask.worker import Worker

__all__ = ["ClusterExecutor"]

#: Seconds that a task's threads have to end after its last job has.
THREADS_WITHIN = 5.0


class ClusterExecutor(concurrent.futures.Executor):
    """A `concurrent.futures.Executor` that runs commands on nodes.

    ::

        with ClusterExecutor(user="root", timeout=30) as executor:
            future = executor.submit("uname -r", node="n7")
            for result in executor.map("uptime", "n[1-40]"):
                print(result.node, result.stdout.text)

    A future resolves to a `NodeResult` whatever the exit status, and raises the `NodeError` of a command that could not
    be run to its end. As everywhere in ctask, `future.cancel()` also ends what runs already.

    Args:
        task: whose options it uses, and whose handlers run as always; it is not closed by `shutdown()`. Without one,
            the executor has a task of its own, with a thread of its own.
        options: of its own task, as for `Task.set_info`: `fanout`, `user`, `timeout` and so on.

    Raises:
        OptionError: no such option, or no such value; or options beside a task, which has its own.

    Thread safety: every method may be called in any thread. In a given task's own thread, what waits runs its handlers.
    """

    def __init__(self, task: Task | None = None, **options: object) -> None:
        if task is not None and options:
            raise OptionError(f"a task that is given has options of its own: set_info() sets {', '.join(options)}")
        self._own = task is None
        self._task = Task() if task is None else task
        try:
            for name, value in options.items():
                self._task.set_info(name, value)
        except OptionError:
            self._task.close()
            raise
        self._changed = Condition()
        # Under the condition: what was started and is still held, which submissions are on their way,
        # and whether there may be new ones.
        self._workers: weakref.WeakSet[Worker] = weakref.WeakSet()
        self._coming: set[object] = set()
        self._shut = False
        self._withdrawn = False
        self._closed = False

    def submit(  # type: ignore[override]  # a command in place of a function and its arguments
        self, command: CommandLike, /, *arguments: object, node: str | NodeSet, **options: Any
    ) -> Future:
        """Start a command on one node; return its future. Never waits.

        Args:
            command: text or bytes for a shell, or a list of words.
            node: its name.
            options: of this call, as for `Task.submit`.

        Raises:
            UsageError: something in it cannot be right (a function, more than one node); nothing was sent.
            RuntimeError: the executor is shut down.
        """
        _check(command, "submit", arguments, options)
        nodes = node_set(node)
        if len(nodes) != 1:
            raise UsageError(f"submit() is for one node, and node={str(node)!r} is {len(nodes)}; map() runs it on many")
        return self._start(command, nodes, options).futures[nodes[0]]

    def map(  # type: ignore[override]  # a command in place of a function
        self,
        command: CommandLike,
        /,
        nodes: NodesLike,
        *arguments: object,
        timeout: float | None = None,
        chunksize: int = 1,
        **options: Any,
    ) -> Iterator[NodeResult]:
        """Start a command on many nodes at once; return an iterator over the results, one per node, in their order.

        A list of names is answered in its own order, so that `zip(names, executor.map(command, names))` is right. As
        the standard's `map`, it raises what a future raises, when its turn comes; commands that have not begun are then
        withdrawn, and so they are when the iterator is dropped. `Worker.results()` goes on, whatever a node does.

        Args:
            nodes: a node set, or names.
            timeout: seconds from this call in which each result must have come.
            chunksize: taken as the standard's, and without an effect.
            options: of this call, as for `Task.submit`; here `timeout` is not the command's: that is an option of the
                executor or its task.

        Raises:
            UsageError: something in it cannot be right; nothing was sent.
            RuntimeError: the executor is shut down.
            TimeoutError: while iterating: a result has not come in time; what runs goes on.
            NodeError: while iterating: a command could not be run to its end.
        """
        _check(command, "map", arguments, options)
        limit = patience("timeout", timeout, past=True)
        until = None if limit is None else time.monotonic() + limit
        if not isinstance(nodes, Iterable):
            raise UsageError(f"nodes is a node set or names of nodes, not {nodes!r}")
        # Read once, and in the order that the caller gave: a group may have other nodes a moment later.
        parts = [node_set(part) for part in ([nodes] if isinstance(nodes, (str, NodeSet)) else nodes)]
        worker = self._start(command, NodeSet.fromlist(parts), options)
        results = _results(worker, [worker.futures[node] for part in parts for node in part], until)
        next(results)  # it has begun: dropping it withdraws what waits, also before it was asked for a result
        return results

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: FBT002 (as the standard's)
        """Take no more commands, and free what the executor holds once the last has ended.

        Args:
            wait: return when all has ended, and the executor's own threads have. Else return at once.
            cancel_futures: withdraw what has not begun. What runs goes on: `future.cancel()` ends it.
        """
        with self._changed:
            self._shut = True
            self._withdrawn = self._withdrawn or cancel_futures
            workers = list(self._workers)
        if cancel_futures:
            for worker in workers:
                worker.withdraw()
        if wait:
            self._finish()
        elif self._own:
            # The end of the last command is to end the task's threads, and somebody has to wait for it.
            try:
                start("ctask/shutdown", self._finish)
            except NoThread:
                self._finish()

    def _finish(self) -> None:
        """Wait for all that was started, then close the task where it is the executor's own."""
        with self._changed:
            self._changed.wait_for(lambda: not self._coming)
            workers = list(self._workers)
        for worker in workers:
            worker.wait()
        if not self._own or threading.current_thread() is self._task.thread:
            return
        with self._changed:
            first, self._closed = not self._closed, True
        if first:
            try:
                if not self._task.failed:
                    self._task.resume()  # so that its handlers hear the rest
                    self._task.join()
            except (HandlerError, TaskTimeout):
                pass  # logged where it happened; the executor is shut down all the same
            finally:
                self._task.close()
                self._task.closing(THREADS_WITHIN)

    def _start(self, command: CommandLike, nodes: NodesLike, options: dict[str, Any]) -> Worker:
        """Let one submission through; what it has started is known before a shutdown goes on."""
        coming = object()
        try:
            return self._let_through(coming, command, nodes, options)
        except BaseException:  # an interrupt at any point: shutdown() does not wait for this one
            self._arrived(coming)
            raise

    def _let_through(
        self, coming: object, command: CommandLike, nodes: NodesLike, options: dict[str, Any]
    ) -> Worker:
        with self._changed:
            if self._shut:
                raise RuntimeError("cannot submit a command after shutdown")
            self._coming.add(coming)
        worker = self._task.submit(command, nodes=nodes, **options)
        if self._arrived(coming, worker):
            worker.withdraw()
        return worker

    def _arrived(self, coming: object, worker: Worker | None = None) -> bool:
        """A submission is on its way no more; return whether the caller withdraws what it has started."""
        with self._changed:
            if worker is not None:
                self._workers.add(worker)
            self._coming.discard(coming)
            self._changed.notify_all()
            return self._withdrawn

    def __repr__(self) -> str:
        return f"<ClusterExecutor{' (shut down)' if self._shut else ''} on {self._task!r}>"


def _check(command: object, what: str, arguments: tuple[object, ...], options: dict[str, Any]) -> None:
    """Refuse what works with other executors, and what belongs to another call, and say what to do."""
    if callable(command):
        raise CommandError(
            f"{what}() of a ClusterExecutor runs a command on a node (text, bytes or a list of words), and "
            f"{command!r} is a function: a ThreadPoolExecutor runs it here"
        )
    if arguments:
        raise CommandError(f"{what}() takes one command: give its words as one list, as in {[command, *arguments]!r}")
    for name in ("nodes", "node", "key"):
        if name in options:
            raise OptionError(f"{what}() takes no {name}=: submit(command, node=…) or map(command, nodes)")


def _results(worker: Worker, futures: Iterable[Future], until: float | None) -> Iterator[NodeResult]:
    try:
        yield cast("NodeResult", None)  # for `map`, which begins it
        for future in futures:
            yield future.result(None if until is None else max(0.0, until - time.monotonic()))
    finally:
        worker.withdraw()
