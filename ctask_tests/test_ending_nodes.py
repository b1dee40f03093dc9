# SPDX-License-Identifier: Apache-2.0
"""Endings on nodes that are not like others: other login shells, sudo and su, no pgrep, half a /proc, no /proc.

Such nodes are servers with mounts of their own: another passwd, another sudoers, another /proc. The machine's own stay
as they are. Runs in the thread of pytest; only root's tests can have such servers.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from ctask.options import Stop
from ctask.result import Ending
from ctask.transports.ssh import ending
from ctask_tests.ending_nodes import LONG, STUBBORN, Running, alive, end, logged_in, needs_mounts
from ctask_tests.fix_sshd import ACCOUNT, Sshd

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ctask_tests.fix_sshd import SshdFactory

KILL = Stop("kill", 0.1)
TERM = Stop("term", 0.1)
#: Login shells by the name of the program; each has an account of its name, with the rights of the tests' account.
SHELLS = {
    "tcsh": "/usr/bin/tcsh",
    "fish": "/usr/bin/fish",
    "zsh": "/usr/bin/zsh",
    "bash": "/bin/bash",
    "busybox": "$FOLDER/ash",
    "slow": "$FOLDER/slow",
    "noisy": "$FOLDER/noisy",
    "stays": "$FOLDER/stays",
}

ACCOUNTS = f"""
mkdir -m 700 "$FOLDER/home"
chown {ACCOUNT} "$FOLDER/home"
ln -s "$(command -v busybox || echo /none)" "$FOLDER/ash"
printf '#!/bin/sh\\n[ ! -e "%s/wait" ] || sleep 0.3\\nexec /bin/sh "$@"\\n' "$FOLDER" >"$FOLDER/slow"
printf '%s\\n' '#!/bin/sh' "[ -e $FOLDER/noise ] || exec /bin/sh \\"\\$@\\"" ". $FOLDER/noise" >"$FOLDER/noisy"
printf '#!/bin/sh\\n/bin/sh "$@"\\nexit\\n' >"$FOLDER/stays"
chmod 755 "$FOLDER/slow" "$FOLDER/noisy" "$FOLDER/stays"
{{
    cat /etc/passwd
    rights=$(id -u {ACCOUNT}):$(id -g {ACCOUNT})
    for account in {" ".join(f"{name}:{path}" for name, path in SHELLS.items())}; do
        echo "{ACCOUNT}-${{account%%:*}}:*:$rights::$FOLDER/home:${{account#*:}}"
    done
}} >"$FOLDER/passwd"
mount --bind "$FOLDER/passwd" /etc/passwd
"""

#: `sudo env` has a terminal of its own where the caller has one (as in Debian's sudoers), `sudo sh` has none.
SUDOERS = f"""
cat >"$FOLDER/sudoers" <<'END'
Defaults env_keep += CTASK_TEST_SSHD
Defaults !use_pty
Defaults!/usr/bin/env use_pty
root ALL = (ALL:ALL) ALL
{ACCOUNT} ALL = (root) NOPASSWD: /usr/bin/env, /usr/bin/sh, /bin/sh
END
chmod 440 "$FOLDER/sudoers"
mount --bind "$FOLDER/sudoers" /etc/sudoers
"""

NO_TOOLS = """
for tool in /usr/bin/pgrep /usr/bin/pkill /usr/bin/ps; do
    [ ! -e $tool ] || mount --bind /dev/null $tool
done
"""

#: Nothing but busybox in the PATH, which has its own sh, grep, sed, sort and sleep.
BUSYBOX = """
mkdir "$FOLDER/bin"
cp "$(command -v busybox)" "$FOLDER/bin"
"$FOLDER/bin/busybox" --install "$FOLDER/bin"
rm -f "$FOLDER/bin/pgrep" "$FOLDER/bin/ps"
[ -L /bin ] || mount --bind "$FOLDER/bin" /bin
mount --bind "$FOLDER/bin" /usr/bin
"""


@pytest.fixture(scope="module")
def node() -> Iterator[Sshd]:
    """A server with the accounts of SHELLS, with sudo, and without the tools of procps."""
    needs_mounts()
    with Sshd(mounts=ACCOUNTS + (SUDOERS if os.path.exists("/etc/sudoers") else "") + NO_TOOLS) as server:
        yield server


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell takes its time, where the machine has other work."""
    monkeypatch.setattr(ending, "FIRST_WORD", LONG)


