# SPDX-License-Identifier: Apache-2.0
"""Reads a file that decides what is run, and where: only one that no other account can have written.

As `ssh` with its configuration: a file has to belong to root or to the account that runs this process, and others may
not write to it. The folders that lead to it are looked at as well, as `sshd` does for authorized_keys: commands run in
the folder of their file, and an account that may write to a folder may put another file in its place.

Runs in any thread that reads configuration; no state. The file is opened first and judged by its descriptor, so what
is judged is what is read.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import pwd
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path

from ctask.errors import GroupResolverConfigError
from ctask.errors.text import printable

__all__ = ["read"]

#: Bytes that a file of groups may have: hundreds of thousands of nodes, each on a line of its own, are less.
MOST = 64 << 20

_ACL = "system.posix_acl_access"


def read(path: str | os.PathLike[str]) -> tuple[str, os.stat_result]:
    """Return the text of a file and its status, as it was opened.

    `/dev/null`, also by a symbolic link, is an empty file.

    Raises:
        GroupResolverConfigError: another account owns it, or may write to it or to a folder on the way; or it is no
            text, or larger than `MOST`.
        OSError: it cannot be opened, or is no regular file.
    """
    # O_NONBLOCK: a FIFO of that name is refused, and not waited for
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    with open(fd, "rb") as file:
        status = os.fstat(fd)
        if _is_null(status):
            return "", status
        if not stat.S_ISREG(status.st_mode):
            code = errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL
            raise OSError(code, "it is not a regular file", os.fspath(path))
        _judge(Path(path), status)
        data = file.read(MOST + 1)
    if len(data) > MOST:
        raise _bad(path, f"it is larger than {MOST >> 20} MiB")
    try:
        return data.decode("utf-8"), status
    except UnicodeDecodeError as error:
        raise _bad(path, f"it is not UTF-8 text at byte {error.start}") from error


def _judge(path: Path, status: os.stat_result) -> None:
    """Refuse a file that another account can have written."""
    why = _owned_by_others(status) or _writable_by_others(status, path)
    if why:
        raise _bad(path, f"{why}. It says which commands run here, and on which nodes: {_remedy(path, status)}")
    for folder, there in _on_the_way(path):
        why = _owned_by_others(there)
        if not why and not there.st_mode & stat.S_ISVTX:  # in a sticky folder, others cannot replace what is ours
            why = _writable_by_others(there, folder)
        if why:
            what = "symbolic link" if stat.S_ISLNK(there.st_mode) else "folder"
            raise _bad(
                path,
                f"of the {what} {_shown(folder)} on the way to it, {why}, and so another file can be put in its "
                f"place: {_remedy(folder, there)}",
            )


def _on_the_way(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield the folders that lead to a file by its name and by its real place, and the symbolic links among them."""
    seen: set[Path] = set()
    for place in (Path(os.path.abspath(path)), Path(os.path.realpath(path))):
        for part in (place, *place.parents):
            if part in seen:
                continue
            seen.add(part)
            try:
                status = os.lstat(part)
            except FileNotFoundError:  # a file without a name, as of /dev/fd/3
                continue
            # the mode of a link says nothing: Linux has 0777 for all of them
            if stat.S_ISLNK(status.st_mode):
                yield part, os.stat_result((stat.S_IFLNK, *status[1:]))
                if part == place:
                    continue
                status = os.stat(part)
            if stat.S_ISDIR(status.st_mode):
                yield part, status


def _owned_by_others(status: os.stat_result) -> str:
    """Say so where something belongs neither to root nor to this process's account."""
    if status.st_uid in (0, os.geteuid()):
        return ""
    with contextlib.suppress(KeyError):
        return f"the owner is {pwd.getpwuid(status.st_uid).pw_name} (uid {status.st_uid})"
    return f"the owner is uid {status.st_uid}"


def _writable_by_others(status: os.stat_result, path: Path) -> str:
    """Say so where others than root and this process's account may write.

    Where each account has a group of its own, files are often made writable for the group, which is that account
    alone (`umask 002`). Debian's `ssh` lets these pass, and so does this; root has no such group.
    """
    writers = stat.S_IMODE(status.st_mode) & 0o022
    if not writers or (writers == 0o020 and _is_private(status, path)):
        return ""
    return f"others may write to it (mode {stat.S_IMODE(status.st_mode):04o})"


def _is_private(status: os.stat_result, path: Path) -> bool:
    """Whether the group of a file has one member, who is its owner."""
    if status.st_uid == 0:
        return False
    try:
        owner, group = pwd.getpwuid(status.st_uid), grp.getgrgid(status.st_gid)
    except KeyError:
        return False
    if owner.pw_gid != group.gr_gid or owner.pw_name != group.gr_name or set(group.gr_mem) - {owner.pw_name}:
        return False
    try:
        # with an access control list, the mode's bits of the group are those of all whom the list names
        os.getxattr(path, _ACL)
    except OSError as error:
        return error.errno in (errno.ENODATA, errno.ENOTSUP)
    return False


def _remedy(path: Path, status: os.stat_result) -> str:
    quoted = shlex.quote(_shown(path))
    if not _owned_by_others(status):
        return f"chmod go-w {quoted}"
    root = os.geteuid() == 0
    whose = "root" if root else "root, or to you"
    if stat.S_ISLNK(status.st_mode):
        return f"a link there has to belong to {whose} (chown -h root {quoted})"
    other = "root's own (sudo -H), or CTASK_CFGDIR" if root else "CTASK_CFGDIR"
    return f"it has to belong to {whose} (chown root {quoted}), or name another place for the groups: {other}"


def _is_null(status: os.stat_result) -> bool:
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == os.stat(os.devnull).st_rdev


def _shown(path: str | os.PathLike[str]) -> str:
    return printable(os.fspath(path))


def _bad(path: str | os.PathLike[str], reason: str) -> GroupResolverConfigError:
    return GroupResolverConfigError(f"{_shown(path)} is not used: {reason}", os.fspath(path))
