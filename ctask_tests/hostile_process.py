# SPDX-License-Identifier: Apache-2.0
"""A hostile server in a process of its own, so that its floods do not take this one's interpreter.

Run as a program it serves until its standard input ends: `hostile_process.py FOLDER`, with the scripts pickled on its
standard input; it answers with a line: where it listens, and the paths of its known_hosts and identity.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctask_tests.hostile_script import Script

__all__ = ["hostile_process"]

ROOT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def hostile_process(folder: Path, *scripts: Script) -> Iterator[dict[str, Any]]:
    """Serve by `scripts` in another process; yields the options by which ctask reaches it."""
    child = subprocess.Popen(
        [sys.executable, "-m", "ctask_tests.hostile_process", str(folder)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    with child, child.stdin, child.stdout:
        text = pickle.dumps(scripts)
        child.stdin.write(b"%d\n" % len(text) + text)
        child.stdin.flush()
        try:
            yield json.loads(child.stdout.readline())
        finally:
            child.kill()


def main() -> None:
    from ctask_tests.fix_hostile import HostileServer

    size = int(sys.stdin.buffer.readline())
    scripts = pickle.loads(sys.stdin.buffer.read(size))
    server = HostileServer(Path(sys.argv[1]), *scripts)
    print(json.dumps({**server.options(), "address": server.address}), flush=True)
    sys.stdin.buffer.read()


if __name__ == "__main__":
    main()
