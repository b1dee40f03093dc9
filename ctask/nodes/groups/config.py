# SPDX-License-Identifier: Apache-2.0
"""`GroupResolverConfig`: the sources that `groups.conf` tells of, and where such files are looked for.

Runs in any thread. The files are read at the first question, under a lock of its own, by one thread while the others
wait; nothing but files is read there.
"""

from __future__ import annotations

import configparser
import logging
import os
import shlex
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ctask.errors import GroupResolverConfigError, GroupSourceError
from ctask.errors.text import printable
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


def config_paths(name: str) -> list[Path]:
    """Return where a configuration file is looked for, the weakest place first.

    The system's, the user's, then the folders named in the environment; in each, ClusterShell's before ctask's, so
    that a site that has node groups for ClusterShell has them for ctask. Folders that `pip` fills
    (``~/.local/etc``, ``{prefix}/etc``) are left out: what it puts there are examples, with nodes that do not exist.
    """
    environment = os.environ
    home = Path(environment.get("XDG_CONFIG_HOME") or "~/.config")
    folders = [*SYSTEM_FOLDERS, home / "clustershell", home / "ctask"]
    folders += [Path(environment[key]) for key in ("CLUSTERSHELL_CFGDIR", "CTASK_CFGDIR") if environment.get(key)]
    found = []
    for folder in folders:
        try:
            found.append(folder.expanduser() / name)
        except RuntimeError:  # an account without a home
            continue
    return found


def set_std_group_resolver_config(filename: str | os.PathLike[str], illegal_chars: Iterable[str] | None = None) -> None:
    """Have the groups of this process come from one `groups.conf` and from nowhere else."""
    set_std_group_resolver(GroupResolverConfig([filename], illegal_chars))


class GroupResolverConfig(GroupResolver):
    """The sources of `groups.conf`: all files of the list are read as one, and what stands in a later one wins.

    Where none of the files is there, `groups.d/*.yaml` beside them is read all the same.

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
        self._loading = threading.Lock()  # taken before the resolver's own, never after it
        self._loaded = False

    def _load(self) -> None:
        if self._loaded:
            return
        with self._loading:
            if not self._loaded:
                sources, default = _Reader(self.filenames).read()
                self._sources, self._default = sources, default
                self._loaded = True

    def _nowhere(self) -> str:
        folders = ", ".join(str(path.parent) for path in self.filenames)
        return f"no groups.conf, and no groups.d/*.yaml, in {folders}"


class _Reader:
    """Reads the files, once."""

    def __init__(self, filenames: Sequence[Path]) -> None:
        self._filenames = filenames
        self._sources: dict[str, GroupSource] = {}

    def read(self) -> tuple[dict[str, GroupSource], str | None]:
        """Return the sources by name, and which is the default one.

        Raises:
            GroupResolverConfigError: with the file that is wrong.
        """
        parser = _parser()
        last = None
        origins: dict[str, Path] = {}  # where a section was last seen
        for path in self._filenames:
            one = _read(path)
            if one is not None:
                last = path
                origins.update(dict.fromkeys(one.sections(), path))
                parser.read_dict(one)
        if last is None:
            self._autodirs([path.parent / "groups.d" for path in self._filenames])
            return self._sources, next(iter(self._sources), None)
        main = parser[_MAIN] if parser.has_section(_MAIN) else {}
        confdir = main.get("groupsdir") or main.get("confdir") or ""
        self._confdirs(_folders(confdir, last))
        self._autodirs(_folders(main.get("autodir") or "", last))
        for name in parser.sections():
            if name != _MAIN:
                self._section(name, parser[name], origins[name])
        default = main.get("default") or next(iter(self._sources), None)
        if default is not None and default not in self._sources:
            known = ", ".join(self._sources) or "none"
            raise GroupResolverConfigError(f"{last}: the default source {default!r} is not there; sources: {known}")
        return self._sources, default

    def _confdirs(self, folders: Iterable[Path]) -> None:
        for path in _files(folders, "*.conf"):
            parser = _read(path)
            for name in parser.sections() if parser else ():
                if parser and name != _MAIN:
                    self._section(name, parser[name], path)

    def _autodirs(self, folders: Iterable[Path]) -> None:
        for path in _files(folders, "*.yaml"):
            if not os.access(path, os.R_OK):
                log.info("%s is not readable, and is left out", path)
                continue
            for source in YAMLGroupLoader(str(path)):
                self._add(source, path)

    def _section(self, names: str, section: configparser.SectionProxy, path: Path) -> None:
        """Add the source of a section, under each of its names."""
        times = {}
        for key in ("cache_time", "timeout"):
            text = section.get(key)
            try:
                times[key] = None if text is None else float(text)
            except ValueError:
                raise GroupResolverConfigError(f"{path}: {key} of [{names}] is seconds, not {text!r}") from None
        upcalls = {f"{key}_upcall": section.get(key) for key in ("map", "all", "list", "reverse", "mapall")}
        for name in filter(None, map(str.strip, names.split(","))):
            try:
                source = UpcallGroupSource(name, cfgdir=str(path.parent), origin=str(path), **upcalls, **times)  # type: ignore[arg-type]  # by name
            except GroupSourceError as error:
                raise GroupResolverConfigError(str(error), str(path)) from None
            self._add(source, path)

    def _add(self, source: GroupSource, path: Path) -> None:
        before = self._sources.setdefault(source.name, source)
        if before is not source:
            raise GroupResolverConfigError(
                f"{path}: there is a group source {source.name!r} already, in {before.origin}; give one another name"
            )


def _parser() -> configparser.ConfigParser:
    # no interpolation, since commands have % in them; no section whose keys all others have
    return configparser.ConfigParser(interpolation=None, default_section="\0")


def _read(path: Path) -> configparser.ConfigParser | None:
    """Return what a file holds; None: it is not there, or it is not for this user."""
    parser = _parser()
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError:
        log.info("%s is not readable, and is left out", path)
        return None
    except (OSError, ValueError) as error:
        raise GroupResolverConfigError(f"{path} cannot be read: {error}", str(path)) from error
    try:
        parser.read_string(text, str(path))
    except configparser.Error as error:
        raise GroupResolverConfigError(f"{path}: {printable(' '.join(str(error).split()))}", str(path)) from error
    return parser


def _folders(text: str, conf: Path) -> Iterator[Path]:
    """Yield the folders of `confdir` and `autodir`, each once; where they are relative, it is to `$CFGDIR`."""
    try:
        names = shlex.split(text)
    except ValueError as error:
        raise GroupResolverConfigError(f"{conf}: {text!r} cannot be read: {error}") from error
    seen = set()
    for name in names:
        folder = conf.parent / Path(name.replace("${CFGDIR}", "$CFGDIR").replace("$CFGDIR", str(conf.parent)))
        if folder.resolve() not in seen:
            seen.add(folder.resolve())
            yield folder


def _files(folders: Iterable[Path], pattern: str) -> Iterator[Path]:
    """Yield the files of folders, sorted; a folder that is not there has none."""
    for folder in folders:
        if folder.is_dir():
            yield from sorted(folder.glob(pattern))
        elif folder.exists():
            raise GroupResolverConfigError(f"{folder} is to be a folder of group sources, and is none", str(folder))


