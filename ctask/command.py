# SPDX-License-Identifier: Apache-2.0
"""What a user gives as a command, checked and encoded as a session runs it.

Pure functions; they run in the thread that submits.
"""

from __future__ import annotations

import os

from ctask.errors import CommandError
from ctask.options import Command

__all__ = ["command_of"]

#: Longest command that a Linux node's kernel takes as one argument (MAX_ARG_STRLEN, with its NUL).
COMMAND_LIMIT = 131_072


def command_of(command: object, *, remote: bool, stdin: bool, pty: bool) -> Command:
    """Return what a session runs, checked as far as it can be before anything is sent.

    Args:
        command: text or bytes for a shell; or a list of words, which a local command runs without a shell and a
            remote one hands to the node's shell quoted.

    Raises:
        CommandError: empty, not a command, with a NUL (sshd would drop the whole connection), not encodable, or
            longer than a node can take.
    """
    if isinstance(command, (str, bytes)):
        line = _encoded(command)
        if not line.strip():
            raise CommandError("the command is empty: say what to run")
        return Command(line=_fitting(line), stdin=stdin, pty=pty)
    if isinstance(command, (list, tuple)) and command:
        words = tuple(_encoded(word) for word in command)
        if not words[0]:
            raise CommandError("the first word of the command is empty: say which program to run")
        if remote:
            return Command(line=_fitting(b" ".join(map(_shell_quoted, words))), stdin=stdin, pty=pty)
        return Command(argv=tuple(map(_fitting, words)), stdin=stdin, pty=pty)
    raise CommandError(f"a command is a text, bytes or a list of words, not {command!r}")


def _encoded(text: object) -> bytes:
    if isinstance(text, os.PathLike):
        text = os.fspath(text)
    if isinstance(text, str):
        try:
            text = text.encode()
        except UnicodeEncodeError as error:
            raise CommandError(
                f"the command has a character that is no text (at {error.start}); give it as bytes"
            ) from error
    if not isinstance(text, bytes):
        raise CommandError(f"a command is made of text or bytes, not {text!r}")
    if b"\0" in text:
        raise CommandError(f"the command has a NUL at {text.index(0)}; no shell can be given that: take it out")
    return text


def _fitting(line: bytes) -> bytes:
    if len(line) >= COMMAND_LIMIT:
        raise CommandError(
            f"command is {len(line):,} bytes; the limit is {COMMAND_LIMIT:,}. "
            "Send it as a script on standard input, or copy it to the nodes first"
        )
    return line


def _shell_quoted(word: bytes) -> bytes:
    if word and not word.strip(b"%+,-./0123456789:=@ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz"):
        return word
    return b"'" + word.replace(b"'", b"'\"'\"'") + b"'"
