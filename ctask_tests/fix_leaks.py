# SPDX-License-Identifier: Apache-2.0
"""Every test is held to what it leaves behind: threads, descriptors, children.

Runs in the thread of pytest (and of a worker of pytest-xdist). It keeps no state between tests: each one is
measured against the snapshot that was taken before it, after all its other fixtures have been torn down.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "Lasting",
    "Process",
    "Snapshot",
    "children_of",
    "find_leaks",
    "lasting",
    "process_table",
    "settle",
    "wait_until",
]

#: How long what ends on its own may take: a thread on its last lines, a child between exit and reaping.
GRACE = 2.0

#: How many threads that look names up may stay: as many as the first few lookups start.
RESOLVERS = 8

#: How often a condition is looked at.
INTERVAL = 0.01


def wait_until(condition: Callable[[], object], *, timeout: float = 5.0, what: str = "") -> None:
    """Return once `condition()` is true; fail the test when it is not within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {timeout:g} s: {what or condition}")
        time.sleep(INTERVAL)


@dataclass(frozen=True, slots=True)
class Process:
    """A line of the process table."""

    pid: int
    parent: int
    state: str
    name: str

    @property
    def title(self) -> str:
        """The command line as it stands now; a zombie, which has none, shows its name in brackets."""
        try:
            raw = Path(f"/proc/{self.pid}/cmdline").read_bytes()
        except OSError:
            raw = b""
        return raw.replace(b"\0", b" ").decode(errors="replace").strip() or f"[{self.name}] {self.state}"


def process_table() -> dict[int, Process]:
    """Read all processes from /proc.

    Not `/proc/self/task/*/children`, which kernels without CONFIG_PROC_CHILDREN do not have.
    """
    table: dict[int, Process] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            stat = Path(f"/proc/{entry}/stat").read_text(errors="replace")
        except OSError:
            continue  # it ended meanwhile
        name, _, rest = stat.partition("(")[2].rpartition(")")
        state, parent = rest.split()[:2]
        table[int(entry)] = Process(int(entry), int(parent), state, name)
    return table


def children_of(pid: int) -> dict[int, Process]:
    """The children of a process, zombies included."""
    return {child.pid: child for child in process_table().values() if child.parent == pid}


@dataclass(frozen=True, slots=True)
class Lasting:
    """What a thread that lives as long as the process may keep: `count` descriptors of these kinds."""

    count: int = 0
    kinds: frozenset[str] = frozenset()


def lasting() -> dict[str, Lasting]:
    """Say, by the exact name of the thread, what is made once per process and stays.

    The descriptors are let through only in the test in which that thread appears.
    """
    watcher = Lasting(2, frozenset({"anon_inode:[eventpoll]", "anon_inode:[eventfd]"}))
    return {"ctask/watcher": watcher, **{f"ctask/resolver-{n}": Lasting() for n in range(1, RESOLVERS + 1)}}


def settle() -> None:
    """End the tasks and kept connections of this process, where ctask was used at all."""
    if "ctask" not in sys.modules:
        return
    try:
        testing = importlib.import_module("ctask.testing")
    except ModuleNotFoundError as error:
        if error.name != "ctask.testing":
            raise
        return
    close_everything = getattr(testing, "close_everything", None)
    if close_everything is not None:
        close_everything()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The threads, descriptors and children of this process at one moment."""

    threads: frozenset[threading.Thread]
    descriptors: dict[int, str]
    children: dict[int, Process]

    @classmethod
    def take(cls) -> Self:
        """Look at the process as it is now."""
        return cls(frozenset(threading.enumerate()), _descriptors(), _children())


def find_leaks(before: Snapshot, *, grace: float) -> list[str]:
    """Name what is there now and was not in `before`, once `grace` seconds have not made it go."""
    deadline = time.monotonic() + grace
    while (leaks := _compare(before, Snapshot.take())) and time.monotonic() < deadline:
        time.sleep(INTERVAL)
    return leaks


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves threads, descriptors or children behind (marker `leaks_ok`: it may)."""
    before = Snapshot.take()
    yield
    settle()
    if request.node.get_closest_marker("leaks_ok") is not None:
        return
    leaks = find_leaks(before, grace=GRACE)
    if leaks:
        pytest.fail("left behind by this test:\n" + "\n".join(leaks), pytrace=False)


def _descriptors() -> dict[int, str]:
    found: dict[int, str] = {}
    for entry in os.listdir("/proc/self/fd"):
        try:
            found[int(entry)] = os.readlink(f"/proc/self/fd/{entry}")
        except OSError:
            continue  # the descriptor by which the folder itself was read
    return found


def _children() -> dict[int, Process]:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return {}  # none at all: the table need not be read
    return children_of(os.getpid())


def _compare(before: Snapshot, after: Snapshot) -> list[str]:
    allowed = lasting()
    born = [thread for thread in after.threads - before.threads if thread.is_alive()]
    leaks = [_describe_thread(thread) for thread in born if thread.name not in allowed]
    fresh = {fd: link for fd, link in after.descriptors.items() if before.descriptors.get(fd) != link}
    for thread in born:
        if thread.name in allowed:
            _excuse(fresh, allowed[thread.name])
    leaks += [f"descriptor {fd}: {link}" for fd, link in sorted(fresh.items())]
    leaks += [
        f"child {pid}: {child.title}" for pid, child in after.children.items() if pid not in before.children
    ]
    return leaks


def _excuse(fresh: dict[int, str], share: Lasting) -> None:
    """Take the descriptors of a lasting thread out of `fresh`, the oldest (lowest) first."""
    for fd in [fd for fd in sorted(fresh) if _kind(fresh[fd]) in share.kinds][: share.count]:
        del fresh[fd]


def _kind(link: str) -> str:
    return link if link.startswith("anon_inode:") else link.partition(":")[0]


def _describe_thread(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    stack = "".join(traceback.format_stack(frame, limit=6)) if frame is not None else ""
    return f"thread {thread.name!r}{' (daemon)' if thread.daemon else ''}\n{stack}".rstrip()
