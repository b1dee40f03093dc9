# SPDX-License-Identifier: Apache-2.0
"""Nodes that print more than anybody reads: memory stays bounded, the node waits, other nodes keep pace.

The rows E01 and E02 of the fault matrix, on the real sshd. Each is a program in a process of its own, since the most
memory that a process had (VmHWM) never shrinks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from ctask_tests.child import Child
from ctask_tests.fix_leaks import wait_until

if TYPE_CHECKING:
    from ctask_tests.fix_sshd import Sshd

MIB = 1 << 20

#: What is on its way, in the windows of the nodes and in the cutting of lines, and not in the store.
ASIDE = 16 * MIB

PRELUDE = r"""
import concurrent.futures, gc
from ctask_tests.flood_nodes import forget_peak, status
for name, value in GIVEN["options"].items():
    task.set_info(name, value)
for number in range(1, 6):
    task.node_options("flood" if number == 5 else f"w{number}", address=f"127.0.1.{number}")
for name in ("output_memory", "queue_limit"):
    task.set_info(name, GIVEN.get(name, 4 << 20))
MIB, SIZE = 1 << 20, GIVEN.get("size", 64) << 20
LINES = f"head -c {SIZE} /dev/zero | tr '\\0' x | fold -w 1023"

def warm():
    for result in task.submit("seq 20000", nodes="w[1-4],flood", on_read=lambda *_: None).results():
        result.check()
    task.resume()
    gc.collect()
    return forget_peak()
"""


def sizes_of(program: Child, word: str) -> int:
    """Read a figure, and show it to who runs the test with -s."""
    found = int(program.expect(word))
    print(f"{word}: {found / 1e6:.1f} MB")
    return found


def child(sshd: Sshd, program: str, **given: Any) -> Child:
    return Child(PRELUDE + program, options=dict(sshd.options()), **given)


SLOW = """
before = warm()
sizes = {}
def read(worker, node, sname, msg):
    sizes[node] = sizes.get(node, 0) + len(msg) + 1
    if node == "flood":
        marks.append(job.capture.total)
        time.sleep(0.01)
began, marks = time.monotonic(), []
flood = task.submit("yes", nodes="flood", on_read=read)
job = flood.jobs[0]
wait_until(lambda: flood.wait(0.02) or job.capture.total > 4 * MIB)
quick = 0
while quick < 10:  # nodes that print more than their windows, heard and unheard, beside the one that waits
    first = task.submit("head -c 600000 /dev/zero | fold -w 999", nodes="w[1-2]", on_read=read)
    other = task.submit("head -c 600000 /dev/zero", nodes="w[3-4]")
    first.wait(10), other.wait(10)
    assert all(result.ok and len(result.stdout) >= 600000 for w in (first, other) for result in w.results())
    quick += 1
