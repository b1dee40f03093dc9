# SPDX-License-Identifier: Apache-2.0
"""Threads that cannot be had: work waits for those there are, idle ones end, and what failed never runs later (I08).

The limit of the programs is RLIMIT_NPROC of an account without other processes; root is exempt from it.
"""

from __future__ import annotations

import os
import pwd
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ctask import Outcome, task_self
from ctask import threads as threads_module
from ctask.testing import FakeTransport
from ctask.threads import NoThread, Pool, spares
from ctask.transports.watcher.resolver import Found, Resolver
from ctask_tests.child import Child
from ctask_tests.fake_nodes import HANGS, nodes
from ctask_tests.fix_leaks import process_table, wait_until
from ctask_tests.fix_sshd import Sshd


class Limit:
    """The threads that may still be started."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = 0
        self.refused = 0
        self._start = threading.Thread.start
        monkeypatch.setattr(threading.Thread, "start", lambda thread: self.count(thread))  # noqa: PLW0108 (else it is no method)

    def count(self, thread: threading.Thread) -> None:
        if self.left <= 0:
            self.refused += 1
            raise RuntimeError("can't start new thread")
        self.left -= 1
        self._start(thread)


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Limit:
    return Limit(monkeypatch)


@pytest.fixture
def pool() -> Iterator[Pool]:
    made = Pool("ctask-test/job", 8)
    yield made
    made.close()
    assert made.join(10)


# -- the pool ---------------------------------------------------------------------------------------------------------


def test_i08_what_no_thread_can_be_started_for_waits_for_one_that_is_there(limit: Limit, pool: Pool) -> None:
    limit.left = 1
    go, done = threading.Event(), threading.Event()
    seen: list[int] = []
    assert pool.submit(go.wait, 10)
    for number in range(20):
        assert pool.submit(seen.append, number)
    assert pool.submit(done.set)
    go.set()
    assert done.wait(10)
    assert seen == list(range(20))
    assert pool.count == 1
    assert limit.refused


def test_i08_what_was_handed_back_never_runs(limit: Limit, pool: Pool) -> None:
    ran: list[str] = []
    assert not pool.submit(ran.append, "lost")
    assert not pool.grow()
    assert [call("told") for call in pool.take_back()] == [None]
    assert pool.take_back() == []
    limit.left = 5
    done = threading.Event()
    pool.submit(done.set)
    wait_until(pool.grow, what="threads can be had again")
    assert done.wait(10)
    assert ran == ["told"]


def test_i08_what_has_a_thread_is_not_handed_back(limit: Limit, pool: Pool) -> None:
    limit.left = 1
    go, done = threading.Event(), threading.Event()
    pool.submit(go.wait, 10)
    pool.submit(done.set)
    assert pool.take_back() == []
    go.set()
    assert done.wait(10)


def test_i08_it_is_said_when_a_thread_is_free(limit: Limit) -> None:
    limit.left = 1
    go, freed = threading.Event(), threading.Event()
    pool = Pool("ctask-test/job", 8, freed.set)
    assert pool.ready()
    pool.submit(go.wait, 10)
    assert not pool.ready()
    assert not freed.is_set()
    go.set()
    assert freed.wait(10)
    wait_until(pool.ready)
    pool.close()
    assert pool.join(10)


def test_i08_idle_threads_end_where_another_part_needs_one(limit: Limit) -> None:
    limit.left = 3
    one = Pool("ctask-test/one", 8)
    go = threading.Event()
    for _ in range(3):
        one.submit(go.wait, 10)
    go.set()
    other = Pool("ctask-test/other", 8)
    wait_until(lambda: one._idle == 3 and not one._items)
    assert not other.submit(print)
    wait_until(lambda: one.count == 0, what="the idle ones have ended")
    limit.left = 1
    wait_until(other.grow)
    for pool in (one, other):
        pool.close()
        assert pool.join(10)


def test_an_item_that_raises_is_told_and_ends_no_thread(pool: Pool, caplog: pytest.LogCaptureFixture) -> None:
    done = threading.Event()
    pool.submit(int, "x")
    wait_until(lambda: "a work item failed" in caplog.text)
    pool.submit(done.set)
    assert done.wait(10)
    assert pool.count == 1


def test_a_closed_pool_carries_out_what_it_has_and_takes_nothing() -> None:
    pool = Pool("ctask-test/job", 1)
    go = threading.Event()
    seen: list[int] = []
    pool.submit(go.wait, 10)
    pool.submit(seen.append, 1)
    pool.close()
    with pytest.raises(RuntimeError):
        pool.submit(seen.append, 2)
    go.set()
    assert pool.join(10)
    assert seen == [1]
    assert pool in spares


# -- names ------------------------------------------------------------------------------------------------------------


def resolver(calls: list[Callable[[], None]]) -> Resolver:
    return Resolver(lambda when, call: calls.append(call))


def test_i08_a_name_waits_for_a_thread_and_is_told_when_none_comes(
    limit: Limit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ctask.transports.watcher.resolver.PATIENCE", 0.0)
    calls: list[Callable[[], None]] = []
    found: list[Found] = []
    made = resolver(calls)
    made.resolve("localhost", found.append)
    assert found == []
    calls.pop()()
    assert [type(one) for one in found] == [NoThread]
    limit.left = 1
    made.resolve("localhost", found.append)
    wait_until(lambda: len(found) == 2)
    made.close()
    assert calls == []
    assert isinstance(found[1], list), "it was looked up once, and not for those that were told"


def test_i08_a_name_is_looked_up_once_there_is_a_thread(limit: Limit) -> None:
    calls: list[Callable[[], None]] = []
    found: list[Found] = []
    made = resolver(calls)
    made.resolve("localhost", found.append)
    limit.left = 1
    calls.pop()()
    wait_until(lambda: found)
    made.close()
    assert isinstance(found[0], list)


# -- a task -----------------------------------------------------------------------------------------------------------


def test_i08_an_ending_is_carried_out_when_a_thread_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    real, refused = threads_module.start, [3]

    def start(name: str, run: Callable[[], object]) -> threading.Thread:
        if "/job" in name and refused[0]:
            refused[0] -= 1
            raise NoThread("can't start new thread")
        return real(name, run)

    monkeypatch.setattr(threads_module, "start", start)
    with FakeTransport(nodes(HANGS)) as fake:
        task = task_self()
        worker = task.submit("x", nodes="n1")
        wait_until(worker.futures["n1"].running)
        worker.abort()
        assert worker.wait(5)
        assert len(fake.ends) == 1
    (result,) = worker.results()
    assert (result.outcome, result.remote_state) == (Outcome.ABORTED, "gone")


# -- programs under a limit -------------------------------------------------------------------------------------------

#: An account of every Debian that runs nothing.
ACCOUNT = "games"
#: All that is loaded later: the account may not read where it lies.
UNDER_LIMIT = """
import collections, resource, paramiko, tenacity, binascii
import ctask.transports.local, ctask.transports.ssh
from ctask.transports.ssh import ending
os.setgroups([]); os.setgid(GIVEN["gid"]); os.setuid(GIVEN["uid"])
resource.setrlimit(resource.RLIMIT_NPROC, (GIVEN["most"], GIVEN["most"]))
def told(worker):
    return sorted(collections.Counter((result.outcome.name, result.why) for result in worker.results()).items())
