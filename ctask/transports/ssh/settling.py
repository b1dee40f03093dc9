# SPDX-License-Identifier: Apache-2.0
"""The question to the reader whether all has been read that had come by now.

Any thread asks; the answer is found in the reader's thread, among the connections that it carries. No lock: `_left` is
the reader's.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from ctask.transports.ssh.reader import Reader

__all__ = ["Settling"]

#: Turns of the reader after which the answer is yes, though some connection still has more: a flood never ends.
TURNS = 256


class Settling:
    """Looks like a connection to the reader: one that has more to take until every other one had nothing once.

    Args:
        call: made then, in the reader's thread; at the latest when the reader ends.
        over: told of this one before.

    Raises:
        OSError: there is no descriptor for it.
    """

    def __init__(
        self, call: Callable[[], None], over: Callable[[Settling], object] = lambda settling: None
    ) -> None:
        self._over = over
        self.fd = os.eventfd(1, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._call: Callable[[], None] | None = call
        self._reader: Reader | None = None
        self._left: set[int] | None = None
        self._turns = TURNS

    def adopted(self, reader: Reader) -> None:
        """See `Readable`."""
        self._reader = reader

    def readable(self) -> bool:
        """Look who has more to take; True: look again in the next turn. The reader's thread."""
        if self._reader is None:
            return True
        ready = self._reader.ready() - {self.fd}
        self._left = ready if self._left is None else self._left & ready
        self._turns -= 1
        if self._left and self._turns:
            return True
        self._end()
        return False

    def writable(self) -> None:
        """Nothing is written."""

    def hung_up(self) -> None:
        """It is never paused."""

    def abandon(self) -> None:
        """The reader ends: nothing will be read any more."""
        self._end()

    def forget(self) -> None:
        """Close what a forked child has of it; nothing is called."""
        self._call = None
        os.close(self.fd)
        self._over(self)

    def _end(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            if self._reader is not None:
                self._reader.remove(self.fd)
            os.close(self.fd)
            self._over(self)
            call()
