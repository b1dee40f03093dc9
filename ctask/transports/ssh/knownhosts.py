# SPDX-License-Identifier: Apache-2.0
"""known_hosts files (sshd(8), "SSH_KNOWN_HOSTS FILE FORMAT"): read once per process, searched, added to.

Runs in pool threads (during a handshake) and in callers' threads. A file is parsed once and kept until it
changes: `_cache_lock` guards the cache, each file's own lock what is known of it, `_append_lock` the adding
of lines. Lock order: `_append_lock`, `_cache_lock`, a file's lock. What is in the cache is found without a
lock. One bad line never costs another one.
"""

from __future__ import annotations

import binascii
import contextlib
import errno
import fcntl
import hmac
import logging
import os
import re
import stat
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from ctask.transports.ssh.hashed import HashedLines, Line

__all__ = [
    "HostsFile",
    "Line",
    "Stamp",
    "append",
    "line_text",
    "locked",
    "one_line",
    "read",
    "read_regular",
    "shown_path",
    "stamp_of",
    "tell",
    "type_of",
]

_log = logging.getLogger("ctask.ssh")

#: Seconds to wait for another process that holds a known_hosts file's lock; it holds it for milliseconds.
LOCK_WAIT = 5.0
#: A file that was changed this short before it was read may change again without its times telling: such a
#: parse is not trusted by the next look. Some of the coarsest clock ticks of Linux file systems (10 ms).
RACY_NS = 50_000_000
#: Names of key types are printed and written to files: no more than what registered names are made of.
_TYPE_NAME = re.compile(rb"[A-Za-z0-9@._+-]{1,64}")
#: Stands for HMAC-SHA1; it is the only form of hashed names that there is.
_HASH_MAGIC = b"|1|"
_SHA1_SIZE = 20
Stamp = tuple[int, ...]


class HostsFile:
    """One known_hosts file: parsed when made, afterwards only added to.

    Lines of `@cert-authority` are understood and not used: they know no node's own key.

    Attributes:
        problem: why it could not be read, as one line; empty where it could.
        missing: the problem is only that there is no such file.
        bad: numbers of the lines that could not be understood.
        stamp: what the file's identity, size and times were when it was read; guarded by `_cache_lock`.
        trusted: whether an equal stamp means equal bytes; guarded by `_cache_lock`.
    """

    def __init__(self, path: str, data: bytes = b"", *, problem: str = "", missing: bool = False) -> None:
        self.path = path
        self.problem = problem
        self.missing = missing
        self.bad: list[int] = []
        self.stamp: Stamp = ()
        self.trusted = False
        self._lock = threading.Lock()
        self._lines = 0
        self._exact: dict[str, tuple[Line, ...]] = {}
        self._patterns: list[tuple[tuple[str, ...], Line]] = []
        self._hashed = HashedLines()
        # What patterns and hashes gave for a name; written under the lock, read without.
        self._found: dict[str, tuple[Line, ...]] = {}
        self.add(data)

    @property
    def hashes(self) -> bool:
        """Whether the name of a new line is to be hashed: as most of those that are there."""
        return len(self._hashed) > len(self._exact)

    @property
    def only_hashed_type(self) -> str:
        """The one type of key that all hashed lines have; empty where there are more, or none."""
        return self._hashed.only_type

    def add(self, data: bytes) -> None:
        """Parse whole lines and add what they say."""
        with self._lock:
            for raw in data.removesuffix(b"\n").split(b"\n") if data else ():
                self._lines += 1
                try:
                    self._add_line(raw)
                except ValueError:
                    self.bad.append(self._lines)
            self._found.clear()

    def find(self, name: str, *, without: bytes = b"") -> tuple[Line, ...]:
        """Return all keys of `name`, in the order of the lines.

        `without` is a key of which `find_key` has just said that it is not one of them.
        """
        if not self._patterns and not self._hashed:
            return self._exact.get(name, ())
        found = self._found.get(name)
        if found is None:
            with self._lock:
                found = self._search(name, self._hashed.find(name, _bytes(name), without=without))
                if not without:
                    self._found[name] = found
        return found

    def find_key(self, name: str, blob: bytes) -> list[Line]:
        """Return the lines that give `name` this very key: all that revoke it, and one at least of the others.

        Computes the HMACs of this key's lines only, and of these no more than it has to.
        """
        found = self._found.get(name)
        if found is None:
            with self._lock:
                lines = list(self._search(name, ()))
                lines += self._hashed.revoking(_bytes(name), blob)
                if not any(line.blob == blob and not line.revoked for line in lines):
                    lines += self._hashed.one(name, _bytes(name), blob)
                found = tuple(sorted(lines))
        return [line for line in found if line.blob == blob]

    def find_cheaply(self, name: str) -> tuple[Line, ...]:
        """Return what decides which type of key to ask `name` for; where it can be, less than all of its keys.

        Where all hashed lines have the same type, they are left out. Else, of these, all that revoke a key are told,
        and one key of the type that is asked for first is enough.
        """
        if name in self._found:
            return self.find(name)
        with self._lock:
            lines = self._search(name, ())
            if self.only_hashed_type or not self._hashed:
                return lines
            best = self._hashed.best(name, _bytes(name))
        return self.find(name) if best is None else tuple(sorted((*lines, *best)))

    def _search(self, name: str, hashed: Iterable[Line]) -> tuple[Line, ...]:
        found = list(self._exact.get(name, ()))
        found += [line for patterns, line in self._patterns if _matches(name, patterns)]
        found += hashed
        found.sort()
        return tuple(found)

    def _add_line(self, raw: bytes) -> None:
        fields = raw.split(None, 4)
        if not fields or fields[0].startswith(b"#"):
            return
        marker = fields.pop(0) if fields[0].startswith(b"@") else b""
        if marker not in (b"", b"@revoked", b"@cert-authority") or len(fields) < 3 or b"\0" in fields[0]:
            raise ValueError
        hosts, kind, text = fields[:3]
        blob = binascii.a2b_base64(text, strict_mode=True)
        if type_of(blob) != kind:
            raise ValueError
        if marker == b"@cert-authority":
            return
        line = Line(self._lines, marker == b"@revoked", kind.decode("ascii"), blob)
        if hosts.startswith(b"|"):
            self._add_hashed(hosts, line)
        else:
            self._add_names(hosts, line)

    def _add_hashed(self, hosts: bytes, line: Line) -> None:
        magic, salt, wanted = (
            hosts[:3],
            *(binascii.a2b_base64(part, strict_mode=True) for part in hosts[3:].split(b"|", 1)),
        )
        if magic != _HASH_MAGIC or len(salt) != _SHA1_SIZE or len(wanted) != _SHA1_SIZE:
            raise ValueError
        self._hashed.add(salt, wanted, line)

    def _add_names(self, hosts: bytes, line: Line) -> None:
        # Surrogates keep bytes that are no text apart from one another, and from every real name.
        text = hosts.decode("utf-8", "surrogateescape").lower()
        names = [name for name in dict.fromkeys(text.split(",")) if name]
        if "*" in text or "?" in text or "!" in text:
            self._patterns.append((tuple(names), line))
            return
        for name in names:
            self._exact[name] = (*self._exact.get(name, ()), line)


