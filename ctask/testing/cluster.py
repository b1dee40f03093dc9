# SPDX-License-Identifier: Apache-2.0
"""A cluster of SSH nodes on this machine, for tests and for trying things out.

It lives in processes of its own (see `ctask.testing._keeper`). The code here starts them and talks to them
through their standard input and output, in the caller's thread; one lock keeps a question and its answer
together.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, cast

from ctask.nodes import NodeSet

if TYPE_CHECKING:
    from typing import Self

    from ctask.task import Task

__all__ = ["EmbeddedCluster"]

#: How long the cluster may take to start, to answer, and to end.
_WITHIN = 30.0

#: What marks the environment of every process of a cluster.
_MARK = "CTASK_CLUSTER"


class EmbeddedCluster:
    """SSH nodes on 127.0.0.0/8, served by paramiko, for as long as a `with` block lasts.

    ::

        task = task_self()
        with EmbeddedCluster("demo[1-16]").use(task):
            task.run("uname -r", nodes="demo[1-16]")

    Every node has an address, a host key and an empty home directory of its own, made on the spot in a
    private folder; the host keys are in a private `known_hosts`, and `identity` is the one key that lets in.
    Nothing of `~/.ssh` is read or written, and no root is needed: all commands run as the user who started
    the cluster, with `CTASK_NODE` in their environment, as children of one process per connection, as under
    sshd.

    Guarantees: when `close` returns, no process of the cluster is left, nor any that commands left behind,
    and the folder is gone. The same happens when the program that started it ends, even by SIGKILL.

    Thread safety: all methods may be called from any thread.
    """

    def __init__(
        self,
        nodes: str | NodeSet | Iterable[str],
        *,
        user: str | None = None,
        port: int | None = None,
        max_sessions: int | None = 10,
    ) -> None:
        """Describe a cluster; `start`, `use` or a `with` block starts it.

        `user` is the only name that may log in (your own, when not given), `port` that of all nodes (a free
        one), `max_sessions` the bound of sessions per connection, as in sshd_config; None is none.

        Raises:
            NodeSetError: `nodes` cannot be read.
            ValueError: `nodes` is empty.
        """
        self._nodes = _node_set(nodes)
        self.user = user or _user_name()
        self._config = {"user": self.user, "port": port, "max_sessions": max_sessions}
        self._mark = secrets.token_hex(8)
        self._lock = threading.Lock()
        # guarded by _lock
        self._keeper: _Keeper | None = None
        # written once per start, whole
        self._about: dict[str, Any] = {}

    @property
    def nodes(self) -> NodeSet:
        """A copy of the node set."""
        return self._nodes.copy()

    # -- life --

    def start(self) -> Self:
        """Start the nodes, and return when all of them listen; nothing happens when they do already.

        Raises:
            OSError: There are no free addresses, or `port` is taken.
        """
        with self._lock:
            if self._keeper is None:
                keeper = _Keeper(self._mark)
                try:
                    nodes = list(self._nodes)
                    self._about = keeper.ask({**self._config, "nodes": nodes, "program": os.getpid()})
                except BaseException:
                    keeper.end()
                    raise
                self._keeper = keeper
        return self

    def close(self) -> None:
        """End every connection, command and process of the cluster, and remove its folder.

        What it said of itself can still be asked. Closing again does nothing.
        """
        with self._lock:
            keeper, self._keeper = self._keeper, None
            if keeper is not None and keeper.end() != 0:  # it could not do its work to the end
                for pid in self.left_behind()[0]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                shutil.rmtree(self._folder(), ignore_errors=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = f"port {self.port}" if self._keeper else "closed" if self._about else "not started"
        return f"<EmbeddedCluster {self._nodes} ({len(self._nodes)}): {state}>"

    # -- what to know about it --

    @property
    def port(self) -> int:
        """The port of all nodes."""
        return int(self._known("port"))

    @property
    def identity(self) -> Path:
        """The private key that lets in, as a file in OpenSSH's form."""
        return Path(self._known("identity"))

    @property
    def known_hosts(self) -> Path:
        """A file with the host keys of all nodes."""
        return Path(self._known("known_hosts"))

    def address(self, node: str) -> str:
        """Return the IP address of `node`.

        Raises:
            KeyError: The cluster has no such node.
        """
        return str(self._known("addresses")[node])

    def use(self, task: Task) -> Self:
        """Start the cluster where needed, and tell `task` how its nodes are reached.

        Programs that name these nodes then run as they stand, on that task.
        """
        self.start()
        task.node_options(
            self._nodes,
            user=self.user,
            port=self.port,
            identity=str(self.identity),
            known_hosts=str(self.known_hosts),
        )
        for node in self._nodes:
            task.node_options(node, address=self.address(node))
        return self

    def left_behind(self) -> tuple[list[int], list[str]]:
        """Look for the cluster's processes (by their environment) and files: there are none after `close`."""
        mark = f"{_MARK}={self._mark}".encode()
        processes = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):  # it ended, or belongs to somebody else
                if mark in Path("/proc", name, "environ").read_bytes().split(b"\0"):
                    processes.append(int(name))
        files = []
        for top, _, names in os.walk(self._folder()) if self._about else ():
            files += [top, *(os.path.join(top, name) for name in names)]
        return processes, files

    # -- bad days --

    def refuse(self, nodes: str | NodeSet | Iterable[str]) -> None:
        """Close the port of `nodes`: who calls is refused. Their connections end, as when sshd was killed."""
        self._tell("refuse", nodes)

    def silence(self, nodes: str | NodeSet | Iterable[str]) -> None:
        """Let `nodes` accept connections and say nothing, as a hung machine does. Their connections end."""
        self._tell("silence", nodes)

    def change_key(self, nodes: str | NodeSet | Iterable[str]) -> None:
        """Give `nodes` host keys that are not in `known_hosts`, as a new system has. Connections end."""
        self._tell("change_key", nodes)

    def drop(self, nodes: str | NodeSet | Iterable[str]) -> None:
        """End the connections of `nodes`; new ones are welcome."""
        self._tell("drop", nodes)

    def restore(self, nodes: str | NodeSet | Iterable[str]) -> None:
        """Let `nodes` be as they were at the start. Their connections end."""
        self._tell("restore", nodes)

    def command(self, nodes: str | NodeSet | Iterable[str], name: str, script: str) -> None:
        """Put a program `name` on `nodes`, first in their PATH; a shell script, unless ``#!`` says otherwise.

        Raises:
            ValueError: `name` is not a file's name.
        """
        if "/" in name or name in ("", ".", ".."):
            raise ValueError(f"a program cannot be called {name!r}")
        text = script if script.startswith("#!") else f"#!/bin/sh\n{script}\n"
        for node in self._some(nodes):
            path = self._folder() / "nodes" / node / "bin" / name
            new = path.with_name(f".{name}.new")
            new.write_text(text, encoding="utf-8")
            new.chmod(0o700)
            new.replace(path)  # in one step: the node may be starting the old one

    # -- within --

    def _tell(self, what: str, nodes: str | NodeSet | Iterable[str]) -> None:
        names = self._some(nodes)
        with self._lock:
            if self._keeper is None:
                raise RuntimeError("the cluster is closed")
            self._keeper.ask({"do": what, "nodes": names})

    def _some(self, nodes: str | NodeSet | Iterable[str]) -> list[str]:
        names = list(_node_set(nodes))
        for name in names:
            self.address(name)
        return names

    def _known(self, what: str) -> Any:
        if not self._about:
            raise RuntimeError("the cluster was not started: use it in a `with` block, or call start()")
        return self._about[what]

    def _folder(self) -> Path:
        return Path(self._known("folder"))


