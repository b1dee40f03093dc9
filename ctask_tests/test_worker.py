# SPDX-License-Identifier: Apache-2.0
"""The Worker: one command on many nodes, its node sets, groups, results, standard input and end."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ctask import (
    Aborted,
    AuthRejected,
    CommandFailed,
    ConnectionLost,
    ConnectRefused,
    EventHandler,
    Group,
    JobsFailed,
    NodeSet,
    OptionError,
    Outcome,
    Task,
    UnknownHostKey,
    Worker,
    task_self,
)
from ctask.testing import FakeTransport, Step, close_everything
from ctask_tests.fake_nodes import HANGS, Recorder, act, nodes, says
from ctask_tests.fix_leaks import wait_until
from ctask_tests.fix_proxy import closed_port
from ctask_tests.fix_sshd import Sshd

#: One node of every kind; the rest (n1 to n3) is well.
SCRIPTS = {
    "bad": says(b"no such package\n", 1),
    "dead": [Step("lost", error=ConnectRefused("refused", phase="tcp"))],
    "hang": HANGS,
    "killed": [Step("running"), Step("signal", b"KILL"), Step("end")],
    "lost": [Step("running"), Step("out", b"half"), Step("lost", error=ConnectionLost("reset"))],
    "mute": says(),
}
ALL = "n[1-3],bad,hang,killed,lost,mute"


@pytest.fixture
def task() -> Task:
    return task_self()


@pytest.fixture
def fake() -> Iterator[FakeTransport]:
    with FakeTransport(nodes(says(b"fine\n"), **SCRIPTS)) as fake:
        yield fake
        close_everything()


@pytest.fixture
def mixed(task: Task, fake: FakeTransport) -> Worker:
    """A worker that has ended on one node of each kind."""
    worker = task.run("rpm -q kernel", nodes=ALL, timeout=0.2, stop_grace=0)
    assert worker is not None
    return worker


# -- how it stands ---------------------------------------------------------------------------------------------------


def test_every_node_is_in_its_sets(mixed: Worker) -> None:
    assert mixed.nodes == NodeSet(ALL)
    assert mixed.ok == NodeSet("n[1-3],mute")
    assert mixed.failed == NodeSet("bad,hang,killed,lost")
    assert mixed.timedout == NodeSet("hang")
    assert mixed.unreached == mixed.not_run == mixed.pending == NodeSet()
    assert isinstance(mixed.ok, NodeSet)
    assert mixed.done()
    assert mixed.did_timeout()
    assert mixed.exit_code() == 3


def test_sets_can_be_read_while_it_runs(task: Task, fake: FakeTransport) -> None:
    worker = task.submit("x", nodes="n[1-2],hang")
    assert worker.pending | worker.ok == worker.nodes
    wait_until(lambda: worker.ok == NodeSet("n[1-2]"))
    assert worker.pending == NodeSet("hang")
    assert worker.failed == NodeSet()
    assert worker.exit_code() == 3  # not ended is not well
    assert not worker.done()
    looks = [(str(group.nodes), group.outcome) for group in worker.groups()]
    assert looks == [("n[1-2]", Outcome.EXITED), ("hang", None)]


def test_every_node_is_in_one_group(mixed: Worker) -> None:
    groups = mixed.groups()
    assert all(isinstance(group, Group) for group in groups)
    assert [(str(group.nodes), str(group.output), group.rc, group.outcome, group.why) for group in groups] == [
        ("n[1-3]", "fine", 0, Outcome.EXITED, ""),
        ("bad", "no such package", 1, Outcome.EXITED, "exit 1"),
        ("hang", "", None, Outcome.TIMEOUT, "timeout after 0.2 s"),
        ("killed", "", 137, Outcome.SIGNALED, "killed by SIGKILL"),
        ("lost", "half", 255, Outcome.LOST, "reset"),
        ("mute", "", 0, Outcome.EXITED, ""),
    ]
    assert sum(len(group.nodes) for group in groups) == len(mixed.nodes)
    assert repr(groups[0]) == "<Group n[1-3] (3) exit 0, 4 bytes>"


def test_a_missing_newline_does_not_make_a_group(task: Task) -> None:
    with FakeTransport(nodes(says(b"same\n"), n2=says(b"same"), n3=says(b"same\r\n"))):
        worker = task.run("x", nodes="n[1-3]")
    assert worker is not None
    assert [(str(group.nodes), str(group.output)) for group in worker.groups()] == [("n[1-3]", "same")]
    assert [(str(out), str(at)) for out, at in worker.iter_buffers()] == [("same", "n[1-3]")]
    assert [bytes(worker.result(f"n{n}").stdout) for n in (1, 2, 3)] == [b"same\n", b"same", b"same\r\n"]


def test_failures_fold_and_add_up(mixed: Worker) -> None:
    failures = mixed.failures()
    assert failures == {
        ("running", "CommandFailed", "exit 1"): NodeSet("bad"),
        ("running", "CommandTimeout", "timeout after 0.2 s"): NodeSet("hang"),
        ("running", "CommandFailed", "killed by SIGKILL"): NodeSet("killed"),
        ("running", "ConnectionLost", "reset"): NodeSet("lost"),
    }
    assert sum(map(len, failures.values())) == len(mixed.failed)
    with pytest.raises(JobsFailed) as caught:
        mixed.check()
    assert caught.value.failures == failures
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "code"),
    [("n1,mute", 0), ("n1,bad", 1), ("n1,killed", 1), ("bad,lost", 3), ("n1,hang", 3), ("n1,dead", 3)],
)
def test_exit_codes(task: Task, fake: FakeTransport, names: str, code: int) -> None:
    worker = task.submit("x", nodes=names, timeout=0.1, stop_grace=0)
    worker.wait()
    assert worker.exit_code() == code
    assert (worker.failures() == {}) is (code == 0)


def test_a_node_that_was_not_reached(task: Task, sshd: Sshd) -> None:
    story = Recorder()
    with closed_port() as (address, port):
        task.node_options("gone", address=address, port=port)
        task.node_options("fine", address=sshd.address(1), port=sshd.port)
        options = {key: value for key, value in sshd.options().items() if key != "port"}
        worker = task.run("echo hi", nodes="gone,fine", handler=story, **options)  # type: ignore[call-overload]
    assert worker is not None
    assert worker.ok == NodeSet("fine")
    assert worker.unreached == worker.not_run == worker.failed == NodeSet("gone")
    assert worker.failures() == {("tcp", "ConnectRefused", "tcp: refused"): NodeSet("gone")}
    assert task.node_retcode("gone") == task.max_retcode() == 255
    assert story.names("gone") == ["pickup", "hup", "done"]
    assert story.names("fine") == ["pickup", "read", "hup", "done"]
    assert sorted(story.given("hup")) == [0, 255]
    result = worker.futures["gone"].exception()
    assert isinstance(result, ConnectRefused)
    assert (result.node, result.phase, len(result.attempts)) == ("gone", "tcp", 1)
    assert result.result is not None
    assert (result.result.ran, result.result.rc, result.result.ok) == (False, 255, False)


# -- waiting ---------------------------------------------------------------------------------------------------------


def test_results_come_as_they_end_and_never_raise(task: Task) -> None:
    order = {f"n{i}": says(b"", after=0.1 * i) for i in (3, 1, 2)}
    lost = [Step("running"), Step("lost", error=ConnectionLost(), after=0.05)]
    with FakeTransport(nodes(**order, gone=lost)):
        worker = task.submit("x", nodes="n[1-3],gone")
        results = list(worker.results())
    assert [result.node for result in results] == ["gone", "n1", "n2", "n3"]
    assert [result.outcome for result in results] == [Outcome.LOST] + [Outcome.EXITED] * 3
    assert [result.node for result in worker.results()] == ["gone", "n1", "n2", "n3"]  # again, at once
    assert isinstance(results[0].error, ConnectionLost)
    assert results[1].error is None


def test_results_pump(task: Task, fake: FakeTransport) -> None:
    story = Recorder()
    worker = task.submit("x", nodes="n[1-3]", handler=story)
    for _ in worker.results():
        assert story.threads <= {threading.current_thread()}
    task.join()
    assert story.names()[-1] == "close"


def test_a_result_raises_what_ended_its_job(mixed: Worker) -> None:
    assert mixed.result("n1").stdout == "fine\n"
    assert mixed.result("bad").rc == 1
    with pytest.raises(CommandFailed, match="bad: exit 1"):
        mixed.result("bad").check()
    with pytest.raises(ConnectionLost) as caught:
        mixed.result("lost")
    assert caught.value.result is not None
    assert caught.value.result.stdout == "half"
    assert caught.value.result.ran is None  # nobody knows
    with pytest.raises(KeyError):
        mixed.result("nobody")


def test_wait_only_waits(task: Task, fake: FakeTransport) -> None:
    worker = task.submit("x", nodes="n1,hang")
    began = time.monotonic()
    assert worker.wait(0.2) is False
    assert 0.2 <= time.monotonic() - began < 1.2
    assert worker.pending == NodeSet("hang")
    act(fake, fake.sessions[0], Step("exit"), Step("end"))
    assert worker.wait(10) is True
    assert worker.wait()


@pytest.mark.parametrize("kind", [LookupError, KeyboardInterrupt])
@pytest.mark.parametrize("inside", [True, False], ids=["in the block", "while it waits on leaving"])
def test_a_block_that_an_exception_leaves_aborts(
    task: Task, fake: FakeTransport, kind: type[BaseException], inside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[BaseException] = [] if inside else [kind()]
    monkeypatch.setattr(Worker, "wait", lambda self, wait=Worker.wait: _raise(waits.pop()) if waits else wait(self))
    with pytest.raises(kind), task.submit("x", nodes="hang") as worker:  # noqa: PT012 (the block is the subject)
        wait_until(lambda: any(session.sent for session in fake.sessions))
        if inside:
            raise kind
    assert worker.futures["hang"].cancelled()
    assert [end.stop.policy for end in fake.ends] == ["kill" if kind is LookupError else "term"]


def _raise(error: BaseException) -> None:
    raise error


def test_after_wait_the_handlers_have_been_called(task: Task, fake: FakeTransport) -> None:
    story = Recorder()
    with task.submit("x", nodes="n[1-50]", handler=story) as worker:
        wait_until(worker.done)
    assert story.names().count("done") == 50
    assert story.names()[-1] == "close"

    def wait(worker: Worker, timedout: bool) -> None:
        assert other.wait(10)  # a handler's wait calls no handlers

    story.events.clear()
    other = task.submit("x", nodes="n1", handler=story)
    task.submit("x", nodes="n2", on_close=wait).wait()
    other.wait()
    assert story.names()[-1] == "close"


def test_wait_in_another_thread_waits_without_handlers(task: Task, fake: FakeTransport) -> None:
    story = Recorder()
    worker = task.submit("x", nodes="n[1-3]", handler=story)
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.extend((worker.wait(10), len(list(worker.results())))))
    thread.start()
    thread.join()
    assert found == [True, 3]
    assert story.events == []
    task.join()
    assert story.names().count("done") == 3


def test_check_waits_for_what_it_checks(task: Task) -> None:
    with FakeTransport(nodes(says(b"", 2, after=0.2), n1=says())):
        worker = task.submit("x", nodes="n[1-2]")
        with pytest.raises(JobsFailed, match="exit 2: n2"):
            worker.check()


def test_as_a_context_manager_it_waits(task: Task) -> None:
    with FakeTransport(nodes(says(b"ok", after=0.2))):
        with task.submit("x", nodes="n1") as worker:
            assert not worker.done()
        assert worker.ok == NodeSet("n1")


def test_an_exception_that_leaves_the_block_aborts(task: Task, fake: FakeTransport) -> None:
    began = time.monotonic()
    with pytest.raises(ZeroDivisionError), task.submit("x", nodes="n1,hang") as worker:  # noqa: PT012 (the block is it)
        worker.result("n1")
        raise ZeroDivisionError
    assert time.monotonic() - began < 3
    assert worker.result("n1").ok
    assert isinstance(worker.futures["hang"].exception(), Aborted)


def test_iterating_gives_the_futures(mixed: Worker) -> None:
    assert list(mixed) == list(mixed.futures.values())
    assert len(mixed) == len(mixed.nodes)
    assert list(mixed.futures) == list(mixed.nodes)


# -- steering --------------------------------------------------------------------------------------------------------


def test_abort_of_some_nodes(task: Task, fake: FakeTransport) -> None:
    with FakeTransport(nodes(HANGS)) as hanging:
        worker = task.submit("x", nodes="n[1-3]")
        wait_until(lambda: len(hanging.sessions) == 3)
        worker.abort("n[1-2]")
        wait_until(lambda: len(worker.failed) == 2)
        assert worker.pending == NodeSet("n3")
        with pytest.raises(KeyError, match="no such node in this worker: n4"):
            worker.abort("n[3-4]")
        assert worker.pending == NodeSet("n3")
        worker.abort()
        assert worker.wait(5)
    assert [type(future.exception()) for future in worker] == [Aborted] * 3


def test_standard_input_of_all_nodes_and_of_one(task: Task, sshd: Sshd) -> None:
    names = ",".join(sshd.nodes(2))
    worker = task.shell("cat", nodes=names, **sshd.options())
    worker.write("both\n")
    worker.write(b"one\n", sshd.address(1))
    worker.set_write_eof(sshd.address(1))
    worker.set_write_eof()
    worker.set_write_eof()
    task.resume()
    assert task.node_buffer(sshd.address(1)) == "both\none"
    assert task.node_buffer(sshd.address(2)) == "both"


def test_standard_input_from_a_handler(task: Task, sshd: Sshd) -> None:
    class Talk(EventHandler):
        def ev_read(self, worker: Worker, node: str, sname: str, msg: bytes) -> None:
            worker.write(b"answer\n", node)
            worker.set_write_eof(node)

    task.run("echo question; read x; echo got $x; cat", nodes=sshd.address(1), handler=Talk(), **sshd.options())
    assert task.node_buffer(sshd.address(1)) == "question\ngot answer"


def test_what_was_submitted_without_input_takes_none(task: Task, sshd: Sshd) -> None:
    worker = task.submit("cat; echo end", nodes=sshd.address(1), **sshd.options())
    with pytest.raises(OptionError, match="submit with stdin=True"):
        worker.write(b"x")
    worker.set_write_eof()
    assert worker.result(sshd.address(1)).stdout == "end\n"


def test_input_as_bytes_and_as_a_function_of_the_node(task: Task, sshd: Sshd) -> None:
    names = sshd.nodes(2)
    task.run("cat", nodes=names, stdin=lambda node: f"for {node}".encode(), **sshd.options())
    assert {str(out) for out, _ in task.iter_buffers()} == {f"for {name}" for name in names}
    task.run("cat", nodes=names, stdin=b"for all", **sshd.options())
    assert [(str(out), len(at)) for out, at in task.iter_buffers()] == [("for all", 2)]


@pytest.mark.usefixtures("terminals")
def test_a_terminal_by_choice(task: Task, sshd: Sshd) -> None:
    task.run("test -t 0 && echo terminal; echo err >&2", nodes=sshd.address(1), pty=True, **sshd.options())
    assert task.node_buffer(sshd.address(1)) == "terminal\nerr"


# -- texts and life --------------------------------------------------------------------------------------------------


def test_reprs_say_how_it_stands(mixed: Worker) -> None:
    text = repr(mixed)
    assert text.startswith("<Worker ")
    assert f" 'rpm -q kernel' {mixed.nodes} (8): 4 exit 0 · 1 exit 1 · 3 in trouble, 0." in text
    assert "\n" not in text
    assert repr(mixed.result("bad")).startswith("<NodeResult bad exit 1, 16 bytes out, 0 err, 0.")
    assert repr(mixed.result("bad")).endswith(" s, 1 try>")
    assert repr(mixed.futures["n1"]).startswith("<Future <NodeResult n1 exit 0, 5 bytes out, 0 err, ")
    assert "ConnectionLost" in repr(mixed.futures["lost"])


def test_a_worker_that_runs_says_so(task: Task, fake: FakeTransport) -> None:
    worker = task.submit("journalctl -u slurmd --since -1h | grep -i prolog | tail -1", nodes="n1,hang")
    worker.result("n1")
    assert f"'journalctl -u slurmd --since -1h | grep…' {worker.nodes} (2): 1 exit 0 · 1 running, " in repr(worker)
    wait_until(lambda: "running" in repr(worker.futures["hang"]))


def test_dropping_a_worker_frees_it_and_results_outlive_it(task: Task, fake: FakeTransport) -> None:
    worker = task.submit("x", nodes="n[1-3]")
    worker.wait()
    kept = worker.result("n2")
    ref = weakref.ref(worker)
    for _ in range(70):  # what has ended is let go of in heaps of 64
        task.submit("x", nodes="n1").wait()
    fake.sessions.clear()
    del worker
    gc.collect()
    assert ref() is None
    assert kept.stdout == "fine\n"
    assert kept.check() is kept


def test_a_kept_error_keeps_neither_its_connection_nor_its_worker(task: Task, sshd: Sshd, tmp_path: Path) -> None:
    def links() -> list[object]:
        return [found for found in gc.get_objects() if type(found).__name__ == "Link"]

    earlier = links()  # which another test may have let go of a moment ago
    nobody = tmp_path / "known_hosts"
    nobody.touch()
    options: Any = {**sshd.options(), "known_hosts": str(nobody)}
    stranger: Any = {**sshd.options(), "identity": sshd.new_key("stranger")}
    workers = [task.submit("true", nodes=sshd.nodes(3), **given) for given in (options, stranger)]
    errors = [future.exception() for worker in workers for future in worker]
    assert [type(error) for error in errors] == [UnknownHostKey] * 3 + [AuthRejected] * 3
    refs = [weakref.ref(worker) for worker in workers]
    del workers
    task.run("true", nodes=sshd.address(1), **sshd.options())
    task.disconnect()

    def gone() -> bool:
        gc.collect()
        return all(link in earlier for link in links()) and [ref() for ref in refs] == [None, None]

    wait_until(gone, what="the connections and the workers are freed")
    assert all(str(error) for error in errors)
