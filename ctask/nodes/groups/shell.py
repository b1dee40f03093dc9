# SPDX-License-Identifier: Apache-2.0
"""A command of a group source: how names reach it, and how it is run.

**No name is ever part of a command's text.** `$GROUP`, `$NODE`, `$SOURCE` and `$CFGDIR` are variables in the
environment of the command, and the shell itself puts their values in. All that is done to the text is that each of
them stands in double quotes, wherever it stood: bare, in double quotes, or in single quotes (as in
``sed -n 's/^$GROUP://p'``, which becomes ``sed -n 's/^'"${GROUP}"'://p'``). What a shell puts in between double quotes
it neither splits nor runs. If the quotes of a command are misread here, a word may come out wrong; nothing can be run
by it.

Commands can hand words on to a second program that reads them as *its* language: `sed`, `awk`, `ssh`, `eval`.
Therefore names with characters that such a language could act on are refused before anything is run (`check_name`).

Runs in the thread that asks, which waits for the command. No state.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import select
import selectors
import signal
import time
from collections.abc import Mapping
from typing import Self

from ctask import children
from ctask.errors import GroupResolverIllegalCharError
from ctask.errors.text import printable

__all__ = ["MOST", "CommandFailedError", "check_name", "quoted", "run"]

log = logging.getLogger("ctask.nodes.groups")

#: Bytes that a command may print: a hundred thousand nodes in a hundred groups each are less.
MOST = 64 << 20
#: Bytes of its standard error that are kept, from the end.
_KEPT_ERROR = 2000
#: Seconds by which the deadline of a command may be noticed late on a busy machine.
_NOTICED = 0.05
#: Seconds in which a command has still to be seen to have ended, where its deadline is noticed late.
_SEEN = 0.25
#: Seconds for a killed command to be gone.
#: Seconds that one look at its output, or for its end, takes at most: epoll and poll count milliseconds in an int.
_LONGEST_LOOK = 3600.0
_GONE = 2.0
#: Seconds between looks at a command where the kernel has no pidfd (before 5.3): the first, and the longest.
_FIRST_LOOK = 0.002
_LAST_LOOK = 0.05
_SHELL = "/bin/sh"
#: The descriptor by which a shell says the exit status of a command where SIGCHLD is ignored; shells know one digit.
_STATUS = 9

_VARIABLE = re.compile(r"\$(?:(\$)|\{(GROUP|NODE|SOURCE|CFGDIR)\}|(GROUP|NODE|SOURCE|CFGDIR)(?![A-Za-z0-9_]))")
_NAMES = ("GROUP", "NODE", "SOURCE", "CFGDIR")
# How a variable stands in double quotes, by the quotes that it is found in: `"`, `'`, or none of its own.
_REFERENCES = {'"': "${%s}", "'": "'\"${%s}\"'"}
_BARE = '"${%s}"'
# letters and digits of any script, and what neither sh, sed nor awk gives a meaning of its own
_GOOD_NAME = re.compile(r"[\w.:%+=~-]+")


class CommandFailedError(Exception):
    """Raised when a command did not do what it was to; its text says what, and what it printed on standard error."""


def check_name(name: str) -> None:
    """Refuse a name that is not to be handed to a command.

    Raises:
        GroupResolverIllegalCharError: it has other characters than letters, digits and ``_ . : % + = ~ -``, begins
            with ``-``, which is an option, or has ``..`` in it, which is a folder above.
    """
    if _GOOD_NAME.fullmatch(name) and not name.startswith("-") and ".." not in name:
        return
    raise GroupResolverIllegalCharError(
        f"{printable(name)!r} is not handed to the command of a group source: letters, digits and _ . : % + = ~ - are, "
        "without - in front, and without '..'",
        name,
    )


def quoted(text: str) -> str:
    """Return a command in which the variables of a group source stand in double quotes; `$$` is a plain `$`."""
    out: list[str] = []
    inside = [""]  # what the place is in, from the outside: quotes, `$(` as "(", a backtick; "" is none of these
    at = 0
    while at < len(text):
        char, quote = text[at], inside[-1]
        found = _VARIABLE.match(text, at)
        if found:
            name = found[2] or found[3]
            out.append(_REFERENCES.get(quote, _BARE) % name if name else "$")
            at = found.end()
            continue
        if char == "\\" and quote != "'":
            out.append(text[at : at + 2])
            at += 2
            continue
        if char == "#" and quote not in ("'", '"') and (at == 0 or text[at - 1] in " \t\n;|&("):
            end = text.find("\n", at)
            out.append(text[at:] if end < 0 else text[at:end])
            at += len(out[-1])
            continue
        _step(inside, char, text[at - 1 : at])
        out.append(char)
        at += 1
    return "".join(out)


def _step(inside: list[str], char: str, before: str) -> None:
    """Enter or leave quotes and command substitutions at a character."""
    quote = inside[-1]
    if quote == "'":
        if char == "'":
            inside.pop()
    elif (char == quote and char in '"`') or (char == ")" and quote == "("):
        inside.pop()
    elif (
        char in '"`'
        or (char == "'" and quote != '"')
        or (char == "(" and (quote != '"' or before == "$"))  # in double quotes "(" is text, and "$(" is not
    ):
        inside.append(char)


def run(command: str, *, variables: Mapping[str, str], folder: str | None, timeout: float) -> str:
    """Run a command by `/bin/sh`, without standard input, and return what it prints.

    It has a session of its own, so that no program in it can ask for a password on the terminal; at the deadline, all
    that is in that session's process group is killed. It begins with the signals of a fresh login, whatever this
    process ignores or blocks.

    Args:
        command: as it stands in the configuration.
        variables: those of `$GROUP`, `$NODE`, `$SOURCE` and `$CFGDIR` that it may use.
        folder: where it runs; None: here.
        timeout: seconds.

    Raises:
        CommandFailedError: another status than 0, or one that is not known, no end in time, too much output, or no
            start at all.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _NAMES} | dict(variables)
    try:
        child = _Child(quoted(command), folder, environment)
    except (OSError, ValueError) as error:  # a folder that is gone, a NUL in a value
        raise CommandFailedError(f"could not be started: {error}") from error
    with child:
        try:
            output, told = _read(child, time.monotonic() + timeout, timeout)
        except BaseException:  # Ctrl-C as well: nothing is left running
            child.kill()
            raise
    if child.status is None:
        raise CommandFailedError(f"is taken for failed: {children.why_unknown()}")
    if child.status:
        raise CommandFailedError(_ended(child.status, told))
    if told:
        log.info("a command of a group source said on its standard error: %s", _last_line(told))
    return output.decode("utf-8", "backslashreplace")


