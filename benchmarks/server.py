# SPDX-License-Identifier: Apache-2.0
"""The OpenSSH sshd that peers compete on: the tests' own, with keys of its own, an address per node.

Runs in the main thread of `python -m benchmarks`; peers know it by their `Setup` alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.contest import Arena
from benchmarks.measure import BenchmarkError, Setup
from benchmarks.peers import KEX

if TYPE_CHECKING:
    from ctask_tests.fix_sshd import Sshd

__all__ = ["MOST_NODES", "served"]

#: Lines of sshd_config by which all peers negotiate the same key exchange and check the same sort of host key.
SERVER = (f"KexAlgorithms {KEX},{KEX}@libssh.org", "HostKeyAlgorithms ssh-ed25519")

#: Nodes are 127.0.1.1 to 127.0.1.250, then 127.0.2.1 and so on. Each has two processes of sshd while it is connected.
BLOCK = 250
MOST_NODES = 4 * BLOCK

#: Seconds until the connections of the peer before have to be gone.
IDLE_WITHIN = 60.0


@contextlib.contextmanager
def served(sizes: Mapping[str, int], nodes: int | None = None) -> Iterator[Arena]:
    """Start a server with `nodes` nodes (`sizes["nodes"]` by default); yield what peers are to know of it.

    Raises:
        BenchmarkError: there is no sshd, or what its start needs is not installed.
    """
    count = sizes["nodes"] if nodes is None else nodes
    if count > MOST_NODES:
        raise BenchmarkError(f"--nodes is at most {MOST_NODES}: these are the addresses of the server")
    with _server() as server:
        addresses = [f"127.0.{1 + n // BLOCK}.{1 + n % BLOCK}" for n in range(count)]
        setup = Setup(
            sizes,
            nodes=addresses,
            port=server.port,
            user=server.user,
            identity=server.identity,
            known_hosts=_known_hosts(server, addresses),
            folder=str(server.folder),
        )
        # The server's processes of the peer before are to cost this one nothing.
        yield Arena(setup, lambda: server.wait_idle(timeout=IDLE_WITHIN))


def _known_hosts(server: Sshd, addresses: list[str]) -> str:
    from ctask_tests.fix_sshd import write_known_hosts

    endpoints = [(address, server.port) for address in addresses]
    return write_known_hosts(Path(server.folder) / "known_nodes", endpoints, server.host_key_lines)


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
