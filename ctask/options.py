# SPDX-License-Identifier: Apache-2.0
"""Options: what they are called, what values they take, which of them wins, and the frozen target they make.

The resolver belongs to one Task and is read and written in the callers' threads, before a job exists; what it
makes (`Target`, `Command`, `JobOptions`) is frozen and may be read anywhere.
"""

from __future__ import annotations

import difflib
import functools
import numbers
import os
import pwd
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from ctask.errors import OptionError
from ctask.nodes import NodeSet
from ctask.nodes.names import check as check_name
from ctask.nodes.names import check_address
from ctask.numeric import duration, limit, shown, statuses, whole
from ctask.retry import BUSY, Retry

__all__ = [
    "STOP_POLICIES",
    "TRANSPORTS",
    "Command",
    "JobOptions",
    "Options",
    "Stop",
    "Target",
    "parse_option",
]

#: Identity files that OpenSSH's client tries when none is named (ssh_config(5), IdentityFile).
DEFAULT_IDENTITIES = ("~/.ssh/id_rsa", "~/.ssh/id_ecdsa", "~/.ssh/id_ed25519")
#: ssh_config(5): UserKnownHostsFile, then GlobalKnownHostsFile.
DEFAULT_KNOWN_HOSTS = (
    "~/.ssh/known_hosts",
    "~/.ssh/known_hosts2",
    "/etc/ssh/ssh_known_hosts",
    "/etc/ssh/ssh_known_hosts2",
)
#: Methods of key exchange that OpenSSL computes, the best first; and the one in which the server chooses what it costs.
KEX_ALGORITHMS = (
    "mlkem768x25519-sha256",
    "curve25519-sha256",
    "curve25519-sha256@libssh.org",
    "ecdh-sha2-nistp256",
    "ecdh-sha2-nistp384",
    "ecdh-sha2-nistp521",
    "diffie-hellman-group16-sha512",
    "diffie-hellman-group14-sha256",
)
GROUP_EXCHANGE = "diffie-hellman-group-exchange-sha256"
#: The ways to a node, by name; `ctask.transports.register` adds to them.
TRANSPORTS = {"local", "ssh"}
HOST_KEY_POLICIES = ("verify", "accept-new", "insecure-ignore")
#: From the gentlest on, so that "at most `term`" is a minimum.
STOP_POLICIES = ("leave", "term", "kill")


@dataclass(frozen=True, slots=True)
class Target:
    """Everything that decides how a node is reached; equal targets share connections.

    Attributes:
        transport: `ssh`, `local`, or the name of one that the program has registered.
        address: name or IP address to connect to, and to look up in known_hosts.
        identities: paths of private keys, in the order in which they are offered; missing default ones are skipped.
        named_identities: whether the caller named them, so that a missing one is an error.
        known_hosts: paths, the first one is where `accept-new` adds.
        named_known_hosts: whether the caller named them.
        host_key_policy: `verify`, `accept-new` or `insecure-ignore`.
        kex_algorithms: the methods of key exchange to offer, the preferred one first.
        keep: seconds that an idle connection to it is kept; 0 closes it with its last job.
        alive_interval: seconds between the questions whether a node in use still lives; None asks nothing. Here and
            not in `JobOptions`, because a connection has one beat, whatever jobs share it.
    """

    transport: str = "ssh"
    address: str = ""
    port: int = 22
    user: str = ""
    identities: tuple[str, ...] = ()
    named_identities: bool = False
    known_hosts: tuple[str, ...] = ()
    named_known_hosts: bool = False
    host_key_policy: str = "verify"
    keep: float = 60.0
    alive_interval: float | None = 30.0
    kex_algorithms: tuple[str, ...] = KEX_ALGORITHMS

    def where(self) -> str:
        """Return `address:port`, with brackets around an IPv6 address."""
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


@dataclass(frozen=True, slots=True)
class Command:
    """What a session runs.

    Attributes:
        line: for a shell, as bytes.
        argv: an argument vector in place of `line`; local commands only.
        stdin: False sends end of file together with the command.
        pty: with a terminal; merges stderr into stdout, and closing the session hangs up the command.
    """

    line: bytes = b""
    argv: tuple[bytes, ...] = ()
    stdin: bool = False
    pty: bool = False


