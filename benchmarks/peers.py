# SPDX-License-Identifier: Apache-2.0
"""The peers of the programs that go by SSH: each runs a command on all nodes of a `Setup`.

Each is used as its documentation shows, through its public API. It is made, and its modules are loaded, before the
clock starts; everything else, its keys and known_hosts file included, is read in the first run. Runs in the main
thread of the peer's process, with the threads and processes that the peer makes.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import time
from collections.abc import Callable
from typing import Any, Protocol

from benchmarks.measure import BenchmarkError, Setup

__all__ = ["KEX", "PEERS", "Answers", "Asyncssh", "ClusterShell", "Ctask", "OpenSsh", "ParallelSsh", "Peer", "expect"]

#: The key exchange of all peers: what differs is the client, and not the mathematics that it happens to prefer.
KEX = "curve25519-sha256"

#: Node -> (exit status, standard output as the peer gives it: bytes or text, with or without its last newline).
Answers = dict[str, tuple[int | None, bytes | str]]


class Peer(Protocol):
    """A client of SSH that runs commands on many nodes."""

    def run(self, command: str) -> Answers:
        """Run a command on all nodes and gather what they print; the first call connects."""

    def rest(self, seconds: float) -> None:
        """Let what goes on in the background go on for so long."""

    def close(self) -> None:
        """Give up the connections; not measured."""


def expect(setup: Setup, answers: Answers, output: bytes) -> None:
    """Check that every node has exited with 0 and printed this.

    Raises:
        BenchmarkError: one has not.
    """
    wanted = output.removesuffix(b"\n")
    wrong = {}
    for node in setup.nodes:
        rc, said = answers.get(node, (None, b""))
        data = said.encode() if isinstance(said, str) else said
        if rc != 0 or data.removesuffix(b"\n") != wanted:
            wrong[node] = (rc, data[:40], len(data))
    if wrong or len(answers) != len(setup.nodes):
        raise BenchmarkError(
            f"{len(wrong)} of {len(setup.nodes)} nodes did not exit with 0 after {wanted[:40]!r}: {wrong}"
        )


class Ctask:
    """ctask, as its README shows it."""

    def __init__(self, setup: Setup) -> None:
        import ctask
        import ctask.transports.ssh  # loaded on demand otherwise, and no import is measured here

        self.nodes = setup.nodes
        self.task = ctask.task_self()
        for name, value in {
            "fanout": setup.sizes.get("fanout", 64),
            "user": setup.user,
            "port": setup.port,
            "identity": setup.identity,
            "known_hosts": setup.known_hosts,
        }.items():
            self.task.set_info(name, value)

    def run(self, command: str) -> Answers:
        return self.gather(command)()

    def gather(self, command: str) -> Callable[[], Answers]:
        """Return when everything is here; what is returned puts it into one piece for each node."""
        worker = self.task.shell(command, nodes=self.nodes)
        self.task.resume()
        return lambda: {result.node: (result.rc, result.stdout) for result in worker.results()}

    def rest(self, seconds: float) -> None:
        time.sleep(seconds)

    def close(self) -> None:
        self.task.disconnect()


class ClusterShell:
    """ClusterShell, which forks ssh for each node; host keys are checked by ssh."""

    def __init__(self, setup: Setup) -> None:
        from ClusterShell.NodeSet import NodeSet
        from ClusterShell.Task import task_self

        self.nodes = NodeSet.fromlist(setup.nodes)
        self.task = task_self()
        self.task.set_info("fanout", setup.sizes.get("fanout", 64))
        self.task.set_info("ssh_user", setup.user)
        words = ["-F none", *(f"-o {name}={value}" for name, value in _openssh(setup).items())]
        self.task.set_info("ssh_options", " ".join(words))

    def run(self, command: str) -> Answers:
        self.task.run(command, nodes=self.nodes)
        printed = {node: buffer.message() for buffer, nodes in self.task.iter_buffers() for node in nodes}
        return {
            node: (rc, printed.get(node, b"")) for rc, nodes in self.task.iter_retcodes() for node in nodes
        }

    def rest(self, seconds: float) -> None:
        time.sleep(seconds)

    def close(self) -> None:
        return


class OpenSsh:
    """`ssh` itself, forked for one node, its output read from a pipe."""

    def __init__(self, setup: Setup, *words: str) -> None:
        options = [word for name, value in _openssh(setup).items() for word in ("-o", f"{name}={value}")]
        self._node = setup.nodes[0]
        self._words = ["ssh", "-F", "none", *options, "-l", setup.user, *words, self._node]

    def run(self, command: str) -> Answers:
        return self.gather(command)()

    def gather(self, command: str) -> Callable[[], Answers]:
        """As that of `Ctask`."""
        parts = []
        with subprocess.Popen(
            [*self._words, command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, bufsize=0
        ) as client:
            assert client.stdout is not None
            while data := os.read(client.stdout.fileno(), 1 << 20):
                parts.append(data)
        return lambda: {self._node: (client.returncode, b"".join(parts))}

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

    def run(self, command: str) -> Answers:
        return self._runner.run(self._run(command))

    async def _run(self, command: str) -> Answers:
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
        room = self._asyncio.Semaphore(setup.sizes.get("fanout", 64))
        answers = await self._asyncio.gather(*(self._one(command, node, room) for node in setup.nodes))
        return dict(zip(setup.nodes, answers, strict=True))

    async def _one(self, command: str, node: str, room: Any) -> tuple[int | None, bytes]:
        async with room:
            connection = self._connections.get(node)
            if connection is None:
                connection = self._connections[node] = await self._asyncssh.connect(node, **self._options)
            done = await connection.run(command, encoding=None)
            return done.exit_status, done.stdout

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

    def run(self, command: str) -> Answers:
        setup = self._setup
        if self._client is None:
            self._client = self._make(
                setup.nodes,
                user=setup.user,
                port=setup.port,
                pkey=setup.identity,
                pool_size=setup.sizes.get("fanout", 64),
                allow_agent=False,
            )
        outputs = self._client.run_command(command)
        # Output first: the end is not told while there is output that nobody has read, and above 2 MB never comes.
        printed = {each.host: "\n".join(each.stdout) for each in outputs}
        self._client.join(outputs)
        return {each.host: (each.exit_code, printed[each.host]) for each in outputs}

    def rest(self, seconds: float) -> None:
        self._sleep(seconds)

    def close(self) -> None:
        self._client = None


#: Name of the distribution -> its class.
PEERS: dict[str, Callable[[Setup], Peer]] = {
    "ctask": Ctask,
    "ClusterShell": ClusterShell,
    "asyncssh": Asyncssh,
    "parallel-ssh": ParallelSsh,
}


def _openssh(setup: Setup) -> dict[str, str]:
    """Return the options of OpenSSH's client: host keys are checked, and nothing is asked for or looked for."""
    return {
        "StrictHostKeyChecking": "yes",
        "UserKnownHostsFile": setup.known_hosts,
        "GlobalKnownHostsFile": os.devnull,
        "IdentityFile": setup.identity,
        "IdentitiesOnly": "yes",
        "KexAlgorithms": KEX,
        "Port": str(setup.port),
    }
