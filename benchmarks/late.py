# SPDX-License-Identifier: Apache-2.0
"""How much later than `timeout` a command is told to end: when the first TERM reaches it.

Runs in the main thread of a peer's process; nothing is shared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.contest import Arena, Program
from benchmarks.measure import BenchmarkError, Sample, Setup
from benchmarks.peers import Ctask
from benchmarks.report import Figure, Target
from benchmarks.server import served

__all__ = ["PROGRAM"]

#: Notes when it began and when TERM came, in seconds since the epoch. The shell waits, so that its trap runs at once.
COMMAND = "f=$(mktemp {folder}/XXXXXX); date +%s.%N >$f; trap 'date +%s.%N >>$f; exit' TERM; sleep 60 & wait"


@contextlib.contextmanager
def arena(sizes: Mapping[str, int]) -> Iterator[Arena]:
    """Yield a server, and a folder that its account can write to."""
    with served(sizes) as found, tempfile.TemporaryDirectory(prefix="ctask-late-", ignore_cleanup_errors=True) as path:
        Path(path).chmod(0o777)
        found.setup = dataclasses.replace(found.setup, more={"path": path})
        yield found


def sample(setup: Setup) -> Sample:
    """Let commands time out, on nodes that are connected and on this machine; the latest of them counts."""
    peer = Ctask(setup)
    peer.run("true")
    found = {}
    places: dict[str, dict[str, Any]] = {
        "node": {"nodes": peer.nodes[:1]},
        "nodes at once": {"nodes": peer.nodes},
        "local": {"key": "here"},
    }
    for title, where in places.items():
        folder = Path(setup.more["path"], title.replace(" ", "-"))
        folder.mkdir(exist_ok=True)
        folder.chmod(0o777)
        for old in folder.iterdir():
            old.unlink()
        worker = peer.task.shell(COMMAND.format(folder=folder), timeout=setup.sizes["timeout"], stop_grace=2, **where)
        peer.task.resume()
        stamps = [[float(word) for word in path.read_text().split()] for path in folder.iterdir()]
        if len(stamps) != len(worker.futures) or any(len(pair) != 2 for pair in stamps):
            raise BenchmarkError(f"{title}: not every command was sent TERM: {stamps}")
        found[title] = max(term - began for began, term in stamps) * 1000 - setup.sizes["timeout"] * 1000
    peer.close()
    return found


PROGRAM = Program(
    name="late",
    title="how late a timeout is",
    heading="one command, and {nodes} at once, with timeout {timeout}; from the first word of the latest to its TERM",
    # Of nodes at once the latest, on a machine that is all of them: a script and an sshd for each share its cores.
    figures=[Figure("node", "ms late", 1), Figure("nodes at once", "ms late", 1), Figure("local", "ms late", 1)],
    targets=[Target("late", "node", 50.0), Target("late", "local", 50.0)],
    peers={"ctask": sample},
    full={"nodes": 8, "timeout": 1, "rounds": 5},
    quick={"nodes": 2, "timeout": 1, "rounds": 1},
    arena=arena,
)
