# SPDX-License-Identifier: Apache-2.0
"""What is to be ended: collected while the dispatcher has its turn, then handed to the pool, once per connection.

`Endings` is the dispatcher's. A `Batch` is one work item of the pool; it posts what it hears and touches no job.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ctask.options import Stop
from ctask.result import Ending
from ctask.standstill import awake
from ctask.transports.base import Connection, Session, Transport

if TYPE_CHECKING:
    from ctask.job import Job

__all__ = ["ABORT_WITHIN", "DEADLINE_WITHIN", "SILENT_WITHIN", "TIMEOUT_WITHIN", "Batch", "Endings", "end_alone"]

#: Seconds after which an aborted job has its outcome, whatever its node says: callers are promised 2.
ABORT_WITHIN = 1.7
#: The same after a deadline, or Ctrl-C: callers are promised 1.
DEADLINE_WITHIN = 0.7
#: The same after `connect_timeout`, where exec went unanswered: there is hardly anything to be learned.
SILENT_WITHIN = 0.5
#: The same after a `timeout`, beyond the grace.
TIMEOUT_WITHIN = 2.0
#: Seconds before the promise at which the ending of a session has to say what it knows.
WORD_BEFORE = 0.1


class Endings:
    """Sessions that are to be ended, until the dispatcher's turn is over.

    Args:
        work: hands a call to the task's pool.
    """

    def __init__(self, work: Callable[..., None]) -> None:
        self._work = work
        self._batches: dict[tuple[int, Stop, float], Batch] = {}

    def add(self, job: Job, connection: Connection, session: Session, stop: Stop, within: float) -> None:
        """Have a job's session ended; those of one connection that are ended alike go together.

        Args:
            within: seconds after which the job's outcome is promised; the ending has to say before what it knows.
        """
        key = (id(connection), stop, within)
        batch = self._batches.get(key)
        if batch is None:
            until = awake() + max(0.0, within - WORD_BEFORE)
            batch = self._batches[key] = Batch(connection, stop, until)
        batch.jobs[session] = job

    def flush(self) -> None:
        """Hand what was collected to the pool."""
        batches, self._batches = self._batches, {}
        for batch in batches.values():
            self._work(batch.end)


class Batch:
    """Sessions of one connection that are ended together.

    Attributes:
        jobs: each session, and whose it is; nothing is added once the pool has it, and all are gone when it is over.
    """

    def __init__(self, connection: Connection, stop: Stop, until: float) -> None:
        self.jobs: dict[Session, Job] = {}
        self._connection = connection
        self._stop = stop
        self._until = until
        self._turn = [None]

    def __repr__(self) -> str:
        return f"<Batch {list(self.jobs.values())}>"

    def end(self) -> None:
        """End them, and tell each job what became of its session. Pool, and the thread that closes the engine."""
        try:
            self._turn.pop()
        except IndexError:
            return  # another thread has come to it first
        told: set[Session] = set()

        def tell(session: Session, ending: Ending) -> None:
            job = self.jobs.get(session)
            told.add(session)
            if job is not None:
                job.run.post(job, job.word, session, ending)

        def hear(session: Session, ending: Ending) -> None:
            job = self.jobs.get(session)
            if job is None:
                return  # a late word: all have been told
            if ending.state == "gone":
                tell(session, ending)
            else:
                job.run.post(job, job.seen, session, ending)

        try:
            within = max(0.0, self._until - awake())
            for session, ending in self._connection.end(tuple(self.jobs), self._stop, within, hear).items():
                if session not in told:
                    tell(session, ending)
        except Exception as error:  # noqa: BLE001 (posted)
            for session, job in self.jobs.items():
                if session not in told:
                    job.run.post(job, job.unended, session, error)
        finally:
            self.jobs = {}  # a connection may hold `hear`, and is kept longer than what was printed

    def broken(self, error: Exception) -> None:
        """No thread can be had for it. Dispatcher."""
        del error
        for job in self.jobs.values():
            job.promised()


def end_alone(way: Transport, connection: Connection, session: Session, stop: Stop) -> None:
    """End the session of a job that has its outcome, and give its place back. Pool."""
    try:
        connection.end((session,), stop, ABORT_WITHIN - WORD_BEFORE)
    finally:
        way.give_back(connection)
