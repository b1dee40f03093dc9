# SPDX-License-Identifier: Apache-2.0
"""Children of this process: what they begin with, how they ended, and what a parent of ours may have spoilt for both.

A parent hands down ignored signals, blocked ones, and closed descriptors. Where SIGCHLD is ignored the kernel keeps no
exit status, and a wait for a child that failed looks like one for a child that did well. So nothing here takes a status
that is not known for 0.

Runs in any thread; no state.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import struct
import threading

__all__ = [
    "DEFAULT_SIGNALS",
    "above_standard",
    "exit_status",
    "hold_standard_descriptors",
    "keeps_no_status",
    "make_pipe",
    "open_pidfd",
    "start_as_program",
    "why_unknown",
]

#: What a child begins with, as in a fresh login, whatever is ignored here: the shells that run commands cannot even set
#: a trap for what is ignored when they begin, and with SIGCHLD ignored they do not learn how their own children ended.
DEFAULT_SIGNALS = tuple(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})

_LAST_STANDARD = 2
# PIDFD_GET_INFO of linux/pidfd.h, and the first version of its record, of 64 bytes: a mask first, the exit status last.
_GET_INFO = 0xC040_FF0B
_INFO = struct.Struct("=Q52xi")
_INFO_EXIT = 1 << 3


def keeps_no_status() -> bool:
    """Return whether SIGCHLD is ignored in this process, so that the kernel reaps its children, and forgets them."""
    return signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN


def why_unknown() -> str:
    """Return why no exit status could be had of a child, and what to do."""
    if keeps_no_status():
        return (
            "its exit status is not known: this process ignores SIGCHLD (as its parent did, perhaps), so the kernel "
            "keeps none; signal.signal(signal.SIGCHLD, signal.SIG_DFL) changes that"
        )
    return "the exit status was taken by another part of this program: it waits for any child"


def open_pidfd(pid: int) -> int | None:
    """Return a descriptor for a child that was just started; None where there is none (Linux before 5.3)."""
    with contextlib.suppress(OSError):
        return os.pidfd_open(pid)
    return None


def exit_status(pidfd: int | None) -> int | None:
    """Return the status, as `os.waitpid` does, of a child that the kernel has reaped; None if it is not known.

    Linux 6.15 and newer tell it. What another part of the program has waited for is its own.
    """
    if pidfd is None or not keeps_no_status():
        return None
    info = bytearray(_INFO.pack(_INFO_EXIT, 0))
    try:
        fcntl.ioctl(pidfd, _GET_INFO, info, True)
    except OSError:
        return None
    told, status = _INFO.unpack(info)
    return int(status) if told & _INFO_EXIT else None


def above_standard(fd: int) -> int:
    """Return a descriptor above the standard three, over which a child's are laid: a daemon has closed its own."""
    if fd > _LAST_STANDARD:
        return fd
    high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _LAST_STANDARD + 1)
    os.close(fd)
    return high


def make_pipe() -> tuple[int, int]:
    """Return the ends to read and to write of a pipe, above the standard three.

    Raises:
        OSError: no descriptor is left.
    """
    read, write = os.pipe()
    try:
        read = above_standard(read)
        return read, above_standard(write)
    except BaseException:
        os.close(read)
        os.close(write)
        raise


def hold_standard_descriptors() -> None:
    """Occupy those of the numbers 0, 1 and 2 that are closed, so that no socket gets them, and with it what is printed.

    As before, nothing can be read from 0, and nothing written to 1 and 2.
    """
    for number in range(_LAST_STANDARD + 1):
        try:
            os.fstat(number)
        except OSError:
            with contextlib.suppress(OSError):
                _occupy(number)


def _occupy(number: int) -> None:
    fd = os.open(os.devnull, os.O_WRONLY if number == 0 else os.O_RDONLY)
    # Another thread may have opened something meanwhile: then the number is taken.
    if fd > number:
        os.close(fd)


def start_as_program() -> None:
    """Undo what a parent should not have handed down to a program of its own; for the command line, as it starts."""
    hold_standard_descriptors()
    if keeps_no_status() and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
