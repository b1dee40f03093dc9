# SPDX-License-Identifier: Apache-2.0
"""OpenSSH's options (`-o`) in ctask's terms, those that are taken for now; every other is refused by name.

Pure functions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

from ctask.errors import OptionError
from ctask.options import DEFAULT_KNOWN_HOSTS, parse_option

__all__ = ["TAKEN", "options"]

_POLICIES = {
    "yes": "verify",
    "true": "verify",
    "accept-new": "accept-new",
    "no": "insecure-ignore",
    "off": "insecure-ignore",
    "false": "insecure-ignore",
}
#: Options of ssh that ctask has as options of its own.
_OWN = {"user": "-l USER", "identityfile": "-i IDENTITY", "connecttimeout": "-t SECS"}


def options(texts: Iterable[str]) -> dict[str, Any]:
    """Return the options of a call for `OPTION=VALUE` or `OPTION VALUE`, in any case; the last one counts.

    `UserKnownHostsFile` and `GlobalKnownHostsFile` replace their half of the files each, as for ssh.

    Raises:
        OptionError: not taken, or no such value.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, value = _split(text)
        if name.lower() not in _READERS:
            own = _OWN.get(name.lower())
            there = f"say {own}" if own else f"there are {TAKEN}"
            raise OptionError(f"-o {name} is not taken; {there}")
        key, reader = _READERS[name.lower()]
        found[key] = reader(name, value)
    user, system = found.pop("user_files", None), found.pop("system_files", None)
    if user is not None or system is not None:
        usual = _split_usual()
        found["known_hosts"] = [*(usual[0] if user is None else user), *(usual[1] if system is None else system)]
    return found


def _split(text: str) -> tuple[str, str]:
    name, equals, value = text.strip().partition("=")
    words = name.split(maxsplit=1)
    if len(words) == 2:  # the `=` belongs to the value
        name, value = words[0], words[1] + equals + value
    elif not words or not equals:
        raise OptionError(f"-o takes OPTION=VALUE, not {text!r}")
    value = value.strip()
    if not value:
        raise OptionError(f"-o {name.strip()} is without a value")
    return name.strip(), value


def _split_usual() -> tuple[list[str], list[str]]:
    own = [path for path in DEFAULT_KNOWN_HOSTS if path.startswith("~")]
    return own, [path for path in DEFAULT_KNOWN_HOSTS if path not in own]


def _port(name: str, value: str) -> int:
    number = int(value) if value.isascii() and value.isdecimal() and len(value) < 10 else 0
    if not 1 <= number <= 65_535:
        raise OptionError(f"-o {name} is a number from 1 to 65535, not {value!r}")
    return number


def _files(_: str, value: str) -> list[str]:
    # "none" is ssh's word for no file; an empty one is the same, and a missing one would be an error.
    paths = [os.devnull if path.lower() == "none" else path for path in value.split()]
    return list(parse_option("known_hosts", paths)[1])


def _policy(name: str, value: str) -> str:
    policy = _POLICIES.get(value.lower())
    if policy is None:
        refused = "ask is refused, since nobody can be asked for many nodes at once" if value.lower() == "ask" else ""
        raise OptionError(f"-o {name}: {refused or f'no such value: {value!r}'}; say yes, accept-new or no")
    return policy


_READERS: dict[str, tuple[str, Callable[[str, str], Any]]] = {
    "port": ("port", _port),
    "userknownhostsfile": ("user_files", _files),
    "globalknownhostsfile": ("system_files", _files),
    "stricthostkeychecking": ("host_key_policy", _policy),
    "kexalgorithms": ("kex_algorithms", lambda _, value: value),
}
TAKEN = "Port, UserKnownHostsFile, GlobalKnownHostsFile, StrictHostKeyChecking and KexAlgorithms"
