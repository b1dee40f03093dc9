# SPDX-License-Identifier: Apache-2.0
"""What the jobs of one task share: its dispatcher, plan, gate, mailbox, its pool's threads and the transports.

Made by the Task, read by its jobs in the dispatcher; nothing here changes after it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ctask.buffers import BufferStore
from ctask.dispatcher import Dispatcher
from ctask.ending import Endings
from ctask.gate import Gate
from ctask.handler import Handlers
from ctask.mailbox import Mailbox
from ctask.plan import Plan
from ctask.transports.base import Connection, Transport

if TYPE_CHECKING:
    from ctask.job import Job
    from ctask.making import ConnectionMaking
    from ctask.result import NodeResult

__all__ = ["Jobs", "Runtime", "Submission"]


class Submission(Protocol):
    """The worker, as far as its jobs are concerned."""

    handlers: Handlers
    last: tuple[str, str, Any]
    last_rc: int | None
    store: BufferStore
    #: stderr is told apart from stdout
    apart: bool
    ok_codes: frozenset[int]

    def starts(self) -> None:
        """Something of it is about to be told: its start comes first. Dispatcher."""

    def began(self, job: Job) -> None:
        """The job is taken up, for the first time. Dispatcher."""

    def ended(self, job: Job, result: NodeResult) -> None:
        """The job has its outcome, and its events are in the mailbox. Dispatcher."""


class Jobs:
    """What a post about several jobs is for: what raises while it is carried out ends them, and so does its return."""

    __slots__ = ("jobs",)

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs

    def broken(self, error: Exception) -> None:
        """Carrying it out raised. Dispatcher."""
        for job in self.jobs:
            job.broken(error)


@dataclass(slots=True, eq=False)
class Runtime:
    """The parts of a task that its jobs use.

    Attributes:
        work: hands a call to the task's pool; it only posts what comes of it.
        transport: returns the transport of that name.
        endings: takes the sessions that are to be ended; the dispatcher's.
        live: the jobs without an outcome; the dispatcher's.
    """

    dispatcher: Dispatcher
    plan: Plan[Job, ConnectionMaking, Connection]
    gate: Gate
    mailbox: Mailbox
    work: Callable[..., None]
    transport: Callable[[str], Transport]
    endings: Endings
    live: set[Job] = field(default_factory=set)

    def post(self, subject: Any, call: Callable[..., None], *args: Any) -> None:
        """Have a call carried out by the dispatcher. Any thread."""
        self.dispatcher.post(subject, call, *args)
