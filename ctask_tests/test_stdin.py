# SPDX-License-Identifier: Apache-2.0
"""Standard input through a task: open, closed, of bytes, files and functions; nobody reads it, or nobody writes it.

On the real sshd. Runs in the thread of pytest.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ctask import ClusterExecutor, EventHandler, LocalResource, OptionError, Outcome, Retry, Task, Worker
from ctask_tests.fix_hostile import Await, Close, Eof, Script, Status
from ctask_tests.real_nodes import WELL, is_well, outcomes, reach, run, takes, task_of

if TYPE_CHECKING:
    from ctask_tests.fix_hostile import HostileFactory
    from ctask_tests.fix_sshd import Sshd

#: More than a channel's window, a pipe and the socket's buffers together.
MUCH = 4 * 1024 * 1024


@pytest.fixture
def task(sshd: Sshd) -> Task:
    return task_of(sshd)


def digest(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode() + b"  -\n"


# -- open: what the program writes -------------------------------------------------------------------------------


def test_what_was_written_before_the_run_arrives_first(task: Task, sshd: Sshd) -> None:
    worker = task.shell("cat", nodes=sshd.nodes(2))
    worker.write(b"before ")
    worker.write("the run, äöü\n")
    worker.set_write_eof()
    worker.set_write_eof()  # again is harmless
    task.resume()
    for result in outcomes(worker).values():
        assert is_well(result)
        assert result.stdout == "before the run, äöü\n"


def test_a_handler_talks_with_a_command(task: Task, sshd: Sshd) -> None:
    talk: dict[str, list[str]] = {}

    def answer(worker: Worker, node: str, sname: str, msg: Any) -> None:
        talk.setdefault(node, []).append(str(msg))
        if msg == "done":
            worker.set_write_eof(node)
        else:
            worker.write(f"{len(talk[node])}\n", node)

    worker = task.shell("echo hello; read a; echo $a; read b; echo done; cat", nodes=sshd.nodes(3), on_read=answer)
    task.resume()
    assert talk == {node: ["hello", "1", "done"] for node in sshd.nodes(3)}
    assert all(is_well(result) for result in outcomes(worker).values())


def test_nodes_are_written_to_and_ended_apart(task: Task, sshd: Sshd) -> None:
    one, two = sshd.nodes(2)
    worker = task.submit("cat; echo end", nodes=[one, two], stdin=True)
    worker.write("for one", one)
    worker.write("for both")
    worker.set_write_eof(one)
    assert worker.result(one).stdout == "for onefor bothend\n"
    assert not worker.futures[two].done(), "its input is still open"
    worker.write(" and two", two)
    worker.set_write_eof()
    assert worker.result(two).stdout == "for both and twoend\n"
    worker.write("too late")  # harmless
    with pytest.raises(KeyError):
        worker.write("x", "nowhere")


def test_other_threads_may_write(task: Task) -> None:
    worker = task.submit("sha256sum", nodes=[WELL], stdin=True)
    piece = os.urandom(100_000)

    def write() -> None:
        for _ in range(20):
            worker.write(piece)
        worker.set_write_eof()

    writer = threading.Thread(target=write)
    writer.start()
    result = worker.result(WELL)
    writer.join()
    assert result.stdout == digest(piece * 20)


# -- not spoken of -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "pty"),
    # Not on a node's terminal: see below.
    [("remote", False), ("local", False), ("local", True), ("placeholder", False), ("placeholder", True)],
)
def test_a_command_that_reads_does_not_wait_for_input_that_nobody_writes(task: Task, where: str, pty: bool) -> None:
    places: dict[str, dict[str, Any]] = {
        "remote": {"nodes": [WELL]},
        "local": {},
        "placeholder": {"nodes": ["one", "two"], "transport": "local"},
    }
    with takes(0):
        worker = task.run("cat; echo end %h" if where == "placeholder" else "cat; echo end", pty=pty, **places[where])
    for result in outcomes(worker).values():
        assert is_well(result)
        assert result.stdout.text.startswith("end")
    with pytest.raises(OptionError, match="stdin=True"):
        worker.write("too late")


def test_submit_and_the_executor_close_it_too(task: Task) -> None:
    heard: list[Any] = []
    worker = task.submit("cat; echo end", nodes=[WELL], on_done=lambda *what: heard.append(what))
    assert worker.result(WELL).stdout == "end\n"
    with ClusterExecutor(task) as executor:
        assert executor.submit("cat; echo end", node=WELL).result().stdout == "end\n"


def test_open_until_its_end_where_that_is_asked_for(task: Task) -> None:
    worker = task.shell("cat; echo end", nodes=[WELL], stdin=True, timeout=0.5)
    with takes(0.5):
        task.resume()
    assert outcomes(worker)[WELL].outcome is Outcome.TIMEOUT, "nobody has ended its input"


def test_ended_before_the_run_it_is_closed(task: Task) -> None:
    worker = task.shell("cat; echo end", nodes=[WELL])
    worker.set_write_eof()
    worker.write("comes after the end, and is harmless")
    task.resume()
    assert outcomes(worker)[WELL].stdout == "end\n"


def test_what_was_written_to_one_node_opens_the_input_of_no_other(task: Task, sshd: Sshd) -> None:
    one, two = sshd.nodes(2)
    worker = task.shell("cat; echo end", nodes=[one, two])
    worker.write("for one ", one)
    worker.set_write_eof(one)
    task.resume()
    assert {node: str(result.stdout) for node, result in outcomes(worker).items()} == {
        one: "for one end\n",
        two: "end\n",
    }


@pytest.mark.parametrize("early", ["handler", "callback", "registered later"])
def test_handlers_may_write_from_the_start(task: Task, early: str) -> None:
    class Writes(EventHandler):
        def ev_start(self, worker: Worker) -> None:
            worker.write("from ev_start\n")

        def ev_pickup(self, worker: Worker, node: str) -> None:
            worker.set_write_eof(node)

    handler = Writes()
    arguments: dict[str, Any] = {}
    if early == "handler":
        arguments["handler"] = handler
    elif early == "callback":
        arguments.update(on_start=handler.ev_start, on_pickup=handler.ev_pickup)
    worker = task.shell("cat", nodes=[WELL], **arguments)
    if early == "registered later":
        worker.on("start", handler.ev_start).on("pickup", handler.ev_pickup)
    task.resume()
    assert outcomes(worker)[WELL].stdout == "from ev_start\n"


@pytest.mark.parametrize("then", ["writes", "returns", "waits", "listens"])
def test_in_a_handler_it_stays_open_until_that_returns_or_waits(task: Task, then: str) -> None:
    inner: list[Worker] = []

    def done(worker: Worker, node: str, result: Any) -> None:
        within = task.shell("cat; echo end", nodes=[WELL])
        inner.append(within)
        if then == "writes":
            within.write("written ")
            within.set_write_eof()
        elif then == "waits":
            assert within.result(WELL).stdout == "end\n"
        elif then == "listens":
            within.on("start", lambda worker: worker.write("heard "))
            within.on("pickup", lambda worker, node: worker.set_write_eof(node))

    with takes(0):
        task.run("true", nodes=[WELL], on_done=done)
    text = {"writes": "written end\n", "listens": "heard end\n"}.get(then, "end\n")
    assert outcomes(inner[0])[WELL].stdout == text
    if then in ("returns", "waits"):
        with pytest.raises(OptionError, match="closed when the handler returned"):
            inner[0].write("x")


def test_each_try_gets_the_same_input(task: Task) -> None:
    again = Retry(3, wait=0, exit_codes={75}, idempotent=True)
    with takes(0):
        closed = outcomes(task.run("cat; exit 75", nodes=[WELL], retry=again))[WELL]
    assert (len(closed.attempts), closed.stdout) == (3, b"")
    worker = task.shell("cat; exit 75", nodes=[WELL], retry=again)
    worker.write("each time\n")
    worker.set_write_eof()
    task.resume()
    given = outcomes(worker)[WELL]
    assert (len(given.attempts), given.stdout) == (3, b"each time\n")


@pytest.mark.usefixtures("terminals")
@pytest.mark.parametrize("text", [b"", b"a line\n", b"no end"])
def test_on_a_terminal_the_end_of_input_is_typed(task: Task, text: bytes) -> None:
    # sshd tells no command on a terminal of the end of the channel's input.
    with takes(0):
        worker = run(task, "stty -echo; cat; echo end", [WELL], pty=True, stdin=text)
        later = task.shell("stty -echo; cat; echo end", nodes=[WELL], pty=True)
        later.write(text)
        later.set_write_eof()
        task.resume()
    for one in (worker, later):
        assert outcomes(one)[WELL].stdout.replace("\r\n", "\n").endswith(text + b"end\n")


@pytest.mark.usefixtures("terminals")
def test_on_a_terminal_nothing_is_typed_unasked(task: Task) -> None:
    # As `ssh -tt NODE cat </dev/null` it waits; sudo with a terminal of its own would print a ^D that comes too early.
    worker = run(task, "cat", [WELL], pty=True, timeout=0.5, stop_grace=0.5)
    result = outcomes(worker)[WELL]
    assert (result.outcome, result.stdout) == (Outcome.TIMEOUT, b"")


def test_under_asyncio_it_is_closed_as_well(task: Task) -> None:
    async def main() -> bytes:
        results = await task.submit("cat; echo end", nodes=[WELL])
        return results[0].stdout

    assert asyncio.run(main()) == b"end\n"


def test_a_writer_races_the_start_and_nothing_is_lost(task: Task) -> None:
    # Either the write came before the start, and arrives; or it is refused: never is it taken and dropped.
    for delay in range(20):
        worker = task.shell("cat; echo end", nodes=[WELL])
        told: list[str] = []

        def write(worker: Worker = worker, told: list[str] = told, delay: int = delay) -> None:
            time.sleep(delay / 10_000)
            try:
                worker.write("written ")
                told.append("written ")
            except OptionError:
                pass
            worker.set_write_eof()

        writer = threading.Thread(target=write)
        writer.start()
        task.resume()
        writer.join()
        assert outcomes(worker)[WELL].stdout == "".join(told) + "end\n"


# -- closed ------------------------------------------------------------------------------------------------------


def test_closed_the_command_reads_its_end_from_the_start(task: Task, sshd: Sshd) -> None:
    with takes(0):
        worker = run(task, "cat; test -t 0; read x || echo none", sshd.nodes(3), stdin=False)
    for result in outcomes(worker).values():
        assert is_well(result)
        assert result.stdout == b"none\n"
    with pytest.raises(OptionError, match="stdin=True"):
        worker.write("x")


# -- given from the start ----------------------------------------------------------------------------------------


def test_bytes_go_to_every_node(task: Task, sshd: Sshd) -> None:
    data = os.urandom(1_000_000)
    worker = run(task, "sha256sum", sshd.nodes(3), stdin=data)
    assert [result.stdout for result in outcomes(worker).values()] == [digest(data)] * 3
    for empty in (b"", bytearray(), memoryview(b"")):
        assert outcomes(run(task, "cat; echo end", [WELL], stdin=empty))[WELL].stdout == b"end\n"


def test_megabytes_go_through_a_command_and_back(task: Task, sshd: Sshd) -> None:
    data = os.urandom(MUCH)
    worker = run(task, "cat", sshd.nodes(2), stdin=data)
    for result in outcomes(worker).values():
        assert is_well(result)
        assert result.stdout == data


@pytest.mark.parametrize("kind", [str, Path])
def test_a_path_is_read_for_every_node(task: Task, sshd: Sshd, tmp_path: Path, kind: Any) -> None:
    path = tmp_path / "input"
    path.write_bytes(data := os.urandom(600_000))
    worker = task.shell("sha256sum", nodes=sshd.nodes(3), stdin=kind(path))
    task.resume()
    assert [result.stdout for result in outcomes(worker).values()] == [digest(data)] * 3


def test_a_file_object_is_read_once_for_all_nodes(task: Task, sshd: Sshd, tmp_path: Path) -> None:
    path = tmp_path / "input"
    path.write_bytes(b"skipped\nfrom a file\n")
    with path.open("rb") as file:
        file.readline()
        worker = task.shell("cat", nodes=sshd.nodes(3), stdin=file)
    task.resume()  # the file is closed by now
    assert [result.stdout for result in outcomes(worker).values()] == [b"from a file\n"] * 3
    text = run(task, "cat", [WELL], stdin=io.StringIO("text, äöü\n"))
    assert outcomes(text)[WELL].stdout == "text, äöü\n"


def test_a_function_gives_each_node_its_own(task: Task, sshd: Sshd, tmp_path: Path) -> None:
    path = tmp_path / "input"
    path.write_bytes(b"from a file\n")
    one, two, three = sshd.nodes(3)
    given: dict[str, Any] = {one: b"bytes\n", two: path, three: False, WELL: True}
    worker = task.shell("cat; echo end", nodes=list(given), stdin=given.__getitem__)
    worker.write("written\n", WELL)
    worker.set_write_eof(WELL)
    task.resume()
    said = {node: str(result.stdout) for node, result in outcomes(worker).items()}
    assert said == {one: "bytes\nend\n", two: "from a file\nend\n", three: "end\n", WELL: "written\nend\n"}


# -- what goes wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stdin", ["/nowhere/input", "/", 5, None, ["x"]])
def test_what_is_no_input_is_refused_in_the_caller(task: Task, stdin: Any) -> None:
    with pytest.raises(OptionError, match="stdin"):
        task.shell("cat", nodes=[WELL], stdin=stdin)
    with pytest.raises(OptionError, match="stdin"):
        task.shell("cat", nodes=[WELL], stdin=lambda node: stdin if stdin is not None else object())


def test_a_file_that_is_gone_by_then_ends_its_job_and_no_other(task: Task, sshd: Sshd, tmp_path: Path) -> None:
    path = tmp_path / "input"
    path.write_bytes(b"x")
    task.node_options("sick", address=sshd.address(2))
    worker = task.shell("cat", nodes=["sick", WELL], stdin=lambda node: path if node == "sick" else b"fine")
    path.unlink()
    task.resume()
    found = outcomes(worker)
    sick = found["sick"]
    assert (sick.outcome, sick.rc, sick.ran) == (Outcome.ABORTED, None, True)
    assert isinstance(sick.error, LocalResource)
    assert "standard input" in sick.why
    assert is_well(found[WELL])
    assert found[WELL].stdout == b"fine"


@pytest.mark.parametrize("command", ["true", "head -c 1 >/dev/null", "exec <&-; sleep 0.2"])
def test_e12_input_that_nobody_reads_holds_nobody_up(task: Task, command: str) -> None:
    data = bytes(MUCH)
    worker = run(task, f"{command}; exit 3", [WELL, "127.0.1.2"], stdin=data, timeout=10)
    for result in outcomes(worker).values():
        assert (result.outcome, result.rc, result.error) == (Outcome.EXITED, 3, None)
    assert is_well(outcomes(run(task, "true", [WELL]))[WELL]), "the connection serves on"


def test_e12_a_command_that_never_reads_is_ended_with_its_input(task: Task) -> None:
    with takes(0.5):
        worker = run(task, "exec sleep 50", [WELL], stdin=bytes(MUCH), timeout=0.5)
    assert outcomes(worker)[WELL].outcome is Outcome.TIMEOUT
    assert is_well(outcomes(run(task, "true", [WELL]))[WELL])


def test_a_node_without_room_for_input_delays_no_other(task: Task, hostile: HostileFactory, sshd: Sshd) -> None:
    end = threading.Event()
    reach(task, "sick", hostile(Script(steps=(Await(end), Status(0), Eof(), Close()))))
    data = bytes(MUCH)
    worker = task.shell(
        "sha256sum",
        nodes=["sick", WELL, *sshd.nodes(2, 2)],
        stdin=data,
        on_done=lambda worker, node, result: end.set() if len(worker.pending) == 1 else None,
    )
    task.resume()
    found = dict(outcomes(worker))
    assert is_well(found.pop("sick"))
    assert [result.stdout for result in found.values()] == [digest(data)] * 3
