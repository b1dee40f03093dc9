# SPDX-License-Identifier: Apache-2.0
"""The server of an embedded cluster: the listening socket, host key and behaviour of each node.

Runs in a process of its own, forked by `ctask.testing._keeper`. The main thread accepts connections and
carries out what the program asks; each connection has two threads more (see `ctask.testing._connection`).
Only the main thread touches the nodes; a node's set of connections is copied before it is walked, for they
leave it by themselves.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import selectors
import socket
from typing import Any

import paramiko
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from ctask.testing._connection import Connection

__all__ = ["serve"]

#: The first /24 and port that are tried. Others follow, so that clusters can live side by side.
_FIRST_BLOCK, _FIRST_PORT = 77, 40022

#: How many nodes a /24 takes: .0 and .255 are left out, for some programs refuse them.
_BLOCK = 254


class _Node:
    """One node: where it listens, which host key it shows, and how it behaves."""

    def __init__(self, name: str, folder: str) -> None:
        self.name = name
        self.home = os.path.join(folder, "home")
        self.commands = os.path.join(folder, "bin")
        for path in (self.home, self.commands):
            os.makedirs(path, mode=0o700)
        self.first_key = self.key = _new_key()[1]
        self.address = ""
        self.listener: socket.socket | None = None
        self.silent = False
        self.held: list[socket.socket] = []
        self.connections: set[Connection] = set()

    def cut(self) -> None:
        """End every connection: what the node is from now on holds for all who come."""
        for connection in list(self.connections):
            connection.cut()
        for sock in self.held:
            sock.close()
        self.held.clear()


class _Server:
    """All nodes, one port."""

    def __init__(self, config: dict[str, Any], folder: str, link: socket.socket) -> None:
        self._folder = folder
        self._link = link
        self._user: str = config["user"]
        self._max_sessions: int | None = config["max_sessions"]
        self._selector = selectors.DefaultSelector()
        nodes = os.path.join(folder, "nodes")
        self._nodes = {name: _Node(name, os.path.join(nodes, name)) for name in config["nodes"]}
        self._port = self._listen(config["port"])
        secret, self._login = _new_key()
        self._identity = self._write("id_ed25519", secret)
        self._known_hosts = self._write("known_hosts", "".join(map(self._known, self._nodes.values())))

    def run(self) -> None:
        for node in self._nodes.values():
            self._watch(node)
        self._selector.register(self._link, selectors.EVENT_READ)
        _answer(
            {
                "folder": self._folder,
                "port": self._port,
                "identity": self._identity,
                "known_hosts": self._known_hosts,
                "addresses": {node.name: node.address for node in self._nodes.values()},
            }
        )
        while True:
            for key, _ in self._selector.select():
                if key.data is not None:
                    self._accept(key.data)
                elif not self._obey():
                    return

    # -- what the program asks --

    def _obey(self) -> bool:
        line = self._link.recv(65536)
        if not line:
            return False
        asked = json.loads(line)
        for name in asked["nodes"]:
            self._change(self._nodes[name], asked["do"])
        _answer({"done": asked["do"]})
        return True

    def _change(self, node: _Node, what: str) -> None:
        if what == "refuse":
            self._close(node)
        elif what == "silence":
            node.silent = True
        elif what == "change_key":
            node.key = _new_key()[1]
        elif what == "restore":
            node.silent, node.key = False, node.first_key
            if node.listener is None:
                node.listener = _listen(node.address, self._port)
                self._watch(node)
        node.cut()

    # -- sockets --

    def _accept(self, node: _Node) -> None:
        if node.listener is None:  # refused since the selector saw it
            return
        try:
            sock, _ = node.listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                raise
            return  # who called has hung up already
        if node.silent:
            node.held.append(sock)
            return
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = Connection(
            sock,
            key=node.key,
            user=self._user,
            login=self._login,
            max_sessions=self._max_sessions,
            begin_session=lambda control: self._begin_session(node, sock, control),
            on_end=node.connections.discard,
        )
        node.connections.add(connection)
        connection.start()

    def _begin_session(self, node: _Node, sock: socket.socket, control: socket.socket) -> None:
        # In the connection's thread. One message is one packet, so that no two can mix.
        peer, here = sock.getpeername(), sock.getsockname()
        environment = {
            "HOME": node.home,
            "LOGNAME": self._user,
            "USER": self._user,
            "SHELL": "/bin/sh",
            "PATH": f"{node.commands}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "SSH_CLIENT": f"{peer[0]} {peer[1]} {here[1]}",
            "SSH_CONNECTION": f"{peer[0]} {peer[1]} {here[0]} {here[1]}",
            "CTASK_NODE": node.name,
            "CTASK_CLUSTER": os.environ.get("CTASK_CLUSTER", ""),
        }
        message = json.dumps({"environment": environment, "folder": node.home}).encode()
        socket.send_fds(self._link, [message], [control.fileno()])

    def _watch(self, node: _Node) -> None:
        if node.listener is not None:
            self._selector.register(node.listener, selectors.EVENT_READ, node)

    def _close(self, node: _Node) -> None:
        if node.listener is not None:
            self._selector.unregister(node.listener)
            node.listener.close()
            node.listener = None

    def _listen(self, port: int | None) -> int:
        nodes = list(self._nodes.values())
        blocks = -(-len(nodes) // _BLOCK)
        ports = [port] if port else range(_FIRST_PORT, _FIRST_PORT + 20)
        for candidate in ports:
            for first in range(_FIRST_BLOCK, 255 - blocks, blocks):
                for index, node in enumerate(nodes):
                    node.address = f"127.0.{first + index // _BLOCK}.{1 + index % _BLOCK}"
                if self._take(nodes, candidate):
                    return candidate
        raise OSError(errno.EADDRINUSE, f"no free block of 127.0.0.0/16 with port {ports[0]}")

    def _take(self, nodes: list[_Node], port: int) -> bool:
        try:
            for node in nodes:
                node.listener = _listen(node.address, port)
        except OSError as error:
            for node in nodes:
                if node.listener is not None:
                    node.listener.close()
                    node.listener = None
            if error.errno != errno.EADDRINUSE:
                raise
            return False
        return True

    # -- files --

    def _known(self, node: _Node) -> str:
        return f"[{node.address}]:{self._port} {node.key.get_name()} {node.key.get_base64()}\n"

    def _write(self, name: str, text: str) -> str:
        path = os.path.join(self._folder, name)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
            file.write(text)
        return path


def serve(config: dict[str, Any], folder: str, link: socket.socket) -> None:
    """Serve the nodes of `config` until `link`, the socket to the keeper, ends."""
    try:
        server = _Server(config, folder, link)
    except OSError as error:
        _answer({"error": error.strerror or str(error)})
        return
    server.run()


def _listen(address: str, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, port))
        sock.listen(128)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def _new_key() -> tuple[str, paramiko.PKey]:
    key = Ed25519PrivateKey.generate()
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()).decode()
    return secret, paramiko.Ed25519Key(file_obj=io.StringIO(secret))


def _answer(words: dict[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError):  # the program is gone; the keeper will end this process
        os.write(1, json.dumps(words).encode() + b"\n")
