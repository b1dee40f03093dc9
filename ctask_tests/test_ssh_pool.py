# SPDX-License-Identifier: Apache-2.0
"""The pool of kept connections and the wire below them: places, ends, the bound, a fork, a node that does not read.

Runs in the thread of pytest.
"""

from __future__ import annotations

import os
import resource
import socket
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from ctask.errors import HandshakeError
from ctask.options import Command, Target
from ctask.transports import base
from ctask.transports.ssh import SshTransport, wire
from ctask.transports.ssh import pool as pool_module
from ctask.transports.ssh import transport as process_transport
from ctask.transports.ssh.wire import BACKLOG_LIMIT, Wire
from ctask_tests.fix_leaks import wait_until
from ctask_tests.ssh_sink import RecordingSink, dial, open_connection, run, started, target_for

if TYPE_CHECKING:
    from ctask_tests.fix_banner import BannerServerFactory
    from ctask_tests.fix_sshd import Sshd


@pytest.fixture
def ways() -> Iterator[SshTransport]:
    """A transport of its own, all of whose connections are ended."""
    transport = SshTransport()
    yield transport
    assert transport.close_all(5.0)
    assert transport.statistics().open == 0


def test_it_is_the_transport_of_the_protocol(ways: SshTransport) -> None:
    way: base.Transport = ways  # the checker's part of the test
    assert way.dials


def test_eight_places_then_none(sshd: Sshd, ways: SshTransport) -> None:
    target = target_for(sshd.options(), sshd.address(1))
    assert ways.take(target) is None
    connection = open_connection(ways, target)
    assert [ways.take(target) for _ in range(8)] == [connection] * 8
    assert ways.take(target) is None
    ways.give_back(connection)
    assert ways.take(target) is connection
    assert ways.statistics().idle == 0
    for _ in range(8):
        ways.give_back(connection)
    assert (ways.statistics().open, ways.statistics().idle) == (1, 1)


def test_jobs_gather_on_few_connections(sshd: Sshd, ways: SshTransport) -> None:
    target = target_for(sshd.options(), sshd.address(1))
    connections = {open_connection(ways, target) for _ in range(2)}
    taken = [ways.take(target) for _ in range(16)]
    assert set(taken) == connections
    assert len(set(taken[:8])) == len(set(taken[8:])) == 1


def test_another_policy_is_another_target(sshd: Sshd, ways: SshTransport) -> None:
    careless = target_for(sshd.options(), sshd.address(1), host_key_policy="insecure-ignore")
    open_connection(ways, careless)
    assert ways.take(target_for(sshd.options(), sshd.address(1))) is None
    assert ways.take(careless) is not None


def test_a_lost_connection_leaves_at_once(sshd: Sshd, ways: SshTransport) -> None:
    target = target_for(sshd.options(), sshd.address(5))
    connection = open_connection(ways, target)
    assert run(connection, b"true").status == 0  # sshd's process is a session's from then on
    sshd.kill_session(sshd.address(5))
    wait_until(lambda: ways.statistics().open == 0)
    assert connection.dead
    assert ways.take(target) is None
    assert ways.statistics().lost == 1


def test_a_job_that_hears_of_the_loss_finds_no_place_there(sshd: Sshd, ways: SshTransport) -> None:
    target = target_for(sshd.options(), sshd.address(6))
    found: list[object] = []

    class Sink(RecordingSink):
        def ended(self, error: object) -> None:
            found.append(ways.take(target))
            super().ended(error)  # type: ignore[arg-type]

    connection = open_connection(ways, target)
    assert ways.take(target) is connection
    sink = Sink()
    started(connection, Command(line=b"exec sleep 60"), sink)
    sshd.kill_session(sshd.address(6))
    sink.wait()
    assert found == [None]


def test_an_idle_connection_goes_after_keep_seconds(sshd: Sshd, ways: SshTransport) -> None:
    target = target_for(sshd.options(), sshd.address(1), keep=0.3)
    connection = open_connection(ways, target)
    assert ways.take(target) is connection
    busy_until = time.monotonic() + 1.3  # past the time that a new connection is given
    while time.monotonic() < busy_until:
        assert run(connection, b"sleep 0.1").status == 0
    ways.give_back(connection)
    back = time.monotonic()
    wait_until(lambda: connection.dead)
    assert time.monotonic() - back >= 0.3
    wait_until(lambda: ways.statistics().open == 0)


