# SPDX-License-Identifier: Apache-2.0
"""`GroupResolverConfig`: the sources of `groups.conf` and `groups.d`, and where these are looked for.

Runs in any thread. The files are read at the first question, under a lock of its own, by one thread while the others
wait; nothing but files is read there.
"""

from __future__ import annotations

import configparser
import contextlib
import copy
import logging
import os
import shlex
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from ctask.errors import (
    GroupResolverConfigError,
    GroupSourceError,
    GroupSourceNoUpcall,
    NodeSetExternalError,
    NoSuchGroup,
)
from ctask.errors.text import printable
from ctask.nodes.groups import trust
from ctask.nodes.groups.resolver import GroupResolver
from ctask.nodes.groups.source import GroupSource
from ctask.nodes.groups.upcall import UpcallGroupSource
from ctask.nodes.groups.yamlfile import YAMLGroupLoader
from ctask.nodes.resolving import set_std_group_resolver

__all__ = ["GroupResolverConfig", "config_paths", "set_std_group_resolver_config"]

log = logging.getLogger("ctask.nodes.groups")

#: Where the configuration of the system lies.
SYSTEM_FOLDERS: Sequence[Path] = (Path("/etc/clustershell"), Path("/etc/ctask"))

_MAIN = "Main"
_MAIN_KEYS = ("default", "confdir", "groupsdir", "autodir")
_UPCALLS = ("map", "all", "list", "reverse", "mapall")
_TIMES = ("cache_time", "timeout")

#: Seconds that a source may take to say whether it has a group too which another one has.
RIVAL_TIMEOUT = 5.0


def config_paths(name: str) -> list[Path]:
    """Return where a configuration file is looked for, the weakest place first.

    The system's, the user's, then the folders named in the environment; in each, ClusterShell's before ctask's, so
    that a site that has node groups for ClusterShell has them for ctask. Folders that `pip` fills
    (``~/.local/etc``, ``{prefix}/etc``) are left out: what it puts there are examples, with nodes that do not exist.
    """
    return [path / name for path, _ in _folders()]


def _folders() -> list[tuple[Path, bool]]:
    """Return the folders of `config_paths`, and whether each is ClusterShell's."""
    environment = os.environ
    home = environment.get("XDG_CONFIG_HOME") or ""
    if not os.path.isabs(home):  # as its specification has it: a relative one is ignored
        home = "~/.config"
    folders = [(path, path.name == "clustershell") for path in SYSTEM_FOLDERS]
    folders += [(Path(home, name), name == "clustershell") for name in ("clustershell", "ctask")]
    for key, theirs in (("CLUSTERSHELL_CFGDIR", True), ("CTASK_CFGDIR", False)):
        if environment.get(key):
            folders.append((Path(environment[key]), theirs))
    found = []
    for folder, theirs in folders:
        try:
            found.append((folder.expanduser(), theirs))
        except RuntimeError:  # an account without a home
            continue
    return found


def set_std_group_resolver_config(filename: str | os.PathLike[str], illegal_chars: Iterable[str] | None = None) -> None:
    """Have the groups of this process come from one `groups.conf` and from nowhere else."""
    set_std_group_resolver(GroupResolverConfig([filename], illegal_chars))


