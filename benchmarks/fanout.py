# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks fanout`: one command on many nodes, cold and warm, ctask beside its peers.

Starts an OpenSSH sshd of its own on 127.0.1.*, with keys of its own, and runs one peer after the other against it,
round by round (A B C D A B C D …), each in a fresh process. Runs in the main thread; nothing is shared.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measure import BenchmarkError, Cost
from benchmarks.peers import KEX, PEERS, Setup
from benchmarks.report import Samples, table, verdicts

if TYPE_CHECKING:
    from ctask_tests.fix_sshd import Sshd

__all__ = ["add_parser", "run"]

ROOT = Path(__file__).resolve().parent.parent

#: Lines of sshd_config by which all peers negotiate the same key exchange and check the same sort of host key.
SERVER = (f"KexAlgorithms {KEX},{KEX}@libssh.org", "HostKeyAlgorithms ssh-ed25519")

#: Nodes that the server has.
MOST_NODES = 254
#: Seconds after which one peer's process is given up.
PATIENCE = 300.0
#: What `--quick` means.
QUICK = {"nodes": 32, "fanout": 16, "rounds": 2}
FULL = {"nodes": 200, "fanout": 64, "rounds": 5}


def add_parser(programs: Any) -> None:
    """Add this program's options to the command line."""
    parser = programs.add_parser("fanout", help="one command on many nodes, cold and warm", description=__doc__)
    parser.add_argument("--nodes", type=_number, metavar="N", help=f"nodes (default {FULL['nodes']})")
    parser.add_argument("--fanout", type=_number, metavar="N", help=f"at a time (default {FULL['fanout']})")
    parser.add_argument("--rounds", type=_number, metavar="N", help=f"of every peer (default {FULL['rounds']})")
    parser.add_argument("--repeats", type=_number, metavar="N", default=3, help="warm commands of a round (default 3)")
    parser.add_argument("--peers", type=_peers, metavar="A,B", default=list(PEERS), help=f"of {', '.join(PEERS)}")
    parser.add_argument("--quick", action="store_true", help="few nodes, few rounds: {nodes}/{rounds}".format(**QUICK))
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure, and print the table; return 1 where a peer failed."""
    defaults = QUICK if arguments.quick else FULL
    sizes = {name: getattr(arguments, name) or default for name, default in defaults.items()}
    if sizes["nodes"] > MOST_NODES:
        raise BenchmarkError(f"--nodes is at most {MOST_NODES}: these are the addresses of the server")
    peers = _installed(arguments.peers)
    print(_heading(peers, sizes, arguments.repeats), flush=True)
    samples = Samples(sizes["nodes"])
    failed: set[str] = set()
    with _server() as server:
        nodes = server.nodes(sizes["nodes"])
        setup = Setup(nodes, **server.options(), fanout=sizes["fanout"], repeats=arguments.repeats)
        for number in range(sizes["rounds"]):
            for peer in peers:
                if peer not in failed and not _sample(peer, setup, samples, server, f"round {number + 1}"):
                    failed.add(peer)
    print("", *table(samples), "", *verdicts(samples), sep="\n")
    return 1 if failed else 0


def _sample(peer: str, setup: Setup, samples: Samples, server: Sshd, title: str) -> bool:
    """Measure one peer once; False: it failed, which is told."""
    # The server's processes of the peer before are to cost this one nothing.
    server.wait_idle(timeout=60.0)
    try:
        cold, *warm = _child(peer, setup)
    except BenchmarkError as error:
        print(f"{title}  {peer:<13} {error}", file=sys.stderr)
        samples.drop(peer)
        return False
    mean = Cost(*(sum(getattr(cost, what) for cost in warm) / len(warm) for what in ("cpu", "wall")))
    samples.add(peer, cold, mean)
    parts = [
        f"{name} {cost.cpu * 1000 / len(setup.nodes):6.2f} ms/node, {cost.wall:6.3f} s"
        for name, cost in (("cold", cold), ("warm", mean))
    ]
    print(f"{title}  {peer:<13} {'   '.join(parts)}", file=sys.stderr, flush=True)
    return True


def _child(peer: str, setup: Setup) -> list[Cost]:
    """Run one peer in a fresh process, with an empty home and without an agent."""
    kept = ("PATH", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    command = [sys.executable, "-m", "benchmarks.peers", peer]
    try:
        child = subprocess.run(
            command,
            input=json.dumps(dataclasses.asdict(setup)),
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**environment, "HOME": "/nonexistent"},
            timeout=PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise BenchmarkError(f"has not ended after {PATIENCE:g} s") from None
    if child.returncode:
        raise BenchmarkError(f"failed with status {child.returncode}:\n{child.stderr.strip()[-2000:]}")
    return [Cost(**cost) for cost in json.loads(child.stdout.splitlines()[-1])]


def _server() -> Sshd:
    """Return the tests' own sshd, which is to be entered."""
    try:
        import pytest

        from ctask_tests.fix_sshd import Sshd, find_sshd
    except ModuleNotFoundError as error:
        raise BenchmarkError(
            f"{error.name} is not installed, which the tests' sshd needs: pip install 'ctask[test]'"
        ) from error
    try:
        find_sshd()
    except (pytest.skip.Exception, pytest.fail.Exception) as error:
        raise BenchmarkError(str(error)) from error
    return Sshd(*SERVER)


def _installed(wanted: Sequence[str]) -> list[str]:
    """Return those of the peers that can be measured, and say which cannot."""
    peers = []
    for peer in wanted:
        if importlib.util.find_spec(PEERS[peer][1]) is None:
            print(f"{peer} is not installed and left out (pip install {peer})", file=sys.stderr)
        else:
            peers.append(peer)
    return peers


def _heading(peers: Sequence[str], sizes: dict[str, int], repeats: int) -> str:
    client = subprocess.run(["ssh", "-V"], capture_output=True, text=True, check=False).stderr.strip()
    versions = ", ".join(f"{peer} {_version(peer)}" for peer in peers)
    load = os.getloadavg()[0]
    return (
        f"{sizes['nodes']} nodes on one sshd, fan-out {sizes['fanout']}, {sizes['rounds']} rounds; "
        f"warm is the mean of {repeats} further commands on the same nodes\n"
        f"{versions}; {client}; Python {platform.python_version()}, {os.cpu_count()} cores, load {load:.1f}"
    )


def _version(peer: str) -> str:
    if peer == "ctask":  # it may run from a checkout, and is not installed then
        import ctask

        return ctask.__version__
    return importlib.metadata.version(peer)


def _number(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("1 or more")
    return number


def _peers(text: str) -> list[str]:
    names = list(dict.fromkeys(filter(None, text.split(","))))
    unknown = [name for name in names if name not in PEERS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"no such peer: {', '.join(unknown)}; there are {', '.join(PEERS)}")
    return names
