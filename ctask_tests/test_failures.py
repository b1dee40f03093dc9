# SPDX-License-Identifier: Apache-2.0
"""Failures as data: what is folded, in what order it stands, how it reads, and that every report says the same."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctask import (
    AuthRejected,
    ConnectionLost,
    ConnectTimeout,
    Failures,
    JobsFailed,
    NodeSet,
    Task,
    task_self,
)
from ctask.display import account
from ctask.testing import FakeTransport, Step, close_everything
from ctask_tests.fake_nodes import nodes, says


def silent(node: str) -> list[Step]:
    """A node that does not answer; its address, and how long it was tried, are its own."""
    error = ConnectTimeout(f"no answer from 10.0.0.{node[1:]}:22 for 10 s", phase="tcp", kind="no answer for 10 s")
    error.tried(3, 10 + int(node[1:]) / 10)
    return [Step("lost", error=error)]


REFUSED = [Step("lost", error=AuthRejected("refused for root. offered: …", phase="auth", kind="refused for root"))]
SCRIPTS = {
    "n3": REFUSED,
    "n9": REFUSED,
    **{f"r{number}": silent(f"r{number}") for number in range(1, 6)},
    "n17": [Step("running"), Step("signal", b"KILL"), Step("end")],
}
REPORT = "tcp: no answer for 10 s: r[1-5] · auth: refused for root: n[3,9] · killed by SIGKILL: n17"


@pytest.fixture
def task() -> Task:
    return task_self()


@pytest.fixture
def fake() -> Iterator[FakeTransport]:
    with FakeTransport(nodes(says(b"fine\n"), **SCRIPTS)) as fake:
        yield fake
        close_everything()


def test_a_report_is_folded_and_largest_first(task: Task, fake: FakeTransport) -> None:
    worker = task.submit("x", nodes="n[1-20],r[1-6]")
    assert worker.wait(10)
    failures = worker.failures()
    assert isinstance(failures, Failures)
    assert list(failures.items()) == [
        (("tcp", "ConnectTimeout", "tcp: no answer for 10 s"), NodeSet("r[1-5]")),
        (("auth", "AuthRejected", "auth: refused for root"), NodeSet("n[3,9]")),
        (("running", "CommandFailed", "killed by SIGKILL"), NodeSet("n17")),
    ]
    assert str(failures) == REPORT
    assert repr(failures) == f"<Failures of 8 jobs: {REPORT}>"
    assert ("auth", "AuthRejected", "auth: refused for root") in failures
    assert failures == dict(failures)
    with pytest.raises(TypeError):
        failures["a", "b", "c"] = NodeSet("n1")  # type: ignore[index]


def test_every_report_says_the_same(task: Task, fake: FakeTransport) -> None:
    worker = task.submit("x", nodes="n[1-20],r[1-6]")
    with pytest.raises(JobsFailed) as caught:
        worker.check()
    assert str(caught.value) == REPORT
    assert caught.value.failures == worker.failures() == task.failures()
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.failures) == (REPORT, worker.failures())
    rows = [line.split("  ") for line in account(worker).splitlines()[1:]]
    told = {words[1]: next(word for word in words[2:] if word).strip() for words in rows}
    assert told == {text: str(found) for (_, _, text), found in worker.failures().items()}
    assert {(group.why, str(group.nodes)) for group in worker.groups() if group.why} == {
        (text, str(found)) for (_, _, text), found in worker.failures().items()
    }


def test_of_equals_the_first_node_comes_first(task: Task, fake: FakeTransport) -> None:
    worker = task.submit("x", nodes="n17,n3,r1")
    worker.wait(10)
    assert [str(found) for found in worker.failures().values()] == ["n3", "n17", "r1"]


def test_a_task_folds_what_its_workers_met(task: Task, fake: FakeTransport) -> None:
    task.shell("x", nodes="n[1-3]")
    task.shell("y", nodes="n[9-10]")
    task.shell("exit 3", key="here", stdin=False)
    task.shell("exit 3", stdin=False)
    task.resume()
    assert str(task.failures()) == "auth: refused for root: n[3,9] · exit 3: here,exit 3"


def test_what_is_well_has_no_failures(task: Task, fake: FakeTransport) -> None:
    worker = task.run("x", nodes="n[1-2]", check=True)
    assert not worker.failures()
    assert (str(worker.failures()), repr(worker.failures())) == ("", "<Failures: none>")
    odd = task.run("x", nodes="n1", ok_codes={3})
    assert str(odd.failures()) == "exit 0, which is not in ok_codes: n1"


FATES = st.sampled_from(("well", "bad", "refused", "lost"))


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.integers(1, 60), FATES, min_size=1))
def test_each_failed_node_is_in_one_entry(fates: dict[int, str]) -> None:
    lost = [Step("running"), Step("lost", error=ConnectionLost("reset"))]
    scripts = {"well": says(), "bad": says(rc=2), "refused": REFUSED, "lost": lost}
    with FakeTransport(lambda node, command: scripts[fates[int(node[1:])]]):
        worker = task_self().run("x", nodes=[f"n{number}" for number in fates])
    failures = worker.failures()
    assert sorted(node for found in failures.values() for node in found) == sorted(worker.failed)
    assert {fates[int(node[1:])] for found in failures.values() for node in found} == set(fates.values()) - {"well"}
    assert all(len({fates[int(node[1:])] for node in found}) == 1 for found in failures.values())
    sizes = [(-len(found), list(worker.nodes).index(found[0])) for found in failures.values()]
    assert sizes == sorted(sizes)
