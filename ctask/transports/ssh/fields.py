# SPDX-License-Identifier: Apache-2.0
"""Reads the fields of one message (RFC 4251 5), strictly: a field that is not there ends the connection.

Runs in the thread that reads the connection; a `Fields` belongs to one message and one thread. A length that a node
claims is compared with what it sent, never allocated; strings are slices, and a string that is skipped costs nothing.
"""

from __future__ import annotations

from paramiko.ssh_exception import SSHException

__all__ = ["Fields", "Malformed"]

#: Bytes of the largest number that a key exchange or a host key has (16,384 bits, and its sign).
_LONGEST_NUMBER = 2_049


class Malformed(SSHException):  # type: ignore[misc]  # paramiko has no types
    """A message without a field that it must have, or with one that cannot be."""


class Fields:
    """The fields of one message, taken in order.

    `get_string` and `get_binary` are the names by which paramiko's key exchanges ask.
    """

    __slots__ = ("_at", "_data", "_what")

    def __init__(self, data: bytes, what: str, at: int = 1) -> None:
        """Begin at `at` in `data`; `what` names the message in errors."""
        self._data = data
        self._what = what
        self._at = at

    def u32(self) -> int:
        """Return a number of 32 bits."""
        end = self._at + 4
        if end > len(self._data):
            raise self.malformed("it is cut short")
        number = int.from_bytes(self._data[self._at : end], "big")
        self._at = end
        return number

    def boolean(self) -> bool:
        """Return a truth value: every byte but 0 is true."""
        if self._at >= len(self._data):
            raise self.malformed("it is cut short")
        self._at += 1
        return self._data[self._at - 1] != 0

    def skip(self, size: int) -> None:
        """Pass over `size` bytes."""
        if self._at + size > len(self._data):
            raise self.malformed("it is cut short")
        self._at += size

    def skip_string(self) -> None:
        """Pass over a string."""
        self.skip(self.u32())

    def string(self) -> bytes:
        """Return a string: any bytes."""
        size = self.u32()
        end = self._at + size
        if end > len(self._data):
            raise self.malformed(f"it claims a string of {size} bytes and has {len(self._data) - self._at}")
        piece = self._data[self._at : end]
        self._at = end
        return piece

    get_string = get_binary = string

    def names(self) -> tuple[str, ...]:
        """Return a list of names: printable US-ASCII, as RFC 4251 5 has them."""
        text = self.string()
        if not text:
            return ()
        try:
            names = text.decode("ascii")
        except UnicodeDecodeError:
            names = "\n"
        if not names.isprintable():
            raise self.malformed("a list of names has bytes that no name may have")
        return tuple(names.split(","))

    def number(self) -> int:
        """Return a number of any size that is not negative (mpint); at most 16,384 bits."""
        piece = self.string()
        if len(piece) > _LONGEST_NUMBER:
            raise self.malformed(f"it has a number of {len(piece)} bytes")
        if piece[:1] >= b"\x80":
            raise self.malformed("it has a number below 0")
        return int.from_bytes(piece, "big")

    def so_far(self) -> bytes:
        """Return the message up to here, its number included."""
        return self._data[: self._at]

    def end(self) -> None:
        """Refuse a message that has more than its fields."""
        if self._at != len(self._data):
            raise self.malformed(f"it has bytes behind its last field: {len(self._data) - self._at}")

    def malformed(self, why: str) -> Malformed:
        """Return the error for this message."""
        return Malformed(f"the node sent {self._what} that cannot be read: {why}")