class GroupResolverConfig(GroupResolver):
    """The sources of `groups.conf`: all files of the list are read as one, and what stands in a later one wins.

    `groups.d/*.yaml` beside each of them is read as well, whether the file is there or not, unless `autodir` in it,
    or in a later one, says otherwise. In ClusterShell's folders that holds only as long as none of these has a
    `groups.conf`: ClusterShell reads what `autodir` names and nothing else.

    A file that another account owns or may write to is refused, and so is one that a folder leads to in which another
    account may put a file in its place.

    Thread safety: any thread may ask. The files are read once, at the first question; who fails leaves it to the next.

    Args:
        filenames: the files, the weakest first; None: those of `config_paths`.
        illegal_chars: as for `GroupResolver`.
    """

    def __init__(
        self, filenames: Sequence[str | os.PathLike[str]] | None = None, illegal_chars: Iterable[str] | None = None
    ) -> None:
        super().__init__(illegal_chars=illegal_chars)
        self.filenames = config_paths("groups.conf") if filenames is None else [Path(name) for name in filenames]
        self._named = filenames is not None
        self._loading = threading.Lock()  # taken before the resolver's own, never after it
        self._loaded = False
        self._rivals: Sequence[GroupSource] = ()
        self._told: set[str] = set()  # groups; told twice where two threads are the first, which does no harm

    def group_nodes(self, group: str, source: str | None = None) -> list[str]:
        """Return the words of a group; warn, once, where a second source has it and no `default` chose between them."""
        try:
            found = super().group_nodes(group, source)
        except NoSuchGroup as error:
            if source is None and (others := self._elsewhere(group)):
                end = "" if error.reason.endswith((".", "?")) else "."
                raise NoSuchGroup(f"{error.reason}{end} There is {others}", error.text) from error
            raise
        if source is None and self._rivals and group not in self._told:
            self._told.add(group)
            self._tell_rivals(group)
        return found

    def _load(self) -> None:
        if self._loaded:
            return
        told = _Told()
        try:
            with self._loading:
                if not self._loaded:
                    sources, default, rivals = _Reader(self.filenames, told, named=self._named).read()
                    self._sources, self._default, self._rivals = sources, default, rivals
                    self._loaded = True
        finally:
            # not under the lock: a handler of the log is the user's code, and may ask for a group
            for level, text in dict.fromkeys(told):  # the environment may name a folder that is looked in anyway
                log.log(level, "%s", text)

    def _default_chosen(self) -> None:
        self._rivals = ()

    def _elsewhere(self, group: str) -> str:
        """Return how a group is written that files of other sources have; no command is run for that."""
        found = []
        for name, source in self._sources.items():
            if name != self._default and not isinstance(source, UpcallGroupSource):
                with contextlib.suppress(NodeSetExternalError):  # a file that cannot be read any more
                    if group in source.groups:
                        found.append(f"@{name}:{printable(group)}")
        return ", ".join(found)

    def _tell_rivals(self, group: str) -> None:
        shown, name = printable(group), self._default or ""
        remedy = f"say 'default: {name}' in [Main] of groups.conf, or write @{name}:{shown}"
        for rival in self._rivals:
            what = f"source {rival.name} ({rival.origin})"
            try:
                has = _has(rival, group)
            except NodeSetExternalError as error:
                text = "@%s is that of source %s; %s could not be asked for it: %s; %s"
                log.warning(text, shown, name, what, error, remedy)
                continue
            if has:
                mine = self._sources[name].origin
                log.warning("@%s is that of source %s (%s), and %s has one too: %s", shown, name, mine, what, remedy)

    def _nowhere(self) -> str:
        folders = ", ".join(str(path.parent) for path in self.filenames)
        return f"no groups.conf, and no groups.d/*.yaml, in {folders}"


def _has(source: GroupSource, group: str) -> bool:
    """Return whether a source has a group, within `RIVAL_TIMEOUT` for each of its commands."""
    if isinstance(source, UpcallGroupSource):
        source = copy.copy(source)  # with the same cache
        source.timeout = min(source.timeout, RIVAL_TIMEOUT)
    try:
        return group in source.resolv_list()
    except GroupSourceNoUpcall:
        pass
    try:
        return bool(source.resolv_map(group))
    except NoSuchGroup:
        return False


@dataclass(frozen=True, slots=True)
class _File:
    """A place of `groups.conf`, and what stands there."""

    path: Path
    rank: int  # the stronger, the higher
    theirs: bool  # ClusterShell's
    parser: configparser.ConfigParser | None

    @property
    def main(self) -> Mapping[str, str]:
        """Its section `[Main]`."""
        return self.parser[_MAIN] if self.parser is not None and self.parser.has_section(_MAIN) else {}


@dataclass(slots=True)
class _Found:
    """A source, and what its place among the others is decided by."""

    source: GroupSource
    path: Path
    rank: int
    order: int  # groups.d beside groups.conf, then confdir, autodir, sections


class _Told(list[tuple[int, str]]):
    """Log messages, kept until no lock is held."""

    def info(self, text: str) -> None:
        self.append((logging.INFO, printable(text)))

    def warning(self, text: str) -> None:
        self.append((logging.WARNING, printable(text)))


