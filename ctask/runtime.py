# SPDX-License-Identifier: Apache-2.0
"""What the jobs of one task share: its dispatcher, plan, gate, mailbox, its pool's threads and the transports.

Made by the Task, read by its jobs in the dispatcher; nothing here changes after it is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ctask.dispatcher import Dispatcher
from ctask.mailbox import Gate, Mailbox
from ctask.plan import Plan
from ctask.transports.base import Connection, Transport

if TYPE_CHECKING:
    from ctask.job import Job
    from ctask.making import ConnectionMaking

__all__ = ["Runtime"]


@dataclass(slots=True, eq=False)
class Runtime:
    """The parts of a task that its jobs use.

    Attributes:
        work: hands a call to the task's pool; it only posts what comes of it.
        transport: returns the transport of that name.
        live: the jobs without an outcome; the dispatcher's.
    """

    dispatcher: Dispatcher
    plan: Plan[Job, ConnectionMaking, Connection]
    gate: Gate
    mailbox: Mailbox
    work: Callable[..., None]
    transport: Callable[[str], Transport]
    live: set[Job] = field(default_factory=set)

    def post(self, subject: Any, call: Callable[..., None], *args: Any) -> None:
        """Have a call carried out by the dispatcher. Any thread."""
        self.dispatcher.post(subject, call, *args)
