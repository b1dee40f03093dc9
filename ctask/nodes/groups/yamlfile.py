# SPDX-License-Identifier: Apache-2.0
"""`YAMLGroupLoader`: groups in a YAML file, read again when it has changed. Only this file knows PyYAML.

Runs in any thread. What was read is one record that is replaced whole; where two threads read the file at once, the
record of the later one stands.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

from ctask.errors import GroupResolverConfigError
from ctask.errors.text import printable
from ctask.nodes.groups import trust
from ctask.nodes.groups.source import FileGroupSource, Groups
from ctask.numeric import patience

__all__ = ["CACHE_TIME", "YAMLGroupLoader"]

#: Seconds after which the file is looked at again.
CACHE_TIME = 3600.0

#: of a file: inode, size, owner, mode, and the time of its last change of any kind
_Stamp: TypeAlias = tuple[int, int, int, int, int]


@dataclass(frozen=True, slots=True)
class _Read:
    """What a file held."""

    sources: dict[str, Groups]
    stamp: _Stamp
    looked: float


class YAMLGroupLoader:
    """Reads a file of sources: ``site: {prod: "n[1-90]", test: [n91, n92], spare: null}``.

    Iterating gives a `FileGroupSource` for each source in it. The file is looked at again `cache_time` seconds after
    it was, and read if it has changed. Sources that are new in it then are not used until the program starts anew.

    Thread safety: any thread may ask.

    Args:
        filename: the file.
        cache_time: seconds; 0 looks at each question.

    Raises:
        GroupResolverConfigError: it cannot be read, or PyYAML is not installed.
    """

    def __init__(self, filename: str, cache_time: float | None = None) -> None:
        self.filename = os.fspath(filename)
        kept = CACHE_TIME if cache_time is None else patience("cache_time", cache_time)
        self.cache_time = math.inf if kept is None else kept
        self._read = self._load()

    def __iter__(self) -> Iterator[FileGroupSource]:
        """Iterate over the sources that the file has now."""
        return iter([FileGroupSource(name, self) for name in self._now().sources])

    def groups(self, sourcename: str) -> Groups:
        """Return the groups of a source as the file has them now; none if the source is gone from it.

        Raises:
            GroupResolverConfigError: the file has changed and cannot be read any more.
        """
        return MappingProxyType(self._now().sources.get(sourcename, {}))

    def _now(self) -> _Read:
        read = self._read
        now = time.monotonic()
        if now < read.looked + self.cache_time:
            return read
        unchanged = self._stamp() == read.stamp
        self._read = read = _Read(read.sources, read.stamp, now) if unchanged else self._load()
        return read

    def _stamp(self) -> _Stamp:
        try:
            return _stamp(os.stat(self.filename))
        except OSError as error:
            raise self._bad(error.strerror or str(error)) from error

    def _load(self) -> _Read:
        parsed, stamp = self._parsed()
        return _Read(self._sources(parsed), stamp, time.monotonic())

    def _parsed(self) -> tuple[Any, _Stamp]:
        """Return what the file says, and its stamp from before it was read: a later change is seen at the next look."""
        try:
            import yaml  # an extra: only those who have such files need it
        except ImportError as error:
            raise GroupResolverConfigError(
                f"{self.filename} is YAML, and PyYAML is not installed: pip install PyYAML, or the package "
                "python3-yaml of your distribution",
                self.filename,
            ) from error
        try:
            text, status = trust.read(self.filename)
            return yaml.load(text, Loader=_strict(yaml)), _stamp(status)  # noqa: S506 (a SafeLoader)
        except GroupResolverConfigError:
            raise
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise self._bad(" ".join(str(error).split())) from error

    def _sources(self, parsed: Any) -> dict[str, Groups]:
        if not isinstance(parsed, Mapping):
            raise self._bad("it has to be sources with their groups: `site: {prod: 'n[1-90]'}`")
        sources = {}
        for name, groups in parsed.items():
            if groups is not None and not isinstance(groups, Mapping):
                raise self._bad(f"source {name!r} has to have groups with their nodes")
            for word in (name, *(groups or ())):
                if not isinstance(word, str):
                    raise self._bad(f"the name {word!r} is not text to YAML; put it in quotes")
            sources[name] = groups or {}
        return sources

    def _bad(self, reason: str) -> GroupResolverConfigError:
        return GroupResolverConfigError(f"{self.filename} cannot be used: {printable(reason)}", self.filename)


def _stamp(status: os.stat_result) -> _Stamp:
    return status.st_ino, status.st_size, status.st_uid, status.st_mode, status.st_ctime_ns


def _strict(yaml: Any) -> type[Any]:
    """Return a safe loader that refuses a mapping which has a key twice, where YAML's takes the last.

    `<<` is resolved here as well: PyYAML 6 gives a mapping that merges one which has merged another the wrong values.
    """
    base: type[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Strict(base):  # type: ignore[misc]  # PyYAML has no types
        def get_single_node(self) -> Any:
            root = super().get_single_node()
            nodes, looked = [root], set()
            while nodes:
                node = nodes.pop()
                if id(node) in looked:  # an alias
                    continue
                looked.add(id(node))
                if isinstance(node, yaml.MappingNode):
                    node.value = _pairs(yaml, node)
                    nodes += [value for _, value in node.value]
                elif isinstance(node, yaml.SequenceNode):
                    nodes += node.value
            return root

    return Strict


def _pairs(yaml: Any, mapping: Any) -> list[tuple[Any, Any]]:
    """Return the keys and values of a mapping: its own, and behind them those that it merges and has not itself."""
    own: dict[object, tuple[Any, Any]] = {}
    merged: list[Any] = []
    for key, value in mapping.value:
        if key.tag == "tag:yaml.org,2002:merge":
            merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
            continue
        name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else key
        if name in own:
            raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands there twice", key.start_mark)
        own[name] = (key, value)
    for other in merged:
        if not isinstance(other, yaml.MappingNode):
            raise yaml.constructor.ConstructorError(None, None, "<< merges mappings only", other.start_mark)
        for key, value in _pairs(yaml, other):
            own.setdefault((key.tag, key.value) if isinstance(key, yaml.ScalarNode) else key, (key, value))
    return list(own.values())
