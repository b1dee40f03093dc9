# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.hashed`: CPU of knowing 500 nodes by a known_hosts file of 10,000 hashed lines.

There is no network and no peer: the file is read, and keys are verified as a handshake does it. In `one key` all lines
have the same key, as cloned and diskless nodes do: then the key does not say which line to look at.

Runs in the main thread; each measurement has a process of its own.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import Spread, cpu

__all__ = ["CASES", "main", "seconds"]

LINES = 10_000
NODES = 500
ROUNDS = 3

#: What the lines are, and in which order nodes are asked for.
CASES = (
    "one key",
    "one key, asked in any order",
    "one key, file in any order",
    "a key each",
    "three types each",
    "unknown nodes, one key",
)
#: Seeds the orders.
SEED = 11


def main() -> int:
    """Measure each case in turn, and print the CPU seconds."""
    print(f"CPU seconds for {NODES} nodes by {LINES:,} hashed lines: median, least and greatest of {ROUNDS} rounds")
    for case in CASES:
        command = [sys.executable, "-m", "benchmarks.hashed", case]
        rounds = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(ROUNDS)]
        spread = Spread.of([float(done.stdout) for done in rounds])
        print(f"  {case:28} {spread.median:6.2f}   {spread.least:6.2f}   {spread.most:6.2f}", flush=True)
    return 0


def seconds(case: str, lines: int = LINES, nodes: int = NODES) -> float:
    """Return the CPU seconds of one case."""
    from ctask.errors import UnknownHostKey
    from ctask.options import Target
    from ctask.transports.ssh import hostkeys

    kinds = ("ssh-ed25519", "ssh-rsa", "ecdsa-sha2-nistp256") if case == "three types each" else ("ssh-ed25519",)
    same, unknown = "one key" in case, case.startswith("unknown")
    names = [f"node{number}.cluster" for number in range(lines // len(kinds))]
    asked = names[:: max(1, len(names) // nodes)][:nodes]
    chance = random.Random(SEED)
    if "file in any order" in case:
        chance.shuffle(names)
    if "asked in any order" in case:
        chance.shuffle(asked)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "known_hosts")
        path.write_text("".join(_line(name, _key("" if same else name, kind)) for name in names for kind in kinds))
        os.utime(path, (1e9, 1e9))  # one that was changed just now would be read for each node
        before = cpu()
        for name in asked:
            known = hostkeys.load((str(path),))
            target = Target(address=f"new-{name}" if unknown else name, known_hosts=(str(path),))
            known.key_types(target.address, target.port)
            try:
                known.verify(target, kinds[0], _key("" if same else name, kinds[0]))
            except UnknownHostKey:
                if not unknown:
                    raise
        return cpu() - before


def _key(seed: str, kind: str) -> bytes:
    parts = kind.encode(), hashlib.sha256(seed.encode()).digest()
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def _line(name: str, key: bytes) -> str:
    kind = key[4 : 4 + key[3]]
    salt = hashlib.sha1(name.encode() + kind, usedforsecurity=False).digest()
    digest = hmac.digest(salt, name.encode(), "sha1")
    words = (base64.b64encode(part).decode() for part in (salt, digest, key))
    return "|1|{}|{} {kind} {}\n".format(*words, kind=kind.decode())


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(seconds(sys.argv[1]))
    else:
        sys.exit(main())
