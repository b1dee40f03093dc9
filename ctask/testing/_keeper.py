# SPDX-License-Identifier: Apache-2.0
"""The process that an embedded cluster lives in: it starts everything, and nothing outlives it.

::

    the program ─ keeper ─┬─ server                 all nodes: paramiko, its threads
                          ├─ session ─ commands     one per connection, as under sshd
                          └─ commands whose connection is gone

The keeper is started by `ctask.testing.EmbeddedCluster`, takes one JSON object from standard input, then
lines that it hands to the server. When standard input ends, the program is gone, or the server dies, it
kills and reaps all its descendants (it is their subreaper, so that none can leave) and removes the cluster's
folder.

One thread, few modules: forking it is cheap and safe. Nothing is shared.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from ctask.testing import _session

__all__ = ["main"]

#: How long the end may take. Only a process in an uninterruptible wait needs longer, and nothing ends that.
_END_WITHIN = 10.0


class _Keeper:
    """Watches the program, the server and all children.

    Guarantees: when `run` returns, every descendant was killed and reaped, and the folder is gone.
    """

    def __init__(self, config: dict[str, Any], folder: str) -> None:
        self._config = config
        self._folder = folder
        self._selector = selectors.DefaultSelector()
        self._link: socket.socket
        self._server = 0
        self._unsent = b""

    def run(self) -> None:
        wake, told = socket.socketpair()
        for end in (wake, told):
            end.setblocking(False)
        signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, _nothing)
        self._link, link = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._server = self._fork(link, lambda: _serve_nodes(self._config, self._folder, link))
        link.close()
        with open(os.devnull, "wb") as null:  # so that the program sees the end of the server's answers
            os.dup2(null.fileno(), 1)
        try:
            self._watch(wake)
        finally:
            _end_descendants()

    def _watch(self, wake: socket.socket) -> None:
        program: int = self._config["program"]
        with contextlib.suppress(ProcessLookupError):
            # Standard input may be held open by a child that the program forked: its own end is seen here.
            self._selector.register(os.pidfd_open(program), selectors.EVENT_READ, lambda: False)
        if os.getppid() != program:
            return
        self._selector.register(0, selectors.EVENT_READ, self._forward)
        self._selector.register(self._link, selectors.EVENT_READ, self._begin_session)
        self._selector.register(wake, selectors.EVENT_READ, lambda: self._signalled(wake))
        while all(key.data() for key, _ in self._selector.select()):
            pass

    def _forward(self) -> bool:
        data = os.read(0, 65536)
        *lines, self._unsent = (self._unsent + data).split(b"\n")
        with contextlib.suppress(ConnectionError):  # the server is gone, which is seen elsewhere
            for line in lines:
                self._link.send(line)
        return bool(data)

    def _begin_session(self) -> bool:
        message, streams = _session.receive(self._link, 1)
        if not message:
            return False
        asked = json.loads(message)
        with socket.socket(fileno=streams[0]) as control:
            self._fork(control, lambda: _session.serve(control, asked["environment"], asked["folder"]))
        return True

    def _signalled(self, wake: socket.socket) -> bool:
        if set(wake.recv(4096)) - {signal.SIGCHLD}:
            return False
        while True:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == self._server:
                return False
            if not pid:
                return True

    def _fork(self, kept: socket.socket, body: Callable[[], None]) -> int:
        keeper = os.getpid()
        pid = os.fork()
        if pid == 0:
            _become(keeper, kept.fileno(), body, is_server=not self._server)
        return pid


def main() -> None:
    """Keep one cluster, as told by the first line of standard input, until that ends."""
    line = b""
    while not line.endswith(b"\n"):  # byte by byte: what follows belongs to the loop
        byte = os.read(0, 1)
        if not byte:
            return
        line += byte
    _session.set_subreaper()
    folder = tempfile.mkdtemp(prefix="ctask-cluster-")
    try:
        _Keeper(json.loads(line), folder).run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _become(keeper: int, kept: int, body: Callable[[], None], *, is_server: bool) -> NoReturn:
    # In a new child: nothing of the keeper's may stay but what the child is for.
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        if not is_server:  # which sees the end of its link, and has something to do then
            _session.set_death_signal()
        if os.getppid() == keeper:
            null = os.open(os.devnull, os.O_RDWR)
            for stream in (0,) if is_server else (0, 1):  # errors go where the program's own go
                os.dup2(null, stream)
            for name in os.listdir("/proc/self/fd"):
                if int(name) > 2 and int(name) != kept:
                    with contextlib.suppress(OSError):  # the listing's own descriptor is closed already
                        os.close(int(name))
            body()
            status = 0
    except BaseException:  # noqa: BLE001 - told, and the child ends here whatever it was
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


def _serve_nodes(config: dict[str, Any], folder: str, link: socket.socket) -> None:
    from ctask.testing import _server  # paramiko is loaded in the server only

    _server.serve(config, folder, link)
    shutil.rmtree(folder, ignore_errors=True)  # here only when the keeper was killed


def _end_descendants() -> None:
    # Who loses its parent becomes a child of this process, so that each round sees the next generation.
    deadline = time.monotonic() + _END_WITHIN
    while time.monotonic() < deadline:
        for pid in _children():
            os.kill(pid, signal.SIGKILL)  # not reaped yet, so the pid cannot be anybody else's
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.001)


def _children() -> Iterator[int]:
    # Not from /proc/self/task: kernels without CONFIG_PROC_CHILDREN have no list there.
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
            if int(file.read().rpartition(b")")[2].split()[1]) == os.getpid():
                yield int(name)


def _nothing(_number: int, _frame: FrameType | None) -> None:
    # A signal with no handler does not reach the wake-up descriptor.
    return


if __name__ == "__main__":
    main()
    os._exit(0)  # this process has no tasks that the interpreter's end would have to wait for