@dataclass(frozen=True, slots=True)
class Stop:
    """How that is ended on its node what ctask stops.

    Attributes:
        policy: `kill` (TERM, `grace` seconds, KILL), `term` (TERM, and nothing after it) or `leave` (it runs on).
        grace: seconds between TERM and KILL.
        by: `session` ends all that the command has started; `signal` only asks the server to signal the command. That
            is for accounts whose sshd runs a ForceCommand, which a second channel would run once more (a `command=` of
            a key is noticed). OpenSSH signals neither that nor what runs as root, and no answer tells of what the
            command had started: `remote_state` is `unknown` then.
    """

    policy: str = "kill"
    grace: float = 5.0
    by: str = "session"

    def at_most(self, policy: str) -> Stop:
        """Return the gentler one of this and `policy`."""
        return Stop(min(self.policy, policy, key=STOP_POLICIES.index), self.grace, self.by)


@dataclass(frozen=True, slots=True)
class JobOptions:
    """The limits of one job, in seconds (None is no limit), and what they lead to.

    Attributes:
        connect_timeout: until exec's reply, but for the time in which the job waits for its slot.
        timeout: of one try of the command, from exec's reply.
        idle_timeout: without a byte, from exec's reply; not counted while credit is withheld from the node.
        deadline: of all tries together, from the submission.
        drain_timeout: without a byte, from the exit status.
        retry: when it is tried again; None is never.
    """

    connect_timeout: float | None = 10.0
    timeout: float | None = None
    idle_timeout: float | None = None
    deadline: float | None = None
    drain_timeout: float | None = 2.0
    stop: Stop = Stop()
    fresh: bool = False
    retry: Retry | None = BUSY


def _positive(name: str, value: object) -> int:
    return whole(name, value, 1)


def _port(name: str, value: object) -> int:
    return whole(name, value, 1, 65_535)


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, (bool, int)) or value not in (0, 1):
        raise OptionError(f"{name} is True or False, not {shown(value)}")
    return bool(value)


def _choice(*choices: str) -> Callable[[str, object], str]:
    def parse(name: str, value: object) -> str:
        if not isinstance(value, str) or value not in choices:
            raise OptionError(f"{name} is one of {', '.join(choices)}, not {shown(value)}")
        return value

    return parse


def _transport(name: str, value: object) -> str:
    if not isinstance(value, str) or value not in TRANSPORTS:
        raise OptionError(f"{name} is one of {', '.join(sorted(TRANSPORTS))}, not {shown(value)}")
    return value


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or not value or value.startswith("-") or not value.isprintable():
        raise OptionError(f"{name} is a text without control characters and without a leading '-', not {shown(value)}")
    return value


def _user(name: str, value: object) -> str:
    # The rule of OpenSSH's ssh_valid_ruser: these characters end up in shells and ProxyCommands elsewhere.
    text = _text(name, value)
    if any(c in "'`\";&<>|(){}$\\" or c.isspace() for c in text):
        raise OptionError(f"{name} has a character that no login name may have: {shown(value)}")
    return text


def _paths(name: str, value: object) -> tuple[str, ...]:
    items = [value] if isinstance(value, (str, os.PathLike)) else value
    if not isinstance(items, Iterable):
        raise OptionError(f"{name} is a path or several, not {shown(value)}")
    paths = tuple(os.path.abspath(os.path.expanduser(os.fspath(item))) for item in items)
    if any("\0" in path for path in paths):
        raise OptionError(f"{name} has a NUL in a path: {shown(value)}")
    return paths


def _kex(name: str, value: object) -> tuple[str, ...]:
    """Return the methods that a list in the form of ssh_config(5), KexAlgorithms, names: of those that ctask has."""
    items = [value] if isinstance(value, str) else list(value) if isinstance(value, Iterable) else [value]
    if not all(isinstance(item, str) for item in items):
        raise OptionError(f"{name} is a list of methods of key exchange, as KexAlgorithms has it, not {shown(value)}")
    text = ",".join(map(str, items))
    sign = text[:1] if text[:1] in ("+", "-", "^") else ""
    patterns = [part.strip() for part in text.removeprefix(sign).split(",")]
    there = (*KEX_ALGORITHMS, GROUP_EXCHANGE)
    meant = [name for pattern in patterns for name in there if fnmatchcase(name, pattern)]
    if sign == "-":
        chosen = [name for name in KEX_ALGORITHMS if name not in meant]
    else:
        chosen = [*(KEX_ALGORITHMS if sign == "+" else ()), *meant, *(KEX_ALGORITHMS if sign == "^" else ())]
    if not chosen or (not meant and sign != "-"):
        raise OptionError(f"{name} {value!r} leaves nothing that ctask has: {', '.join(there)}")
    return tuple(dict.fromkeys(chosen))


