# SPDX-License-Identifier: Apache-2.0
"""What the plan has said for jobs that end before it is carried out: nothing of it is, and nothing is left behind."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from ctask import LocalResource, NodeError, Retry, task_self
from ctask.job import Job
from ctask.plan import Start
from ctask.testing import FakeTransport
from ctask.transports import transport
from ctask_tests.fake_nodes import Recorder, nodes
from ctask_tests.fix_leaks import wait_until

SOON = 10.0


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL + 1)


def without_dials(monkeypatch: pytest.MonkeyPatch) -> None:
    class Watcher:
        def dial(self, *_: object) -> Any:
            raise RuntimeError("can't start new thread")

    monkeypatch.setattr("ctask.making.watcher", Watcher)


@pytest.mark.parametrize("tries", [1, 2])
def test_jobs_whose_dial_fails_at_once_are_not_taken_up_after_their_end(
    monkeypatch: pytest.MonkeyPatch, tries: int
) -> None:
    """Five jobs join one dial, which raises as soon as it is begun; four of them were to join after that."""
    without_dials(monkeypatch)
    task = task_self()
    before = transport("ssh").statistics().dials
    stories = [Recorder() for _ in range(5)]
    retry = Retry(tries, wait=0.01, on=NodeError) if tries > 1 else None
    workers = [task.shell("x", nodes="127.0.0.1", handler=story, retry=retry) for story in stories]
    task.resume(SOON)
    for worker, story in zip(workers, stories, strict=True):
        result = next(iter(worker.results()))
        assert isinstance(result.error, LocalResource)
        assert len(result.attempts) == tries
        names = story.names()
        assert names[-3:] == ["hup", "done", "close"]
        assert names.count("pickup") <= 1
        assert "pickup" not in names[names.index("done") :]
    assert transport("ssh").statistics().dials == before, "every reservation was given back"
    assert not task.failed
    assert task.submit("true").wait(SOON)


def test_a_job_that_cannot_join_leaves_no_dial_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    class Watcher:
        def dial(self, *args: object) -> Any:
            asked.append(args)
            raise RuntimeError("nobody was to be dialed")

    def join(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("ctask.making.watcher", Watcher)
    monkeypatch.setattr(Job, "join", join)
    before = transport("ssh").statistics().dials
    task = task_self()
    worker = task.submit("x", nodes="127.0.0.1")
    assert worker.wait(SOON)
    assert asked == []
    wait_until(lambda: transport("ssh").statistics().dials == before, what="the reservation was given back")
    assert task._engine.plan.dialing == 0


def test_a_job_that_has_ended_is_not_started_and_its_place_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_self()
    story = Recorder()
    with FakeTransport(nodes()) as fake:
        worker = task.submit("x", nodes="n1", handler=story)
        assert worker.wait(SOON)
        count = len(fake.sessions)
        (connection,) = fake._connections.values()
        job, step = worker.jobs[0], task._engine.plan.step

        def late(*args: Any) -> Any:
            monkeypatch.undo()
            return [Start(job, job.way.take(job.target)), *step(*args)]

        monkeypatch.setattr(task._engine.plan, "step", late)
        assert task.submit("x", nodes="n2").wait(SOON)
        assert connection.places == 0
        assert len(fake.sessions) == count + 1
        assert story.names() == ["start", "pickup", "read", "hup", "done", "close"]