say("quick", time.monotonic() - began)
assert sizes["w1"] == sizes["w2"] >= 6_000_000
marks.clear()
flood.wait(1.0)
assert len(marks) > 50
say("more", marks[-1] - marks[len(marks) // 2])
say("stored", job.capture.total)
say("read", sizes["flood"])
say("phase", job.phase)
say("grown", status("VmHWM") - before)
began = time.monotonic()
task.abort()
flood.wait()
say("aborted", time.monotonic() - began)
result = next(flood.results())
assert result.outcome == "ABORTED", result
assert result.stdout[:4] == b"y\\ny\\n" and len(result.stdout) == job.capture.total
assert result.stdout.count(b"y") == (len(result.stdout) + 1) // 2
"""


@pytest.mark.slow
def test_e01_a_flood_into_a_slow_handler_waits_and_delays_nobody(sshd: Sshd) -> None:
    with child(sshd, SLOW) as program:
        assert float(program.expect("quick")) < 10
        assert int(program.expect("more")) == 0, "the node waits while handlers are called"
        stored, read = sizes_of(program, "stored"), int(program.expect("read"))
        assert 4 * MIB < stored < 32 * MIB, "a program that waits in a loop is at it all the while"
        assert read < MIB
        assert program.expect("phase") == "running"
        assert sizes_of(program, "grown") < 8 * MIB + ASIDE
        assert float(program.expect("aborted")) < 2
        assert program.end() == 0, program.errors()


THROUGH = """
before = warm()
got = lines = 0
def read(worker, node, sname, msg):
    global got, lines
    got += len(msg)
    lines += 1
    if lines % 64 == 0:
        time.sleep(0.001)
worker = task.shell(LINES, nodes="flood", stdin=False, on_read=read, gather=GIVEN["gather"])
task.resume()
assert next(worker.results()).ok
assert got == SIZE, got
say("grown", status("VmHWM") - before)
if GIVEN["gather"]:
    assert worker.result("flood").stdout.count(b"x") == SIZE
"""


@pytest.mark.slow
@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("size", [64, pytest.param(1024, marks=[pytest.mark.nightly, pytest.mark.timeout(300)])])
def test_e01_a_flood_through_a_slow_handler_comes_whole(sshd: Sshd, gather: bool, size: int) -> None:
    with child(sshd, THROUGH, gather=gather, size=size) as program:
        assert sizes_of(program, "grown") < 8 * MIB + ASIDE + size * MIB // 100
        assert program.end(120) == 0, program.errors()


AWAY = """
from ctask.buffers.spill import files
before = warm()
got = 0
def read(worker, node, sname, msg):
    global got
    got += len(msg)
worker = task.submit(LINES, nodes="flood", on_read=read, gather=GIVEN["gather"])
other = task.submit("echo fine", nodes="w[1-4]")
if GIVEN["way"] == "sleep":
    end = time.monotonic() + 20
    while not worker.jobs[0].result and time.monotonic() < end:
        time.sleep(0.02)
else:
    done, left = concurrent.futures.wait(worker.futures.values(), 20)
    assert not left
assert worker.jobs[0].result.ok, "it ends though nobody reads"
assert got == 0
assert all(result.stdout == b"fine\\n" for result in other.results())
say("files", files())
worker.wait()
say("grown", status("VmHWM") - before)
wait_until(lambda: worker.closed)
assert got == SIZE, got
if GIVEN["gather"]:
    whole = worker.result("flood").stdout
    assert whole.count(b"x") == SIZE and whole.count(b"\\n") >= SIZE // 1024
    del whole
del worker, other, done, left
"""


@pytest.mark.slow
@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("way", ["sleep", "wait"])
def test_e01_a_flood_while_the_owner_is_elsewhere_ends_and_loses_nothing(sshd: Sshd, gather: bool, way: str) -> None:
    with child(sshd, "done = left = None\n" + AWAY, gather=gather, way=way) as program:
        assert program.expect("files") == "1"
        assert sizes_of(program, "grown") < 8 * MIB + ASIDE
        assert program.end() == 0, program.errors()


LONG = r"""
def spent(size):
    sizes = []
    began = time.process_time()
    worker = task.shell(
        f"head -c {size} /dev/zero | tr '\\0' x", nodes="flood", stdin=False,
        on_read=lambda worker, node, sname, msg: sizes.append(len(msg)),
    )
    well = task.shell("echo ok", nodes="w1", stdin=False)
    task.resume()
    took = time.process_time() - began
    assert next(well.results()).stdout == b"ok\n"
    assert max(sizes) <= MIB and sum(sizes) == size, (max(sizes), sum(sizes))
    return took, worker
spent(MIB)
few = spent(25_000_000)[0]
gc.collect()
before = forget_peak()
many, worker = spent(100_000_000)
say("grown", status("VmHWM") - before)
say("ratio", many / few)
whole = worker.result("flood").stdout
assert len(whole) == 100_000_000 and whole.count(b"x") == len(whole)
"""


@pytest.mark.slow
def test_e02_a_line_of_100_mb_is_split_for_handlers_only_and_takes_linear_time(sshd: Sshd) -> None:
    with child(sshd, LONG) as program:
        assert sizes_of(program, "grown") < 8 * MIB + ASIDE
        assert float(program.expect("ratio")) < 8
        assert program.end() == 0, program.errors()


ABORTED = """
before = warm()
worker = task.submit("yes", nodes="w[1-4],flood", gather=GIVEN["gather"], on_read=lambda *_: None)
well = task.submit("sleep 0.7; echo ok", nodes="w1")
if GIVEN["gather"]:
    wait_until(lambda: all(job.capture.total > 2 * MIB for job in worker.jobs))
else:
    wait_until(lambda: all(job._intake._store.total > 2 * MIB for job in worker.jobs))
began = time.monotonic()
worker.abort()
concurrent.futures.wait(worker.futures.values())
say("aborted", time.monotonic() - began)
say("grown", status("VmHWM") - before)
for result in worker.results():
    assert result.outcome == "ABORTED", result
    if GIVEN["gather"]:
        assert len(result.stdout) > 2 * MIB and result.stdout[-100:].strip(b"y\\n") == b""
assert next(well.results()).stdout == b"ok\\n"
worker.wait()
"""


@pytest.mark.slow
@pytest.mark.parametrize("gather", [True, False])
def test_e01_a_flood_that_is_aborted_ends_at_once_and_can_be_read(sshd: Sshd, gather: bool) -> None:
    with child(sshd, ABORTED, gather=gather) as program:
        assert float(program.expect("aborted")) < 2
        assert sizes_of(program, "grown") < 8 * MIB + ASIDE
        assert program.end() == 0, program.errors()
    wait_until(lambda: "yes" not in " ".join(sshd.processes().values()), what="the floods have ended on the nodes")