def read(path: str) -> HostsFile:
    """Return what the file says now; one that has not changed since it was last read is not read again."""
    try:
        stamp = stamp_of(os.stat(path))
    except FileNotFoundError:
        return HostsFile(path, problem=f"known_hosts {shown_path(path)} does not exist", missing=True)
    except OSError as error:
        return HostsFile(path, problem=_problem(path, error))
    cached = _cache.get(path)
    if cached is not None and cached.trusted and cached.stamp == stamp:
        return cached
    with _cache_lock:
        # 64 handshakes that begin together wait here for one of them to read it.
        cached = _cache.get(path)
        if cached is None or not cached.trusted or cached.stamp != stamp:
            cached = _cache[path] = _parse(path, stamp)
        return cached


def tell(file: HostsFile) -> None:
    """Warn once, in the log, of what is wrong with a file. Not under a lock: log handlers are users' code."""
    if file.missing or not (file.bad or file.problem):
        return
    with _cache_lock:
        told = file.path in _warned
        _warned.add(file.path)
    if told:
        return
    if file.problem:
        _log.warning("%s; it is not used", file.problem)
    else:
        many = f"{len(file.bad)} lines" if len(file.bad) > 1 else "1 line"
        _log.warning("%s: %s not understood and skipped, first %d", shown_path(file.path), many, file.bad[0])


@contextlib.contextmanager
def locked(path: str) -> Iterator[int]:
    """Open the file, made with mode 0600 where it is missing, and hold its lock; symbolic links are followed.

    The lock is flock's: a POSIX one would be lost as soon as another thread had read and closed the file.
    """
    deadline = time.monotonic() + LOCK_WAIT
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    with _append_lock:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        while True:
            fd = os.open(path, flags, 0o600)
            try:
                _need_regular(os.fstat(fd), path)
                _flock(fd, path, deadline)
                # An editor may have put a new file in its place while this waited for the old one's lock.
                if _is_at(fd, path):
                    yield fd
                    return
            finally:
                os.close(fd)


