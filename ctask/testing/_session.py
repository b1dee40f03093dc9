# SPDX-License-Identifier: Apache-2.0
"""The process of one connection: the parent of the commands that run on it, as sshd's session process is.

It is forked by the keeper (`ctask.testing._keeper`) and told what to do through a socket by the server,
which holds the other end. A command leads a session of its own and has nothing but its three streams. When
the socket ends, so does this process; its commands live on, and come back to the keeper.

One thread; nothing is shared.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import struct

__all__ = ["EXITED", "MAX_MESSAGE", "receive", "serve", "set_death_signal", "set_subreaper"]

#: What this process tells: the number of a command, and its wait status.
EXITED = struct.Struct("!Ii")

#: The longest message that it takes: a header and a command, which Linux bounds to 128 KiB for one argument.
MAX_MESSAGE = 160 * 1024

#: Python ignores some of these, and the keeper handles others: a command starts with none of that.
_SIGNALS = (
    signal.SIGCHLD,
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGPIPE,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGXFSZ,
)

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def set_death_signal() -> None:
    """Have the kernel kill this process when the thread that forked it is gone."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def set_subreaper() -> None:
    """Make this process the parent of all its descendants that lose theirs."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def receive(sock: socket.socket, count: int) -> tuple[bytes, list[int]]:
    """Take a message and up to `count` descriptors, which no command will inherit; b"" at the end."""
    try:
        # Python before 3.13 drops the flag that would say so in the call itself.
        message, streams, _, _ = socket.recv_fds(sock, MAX_MESSAGE, count)
    except ConnectionError:
        return b"", []
    for stream in streams:
        os.set_inheritable(stream, False)
    return message, streams


def serve(control: socket.socket, environment: dict[str, str], folder: str) -> None:
    """Run what `control` asks for until it ends.

    A message is a JSON header, a NUL and the bytes of a command: ``{"run": 3}`` with three descriptors or the
    path of a terminal, or ``{"signal": 3, "name": "TERM"}``.
    """
    os.chdir(folder)
    commands: dict[int, int] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is not control:
                    _reap(control, selector, commands, key)
                elif not _obey(control, selector, commands, environment):
                    return


def _obey(
    control: socket.socket,
    selector: selectors.BaseSelector,
    commands: dict[int, int],
    environment: dict[str, str],
) -> bool:
    message, streams = receive(control, 3)
    if not message:
        return False
    head, _, command = message.partition(b"\0")
    asked = json.loads(head)
    if "signal" in asked:
        pid = commands.get(asked["signal"])
        if pid is not None:  # not reaped yet, so the pid cannot be anybody else's
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.Signals[f"SIG{asked['name']}"])
        return True
    number: int = asked["run"]
    try:
        commands[number] = pid = _spawn(asked, command, streams, environment)
        selector.register(os.pidfd_open(pid), selectors.EVENT_READ, number)
    except OSError as error:
        if streams:
            with contextlib.suppress(OSError):
                os.write(streams[2], f"/bin/sh: {error.strerror}\n".encode())
        control.send(EXITED.pack(number, 1 << 8))
    finally:
        for stream in streams:
            os.close(stream)
    return True


def _spawn(asked: dict[str, str], command: bytes, streams: list[int], environment: dict[str, str]) -> int:
    terminal = asked.get("terminal")
    actions: list[tuple[int, ...] | tuple[int, int, str, int, int]]
    if terminal:  # the first terminal that a session's leader opens becomes the session's own
        actions = [(os.POSIX_SPAWN_OPEN, 0, terminal, os.O_RDWR, 0)]
        actions += [(os.POSIX_SPAWN_DUP2, 0, stream) for stream in (1, 2)]
        environment = {**environment, "TERM": asked["term"], "SSH_TTY": terminal}
    else:
        actions = [(os.POSIX_SPAWN_DUP2, fd, stream) for stream, fd in enumerate(streams)]
    argv: list[str | bytes] = ["-sh"] if "login" in asked else ["sh", "-c", command]
    return os.posix_spawn(
        "/bin/sh",
        argv,
        environment,
        file_actions=actions,
        setsid=True,
        setsigmask=(),
        setsigdef=_SIGNALS,
    )


def _reap(
    control: socket.socket,
    selector: selectors.BaseSelector,
    commands: dict[int, int],
    key: selectors.SelectorKey,
) -> None:
    number: int = key.data
    selector.unregister(key.fd)
    os.close(key.fd)
    _, status = os.waitpid(commands.pop(number), 0)
    with contextlib.suppress(ConnectionError):  # the connection is gone: the next read of `control` says so
        control.send(EXITED.pack(number, status))


def _prctl(option: int, value: int) -> None:
    import ctypes  # here, so that the many who only look at EXITED need not load it

    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
