# SPDX-License-Identifier: Apache-2.0
"""`ctask run`: one command on many nodes, from a request to an exit status.

Runs in the main thread, which owns the task: the lines of nodes are written by handlers, and signals end the run.
"""

from __future__ import annotations

import contextlib
import logging
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType

from ctask import Output, Task, task_self
from ctask.cli.arguments import Request
from ctask.cli.feed import Feeder, unread
from ctask.cli.progress import Progress
from ctask.cli.terminal import Terminal, TerminalLog
from ctask.display import account, escape, gathered_blocks, repetition
from ctask.errors import OptionError, UnknownHostKey, UsageError
from ctask.nodes import NodeSet
from ctask.worker import Worker

__all__ = ["run"]

#: Seconds in which a second Ctrl-C ends the run, on a terminal.
AGAIN = 2.0
#: The handlers that a program has which knows nothing of these signals.
_UNTOUCHED = (signal.SIG_DFL, signal.default_int_handler)


class Interrupted(KeyboardInterrupt):
    """A signal that asks the program to end; `status` is what a shell says of it."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.status = 128 + number


def run(request: Request, terminal: Terminal) -> int:
    """Run a command as asked, tell how it went, and return the exit status.

    Raises:
        UsageError: it cannot be right; nothing was sent.
        SystemExit: standard output cannot be written to any more; what ran was ended.
    """
    if request.stdin and sys.stdin is None:
        raise OptionError("--stdin: standard input is closed")
    raise_descriptor_limit()
    log = TerminalLog(terminal)
    logger = logging.getLogger("ctask")
    logger.addHandler(log)
    try:
        return _Run(request, terminal, task_self()).status()
    finally:
        logger.removeHandler(log)


class _Run:
    """One command, its worker, and who has said something."""

    def __init__(self, request: Request, terminal: Terminal, task: Task) -> None:
        self._request = request
        self._terminal = terminal
        self._task = task
        self._printed: set[str] = set()
        self._missing_told = False
        self._asked_at = -AGAIN
        # Whether standard input may still be told of: once.
        self._stdin_minded = request.stdin_minded
        self._refuse_untouched_file()
        self._worker = self._schedule()

    def _schedule(self) -> Worker:
        request = self._request
        if request.fanout is not None:
            self._task.set_info("fanout", request.fanout)
        # What is shown as it comes need not be kept; what is gathered is read when all is over. With -b it is standard
        # output alone that is gathered, and standard error is shown as it comes.
        worker = self._task.shell(
            request.command,
            nodes=request.nodes,
            expect=request.expect,
            stdin=request.stdin,
            gather=request.gather,
            stderr=not request.errors,
            **request.options,
        )
        worker.handlers.errors_only = request.gather
        return worker if request.errors else worker.on("read", self._show)

    def _show(self, worker: Worker, node: str, sname: str, line: Output) -> None:
        """Write one line of a node."""
        self._printed.add(node)
        write = self._terminal.err if sname == "stderr" else self._terminal.out
        write(f"{node}: {escape(line, raw=self._request.raw)}\n")

    def status(self) -> int:
        """Run it to its end, tell of it, and return the exit status."""
        self._mention_stdin()
        if self._request.options.get("host_key_policy") == "insecure-ignore":
            nodes = self._worker.nodes
            self._terminal.say(f"ctask: host keys of {nodes} are NOT verified: StrictHostKeyChecking no (-o)")
        ended = self._wait()
        if self._request.gather:
            for block in gathered_blocks(self._worker, raw=self._request.raw):
                self._terminal.out(block + "\n")
        if ended is not None:
            status, why = ended.status, ""
        else:
            status, why = self._exit_status()
        self._tell(status, why)
        return status

    def _refuse_untouched_file(self) -> None:
        """Raise if standard input is a file that was most probably meant for the command."""
        found = unread() if self._stdin_minded else None
        if found is not None and found.untouched:
            raise UsageError(
                f"standard input is {found.what}, and no node would get it: --stdin sends it to the command, -n runs "
                "the command without it. Nothing was run"
            )

    def _mention_stdin(self) -> None:
        """Tell, once, of standard input that no node gets; a pipe can be that of the loop that runs this program."""
        found = unread() if self._stdin_minded else None
        if found is not None:
            self._stdin_minded = False
            what = f"standard input is {found.what} with data that no node gets"
            self._terminal.say(f"ctask: {what}; --stdin sends it, -n keeps this quiet")

    def _wait(self) -> Interrupted | None:
        """Wait until every node has its outcome; return what ended the run before."""
        with _signals(self._is_to_end), Progress(self._worker, self._terminal):
            if self._request.stdin:
                Feeder(self._worker, self._terminal).start()
            try:
                self._task.resume()
            except Interrupted as interrupted:
                return interrupted
        return None

    def _is_to_end(self, number: int) -> bool:
        """Say who has not ended; return whether a signal ends the run. In its handler, before anything is ended.

        On a terminal the first Ctrl-C only tells: who looks on may want to wait for the last nodes.
        """
        missing = self._worker.pending
        told = f"{missing} ({len(missing)} of {len(self._worker)})"
        now = time.monotonic()
        if number == signal.SIGINT and self._terminal.watched and missing and now - self._asked_at > AGAIN:
            self._asked_at = now
            self._terminal.say(f"ctask: waiting for {told}; Ctrl-C again within {AGAIN:g} s ends them")
            return False
        if missing and not self._missing_told:
            self._missing_told = True
            self._terminal.say(f"ctask: interrupted, without {told}")
        return True

    def _exit_status(self) -> tuple[int, str]:
        """Return the exit status, and the text that stands beside it."""
        if not self._request.max_status:
            return self._worker.exit_code(), ""
        results = [job.result for job in self._worker.jobs]
        largest = max(255 if result is None or result.rc is None else result.rc for result in results)
        if largest <= 255:
            return largest, ""
        # SSH carries 32 bits, and the system takes the last eight of what a program exits with: 256 would be 0.
        return 255, f" (the largest status is {largest})"

    def _tell(self, status: int, why: str) -> None:
        """Tell how it went, unless there is nothing to tell and nobody who looks on."""
        terminal, worker = self._terminal, self._worker
        self._mention_stdin()  # its writer may have been slow
        if self._request.gather:
            self._printed.update(job.node for job in worker.jobs if job.capture is not None and job.capture.total)
        text = account(worker, prefix="ctask: ", notes=True, repeat=self._request.repeat, printed=self._printed)
        if "\n" in text or status or terminal.watched:
            terminal.say(text)
        results = [job.result for job in worker.jobs]
        unknown = [one.node for one in results if one is not None and isinstance(one.error, UnknownHostKey)]
        if unknown:
            repeat = self._request.repeat.removesuffix("-w") + "-o StrictHostKeyChecking=accept-new -w"
            terminal.say(
                "ctask: compare unknown host keys with what the nodes' consoles show; to add them then:\n"
                f"         {repetition(repeat, NodeSet.fromlist(unknown))}"
            )
        if status:
            terminal.say(f"ctask: exit {status}{why}")


def raise_descriptor_limit() -> None:
    """Let this process open as many files as it may: connections are files. Programs keep what they have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # "unlimited" can be more than the kernel takes
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextlib.contextmanager
def _signals(ends: Callable[[int], bool]) -> Iterator[None]:
    """Have Ctrl-C, TERM and a hang-up end the run, while the block lasts; who ignores them goes on to (`nohup`)."""

    def interrupt(number: int, _: FrameType | None) -> None:
        if ends(number):
            raise Interrupted(number)

    taken = [one for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) in _UNTOUCHED]
    before = {one: signal.signal(one, interrupt) for one in taken}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
