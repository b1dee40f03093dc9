# SPDX-License-Identifier: Apache-2.0
"""Sessions that do not come about: refused, unanswered, forced, without a terminal; and what a terminal does.

The rows D01, D03, D04 and D05 of the fault matrix, through a task on the real sshd and on hostile servers; each
with a healthy node beside the sick one. Runs in the thread of pytest.
"""

from __future__ import annotations

import os
import pwd
from typing import TYPE_CHECKING

import pytest

from ctask import EventHandler, ExecRefused, NodeResult, Outcome, SessionRefused, SessionTimeout, Task, Worker
from ctask_tests.fix_hostile import Close, Eof, OpenToClient, Out, Script, Status
from ctask_tests.fix_leaks import wait_until
from ctask_tests.real_nodes import LATE, WELL, is_well, outcomes, reach, run, takes, task_of

if TYPE_CHECKING:
    from ctask_tests.fix_hostile import HostileFactory
    from ctask_tests.fix_sshd import Sshd, SshdFactory


@pytest.fixture
def task(sshd: Sshd) -> Task:
    return task_of(sshd)


class Ends(EventHandler):
    """Records how each node's job ended."""

    def __init__(self) -> None:
        self.hups: dict[str, int] = {}
        self.dones: list[str] = []
        self.closes: list[bool] = []

    def ev_hup(self, worker: Worker, node: str, rc: int) -> None:
        self.hups[node] = rc

    def ev_done(self, worker: Worker, node: str, result: NodeResult) -> None:
        self.dones.append(node)

    def ev_close(self, worker: Worker, timedout: bool) -> None:
        self.closes.append(timedout)


# -- D01: the open is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "words"),
    [(1, "administratively prohibited"), (2, "connect failed"), (4, "resource shortage")],
)
def test_d01_a_refused_session_is_told_with_its_reason(
    task: Task, hostile: HostileFactory, code: int, words: str
) -> None:
    server = hostile(Script(on_open=code))
    reach(task, "sick", server, retry=None)
    ends = Ends()
    worker = run(task, "true", ["sick", WELL], handler=ends)
    found = outcomes(worker)
    sick = found["sick"]
    assert (sick.outcome, sick.rc, sick.ran, sick.phase) == (Outcome.UNREACHED, 255, False, "open")
    assert isinstance(sick.error, SessionRefused)
    assert words in sick.why
    assert str(worker.not_run) == str(worker.unreached) == "sick"
    assert server.seen.commands == []
    assert (ends.hups, sorted(ends.dones), ends.closes) == ({"sick": 255, WELL: 0}, ["sick", WELL], [False])
    assert is_well(found[WELL])
    assert worker.exit_code() == 3


def test_d01_a_refusal_does_not_end_what_runs_on_the_same_connection(task: Task, hostile: HostileFactory) -> None:
    server = hostile(Script(on_open=4, honest=1))
    reach(task, "sick", server, retry=None)
    first = run(task, "first", "sick")
    second = run(task, "second", "sick")
    assert is_well(outcomes(first)["sick"])
    assert isinstance(outcomes(second)["sick"].error, SessionRefused)
    assert server.connections == 1, "the second command used the connection that was kept"
    assert server.seen.commands == [b"first"]


# -- D02: MaxSessions --------------------------------------------------------------------------------------------


def test_d02_a_server_that_allows_no_session_is_told_as_that(task: Task, sshd_factory: SshdFactory) -> None:
    server = sshd_factory("MaxSessions 0")
    task.node_options("sick", address=server.address(2), **server.options())
    ends = Ends()
    worker = run(task, "true", ["sick", WELL], handler=ends)
    found = outcomes(worker)
    sick = found["sick"]
    assert (sick.outcome, sick.rc, sick.ran, sick.phase) == (Outcome.UNREACHED, 255, False, "open")
    assert isinstance(sick.error, SessionRefused)
    assert "MaxSessions" in sick.why
    assert (ends.hups, sorted(ends.dones), ends.closes) == ({"sick": 255, WELL: 0}, ["sick", WELL], [False])
    assert is_well(found[WELL])


# -- D03: the command is refused, forced, or has no terminal -----------------------------------------------------


def test_d03_a_refused_command_has_not_run(task: Task, hostile: HostileFactory) -> None:
    server = hostile(Script(on_exec="refuse"))
    reach(task, "sick", server)
    worker = run(task, "wanted", ["sick", WELL])
    sick = outcomes(worker)["sick"]
    assert (sick.outcome, sick.rc, sick.ran, sick.phase) == (Outcome.UNREACHED, 255, False, "exec")
    assert isinstance(sick.error, ExecRefused)
    assert server.seen.commands == [b"wanted"], "asked once"
    with pytest.raises(ExecRefused, match="sick: exec: the node opened a session and refused to run the command"):
        worker.result("sick")


def test_d03_a_forced_command_gives_its_own_output_and_status(task: Task, sshd_factory: SshdFactory) -> None:
    server = sshd_factory()
    forced = server.new_key("forced")
    server.authorize(forced, options='command="echo instead of $SSH_ORIGINAL_COMMAND; exit 3"')
    task.node_options("sick", address=server.address(2), **{**server.options(), "identity": forced})
    found = outcomes(run(task, "true", ["sick", WELL]))
    sick = found["sick"]
    assert (sick.outcome, sick.rc, sick.ran, sick.error) == (Outcome.EXITED, 3, True, None)
    assert sick.stdout == b"instead of true\n"
    assert is_well(found[WELL])