class _Child:
    """A command that was started.

    Attributes:
        output, told: descriptors of what it prints on standard output and on standard error.
        status: its exit status, negative for a signal; None before its end, and where it can never be known.

    Raises:
        OSError, ValueError: it could not be started.
    """

    def __init__(self, command: str, folder: str | None, environment: Mapping[str, str]) -> None:
        self.status: int | None = None
        self._reaped = False
        self._ours: list[int] = []
        theirs: list[int] = []
        keep = children.keeps_no_status()
        try:
            actions: list[tuple[object, ...]] = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
            for number in (1, 2, _STATUS) if keep else (1, 2):
                read, write = children.make_pipe()
                self._ours.append(read)
                theirs.append(write)
                actions.append((os.POSIX_SPAWN_DUP2, write, number))
            self._pid = os.posix_spawn(
                _SHELL,
                _words(command, folder, keep=keep),
                environment,
                file_actions=actions,
                setsid=True,
                setsigmask=(),
                setsigdef=children.DEFAULT_SIGNALS,
            )
        except BaseException:
            self._close()
            raise
        finally:
            for fd in theirs:
                os.close(fd)
        self._pidfd = children.open_pidfd(self._pid)
        self.output, self.told, *kept = self._ours
        self._kept = kept[0] if kept else None
        if self._pidfd is not None:
            self._ours.append(self._pidfd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        while self._ours:
            os.close(self._ours.pop())

    def ended(self, until: float) -> bool:
        """Wait for its end; False: it had not ended by then."""
        pause = _FIRST_LOOK
        while not self._reap():
            left = until - time.monotonic()
            if left <= 0:
                return False
            if self._pidfd is None:
                time.sleep(min(left, pause))
                pause = min(2 * pause, _LAST_LOOK)
            else:
                wait = select.poll()
                wait.register(self._pidfd, select.POLLIN)
                wait.poll(min(left, _LONGEST_LOOK) * 1000)
        return True

    def _reap(self) -> bool:
        if not self._reaped:
            try:
                pid, status = os.waitpid(self._pid, os.WNOHANG)
            except ChildProcessError:
                self._reaped = True
                self.status = self._told_otherwise()
            else:
                self._reaped = pid != 0
                self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self._reaped

    def _told_otherwise(self) -> int | None:
        """Return the status of a child that other code, or the kernel, has reaped; None where it is not known."""
        status = children.exit_status(self._pidfd)
        if status is not None and self._kept is None:
            return os.waitstatus_to_exitcode(status)
        if self._kept is None:
            return None
        os.set_blocking(self._kept, False)
        try:
            text = os.read(self._kept, 16).strip()
        except BlockingIOError:
            return None
        return int(text) if text.isdigit() else None

    def kill(self) -> None:
        """Kill all that the command has started in its process group, if it was not waited for: the number is its."""
        if not self._reaped:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # it ended by itself just now
                os.killpg(self._pid, signal.SIGKILL)
        self.ended(time.monotonic() + _GONE)  # one in an uninterruptible wait is seen to by its parent's end


def _words(command: str, folder: str | None, *, keep: bool) -> list[str]:
    """Return what is started: the shell with the command, where there is a folder by way of another one.

    Args:
        keep: have that other one say the exit status, since the kernel will not.
    """
    if folder is not None:
        if not os.access(folder, os.X_OK) or not os.path.isdir(folder):
            os.stat(folder)  # says why, as a rule
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), folder)
        # Not by $CDPATH, and not as an option.
        folder = folder if folder.startswith("/") else f"./{folder}"
    if not keep and folder is None:
        return ["sh", "-c", command]
    there = 'cd "$1" || exit; ' if folder is not None else ""
    last = f'/bin/sh -c "$2" {_STATUS}>&-; echo $? >&{_STATUS}' if keep else 'exec /bin/sh -c "$2"'
    return ["sh", "-c", there + last, "sh", folder or "", command]


