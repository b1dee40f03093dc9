# SPDX-License-Identifier: Apache-2.0
"""Sessions on an SSH connection, on a real sshd: output, ends, re-keys, losses, input, credit.

Runs in the thread of pytest; what connections' threads tell is in `RecordingSink`s.
"""

from __future__ import annotations

import functools
import os
import threading
from typing import TYPE_CHECKING

import pytest
from paramiko.common import MSG_CHANNEL_DATA

from ctask.errors import ConnectionLost, ExecRefused, SessionRefused
from ctask.options import Command
from ctask.transports.ssh.channel import WIDEST, WINDOW
from ctask.transports.ssh.mapping import TooMuch
from ctask.transports.ssh.packets import WirePacketizer
from ctask.transports.ssh.transport import Link
from ctask_tests.fix_hostile import Close, Eof, HangUp, OpenToClient, Out, Pause, Script, Signal, Status
from ctask_tests.fix_leaks import wait_until
from ctask_tests.ssh_sink import RecordingSink, connected, run, started, target_for

if TYPE_CHECKING:
    from pathlib import Path

    from ctask.errors import NodeError
    from ctask_tests.fix_hostile import HostileFactory, Step
    from ctask_tests.fix_sshd import Sshd, SshdFactory

pytestmark = pytest.mark.usefixtures("nothing_runs_on")

#: writes its argument's number of lines to both streams, in turn
BOTH = (
    b"i=0; b=$(head -c 29999 /dev/zero | tr '\\0' x); while [ $i -lt 100 ]; do echo $b; echo $b >&2; i=$((i+1)); done"
)


def test_e05_both_streams_of_3_mb_are_whole(sshd: Sshd) -> None:
    with connected(target_for(sshd.options(), sshd.address(1))) as connection:
        sink = run(connection, BOTH)
    wanted = (b"x" * 29_999 + b"\n") * 100
    assert sink.stdout == wanted
    assert sink.stderr == wanted
    assert (sink.status, sink.signal, sink.error) == (0, None, None)


def test_events_come_in_the_order_of_the_protocol(sshd: Sshd) -> None:
    with connected(target_for(sshd.options(), sshd.address(1))) as connection:
        sink = run(connection, b"echo out; echo err >&2")
    assert sink.events == ["exec", "running", "exited", "ended"]
    assert (sink.stdout, sink.stderr) == (b"out\n", b"err\n")


@pytest.mark.parametrize("status", [0, 1, 126, 127, 255])
def test_f01_exit_status_is_exact(sshd: Sshd, status: int) -> None:
    with connected(target_for(sshd.options(), sshd.address(1))) as connection:
        sink = run(connection, b"exit %d" % status)
    assert (sink.status, sink.signal, sink.error) == (status, None, None)


@pytest.mark.parametrize("name", ["TERM", "KILL", "SEGV"])
def test_f02_signal_is_told_by_name(sshd: Sshd, name: str) -> None:
    with connected(target_for(sshd.options(), sshd.address(1))) as connection:
        sink = run(connection, b"kill -%s $$" % name.encode())
    assert (sink.status, sink.signal, sink.error) == (None, name, None)


def test_f02_unknown_signal_name_is_kept(hostile: HostileFactory) -> None:
    server = hostile(Script(steps=(Signal("FOO@x"), Eof(), Close())))
    with connected(target_for(server.options(), server.address)) as connection:
        sink = run(connection, b"x")
    assert (sink.status, sink.signal, sink.error) == (None, "FOO@x", None)


