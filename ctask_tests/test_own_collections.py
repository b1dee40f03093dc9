# SPDX-License-Identifier: Apache-2.0
"""What a program does with the collections that it is given changes nothing but these.

On fake nodes and on this machine. Runs in the thread of pytest, which owns the task.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import ctask
from ctask import JobsFailed, NodeSet, Retry, Task, Worker, task_self
from ctask.nodes.groups.upcall import UpcallGroupSource
from ctask.testing import EmbeddedCluster, FakeTransport
from ctask_tests.fake_nodes import nodes, says


@pytest.fixture
def task() -> Iterator[Task]:
    with FakeTransport(nodes(sick=says(b"bad\n", rc=2))):
        yield task_self()


def account(worker: Worker) -> list[object]:
    """All that is told of a worker, and of its task."""
    try:
        worker.check()
    except JobsFailed as error:
        failed = str(error)
    both: list[object] = [failed]
    for one in (worker, worker.task):
        both += [str(one.failures()), [(str(text), str(at)) for text, at in one.iter_buffers()]]
        both += [[(rc, str(at)) for rc, at in one.iter_retcodes()], one.max_retcode()]
    both += [str(worker.nodes), list(worker.futures), [repr(group) for group in worker.groups()], worker.exit_code()]
    both += [str(at) for at in (worker.ok, worker.failed, worker.pending, worker.unreached, worker.not_run)]
    both += [worker.counts(), [result.node for result in worker.results()], len(worker), repr(worker)]
    return both


def spoil(collection: Any) -> None:
    """Do to a collection what changes it most; one that is read-only refuses."""
    for change in ("clear", "pop", "popitem", "reverse"):
        try:
            getattr(collection, change)()
        except (AttributeError, TypeError, KeyError, IndexError):
            pass
    try:
        for key in list(collection):
            del collection[key]
    except (TypeError, KeyError, IndexError):
        pass
    if hasattr(collection, "update"):
        collection.update("nowhere" if isinstance(collection, NodeSet) else {})


@pytest.mark.parametrize("local", [False, True])
def test_an_account_is_the_same_whatever_was_done_to_what_it_is_made_of(task: Task, local: bool) -> None:
    place: dict[str, Any] = {"key": "here"} if local else {"nodes": "n[1-3],sick"}
    worker = task.run("echo bad; exit 2", **place)
    before = account(worker)
    failures = worker.failures()
    given: list[Any] = [worker.nodes, worker.futures, worker.jobs, worker.cells, worker.groups(), worker.task.workers]
    given += [worker.ok, worker.failed, worker.pending, worker.timedout, worker.task.unfinished()]
    given += [failures, *failures.values(), task.failures(), worker.ok_codes]
    given += [at for _, at in worker.iter_buffers()] + [at for _, at in worker.iter_retcodes()]
    given += [group.nodes for group in worker.groups()]
    given += [result.attempts for result in worker.results()]
    given += [attempt.timings for result in worker.results() for attempt in result.attempts]
    given += [*ctask.wait(worker)]
    for collection in given:
        spoil(collection)
    assert account(worker)[:-1] == before[:-1]
    assert failures == worker.failures()


def test_the_futures_of_a_worker_are_a_view(task: Task) -> None:
    worker = task.submit("x", nodes="n[1-2]")
    with pytest.raises(TypeError):
        worker.futures["n3"] = worker.futures["n1"]  # type: ignore[index]
    with pytest.raises(TypeError):
        del worker.futures["n1"]  # type: ignore[attr-defined]
    assert worker.futures == {future.node: future for future in worker}
    worker.wait()


def test_changing_nodes_while_it_runs_changes_no_end_of_it(task: Task) -> None:
    def spoils(worker: Worker, *_: object) -> None:
        worker.nodes.clear()
        spoil(worker.futures)

    worker = task.run("x", nodes="n[1-3],sick", on_start=spoils, on_done=spoils)
    assert str(worker.failures()) == "exit 2: sick"
    assert [future.node for future in worker] == ["n1", "n2", "n3", "sick"]


def test_what_was_given_may_be_changed_afterwards(task: Task) -> None:
    names, codes, data = NodeSet("n[1-2]"), {0, 2}, bytearray(b"input")
    worker = task.shell("x", nodes=names, ok_codes=codes, stdin=data)
    identity = ["/a", "/b"]
    task.set_info("identity", identity)
    statuses = {75}
    policy = Retry(2, exit_codes=statuses, on=(phases := ["tcp"]), idempotent=True)
    for own in (names, codes, data, identity, statuses, phases):
        own.clear()
    task.resume()
    assert str(worker.nodes) == "n[1-2]"
    assert worker.ok_codes == {0, 2}
    assert task.info("identity") == ("/a", "/b")
    assert (policy.exit_codes, policy.on) == ({75}, ("tcp",))
    spoil(task.info("identity"))
    spoil(task.info("ok_codes"))
    assert (task.info("identity"), task.info("ok_codes")) == (("/a", "/b"), {0})


def test_answers_of_group_sources_and_nodes_of_a_cluster_are_copies() -> None:
    source = UpcallGroupSource("s", mapall_upcall="echo a: n1 n2", all_upcall="echo n1", list_upcall="echo a")
    for _ in range(2):
        assert (source.resolv_map("a"), source.resolv_all(), source.resolv_list()) == (["n1", "n2"], ["n1"], ["a"])
        for answer in (source.resolv_map("a"), source.resolv_all(), source.resolv_list()):
            answer.clear()
    cluster = EmbeddedCluster("n[1-3]")
    cluster.nodes.clear()
    assert str(cluster.nodes) == "n[1-3]"