class _Keeper:
    """The cluster's first process. The caller holds the lock."""

    def __init__(self, mark: str) -> None:
        # The same modules as here, wherever they come from. Commands on the nodes get another environment.
        path = os.pathsep.join(folder for folder in sys.path if folder)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ctask.testing._keeper"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, _MARK: mark},
            bufsize=0,
            start_new_session=True,  # Ctrl-C in a terminal is for the program, not for its nodes
        )
        self._questions = cast(IO[bytes], self._process.stdin)
        self._answers = cast(IO[bytes], self._process.stdout)

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        try:
            self._questions.write(json.dumps(question).encode() + b"\n")
            line = self._read_line(time.monotonic() + _WITHIN)
        except BrokenPipeError:
            line = b""
        if not line:
            raise OSError("the embedded cluster has ended by itself; its last words are on stderr")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise OSError(f"the embedded cluster cannot start: {answer['error']}")
        return answer

    def end(self) -> int:
        """Have everything ended, and return the keeper's status."""
        self._questions.close()  # which is the word
        try:
            self._process.wait(_WITHIN)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()
        return self._process.returncode

    def _read_line(self, deadline: float) -> bytes:
        # An answer is one line, and none comes unasked.
        line = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise OSError(f"the embedded cluster did not answer for {_WITHIN:g} s")
                data = self._answers.read(65536)
                if not data:
                    return b""
                line += data
        return line


def _node_set(nodes: str | NodeSet | Iterable[str]) -> NodeSet:
    if not isinstance(nodes, NodeSet):
        nodes = NodeSet(nodes) if isinstance(nodes, str) else NodeSet.fromlist(nodes)
    if not nodes:
        raise ValueError("there must be at least one node")
    return nodes


def _user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # an account without a name, as in some containers
        return "demo"
