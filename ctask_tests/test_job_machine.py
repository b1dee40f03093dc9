# SPDX-License-Identifier: Apache-2.0
"""A job under whatever can happen to it, in any order, over any number of tries: one outcome, and events in order.

A state machine over the fake transport: what a node does, what a user does and what time does are its rules, also of
tries that are over long since. Everything is asynchronous, as it is in a task; what has to hold is asked at the end.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from ctask import (
    CommandTimeout,
    ConnectionLost,
    Curable,
    ExecRefused,
    NodeError,
    Outcome,
    Retry,
    SessionRefused,
    task_self,
)
from ctask.options import Command
from ctask.result import Ending
from ctask.states import ENDS
from ctask.testing import FakeTransport, Step
from ctask.testing.fake import FakeSession
from ctask_tests.fake_nodes import act
from ctask_tests.fix_leaks import wait_until
from ctask_tests.history import History, faults

NODE = "n1"
#: Each byte that a node prints is another one, so that a line says where it stood.
ALPHABET = bytes(range(ord("a"), ord("z") + 1)) + bytes(range(ord("A"), ord("Z") + 1))

#: Time is up when the machine says so.
LIMITS: dict[str, Any] = {"stop_grace": 0, "timeout": 600, "idle_timeout": 600, "deadline": 600}

POLICIES = st.sampled_from(
    (
        None,
        Retry(2, wait=0),
        Retry(3, wait=0.002, idempotent=True),
        Retry(4, wait=0, idempotent=True, exit_codes={75}, on=[NodeError]),
        Retry(2, wait=60, idempotent=True, exit_codes={75}, on=[NodeError]),
        Retry(3, wait=0, on=lambda error: True, idempotent=True),
        Retry(3, wait=0, on=CommandTimeout, idempotent=True, budget=0.05),
    )
)


class JobMachine(RuleBasedStateMachine):
    """One job on one node; each of its tries has a session that does nothing by itself."""

    @initialize(policy=POLICIES, listens=st.booleans(), state=st.sampled_from(("gone", "unknown", "alive", "left")))
    def submit(self, policy: Retry | None, listens: bool, state: str) -> None:
        self.policy = policy
        self.refusals: list[NodeError] = []
        self.fake = FakeTransport(self._script, refuse=self._refuse, end_state=state)
        self.fake.__enter__()
        self.history = History() if listens else None
        self.task = task_self()
        self.sent = 0
        self.worker = self.task.submit("x", nodes=NODE, handler=self.history, retry=policy, **LIMITS)
        self.job = self.worker.jobs[0]
        self.future = self.worker.futures[NODE]
        self.resolved: list[Any] = []
        self.future.add_done_callback(self.resolved.append)

    def _script(self, node: str, command: Command) -> list[Step]:
        self.sent += 1
        return [Step("end", after=600)]

    def _refuse(self, node: str, command: Command) -> NodeError | None:
        return self.refusals.pop() if self.refusals else None

    def _session(self, which: int) -> FakeSession | None:
        """Return the last session, or one before it; None for a job that was taken back before it had one."""
        wait_until(lambda: self.fake.sessions or self.future.done())
        return self.fake.sessions[-1 - which % len(self.fake.sessions)] if self.fake.sessions else None

    def _act(self, which: int, step: Step) -> None:
        session = self._session(which)
        if session is not None:
            act(self.fake, session, step)

    # -- what a node does, the last session mostly, or one that is over -------------------------------------------

    @rule(which=st.sampled_from((0, 0, 0, 1, 2)), what=st.sampled_from(("running", "exit", "end", "exit 75", "signal")))
    def goes_on(self, which: int, what: str) -> None:
        step = Step("exit", status=75) if what == "exit 75" else Step(what, b"KILL")
        self._act(which, step)

    @rule(which=st.sampled_from((0, 0, 1)), stream=st.sampled_from(("out", "err")), count=st.integers(1, 5))
    def prints(self, which: int, stream: str, count: int) -> None:
        self._act(which, Step(stream, b"line\n" * count))

    @rule(which=st.sampled_from((0, 0, 1)))
    def breaks(self, which: int) -> None:
        self._act(which, Step("lost", error=ConnectionLost()))

    @rule(which=st.sampled_from((0, 0, 1)))
    def refuses_the_command(self, which: int) -> None:
        session = self._session(which)

        def refuse() -> None:
            assert session is not None
            if session.sink.running_at is None and session.sink.status is None:  # type: ignore[attr-defined]
                self.sent -= not session.over  # and has not run
                session.end(ExecRefused())

        self._act(which, Step("call", call=refuse))

    @rule(curable=st.sampled_from(list(Curable)))
    def will_refuse_the_next_session(self, curable: Curable) -> None:
        self.refusals.append(SessionRefused("no room", curable=curable))

    # -- what a user does, and time -------------------------------------------------------------------------------

    @rule(how=st.sampled_from(("task", "worker", "node", "future")))
    def is_taken_back(self, how: str) -> None:
        if self.history is not None:
            self.history.aborted.add(NODE)
        if how == "task":
            self.task.abort()
        elif how == "future":
            self.future.cancel()
        else:
            self.worker.abort(*([NODE] if how == "node" else []))

    @rule(which=st.sampled_from(("too_long", "idle", "overdue", "not_answered")))
    def time_is_up(self, which: str) -> None:
        job = self.job

        def pass_by() -> None:
            # Two count from exec's reply on, one from the moment that the job is taken up.
            counts = {"too_long": job.timeline.phase == "running", "not_answered": job._begun}
            if counts.get(which, which == "overdue" or counts["too_long"]):
                getattr(job, which)()

        job.run.post(job, pass_by)

    @rule()
    def has_been_quiet(self) -> None:
        job = self.job
        job.run.post(job, lambda: job.quiet() if job.timeline.phase == "closing" else None)

    @rule()
    def an_ending_speaks_late(self) -> None:
        session = self._session(2)
        if session is not None:
            self.job.run.post(self.job, self.job.word, session, Ending("gone", 1))

    @rule()
    def handlers_run(self) -> None:
        self.worker.wait(0.001)

    # -- what has to hold -----------------------------------------------------------------------------------------

    def teardown(self) -> None:
        if not hasattr(self, "worker"):
            return
        try:
            if not self.future.done():
                if self.history is not None:
                    self.history.aborted.add(NODE)
                self.worker.abort()
            assert self.worker.wait(10)
            (result,) = self.worker.results()
            assert self.job.outcome is result.outcome
            wait_until(lambda: self.resolved == [self.future])
            assert self.sent <= len(result.attempts)
            assert (result.ran is False) <= (self.sent == 0)
            limit = getattr(self.policy, "attempts", 1)
            assert len(result.attempts) <= limit + (result.outcome in (Outcome.ABORTED, Outcome.TIMEOUT))
            if self.policy is None or not self.policy.idempotent:
                assert self.sent <= 1
            for attempt in result.attempts:
                assert abs(sum(attempt.timings.values()) - attempt.timings.total) < 1e-9
            assert result.outcome in ENDS[result.phase]
            assert not self.job.run.live
            assert self.job.run.plan.slots == 0
            assert all(connection.places == 0 for connection in self.fake._connections.values())
            if self.history is not None:
                assert faults(self.history, self.worker, threading.get_ident(), {}) == []
        finally:
            self.fake.__exit__(None, None, None)


@pytest.mark.slow
def test_a_job_has_one_outcome_whatever_comes() -> None:
    # The same cases each time: what CI finds is a change's doing.
    run_state_machine_as_test(
        JobMachine, settings=settings(max_examples=100, stateful_step_count=12, deadline=None, derandomize=True)
    )


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_a_job_has_one_outcome_whatever_comes_by_any_seed() -> None:
    run_state_machine_as_test(JobMachine, settings=settings(max_examples=2_000, stateful_step_count=15, deadline=None))
