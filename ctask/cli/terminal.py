# SPDX-License-Identifier: Apache-2.0
"""What the command line writes: nodes' words on standard output, ctask's own on standard error.

Any thread may write; one lock keeps the line that shrinks apart from what is written for good. It is one that a
thread can take twice, since a signal handler writes as well, in the main thread. Nothing is buffered.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import select
import sys
import threading
from typing import Any

from ctask.display import escape, one_line

__all__ = ["OutputClosed", "Terminal"]

#: What a shell says of a program that SIGPIPE ended: 128 + 13.
_BROKEN_PIPE = 141


class OutputClosed(SystemExit):
    """Nobody takes the nodes' words any more: the run is over. As a `SystemExit` it ends it from a handler.

    Its code is 141 where the reader went away (`ctask … | head`), which is told to nobody; 1 after any other error.
    """


class Terminal:
    """Standard output and standard error, whatever they are connected to.

    Text goes out as UTF-8 whatever the locale is; surrogates, which `escape(…, raw=True)` makes, as their bytes.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._out = _raw(sys.stdout)
        self._err = _raw(sys.stderr)
        self._standing = False
        # Told once: while the run is being ended, nodes' last lines still come, and nothing may disturb it again.
        self._closed = False
        #: whether a person looks at standard error, on a terminal that can erase a line
        self.watched = self._err is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def out(self, text: str) -> None:
        """Write what nodes said to standard output.

        Raises:
            OutputClosed: it cannot be written; only once, then what comes is dropped.
        """
        self._words(self._out, text)

    def err(self, text: str) -> None:
        """Write what nodes said on their standard error to standard error; nowhere if that was closed (`2>&-`).

        Raises:
            OutputClosed: as `out`.
        """
        if self._err is not None:
            self._words(self._err, text)

    def say(self, text: str) -> None:
        """Write lines of ctask's own to standard error, escaped. If it cannot be written, nobody wants to know."""
        with self._lock, contextlib.suppress(OSError, ValueError):
            self._erase()
            _write(self._err, escape(text) + "\n")

    def progress(self, text: str) -> None:
        """Put a line on the terminal that is erased by the next one, or by anything else that is written."""
        if not self.watched:
            return
        with self._lock, contextlib.suppress(OSError, ValueError):
            self._erase()
            columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80
            line = escape(text)
            _write(self._err, line if len(line) < columns else line[: columns - 2] + "…")
            self._standing = True

    def clear(self) -> None:
        """Erase the line that `progress` put there."""
        with self._lock, contextlib.suppress(OSError, ValueError):
            self._erase()

    def _erase(self) -> None:
        if self._standing:
            self._standing = False
            _write(self._err, "\r\x1b[K")

    def _words(self, stream: io.RawIOBase | None, text: str) -> None:
        with self._lock:
            if self._closed:
                return
            self.clear()
            try:
                _write(stream, text)
            except (OSError, ValueError) as error:
                self._closed = True
                broken = isinstance(error, OSError) and error.errno == errno.EPIPE
                if not broken:
                    self.say(f"ctask: output cannot be written: {getattr(error, 'strerror', None) or error}")
                raise OutputClosed(_BROKEN_PIPE if broken else 1) from error


class TerminalLog(logging.Handler):
    """What ctask has to warn of, on the terminal."""

    def __init__(self, terminal: Terminal) -> None:
        super().__init__(logging.WARNING)
        self.setFormatter(_OneLine())
        self._terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record. Any thread."""
        try:
            self._terminal.say(f"ctask: {self.format(record)}")
        except Exception:  # noqa: BLE001 - logging's own rule: a log must not break what it tells of
            self.handleError(record)


class _OneLine(logging.Formatter):
    """A message on one line, whatever names are in it; the lines of a traceback are ours."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        return one_line(super().formatMessage(record))


def _raw(stream: Any) -> Any:
    """Return the unbuffered bytes below a text stream; None where Python found it closed at its start."""
    buffer = getattr(stream, "buffer", None)
    return getattr(buffer, "raw", buffer)


def _write(stream: io.RawIOBase | None, text: str) -> None:
    if stream is None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    rest = memoryview(text.encode("utf-8", "surrogateescape"))
    while rest:
        count = stream.write(rest)
        if count is None:  # somebody who shares it made it non-blocking, and it is full
            select.select([], [stream], [])
        else:
            rest = rest[count:]
