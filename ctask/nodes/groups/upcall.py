# SPDX-License-Identifier: Apache-2.0
"""`UpcallGroupSource`: groups that commands tell, such as `sinfo` or `nodeattr`.

Runs in any thread. What was answered is kept in one table under one lock, which nobody holds while a command runs:
the first who asks leaves a Future there, runs the command, and all who ask the same meanwhile wait for it.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from ctask.errors import (
    GroupSourceError,
    GroupSourceNoUpcall,
    GroupSourceQueryFailed,
    NodeSetExternalError,
    NoSuchGroup,
    OptionError,
)
from ctask.errors.text import printable
from ctask.nodes.groups import shell
from ctask.nodes.groups.source import GroupSource, uncommented, words
from ctask.nodes.resolving import no_such_group
from ctask.numeric import duration, patience, shown

__all__ = ["CACHE_TIME", "TIMEOUT", "UpcallGroupSource"]

#: Seconds that an answer is used again.
CACHE_TIME = 3600.0
#: Seconds that a command may take. One that asks for all groups of a large site at once can need more: it says so.
TIMEOUT = 60.0

Answer = TypeVar("Answer")


class UpcallGroupSource(GroupSource):
    """Node groups that commands tell: `map`, `all`, `list`, `reverse` and `mapall` of a section of `groups.conf`.

    A command is run by `/bin/sh` in the folder `cfgdir`, with its standard input closed, and what it prints on
    standard output are words, apart by blanks or newlines; `#` begins a comment. Names reach it as variables
    (`ctask.nodes.groups.shell`), never as part of its text. Answers are kept for `cache_time`, in memory; failures are
    not.

    A group that `map` fails on, or knows no nodes of, is looked up by `list` where there is one: so a group that is
    not there is told from a source that does not work, and from a group that is empty.

    Thread safety: any thread may ask. Of threads that ask the same at once, one runs the command.

    Args:
        name: what stands before the colon in ``@slurm:compute``.
        map_upcall: prints the nodes of `$GROUP`.
        all_upcall: prints all nodes.
        list_upcall: prints the names of all groups.
        reverse_upcall: prints the names of the groups of `$NODE`.
        cfgdir: `$CFGDIR`, and where the commands run.
        cache_time: seconds; 0 keeps nothing.
        mapall_upcall: prints a line `group: nodes` for every group, in place of `map` and `list`; groups that it does
            not have are still asked of `map`, if there is one.
        timeout: seconds that a command may take.
        origin: where it is from, such as the path of a file; told in errors.

    Raises:
        GroupSourceError: neither `map_upcall` nor `mapall_upcall`, or a time that is none.
    """

    def __init__(
        self,
        name: str,
        map_upcall: str | None = None,
        all_upcall: str | None = None,
        list_upcall: str | None = None,
        reverse_upcall: str | None = None,
        cfgdir: str | None = None,
        cache_time: float | None = None,
        mapall_upcall: str | None = None,
        *,
        timeout: float | None = None,
        origin: str = "",
    ) -> None:
        super().__init__(name, origin=origin)
        if not map_upcall and not mapall_upcall:
            raise GroupSourceError(f"{self} needs `map`, or `mapall`")
        self.upcalls = {
            key: text
            for key, text in (
                ("map", map_upcall),
                ("all", all_upcall),
                ("list", list_upcall),
                ("reverse", reverse_upcall),
                ("mapall", mapall_upcall),
            )
            if text
        }
        self.cfgdir = cfgdir
        try:
            kept = CACHE_TIME if cache_time is None else patience("cache_time", cache_time)
        except OptionError:
            raise GroupSourceError(f"{self}: cache_time is 0 or more seconds, not {shown(cache_time)}") from None
        self.cache_time = math.inf if kept is None else kept
        try:
            self.timeout = TIMEOUT if timeout is None else duration("timeout", timeout)
        except OptionError:
            self.timeout = 0.0
        if not self.timeout:
            raise GroupSourceError(f"{self}: timeout is more than 0 seconds, not {shown(timeout)}")
        self._cache = _Cache()

    @property
    def has_reverse(self) -> bool:  # type: ignore[override]  # nobody sets it
        """Whether there is a `reverse` command."""
        return "reverse" in self.upcalls

    def clear_cache(self) -> None:
        """Forget all answers, so that the commands are run again."""
        self._cache = _Cache()

    def resolv_map(self, group: str) -> list[str]:
        """Return the words of a group: from `mapall`, else from `map`."""
        if "mapall" in self.upcalls:
            table = self._table()
            if group in table:
                return list(table[group])
            if "map" not in self.upcalls:
                raise no_such_group(group)
        try:
            found = self._words("map", "GROUP", group)
        except GroupSourceQueryFailed as error:
            try:
                there = self._lists(group)
            except NodeSetExternalError:
                there = True  # nobody can tell, or the source does not work at all: the first error says why
            if there:
                raise
            raise no_such_group(group) from error
        if not found:
            self._check_empty(group)
        return found

    def resolv_list(self) -> list[str]:
        """Return the names of all groups: from `mapall`, else from `list`."""
        return list(self._table()) if "mapall" in self.upcalls else self._words("list")

    def resolv_all(self) -> list[str]:
        """Return the words of all nodes, from `all`."""
        return self._words("all")

    def resolv_reverse(self, node: str) -> list[str]:
        """Return the groups of a node, from `reverse`."""
        return self._words("reverse", "NODE", node)

    def _lists(self, group: str) -> bool:
        return group in self.resolv_list()

    def _check_empty(self, group: str) -> None:
        """Refuse a group of which nothing was printed, unless it is known to be there: a name can be misspelt."""
        try:
            there = self._lists(group)
        except GroupSourceNoUpcall:
            shown = f"@{self.name}:{group}"
            raise NoSuchGroup(
                f"{shown}: `map` of {self} printed nothing, and without `list` nobody can tell an empty group from a "
                "misspelt one: give the source a `list`",
                shown,
            ) from None
        if not there:
            raise no_such_group(group)

    def _words(self, key: str, variable: str = "", name: str = "") -> list[str]:
        if key not in self.upcalls:
            raise GroupSourceNoUpcall(f"{self} has no command `{key}`")
        if variable:
            shell.check_name(name)
        variables = {variable: name} if variable else {}
        found = self._kept((key, name), lambda: words(self._upcall(key, variables), f"what {self} prints"))
        return list(found)

    def _table(self) -> dict[str, list[str]]:
        """Return all groups that `mapall` tells; those of lines with the same group are put together."""
        return self._kept(("mapall", ""), self._read_table)

    def _read_table(self) -> dict[str, list[str]]:
        table: dict[str, list[str]] = {}
        for line in uncommented(self._upcall("mapall", {})).splitlines():
            if not line.strip():
                continue
            group, colon, nodes = line.partition(":")
            if not colon or not group.strip():
                raise GroupSourceQueryFailed(
                    f"`mapall` of {self} printed a line that is not `group: nodes`: {printable(line[:80])!r}"
                )
            table.setdefault(group.strip(), []).extend(words(nodes, f"what {self} prints"))
        return table

    def _upcall(self, key: str, variables: dict[str, str]) -> str:
        """Run a command and return what it printed."""
        known = {"SOURCE": self.name} | ({"CFGDIR": self.cfgdir} if self.cfgdir else {})
        command = self.upcalls[key]
        try:
            return shell.run(command, variables=known | variables, folder=self.cfgdir, timeout=self.timeout)
        except shell.CommandFailedError as error:
            asked = "".join(f" for {name!r}" for name in variables.values())
            raise GroupSourceQueryFailed(f"`{key}` of {self}{asked} {error}; it is: {printable(command)}") from error

    def _kept(self, question: tuple[str, str], ask: Callable[[], Answer]) -> Answer:
        if self._cache.process != os.getpid():
            # a lock that another thread held at a fork would never be given back, and no answer would come
            self._cache = _Cache()
        return self._cache.get(question, ask, self.cache_time)


class _Cache:
    """Answers to questions; `get` may be called by any thread."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self._lock = threading.Lock()
        self._entries: dict[tuple[str, str], _Entry] = {}

    def get(self, question: tuple[str, str], ask: Callable[[], Answer], seconds: float) -> Answer:
        """Return an answer that is not too old, one that another thread is just getting, or else a new one."""
        with self._lock:
            entry = self._entries.get(question)
            if entry is None or entry.until <= time.monotonic():
                theirs, entry = None, _Entry()
                self._entries[question] = entry
            else:
                theirs = entry
        return self._await(theirs) if theirs is not None else self._fill(question, entry, ask, seconds)

    def _await(self, entry: _Entry) -> Any:
        try:
            return entry.future.result()
        except NodeSetExternalError as error:
            # an object of its own for each thread: they add their tracebacks to it
            raise type(error)(error.reason, error.text) from error

    def _fill(self, question: tuple[str, str], entry: _Entry, ask: Callable[[], Answer], seconds: float) -> Answer:
        try:
            answer = ask()
        except BaseException as error:
            with self._lock:
                if self._entries.get(question) is entry:
                    del self._entries[question]
            broken_off = GroupSourceQueryFailed("the command of a group source was broken off")
            entry.future.set_exception(error if isinstance(error, Exception) else broken_off)
            raise
        entry.until = time.monotonic() + seconds
        entry.future.set_result(answer)
        return answer


class _Entry:
    """One answer, or what becomes one."""

    def __init__(self) -> None:
        self.future: Future[Any] = Future()
        self.until = math.inf
