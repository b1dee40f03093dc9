# SPDX-License-Identifier: Apache-2.0
"""A real sshd (OpenSSH) on loopback: one process that is 254 nodes, 127.0.1.1 to 127.0.1.254.

Runs in the thread of the test that uses it; nothing here is shared between threads but the files that sshd
writes. Every server has its own port, keys and folder, so that parallel workers of pytest-xdist do not meet.
"""

from __future__ import annotations

import base64
import functools
import grp
import hashlib
import itertools
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self, TypedDict

import pytest

from ctask_tests.fix_leaks import process_table, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ctask_tests.fix_leaks import Process

__all__ = [
    "ACCOUNT",
    "Sshd",
    "SshdFactory",
    "SshdOptions",
    "find_sshd",
    "fingerprint",
    "known_hosts_line",
    "make_key",
    "no_process_left",
    "tied_to_us",
    "write_known_hosts",
]

#: The account that commands run in where the tests run as root: a plain one, with /bin/sh.
ACCOUNT = "ctask-node"

#: How many nodes the server's known_hosts file names.
NODES = 254

#: The variable by which the processes of one server's commands are found again, whoever became their parent.
MARK = "CTASK_TEST_SSHD"

#: A variant's options stand in place of those with the same keyword: of most, but not of all, sshd takes the first.
CONFIG = """\
AddressFamily inet
ListenAddress 0.0.0.0
Port {port}
PidFile none
AuthorizedKeysFile {folder}/authorized_keys
UsePAM no
StrictModes no
UseDNS no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitUserRC no
PrintMotd no
PrintLastLog no
MaxStartups 1000:30:2000
MaxSessions 100
LogLevel VERBOSE
Subsystem sftp internal-sftp
SetEnv {mark}
"""


class SshdOptions(TypedDict):
    """What a test hands to ctask to reach the server's nodes."""

    user: str
    port: int
    identity: str
    known_hosts: str


class SshdFactory(Protocol):
    """Start one more server, for this test only; its arguments are those of `Sshd`."""

    def __call__(
        self, *options: str, host_keys: Sequence[str] = ("ed25519",), user_keys: int = 1, mounts: str = ""
    ) -> Sshd: ...


