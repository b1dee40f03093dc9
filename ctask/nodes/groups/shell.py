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

import logging
import os
import re
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping

from ctask.errors import GroupResolverIllegalCharError
from ctask.errors.text import printable

__all__ = ["MOST", "CommandFailedError", "check_name", "quoted", "run"]

log = logging.getLogger("ctask.nodes.groups")

#: Bytes that a command may print: a hundred thousand nodes in a hundred groups each are less.
MOST = 64 << 20
#: Bytes of its standard error that are kept, from the end.
_KEPT_ERROR = 2000
#: Seconds for a killed command to be gone.
#: Seconds that one look at its output takes at most: epoll counts milliseconds in an int.
_LONGEST_LOOK = 3600.0
_GONE = 2.0

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
    that is in that session's process group is killed.

    Args:
        command: as it stands in the configuration.
        variables: those of `$GROUP`, `$NODE`, `$SOURCE` and `$CFGDIR` that it may use.
        folder: where it runs; None: here.
        timeout: seconds.

    Raises:
        CommandFailedError: another status than 0, no end in time, too much output, or no start at all.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _NAMES} | dict(variables)
    try:
        process = subprocess.Popen(
            ["/bin/sh", "-c", quoted(command)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:  # a folder that is gone, a NUL in a value
        raise CommandFailedError(f"could not be started: {error}") from error
    assert process.stdout is not None
    assert process.stderr is not None
    with process.stdout, process.stderr:
        try:
            output, told = _read(process, time.monotonic() + timeout, timeout)
        except BaseException:  # Ctrl-C as well: nothing is left running
            _kill(process)
            raise
    if process.returncode:
        raise CommandFailedError(_ended(process.returncode, told))
    if told:
        log.info("a command of a group source said on its standard error: %s", _last_line(told))
    return output.decode("utf-8", "backslashreplace")


def _read(process: subprocess.Popen[bytes], deadline: float, timeout: float) -> tuple[bytes, bytes]:
    """Return what is printed on standard output, and the end of what is on standard error, once both are closed."""
    assert process.stdout is not None
    assert process.stderr is not None
    output, told = bytearray(), bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ, output)
        selector.register(process.stderr, selectors.EVENT_READ, told)
        while selector.get_map():
            left = deadline - time.monotonic()
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
    try:
        process.wait(max(0.01, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise CommandFailedError(f"did not end within {timeout:g} s, and was killed") from None
    return bytes(output), bytes(told)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill all that the command has started in its process group. It was not waited for yet, so the number is its."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it ended by itself just now
    try:
        process.wait(_GONE)
    except subprocess.TimeoutExpired:
        pass  # in an uninterruptible wait; its parent's end will see to it


def _ended(status: int, told: bytes) -> str:
    how = f"exited with {status}" if status > 0 else f"was ended by signal {-status}"
    return f"{how}: {_last_line(told)}" if told.strip() else how


def _last_line(told: bytes) -> str:
    return printable(told.decode("utf-8", "backslashreplace").strip().rpartition("\n")[2])
