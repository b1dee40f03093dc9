# SPDX-License-Identifier: Apache-2.0
"""P5: much output of one node, gathered, and put into one piece.

Runs in the main thread of a peer's process; nothing is shared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from benchmarks.contest import Arena, Program
from benchmarks.measure import Sample, Setup, measured
from benchmarks.peers import PEERS, Answers, Ctask, OpenSsh, Peer, expect
from benchmarks.report import Figure, Target
from benchmarks.server import served

__all__ = ["PROGRAM"]

#: The cipher that ctask prefers, and sshd takes; `ssh` by itself takes chacha20-poly1305.
GCM = ("-c", "aes128-gcm@openssh.com")

MAKERS: dict[str, Callable[[Setup], Peer]] = {
    "ctask": PEERS["ctask"],
    "ssh": OpenSsh,
    "ssh-gcm": lambda setup: OpenSsh(setup, *GCM),
    "asyncssh": PEERS["asyncssh"],
    "parallel-ssh": PEERS["parallel-ssh"],
}


@contextlib.contextmanager
def arena(sizes: Mapping[str, int]) -> Iterator[Arena]:
    """Yield a server with one node, on which the file lies."""
    with served(sizes, nodes=1) as found:
        path = Path(found.setup.folder) / "output"
        path.write_bytes(_output(sizes["megabytes"]))
        path.chmod(0o644)
        found.setup = dataclasses.replace(found.setup, more={"path": str(path)})
        yield found


def sample(name: str, setup: Setup) -> Sample:
    """Read the file of the node, once cold, connecting included, and once on what is kept."""
    peer = MAKERS[name](setup)
    command = f"cat {setup.more['path']}"
    whole = Path(setup.more["path"]).read_bytes()
    gathered = 0.0

    def work() -> Answers:
        nonlocal gathered
        if not isinstance(peer, Ctask | OpenSsh):  # they give one piece at once
            return peer.run(command)
        began = time.perf_counter()
        join = peer.gather(command)
        gathered = time.perf_counter() - began
        return join()

    found = {}
    for kind in ("cold ", ""):
        answers, cost = measured(work, peer.rest)
        expect(setup, answers, whole)
        if gathered:
            found[f"{kind}gathered"] = len(whole) / 1e6 / gathered
        found[f"{kind}in one piece"] = len(whole) / 1e6 / cost.wall
        found[f"{kind}CPU"] = cost.cpu / len(whole) * 1e9
        del answers
    peer.close()
    return found


def _output(megabytes: int) -> bytes:
    """Return lines of text, no two of them the same."""
    line = 20
    return b"".join(b"line %014d\n" % number for number in range(megabytes * 1_000_000 // line))


PROGRAM = Program(
    name="flow",
    title="P5: the output of one node, gathered",
    heading="one node, {megabytes} MB of lines; cold has the connecting in it (ssh always connects)",
    figures=[
        *(Figure(f"{kind}{name}", "MB/s", 1) for name in ("gathered", "in one piece") for kind in ("cold ", "")),
        *(Figure(f"{kind}CPU", "ms/MB") for kind in ("cold ", "")),
    ],
    targets=[Target("P5", f"{kind}gathered", 1.5, "ssh", least=True) for kind in ("cold ", "")],
    peers={name: partial(sample, name) for name in MAKERS},
    full={"megabytes": 100, "rounds": 5},
    quick={"megabytes": 20, "rounds": 1},
    arena=arena,
)