class Sshd:
    """One sshd, with keys of its own in a folder of its own.

    `options` are lines of sshd_config ("MaxSessions 1") that stand before the harness's own; `host_keys` the
    types of its host keys; `user_keys` how many login keys it accepts; `mounts` lines of sh that change what the server
    and its commands see of this machine's files, in a namespace of their own (root only, see
    `ending_nodes.needs_mounts`; `$FOLDER` is the server's folder). It dies with the thread that began it.

    Attributes: `port`, `user`; `identity` and `identities` (paths of private keys that are accepted);
    `known_hosts` (path of a file that names all nodes with all host keys); `host_key_lines` ("type base64");
    `folder` (what a test puts there goes away with the server).
    """

    def __init__(
        self, *options: str, host_keys: Sequence[str] = ("ed25519",), user_keys: int = 1, mounts: str = ""
    ) -> None:
        self._options = options
        self._mounts = mounts
        self._key_types = host_keys
        self._key_count = user_keys
        self._process: subprocess.Popen[bytes] | None = None
        self._orphans: list[int] = []  # sessions whose master was killed
        self._mark = f"{MARK}={uuid.uuid4().hex}"
        self.port = 0
        self.user = ""
        self.folder = Path()
        self.identities: list[str] = []
        self.host_key_lines: list[str] = []

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def identity(self) -> str:
        """The first of the private keys that the server accepts."""
        return self.identities[0]

    @property
    def known_hosts(self) -> str:
        """A known_hosts file with a line for each node and host key; a test must not change it."""
        return str(self.folder / "known_hosts")

    @staticmethod
    def address(n: int) -> str:
        """The n-th node, from 1 to 254."""
        return f"127.0.1.{n}"

    def nodes(self, n: int, first: int = 1) -> list[str]:
        """The addresses of `n` nodes, from the `first` on."""
        return [self.address(i) for i in range(first, first + n)]

    def options(self, *, via: tuple[str, int] | None = None) -> SshdOptions:
        """The options by which ctask reaches the nodes, or the endpoint of a proxy before one of them."""
        if via is None:
            port, known_hosts = self.port, self.known_hosts
        else:
            port, known_hosts = via[1], self.known_hosts_for(via)
        return SshdOptions(user=self.user, port=port, identity=self.identity, known_hosts=known_hosts)

    def known_hosts_for(self, *endpoints: tuple[str, int]) -> str:
        """Write one more known_hosts file: all nodes, and these endpoints (of proxies) with the same keys."""
        number = len(list(self.folder.glob("known_hosts.*")))
        path = self.folder / f"known_hosts.{number}"
        nodes = [(node, self.port) for node in self.nodes(NODES)]
        return write_known_hosts(path, [*nodes, *endpoints], self.host_key_lines)

    def new_key(self, name: str, *, passphrase: str = "", kind: str = "ed25519") -> str:
        """Make a key that the server does not accept (see `authorize`); return its private half's path.

        One of its own each time, also where tests that share the server choose the same name.
        """
        names = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
        path = next(path for path in map(self.folder.joinpath, names) if not path.exists())
        return make_key(path, kind=kind, passphrase=passphrase)

    def authorize(self, identity: str, *, options: str = "") -> None:
        """Accept one more key, with the options of an authorized_keys line ('command="…"')."""
        with (self.folder / "authorized_keys").open("a") as keys:
            keys.write(f"{options} {public_key(identity)}\n".lstrip())

    def start(self) -> None:
        """Make the keys and start; return when the server has answered and nobody is connected to it."""
        program = find_sshd()
        try:
            self._start(program)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the server, its sessions, and the commands that it started and that still run."""
        left = [*self._descendants(), *self._orphans, *self.processes()]
        self._end_master()
        left += self.processes()  # what was being started meanwhile
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.folder.name:
            shutil.rmtree(self.folder, ignore_errors=True)

    def kill_master(self) -> None:
        """Kill the process that listens: sessions live on, new connections are refused."""
        assert self._process is not None
        self._orphans = self._descendants()
        self._process.kill()
        self._process.wait()

    def restart(self) -> None:
        """End the server and its sessions; return when it answers again, on the same port with the same keys."""
        self._orphans = self._descendants()
        self._end_master()
        for pid in self._orphans:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._launch(find_sshd(), [str(self.folder / f"host_{i}") for i in range(len(self._key_types))])
        assert self._answers(), self.log()
        self.wait_idle()

    def kill_session(self, address: str | None = None) -> int:
        """Kill (-9) the session processes of one node, or of all, under their commands; return how many."""
        pids = self.sessions(address)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(pids)

    def log(self, since: int = 0) -> str:
        """What the server has logged, from a size of the log (`len(log())`) on."""
        path = self.folder / "log"
        return path.read_text(errors="replace")[since:] if path.exists() else ""

    def wait_log(self, pattern: str, *, since: int = 0, timeout: float = 5.0) -> re.Match[str]:
        """Return the first match of a regular expression in the log, as soon as it is there."""
        found: list[re.Match[str]] = []

        def look() -> bool:
            found.extend(re.finditer(pattern, self.log(since)))
            return bool(found)

        wait_until(look, timeout=timeout, what=f"{pattern!r} in the log")
        return found[0]

    def connections(self) -> list[int]:
        """The pids of the server's own children: one per connection, logged in or not yet."""
        pid = self._process.pid if self._process is not None else 0
        return [child.pid for child in process_table().values() if child.parent == pid]

    def sessions(self, address: str | None = None) -> list[int]:
        """The pids of the processes in which logged-in connections live, of one node or of all.

        Such a process is the parent of its connection's commands (their `$PPID`).
        """
        table = process_table()
        master = self._process.pid if self._process is not None else 0
        found: list[int] = []
        queue = [master]
        while queue:
            parent = queue.pop()
            for child in table.values():
                if child.parent == parent and child.name.startswith("sshd"):
                    (found if _is_session(child) else queue).append(child.pid)
        return [pid for pid in sorted(found) if address is None or address in _addresses(pid, self.port)]

    def processes(self) -> dict[int, str]:
        """The processes that the server's commands consist of, by pid, wherever they were reparented to."""
        mark = self._mark.encode()
        found: dict[int, str] = {}
        for process in process_table().values():
            with suppress(OSError):  # ended meanwhile, or another user's
                if mark in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0"):
                    found[process.pid] = process.title
        return found

    def wait_idle(self, *, timeout: float = 5.0) -> None:
        """Wait until nobody is connected any more."""
        wait_until(lambda: not self.connections(), timeout=timeout, what="sshd's connections are gone")

    def _start(self, program: str) -> None:
        self.user = _account()
        self.folder = Path(tempfile.mkdtemp(prefix="ctask-sshd-"))
        self.folder.chmod(0o755)  # sshd reads authorized_keys as the account
        paths = [make_key(self.folder / f"host_{i}", kind=kind) for i, kind in enumerate(self._key_types)]
        self.host_key_lines = [public_key(path) for path in paths]
        self.identities = [self.new_key(f"id_{i}") for i in range(self._key_count)]
        for identity in self.identities:
            self.authorize(identity)
        for _ in range(5):  # a port that was free may be taken by the time that sshd binds it
            self.port = _free_port()
            self._launch(program, paths)
            if self._answers():
                break
            self._end_master()
        else:
            raise RuntimeError(f"sshd does not start:\n{self.log()}")
        write_known_hosts(
            Path(self.known_hosts), [(node, self.port) for node in self.nodes(NODES)], self.host_key_lines
        )
        # A probe that is still there would count in MaxStartups.
        self.wait_idle()

    def _launch(self, program: str, host_keys: Iterable[str]) -> None:
        lines = [*self._options, *(f"HostKey {path}" for path in host_keys)]
        given = {option.split()[0].lower() for option in self._options}
        standard = CONFIG.format(port=self.port, folder=self.folder, mark=self._mark).splitlines()
        lines += [line for line in standard if line.split()[0].lower() not in given]
        if _knows_penalties(program):
            lines.append("PerSourcePenalties no")
        config = self.folder / "sshd_config"
        config.write_text("\n".join(lines) + "\n")
        command = [program, "-D", "-e", "-f", str(config)]
        if self._mounts:
            lines = ["set -e", "FOLDER=$1", "shift", self._mounts, 'exec "$@"']
            command = ["unshare", "--mount", "--", "sh", "-c", "\n".join(lines), "sh", str(self.folder), *command]
        command = [*tied_to_us(), *command]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,  # Ctrl-C in the terminal is pytest's
            )

    def _answers(self) -> bool:
        """Wait for the banner; False when the server has ended instead."""
        assert self._process is not None
        deadline = time.monotonic() + 10
        while self._process.poll() is None and time.monotonic() < deadline:
            with suppress(OSError), socket.create_connection((self.address(1), self.port), 5) as probe:
                if probe.recv(4) == b"SSH-":
                    return True
            time.sleep(0.01)
        return False

    def _end_master(self) -> None:
        process = self._process
        if process is None:
            return
        process.terminate()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _descendants(self) -> list[int]:
        if self._process is None:
            return []
        table = process_table()
        family = {self._process.pid}
        while grown := {pid for pid, process in table.items() if process.parent in family} - family:
            family |= grown
        return sorted(family - {self._process.pid})


