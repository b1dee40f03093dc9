# SPDX-License-Identifier: Apache-2.0
"""Endings on dropbear: no command leads a session, so its processes are found by descent, and what is doubtful is told.

Runs in the thread of pytest; only root's tests can have such servers.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest

from ctask.options import Stop
from ctask.result import Ending
from ctask.transports.ssh import ending
from ctask_tests.ending_nodes import KILL, LONG, STUBBORN, TERM, Running, alive, end, logged_in, needs_mounts
from ctask_tests.fix_dropbear import Dropbear, needs_dropbear
from ctask_tests.fix_leaks import wait_until
from ctask_tests.fix_sshd import ACCOUNT
from ctask_tests.ssh_sink import run
from ctask_tests.test_ending_nodes import BUSYBOX, SUDOERS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ctask.transports.ssh.connection import SshConnection


@pytest.fixture(scope="module")
def dropbear() -> Iterator[Dropbear]:
    needs_dropbear()
    with Dropbear() as server:
        yield server


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell takes its time, where the machine has other work."""
    monkeypatch.setattr(ending, "FIRST_WORD", LONG)


@pytest.fixture(params=[ACCOUNT, "root"], ids=["account", "root"])
def connection(dropbear: Dropbear, request: pytest.FixtureRequest) -> Iterator[SshConnection]:
    with logged_in(dropbear, request.param) as made:
        yield made


@pytest.fixture
def plain(dropbear: Dropbear) -> Iterator[SshConnection]:
    with logged_in(dropbear, ACCOUNT) as made:
        yield made


@pytest.mark.parametrize(
    ("line", "pids"),
    [
        ("echo $$; sleep 60; echo never", 1),
        ("sleep 60 & echo $!; sleep 60 & echo $!; echo $$; wait", 3),
        (STUBBORN, 1),
        ("sh -c \"trap '' TERM; echo \\$\\$; exec sleep 60\" & echo $$; wait", 2),
        ("timeout 60 sh -c 'echo $$; exec sleep 50' & echo $!; wait", 2),
        ("echo $$; while :; do sleep 0.02; done", 1),
        ("(sleep 60 & echo $!); echo $$; sleep 60", 2),
        ("(sh -c 'trap \"\" TERM HUP; (sleep 60 & echo $!); echo $$; sleep 60' &); echo $$; sleep 60", 3),
    ],
    ids=["children", "background", "ignores-term", "child-ignores", "timeout", "forks", "orphan", "orphans"],
)
def test_a_command_ends_with_all_that_descends_from_it(connection: SshConnection, line: str, pids: int) -> None:
    command = Running(connection, line, pids=pids)
    answer = end(connection, command)
    assert answer.state == "gone"
    assert answer.ended is not None
    assert answer.ended >= pids
    assert not alive(command.pids)
    command.sink.wait()
    assert not connection.retired
    # dropbear can close a session that has not begun when another process ends.
    wait_until(lambda: not connection.scripts, what="the script is over")
    assert run(connection, b"echo well").stdout == b"well\n"


def test_a_shell_that_is_ended_runs_no_next_command(plain: SshConnection) -> None:
    command = Running(plain, "echo $$; sleep 60; echo one; sleep 60; echo two")
    assert end(plain, command).state == "gone"
    assert command.sink.stdout.split()[1:] == []


def test_survivors_of_a_shell_that_ended_are_named(connection: SshConnection) -> None:
    command = Running(connection, "sh -c \"trap '' TERM; echo \\$\\$; exec sleep 60\" & wait")
    answer = end(connection, command, TERM)
    assert (answer.state, [process.pid for process in answer.processes]) == ("alive", command.pids)
    assert alive(command.pids)
    assert connection.retired


def test_of_equal_commands_those_are_ended_that_are_meant(connection: SshConnection) -> None:
    line = "(sleep 60 & echo $!); sleep 60 & echo $!; echo $$; wait"
    commands = [Running(connection, line, pids=3) for _ in range(4)]
    assert end(connection, commands[1]).state == "gone"
    assert [len(alive(each.pids)) for each in commands] == [3, 0, 3, 3]
    answers = connection.end([commands[each].session for each in (0, 3)], KILL, LONG)
    assert {answer.state for answer in answers.values()} == {"gone"}
    assert [len(alive(each.pids)) for each in commands] == [0, 0, 3, 0]


def test_a_command_with_a_terminal_leads_a_session_and_is_ended_beside_others(connection: SshConnection) -> None:
    spared = Running(connection, STUBBORN)
    typed = Running(connection, "trap '' TERM HUP; echo $$; sleep 60", pty=True)
    both = Running(connection, STUBBORN)
    answers = connection.end([typed.session, both.session], KILL, LONG)
    assert {answer.state for answer in answers.values()} == {"gone"}
    assert alive(spared.pids + typed.pids + both.pids) == set(spared.pids)


def test_what_left_on_purpose_stays(plain: SshConnection) -> None:
    pipe = "f=$(mktemp -u) && mkfifo $f"
    line = f"{pipe}; setsid sh -c 'echo $$ >$0; exec sleep 60' $f & read p <$f; rm $f; echo $p; echo $$; sleep 60"
    command = Running(plain, line, pids=2)
    daemon, shell = command.pids
    assert end(plain, command).state == "gone"
    assert alive([daemon, shell]) == {daemon}


def test_what_an_earlier_command_left_on_purpose_stays_and_is_no_part_of_a_later_one(plain: SshConnection) -> None:
    left = run(plain, b"sleep 60 >/dev/null 2>&1 </dev/null & echo $!; sleep 0.05")
    command = Running(plain, "echo $$; sleep 60")
    assert end(plain, command).state == "gone"
    assert alive([int(left.stdout)])