def append(path: str, fd: int, name: str, key_type: str, blob: bytes) -> None:
    """Add a line to the file that `locked` opened, by one write, and to what is known of it."""
    before = os.fstat(fd)
    cached = _cache.get(path)
    if cached is not None and cached.hashes:
        name = _hashed_name(name)
    data = f"{line_text(name, key_type, blob)}\n".encode("utf-8", "surrogateescape")
    if before.st_size and os.pread(fd, 1, before.st_size - 1) != b"\n":
        data = b"\n" + data
    written = os.write(fd, data)
    after = os.fstat(fd)
    alone = after.st_size == before.st_size + written
    if written != len(data):
        # The disk is full. Half a line would spoil the next one; but `ssh`, which knows no lock, may have
        # added one behind it.
        if alone:
            os.ftruncate(fd, before.st_size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
    with _cache_lock:
        cached = _cache.get(path)
        if cached is not None and cached.stamp == stamp_of(before) and alone:
            # Parsing the whole file again for each of 5,000 new nodes would be quadratic.
            cached.add(data.removeprefix(b"\n"))
            cached.stamp = stamp_of(after)
            cached.trusted = True
        else:
            _cache.pop(path, None)


def line_text(name: str, key_type: str, blob: bytes) -> str:
    """Return a line of a known_hosts file."""
    return f"{name} {key_type} {_base64(blob)}"


def type_of(blob: bytes) -> bytes:
    """Return the name of the type that a public key begins with.

    Raises:
        ValueError: it begins with none.
    """
    name = blob[4 : 4 + int.from_bytes(blob[:4], "big")]
    if not _TYPE_NAME.fullmatch(name):
        raise ValueError("a public key without a type")
    return name


def read_regular(path: str, limit: int | None = None) -> tuple[os.stat_result, bytes]:
    """Return the state and the bytes of a regular file; never waits for a FIFO, nor reads a device.

    At most `limit` bytes are read, and never more than there were when it was opened: what somebody appends
    meanwhile may be half a line.

    Raises:
        OSError: also for what is no regular file (`EISDIR`, `EINVAL`).
    """
    _need_regular(os.stat(path), path)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    with open(fd, "rb") as file:
        status = os.fstat(fd)
        # Looked at again: the name may have been given to another file between the two.
        _need_regular(status, path)
        return status, file.read(status.st_size if limit is None else min(limit, status.st_size))


def stamp_of(status: os.stat_result) -> Stamp:
    """Return what tells whether a file is the one that was read: identity, size, times."""
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def shown_path(path: str) -> str:
    """Return a path as it is told to people: `~` for the home directory, no control characters."""
    home = str(Path("~").expanduser())
    if home != "/" and path.startswith(home + "/"):
        path = "~" + path[len(home) :]
    return path if path.isprintable() else ascii(path)


def one_line(error: BaseException) -> str:
    """Return the text of a foreign error as it may be told: one short line without control characters."""
    text = " ".join(str(error).split())
    return text[:200] if text.isprintable() else ascii(text)[:200]


_cache: dict[str, HostsFile] = {}
#: paths that a warning was given for; guarded by `_cache_lock`
_warned: set[str] = set()
_cache_lock = threading.Lock()
_append_lock = threading.Lock()


def _forget_after_fork() -> None:
    # A lock that another thread held at the fork would never be given back in the child.
    global _cache_lock, _append_lock  # noqa: PLW0603
    _cache_lock = threading.Lock()
    _append_lock = threading.Lock()
    _cache.clear()


os.register_at_fork(after_in_child=_forget_after_fork)


def _parse(path: str, stamp: Stamp) -> HostsFile:
    begun = time.time_ns()
    try:
        # How users of `ssh` say "no file"; the one device that is allowed.
        status, data = (None, b"") if path == os.devnull else read_regular(path)
    except OSError as error:
        file = HostsFile(path, problem=_problem(path, error))
    else:
        file = HostsFile(path, data)
        stamp = stamp_of(status) if status is not None else stamp
    file.stamp = stamp
    file.trusted = abs(begun - stamp[3]) > RACY_NS
    return file


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a list of patterns holds `name`: one of them matches, and none that begins with `!`."""
    matched = False
    for pattern in patterns:
        if pattern.startswith("!"):
            if _matches_one(name, pattern[1:]):
                return False
        elif not matched:
            matched = _matches_one(name, pattern)
    return matched


def _matches_one(name: str, pattern: str) -> bool:
    """Whether `*` (any text) and `?` (any character) make `pattern` the name; the others are themselves.

    By hand in place of `re`: of a file with thousands of patterns none is compiled, and no pattern can make
    it slower than the product of both lengths.
    """
    at = place = 0
    star = mark = -1
    while at < len(name):
        if place < len(pattern) and pattern[place] == "*":
            star, mark = place, at
            place += 1
        elif place < len(pattern) and pattern[place] in ("?", name[at]):
            place += 1
            at += 1
        elif star >= 0:
            # The last star takes one character more; what came before it need not be looked at again.
            mark += 1
            place, at = star + 1, mark
        else:
            return False
    return not pattern[place:].strip("*")


def _flock(fd: int, path: str, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                text = f"another process has kept it locked for {LOCK_WAIT:.0f} s"
                raise OSError(errno.EDEADLK, text, path) from error
            # flock has no timeout, and a stopped process that holds it must not hold us.
            time.sleep(0.005)
        else:
            return


def _is_at(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _need_regular(status: os.stat_result, path: str) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "is a directory, not a file", path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "is not a regular file", path)


def _problem(path: str, error: OSError) -> str:
    text = error.strerror or one_line(error)
    return f"known_hosts {shown_path(path)} {text if text.startswith('is ') else f'cannot be read: {text}'}"


def _base64(data: bytes) -> str:
    return binascii.b2a_base64(data, newline=False).decode("ascii")


def _hashed_name(name: str) -> str:
    salt = os.urandom(_SHA1_SIZE)
    digest = hmac.digest(salt, name.encode("utf-8", "surrogateescape"), "sha1")
    return f"|1|{_base64(salt)}|{_base64(digest)}"