# --- login shells


@pytest.mark.parametrize("shell", ["tcsh", "fish", "zsh", "bash", "busybox", "stays"])
def test_any_login_shell_will_do(node: Sshd, shell: str) -> None:
    needs_mounts(*[shell] if shell != "stays" else [])
    line = """sh -c 'trap "" TERM; echo $$; exec sleep 60'"""
    with logged_in(node, f"{ACCOUNT}-{shell}") as connection:
        doomed, spared = (Running(connection, line) for _ in range(2))
        assert end(connection, doomed, KILL).state == "gone"
        assert not alive(doomed.pids)
        assert alive(spared.pids)
        assert not connection.retired


#: What a login shell prints around what it runs: the title of a terminal, much, on both streams, all the time.
NOISES = {
    "title": """printf '\\033]0;node\\007'; exec /bin/sh "$@" """,
    "much": """yes 'All your base' | head -c 3000000; printf '> '; exec /bin/sh "$@" """,
    "errors": """yes 'stty: not a tty' | head -c 300000 >&2; printf 'x' >&2; exec /bin/sh "$@" """,
    "after": """/bin/sh "$@"; printf '\\033[H\\033[J'; yes logout | head -c 100000 """,
    "between": """while printf '\\033]0;%s\\007' node && sleep 0.01; do :; done & /bin/sh "$@"; kill $! """,
}


@pytest.mark.parametrize("noise", list(NOISES))
def test_what_a_login_shell_prints_hides_no_word(node: Sshd, noise: str) -> None:
    with logged_in(node, f"{ACCOUNT}-noisy") as connection:
        stubborn, doomed = Running(connection, STUBBORN), Running(connection, STUBBORN)
        file = node.folder / "noise"
        file.write_text(NOISES[noise])
        try:
            assert end(connection, doomed, KILL) == Ending("gone", 1)
            answer = end(connection, stubborn, TERM)
        finally:
            file.unlink()
        assert (answer.state, [process.pid for process in answer.processes]) == ("alive", stubborn.pids)


@pytest.mark.slow
def test_a_login_shell_that_takes_its_time_is_waited_for(node: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "FIRST_WORD", 0.1)
    with logged_in(node, f"{ACCOUNT}-slow") as connection:
        meek, stubborn = Running(connection, "echo $$; exec sleep 60"), Running(connection, STUBBORN)
        flag = node.folder / "wait"
        flag.touch()
        try:
            assert end(connection, stubborn, KILL) == Ending("gone", 1), "by the script, which came late"
            # The server signalled it meanwhile; a second script sees that nothing is left, where no stranger is about.
            answer = end(connection, meek, KILL)
            assert answer in (Ending("gone"), Ending("unknown"))
        finally:
            flag.unlink()
        assert not alive(meek.pids + stubborn.pids)
        assert connection.retired == (answer.state != "gone")


# --- sudo, su: what an account may not signal, and sessions within the session


@pytest.mark.parametrize(
    ("sudo", "pty"), [("sudo sh", False), ("sudo sh", True), ("sudo env sh", True)], ids=["plain", "tty", "use_pty"]
)
def test_what_sudo_runs_ends_where_it_heeds_term(node: Sshd, sudo: str, pty: bool) -> None:
    needs_mounts("sudo")
    with logged_in(node, ACCOUNT) as connection:
        # A child of its own would be told as `alive`: sudo hands TERM to the command only.
        command = Running(connection, f"{sudo} -c 'echo $$; exec sleep 60'", pty=pty)
        assert end(connection, command, Stop("kill", LONG)).state == "gone"
        assert not alive(command.pids)
        assert not connection.retired


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sudo", "pty", "stop"),
    [("sudo sh", False, KILL), ("sudo sh", True, TERM), ("sudo env sh", True, TERM)],
    ids=["plain", "tty", "use_pty"],
)
def test_what_sudo_runs_and_the_account_may_not_signal_is_told(
    node: Sshd, sudo: str, pty: bool, stop: Stop
) -> None:
    needs_mounts("sudo")
    with logged_in(node, ACCOUNT) as connection:
        command = Running(connection, f"{sudo} -c 'trap \"\" TERM HUP; echo $$; exec sleep 60'", pty=pty)
        answer = end(connection, command, stop)
        assert answer.state == "alive"
        assert ("sleep", "S") in {(process.name, process.state) for process in answer.processes}
        assert {process.pid for process in answer.processes} >= alive(command.pids) == set(command.pids)
        assert connection.retired