def test_of_an_orphan_without_a_mark_nothing_is_said(connection: SshConnection) -> None:
    line = "(trap '' TERM; sleep 60 >/dev/null 2>&1 </dev/null & echo $!); echo $$; sleep 60"
    command = Running(connection, line, pids=2)
    orphan, shell = command.pids
    answer = end(connection, command, Stop("kill", 0.2))
    assert answer.state == "unknown"
    assert alive([orphan, shell]) == {orphan}
    assert connection.retired


def test_an_orphan_of_a_command_that_is_not_ended_is_left_alone(plain: SshConnection) -> None:
    meant = Running(plain, "echo $$; sleep 60")
    other = Running(plain, "(sleep 60 & echo $!); echo $$; sleep 60", pids=2)
    end(plain, meant)
    assert not alive(meant.pids)
    assert alive(other.pids) == set(other.pids)


def test_a_command_that_ended_by_itself_is_gone_and_its_background_stays(plain: SshConnection) -> None:
    command = Running(plain, "sleep 60 >/dev/null 2>&1 </dev/null & echo $!; sleep 0.05; exit 4")
    command.sink.wait()
    assert end(plain, command) == Ending("gone")
    assert alive(command.pids)


def test_by_signal_only_the_first_process_is_reached_and_nothing_is_promised(dropbear: Dropbear) -> None:
    with logged_in(dropbear, ACCOUNT) as connection:
        command = Running(connection, "sleep 60 & echo $!; echo $$; wait", pids=2)
        assert end(connection, command, Stop("kill", LONG, by="signal")) == Ending("unknown")
        assert connection.retired


def test_the_kill_comes_without_the_connection(connection: SshConnection) -> None:
    command = Running(connection, "(trap '' TERM; sleep 60 & echo $!); echo $$; trap '' TERM; sleep 60; :", pids=2)
    began = time.monotonic()
    answer = end(connection, command, Stop("kill", 2.0), within=1.0)
    assert answer.state == "alive"
    connection.close()
    assert alive(command.pids)
    wait_until(lambda: not alive(command.pids), what="KILL after the grace")
    assert time.monotonic() - began >= 2.0


def test_two_endings_at_once_take_what_is_theirs(connection: SshConnection) -> None:
    line = "(trap '' TERM; sleep 60 & echo $!); sleep 60 & echo $!; echo $$; wait"
    commands = [Running(connection, line, pids=3) for _ in range(3)]
    answers: dict[int, Ending] = {}
    threads = [
        threading.Thread(target=lambda each=each: answers.update({each: end(connection, commands[each])}))
        for each in (0, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[each].state for each in (0, 2)] == ["gone", "gone"]
    assert [len(alive(each.pids)) for each in commands] == [0, 3, 0]


def test_six_commands_are_ended_by_one_script(connection: SshConnection) -> None:
    commands = [Running(connection, STUBBORN) for _ in range(6)]
    answers = connection.end([each.session for each in commands], KILL, LONG)
    assert {(answer.state, answer.ended) for answer in answers.values()} == {("gone", 1)}
    assert not alive(pid for each in commands for pid in each.pids)


def test_a_command_that_goes_meanwhile_mixes_nothing_up(plain: SshConnection) -> None:
    # None begins meanwhile: this dropbear closes a session that has not begun when another process ends.
    first = Running(plain, STUBBORN)
    short = Running(plain, "echo $$; read line")
    second = Running(plain, "(sleep 60 & echo $!); echo $$; sleep 60", pids=2)
    short.session.close_stdin()
    assert end(plain, second).state == "gone"
    assert alive(first.pids) == set(first.pids)
    assert not alive(second.pids)
    assert end(plain, first).state == "gone"
    short.sink.wait()


def test_behind_a_login_shell_that_stays() -> None:
    needs_dropbear()
    with Dropbear(login='/bin/sh "$@"; exit') as server, logged_in(server, ACCOUNT) as connection:
        command = Running(connection, "(sleep 60 & echo $!); echo $$; sleep 60", pids=2)
        assert end(connection, command) == Ending("gone", 4)
        assert not alive(command.pids)


def test_with_nothing_but_busybox() -> None:
    needs_mounts("busybox")
    needs_dropbear()
    with Dropbear(mounts=BUSYBOX) as server, logged_in(server, ACCOUNT) as connection:
        spared = Running(connection, STUBBORN)
        command = Running(connection, "(sleep 60 & echo $!); sleep 60 & echo $!; echo $$; wait", pids=3)
        assert end(connection, command) == Ending("gone", 3)
        assert not alive(command.pids)
        answer = end(connection, spared, TERM)
        assert (answer.state, [process.pid for process in answer.processes]) == ("alive", spared.pids)


@pytest.mark.parametrize("program", ["sudo env", "sudo"])
def test_what_sudo_runs_in_a_session_of_its_own_is_a_part_of_the_command(program: str) -> None:
    needs_mounts("sudo")
    needs_dropbear()
    with Dropbear(mounts=SUDOERS) as server, logged_in(server, "root") as connection:
        line = f"{program} sh -c 'trap \"\" TERM HUP; echo $$; sleep 60 & echo $!; wait; wait'; true"
        command = Running(connection, line, pids=2)
        assert end(connection, command).state == "gone"
        assert not alive(command.pids)


@pytest.mark.slow
def test_where_processes_of_others_are_hidden_nothing_is_said() -> None:
    needs_dropbear()
    with Dropbear(mounts="mount -t proc -o hidepid=2 none /proc") as server, logged_in(server, ACCOUNT) as connection:
        command = Running(connection, "(sleep 60 & echo $!); echo $$; sleep 60", pids=2)
        assert end(connection, command, Stop("kill", 0.2)).state == "unknown"
        assert not alive(command.pids)
