# SPDX-License-Identifier: Apache-2.0
"""Host keys: the decision whether a node is the one that it says.

Runs in pool threads (during a handshake) and in callers' threads (`check`). Nothing here has state of its
own; what known_hosts files say is kept, and guarded, by `knownhosts`. Nothing here sends anything, and
whatever goes wrong in here is a refusal.
"""

from __future__ import annotations

import binascii
import hashlib
import os
from typing import NamedTuple

from ctask.errors import HostKeyError, HostKeyMismatch, HostKeyRevoked, OptionError, UnknownHostKey
from ctask.options import DEFAULT_KNOWN_HOSTS, Target
from ctask.transports.ssh import knownhosts
from ctask.transports.ssh.knownhosts import HostsFile, Line, one_line, shown_path

__all__ = ["KnownHosts", "check", "fingerprint", "load", "lookup_name", "short_type"]


class KnownHosts:
    """What some known_hosts files say, in their order; made by `load`.

    Cheap enough to be made anew for each connection. Thread safety: any thread.
    """

    def __init__(self, files: tuple[HostsFile, ...], *, named: bool) -> None:
        self._files = files
        self._named = named

    def key_types(self, address: str, port: int) -> list[str]:
        """Return the types of key to ask the node for, best first: those that it is known by.

        A preference, no statement: where a file's hashed lines have all one type, that one is returned for
        any name, last, since it saves an HMAC per line and node; and a node that is known by an ed25519 key in a hashed
        line may have others, that are not told.
        """
        name = lookup_name(address, port)
        lines = [line for file in self._files for line in file.find_cheaply(name)]
        revoked = {line.blob for line in lines if line.revoked}
        if any(line.blob in revoked and not line.revoked for line in lines):
            lines = [line for file in self._files for line in file.find(name)]
        types = [line.key_type for line in lines if line.blob not in revoked]
        types += [file.only_hashed_type for file in self._files if file.only_hashed_type]
        return list(dict.fromkeys(types))

    def verify(self, target: Target, key_type: str, blob: bytes) -> None:
        """Return if the key is the node's, as `target.host_key_policy` has it; `accept-new` may add a line.

        A revoked key is refused under every policy. A failure of the check itself is a refusal as well.

        Args:
            target: its address and port make the name that is looked up.
            key_type: the algorithm that the handshake agreed on (`rsa-sha2-512` stands for `ssh-rsa`).
            blob: the public key as it came.

        Raises:
            UnknownHostKey: no file knows the node.
            HostKeyMismatch: a file knows it by other keys.
            HostKeyRevoked: a file marks this key as revoked for it.
            HostKeyError: the key could not be checked, or not be added.
        """
        try:
            self._verify(target, _shown(key_type, blob))
        except HostKeyError:
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {one_line(error)}"
            raise _unchecked(what) from error

    def _verify(self, target: Target, key: _Shown) -> None:
        for file in self._files:
            if self._named and file.problem and not file.missing:
                raise _unchecked(file.problem)
        if self._knows(target, key) or target.host_key_policy == "insecure-ignore":
            return
        if target.host_key_policy != "accept-new":
            raise self._error(UnknownHostKey, target, key, self._unknown_text(key))
        first = target.known_hosts[0]
        if first == os.devnull:
            return
        try:
            self._add(first, target, key)
        except OSError as error:
            kind = "host key could not be added"
            why = error.strerror or one_line(error)
            text = f"{kind} to {shown_path(first)}, so it is refused: {why}"
            raise HostKeyError(text, phase="hostkey", kind=kind) from error

    def _add(self, path: str, target: Target, key: _Shown) -> None:
        with knownhosts.locked(path) as fd:
            # Another thread or process may have added it, or another key, while this one waited for the lock.
            now = KnownHosts(tuple(map(knownhosts.read, target.known_hosts)), named=self._named)
            if not now._knows(target, key):
                name = lookup_name(target.address, target.port)
                knownhosts.append(path, fd, name, key.key_type, key.blob)

    def _knows(self, target: Target, key: _Shown) -> bool:
        """Whether this very key is known; raises where it is revoked, or others are known instead."""
        name = lookup_name(target.address, target.port)
        same = [(file, line) for file in self._files for line in file.find_key(name, key.blob)]
        for file, line in same:
            if line.revoked:
                where = f"{shown_path(file.path)}:{line.number}"
                text = f"HOST KEY REVOKED. shown {key}, revoked in {where}. Not connected."
                raise self._error(HostKeyRevoked, target, key, text)
        if same or target.host_key_policy == "insecure-ignore":
            return bool(same)
        others = [(f, line) for f in self._files for line in f.find(name, without=key.blob) if not line.revoked]
        if others:
            raise self._error(HostKeyMismatch, target, key, _changed_text(key, others))
        return False

    def _unknown_text(self, key: _Shown) -> str:
        there = [shown_path(file.path) for file in self._files if not file.problem]
        gone = [f"{shown_path(file.path)}, which cannot be read" for file in self._files[:1]]
        if gone and self._files[0].missing:
            gone = [f"{shown_path(self._files[0].path)}, which does not exist"]
        looked = ", ".join(there or gone or ["no file"])
        return f"{_KINDS[UnknownHostKey]}; nothing was sent ({key}; looked in {looked})"

    def _error(self, kind: type[HostKeyError], target: Target, key: _Shown, reason: str) -> HostKeyError:
        error = kind(reason, phase="hostkey", kind=_KINDS[kind])
        error.fingerprint = fingerprint(key.blob)
        error.key_type = short_type(key.key_type)
        name = lookup_name(target.address, target.port)
        error.line = knownhosts.line_text(name, key.key_type, key.blob)
        error.files = tuple(file.path for file in self._files)
        return error


