# SPDX-License-Identifier: Apache-2.0
"""Identities: the private keys that a login may offer, and the texts of logins that fail.

Runs in pool threads (`identities`, the errors) and in callers' threads (`check`). A key file is read and
parsed once per process and kept until it changes; `_lock` guards that cache, which is read without it.
Nothing here sends anything, asks for a passphrase, or puts more of a key than its fingerprint into a text.
"""

from __future__ import annotations

import binascii
import errno
import io
import itertools
import logging
import os
import re
import stat
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import paramiko

from ctask.errors import AuthRejected, NoCredentials, OptionError
from ctask.options import Target
from ctask.transports.ssh.hostkeys import fingerprint, short_type
from ctask.transports.ssh.knownhosts import Stamp, read_regular, shown_path, stamp_of, type_of

__all__ = ["Identity", "check", "identities", "no_credentials", "rejected", "skipped"]

_log = logging.getLogger("ctask.ssh")

#: No private key is as long; what is longer is not read to its end.
_LONGEST = 1 << 20
_MAGIC = b"openssh-key-v1\0"
_ARMOUR = re.compile(rb"-----BEGIN ([A-Z0-9 ]*)PRIVATE KEY-----\s(.*?)-----END \1PRIVATE KEY-----", re.DOTALL)
_PUBLIC = re.compile(rb"(?:sk-)?(?:ssh|ecdsa)-[a-z0-9@.-]+ AAAA")
#: type of an OpenSSH key → (paramiko's class, number of its private fields, behind which the comment stands)
_OPENSSH_TYPES = {
    "ssh-ed25519": (paramiko.Ed25519Key, 2),
    "ssh-rsa": (paramiko.RSAKey, 6),
    "ecdsa-sha2-nistp256": (paramiko.ECDSAKey, 3),
    "ecdsa-sha2-nistp384": (paramiko.ECDSAKey, 3),
    "ecdsa-sha2-nistp521": (paramiko.ECDSAKey, 3),
}
_PEM_TYPES = {b"RSA ": paramiko.RSAKey, b"EC ": paramiko.ECDSAKey}
#: What a server may call an authentication method in what we print.
_METHOD = re.compile(r"[A-Za-z0-9@._-]{1,64}")


@dataclass(frozen=True, slots=True)
class Identity:
    """A private key that can be offered; `str()` gives what people are told of it.

    Attributes:
        pkey: signs; may be used by several threads at once. RSA keys sign with SHA-2.
        comment: as the file says, or empty.
        fingerprint: of the public key, as `ssh-keygen -l` prints it.
        key_type: short name: `ed25519`, `ecdsa` or `rsa`.
    """

    path: str
    pkey: paramiko.PKey = field(repr=False)
    comment: str
    fingerprint: str
    key_type: str

    def __str__(self) -> str:
        label = f'"{self.comment}"' if self.comment else shown_path(self.path)
        return f"{self.key_type} {self.fingerprint} {label}"


@dataclass(frozen=True, slots=True)
class _Unusable:
    """Why a file gives no identity; `encrypted` is a key all the same, and no mistake of the caller.

    A record and no exception: it is kept, and the frames of a traceback would keep the file's bytes with it.
    """

    reason: str
    missing: bool = False
    encrypted: bool = False


def identities(target: Target) -> tuple[Identity, ...]:
    """Return the keys to offer, in the target's order, each key once even where two files hold it.

    Files that cannot be used are left out: missing default ones silently, other default ones with one warning
    per process to the logger `ctask.ssh`, encrypted ones with a reason that `no_credentials` tells.
    """
    found: dict[str, Identity] = {}
    for path in target.identities:
        loaded = _load(path)
        if isinstance(loaded, Identity):
            found.setdefault(loaded.fingerprint, loaded)
        elif not (target.named_identities or loaded.missing or loaded.encrypted):
            _tell(path, loaded.reason)
    return tuple(found.values())


def check(target: Target) -> None:
    """Raise in the caller where a key file that it named can never do.

    An encrypted key is none of these: it is left out, and told where nothing else can be offered.

    Raises:
        OptionError: missing, no regular file, unreadable, open to other users, or no private key.
    """
    if not target.named_identities:
        return
    for path in target.identities:
        loaded = _load(path)
        if isinstance(loaded, _Unusable) and not loaded.encrypted:
            raise OptionError(f"identity {shown_path(path)} {loaded.reason}")


def skipped(target: Target) -> tuple[str, ...]:
    """Return `path: reason` for each file that gives no identity, but for default ones that do not exist."""
    reasons = ((path, _load(path)) for path in target.identities)
    return tuple(
        f"{shown_path(path)}: {why.reason}"
        for path, why in reasons
        if isinstance(why, _Unusable) and (target.named_identities or not why.missing)
    )


def rejected(target: Target, offered: Iterable[Identity], allowed: Iterable[str] = ()) -> AuthRejected:
    """Return the error of a login in which the server refused each key that was offered.

    Args:
        allowed: the methods that the server says it would go on with.
    """
    kind = f"refused for {target.user}"
    keys = ", ".join(map(str, offered))
    text = f"{kind}. offered: {keys or 'nothing'}.{_allowed_text(allowed)}"
    return AuthRejected(text, phase="auth", kind=kind)


def no_credentials(target: Target, allowed: Iterable[str] = ()) -> NoCredentials:
    """Return the error of a login for which there was no key that could be offered."""
    kind = f"nothing to offer for {target.user}"
    reasons = skipped(target)
    if reasons:
        why = f" {'; '.join(reasons)}."
    elif identities(target):
        why = ""  # there are keys, and the server takes none at all: `allowed` says so
    else:
        why = f" no such file: {', '.join(map(shown_path, target.identities))}." if target.identities else ""
    return NoCredentials(f"{kind}.{why}{_allowed_text(allowed)}", phase="auth", kind=kind)