def test_fifty_rekeys_under_eight_channels(sshd: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    rekeys: list[Link] = []
    whole = Link._on_newkeys

    def count(link: Link, payload: bytes) -> None:
        rekeys.append(link)
        whole(link, payload)

    monkeypatch.setattr(Link, "_on_newkeys", count)
    monkeypatch.setattr(WirePacketizer, "REKEY_BYTES", 150_000)
    payload = os.urandom(400_000)
    with connected(target_for(sshd.options(), sshd.address(1))) as connection:
        while len(rekeys) < 51:
            sinks = [RecordingSink() for _ in range(8)]
            for number, sink in enumerate(sinks):
                line, stdin = (b"cat", True) if number < 2 else (b"head -c 300000 /dev/zero; exit 3", False)
                session = connection.prepare(Command(line=line, stdin=stdin), sink)
                session.start()
                if stdin:
                    feed(session, sink, payload)
            for sink in sinks[:2]:
                assert (sink.wait().stdout, sink.status, sink.error) == (payload, 0, None)
            for sink in sinks[2:]:
                assert (sink.wait().size, sink.status, sink.error) == (300_000, 3, None)
        assert not connection.dead


def test_f03_lost_connection_is_told_once_to_each_of_eight(sshd: Sshd) -> None:
    address = sshd.address(2)
    sinks = [RecordingSink() for _ in range(8)]
    with connected(target_for(sshd.options(), address)) as connection:
        for sink in sinks:
            started(connection, Command(line=b"echo here; exec sleep 60"), sink)
        wait_until(lambda: all(sink.size for sink in sinks), what="output of all")
        sshd.kill_session(address)
        for sink in sinks:
            sink.wait()
        late = run(connection, b"true")
    for sink in sinks:
        assert sink.events == ["exec", "running", "ended"]
        assert sink.stdout == b"here\n"
        assert isinstance(sink.error, ConnectionLost)
    assert late.events == ["ended"]
    assert isinstance(late.error, ConnectionLost)


def test_connections_that_die_while_commands_start_leave_nobody_waiting(sshd: Sshd) -> None:
    for number in range(12):
        sinks = [RecordingSink() for _ in range(24)]
        with connected(target_for(sshd.options(), sshd.address(3))) as connection:
            sessions = [connection.prepare(Command(line=b"true"), sink) for sink in sinks]
            threads = [
                threading.Thread(target=lambda part=part: [each.start() for each in part])
                for part in (sessions[:12], sessions[12:])
            ]
            for thread in threads:
                thread.start()
            if number % 3:
                sinks[number].wait()
            connection.close()
            for thread in threads:
                thread.join()
            for sink in sinks:
                sink.wait()
                assert sink.events.count("ended") == 1
                assert sink.status == 0 or isinstance(sink.error, (ConnectionLost, SessionRefused))


def test_dropped_before_the_confirmation_never_runs(sshd: Sshd, tmp_path: Path) -> None:
    counter = sshd.folder / "dropped"
    counter.touch()
    counter.chmod(0o666)
    line = b"echo x >> %s" % bytes(counter)
    ran = 0
    with connected(target_for(sshd.options(), sshd.address(1))) as connection:
        for number in range(60):
            sink = RecordingSink()
            session = connection.prepare(Command(line=line), sink)
            if number % 2:
                session.start()
            else:
                assert session.try_start()
            if number % 3 == 0:
                # Long enough, now and then, for the confirmation to be quicker.
                wait_until(functools.partial(sink.reached, "exec" if number % 2 else ""))
            dropped = session.drop()
            sink.wait()
            assert dropped == ("exec" not in sink.events)
            ran += not dropped
            assert sink.error is None
    assert counter.read_text().count("x") == ran
    assert 0 < ran < 60


def test_dropped_before_it_was_started_sends_nothing(hostile: HostileFactory) -> None:
    server = hostile(Script())
    with connected(target_for(server.options(), server.address)) as connection:
        sink = RecordingSink()
        session = connection.prepare(Command(line=b"x"), sink)
        assert session.drop()
        session.start()
        assert not session.try_start()
        assert run(connection, b"y").status == 0
    assert sink.events == []
    assert server.seen.opens == ["session"]


def test_try_start_needs_a_living_connection_with_room(sshd: Sshd) -> None:
    with connected(target_for(sshd.options(), sshd.address(1))) as connection:
        sink = RecordingSink()
        session = connection.prepare(Command(line=b"exit 4"), sink)
        with connection.link.clear_to_send_lock:
            assert not session.try_start()
        with connection.link.lock:
            assert not session.try_start()
        assert session.try_start()
        assert sink.wait().status == 4
        connection.close()
        wait_until(lambda: connection.dead)
        assert not connection.prepare(Command(line=b"true"), RecordingSink()).try_start()


def test_d02_sessions_are_refused_one_by_one(sshd_factory: SshdFactory) -> None:
    server = sshd_factory("MaxSessions 1")
    with connected(target_for(server.options(), server.address(1))) as connection:
        first, second = RecordingSink(), RecordingSink()
        started(connection, Command(line=b"exec sleep 60"), first)
        connection.prepare(Command(line=b"true"), second).start()
        second.wait()
        assert second.events == ["ended"]
        assert isinstance(second.error, SessionRefused)
        assert "MaxSessions" in str(second.error)
        assert first.events == ["exec", "running"]


def test_the_node_hears_of_the_close_before_the_job_does(sshd: Sshd) -> None:
    closed: list[bool] = []

    class Sink(RecordingSink):
        def ended(self, error: NodeError | None) -> None:
            # Else the job's next command could meet MaxSessions.
            closed.append(session.close_sent)
            super().ended(error)

    with connected(target_for(sshd.options(), sshd.address(1))) as connection:
        sink = Sink()
        session = connection.prepare(Command(line=b"true"), sink)
        session.start()
        assert sink.wait().status == 0
    assert closed == [True]


def test_f05_close_frees_a_session_that_only_a_child_holds(sshd_factory: SshdFactory) -> None:
    server = sshd_factory("MaxSessions 1")
    with connected(target_for(server.options(), server.address(1))) as connection:
        sink = RecordingSink()
        session = connection.prepare(Command(line=b"sleep 60.%d & exit 7" % os.getpid()), sink)
        session.start()
        wait_until(lambda: sink.status == 7, what="the status, which does not wait for the child")
        session.close()
        assert sink.wait().error is None
        assert run(connection, b"pkill -f 'sleep [6]0.%d'" % os.getpid()).status == 0


def test_close_leaves_a_command_that_runs(sshd: Sshd) -> None:
    with connected(target_for(sshd.options(), sshd.address(1))) as connection:
        sink = RecordingSink()
        session = started(connection, Command(line=b"exec sleep 61.%d" % os.getpid()), sink)
        session.close()
        assert run(connection, b"pgrep -f 'sleep [6]1.%d'" % os.getpid()).status == 0
        # sshd keeps the session for as long as its command runs, and says so only then.
        assert sink.events == ["exec", "running"]
        assert run(connection, b"pkill -f 'sleep [6]1.%d'" % os.getpid()).status == 0
        assert sink.wait().error is None


@pytest.mark.parametrize(("code", "word"), [(1, "prohibited"), (4, "resources")])
def test_d01_refused_open_has_its_own_reason(hostile: HostileFactory, code: int, word: str) -> None:
    server = hostile(Script(on_open=code))
    with connected(target_for(server.options(), server.address)) as connection:
        sinks = [run(connection, b"x") for _ in range(2)]
    assert all(isinstance(sink.error, SessionRefused) for sink in sinks)
    assert word in str(sinks[0].error)
    assert sinks[0].error is not sinks[1].error


def test_d03_refused_exec_ends_quietly(hostile: HostileFactory) -> None:
    server = hostile(Script(on_exec="refuse"))
    with connected(target_for(server.options(), server.address)) as connection:
        sink = run(connection, b"x")
        assert sink.events == ["exec", "ended"]
        assert isinstance(sink.error, ExecRefused)
        assert not connection.dead


def test_d05_channels_of_the_server_are_refused(hostile: HostileFactory) -> None:
    kinds = ("x11", "forwarded-tcpip", "auth-agent@openssh.com", "session")
    steps: list[Step] = [OpenToClient(kind) for kind in kinds]
    server = hostile(Script(steps=(*steps, Status(0), Eof(), Close())))
    with connected(target_for(server.options(), server.address)) as connection:
        assert run(connection, b"x").status == 0
    assert server.seen.answers == [(kind, 1) for kind in kinds]


def test_a_close_without_a_status_is_no_success(hostile: HostileFactory) -> None:
    server = hostile(Script(steps=(Out(b"half"), Eof(), Close())))
    with connected(target_for(server.options(), server.address)) as connection:
        sink = run(connection, b"x")
    assert sink.stdout == b"half"
    assert isinstance(sink.error, ConnectionLost)
    assert "no exit status" in str(sink.error)


@pytest.mark.parametrize("reset", [False, True])
def test_b07_a_loss_after_the_status_leaves_it_as_it_is(hostile: HostileFactory, *, reset: bool) -> None:
    server = hostile(Script(steps=(Out(b"all"), Status(5), Pause(0.05), HangUp(reset=reset))))
    with connected(target_for(server.options(), server.address)) as connection:
        sink = run(connection, b"x")
    assert (sink.stdout, sink.status) == (b"all", 5)
    assert isinstance(sink.error, ConnectionLost)  # who knows whether that was all


def test_end_of_output_is_no_end_of_the_command(hostile: HostileFactory) -> None:
    server = hostile(Script(steps=(Out(b"a"), Eof(), Pause(0.1), Status(0), Close())))
    with connected(target_for(server.options(), server.address)) as connection:
        sink = run(connection, b"x")
    assert sink.events == ["exec", "running", "exited", "ended"]
    assert sink.status == 0


def feed(session: object, sink: RecordingSink, payload: bytes) -> None:
    """Write all of it in a thread of its own, as a worker would, then say the end."""

    def work() -> None:
        view = memoryview(payload)
        while view:
            sink.room.clear()
            taken = session.write(view)  # type: ignore[attr-defined]
            view = view[taken:]
            if view:
                assert sink.room.wait(10)
        session.close_stdin()  # type: ignore[attr-defined]

    threading.Thread(target=work, name="feeder").start()


def test_standard_input_of_5_mb_comes_back(sshd: Sshd) -> None:
    payload = os.urandom(5_000_000)
    with connected(target_for(sshd.options(), sshd.address(1))) as connection:
        sink = RecordingSink()
        session = connection.prepare(Command(line=b"cat", stdin=True), sink)
        feed(session, sink, payload)  # before it is started: the first write is short
        session.start()
        assert sink.wait().stdout == payload
        assert sink.status == 0
        assert session.write(memoryview(b"late")) == 4


def test_input_that_ended_before_the_start_ends_with_the_command(sshd: Sshd) -> None:
    with connected(target_for(sshd.options(), sshd.address(1))) as connection:
        sink = RecordingSink()
        session = connection.prepare(Command(line=b"cat; echo done", stdin=True), sink)
        session.close_stdin()
        session.start()
        assert sink.wait().stdout == b"done\n"


def test_a_command_that_reads_nothing_takes_input_for_granted(sshd: Sshd) -> None:
    with connected(target_for(sshd.options(), sshd.address(1))) as connection:
        sink = RecordingSink()
        session = connection.prepare(Command(line=b"exit 3", stdin=True), sink)
        session.start()
        feed(session, sink, bytes(4_000_000))
        assert sink.wait().status == 3
        assert run(connection, b"true").status == 0


def test_withheld_credit_stops_the_node_at_one_window(sshd: Sshd) -> None:
    size = 3 * WINDOW
    with connected(target_for(sshd.options(), sshd.address(1))) as connection:
        sink = RecordingSink(generous=False)
        session = connection.prepare(Command(line=b"head -c %d /dev/zero" % size), sink)
        session.start()
        other = run(connection, b"head -c 500000 /dev/zero")  # a neighbour is not held back
        assert other.size == 500_000
        wait_until(lambda: sink.size == WINDOW, what="a full window")
        assert sink.asked > 0
        while "ended" not in sink.events:  # the status overtakes output that has no credit
            assert sink.size <= session._given <= sink.size + WINDOW
            session.give()
        assert sink.wait().size == size
        assert session._seen <= session._given


@pytest.mark.parametrize("wide", [True, False])
def test_a_window_grows_as_long_as_its_output_is_taken(sshd: Sshd, *, wide: bool) -> None:
    size = 20_000_000
    with connected(target_for(sshd.options(), sshd.address(1))) as connection:
        sink = RecordingSink(wide=wide)
        session = connection.prepare(Command(line=b"head -c %d /dev/zero" % size), sink)
        session.start()
        assert sink.wait(20).size == size
    assert session._window == (WIDEST if wide else WINDOW)
    assert session._given - session._seen <= session._window


def test_data_beyond_the_window_ends_the_connection(sshd: Sshd) -> None:
    with connected(target_for(sshd.options(), sshd.address(1))) as connection:
        session = started(connection, Command(line=b"exec sleep 60"), RecordingSink())
        size = WINDOW + 1
        with pytest.raises(TooMuch):
            session.packet(MSG_CHANNEL_DATA, bytes(5) + size.to_bytes(4, "big") + bytes(size))


@pytest.mark.usefixtures("terminals")
def test_a_terminal_merges_the_streams(sshd: Sshd) -> None:
    with connected(target_for(sshd.options(), sshd.address(1))) as connection:
        sink = RecordingSink()
        connection.prepare(Command(line=b"tty >/dev/null && echo $TERM >&2", pty=True), sink).start()
        assert sink.wait().status == 0
        assert sink.stdout == b"dumb\r\n"


def test_d03_without_a_terminal_the_command_is_not_sent(sshd_factory: SshdFactory) -> None:
    server = sshd_factory("PermitTTY no")
    with connected(target_for(server.options(), server.address(1))) as connection:
        sink = RecordingSink()
        connection.prepare(Command(line=b"touch /tmp/never", pty=True), sink).start()
        assert sink.wait().events == ["ended"]
        assert isinstance(sink.error, ExecRefused)
        assert "terminal" in str(sink.error)


def test_a_node_that_asks_whether_we_live_is_answered(sshd_factory: SshdFactory) -> None:
    server = sshd_factory("ClientAliveInterval 1", "ClientAliveCountMax 1")
    with connected(target_for(server.options(), server.address(1))) as connection:
        assert run(connection, b"sleep 2.5").status == 0