def test_keep_0_closes_with_the_last_job(sshd: Sshd, ways: SshTransport) -> None:
    target = target_for(sshd.options(), sshd.address(1), keep=0.0)
    connection = open_connection(ways, target)
    assert ways.take(target) is ways.take(target) is connection
    ways.give_back(connection)
    assert run(connection, b"true").status == 0
    ways.give_back(connection)
    wait_until(lambda: connection.dead)


def test_a_connection_that_nobody_takes_goes_as_well(
    sshd: Sshd, ways: SshTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "_FIRST_JOB", 0.1)
    connection = open_connection(ways, target_for(sshd.options(), sshd.address(1), keep=0.0))
    wait_until(lambda: connection.dead)


def test_a_retired_connection_ends_with_its_last_job(sshd: Sshd, ways: SshTransport) -> None:
    target = target_for(sshd.options(), sshd.address(1))
    connection = open_connection(ways, target)
    assert ways.take(target) is connection
    connection.retire()
    assert ways.take(target) is None
    assert run(connection, b"exit 2").status == 2
    ways.give_back(connection)
    wait_until(lambda: connection.dead)


def test_disconnect_closes_idle_ones_and_retires_busy_ones(sshd: Sshd, ways: SshTransport) -> None:
    targets = [target_for(sshd.options(), sshd.address(n)) for n in (1, 2, 3)]
    first, second, third = (open_connection(ways, target) for target in targets)
    assert ways.take(targets[1]) is second
    ways.disconnect(targets[:2])
    wait_until(lambda: first.dead)
    assert run(second, b"true").status == 0
    assert ways.take(targets[1]) is None
    ways.give_back(second)
    wait_until(lambda: second.dead)
    assert run(third, b"true").status == 0
    ways.disconnect()
    wait_until(lambda: third.dead)


def test_a_fresh_connection_retires_the_older_ones(sshd: Sshd, ways: SshTransport) -> None:
    target = target_for(sshd.options(), sshd.address(1))
    old = open_connection(ways, target)
    new = ways.connect(target, dial(target), lambda name: None)
    ways.keep(new, alone=True)
    wait_until(lambda: old.dead)
    assert ways.take(target) is new


def test_the_bound_closes_idle_connections_first_then_refuses(
    sshd: Sshd, ways: SshTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (26 + 3, hard))
    targets = [target_for(sshd.options(), sshd.address(n)) for n in (1, 2)]
    connections = []
    for target in targets:
        assert ways.reserve()
        connections.append(open_connection(ways, target))
    assert ways.take(targets[1]) is connections[1]
    assert ways.reserve()
    assert ways.reserve()  # for this one the idle connection goes
    wait_until(lambda: connections[0].dead)
    assert not ways.reserve()
    told = threading.Event()
    ways.when_room(told.set)
    assert not told.is_set()
    ways.unreserve()
    assert told.is_set()
    assert ways.reserve()
    again = threading.Event()
    ways.when_room(again.set)
    ways.give_back(connections[1])  # an idle one is room, too
    assert again.is_set()
    ways.when_room(told.set)
    assert run(connections[1], b"true").status == 0


def test_targets_out_of_reach_are_remembered_for_a_while(ways: SshTransport) -> None:
    target = Target(address="127.0.1.1")
    assert not ways.shunned(target, 0.0)
    ways.unreachable(target, 100.0)
    assert ways.shunned(target, 699.0)
    assert not ways.shunned(target, 700.0)


def test_a_target_that_was_reached_is_not_shunned(sshd: Sshd, ways: SshTransport) -> None:
    target = target_for(sshd.options(), sshd.address(1))
    ways.unreachable(target, 0.0)
    open_connection(ways, target)
    assert not ways.shunned(target, 1.0)


def test_close_all_ends_a_handshake_too(banner_server: BannerServerFactory, ways: SshTransport) -> None:
    game: list[bytes | float] = [b"SSH-2.0-mute\r\n", 60.0]
    address, port = banner_server(lambda: game).endpoint
    target = Target(address=address, port=port, user="nobody")
    entered = threading.Event()
    errors: list[BaseException] = []

    def connect() -> None:
        try:
            ways.connect(target, socket.create_connection((address, port)), lambda name: entered.set())
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    thread = threading.Thread(target=connect)
    thread.start()
    assert entered.wait(5)
    wait_until(lambda: bool(ways.pool._links))
    assert ways.close_all(5.0)
    thread.join(5)
    assert [type(error) for error in errors] == [HandshakeError]


