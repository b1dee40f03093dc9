# SPDX-License-Identifier: Apache-2.0
"""What nodes print, through a task: exact bytes, both streams, hostile text, much of it, none of it, and no status.

The rows E03, E04, E05, E07, E08 and E13 of the fault matrix, on the real sshd and on hostile servers, each with a
healthy node beside the sick one. Runs in the thread of pytest.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import pytest

from ctask import ConnectionLost, EventHandler, JobsFailed, NodeResult, NodeSet, Outcome, Task, Worker
from ctask.options import Command
from ctask.testing import FakeTransport, Step
from ctask_tests.fix_hostile import Close, Eof, Err, HangUp, Out, Pause, Script, Signal, Status
from ctask_tests.real_nodes import LATE, WELL, is_well, outcomes, reach, run, takes, task_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ctask_tests.fix_hostile import HostileFactory
    from ctask_tests.fix_sshd import Sshd

#: how a command ends that went well
END = (Status(0), Eof(), Close())

#: writes 3 MB to each stream, 30 kB at a time, in turn; the lines are numbered
BOTH = (
    "i=0; b=$(head -c 29990 /dev/zero | tr '\\0' x); "
    "while [ $i -lt 100 ]; do printf 'o%03d%s\\n' $i $b; printf 'e%03d%s\\n' $i $b >&2; i=$((i+1)); done"
)

#: every byte, and what is a line's end elsewhere
NASTY = (
    bytes(range(256))
    + b"\r\nlone\rreturn\r\r\n\n\r\n"
    + "form\ffeed, vertical\vtab, \u2028 \u2029 \x85 \x1c\x1d\x1e".encode()
    + b"\n\xff\xfe broken \xc3\n\xed\xa0\x80\0\0\nno end\r"
)


@pytest.fixture
def task(sshd: Sshd) -> Task:
    return task_of(sshd)


class Lines(EventHandler):
    """Records the lines of each node and stream."""

    def __init__(self) -> None:
        self.lines: dict[str, list[tuple[str, bytes]]] = {}

    def ev_read(self, worker: Worker, node: str, sname: str, msg: bytes) -> None:
        self.lines.setdefault(node, []).append((sname, bytes(msg)))

    def of(self, node: str, sname: str = "stdout") -> list[bytes]:
        return [line for name, line in self.lines.get(node, []) if name == sname]


def lines_of(data: bytes) -> list[bytes]:
    """The lines as the contract has them: only a newline ends one, and takes one carriage return along."""
    *whole, rest = data.split(b"\n")
    return [line.removesuffix(b"\r") for line in whole] + ([rest] if rest else [])


# -- E03: any bytes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_e03_bytes_are_kept_and_only_newlines_split(task: Task, hostile: HostileFactory, size: int) -> None:
    pieces = [Out(NASTY[at : at + size]) for at in range(0, len(NASTY), size)]
    reach(task, "sick", hostile(Script(steps=(*pieces, *END))))
    lines = Lines()
    found = outcomes(run(task, "printf 'a\\nb'", ["sick", WELL], handler=lines))
    assert found["sick"].stdout == found["sick"].output == NASTY
    assert lines.of("sick") == lines_of(NASTY)
    assert task.node_buffer("sick") == NASTY.replace(b"\r\n", b"\n")
    assert str(found["sick"].stdout) == NASTY.decode("utf-8", "backslashreplace")
    assert is_well(found["sick"])
    assert is_well(found[WELL])
    assert lines.of(WELL) == [b"a", b"b"]


def test_e03_bytes_go_to_a_node_and_back_unchanged(task: Task) -> None:
    result = outcomes(run(task, "cat; cat /proc/self/cmdline", [WELL], stdin=NASTY))[WELL]
    assert result.stdout == NASTY + b"cat\0/proc/self/cmdline\0"


# -- E04: text that would act on a terminal ----------------------------------------------------------------------


def unsafe(text: str) -> bool:
    """Whether a terminal would do more with it than show it; a newline is for tracebacks and logs."""
    return any(not c.isprintable() and c != "\n" for c in text)


EVIL = "\x1b]0;gotcha\x07\x1b[31m\x1b]52;c;cm0=\x07\u202e\x9b2J\r"


def test_e04_output_is_stored_as_it_came_and_shown_in_no_repr(task: Task, hostile: HostileFactory) -> None:
    reach(task, "sick", hostile(Script(steps=(Out(EVIL.encode()), Err(EVIL.encode()), *END))))
    worker = run(task, f"echo '{EVIL}'", ["sick", WELL])
    sick = outcomes(worker)["sick"]
    assert sick.stdout == sick.stderr == EVIL.encode()
    assert outcomes(worker)[WELL].stdout == EVIL.encode() + b"\n"
    shown: list[object] = [worker, sick, sick.stdout, task, *worker.groups(), *worker.futures.values()]
    for one in shown:
        assert not unsafe(repr(one)), type(one)


def test_e04_the_name_of_a_signal_cannot_act_on_a_terminal(
    task: Task, hostile: HostileFactory, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    reach(task, "sick", hostile(Script(steps=(Signal("F" + EVIL, message=EVIL), Eof(), Close()))))
    worker = run(task, "true", ["sick", WELL])
    found = outcomes(worker)
    sick = found["sick"]
    assert (sick.outcome, sick.signal, sick.rc) == (Outcome.SIGNALED, "F" + EVIL, 128)
    with pytest.raises(JobsFailed) as failed:
        worker.check()
    with pytest.raises(Exception, match="killed") as one:
        sick.check()
    texts = [sick.why, repr(sick), repr(worker), str(failed.value), str(one.value), repr(one.value)]
    texts += [text for _, _, text in worker.failures()] + [repr(group) for group in worker.groups()]
    for text in [*texts, *caplog.messages]:
        assert not unsafe(text)
    assert is_well(found[WELL])


def test_e04_a_label_and_a_program_cannot_act_on_a_terminal(task: Task, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    worker = task.shell(["/nowhere/" + EVIL], key=EVIL)
    well = task.shell("true", nodes=[WELL])
    task.resume()
    (result,) = worker.results()
    assert result.node == EVIL
    assert result.error is not None
    with pytest.raises(JobsFailed) as failed:
        worker.check()
    texts = [repr(worker), repr(result), result.why, str(result.error), repr(result.error), str(failed.value)]
    texts += [repr(group) for group in worker.groups()] + [repr(future) for future in worker]
    for text in [*texts, *caplog.messages]:
        assert not unsafe(text)
    assert is_well(outcomes(well)[WELL])


def test_e04_a_handler_that_chokes_on_output_is_logged_without_it(
    task: Task, hostile: HostileFactory, caplog: pytest.LogCaptureFixture
) -> None:
    reach(task, "sick", hostile(Script(steps=(Out(EVIL.encode() + b"\n"), *END))))
    seen: list[bytes] = []

    def choke(worker: Worker, node: str, sname: str, msg: Any) -> None:
        seen.append(bytes(msg))
        raise ValueError(msg)

    worker = task.shell("echo fine", nodes=["sick", WELL], on_read=choke, stdin=False)
    with pytest.raises(ExceptionGroup) as raised:
        task.resume()
    assert sorted(seen) == sorted([EVIL.encode().removesuffix(b"\r"), b"fine"])
    assert len(raised.value.exceptions) == 2
    assert all(is_well(result) for result in outcomes(worker).values())
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
    for text in caplog.messages:
        assert not unsafe(text)


# -- E05: two streams --------------------------------------------------------------------------------------------


def test_e05_both_streams_of_3_mb_are_whole(task: Task) -> None:
    worker = run(task, BOTH, [WELL, "127.0.1.2"])
    filler = b"x" * 29_990 + b"\n"
    for result in outcomes(worker).values():
        assert result.rc == 0
        assert result.stdout == b"".join(b"o%03d" % i + filler for i in range(100))
        assert result.stderr == b"".join(b"e%03d" % i + filler for i in range(100))
        assert len(result.output) == 2 * 100 * 29_995
        assert result.output.count(b"\n") == 200


def test_e05_handlers_have_each_stream_in_its_order(task: Task) -> None:
    lines = Lines()
    worker = run(task, BOTH, [WELL], handler=lines, stderr=True)
    result = outcomes(worker)[WELL]
    assert lines.of(WELL) == result.stdout.lines()
    assert lines.of(WELL, "stderr") == result.stderr.lines()
    assert [line[:4] for line in lines.of(WELL, "stderr")] == [b"e%03d" % i for i in range(100)]
    assert task.node_buffer(WELL) == result.stdout[:-1]
    assert task.node_error(WELL) == result.stderr[:-1]


def test_streams_are_kept_in_the_order_of_their_arrival(task: Task) -> None:
    # Each line is answered before the next is written: nothing else orders two pipes.
    script = "for i in 1 2 3; do echo o$i; read x; echo e$i >&2; read x; done; printf end >&2"
    answered: list[bytes] = []

    def answer(worker: Worker, node: str, sname: str, msg: Any) -> None:
        answered.append(bytes(msg))
        worker.write("go on\n")

    worker = task.shell(script, nodes=[WELL], on_read=answer)
    task.resume()
    result = outcomes(worker)[WELL]
    assert result.output == b"o1\ne1\no2\ne2\no3\ne3\nend"
    assert (result.stdout, result.stderr) == (b"o1\no2\no3\n", b"e1\ne2\ne3\nend")
    assert answered == [b"o1", b"e1", b"o2", b"e2", b"o3", b"e3", b"end"]


def test_pieces_of_both_streams_are_kept_in_the_order_of_their_arrival(task: Task, hostile: HostileFactory) -> None:
    pieces: list[Out | Err] = [Err(b"a"), Out(b"b"), Out(b"c\n"), Err(b"\n"), Out(b"d"), Err(b"e\n"), Out(b"f")]
    reach(task, "sick", hostile(Script(steps=(*pieces, *END))))
    lines = Lines()
    sick = outcomes(run(task, "true", ["sick", WELL], handler=lines))["sick"]
    assert sick.output == b"abc\n\nde\nf"
    assert (sick.stdout, sick.stderr) == (b"bc\ndf", b"a\ne\n")
    assert lines.of("sick") == [b"abc", b"", b"de", b"f"], "read together, the streams are one text"


def test_without_gathering_handlers_have_all_and_nothing_is_kept(task: Task) -> None:
    lines = Lines()
    worker = run(task, BOTH, [WELL, "127.0.1.2"], handler=lines, stderr=True, gather=False)
    for node, result in outcomes(worker).items():
        assert [line[:4] for line in lines.of(node)] == [b"o%03d" % i for i in range(100)]
        assert [line[:4] for line in lines.of(node, "stderr")] == [b"e%03d" % i for i in range(100)]
        assert sum(len(line) + 1 for _, line in lines.lines[node]) == 2 * 100 * 29_995
        assert result.rc == 0
        assert result.stdout == result.stderr == result.output == b""
    assert list(task.iter_buffers()) == []
    assert task.node_buffer(WELL) == b""


@pytest.mark.slow
def test_a_handler_that_sleeps_loses_nothing(task: Task) -> None:
    size = 2 * 1024 * 1024 + 40 * 1024
    script = f"head -c {size} /dev/zero | tr '\\0' x | fold -w 1023; echo; echo end"
    slept: list[float] = []
    got: list[bytes] = []

    def sleep_once(worker: Worker, node: str, sname: str, msg: Any) -> None:
        if not slept:
            slept.append(5.0)
            time.sleep(5.0)
        got.append(bytes(msg))

    worker = run(task, script, [WELL, "127.0.1.2"], on_read=sleep_once, timeout=4)
    for result in outcomes(worker).values():
        assert is_well(result), "who sleeps holds no command up"
        assert result.stdout.count("x") == size
        assert result.stdout.endswith("\nend\n")
    assert sum(line.count(b"x") for line in got) == 2 * size
    assert got.count(b"end") == 2


# -- E07: hardly any output --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "data", "lines"),
    [
        ("printf 'a\\nb'", b"a\nb", [b"a", b"b"]),
        ("echo", b"\n", [b""]),
        ("printf '\\n\\nx\\n\\n'", b"\n\nx\n\n", [b"", b"", b"x", b""]),
        ("printf '\\r\\n'", b"\r\n", [b""]),
        ("true", b"", []),
    ],
)
def test_e07_little_is_not_nothing(task: Task, command: str, data: bytes, lines: list[bytes]) -> None:
    heard = Lines()
    worker = run(task, command, [WELL], handler=heard)
    result = outcomes(worker)[WELL]
    assert result.stdout == data
    assert heard.of(WELL) == lines
    shown = [] if not data else [(data.replace(b"\r\n", b"\n").removesuffix(b"\n"), WELL)]
    assert [(bytes(buf), str(nodes)) for buf, nodes in task.iter_buffers()] == shown
    assert [str(group.nodes) for group in worker.groups()] == [WELL], "who printed nothing is in a group as well"


def test_e07_a_byte_at_a_time_is_one_line_and_waits_for_its_end(task: Task, hostile: HostileFactory) -> None:
    drops: list[Pause | Out] = []
    for byte in b"slow\ntail":
        drops += [Pause(0.1), Out(bytes([byte]))]
    reach(task, "sick", hostile(Script(steps=(*drops, *END))))
    lines = Lines()
    found = outcomes(run(task, "echo quick", ["sick", WELL], handler=lines))
    assert is_well(found["sick"])
    assert found["sick"].stdout == b"slow\ntail"
    assert lines.of("sick") == [b"slow", b"tail"]
    assert found["sick"].timings.total >= 0.9
    assert list(lines.lines) == [WELL, "sick"], "a slow node delays nobody"
    first = found["sick"].timings.first_byte
    assert first is not None
    assert 0.1 <= first < found["sick"].timings.total


# -- E08: a thousand nodes that say the same ---------------------------------------------------------------------


def test_e08_a_thousand_nodes_with_the_same_output_are_one_copy_and_one_group(task: Task) -> None:
    body = b"the same\n" * 1_111

    def script(address: str, command: Command) -> Iterable[Step]:
        odd = address in ("n0007", "n0500", "n0999")
        return [Step("running"), Step("out", b"odd " + address.encode() if odd else body), Step("exit")]

    with FakeTransport(script):
        worker = task.submit("report", nodes="n[0000-0999,1000-1002]", expect=1003)
        assert worker.wait(20)
        assert len(body) <= worker.store.budget.held < 2 * len(body), "bytes that are kept, for all nodes"
        found = [(str(group.nodes), bytes(group.output)) for group in worker.groups()]
    assert found == [
        ("n[0000-0006,0008-0499,0501-0998,1000-1002]", body[:-1]),
        ("n0007", b"odd n0007"),
        ("n0500", b"odd n0500"),
        ("n0999", b"odd n0999"),
    ]
    assert [(len(nodes), bytes(buf)) for buf, nodes in worker.iter_buffers()] == [
        (len(NodeSet(nodes)), output) for nodes, output in found
    ]


# -- E13: no status ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [(Eof(), Close()), (Close(),)], ids=["eof", "close"])
def test_e13_a_close_without_a_status_is_a_loss_at_once(task: Task, hostile: HostileFactory, steps: Any) -> None:
    reach(task, "sick", hostile(Script(steps=(Out(b"so far\n"), *steps))))
    hups: dict[str, int] = {}
    began = time.monotonic()
    worker = task.shell(
        "true", nodes=["sick", WELL], stdin=False, on_hup=lambda worker, node, rc: hups.__setitem__(node, rc)
    )
    task.resume()
    assert time.monotonic() - began < LATE, "it waits for nothing"
    found = outcomes(worker)
    sick = found["sick"]
    assert (sick.outcome, sick.rc, sick.ran, sick.phase) == (Outcome.LOST, 255, None, "running")
    assert isinstance(sick.error, ConnectionLost)
    assert "no exit status" in sick.why
    assert sick.stdout == b"so far\n"
    assert sick.error.result is sick
    assert hups == {"sick": 255, WELL: 0}
    assert is_well(found[WELL])


def test_e13_the_end_of_output_alone_ends_nothing(task: Task) -> None:
    script = "echo words; exec >&- 2>&-; sleep 1; exit 3"
    with takes(1):
        result = outcomes(run(task, script, [WELL], drain_timeout=0.2))[WELL]
    assert (result.outcome, result.rc, result.lingering) == (Outcome.EXITED, 3, False)
    assert result.stdout == b"words\n"


def test_a_loss_after_the_status_is_none(task: Task, hostile: HostileFactory) -> None:
    reach(task, "sick", hostile(Script(steps=(Out(b"all of it\n"), Status(4), HangUp(reset=True)))))
    found: dict[str, NodeResult] = dict(outcomes(run(task, "true", ["sick", WELL])))
    assert (found["sick"].outcome, found["sick"].rc, found["sick"].error) == (Outcome.EXITED, 4, None)
    assert is_well(found[WELL])