class _Reader:
    """Reads the files, once."""

    def __init__(self, filenames: Sequence[Path], told: _Told, *, named: bool) -> None:
        self._told = told
        for key in () if named else ("CLUSTERSHELL_CFGDIR", "CTASK_CFGDIR"):
            folder = os.environ.get(key)
            if folder and not Path(folder).expanduser().is_dir():
                told.warning(f"{key} is {printable(folder)}, and there is no such folder")
        # a folder that both are told to look in is ours
        ours = {os.path.abspath(path) for path, theirs in _folders() if not theirs}
        clustershell = {os.path.abspath(path) for path, theirs in _folders() if theirs} - ours
        files = [
            _File(path, rank, os.path.abspath(path.parent) in clustershell, _read(path, told))
            for rank, path in enumerate(filenames)
        ]
        # To ClusterShell, its files are one.
        top = max((file.rank for file in files if file.theirs and file.parser), default=0)
        self._files = [
            _File(file.path, top, True, file.parser) if file.theirs and file.parser else file for file in files
        ]
        self._there = [file for file in self._files if file.parser is not None]
        self._found: list[_Found] = []
        self._seen: set[Path] = set()  # folders

    def read(self) -> tuple[dict[str, GroupSource], str | None, Sequence[GroupSource]]:
        """Return the sources by name, which one is the default, and which others could as well be.

        Raises:
            GroupResolverConfigError: with the file that is wrong.
        """
        for file in self._there:
            _tell_unknown(file.path, file.parser, told=self._told)
        self._confdirs()
        self._autodirs()
        self._sections()
        # Stable: what is of one kind stays as it was read. What was there without any groups.conf comes first, so that
        # the first of them changes no name's meaning.
        self._found.sort(key=lambda found: found.order)
        named = self._named()
        sources = {name: found.source for name, found in named.items()}
        chosen = next((file for file in reversed(self._there) if "default" in file.main), None)
        if chosen is not None and chosen.main["default"]:
            # a choice of the system's, say, which knows nothing of what its users have
            stronger = [found.source for found in named.values() if found.rank > chosen.rank]
            return sources, self._default(chosen, sources), stronger
        first = next(iter(named.values()), None)
        if first is None:
            return {}, None, ()
        rivals = [found.source for found in named.values() if found is not first and found.rank >= first.rank]
        return sources, first.source.name, rivals

    def _default(self, file: _File, sources: Mapping[str, GroupSource]) -> str:
        default = file.main["default"]
        if default not in sources:
            known = ", ".join(sources) or "none"
            raise GroupResolverConfigError(
                f"{file.path}: the default source {default!r} is not there; sources: {known}", str(file.path)
            )
        return default

    def _named(self) -> dict[str, _Found]:
        """Return what was found by its name: of one name the strongest; two of the same rank are an error."""
        named: dict[str, _Found] = {}
        for found in self._found:
            before = named.setdefault(found.source.name, found)
            if before is found:
                continue
            if before.rank == found.rank:
                raise GroupResolverConfigError(
                    f"{found.path}: there is a group source {found.source.name!r} already, in {before.source.origin}; "
                    "give one another name",
                    str(found.path),
                )
            stronger, weaker = (found, before) if found.rank > before.rank else (before, found)
            named[found.source.name] = stronger
            self._told.info(f"{stronger.source} stands for the source of the same name in {weaker.path}")
        return named

    def _confdirs(self) -> None:
        for folder, rank in self._configured("groupsdir", "confdir"):
            for path in _files(folder, "*.conf", told=self._told):
                parser = _read(path, self._told)
                if parser is None:
                    continue
                _tell_unknown(path, parser, told=self._told, main=False)
                for name in parser.sections():
                    if name != _MAIN:
                        self._section(name, parser[name], path, rank, order=1)

    def _autodirs(self) -> None:
        self._seen.clear()  # a folder may be of both kinds
        folders = [(folder, rank, 2) for folder, rank in self._configured("autodir")]
        # What an `autodir` of ours has said holds for its own folder, and for weaker ones.
        said = max((file.rank for file in self._there if not file.theirs and "autodir" in file.main), default=-1)
        theirs = any(file.theirs for file in self._there)
        for file in reversed(self._files):
            # `--groupsconf one.conf` is that file alone
            if file.rank > said and not (file.theirs and theirs) and file.path.name == "groups.conf":
                folders += [(folder, file.rank, 0) for folder in self._new([file.path.parent / "groups.d"])]
        for folder, rank, order in folders:
            for path in _files(folder, "*.yaml", told=self._told, like="*.yml"):
                if not os.access(path, os.R_OK):
                    self._told.info(f"{path} is not readable, and is left out")
                    continue
                self._found += [_Found(source, path, rank, order) for source in YAMLGroupLoader(str(path))]

    def _configured(self, *keys: str) -> Iterator[tuple[Path, int]]:
        """Yield the folders, each once, that the first of some keys names in the strongest file that has one."""
        file = next((file for file in reversed(self._there) if any(key in file.main for key in keys)), None)
        if file is None:
            return
        text = file.main[next(key for key in keys if key in file.main)]
        try:
            names = shlex.split(text)
        except ValueError as error:
            raise GroupResolverConfigError(f"{file.path}: {text!r} cannot be read: {error}", str(file.path)) from error
        # `$CFGDIR` is the folder of the last file, as to ClusterShell: so a system's file can name its users' folders.
        # In ours it is the file's own as well: else it would mean another one as soon as a user has a file.
        last = self._there[-1]
        bases = [last] if file.theirs else [file, last]
        for name in names:
            variable = "CFGDIR" in name
            for base in bases if variable else [file]:
                there = name.replace("${CFGDIR}", "$CFGDIR").replace("$CFGDIR", str(base.path.parent))
                for folder in self._new([file.path.parent / there]):
                    yield folder, base.rank

    def _new(self, folders: Iterable[Path]) -> Iterator[Path]:
        for folder in folders:
            real = folder.resolve()
            if real not in self._seen:
                self._seen.add(real)
                yield folder

    def _sections(self) -> None:
        merged = _parser()
        origins: dict[str, _File] = {}  # where a section was last seen
        for file in self._there:
            if file.parser is not None:
                merged.read_dict(file.parser)
                origins.update(dict.fromkeys(file.parser.sections(), file))
        for name in merged.sections():
            if name != _MAIN:
                self._section(name, merged[name], origins[name].path, origins[name].rank, order=3)

    def _section(self, names: str, section: configparser.SectionProxy, path: Path, rank: int, *, order: int) -> None:
        """Add the source of a section, under each of its names."""
        times = {}
        for key in _TIMES:
            text = section.get(key)
            try:
                times[key] = None if text is None else float(text)
            except ValueError:
                raise GroupResolverConfigError(f"{path}: {key} of [{names}] is seconds, not {text!r}") from None
        upcalls = {f"{key}_upcall": section.get(key) for key in _UPCALLS}
        for name in filter(None, map(str.strip, names.split(","))):
            try:
                source = UpcallGroupSource(name, cfgdir=str(path.parent), origin=str(path), **upcalls, **times)  # type: ignore[arg-type]  # by name
            except GroupSourceError as error:
                raise GroupResolverConfigError(str(error), str(path)) from None
            self._found.append(_Found(source, path, rank, order))