def test_p16_a_forked_child_leaves_the_parents_connections_alone(sshd: Sshd) -> None:
    target = target_for(sshd.options(), sshd.address(1))
    ways = process_transport()
    connection = open_connection(ways, target)
    sink = RecordingSink()
    connection.prepare(Command(line=b"sleep 0.5; echo whole; exit 3"), sink).start()
    pid = os.fork()
    if pid == 0:
        # The child has none of it, and its end says nothing on the parent's sockets.
        clean = ways.take(target) is None and ways.statistics().open == 0 and not list(wire._wires)
        connection.close()
        os._exit(0 if clean else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert sink.wait().stdout == b"whole\n"
    assert sink.status == 3
    assert ways.close_all(5.0)


def test_nobody_polls_while_connections_rest(sshd: Sshd, ways: SshTransport) -> None:
    connections = [open_connection(ways, target_for(sshd.options(), sshd.address(n))) for n in range(1, 9)]
    (reader,) = (thread for thread in threading.enumerate() if thread.name == "ctask/reader")

    def wakes() -> int:
        with open(f"/proc/self/task/{reader.native_id}/status") as file:
            return sum(int(line.split()[1]) for line in file if "ctxt_switches" in line)

    # sshd announces its other host keys after the login; from then on there is silence.
    assert all(run(connection, b"true").status == 0 for connection in connections)
    before = wakes()
    threading.Event().wait(0.5)
    assert wakes() - before <= 8  # paramiko's own polls would make 40


def test_a_wire_takes_everything_and_blocks_nobody() -> None:
    here, there = socket.socketpair()
    line = Wire(here)
    data = os.urandom(900_000)
    assert line.send(data) == len(data)  # more than a socket holds
    assert not line.writable()
    assert not line.flush(1.0)
    received = bytearray()
    reader = threading.Thread(target=lambda: read_all(there, received, len(data) + 3))
    reader.start()
    assert line.flush()
    line.cork()
    line.send(b"a")
    line.send(b"b")
    assert not line.writable()
    line.uncork()
    line.send(b"c")
    reader.join(5)
    assert bytes(received) == data + b"abc"
    line.close()
    there.close()


def read_all(sock: socket.socket, into: bytearray, size: int) -> None:
    while len(into) < size:
        into += sock.recv(65_536)


def read(line: Wire, size: int) -> bytes:
    """As the thread that connects reads: wait until so many bytes are ahead, and take them."""
    while len(line.ahead) - line.at < size:
        line.fill()
    line.at += size
    return line.ahead[line.at - size : line.at]


def test_who_connects_sends_on_what_waits() -> None:
    here, there = socket.socketpair()
    line = Wire(here)
    data = bytes(900_000)
    line.send(data)
    received = bytearray()

    def peer() -> None:
        read_all(there, received, len(data))
        there.sendall(b"answer")  # only now: who reads below must have sent before

    thread = threading.Thread(target=peer)
    thread.start()
    assert read(line, 6) == b"answer"
    thread.join(5)
    line.close()
    there.close()


def test_a_wire_asks_for_room_while_something_waits() -> None:
    here, there = socket.socketpair()
    line = Wire(here)
    asked: list[bool] = []
    line.attend(asked.append)
    data = bytes(900_000)
    line.send(b"small")
    assert asked == []
    line.send(data)
    line.send(b"more")
    assert asked == [True]
    received = bytearray()
    reader = threading.Thread(target=lambda: read_all(there, received, len(data) + 9))
    reader.start()
    while asked != [True, False] and reader.is_alive():
        line.push()
    reader.join(5)
    assert bytes(received) == b"small" + data + b"more"
    line.close()
    there.close()


def test_a_node_that_asks_and_never_reads_is_left() -> None:
    here, there = socket.socketpair()
    line = Wire(here)
    small = bytes(50_000)
    with pytest.raises(OSError, match="does not read"):
        any(line.send(small) == 0 for _ in range(2 * BACKLOG_LIMIT // len(small)))
    with pytest.raises((EOFError, OSError)):
        line.fill()
    line.close()
    there.close()


def test_a_wire_reads_ahead_and_hands_on_when_it_runs_dry() -> None:
    here, there = socket.socketpair()
    line = Wire(here)
    flushed: list[str] = []

    class Marked:
        def flush_sink(self) -> None:
            flushed.append("flush")

    there.sendall(b"hello\r\nSSH-2.0-x\r\nabcdef")
    assert line.read_version() == b"SSH-2.0-x"
    assert read(line, 3) == b"abc"
    line.mark(Marked())
    there.sendall(b"ghi")
    assert line.fill_now()
    assert not line.fill_now()
    assert read(line, 6) == b"defghi"
    assert flushed == []
    line.dry()
    assert flushed == ["flush"]
    assert (line.ahead, line.received) == (b"", 3)
    there.close()
    with pytest.raises(EOFError):
        line.fill_now()
    line.close()
