# SPDX-License-Identifier: Apache-2.0
"""Output as users meet it: bytes that take text, and the view of exact bytes that people mean.

Immutable; safe in any thread.
"""

from __future__ import annotations

from typing import Any, SupportsIndex

__all__ = ["Output", "view"]


class Output(bytes):
    r"""Bytes that take text wherever bytes take bytes (as UTF-8), and whose `str()` is text.

    Bytes that are no UTF-8 show as ``\xNN`` in the text. It equals text and bytes, and its hash is that of its bytes,
    which is not the one of text beyond ASCII: as a key of a dict and in a set it is found by bytes and by `Output`; use
    `.text` or `str()` as the key where you look it up by text. Immutable, safe in any thread.
    """

    __slots__ = ()

    @property
    def text(self) -> str:
        """The text without its last newline."""
        return str(self).removesuffix("\n")

    def lines(self) -> list[Output]:
        """Return the lines without their ends; a bare carriage return ends none."""
        parts = self.replace(b"\r\n", b"\n").split(b"\n")
        if not parts[-1]:
            parts.pop()
        return [Output(part) for part in parts]

    def __str__(self) -> str:
        return self.decode("utf-8", "backslashreplace")

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, str):
            try:
                other = other.encode("utf-8", "surrogateescape")
            except UnicodeEncodeError:  # half a surrogate pair, which no bytes are
                return False
        return bytes.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = bytes.__hash__  # see the class: no hash could be that of both text and bytes

    def __contains__(self, item: Any) -> bool:
        return bytes.__contains__(self, _bytes(item))

    def find(self, sub: Any, start: SupportsIndex | None = None, end: SupportsIndex | None = None) -> int:
        """As `bytes.find`; takes text."""
        return bytes.find(self, _bytes(sub), start, end)

    def index(self, sub: Any, start: SupportsIndex | None = None, end: SupportsIndex | None = None) -> int:
        """As `bytes.index`; takes text."""
        return bytes.index(self, _bytes(sub), start, end)

    def count(self, sub: Any, start: SupportsIndex | None = None, end: SupportsIndex | None = None) -> int:
        """As `bytes.count`; takes text."""
        return bytes.count(self, _bytes(sub), start, end)

    def startswith(
        self, prefix: Any, start: SupportsIndex | None = None, end: SupportsIndex | None = None
    ) -> bool:
        """As `bytes.startswith`; takes text, or a tuple."""
        return bytes.startswith(self, _bytes(prefix), start, end)

    def endswith(
        self, suffix: Any, start: SupportsIndex | None = None, end: SupportsIndex | None = None
    ) -> bool:
        """As `bytes.endswith`; takes text, or a tuple."""
        return bytes.endswith(self, _bytes(suffix), start, end)

    def split(self, sep: Any = None, maxsplit: SupportsIndex = -1) -> list[Output]:  # type: ignore[override]
        """As `bytes.split`; takes text; the parts are `Output`."""
        return [Output(part) for part in bytes.split(self, None if sep is None else _bytes(sep), maxsplit)]

    def rfind(self, sub: Any, start: SupportsIndex | None = None, end: SupportsIndex | None = None) -> int:
        """As `bytes.rfind`; takes text."""
        return bytes.rfind(self, _bytes(sub), start, end)

    def rindex(self, sub: Any, start: SupportsIndex | None = None, end: SupportsIndex | None = None) -> int:
        """As `bytes.rindex`; takes text."""
        return bytes.rindex(self, _bytes(sub), start, end)

    def rsplit(self, sep: Any = None, maxsplit: SupportsIndex = -1) -> list[Output]:  # type: ignore[override]
        """As `bytes.rsplit`; takes text; the parts are `Output`."""
        return [Output(part) for part in bytes.rsplit(self, None if sep is None else _bytes(sep), maxsplit)]

    def partition(self, sep: Any) -> tuple[Output, Output, Output]:
        """As `bytes.partition`; takes text; the parts are `Output`."""
        head, found, tail = bytes.partition(self, _bytes(sep))
        return Output(head), Output(found), Output(tail)

    def rpartition(self, sep: Any) -> tuple[Output, Output, Output]:
        """As `bytes.rpartition`; takes text; the parts are `Output`."""
        head, found, tail = bytes.rpartition(self, _bytes(sep))
        return Output(head), Output(found), Output(tail)

    def strip(self, chars: Any = None) -> Output:
        """As `bytes.strip`; takes text, each character of which stands for its bytes; the result is `Output`."""
        return Output(bytes.strip(self, None if chars is None else _bytes(chars)))

    def lstrip(self, chars: Any = None) -> Output:
        """As `strip`, at the start."""
        return Output(bytes.lstrip(self, None if chars is None else _bytes(chars)))

    def rstrip(self, chars: Any = None) -> Output:
        """As `strip`, at the end."""
        return Output(bytes.rstrip(self, None if chars is None else _bytes(chars)))

    def removeprefix(self, prefix: Any) -> Output:
        """As `bytes.removeprefix`; takes text; the result is `Output`."""
        return Output(bytes.removeprefix(self, _bytes(prefix)))

    def removesuffix(self, suffix: Any) -> Output:
        """As `bytes.removesuffix`; takes text; the result is `Output`."""
        return Output(bytes.removesuffix(self, _bytes(suffix)))

    def replace(self, old: Any, new: Any, count: SupportsIndex = -1) -> Output:
        """As `bytes.replace`; takes text; the result is `Output`."""
        return Output(bytes.replace(self, _bytes(old), _bytes(new), count))


def _bytes(item: Any) -> Any:
    if isinstance(item, str):
        return item.encode("utf-8", "surrogateescape")
    if isinstance(item, tuple):
        return tuple(_bytes(part) for part in item)
    return item


def view(data: bytes) -> Output:
    r"""Return what people see of exact bytes: without the last newline, with `\r\n` as `\n`."""
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n")
    return Output(data[:-1] if data[-1:] == b"\n" else data)