class _Shown(NamedTuple):
    """The key that a node showed."""

    key_type: str
    blob: bytes

    def __str__(self) -> str:
        return f"{fingerprint(self.blob)} {short_type(self.key_type)}"


#: The texts that fold with the same failure of other nodes.
_KINDS: dict[type[HostKeyError], str] = {
    HostKeyError: "host key could not be checked",
    UnknownHostKey: "host key not known",
    HostKeyMismatch: "host key changed",
    HostKeyRevoked: "host key revoked",
}


def load(paths: tuple[str, ...], *, named: bool = False) -> KnownHosts:
    """Return what the files say now; a file that has not changed since it was last read is not read again.

    A file that cannot be read says nothing; where it was `named`, `KnownHosts.verify` refuses for it. What is
    wrong with a file is told once per process, by one warning to the logger `ctask.ssh`.
    """
    files = tuple(map(knownhosts.read, paths))
    for file in files:
        knownhosts.tell(file)
    return KnownHosts(files, named=named)


def check(target: Target) -> None:
    """Raise in the caller where the known_hosts files that it named can never do.

    Raises:
        OptionError: one cannot be read, is no regular file, or does not exist and nothing will make it.
    """
    if not target.named_known_hosts:
        return
    # The default files that are listed along may be absent, and `accept-new` makes the first one.
    optional = {os.path.abspath(os.path.expanduser(path)) for path in DEFAULT_KNOWN_HOSTS}
    if target.host_key_policy == "accept-new":
        optional.update(target.known_hosts[:1])
    for file in map(knownhosts.read, target.known_hosts):
        knownhosts.tell(file)
        if file.missing and (file.path in optional or target.host_key_policy == "insecure-ignore"):
            continue
        if file.missing:
            raise OptionError(
                f"{file.problem}: name one that does, or say host_key_policy='accept-new', "
                "which makes the first of them"
            )
        if file.problem:
            raise OptionError(file.problem)


def lookup_name(address: str, port: int) -> str:
    """Return the name that known_hosts files have for a node: `[address]:port` where the port is not 22."""
    name = address.lower()
    return name if port == 22 else f"[{name}]:{port}"


def fingerprint(blob: bytes) -> str:
    """Return `SHA256:…` of a public key, as `ssh-keygen -l` prints it."""
    digest = binascii.b2a_base64(hashlib.sha256(blob).digest(), newline=False)
    return "SHA256:" + digest.decode("ascii").rstrip("=")


def short_type(key_type: str) -> str:
    """Return the short name of a key type: `ssh-ed25519` is `ed25519`."""
    name = key_type.removesuffix("@openssh.com").removesuffix("-cert-v01")
    hardware = "-sk" if name.startswith("sk-") else ""
    name = name.removeprefix("sk-").removeprefix("ssh-")
    for known in ("ed25519", "ecdsa", "rsa"):
        if name == known or name.startswith(f"{known}-"):
            return known + hardware
    return "dsa" if name == "dss" else key_type


def _shown(key_type: str, blob: bytes) -> _Shown:
    """Return the key that was shown; it must be of the type that the handshake verified the signature by."""
    own = knownhosts.type_of(blob).decode("ascii")
    agreed = "ssh-rsa" if key_type in ("rsa-sha2-256", "rsa-sha2-512") else key_type
    if agreed != own:
        raise ValueError(f"a key of type {own} was shown where {key_type!r} was agreed on")
    return _Shown(own, blob)


def _unchecked(what: str) -> HostKeyError:
    kind = _KINDS[HostKeyError]
    return HostKeyError(f"{kind}, so it is refused: {what}", phase="hostkey", kind=kind)


def _changed_text(key: _Shown, known: list[tuple[HostsFile, Line]]) -> str:
    """Tell which key was expected: the one of the same type where there is one."""
    file, line = next((pair for pair in known if pair[1].key_type == key.key_type), known[0])
    before, after = fingerprint(line.blob), fingerprint(key.blob)
    if line.key_type != key.key_type:
        before, after = f"{before} {short_type(line.key_type)}", str(key)
    where = f"{shown_path(file.path)}:{line.number}"
    return f"HOST KEY CHANGED. known {before} ({where}), shown {after}. Not connected."