def find_sshd() -> str:
    """Return sshd's absolute path (it starts itself by it); without one, skip the test, or fail it in CI."""
    places = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin", "/sbin"])
    program = shutil.which("sshd", path=places)
    if program is None:
        text = "no sshd: install OpenSSH's server (Debian: apt install openssh-server)"
        if os.environ.get("CI"):
            pytest.fail(text)
        pytest.skip(text)
    return program


@functools.cache
def tied_to_us() -> tuple[str, ...]:
    """Return what stands before a command that is to die with this process; nothing where that cannot be had.

    A wrapper and not preexec_fn, which is not safe (and warned of) beside threads.
    """
    wrapper = ("setpriv", "--pdeathsig", "KILL", "--")
    with suppress(OSError):
        if subprocess.run([*wrapper, "true"], check=False, capture_output=True).returncode == 0:
            return wrapper
    return ()  # util-linux before 2.33, or busybox


def make_key(path: Path, *, kind: str = "ed25519", passphrase: str = "") -> str:
    """Make a key pair at `path` and `path`.pub; return the path of its private half."""
    command = ["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-C", path.name, "-f", str(path)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)
    return str(path)


def public_key(identity: str) -> str:
    """The public half of a private key's path, as "type base64"."""
    return " ".join(Path(f"{identity}.pub").read_text().split()[:2])


