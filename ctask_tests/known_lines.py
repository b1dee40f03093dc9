# SPDX-License-Identifier: Apache-2.0
"""known_hosts lines and keys that the tests of host keys make up, and a node that shows such a key."""

from __future__ import annotations

import base64
import concurrent.futures
import hashlib
import hmac
import os
import threading
import time
from pathlib import Path

from ctask.options import Target
from ctask.transports.ssh import hostkeys, knownhosts

ED = "ssh-ed25519"


def ssh_string(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


def key(seed: str, kind: str = ED) -> bytes:
    return ssh_string(kind.encode()) + ssh_string(hashlib.sha256(seed.encode()).digest())


def line(names: str, blob: bytes, marker: str = "") -> str:
    kind = knownhosts.type_of(blob).decode()
    return " ".join(filter(None, (marker, names, kind, base64.b64encode(blob).decode())))


def hashed(name: str) -> str:
    salt = hashlib.sha1(name.encode() + b"salt").digest()
    parts = salt, hmac.digest(salt, name.encode(), "sha1")
    return "|1|" + "|".join(base64.b64encode(part).decode() for part in parts)


def write(path: Path, *lines: str, age: float = 10) -> str:
    """Write a known_hosts file that was last changed a while ago, as most were."""
    path.write_text("".join(f"{text}\n" for text in lines))
    then = time.time() - age
    os.utime(path, (then, then))
    return str(path)


def verify(
    paths: str | tuple[str, ...], name: str, blob: bytes, policy: str = "verify", port: int = 22
) -> None:
    files = (paths,) if isinstance(paths, str) else paths
    target = Target(
        address=name, port=port, known_hosts=files, named_known_hosts=True, host_key_policy=policy
    )
    hostkeys.load(files, named=True).verify(target, knownhosts.type_of(blob).decode(), blob)


def accept_all(path: str, nodes: int, threads: int) -> None:
    """Let `threads` threads accept the keys of the same `nodes` at once."""
    gate = threading.Barrier(threads)

    def one(index: int) -> None:
        gate.wait()
        for i in range(nodes):
            at = (i + index) % nodes
            verify(path, f"n{at}", key(str(at)), "accept-new")

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, range(threads)))
