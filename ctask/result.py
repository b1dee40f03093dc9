# SPDX-License-Identifier: Apache-2.0
"""What a job came to: frozen records, made by the dispatcher, read by anybody.

A `NodeResult` reads its output from the BufferStore when asked, so that a thousand results with the same megabyte
are one copy; it keeps its own chain of blocks and outlives the run.
"""

from __future__ import annotations

import signal as signals
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ctask.buffers import Capture, Look, Output
from ctask.errors import CommandFailed, NodeError
from ctask.errors.text import printable
from ctask.nodes import NodeSet
from ctask.states import Outcome

__all__ = [
    "Account",
    "Attempt",
    "Ending",
    "Group",
    "NodeResult",
    "RemoteProcess",
    "Timings",
    "processes_text",
    "signal_number",
    "status_text",
]


class Timings(Mapping[str, float]):
    """Seconds by phase, which sum to the whole.

    Attributes:
        first_byte: seconds from the start to the first byte of output; None where none came.
    """

    __slots__ = ("_spent", "first_byte")

    def __init__(self, spent: Mapping[str, float], first_byte: float | None = None) -> None:
        self._spent = dict(spent)
        self.first_byte = first_byte

    def __getitem__(self, phase: str) -> float:
        return self._spent[phase]

    def __iter__(self) -> Iterator[str]:
        return iter(self._spent)

    def __len__(self) -> int:
        return len(self._spent)

    @property
    def total(self) -> float:
        """Seconds from submission to outcome."""
        return sum(self._spent.values())

    def __repr__(self) -> str:
        return "Timings(" + ", ".join(f"{k}={v:.3f}" for k, v in self._spent.items()) + ")"


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try of a job.

    Attributes:
        phase: in which it ended.
        error: that ended it, or None.
        timings: of it alone; for a try that follows another one, `queued` begins with the wait between the two.
        rc: exit status, as `NodeResult.rc` has it.
    """

    phase: str
    error: NodeError | None
    timings: Timings
    rc: int | None = None


@dataclass(frozen=True, slots=True)
class RemoteProcess:
    """A process that was seen on a node after it was told to end.

    Attributes:
        pid: its number there.
        name: of its program, as the kernel has it (at most 15 characters); what a node says, not fit for a terminal.
        state: letter of proc(5): `D` waits for a device or a file server and cannot be killed.
        waits_in: the kernel's function that it waits in, where the node tells it, else empty.
    """

    pid: int
    name: str = ""
    state: str = ""
    waits_in: str = ""

    def told(self, *, pid: bool = True, word: str = "") -> str:
        """Return what was seen of it, on one line: ``pid 4711 "df", D in ll_statfs``.

        Args:
            pid: with its number; without, processes of many nodes read the same.
            word: what stands before its state.
        """
        parts = [f"pid {self.pid} "] * pid + [f'"{printable(self.name)}"'] * bool(self.name)
        seen = f", {word}{printable(self.state)}" if self.state else ""
        where = f" in {printable(self.waits_in)}" if seen and self.waits_in else ""
        return ("".join(parts).strip() or "a process") + seen + where


@dataclass(frozen=True, slots=True)
class Ending:
    """What became of a session that ctask ended.

    Attributes:
        state: `gone` (only by the node's own word), `alive` (seen in `processes`), `left` (on purpose) or `unknown`.
        ended: how many processes were told to end, where that is known.
        processes: what was still there when it was last looked at.
    """

    state: str
    ended: int | None = None
    processes: tuple[RemoteProcess, ...] = ()

    @property
    def gone(self) -> int | None:
        """How many of those that were told to end are there no more, where that is known."""
        if self.ended is None or self.state not in ("gone", "alive"):
            return None
        return max(0, self.ended - len(self.processes))

    def told(self) -> str:
        """Return what was seen, where something was still there; else nothing: one line, ready for a terminal.

        ``Ended: 2 processes. Still there: pid 4711 "df", state D in ll_statfs (cannot be killed).``
        """
        if not self.processes:
            return ""
        seen = [
            process.told(word="state ") + (" (cannot be killed)" if process.state == "D" else "")
            for process in self.processes
        ]
        ended = f"Ended: {processes_text(self.gone)}. " if self.gone else ""
        return f"{ended}Still there: {'; '.join(seen)}."


@dataclass(frozen=True, slots=True)
class Group:
    """Nodes to which the same happened.

    Attributes:
        nodes: the nodes.
        shown: what each of them printed, or where it is to be read when `output` is asked for.
        rc: exit status; 128 + n after a signal; 255 for UNREACHED and LOST; None for TIMEOUT and ABORTED.
        outcome: None for nodes whose job has not ended.
        why: one line for what is not a plain exit, else empty.
    """

    nodes: NodeSet
    shown: Output | Look
    rc: int | None
    outcome: Outcome | None
    why: str

    @property
    def output(self) -> Output:
        """What each of them printed, as people see it (without the last newline); read anew at each call."""
        return self.shown if isinstance(self.shown, Output) else self.shown.view()

    def __repr__(self) -> str:
        said = self.why or status_text(self.outcome, self.rc)
        size = len(self.shown) if isinstance(self.shown, Output) else self.shown.length()
        return f"<Group {self.nodes} ({len(self.nodes)}) {said}, {size} bytes>"


class Account:
    """What a job has come to, for the error that it ended by; see `NodeError.settle`.

    Args:
        attempts: one for each try; that of the last one is without its error here.
        fields: of the `NodeResult`, all but the attempts and the error.
    """

    __slots__ = ("_attempts", "_fields")

    def __init__(self, attempts: tuple[Attempt, ...], fields: Mapping[str, Any]) -> None:
        *earlier, last = attempts
        self._attempts = (*earlier, replace(last, error=None))
        self._fields = fields

    def attempts(self, error: NodeError) -> tuple[Attempt, ...]:
        """Return the attempts, with the error in its place."""
        *earlier, last = self._attempts
        return (*earlier, replace(last, error=error))

    def result(self, error: NodeError) -> NodeResult:
        """Return the result of a job that ended by this error."""
        return NodeResult(error=error, attempts=self.attempts(error), **self._fields)


class _Kept:
    """The same for an error that its result knows nothing of: it can hold it."""

    __slots__ = ("_result",)

    def __init__(self, result: NodeResult) -> None:
        self._result = result

    def attempts(self, _: NodeError) -> tuple[Attempt, ...]:
        return self._result.attempts

    def result(self, _: NodeError) -> NodeResult:
        return self._result


class NodeResult:
    """How one node's job ended, and what the node printed in its last attempt.

    Attributes:
        node: name of the node, or the key of a local command.
        outcome: one of `Outcome`.
        rc: exit status; 128 + n after signal n; 255 for UNREACHED and LOST; None for TIMEOUT and ABORTED.
        signal: name of the signal that ended the command, without ``SIG``, or None.
        error: the `NodeError` that ended the job, or None.
        ran: True: the command ran; False: it was never sent, and is safe to repeat; None: nobody knows.
        ok: exited with a status in the option `ok_codes`.
        attempts: an `Attempt` for each try.
        ending: the `Ending` of what ctask stopped, with what was seen on the node; None where nothing was stopped.
        lingering: the command exited, and something that it left behind still held its output open.
        truncated: the command exited, and the connection was lost before all of its output had come.

    Immutable; safe in any thread.
    """

    __slots__ = (
        "__weakref__",
        "_capture",
        "attempts",
        "ending",
        "error",
        "lingering",
        "node",
        "ok",
        "outcome",
        "ran",
        "rc",
        "signal",
        "truncated",
    )

    def __init__(
        self,
        *,
        node: Any,
        outcome: Outcome,
        rc: int | None,
        signal: str | None,
        error: NodeError | None,
        ran: bool | None,
        ok: bool,
        attempts: tuple[Attempt, ...],
        capture: Capture | None,
        ending: Ending | None = None,
        lingering: bool = False,
        truncated: bool = False,
    ) -> None:
        self.node = node
        self.outcome = outcome
        self.rc = rc
        self.signal = signal
        self.error = error
        self.ran = ran
        self.ok = ok
        self.attempts = attempts
        self.ending = ending
        self.lingering = lingering
        self.truncated = truncated
        self._capture = capture

    @property
    def stdout(self) -> Output:
        """The exact bytes of standard output."""
        return Output(self._capture.stdout() if self._capture is not None else b"")

    @property
    def stderr(self) -> Output:
        """The exact bytes of standard error."""
        return Output(self._capture.stderr() if self._capture is not None else b"")

    @property
    def output(self) -> Output:
        """The exact bytes of both, in order of arrival."""
        return Output(self._capture.output() if self._capture is not None else b"")

    @property
    def remote_state(self) -> str | None:
        """Of what ctask stopped: `gone`, `alive`, `left` or `unknown`; None where nothing was stopped."""
        return self.ending.state if self.ending is not None else None

    @property
    def timings(self) -> Timings:
        """Of the last attempt."""
        return self.attempts[-1].timings

    @property
    def phase(self) -> str:
        """The phase in which the last attempt ended."""
        return self.attempts[-1].phase

    @property
    def why(self) -> str:
        """One line for what was not a plain success, without the node's name; empty for an exit status of 0."""
        if self.error is not None:
            return self.error.why()
        said = status_text(self.outcome, self.rc, self.signal)
        if self.truncated:
            return f"{said}; connection lost before its last output"
        return "" if self.outcome is Outcome.EXITED and self.rc == 0 else said

    def check(self) -> NodeResult:
        """Return the result itself if it is ok.

        Raises:
            NodeError: what ended the job; `CommandFailed` for a status that is not in `ok_codes`, or a signal.
        """
        if self.error is None and self.ok:
            return self
        try:
            raise self.error.again() if self.error is not None else self._not_ok()
        finally:
            del self  # the error holds this frame

    def _not_ok(self) -> NodeError:
        error = CommandFailed(self.why or "exit 0, which is not in ok_codes", node=self.node, phase="running")
        error.settle(_Kept(self))
        return error

    def __repr__(self) -> str:
        capture = self._capture
        sizes = [0 if s is None else s.total for s in (capture.out, capture.err)] if capture is not None else [0, 0]
        tries = f"{len(self.attempts)} {'try' if len(self.attempts) == 1 else 'tries'}"
        said = self.why or status_text(self.outcome, self.rc, self.signal)
        return (
            f"<NodeResult {printable(str(self.node))} {said}, {sizes[0]} bytes out, {sizes[1]} err, "
            f"{sum(one.timings.total for one in self.attempts):.2f} s, {tries}>"
        )


def status_text(outcome: Outcome | None, rc: int | None, signal: str | None = None) -> str:
    """Return how a command ended, in as few words as possible."""
    if outcome is None:
        return "not ended"
    if outcome is Outcome.EXITED:
        return f"exit {rc}"
    if outcome is Outcome.SIGNALED:
        return f"killed by SIG{printable(signal)}" if signal else "killed by a signal"
    return outcome.lower()


def processes_text(count: int | None) -> str:
    """Return `1 process`, `2 processes`."""
    return "1 process" if count == 1 else f"{count} processes"


def signal_number(name: str) -> int:
    """Return the number of a signal's name without ``SIG``; 0 for one that this system does not know."""
    return getattr(signals.Signals.__members__.get(f"SIG{name}"), "value", 0)