def _parser() -> configparser.ConfigParser:
    # no interpolation, since commands have % in them; no section whose keys all others have
    return configparser.ConfigParser(interpolation=None, default_section="\0")


def _read(path: Path, told: _Told) -> configparser.ConfigParser | None:
    """Return what a file holds; None: it is not there, or it is not for this user."""
    parser = _parser()
    try:
        text, _ = trust.read(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError:
        told.info(f"{path} is not readable, and is left out")
        return None
    except (OSError, ValueError) as error:
        if isinstance(error, GroupResolverConfigError):
            raise
        raise GroupResolverConfigError(f"{path} cannot be read: {error}", str(path)) from error
    try:
        parser.read_string(text, str(path))
    except configparser.Error as error:
        raise GroupResolverConfigError(f"{path}: {printable(' '.join(str(error).split()))}", str(path)) from error
    return parser


def _tell_unknown(path: Path, parser: configparser.ConfigParser | None, *, told: _Told, main: bool = True) -> None:
    """Warn of what stands in a file and means nothing: a key that is misspelt would change what groups mean."""
    for name in parser.sections() if parser else ():
        known = _MAIN_KEYS if name == _MAIN else (*_UPCALLS, *_TIMES)
        for key in parser[name] if parser else ():
            shown = f"[{printable(name)}] has an unknown key {printable(key)}"
            if name == _MAIN and not main:
                told.warning(f"{path}: {printable(key)} of [Main] is left out: [Main] is read in groups.conf only")
            elif key not in known:
                near = get_close_matches(key, known, 1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
                told.warning(f"{path}: {shown}; {hint}")
        if name == _MAIN and parser and parser.has_option(name, "groupsdir") and parser.has_option(name, "confdir"):
            told.warning(f"{path}: groupsdir is another name of confdir, which is left out")


def _files(folder: Path, pattern: str, *, told: _Told, like: str = "") -> Iterator[Path]:
    """Yield the files of a folder, sorted, without hidden ones; a folder that is not there has none."""
    if folder.is_dir():
        for path in sorted(folder.glob(like)) if like else ():
            told.warning(f"{path} is left out: only {pattern} are read")
        yield from (path for path in sorted(folder.glob(pattern)) if not path.name.startswith("."))
    elif folder.exists():
        raise GroupResolverConfigError(f"{folder} has to be a folder of group sources, and is none", str(folder))