def _retry(name: str, value: object) -> Retry | None:
    if value is None or isinstance(value, Retry):
        return value
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return Retry(int(value))
    raise OptionError(f"{name} is a ctask.Retry, a number of tries, or None for one try only, not {shown(value)}")


_PARSERS: dict[str, Callable[[str, object], Any]] = {
    # the way to a node
    "transport": _transport,
    "address": _text,
    "port": _port,
    "user": _user,
    "identity": _paths,
    "known_hosts": _paths,
    "host_key_policy": _choice(*HOST_KEY_POLICIES),
    "keep": duration,
    "alive_interval": limit,
    "kex_algorithms": _kex,
    # limits of a job
    "connect_timeout": limit,
    "timeout": limit,
    "idle_timeout": limit,
    "deadline": limit,
    "retry": _retry,
    "drain_timeout": limit,
    "stop": _choice(*STOP_POLICIES),
    "stop_grace": duration,
    "stop_by": _choice("session", "signal"),
    "fresh": _flag,
    # what a worker does with its output and its standard input
    "pty": _flag,
    "stderr": _flag,
    "gather": _flag,
    "ok_codes": statuses,
    # of the task alone
    "fanout": _positive,
    "queue_limit": _positive,
    "output_memory": _positive,
}

#: Options that one node can have of its own.
NODE_OPTIONS = frozenset(
    (
        *("transport", "address", "port", "user", "identity", "known_hosts", "host_key_policy", "kex_algorithms"),
        *("keep", "alive_interval", "connect_timeout", "timeout", "idle_timeout", "deadline", "drain_timeout", "retry"),
        *("stop", "stop_grace", "stop_by", "fresh"),
    )
)
#: Options that a call of `shell`, `run` or `submit` takes.
CALL_OPTIONS = NODE_OPTIONS | {"pty", "stderr", "gather", "ok_codes"}
#: Options of the whole task, for `set_info` and `set_default`.
TASK_OPTIONS = frozenset(_PARSERS)

#: What ClusterShell calls them.
_ALIASES = {
    "ssh_user": "user",
    "command_timeout": "timeout",
    "stdout_msgtree": "gather",
}

_DEFAULTS: dict[str, Any] = {
    "transport": "ssh",
    "port": 22,
    "host_key_policy": "verify",
    "keep": 60.0,
    "alive_interval": 30.0,
    "kex_algorithms": KEX_ALGORITHMS,
    "connect_timeout": 10.0,
    "timeout": None,
    "idle_timeout": None,
    "deadline": None,
    "retry": BUSY,
    "drain_timeout": 2.0,
    "stop": "kill",
    "stop_grace": 5.0,
    "stop_by": "session",
    "fresh": False,
    "pty": False,
    "stderr": False,
    "gather": True,
    "ok_codes": frozenset((0,)),
    "fanout": 64,
    "queue_limit": 16 << 20,
    "output_memory": 512 << 20,
}


def parse_option(name: str, value: object, allowed: frozenset[str] = TASK_OPTIONS) -> tuple[str, Any]:
    """Return the option's own name (ClusterShell's names are understood) and its checked value.

    Raises:
        OptionError: no such option here (with the nearest name), or no such value.
    """
    own = _ALIASES.get(name, name)
    if own not in allowed:
        if own in _PARSERS:
            raise OptionError(f"{name} is an option of the whole task: task.set_info({name!r}, …)")
        near = difflib.get_close_matches(name, sorted(allowed), 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(sorted(allowed))}"
        raise OptionError(f"no such option: {name!r}; {hint}")
    return own, _PARSERS[own](name, value)


@functools.cache
def _own_user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


