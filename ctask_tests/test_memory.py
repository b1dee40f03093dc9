# SPDX-License-Identifier: Apache-2.0
"""How much memory output takes: one copy of what is the same, the ceiling for what is not, the rest in a file.

Each figure is the most that a process of its own had (VmHWM). The rows I03 of the fault matrix and P8 of the targets.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from ctask_tests.child import Child

MIB = 1 << 20

PRELUDE = """
import gc
from ctask.buffers.spill import files
from ctask_tests.flood_nodes import Flood, forget_peak, numbered, status
SIZE = GIVEN.get("size", 1_000_000)
if "ceiling" in GIVEN:
    task.set_info("output_memory", GIVEN["ceiling"])

def warm():
    with Flood(200_000):
        for result in task.submit("x", nodes="w[1-100]").results():
            result.check()
    gc.collect()
    return forget_peak()
"""

SAME = (
    PRELUDE
    + """
before = warm()
with Flood(SIZE, same=True):
    worker = task.shell("x", nodes="n[1-1000]", stdin=False)
    task.resume()
assert all(result.ok for result in worker.results())
groups = worker.groups()
assert [len(group.nodes) for group in groups] == [1000]
say("grown", status("VmHWM") - before)
assert groups[0].output == numbered("same", SIZE).removesuffix(b"\\n")
"""
)

DIFFERENT = (
    PRELUDE
    + """
before = warm()
with Flood(SIZE):
    worker = task.shell("x", nodes=f"n[1-{GIVEN['nodes']}]", stdin=False)
    task.resume()
assert all(result.ok for result in worker.results())
assert len(worker.groups()) == GIVEN["nodes"]
for output, nodes in worker.iter_buffers():
    assert output == numbered(str(nodes), SIZE).removesuffix(b"\\n")
for node in ("n1", "n77", f"n{GIVEN['nodes']}"):
    assert worker.result(node).stdout == numbered(node, SIZE)
    assert task.node_buffer(node) == numbered(node, SIZE).removesuffix(b"\\n")
say("grown", status("VmHWM") - before)
say("held", worker.store.budget.held)
say("files", files())
budget = worker.store.budget
kept = worker.result("n7")
del worker, output, nodes
task.resume()
say("kept", budget.held)
assert kept.stdout == numbered("n7", SIZE)
"""
)


@pytest.mark.load
@pytest.mark.slow
@pytest.mark.timeout(120)  # they are about memory: a busy machine may take its time
def test_p8_a_thousand_nodes_that_print_the_same_megabyte_are_one_copy() -> None:
    with Child(SAME) as child:
        grown = int(child.expect("grown"))
        assert child.end() == 0, child.errors()
    print(f"{grown / 1e6:.1f} MB")
    assert grown < 20 * MIB


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_p8_what_is_above_the_ceiling_is_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    ceiling = 64 * MIB
    with Child(DIFFERENT, ceiling=ceiling, nodes=300) as child:
        grown, held = int(child.expect("grown")), int(child.expect("held"))
        assert child.expect("files") == "1"
        kept = int(child.expect("kept"))
        assert child.end() == 0, child.errors()
    print(f"{grown / 1e6:.1f} MB, {held / 1e6:.1f} MB held")
    assert grown < ceiling + 24 * MIB, "the last blocks of 64 nodes, what is on its way, and the file's index"
    assert held < ceiling + 8 * MIB
    assert kept < 3 * MIB
    assert list(tmp_path.iterdir()) == []


CAPPED = (
    PRELUDE
    + """
import resource
from ctask.buffers import store
before = warm()
resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + 300 * (1 << 20), resource.RLIM_INFINITY))
child = store.BufferStore.child
def poor(self, parent, data, **anyhow):
    if data.startswith(b"n250 "):
        raise MemoryError
    return child(self, parent, data, **anyhow)
store.BufferStore.child = poor
with Flood(SIZE):
    worker = task.shell("x", nodes="n[1-500]", stdin=False)
    task.resume()
grown = status("VmHWM") - before
found = {result.node: result for result in worker.results()}
sick = found.pop("n250")
assert (sick.outcome, type(sick.error)) == (Outcome.ABORTED, LocalResource), sick.why
assert "memory" in sick.why
assert sick.stdout and numbered("n250", SIZE).startswith(sick.stdout)
assert all(result.ok and result.stdout == numbered(node, SIZE) for node, result in found.items())
assert [len(nodes) for key, nodes in worker.failures().items()] == [1]
say("grown", grown)
"""
)

FULL = (
    PRELUDE
    + """
import resource
with Flood(SIZE):
    worker = task.shell("x", nodes="n[1-100]", stdin=False)
    task.resume()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
    task.set_info("fanout", 2)
    full = task.submit("x", nodes="f[1-20]")
    full.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    after = task.submit("x", nodes="a[1-5]")
    after.wait()
for result in full.results():
    assert result.error is None or type(result.error) is LocalResource, result
    assert numbered(result.node, SIZE).startswith(result.stdout)
    assert result.ok == (result.stdout == numbered(result.node, SIZE))
ended = [result for result in full.results() if result.error]
say("ended", len(ended))
say(ended[0].why)
assert all(result.stdout == numbered(result.node, SIZE) for w in (worker, after) for result in w.results())
"""
)


@pytest.mark.slow
def test_i03_with_little_memory_each_node_has_its_outcome_and_one_that_gets_none_poisons_no_other() -> None:
    ceiling = 64 * MIB
    with Child(CAPPED, ceiling=ceiling) as child:
        grown = int(child.expect("grown"))
        assert child.end() == 0, child.errors()
    assert grown < ceiling + 24 * MIB


def test_a_file_that_may_not_grow_ends_only_who_needed_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with Child(FULL, ceiling=1 * MIB, size=200_000) as child:
        ended = int(child.expect("ended"))
        assert "file too large" in child.line()
        assert child.end() == 0, child.errors()
    assert 10 <= ended < 20, "a mebibyte has room for the first of them"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("way", ["os.kill(os.getpid(), 9)", "os._exit(3)", "sys.exit(3)"])
def test_the_file_is_gone_however_the_process_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    program = PRELUDE + f"""
with Flood(SIZE):
    worker = task.shell("x", nodes="n[1-4]", stdin=False)
    task.resume()
say("files", files())
{way}
"""
    with Child(program, ceiling=1 * MIB) as child:
        assert child.expect("files") == "1"
        assert child.end() in (-9, 3)
        assert child.errors() == ""
    assert list(tmp_path.iterdir()) == []
