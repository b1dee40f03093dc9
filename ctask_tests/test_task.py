# SPDX-License-Identifier: Apache-2.0
"""The Task: whose it is, its options, its results, its views of runs, its deadline. Nodes are fake."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any, cast

import pytest

from ctask import (
    AlreadyRunningError,
    CommandTimeout,
    JobsFailed,
    NodeSet,
    OptionError,
    Task,
    TaskError,
    TaskTimeout,
    Worker,
    task_self,
)
from ctask.future import Admission
from ctask.roster import Roster
from ctask.testing import FakeTransport, Step, close_everything
from ctask_tests.fake_nodes import HANGS, Recorder, act, nodes, says
from ctask_tests.fix_leaks import wait_until


@pytest.fixture
def task() -> Task:
    return task_self()


@pytest.fixture
def fake() -> Iterator[FakeTransport]:
    """Nodes that print `ok`, but for those that a test scripts by their names."""
    scripts = {
        "a1": says(b"one\n"),
        "a2": says(b"two\n"),
        "a3": says(b"two\n"),
        "bad": says(b"two\n", 3),
        "mute": says(),
        "err": says(b"out\n", err=b"oops\n"),
        "hang": HANGS,
        "late": says(b"late\n", after=0.3),
    }
    with FakeTransport(nodes(**scripts)) as fake:
        yield fake
        close_everything()  # while there is a transport to end what still runs


# -- whose it is -----------------------------------------------------------------------------------------------------


def test_a_thread_has_one_task(task: Task) -> None:
    others: list[Task] = []
    thread = threading.Thread(target=lambda: others.extend((task_self(), task_self())))
    thread.start()
    thread.join()
    assert task_self() is task
    assert task.thread is threading.current_thread()
    assert others[0] is others[1]
    assert others[0] is not task
    assert others[0].thread is thread


def test_a_task_with_a_thread_of_its_own(fake: FakeTransport) -> None:
    story = Recorder()
    with_thread = Task()
    assert with_thread.thread is not threading.current_thread()
    worker = with_thread.run("x", nodes="a[1-3],late", handler=story)
    assert isinstance(worker, Worker)
    assert not worker.done()  # run() did not wait
    assert with_thread.join()
    assert story.threads == {with_thread.thread}
    assert story.names()[-1] == "close"
    assert [(str(out), str(at)) for out, at in with_thread.iter_buffers()] == [
        ("two", "a[2-3]"),
        ("one", "a1"),
        ("late", "late"),
    ]
    with_thread.shell("x", nodes="a1")
    with_thread.resume()
    assert with_thread.join()
    assert with_thread.node_buffer("a1") == "one"
    assert with_thread.max_retcode() == 0


def test_a_task_of_its_own_is_that_thread_s_task(fake: FakeTransport) -> None:
    seen: list[Task] = []
    own = Task()
    own.run("x", nodes="n1", on_close=lambda worker, timedout: seen.append(task_self()))
    own.join()
    assert seen == [own]


@pytest.mark.load
def test_join_of_another_thread_s_task_is_over_in_time(fake: FakeTransport) -> None:
    own = Task()
    worker = own.run("x", nodes="hang")
    assert worker is not None
    wait_until(lambda: worker.jobs[0].phase == "running")
    assert not own.join(deadline=0.1)
    own.abort()
    assert own.join(deadline=5)
    assert own.workers[0].failures() == {("running", "Aborted", "aborted"): NodeSet("hang")}


def test_run_from_another_thread_is_carried_out_and_returns(task: Task, fake: FakeTransport) -> None:
    story = Recorder()
    made: list[Any] = []
    thread = threading.Thread(target=lambda: made.append(task.run("x", nodes="a[1-2]", handler=story)))
    thread.start()
    thread.join()
    wait_until(made[0].done)
    assert story.events == []  # the owner's handlers wait for the owner
    assert task.join()
    assert story.threads == {threading.current_thread()}
    assert task.node_buffer("a1") == "one"


def test_check_in_another_thread_waits_for_what_it_checks(fake: FakeTransport) -> None:
    own = Task()
    with pytest.raises(JobsFailed, match="exit 3: bad"):
        own.run("x", nodes="a1,bad", check=True)


def test_a_closed_task_says_so(fake: FakeTransport) -> None:
    tasks: list[Task] = []
    thread = threading.Thread(target=lambda: tasks.append(task_self()))
    thread.start()
    thread.join()
    wait_until(lambda: tasks[0]._closed)
    with pytest.raises(TaskError, match="closed"):
        tasks[0].submit("x", nodes="n1")


# -- results ---------------------------------------------------------------------------------------------------------


def test_results_by_node(task: Task, fake: FakeTransport) -> None:
    task.run("x", nodes="a[1-3],bad,mute")
    assert [(out, str(at)) for out, at in task.iter_buffers()] == [("two", "a[2-3],bad"), ("one", "a1")]  # type: ignore[comparison-overlap]
    assert isinstance(next(task.iter_buffers())[1], NodeSet)
    assert [str(at) for _, at in task.iter_buffers("a3")] == ["a3"]
    assert [str(at) for _, at in task.iter_buffers(["a1", "bad"])] == ["a1", "bad"]
    assert task.node_buffer("a1") == b"one"
    assert task.node_buffer("mute") == task.node_buffer("unknown") == b""
    assert [(rc, str(at)) for rc, at in task.iter_retcodes()] == [(0, "a[1-3],mute"), (3, "bad")]
    assert task.node_retcode("bad") == 3
    assert task.max_retcode() == 3
    assert task.num_timeout() == 0
    assert list(task.iter_keys_timeout()) == []
    assert task.failures() == {("running", "CommandFailed", "exit 3"): NodeSet("bad")}
    with pytest.raises(KeyError):
        task.node_retcode("unknown")


def test_results_of_two_workers_on_the_same_nodes(task: Task) -> None:
    def script(node: str, command: Any) -> list[Step]:
        return {b"one": says(b"same\n"), b"two": says(b"same", 4), b"three": says(f"{node}\n".encode())}[command.line]

    with FakeTransport(script):
        for command in ("one", "two", "three"):
            task.shell(command, nodes="n[1-3]")
        task.resume()
    found = [(str(out), str(at)) for out, at in task.iter_buffers()]
    assert found == [("same", "n[1-3]"), ("n1", "n1"), ("n2", "n2"), ("n3", "n3")]
    assert task.node_buffer("n2") == "same\nsame\nn2"
    assert task.node_retcode("n2") == 4
    assert task.max_retcode() == 4


def test_many_nodes_of_two_workers_are_merged_in_no_time(task: Task, fake: FakeTransport) -> None:
    for _ in range(2):
        task.shell("x", nodes="n[1-3000]")
    task.resume()
    found = list(task.iter_buffers())  # pytest-timeout sees what is quadratic
    assert [(out, len(at)) for out, at in found] == [("ok", 3000)]  # type: ignore[comparison-overlap]


def test_streams_are_one_unless_they_are_wanted_apart(task: Task, fake: FakeTransport) -> None:
    task.run("x", nodes="err")
    assert task.node_buffer("err") == "oops\nout"
    assert list(task.iter_errors()) == []
    assert task.node_error("err") == ""
    story = Recorder()
    task.run("x", nodes="err", stderr=True, handler=story)
    assert task.node_buffer("err") == "out"
    assert task.node_error("err") == "oops"
    assert [(out, str(at)) for out, at in task.iter_errors()] == [("oops", "err")]  # type: ignore[comparison-overlap]
    assert story.given("read") == [("stderr", b"oops"), ("stdout", b"out")]


def test_timeouts_are_told_and_have_no_status(task: Task, fake: FakeTransport) -> None:
    worker = task.run("x", nodes="hang", timeout=0.1)
    assert task.num_timeout() == 1
    assert list(task.iter_keys_timeout()) == ["hang"]
    assert task.max_retcode() is None
    assert list(task.iter_retcodes()) == []
    assert worker is not None
    assert worker.did_timeout()
    with pytest.raises(KeyError):
        task.node_retcode("hang")


def test_local_commands_beside_remote_ones(task: Task, fake: FakeTransport) -> None:
    task.shell("x", nodes="a1")
    labelled = task.shell("echo here; exit 2", key="mine")
    plain = task.shell(["printf", "%s|", "a b", "$HOME"])
    task.resume()
    found = {str(out): at for out, at in task.iter_buffers()}
    assert found["one"] == NodeSet("a1")
    assert found["here"] == ["mine"]
    assert found["a b|$HOME|"] == [plain]
    assert labelled.nodes == ["mine"]
    assert task.node_retcode("mine") == task.max_retcode() == 2
    assert task.node_buffer("mine") == "here"


def test_gather_false_keeps_nothing_and_handlers_hear_all(task: Task, fake: FakeTransport) -> None:
    story = Recorder()
    worker = task.run("x", nodes="a[1-3]", gather=False, handler=story)
    assert worker is not None
    assert sorted(story.given("read")) == [("stdout", b"one"), ("stdout", b"two"), ("stdout", b"two")]
    assert list(task.iter_buffers()) == []
    assert worker.futures["a1"].result().stdout == b""
    assert len(worker.ok) == 3


# -- views of runs ---------------------------------------------------------------------------------------------------


def test_h16_a_run_takes_in_what_was_submitted_and_has_not_ended(task: Task, fake: FakeTransport) -> None:
    ended = task.submit("x", nodes="a1")
    ended.wait()
    slow = task.submit("x", nodes="late")
    task.run("x", nodes="a2")
    assert slow.done()  # it was waited for as well
    assert {str(out): str(at) for out, at in task.iter_buffers()} == {"late": "late", "two": "a2"}
    assert ended.node_buffer("a1") == "one"


def test_h16_a_worker_whose_end_was_not_heard_is_still_taken_in(task: Task, fake: FakeTransport) -> None:
    story = Recorder()
    worker = task.submit("x", nodes="a1", handler=story)
    wait_until(worker.done)
    assert story.events == []
    task.run("x", nodes="a2")
    assert story.names() == ["start", "pickup", "read", "hup", "done", "close"]
    assert task.node_buffer("a1") == "one"


def test_h16_a_submit_after_a_run_begins_a_new_view(task: Task, fake: FakeTransport) -> None:
    old = task.run("x", nodes="a1")
    assert old is not None
    first = list(task.iter_buffers())
    assert first == list(task.iter_buffers())
    new = task.submit("x", nodes="a2")
    new.wait()
    assert task.workers == [new]
    assert [out for out, _ in task.iter_buffers()] == ["two"]
    other = task.submit("x", nodes="a1")
    other.wait()
    assert task.workers == [new, other]
    assert old.node_buffer("a1") == "one"  # a worker of an old run keeps its own
    assert [out for out, _ in old.iter_buffers()] == ["one"]


def test_h16_join_is_a_run_of_all_that_was_submitted(task: Task, fake: FakeTransport) -> None:
    one, two = task.submit("x", nodes="late"), task.submit("x", nodes="late", gather=True)
    assert task.join()
    assert one.done()
    assert two.done()
    assert task.workers == [one, two]
    assert task.max_retcode() == 0
    hanging = task.submit("x", nodes="hang")
    assert task.join(deadline=0.1) is False
    assert hanging.pending == NodeSet("hang")  # nothing was ended


def test_h16_results_can_be_read_before_the_end(task: Task, fake: FakeTransport) -> None:
    worker = task.submit("x", nodes="a1,hang")
    next(worker.results())
    session = next(session for session in fake.sessions if session.connection.target.address == "hang")
    act(fake, session, Step("out", b"half"))
    wait_until(lambda: task.node_buffer("hang") == "half")
    assert [(out, str(at)) for out, at in task.iter_buffers()] == [("one", "a1"), ("half", "hang")]  # type: ignore[comparison-overlap]
    assert list(task.iter_retcodes()) == [(0, NodeSet("a1"))]
    act(fake, session, Step("out", b" more"), Step("exit", status=1), Step("end"))
    worker.wait()
    assert task.node_buffer("hang") == "half more"


def test_a_run_keeps_its_workers_though_the_program_drops_them(task: Task, fake: FakeTransport) -> None:
    task.run("x", nodes="a1")
    gc.collect()
    assert task.node_buffer("a1") == "one"
    task.run("x", nodes="a2")
    assert task.node_buffer("a1") == ""


@pytest.mark.parametrize("listens", [False, True])
def test_a_daemon_that_submits_for_ever_does_not_grow(task: Task, fake: FakeTransport, listens: bool) -> None:
    workers: list[weakref.ref[Worker]] = []
    for _ in range(400):
        worker = task.submit("x", nodes="n[1-2]", handler=Recorder() if listens else None)
        workers.append(weakref.ref(worker))
        for result in worker.results():
            assert result.ok
        del worker, result
        fake.sessions.clear()
    gc.collect()
    left = sum(ref() is not None for ref in workers)
    assert left <= 70  # what has ended is let go of in heaps of 64
    task.run("x", nodes="n1")  # begins a new view, without what has ended
    gc.collect()
    # The last one's ev_close had not been heard: it was taken in.
    assert sum(ref() is not None for ref in workers) == len(task.workers) - 1 <= listens


# -- deadlines and checks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", [{"deadline": 0.2}, {"timeout": 0.2}])
def test_a_passed_deadline_ends_what_runs_and_keeps_what_came(
    task: Task, fake: FakeTransport, spelling: dict[str, float]
) -> None:
    story = Recorder()
    worker = task.shell("x", nodes="a1,hang", handler=story)
    with pytest.raises(TaskTimeout) as caught:
        task.run(**spelling)  # type: ignore[call-overload]
    assert isinstance(caught.value, TimeoutError)
    assert not task.running()
    assert task.node_buffer("a1") == "one"
    assert list(task.iter_keys_timeout()) == ["hang"]
    assert isinstance(worker.futures["hang"].exception(), CommandTimeout)
    assert story.names("hang") == ["pickup", "done"]
    assert story.given("close") == [True]
    task.run("x", nodes="a2")  # the task can be used again
    assert task.num_timeout() == 0


def test_a_deadline_of_a_run_with_a_command(task: Task, fake: FakeTransport) -> None:
    with pytest.raises(TaskTimeout):
        task.run("x", nodes="hang", deadline=0.1)
    assert task.num_timeout() == 1
    task.run("x", nodes="hang", timeout=0.1)  # of the command: no error of the run
    assert task.num_timeout() == 1


def test_check_raises_once_with_the_folded_failures(task: Task, fake: FakeTransport) -> None:
    with pytest.raises(JobsFailed) as caught:
        task.run("x", nodes="a1,bad,hang", timeout=0.2, check=True)
    assert str(caught.value) == "exit 3: bad · timeout after 0.2 s: hang"
    assert caught.value.failures[("running", "CommandFailed", "exit 3")] == NodeSet("bad")
    assert task.node_retcode("bad") == 3
    task.run("x", nodes="bad", check=True, ok_codes={0, 3})


def test_run_inside_a_handler_is_refused_in_words(task: Task, fake: FakeTransport) -> None:
    said: list[str] = []

    def nested(worker: Worker, node: str, result: Any) -> None:
        for call in (lambda: task.run("x", nodes="a1"), task.resume):
            with pytest.raises(AlreadyRunningError) as caught:
                call()
            said.append(str(caught.value))

    task.run("x", nodes="n1", on_done=nested)
    assert said == [
        f"{name}() inside a handler: this task is already running. Use task.shell() or task.submit() here."
        for name in ("run", "resume")
    ]
    assert len(fake.sessions) == 1  # the refused command was not sent


# -- options ---------------------------------------------------------------------------------------------------------


def test_options_of_the_task(task: Task) -> None:
    assert task.info("fanout") == task.default("fanout") == 64
    assert task.info("connect_timeout") == 10
    assert task.info("timeout") is None
    assert task.info("nothing", 5) == 5
    task.set_info("USER_mine", "anything")
    assert task.info("USER_mine") == "anything"
    task.set_default("ssh_user", "root")  # ClusterShell's name of it
    assert task.info("user") == task.info("ssh_user") == "root"
    with pytest.raises(OptionError, match="did you mean 'fanout'"):
        task.set_info("fanuot", 3)
    for value in (0, -1, 1.5, True, "many", None):
        with pytest.raises(OptionError, match="fanout is a whole number, 1 or more"):
            task.set_info("fanout", value)
    assert task.info("fanout") == 64


def test_the_fan_out_can_be_changed_while_it_runs(task: Task, fake: FakeTransport) -> None:
    task.set_info("fanout", 2)
    worker = task.submit("x", nodes="n[1-3]")
    worker.wait()
    with FakeTransport(nodes(HANGS)) as hanging:
        worker = task.submit("x", nodes="n[1-20]")
        wait_until(lambda: len(hanging.sessions) == 2)
        assert "2 slots taken" in repr(task)
        task.set_info("fanout", 5)
        wait_until(lambda: len(hanging.sessions) == 5)
        task.set_info("fanout", 3)
        for session in hanging.sessions[:2]:
            act(hanging, session, Step("exit"), Step("end"))
        wait_until(lambda: len(worker.ok) == 2)
        assert len(hanging.sessions) == 5  # two ended, and three is the bound
        act(hanging, hanging.sessions[2], Step("exit"), Step("end"))
        wait_until(lambda: len(hanging.sessions) == 6)
        task.abort()
        worker.wait()


def test_which_option_wins(task: Task, fake: FakeTransport) -> None:
    def users(**call: Any) -> dict[str, str]:
        fake.sessions.clear()
        task.run("x", nodes="n[1-3]", **call)
        return {session.connection.target.address: session.connection.target.user for session in fake.sessions}

    task.set_info("user", "of-the-task")
    assert set(users().values()) == {"of-the-task"}
    task.node_options("n[1-2]", user="of-nodes", port=2222)
    task.node_options(["n2"], user="later")
    assert users() == {"n1": "of-nodes", "n2": "later", "n3": "of-the-task"}
    assert fake.sessions[1].connection.target.port == 2222  # what the later call did not say stays
    assert set(users(user="of-the-call").values()) == {"of-the-call"}
    assert set(users(ssh_user="of-the-call").values()) == {"of-the-call"}
    with pytest.raises(OptionError, match="option of the whole task"):
        task.node_options("n1", fanout=3)
    with pytest.raises(OptionError, match="did you mean 'user'"):
        task.node_options("n1", usr="x")


def test_reprs_are_one_line(task: Task, fake: FakeTransport) -> None:
    assert repr(task).endswith("idle, 0 workers (0 not ended), fan-out 64, 0 slots taken, 0 dialing>")
    task.submit("x", nodes="hang")
    wait_until(lambda: "1 slots taken" in repr(task))
    assert "1 workers (1 not ended)" in repr(task)
    assert task.thread.name in repr(task)
    assert "\n" not in repr(task)


def test_a_roster_takes_workers_from_many_threads() -> None:
    roster, failed = Roster(), []
    kept = [_Ended() for _ in range(1000)]

    def start() -> None:
        try:
            for worker in kept:
                roster.started(cast(Worker, worker))
        except BaseException as error:  # noqa: BLE001 (the main thread tells)
            failed.append(error)

    threads = [threading.Thread(target=start) for _ in range(6)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            roster.begin([])
            assert roster.all_closed()()
            roster.end()
            assert roster.unfinished() == []
    finally:
        sys.setswitchinterval(interval)
        for thread in threads:
            thread.join()
    assert failed == []


class _Ended:
    closed = True

    def __init__(self) -> None:
        self.admission = Admission()

    def admit(self, *, may_write: bool = False) -> None:
        self.admission.given = True