def fingerprint(key_line: str) -> str:
    """The fingerprint of "type base64", as OpenSSH prints it: "SHA256:…"."""
    digest = hashlib.sha256(base64.b64decode(key_line.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def known_hosts_line(address: str, port: int, key_line: str) -> str:
    """One line of a known_hosts file, without its newline."""
    return f"{address if port == 22 else f'[{address}]:{port}'} {key_line}"


def write_known_hosts(path: Path, endpoints: Iterable[tuple[str, int]], key_lines: Iterable[str]) -> str:
    """Write a known_hosts file in which each endpoint has each key; return its path."""
    keys = list(key_lines)
    path.write_text("".join(known_hosts_line(*end, key) + "\n" for end in endpoints for key in keys))
    return str(path)


@pytest.fixture(scope="session")
def sshd() -> Iterator[Sshd]:
    """The server of this worker: shared by its tests, which leave it as they found it."""
    with Sshd() as server:
        yield server


@pytest.fixture
def nothing_runs_on(request: pytest.FixtureRequest) -> Iterator[None]:
    """End what a test left on the shared server, if it uses it: a command outlives a connection that is given up."""
    with ExitStack() as stack:
        if "sshd" in request.fixturenames:
            stack.enter_context(no_process_left(request.getfixturevalue("sshd")))
        yield


@contextmanager
def no_process_left(server: Sshd) -> Iterator[None]:
    """End what the block lets live on a server: other tests count what runs there."""
    yield
    for pid in server.processes():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not server.processes(), what="no process of the server's commands")


@pytest.fixture
def terminals() -> None:
    """Skip the test where this account's sshd can give no terminal."""
    if not _gives_terminals():
        pytest.skip("sshd gives no terminal: it is not root's, and /dev/pts is mounted without gid=")


@pytest.fixture
def sshd_factory() -> Iterator[SshdFactory]:
    """Start servers with options of their own, stopped when the test ends."""
    servers: list[Sshd] = []

    def start(
        *options: str, host_keys: Sequence[str] = ("ed25519",), user_keys: int = 1, mounts: str = ""
    ) -> Sshd:
        servers.append(Sshd(*options, host_keys=host_keys, user_keys=user_keys, mounts=mounts))
        servers[-1].start()
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def _account() -> str:
    """Return the account that commands run in; as root, make it and sshd's folder where they are missing."""
    if os.geteuid() != 0:
        return pwd.getpwuid(os.geteuid()).pw_name
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # on Debian only sshd's service makes it
    for _ in range(50):  # another worker may be making it, under the lock of the password file
        with suppress(KeyError):
            return pwd.getpwnam(ACCOUNT).pw_name
        # "*" is no password and not locked: without PAM, sshd refuses accounts that are locked ("!").
        command = ["useradd", "--system", "--create-home", "--shell", "/bin/sh", "--password", "*", ACCOUNT]
        subprocess.run(command, check=False, capture_output=True)
        time.sleep(0.05)
    raise RuntimeError(f"no account {ACCOUNT!r}, and useradd cannot make it")


@functools.cache
def _gives_terminals() -> bool:
    """Whether sshd can have a terminal of the group that it asks for; where it cannot, it ends the connection."""
    if os.geteuid() == 0:
        return True
    with suppress(KeyError):
        group = grp.getgrnam("tty").gr_gid
        leader, follower = os.openpty()
        made = os.fstat(follower).st_gid
        os.close(leader)
        os.close(follower)
        return group in {made, *os.getgroups()}
    return True


@functools.cache
def _knows_penalties(program: str) -> bool:
    """Whether this sshd has PerSourcePenalties (9.8 and newer), by asking it: older ones refuse the word."""
    command = [program, "-t", "-f", "/dev/null", "-o", "PerSourcePenalties=no"]
    answer = subprocess.run(command, check=False, capture_output=True, stdin=subprocess.DEVNULL)
    return b"Bad configuration option" not in answer.stderr


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("0.0.0.0", 0))
        port: int = probe.getsockname()[1]
        return port


def _is_session(process: Process) -> bool:
    # "sshd: user [priv]", "[net]" and "[accepted]" watch over the others, or have not logged in.
    title = process.title
    return title.startswith("sshd") and ": " in title and not title.endswith("]")


def _addresses(pid: int, port: int) -> set[str]:
    """The local addresses of a process's TCP connections on `port`."""
    inodes = set()
    with suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                inodes.add(entry.readlink().name)  # "socket:[12345]"
    found = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        raw, _, local_port = fields[1].partition(":")
        if int(local_port, 16) == port and f"socket:[{fields[9]}]" in inodes:
            found.add(socket.inet_ntoa(int(raw, 16).to_bytes(4, "little")))
    return found