_ENCRYPTED = _Unusable("encrypted; not asked for", encrypted=True)

_cache: dict[str, tuple[Stamp, Identity | _Unusable]] = {}
#: paths that a warning was given for; guarded by `_lock`
_warned: set[str] = set()
_lock = threading.Lock()


def _forget_after_fork() -> None:
    # A lock that another thread held at the fork would never be given back in the child.
    global _lock  # noqa: PLW0603
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_after_fork)


def _load(path: str) -> Identity | _Unusable:
    """Return the key of the file, or why there is none; from the cache where the file has not changed."""
    try:
        stamp = stamp_of(os.stat(path))
    except OSError as error:
        return _unreadable(error)
    cached = _cache.get(path)
    if cached is not None and cached[0] == stamp:
        return cached[1]
    with _lock:
        # 64 logins that begin together wait here for one of them to read it.
        cached = _cache.get(path)
        if cached is None or cached[0] != stamp:
            cached = _cache[path] = _read(path, stamp)
        return cached[1]


def _read(path: str, stamp: Stamp) -> tuple[Stamp, Identity | _Unusable]:
    try:
        status, data = read_regular(path, _LONGEST)
    except OSError as error:
        return stamp, _unreadable(error)
    if status.st_uid == os.getuid() and status.st_mode & 0o077:
        # What `ssh` calls an unprotected private key file: our own, with rights for others.
        mode = stat.S_IMODE(status.st_mode)
        text = f"is open to other users (mode {mode:04o}), as no private key may be: chmod 600 it"
        return stamp_of(status), _Unusable(text)
    return stamp_of(status), _parse(path, data)


def _unreadable(error: OSError) -> _Unusable:
    if error.errno == errno.ENOENT:
        return _Unusable("does not exist", missing=True)
    text = error.strerror or type(error).__name__
    return _Unusable(text if text.startswith("is ") else f"cannot be read: {text}")


def _parse(path: str, data: bytes) -> Identity | _Unusable:
    armour = _ARMOUR.search(data)
    if armour is None:
        public = _PUBLIC.match(data)
        return _Unusable("is a public key: name the private one" if public else "is not a private key")
    label, body = armour.groups()
    if label == b"ENCRYPTED " or b"Proc-Type: 4,ENCRYPTED" in body:
        return _ENCRYPTED
    comment = ""
    if label == b"OPENSSH ":
        opened = _opened(body)
        if isinstance(opened, _Unusable):
            return opened
        kind, comment = opened
    elif label in _PEM_TYPES:
        kind = _PEM_TYPES[label]
    else:
        form = f"{label.decode('ascii')}PRIVATE KEY"
        return _Unusable(f'is in a form that is not supported ("{form}"): ssh-keygen -p -f FILE rewrites it')
    try:
        pkey = kind.from_private_key(io.StringIO(data.decode("latin-1")))
        blob = pkey.asbytes()
    except Exception as error:  # noqa: BLE001
        # paramiko lets through whatever a broken file makes of its parsers, `AssertionError` included.
        return _Unusable(f"is a broken private key ({type(error).__name__})")
    return Identity(path, pkey, comment, fingerprint(blob), short_type(pkey.get_name()))


def _opened(body: bytes) -> tuple[type[paramiko.PKey], str] | _Unusable:
    """Return the class for a key in OpenSSH's own form (PROTOCOL.key), and the key's comment."""
    try:
        data = binascii.a2b_base64(body)
        if not data.startswith(_MAGIC):
            raise ValueError
        cipher, kdf, options = itertools.islice(_strings(data, len(_MAGIC)), 3)
        at = len(_MAGIC) + sum(4 + len(part) for part in (cipher, kdf, options))
        # Behind the number of keys, which is always one.
        public, private = itertools.islice(_strings(data, at + 4), 2)
        name = type_of(public).decode("ascii")
    except ValueError:
        return _Unusable("is a broken private key")
    if name not in _OPENSSH_TYPES:
        # Before "encrypted": no passphrase would make it one that can be used.
        return _Unusable(f"is a key of type {name}, which is not supported")
    if cipher != b"none":
        return _ENCRYPTED
    kind, count = _OPENSSH_TYPES[name]
    # Two check numbers, the type, the key's fields, the comment.
    parts = list(_strings(private, 8))
    return kind, _comment_text(parts[1 + count]) if len(parts) > 1 + count else ""


def _strings(data: bytes, at: int) -> Iterator[bytes]:
    """Yield the length-prefixed strings of `data` from `at` on, as long as they are whole."""
    while at + 4 <= len(data):
        end = at + 4 + int.from_bytes(data[at : at + 4], "big")
        if end > len(data):
            return
        yield data[at + 4 : end]
        at = end


def _comment_text(comment: bytes) -> str:
    text = comment.decode("utf-8", "replace")[:100]
    return "".join(c if c.isprintable() and c != '"' else "?" for c in text)


def _allowed_text(allowed: Iterable[str]) -> str:
    # The server chose these words: nothing but what a method can be called reaches a terminal.
    methods = [name for name in allowed if _METHOD.fullmatch(name)][:10]
    return f" server allows: {', '.join(methods)}." if methods else ""


def _tell(path: str, reason: str) -> None:
    """Warn once of a file; never under the lock, since log handlers are users' code."""
    with _lock:
        told = path in _warned
        _warned.add(path)
    if not told:
        _log.warning("identity %s: %s; it is not used", shown_path(path), reason)