def _read(child: _Child, deadline: float, timeout: float) -> tuple[bytes, bytes]:
    """Return what is printed on standard output, and the end of what is on standard error, once both are closed."""
    output, told = bytearray(), bytearray()
    late = False
    with selectors.DefaultSelector() as selector:
        selector.register(child.output, selectors.EVENT_READ, output)
        selector.register(child.told, selectors.EVENT_READ, told)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left < -_NOTICED and not late:  # this process stood still, and what the command said lies in the pipes
                late, left = True, _SEEN
                deadline = time.monotonic() + left
            if left <= 0:
                raise CommandFailedError(f"did not end within {timeout:g} s, and was killed; a longer `timeout` waits")
            for key, _ in selector.select(min(left, _LONGEST_LOOK)):
                chunk = os.read(key.fd, 65536)
                key.data.extend(chunk)
                if not chunk:
                    selector.unregister(key.fileobj)
            if len(output) > MOST:
                raise CommandFailedError(f"printed more than {MOST >> 20} MiB, and was killed")
            del told[:-_KEPT_ERROR]
    if not child.ended(deadline):
        raise CommandFailedError(f"did not end within {timeout:g} s, and was killed")
    return bytes(output), bytes(told)


def _ended(status: int, told: bytes) -> str:
    how = f"exited with {status}" if status > 0 else f"was ended by signal {-status}"
    return f"{how}: {_last_line(told)}" if told.strip() else how


def _last_line(told: bytes) -> str:
    return printable(told.decode("utf-8", "backslashreplace").strip().rpartition("\n")[2])