"""


@pytest.fixture
def account(sshd: Sshd) -> Iterator[dict[str, Any]]:
    if os.getuid():
        pytest.skip("only root can be another account")
    try:
        entry = pwd.getpwnam(ACCOUNT)
    except KeyError:
        pytest.skip(f"no account {ACCOUNT}")
    if any(os.stat(f"/proc/{pid}").st_uid == entry.pw_uid for pid in process_table() if os.path.exists(f"/proc/{pid}")):
        pytest.skip(f"something runs as {ACCOUNT}")
    options = dict(sshd.options())
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        for name in ("identity", "known_hosts"):
            copy = Path(folder) / name
            shutil.copy(str(options[name]), copy)
            os.chown(copy, entry.pw_uid, entry.pw_gid)
            copy.chmod(0o600)
            options[name] = str(copy)
        yield {"uid": entry.pw_uid, "gid": entry.pw_gid, "options": options}


@pytest.mark.slow
@pytest.mark.parametrize("most", [6, 5])
def test_i08_all_nodes_run_with_few_threads(sshd: Sshd, account: dict[str, Any], most: int) -> None:
    program = UNDER_LIMIT + (
        "say(told(task.run('echo hi', nodes=GIVEN['nodes'], **GIVEN['options'])), threading.active_count())\n"
        "worker = task.shell('cat', nodes=GIVEN['nodes'], stdin=True, **GIVEN['options'])\n"
        "worker.write(b'x' * 100_000)\nworker.set_write_eof()\ntask.resume()\nsay(told(worker))\n"
        "say(told(task.run('sleep 600', nodes=GIVEN['nodes'], timeout=0.3, stop_grace=1, **GIVEN['options'])))\n"
    )
    with Child(program, nodes=sshd.nodes(60), most=most, **account) as child:
        assert child.line() == f"{[(('EXITED', ''), 60)]} {most}", child.errors()
        assert child.line() == repr([(("EXITED", ""), 60)]), child.errors()
        assert child.line() == repr([(("TIMEOUT", "timeout after 0.3 s"), 60)]), child.errors()
        assert child.process.wait(10) == 0


def test_i08_local_commands_wait_for_a_process(account: dict[str, Any]) -> None:
    program = UNDER_LIMIT + (
        "workers = [task.shell('exec sleep 0.1') for _ in range(20)]\ntask.run()\n"
        "say(sorted({one for worker in workers for one in told(worker)}))\n"
    )
    with Child(program, most=7, **account) as child:
        assert child.line() == repr([(("EXITED", ""), 1)]), child.errors()
        assert child.process.wait(10) == 0


@pytest.mark.slow
def test_i08_where_there_is_no_thread_at_all_it_is_said(sshd: Sshd, account: dict[str, Any]) -> None:
    program = UNDER_LIMIT + (
        "from ctask import engine\nengine._NO_SHAKE_FOR = 0.2\n"
        "say(told(task.run('echo hi', nodes=GIVEN['nodes'], retry=None, **GIVEN['options'])))\n"
    )
    with Child(program, nodes=sshd.nodes(3), most=4, **account) as child:
        line = child.line()
        assert "UNREACHED" in line, child.errors()
        assert "this machine has no more threads" in line
        assert child.process.wait(10) == 0


