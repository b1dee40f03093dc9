# SPDX-License-Identifier: Apache-2.0
"""One peer of the fan-out, in a process of its own: `python -m benchmarks.peers NAME`, a `Setup` on standard input.

Each peer is used as its documentation shows, through its public API, and answers what every node has printed. It is
made, and its modules are loaded, before the clock starts; everything else, its keys and known_hosts file included,
is read in the cold run. Runs in the main thread of the child, with the threads and processes that the peer makes.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

from benchmarks.measure import measured

__all__ = ["COMMAND", "PEERS", "Setup"]

#: What the nodes run, and what each of them has to answer.
COMMAND = "echo ok"
ANSWER = (0, "ok")

#: The key exchange of all peers: what differs is the client, and not the mathematics that it happens to prefer.
KEX = "curve25519-sha256"

#: Node -> (exit status, standard output without its last newline).
Answers = dict[str, tuple[int | None, str]]


@dataclasses.dataclass(frozen=True, slots=True)
class Setup:
    """What a peer is given.

    Attributes:
        nodes: addresses, which stand in `known_hosts` together with `port`.
        repeats: how many warm commands follow the cold one.
    """

    nodes: list[str]
    port: int
    user: str
    identity: str
    known_hosts: str
    fanout: int
    repeats: int


class Peer(Protocol):
    """A client of SSH that runs a command on many nodes."""

    def run(self) -> Answers:
        """Run `COMMAND` on all nodes and gather what they print; the first call connects."""

    def rest(self, seconds: float) -> None:
        """Let what goes on in the background go on for so long."""

    def close(self) -> None:
        """Give up the connections; not measured."""


class Ctask:
    """ctask, as its README shows it."""

    def __init__(self, setup: Setup) -> None:
        import ctask
        import ctask.transports.ssh  # loaded on demand otherwise, and no import is measured here

        self._nodes = setup.nodes
        self._task = ctask.task_self()
        for name, value in {
            "fanout": setup.fanout,
            "user": setup.user,
            "port": setup.port,
            "identity": setup.identity,
            "known_hosts": setup.known_hosts,
        }.items():
            self._task.set_info(name, value)

    def run(self) -> Answers:
        worker = self._task.shell(COMMAND, nodes=self._nodes)
        self._task.resume()
        return {result.node: (result.rc, result.stdout.text) for result in worker.results()}

    def rest(self, seconds: float) -> None:
        time.sleep(seconds)

    def close(self) -> None:
        self._task.disconnect()


class ClusterShell:
    """ClusterShell, which forks ssh for each node; host keys are checked by ssh."""

    def __init__(self, setup: Setup) -> None:
        from ClusterShell.NodeSet import NodeSet
        from ClusterShell.Task import task_self

        options = {
            "StrictHostKeyChecking": "yes",
            "UserKnownHostsFile": setup.known_hosts,
            "GlobalKnownHostsFile": os.devnull,
            "IdentityFile": setup.identity,
            "IdentitiesOnly": "yes",
            "KexAlgorithms": KEX,
            "Port": str(setup.port),
        }
        self._nodes = NodeSet.fromlist(setup.nodes)
        self._task = task_self()
        self._task.set_info("fanout", setup.fanout)
        self._task.set_info("ssh_user", setup.user)
        words = ["-F none", *(f"-o {name}={value}" for name, value in options.items())]
        self._task.set_info("ssh_options", " ".join(words))

    def run(self) -> Answers:
        self._task.run(COMMAND, nodes=self._nodes)
        printed = {
            node: buffer.message().decode() for buffer, nodes in self._task.iter_buffers() for node in nodes
        }
        return {
            node: (rc, printed.get(node, "")) for rc, nodes in self._task.iter_retcodes() for node in nodes
        }

    def rest(self, seconds: float) -> None:
        time.sleep(seconds)

    def close(self) -> None:
        return


class Asyncssh:
    """asyncssh: a connection per node, kept; known_hosts and the key are read once."""

    def __init__(self, setup: Setup) -> None:
        import asyncio

        import asyncssh

        self._asyncio = asyncio
        self._asyncssh = asyncssh
        self._setup = setup
        self._runner = asyncio.Runner()
        self._connections: dict[str, Any] = {}
        self._options: dict[str, Any] = {}

    def run(self) -> Answers:
        return self._runner.run(self._run())

    async def _run(self) -> Answers:
        setup = self._setup
        if not self._options:
            self._options = {
                "port": setup.port,
                "username": setup.user,
                "client_keys": [self._asyncssh.read_private_key(setup.identity)],
                "known_hosts": self._asyncssh.read_known_hosts(setup.known_hosts),
                "kex_algs": [KEX],
                "agent_path": None,
                "config": None,
            }
        room = self._asyncio.Semaphore(setup.fanout)
        answers = await self._asyncio.gather(*(self._one(node, room) for node in setup.nodes))
        return dict(zip(setup.nodes, answers, strict=True))

    async def _one(self, node: str, room: Any) -> tuple[int | None, str]:
        async with room:
            connection = self._connections.get(node)
            if connection is None:
                connection = self._connections[node] = await self._asyncssh.connect(node, **self._options)
            done = await connection.run(COMMAND)
            return done.exit_status, done.stdout.removesuffix("\n")

    def rest(self, seconds: float) -> None:
        self._runner.run(self._asyncio.sleep(seconds))

    def close(self) -> None:
        self._runner.run(self._close())
        self._runner.close()

    async def _close(self) -> None:
        for connection in self._connections.values():
            connection.close()
        await self._asyncio.gather(*(each.wait_closed() for each in self._connections.values()))


class ParallelSsh:
    """parallel-ssh on libssh2, which checks no host keys."""

    def __init__(self, setup: Setup) -> None:
        from pssh.clients import ParallelSSHClient

        # By its name, since whether it ships types depends on the version.
        self._sleep = importlib.import_module("gevent").sleep
        self._make = ParallelSSHClient
        self._setup = setup
        self._client: Any = None

    def run(self) -> Answers:
        setup = self._setup
        if self._client is None:
            self._client = self._make(
                setup.nodes,
                user=setup.user,
                port=setup.port,
                pkey=setup.identity,
                pool_size=setup.fanout,
                allow_agent=False,
            )
        outputs = self._client.run_command(COMMAND)
        self._client.join(outputs)
        # Output first: the status is not told while there is output of the channel that nobody has read.
        return {each.host: ("\n".join(each.stdout), each.exit_code)[::-1] for each in outputs}

    def rest(self, seconds: float) -> None:
        self._sleep(seconds)

    def close(self) -> None:
        self._client = None


#: Name of the distribution -> its class, and the module without which it is not installed.
PEERS: dict[str, tuple[Callable[[Setup], Peer], str]] = {
    "ctask": (Ctask, "ctask"),
    "ClusterShell": (ClusterShell, "ClusterShell"),
    "asyncssh": (Asyncssh, "asyncssh"),
    "parallel-ssh": (ParallelSsh, "pssh"),
}


def main() -> None:
    """Measure one peer: a cold run, then warm ones; print what they cost.

    The costs are printed only when every node has given the right answer every time.
    """
    setup = Setup(**json.load(sys.stdin))
    make, _ = PEERS[sys.argv[1]]
    peer = make(setup)
    # Else the collection that the imports have brought near falls into the cold run of some peers and not of others.
    gc.collect()
    costs = []
    for number in range(1 + setup.repeats):
        answers, cost = measured(peer.run, peer.rest)
        wrong = {node: answers.get(node) for node in setup.nodes if answers.get(node) != ANSWER}
        if wrong or len(answers) != len(setup.nodes):
            sys.exit(f"run {number + 1}: {len(wrong)} of {len(setup.nodes)} nodes did not answer {ANSWER}: {wrong}")
        costs.append(dataclasses.asdict(cost))
    peer.close()
    print(json.dumps(costs))


if __name__ == "__main__":
    main()
