# SPDX-License-Identifier: Apache-2.0
"""The ending of remote sessions: what dies on the node, what does not, and what is said of it.

Runs in the thread of pytest and in one more for each ending that goes on beside the test. What lives is looked up in
the process table, since all nodes are this machine.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from ctask.options import Command, Stop
from ctask.result import Ending, RemoteProcess
from ctask.transports.ssh import ending
from ctask.transports.ssh.mapping import says_forced_command
from ctask_tests.ending_nodes import KILL, LONG, STUBBORN, TERM, Running, alive, end, logged_in
from ctask_tests.fix_hostile import Await, Out, Script
from ctask_tests.fix_leaks import wait_until
from ctask_tests.fix_sshd import no_process_left
from ctask_tests.real_nodes import takes
from ctask_tests.ssh_sink import RecordingSink, connected, run, started, target_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ctask.transports.ssh.channel import SshSession
    from ctask.transports.ssh.connection import SshConnection
    from ctask_tests.fix_hostile import HostileFactory
    from ctask_tests.fix_sshd import Sshd, SshdFactory


#: What a node says of a process that cannot be killed.
STUCK = RemoteProcess(7, "df", "D", "x")


class Beside(threading.Thread):
    """An ending that goes on beside the test."""

    def __init__(self, connection: SshConnection, session: SshSession, stop: Stop, within: float) -> None:
        super().__init__(name="ending")
        self._call = (connection, session, stop, within)
        self.answer: Ending | None = None
        self.start()

    def run(self) -> None:
        connection, session, stop, within = self._call
        self.answer = connection.end([session], stop, within)[session]


@pytest.fixture(params=["account", "root"])
def connection(
    request: pytest.FixtureRequest, sshd: Sshd, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SshConnection]:
    """A connection, as an ordinary account and as root."""
    user = "root" if request.param == "root" else sshd.user
    if user == "root" and os.geteuid() != 0:
        pytest.skip("only root's sshd lets root in")
    # What people have in their shell's start-up files can take a second, where the machine has other work.
    monkeypatch.setattr(ending, "FIRST_WORD", LONG)
    with logged_in(sshd, user) as made:
        yield made


@pytest.fixture
def plain(sshd: Sshd, monkeypatch: pytest.MonkeyPatch) -> Iterator[SshConnection]:
    """A connection as an ordinary account, where root's is no other case."""
    monkeypatch.setattr(ending, "FIRST_WORD", LONG)
    with logged_in(sshd, sshd.user) as made:
        yield made


@contextlib.contextmanager
def takes_with_shell(connection: SshConnection, least: float) -> Iterator[None]:
    """Hold the block to its time; as root only never early, for its shell's start-up files are this machine's own."""
    began = time.monotonic()
    with takes(least) if connection.target.user != "root" else contextlib.nullcontext():
        yield
    assert time.monotonic() - began >= least


def is_well(connection: SshConnection) -> bool:
    """Whether the connection takes new jobs and carries them."""
    return not connection.retired and run(connection, b"echo well").stdout == b"well\n"


# --- whole sessions, by the script


@pytest.mark.parametrize(
    ("line", "pids"),
    [
        ("sleep 60 & echo $!; sleep 60 & echo $!; echo $$; wait", 3),
        (STUBBORN, 1),
        ("sh -c \"trap '' TERM; echo \\$\\$; exec sleep 60\" & echo $$; wait", 2),
        ("timeout 60 sh -c 'echo $$; exec sleep 50' & echo $!; wait", 2),
        ("echo $$; while :; do sleep 0.02; done", 1),
    ],
    ids=["children", "ignores-term", "child-ignores-term", "timeout", "forks"],
)
def test_ending_takes_the_whole_session(connection: SshConnection, line: str, pids: int) -> None:
    command = Running(connection, line, pids=pids)
    answer = end(connection, command)
    assert answer.state == "gone"
    assert answer.ended is not None
    assert answer.ended >= pids
    assert not alive(command.pids)
    command.sink.wait()
    assert is_well(connection)


@pytest.mark.usefixtures("terminals")
def test_ending_of_a_command_with_a_terminal(connection: SshConnection) -> None:
    command = Running(connection, "trap '' TERM HUP; echo $$; sleep 60", pty=True)
    assert end(connection, command).state == "gone"
    assert not alive(command.pids)
    assert is_well(connection)