@pytest.mark.usefixtures("terminals")
def test_d03_without_a_terminal_to_be_had_nothing_is_run(task: Task, sshd_factory: SshdFactory) -> None:
    server = sshd_factory()
    bare = server.new_key("bare")
    server.authorize(bare, options="no-pty")
    task.node_options("sick", address=server.address(2), **{**server.options(), "identity": bare})
    mark = server.folder / "ran"
    found = outcomes(run(task, f"touch {mark}; test -t 1", ["sick", WELL], pty=True, stdin=True))
    sick = found["sick"]
    assert (sick.outcome, sick.rc, sick.ran) == (Outcome.UNREACHED, 255, False)
    assert isinstance(sick.error, ExecRefused)
    assert "terminal" in sick.why
    assert "pty=False" in sick.why, "it says what to do"
    assert found[WELL].outcome is Outcome.EXITED
    again = outcomes(run(task, "echo fine", ["sick"]))["sick"]
    assert is_well(again)


def test_d03_an_account_without_a_shell_says_so(task: Task, sshd: Sshd) -> None:
    accounts = [user for user in pwd.getpwall() if user.pw_name == "nobody" and user.pw_shell.endswith("/nologin")]
    if not accounts or os.geteuid() != 0:
        pytest.skip("needs root, so that sshd can log in another account, and one with nologin for a shell")
    task.node_options("sick", address=sshd.address(2), user="nobody")
    found = outcomes(run(task, "echo never", ["sick", WELL]))
    sick = found["sick"]
    assert (sick.outcome, sick.rc, sick.ok) == (Outcome.EXITED, 1, False)
    assert sick.output.count("not available") == 1
    assert sick.output.count("never") == 0
    assert is_well(found[WELL])


# -- D04: nobody answers -----------------------------------------------------------------------------------------


def test_d04_an_unanswered_session_ends_at_the_deadline(task: Task, hostile: HostileFactory) -> None:
    deaf_to_open = hostile(Script(on_open="silent"))
    deaf_to_exec = hostile(Script(on_exec="silent"))
    reach(task, "sick1", deaf_to_open)
    reach(task, "sick2", deaf_to_exec)
    with takes(1):
        worker = run(task, "true", ["sick1", "sick2", WELL], connect_timeout=1)
    found = outcomes(worker)
    unopened, unanswered = found["sick1"], found["sick2"]
    assert (unopened.outcome, unopened.phase, unopened.ran) == (Outcome.UNREACHED, "open", False)
    assert (unanswered.outcome, unanswered.phase, unanswered.ran) == (Outcome.LOST, "exec", None)
    for result in (unopened, unanswered):
        assert isinstance(result.error, SessionTimeout)
        assert result.rc == 255
        assert "no answer for 1 s" in result.why
        assert 1 <= result.timings.total <= 1 + LATE, "one deadline from the dial to exec's reply"
    assert task.num_timeout() == 0, "not being reached is no timeout"
    assert is_well(found[WELL])
    assert found[WELL].timings.total < 1


def test_d04_a_connection_that_did_not_answer_gets_no_new_jobs(task: Task, hostile: HostileFactory) -> None:
    server = hostile(Script(on_open="silent"), Script())
    reach(task, "sick", server)
    first = outcomes(run(task, "first", "sick", connect_timeout=0.5))["sick"]
    assert isinstance(first.error, SessionTimeout)
    second = outcomes(run(task, ": second", ["sick", WELL], connect_timeout=5))
    assert is_well(second["sick"])
    assert is_well(second[WELL])
    assert server.connections == 2
    assert server.seen.commands == [b": second"], "what was given up is never sent"


# -- D05: the node asks for channels -----------------------------------------------------------------------------


def test_d05_channels_that_the_node_asks_for_are_refused(task: Task, hostile: HostileFactory) -> None:
    kinds = ("x11", "forwarded-tcpip", "auth-agent@openssh.com", "session", "direct-tcpip")
    asks = [OpenToClient(kind) for kind in kinds]
    server = hostile(Script(steps=(Out(b"before\n"), *asks, Out(b"after\n"), Status(0), Eof(), Close())))
    reach(task, "sick", server)
    found = outcomes(run(task, "true", ["sick", WELL]))
    assert is_well(found["sick"])
    assert found["sick"].stdout == b"before\nafter\n"
    assert [kind for kind, _ in server.seen.answers] == list(kinds)
    assert not any(answer == "accepted" for _, answer in server.seen.answers)
    assert is_well(found[WELL])


# -- a terminal --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("terminals")
def test_a_terminal_merges_the_streams_and_is_one(task: Task) -> None:
    command = "test -t 0 && test -t 1 && test -t 2 && echo out; echo err >&2; stty size; exit 5"
    result = outcomes(run(task, command, [WELL], pty=True, stdin=True))[WELL]
    assert (result.outcome, result.rc) == (Outcome.EXITED, 5)
    assert result.stdout == b"out\r\nerr\r\n24 80\r\n", "the exact bytes have the terminal's line ends"
    assert result.stderr == b""
    assert task.node_buffer(WELL) == "out\nerr\n24 80", "what people see has not"


def test_without_being_asked_for_there_is_no_terminal(task: Task) -> None:
    result = outcomes(run(task, "test -t 0 || test -t 1 || test -t 2 || echo none", [WELL]))[WELL]
    assert result.stdout == b"none\n"


@pytest.mark.usefixtures("terminals")
def test_p15_a_terminal_ends_its_command_where_ctask_ends_the_job(task: Task, sshd: Sshd) -> None:
    worker = task.shell("echo $$; exec sleep 50", nodes=[WELL], pty=True)
    worker.on("read", lambda worker, node, sname, msg: worker.abort())
    task.resume()
    result = outcomes(worker)[WELL]
    assert (result.outcome, result.rc, result.ran) == (Outcome.ABORTED, None, True)
    pid = int(result.stdout)
    wait_until(lambda: pid not in sshd.processes(), what="the command behind the terminal is gone")