class Options:
    """What a task, its nodes and its calls were told; makes targets.

    Which one wins: the call, then `node_options`, then `set_info`, then ctask's own defaults.
    Not locked: a Task's options are set where its work is submitted.
    """

    def __init__(self) -> None:
        self._task: dict[str, Any] = {}
        self._extra: dict[str, Any] = {}
        self._nodes: dict[str, dict[str, Any]] = {}

    def set(self, name: str, value: object) -> tuple[str, Any]:
        """Set an option of the whole task; names that begin with `USER_` are the program's own."""
        if name.startswith("USER_"):
            self._extra[name] = value
            return name, value
        own, parsed = parse_option(name, value)
        self._task[own] = parsed
        return own, parsed

    def get(self, name: str, default: Any = None) -> Any:
        """Return what the task was told, else ctask's default, else `default`."""
        if name.startswith("USER_"):
            return self._extra.get(name, default)
        own = _ALIASES.get(name, name)
        if own in self._task:
            return self._task[own]
        return _DEFAULTS.get(own, default)

    def set_nodes(self, nodes: NodeSet, options: Mapping[str, object]) -> None:
        """Set options of single nodes; later calls win, option by option."""
        parsed = dict(parse_option(name, value, NODE_OPTIONS) for name, value in options.items())
        for node in nodes:
            self._nodes[node] = {**self._nodes.get(node, {}), **parsed}

    def call(self, options: Mapping[str, object]) -> Call:
        """Check the options of one call and return what resolves its nodes."""
        parsed = dict(parse_option(name, value, CALL_OPTIONS) for name, value in options.items())
        return Call({**_DEFAULTS, **self._task}, self._nodes, parsed)


class Call:
    """The options of one submitted command; resolves each of its nodes."""

    def __init__(
        self, task: dict[str, Any], nodes: Mapping[str, dict[str, Any]], call: dict[str, Any]
    ) -> None:
        self._task = task
        self._nodes = nodes
        self._call = call
        self._plain = {**task, **call}
        self._pattern = _target(self._plain)
        self._limits = _limits(self._plain)

    def get(self, name: str) -> Any:
        """Return an option of the whole call."""
        return self._plain[name]

    def resolve(self, node: str) -> tuple[Target, JobOptions]:
        """Return how `node` is reached and what limits its job.

        Raises:
            NodeNameError: the name, or the address that stands for it, may not be one.
        """
        own = self._nodes.get(node)
        if own is None:
            return _at(self._pattern, node, self._plain), self._limits
        merged = {**self._task, **own, **self._call}
        return _at(_target(merged), node, merged), _limits(merged)

    def local(self) -> tuple[Target, JobOptions]:
        """Return the target and limits of a command on this machine."""
        return Target(transport="local"), self._limits


def _target(options: Mapping[str, Any]) -> Target:
    return Target(
        transport=options["transport"],
        port=options["port"],
        user=options.get("user") or _own_user(),
        identities=options["identity"] if "identity" in options else _paths("identity", DEFAULT_IDENTITIES),
        named_identities="identity" in options,
        known_hosts=options["known_hosts"] if "known_hosts" in options else _paths("known_hosts", DEFAULT_KNOWN_HOSTS),
        named_known_hosts="known_hosts" in options,
        host_key_policy=options["host_key_policy"],
        keep=options["keep"],
        alive_interval=options["alive_interval"],
        kex_algorithms=options["kex_algorithms"],
    )


def _at(pattern: Target, node: str, options: Mapping[str, Any]) -> Target:
    address = str(options.get("address", "%h")).replace("%h", node)
    check_name(address)
    if pattern.transport == "ssh":  # to other ways, and local commands, it is a name and nothing more
        check_address(address, node)
    # Spelled out, since dataclasses.replace costs four times as much, for each of 10,000 nodes.
    return Target(
        pattern.transport,
        address,
        pattern.port,
        pattern.user,
        pattern.identities,
        pattern.named_identities,
        pattern.known_hosts,
        pattern.named_known_hosts,
        pattern.host_key_policy,
        pattern.keep,
        pattern.alive_interval,
        pattern.kex_algorithms,
    )


def _limits(options: Mapping[str, Any]) -> JobOptions:
    return JobOptions(
        connect_timeout=options["connect_timeout"],
        timeout=options["timeout"],
        idle_timeout=options["idle_timeout"],
        deadline=options["deadline"],
        drain_timeout=options["drain_timeout"],
        stop=Stop(options["stop"], options["stop_grace"], options["stop_by"]),
        fresh=options["fresh"],
        retry=options["retry"],
    )