def test_what_a_command_says_when_it_is_told_to_end_comes_before_the_answer(plain: SshConnection) -> None:
    command = Running(plain, "trap 'echo bye; exit 3' TERM; echo $$; while :; do sleep 0.02; done")
    answer = end(plain, command, Stop("kill", LONG))
    assert answer.state == "gone"
    assert command.sink.stdout.endswith(b"\nbye\n")


def test_the_last_output_may_come_after_the_word_that_the_command_is_gone(
    plain: SshConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ending, "_LAST_OUTPUT", LONG)
    command = Running(plain, "trap 'sleep 0.1; echo last; exit' USR1; echo $$; while :; do sleep 0.02; done")
    early = f'echo "$1 ending"; echo "$1 told 1 1"; echo "$1 gone 1"; kill -s USR1 {command.pids[0]}'
    monkeypatch.setattr(ending, "_script", f"{early}\n".encode)
    told: list[tuple[bytes, Ending]] = []
    plain.end([command.session], KILL, LONG, lambda session, end: told.append((command.sink.stdout[-5:], end)))
    assert told == [(b"last\n", Ending("gone", 1))]


def test_the_end_of_a_command_is_not_that_of_its_children(
    plain: SshConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = Running(plain, "sh -c \"trap '' TERM; echo \\$\\$; exec sleep 60\" & wait")
    first = ending._Ender._first_word

    def late(ender: ending._Ender, script: ending._Script) -> bytes | None:
        word = first(ender, script)
        wait_until(lambda: command.session._exited, what="the end of the command, by the script's TERM")
        return word

    monkeypatch.setattr(ending._Ender, "_first_word", late)
    answer = end(plain, command, Stop("term", 0.1))
    assert (answer.state, [process.pid for process in answer.processes]) == ("alive", command.pids)


def test_what_is_still_there_is_told_before_the_last_word(plain: SshConnection) -> None:
    command = Running(plain, STUBBORN)
    told: list[Ending] = []
    plain.end([command.session], KILL, LONG, lambda session, end: told.append(end))
    assert [each.state for each in told] == ["alive", "gone"]
    assert [process.pid for process in told[0].processes] == command.pids


def test_a_process_that_left_the_session_stays(plain: SshConnection) -> None:
    command = Running(plain, "setsid sh -c 'echo $$; exec sleep 60' & wait; echo $$; sleep 60", pids=1)
    assert end(plain, command).state == "gone"
    assert alive(command.pids) == set(command.pids)


def test_of_two_equal_commands_one_is_ended(connection: SshConnection) -> None:
    line = "echo $$; sleep 60; echo ended"
    commands = [Running(connection, line) for _ in range(3)]
    assert end(connection, commands[1]).state == "gone"
    assert [bool(alive(each.pids)) for each in commands] == [True, False, True]
    assert not commands[0].sink.reached("ended")
    answers = connection.end([each.session for each in commands], KILL, LONG)
    assert {answer.state for answer in answers.values()} == {"gone"}


def test_what_an_earlier_command_left_on_purpose_stays(plain: SshConnection) -> None:
    left = run(plain, b"sleep 60 >/dev/null 2>&1 </dev/null & echo $!")
    command = Running(plain, "echo $$; sleep 60")
    assert end(plain, command).state == "gone"
    assert alive([int(left.stdout)])


def test_a_command_that_ended_by_itself_is_gone_and_its_background_stays(connection: SshConnection) -> None:
    ended = RecordingSink()
    session = started(connection, Command(line=b"sleep 60 & echo $!; exit 4"), ended)
    wait_until(lambda: ended.status == 4, what="the status")
    running = Running(connection, "echo $$; sleep 60")
    never = connection.prepare(Command(line=b"echo never"), RecordingSink())
    answers = connection.end([session, running.session, never], KILL, LONG)
    assert answers[session] == Ending("gone")
    assert answers[running.session].state == "gone"
    assert answers[never] == Ending("gone")
    assert alive([int(ended.stdout)])
    assert not alive(running.pids)
    assert is_well(connection)


def test_six_sessions_are_ended_by_one_script(connection: SshConnection) -> None:
    commands = [Running(connection, STUBBORN) for _ in range(6)]
    sent = next(connection.link.orders)
    with takes_with_shell(connection, KILL.grace):
        answers = connection.end([each.session for each in commands], KILL, LONG)
    assert {(answer.state, answer.ended) for answer in answers.values()} == {("gone", 1)}
    assert not alive(pid for each in commands for pid in each.pids)
    assert next(connection.link.orders) == sent + 2, "one request for a script"


def test_sessions_end_and_begin_while_one_is_ended(plain: SshConnection) -> None:
    for turn in range(5):
        short = Running(plain, "echo $$; read line", pids=1)
        target = Running(plain, "echo $$; sleep 60")
        other = Running(plain, "echo $$; sleep 60")
        beside = Beside(plain, target.session, KILL, LONG)
        if turn % 2:
            short.session.close_stdin()
        new = Running(plain, "echo $$; sleep 60")
        beside.join()
        assert beside.answer is not None
        assert beside.answer.state == "gone"
        assert not alive(target.pids)
        assert alive(other.pids + new.pids) == {*other.pids, *new.pids}
        plain.end([short.session, other.session, new.session], KILL, LONG)
    assert is_well(plain)


# --- policies and promises


def test_term_leaves_what_ignores_it_and_says_what_it_saw(connection: SshConnection) -> None:
    well = Running(connection, "echo $$; sleep 1; echo done")
    command = Running(connection, STUBBORN)
    with takes_with_shell(connection, TERM.grace):
        answer = end(connection, command, TERM)
    assert (answer.state, answer.ended) == ("alive", 1)
    (process,) = answer.processes
    assert (process.pid, process.name, process.state) == (command.pids[0], "sleep", "S")
    assert alive(command.pids)
    assert connection.retired
    assert well.sink.wait().stdout.endswith(b"done\n")


def test_leave_sends_nothing_to_the_processes(plain: SshConnection) -> None:
    command = Running(plain, "echo $$; sleep 60")
    sent = next(plain.link.orders)
    assert end(plain, command, Stop("leave")) == Ending("left")
    assert plain.retired
    assert next(plain.link.orders) == sent + 1, "no script"
    assert alive(command.pids)


def test_an_answer_before_the_grace_is_what_was_seen_and_the_kill_comes_without_the_connection(
    plain: SshConnection,
) -> None:
    command = Running(plain, STUBBORN)
    began = time.monotonic()
    with takes(1.0):
        answer = end(plain, command, Stop("kill", 1.5), within=1.0)
    assert answer.state == "alive"
    assert [process.pid for process in answer.processes] == command.pids
    assert plain.retired
    plain.close()
    assert alive(command.pids)
    wait_until(lambda: not alive(command.pids), what="KILL after the grace")
    assert time.monotonic() - began >= 1.5


def test_a_connection_that_is_cut_right_after_the_first_word_ends_its_command_all_the_same(
    plain: SshConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = ending._Words.flush

    def cut(words: ending._Words) -> None:
        if b"ending" in words._tail:
            plain.close()
        heard(words)

    monkeypatch.setattr(ending._Words, "flush", cut)
    command = Running(plain, STUBBORN)
    began = time.monotonic()
    assert end(plain, command, Stop("kill", 1.5)).state == "unknown"
    assert time.monotonic() - began < 1.5
    assert alive(command.pids)
    wait_until(lambda: not alive(command.pids), what="KILL after the grace")
    assert time.monotonic() - began >= 1.5


def test_a_connection_that_dies_while_it_ends_a_command_is_unknown_at_once(sshd: Sshd) -> None:
    address = sshd.address(3)
    with connected(target_for(sshd.options(), address)) as connection, no_process_left(sshd):
        command = Running(connection, "trap 'echo told' TERM; echo $$; while :; do sleep 0.02; done")
        beside = Beside(connection, command.session, Stop("kill", 30.0), 40.0)
        wait_until(lambda: b"told" in command.sink.stdout, what="TERM")
        sshd.kill_session(address)
        with takes(0.0):
            beside.join()
        assert beside.answer is not None
        assert (beside.answer.state, beside.answer.processes) == ("unknown", ())


def test_a_third_script_is_not_asked_for(connection: SshConnection) -> None:
    stop = Stop("kill", 1.5)
    first, second, third = [Running(connection, STUBBORN) for _ in range(3)]
    scripts = [Beside(connection, each.session, stop, LONG) for each in (first, second)]
    wait_until(lambda: connection.scripts == 2, what="two scripts")
    answer = end(connection, third, Stop("kill", 0.1))
    root = connection.target.user == "root"
    # sshd signals nothing of root's. Of others a script sees later that nothing is left, where no stranger is about.
    assert answer in ([Ending("unknown")] if root else [Ending("gone"), Ending("unknown")])
    assert root or not alive(third.pids)
    for script in scripts:
        script.join()
        assert script.answer is not None
        assert script.answer.state == "gone"
    assert not alive(first.pids + second.pids)
    wait_until(lambda: not connection.scripts, what="the scripts are over")
    assert connection.retired == (answer.state != "gone")


def test_a_connection_with_a_command_that_was_given_up_counts_no_more(sshd: Sshd) -> None:
    with connected(target_for(sshd.options(), sshd.address(1))) as connection, no_process_left(sshd):
        given_up = Running(connection, "echo $$; sleep 60")
        given_up.session.close()
        command = Running(connection, "echo $$; sleep 60")
        sent = next(connection.link.orders)
        assert end(connection, command) in (Ending("gone"), Ending("unknown"))
        assert next(connection.link.orders) == sent + 2, "a script that only looks"
        assert alive(given_up.pids)
        assert not alive(command.pids)


def test_eight_endings_at_once_take_turns(plain: SshConnection) -> None:
    commands = [Running(plain, "echo $$; sleep 60; exit") for _ in range(8)]
    endings = [Beside(plain, each.session, Stop("kill", 1.0), LONG) for each in commands]
    for beside in endings:
        beside.join()
    # Two processes each: with more to come a shell, whichever it is, does not become its command.
    # Who has no turn is signalled by sshd, which does not say how many processes there were.
    assert {each.answer.state for each in endings if each.answer is not None} <= {"gone", "unknown"}
    assert sum(each.answer is not None and each.answer.ended == 2 for each in endings) >= ending.SCRIPTS
    assert not alive(pid for each in commands for pid in each.pids)


# --- by signal requests


@pytest.mark.parametrize("user", ["account", "root"])
def test_where_there_is_no_second_session_the_server_signals(sshd_factory: SshdFactory, user: str) -> None:
    sshd = sshd_factory("MaxSessions 1")
    root = user == "root"
    if root and os.geteuid() != 0:
        pytest.skip("only root's sshd lets root in")
    name = "root" if root else sshd.user
    with connected(target_for(sshd.options(), sshd.address(1), user=name)) as connection:
        command = Running(connection, STUBBORN)
        with takes(0.0 if root else KILL.grace):
            answer = end(connection, command)
        # That nothing is left is seen by a script, which cannot tell what other users of this machine leave behind.
        assert answer in ([Ending("unknown")] if root else [Ending("gone"), Ending("unknown")])
        assert bool(alive(command.pids)) == root
        assert connection.retired == (answer.state != "gone")


def test_where_there_is_no_second_session_survivors_are_not_called_gone(sshd_factory: SshdFactory) -> None:
    sshd = sshd_factory("MaxSessions 1")
    with connected(target_for(sshd.options(), sshd.address(1))) as connection, no_process_left(sshd):
        line = "sh -c \"trap '' TERM; echo \\$\\$; exec sleep 60 >/dev/null 2>&1\" & wait"
        command = Running(connection, line)
        assert end(connection, command) == Ending("unknown")
        assert alive(command.pids)
        assert connection.retired


def test_by_signal_what_holds_the_output_open_is_not_called_gone(sshd: Sshd) -> None:
    with connected(target_for(sshd.options(), sshd.address(1))) as connection, no_process_left(sshd):
        command = Running(connection, "sh -c \"trap '' TERM; echo \\$\\$; exec sleep 60\" & wait", pids=1)
        assert end(connection, command, Stop("kill", 5.0, by="signal")).state == "unknown"
        assert command.sink.signal == "TERM"
        assert alive(command.pids)
        assert connection.retired


def test_by_signal_the_kill_comes_after_the_answer_where_the_connection_stands(sshd: Sshd) -> None:
    with connected(target_for(sshd.options(), sshd.address(1))) as connection, no_process_left(sshd):
        connection.places += 1  # of another job
        command = Running(connection, STUBBORN)
        with takes(0.3):
            answer = end(connection, command, Stop("kill", 0.8, by="signal"), within=0.3)
        assert answer == Ending("unknown")
        assert alive(command.pids)
        wait_until(lambda: not alive(command.pids), what="KILL")


def test_a_forced_command_is_told_and_is_not_run_once_more(sshd_factory: SshdFactory) -> None:
    sshd = sshd_factory()
    counter = sshd.folder / "counter"
    counter.touch()
    counter.chmod(0o666)
    key = sshd.new_key("forced")
    sshd.authorize(key, options=f'command="echo run >>{counter}; echo $$; sleep 60"')
    with connected(target_for(sshd.options(), sshd.address(1), identities=(key,))) as connection:
        connection.places += 1  # of another job
        command = Running(connection, "true")
        assert connection.link.forced_command
        with takes(0.0):
            assert end(connection, command, Stop("kill", LONG)) == Ending("unknown")
        assert alive(command.pids)
    sshd.wait_log("refusing to send signal TERM to forced-command session")
    assert counter.read_text() == "run\n"
    with connected(target_for(sshd.options(), sshd.address(1))) as connection:
        assert is_well(connection)
        assert not connection.link.forced_command


def test_a_server_that_forces_a_command_needs_the_option(sshd_factory: SshdFactory) -> None:
    sshd = sshd_factory("ForceCommand echo $$; sleep 60")
    with connected(target_for(sshd.options(), sshd.address(1))) as connection:
        command = Running(connection, "true")
        assert not connection.link.forced_command, "it is not told"
        assert end(connection, command, Stop("kill", 5.0, by="signal")) == Ending("unknown")
    assert sshd.log().count("Starting session: forced-command") == 1


@pytest.mark.parametrize(
    ("text", "forced"),
    [
        (b"/home/x/.ssh/authorized_keys:1: key options: command", True),
        (b"/home/x/.ssh/authorized_keys:1: key options: agent-forwarding command pty user-rc", True),
        (b"cert: key options: command", True),
        (b"/home/x/command: key options: agent-forwarding pty", False),
        (b"Forced command.", False),
        (b"", False),
        (b"\xff: key options: \xff", False),
    ],
)
def test_how_sshd_tells_of_a_forced_command(text: bytes, forced: bool) -> None:
    assert says_forced_command(text) is forced


# --- nodes that lie or say nothing


def test_a_node_that_never_answers_is_unknown_after_a_second(hostile: HostileFactory) -> None:
    server = hostile(Script(on_exec="silent"))
    with connected(target_for(server.options(), server.address)) as connection:
        session = connection.prepare(Command(line=b"sleep 60"), RecordingSink())
        session.start()
        connection.places += 1  # of another job
        wait_until(lambda: server.seen.commands, what="the command")
        with takes(ending.FIRST_WORD):
            assert connection.end([session], KILL, LONG) == {session: Ending("unknown")}
        assert connection.retired
        wait_until(lambda: server.seen.requests == ["signal"], what="at least a signal")


def test_an_ending_returns_when_it_promised_to(hostile: HostileFactory) -> None:
    server = hostile(Script(on_exec="silent"))
    with connected(target_for(server.options(), server.address)) as connection:
        session = connection.prepare(Command(line=b"sleep 60"), RecordingSink())
        session.start()
        wait_until(lambda: server.seen.commands, what="the command")
        began = time.monotonic()
        assert connection.end([session], KILL, 0.2) == {session: Ending("unknown")}
        assert time.monotonic() - began < 0.2 + 0.5


def test_an_endless_answer_is_not_listened_to(hostile: HostileFactory) -> None:
    talking = threading.Event()
    server = hostile(Script(steps=(Out(b"x" * 200_000), Await(talking), Out(b"y" * 4_000_000), Await(talking))))
    with connected(target_for(server.options(), server.address)) as connection:
        session = started(connection, Command(line=b"sleep 60"), RecordingSink())
        with takes(0.0):
            assert connection.end([session], KILL, LONG)[session].state == "unknown"
        assert server.seen.requests == ["signal"], "another way was tried"
        talking.set()


@pytest.mark.parametrize(
    ("answer", "scripts", "ending_told"),
    [
        # then by a signal request, whose end tells nothing of the rest
        ('echo "$1 recount 9"', 1 + ending.RECOUNTS, Ending("unknown")),
        ('echo "$1 unsure"', 1, Ending("unknown")),
        ("exit 127", 1, Ending("unknown")),
        ('echo "$1 ending"', 1, Ending("unknown")),
        ('echo "$1 ending"; echo "$1 proc 1 7 D x df"; echo "$1 left 1 1"', 1, Ending("alive", None, (STUCK,))),
        ('echo "$1 ending"; echo "$1 gone 2"; echo "$1 gone x"; echo "$1 gone"', 1, Ending("unknown")),
        ('echo "$1 gone 1"; echo "$1 ending"; echo "$1 told 1 5"; echo "$1 hidden 1"', 1, Ending("unknown", 5)),
        ('echo "gone 1"; echo "$1 ending"; echo "$1x gone 1"', 1, Ending("unknown")),
        ('printf "\\033]0;x\\007"; echo "$1 ending"; printf "noise $1"; echo "x$1 gone 1"', 1, Ending("gone")),
        ('echo "$1 ending" >&2; printf "$1 ending\\r\\n$1 gone 1\\r\\nbye"', 1, Ending("gone")),
    ],
    ids=[
        *("recount", "unsure", "no-shell", "breaks-off", "saw-one", "other-numbers", "hidden", "other-words"),
        *("titles", "returns"),
    ],
)
def test_what_a_script_says_is_taken_word_by_word(
    plain: SshConnection, monkeypatch: pytest.MonkeyPatch, answer: str, scripts: int, ending_told: Ending
) -> None:
    monkeypatch.setattr(ending, "_script", f"{answer}\n".encode)
    command = Running(plain, "echo $$; exec sleep 60")
    sent = next(plain.link.orders)
    assert end(plain, command) == ending_told
    assert next(plain.link.orders) == sent + scripts + 1
    assert plain.retired == (ending_told.state != "gone")


def words(lines: bytes) -> list[list[bytes] | None]:
    """What is kept of a script's answer, by a sink of its own."""
    released: list[bool] = []
    script: Any = SimpleNamespace(word=b"w0rd", release=lambda: released.append(True))
    sink = ending._Words(script)
    for at in range(0, len(lines), 1000):
        sink.data(1, lines[at : at + 1000])
        sink.flush()
    sink.ended(None)
    sink.flush()
    found = []
    while (word := sink.next(0.0)) is not None:
        found.append(word)
    assert released == [True]
    return [*found, None]


def test_words_are_those_of_the_script_and_bounded() -> None:
    said = b"Welcome!\nw0rd ending\nwOrd gone 1\n\xff\xfe\n\n w0rd\nw0rd told 1 3\nw0rd proc 1 2 S 0 a b c\nw0rd gone"
    assert words(said) == [[b"ending"], [b"told", b"1", b"3"], [b"proc", b"1", b"2", b"S", b"0", b"a b c"], None]
    assert len(words(b"w0rd gone 1\n" * 100_000)) <= 65_536 // 12 + 1
    assert words(b"w0rd " + b"x" * 1_000_000 + b"\nw0rd gone 1\n") == [None]


def test_words_stand_behind_what_a_login_shell_prints() -> None:
    title = b"\x1b]0;node\x07"
    said = title + b"w0rd ending\r\n" + title + title + b"w0rd told 1 3\r\nnoise\nw0rd proc 1 2 S 0 a\nw0rd gone 1\nbye"
    expected = [[b"ending"], [b"told", b"1", b"3"], [b"proc", b"1", b"2", b"S", b"0", b"a"], [b"gone", b"1"], None]
    assert words(said) == expected
    assert words(b"Today's message\n" * 200_000 + said) == expected, "3 MB"
    assert words(b"+ exec /bin/sh -s w0rd kill 500 1 1\n" + said)[1:] == expected
    endless: Any = SimpleNamespace(word=b"w0rd", release=lambda: None)
    sink = ending._Words(endless)
    for _ in range(20_000):
        sink.data(2, b"x" * 1000)
        sink.flush()
    assert not sink.may(endless)


def test_a_report_takes_what_a_node_says_with_care() -> None:
    command: Any = object()
    report = ending._Report(command)
    assert report.so_far() == Ending("unknown")
    odd = b"proc -1 \x1b[2J \xff\xfe \x1b]0;x\x07"
    for said in [b"told 7", b"told x", b"told", b"proc", b"proc x", odd, b"nonsense"]:
        verb, *rest = said.split()
        assert report.hear(verb, rest) is None
    for number in range(1000):
        report.hear(b"proc", [b"%d" % number, b"D", b"w" * 1000, b"n" * 1000])
    report.hear(b"left", [])
    answer = report.hear(b"alive", [])
    assert answer is not None
    assert (answer.state, answer.ended, len(answer.processes)) == ("alive", None, 16)
    for process in answer.processes:
        assert len(process.name) <= 64
        assert len(process.waits_in) <= 64
        assert (process.name + process.state + process.waits_in).isprintable()
    assert report.hear(b"hidden", []) == Ending("unknown")