@pytest.mark.slow
def test_root_ends_what_sudo_runs_behind_a_terminal_of_its_own(node: Sshd) -> None:
    needs_mounts("sudo")
    with logged_in(node, "root") as connection:
        command = Running(connection, "sudo env sh -c 'trap \"\" TERM HUP; echo $$; exec sleep 60'", pty=True)
        answer = end(connection, command, KILL)
        assert answer.state == "gone"
        assert answer.ended == 3, "sudo, its monitor, and the command"
        assert not alive(command.pids)
        says = "trap \"echo TERM; sleep 0.2; exit\" TERM; echo $$; while :; do sleep 0.02; done"
        counts = Running(connection, f"sudo env sh -c '{says}'", pty=True)
        assert end(connection, counts, Stop("kill", LONG)).state == "gone"
        assert counts.sink.stdout.count(b"TERM") == 1, "sudo hands it on"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's sshd lets root in")
def test_root_ends_what_su_runs_in_a_session_of_its_own(sshd: Sshd) -> None:
    with logged_in(sshd, "root") as connection:
        line = "trap \"\" TERM HUP; echo $$; sleep 60 & wait; wait"
        stubborn = Running(connection, f"su {ACCOUNT} -s /bin/sh -c '{line}'")
        answer = end(connection, stubborn, KILL)
        assert answer.state == "gone"
        assert answer.ended == 3
        assert not alive(stubborn.pids)


# --- nodes without


def test_a_node_without_pgrep_and_ps(node: Sshd) -> None:
    with logged_in(node, ACCOUNT) as connection:
        command = Running(connection, f"command -v pgrep ps | grep -c . ; {STUBBORN}", pids=2)
        tools, pid = command.pids
        assert tools == 0
        assert end(connection, command, KILL) == Ending("gone", 1)
        assert not alive([pid])


def test_a_node_with_nothing_but_busybox(sshd_factory: SshdFactory) -> None:
    needs_mounts("busybox")
    server = sshd_factory(mounts=BUSYBOX)
    with logged_in(server, ACCOUNT) as connection:
        spared = Running(connection, STUBBORN)
        command = Running(connection, f"sleep 60 & {STUBBORN}")
        assert end(connection, command, KILL) == Ending("gone", 2)
        assert not alive(command.pids)
        answer = end(connection, spared, TERM)
        assert (answer.state, [process.pid for process in answer.processes]) == ("alive", spared.pids)


@pytest.mark.parametrize("user", [ACCOUNT, "root"])
def test_a_node_without_proc(sshd_factory: SshdFactory, user: str) -> None:
    needs_mounts()
    server = sshd_factory(mounts="mount -t tmpfs none /proc")
    with logged_in(server, user) as connection:
        command = Running(connection, "echo $$; exec sleep 60")
        # Nothing finds it there. sshd signals the commands of accounts, never those of root, and sees no others.
        assert end(connection, command, KILL) == Ending("unknown")
        assert alive(command.pids) == (set(command.pids) if user == "root" else set())


@pytest.mark.slow
def test_a_node_that_shows_nobody_the_processes_of_others(sshd_factory: SshdFactory) -> None:
    needs_mounts("sudo")
    if tuple(map(int, os.uname().release.split(".")[:2])) < (5, 8):
        pytest.skip("before Linux 5.8 hidepid is an option of all mounts of /proc at once")
    server = sshd_factory(mounts=SUDOERS + "mount -t proc -o hidepid=2 none /proc")
    with logged_in(server, ACCOUNT) as connection:
        plain = Running(connection, f"sleep 60 & {STUBBORN}")
        assert end(connection, plain, KILL) == Ending("gone", 2)
        meek = Running(connection, "sudo sh -c 'echo $$; exec sleep 60'; true")
        assert end(connection, meek, Stop("kill", LONG)).state == "gone"
        stubborn = Running(connection, "sudo sh -c 'trap \"\" TERM; echo $$; exec sleep 60'; true")
        assert end(connection, stubborn, TERM).state == "unknown"
        assert alive(stubborn.pids) == set(stubborn.pids)
