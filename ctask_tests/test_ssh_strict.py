# SPDX-License-Identifier: Apache-2.0
"""What a hostile node sends: every message in every phase, lengths that are claims, floods, keys without end.

Runs in the thread of pytest; the hostile servers are in this process, the healthy node beside them is a real sshd.
"""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paramiko.ssh_exception import SSHException

from ctask import Outcome
from ctask.errors import HandshakeError, OptionError
from ctask.options import GROUP_EXCHANGE, KEX_ALGORITHMS, parse_option
from ctask.transports.ssh import SshTransport, messages
from ctask.transports.ssh import reader as reader_module
from ctask.transports.ssh.exchange import ALLOWED
from ctask.transports.ssh.fields import Fields, Malformed
from ctask.transports.ssh.packets import WirePacketizer
from ctask.transports.ssh.reader import Reader
from ctask.transports.ssh.transport import Link
from ctask.transports.ssh.wire import Wire
from ctask_tests.fix_hostile import Close, Eof, Out, Pause, Raw, Script, Status
from ctask_tests.fix_leaks import wait_until
from ctask_tests.hostile_process import hostile_process
from ctask_tests.sick_node import SICK, WELL, task_for
from ctask_tests.ssh_sink import connected, dial, run, target_for

if TYPE_CHECKING:
    from pathlib import Path

    from ctask import NodeResult, Task
    from ctask_tests.fix_hostile import HostileFactory, HostileServer
    from ctask_tests.fix_sshd import Sshd, SshdFactory

#: A string of which only the length is there, and that one is a claim.
CLAIM = struct.pack(">I", 1 << 20)
SERVICE_ACCEPT = b"\x06" + messages.string(b"ssh-userauth")
#: Two numbers of sessions: the first of a connection, and one that there never was.
FIRST, NEVER = struct.pack(">I", 0), struct.pack(">I", 77)


def reach(task: Task, server: HostileServer, name: str = SICK) -> None:
    task.node_options(name, **{**server.options(), "address": server.address})


def sick_and_well(sshd: Sshd, server: HostileServer, command: str = "echo ok") -> tuple[NodeResult, NodeResult]:
    """Run a command on the hostile node and on a healthy one; return both results."""
    task = task_for(sshd)
    reach(task, server)
    worker = task.run(command, nodes=[SICK, WELL], stdin=False, connect_timeout=5, timeout=5)
    found = {result.node: result for result in worker.results()}
    return found[SICK], found[WELL]


def is_for_people(text: str) -> bool:
    """Whether a text names nothing of Python, nor of the libraries below."""
    return text.isprintable() and not re.search(r"\w+Error\b|\bcodec\b|\b0x[0-9a-f]+\b|\bobject\b", text)


# -- every number in every phase -----------------------------------------------------------------------------------


@pytest.fixture
def link() -> Iterator[Link]:
    ours, theirs = socket.socketpair()
    with theirs:
        link = Link(Wire(ours), "SSH-2.0-x", "test", ("ssh-ed25519",))
        yield link
        link.abandon()


#: What is out of place and yet does no harm, and what is answered as unknown; all else that is not allowed ends it.
HARMLESS = {1, 2, 3, 4}
UNKNOWN = {*range(9, 20), *range(22, 30), *range(83, 90), *range(101, 256), 0}


@pytest.mark.parametrize("phase", sorted(ALLOWED))
def test_each_message_is_taken_in_its_phase_only(link: Link, phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    sent: list[int] = []
    link.phase = phase
    link.initial_kex_done = phase != "keys"
    link._handlers = {number: lambda payload: taken.append(payload[0]) for number in range(256)}
    monkeypatch.setattr(link.packetizer, "send_message", lambda message: sent.append(message.asbytes()[0]))
    link.packetizer.sequence = 5
    refused = {}
    for number in range(256):
        try:
            link._dispatch(bytes((number,)) + messages.u32(0) + bytes(64))
        except SSHException as error:
            refused[number] = str(error)
        except EOFError:
            assert number == 1
    assert set(taken) == ALLOWED[phase]
    assert all(map(is_for_people, refused.values()))
    assert set(refused) == set(range(256)) - ALLOWED[phase] - HARMLESS - UNKNOWN
    assert sent == [3] * len(UNKNOWN), "each unknown one is answered, and nothing else"


def test_in_a_key_exchange_nothing_but_its_own_is_taken(link: Link) -> None:
    link.initial_kex_done = True
    for number in set(range(256)) - HARMLESS - {31}:
        link.phase = "open"
        link._expected_packet = (31,)
        with pytest.raises(SSHException):
            link._dispatch(bytes((number,)) + bytes(64))


@pytest.mark.parametrize(
    ("moment", "payload"),
    [
        ("open", SERVICE_ACCEPT),
        ("open", b"\x34"),
        ("open", b"\x33" + messages.string(b"publickey") + b"\0"),
        ("open", b"\x35" + messages.string(b"hello") * 2),
        ("open", b"\x15"),
        ("open", b"\x1f" + bytes(100)),
        ("login", b"\x5b" + bytes(16)),
        ("login", SERVICE_ACCEPT),
        ("login", b"\x3c" + messages.string(b"ssh-ed25519") * 2),
        ("service", b"\x34"),
        ("service", b"\x5e" + FIRST + messages.string(b"x")),
        ("keys", b"\x07" + messages.u32(0)),
        ("keys", b"\x34"),
    ],
)
def test_what_comes_out_of_its_phase_ends_the_connection(
    sshd: Sshd, hostile: HostileFactory, moment: str, payload: bytes
) -> None:
    server = hostile(Script(raw=((moment, Raw(payload, 3)),)))
    sick, well = sick_and_well(sshd, server)
    assert not sick.ok
    assert f"message {payload[0]}, " in sick.why
    assert "may not come" in sick.why
    assert well.ok
    assert len(server.seen.auths) == (1 if moment in ("open", "login") else 0), "one signature, whatever it asks for"
    assert server.seen.commands == []


# -- claims --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["service", "open"])
def test_extensions_without_end_cost_nothing(sshd: Sshd, hostile: HostileFactory, moment: str) -> None:
    server = hostile(Script(raw=((moment, Raw(b"\x07\xff\xff\xff\xff")),)))
    sick, well = sick_and_well(sshd, server)
    assert well.ok
    if moment == "service":
        assert (sick.outcome, sick.phase) == (Outcome.UNREACHED, "auth")
        assert "4294967295 extensions" in sick.why
    else:
        assert sick.ok, "after the login they are not read"


#: message → one whose fields are not there, or are claimed; the moment at which it is sent
CLAIMS = {
    "global request": ("open", b"\x50" + CLAIM),
    "global request, no answer wanted?": ("open", b"\x50" + messages.string(b"x")),
    "open": ("open", b"\x5a" + CLAIM),
    "open without numbers": ("open", b"\x5a" + messages.string(b"x11") + FIRST),
    "opened": ("open", b"\x5b" + FIRST + FIRST),
    "open failed": ("open", b"\x5c" + FIRST + FIRST + CLAIM),
    "request": ("run", b"\x62" + FIRST + CLAIM),
    "request without a wish": ("run", b"\x62" + FIRST + messages.string(b"x")),
    "exit-status without a number": ("run", b"\x62" + FIRST + messages.string(b"exit-status") + b"\0"),
    "exit-status cut short": ("run", b"\x62" + FIRST + messages.string(b"exit-status") + b"\0\0\0"),
    "exit-signal without a name": ("run", b"\x62" + FIRST + messages.string(b"exit-signal") + b"\0"),
    "exit-signal without words": (
        "run",
        b"\x62" + FIRST + messages.string(b"exit-signal") + b"\0" + messages.string(b"TERM") + b"\0",
    ),
    "data": ("run", b"\x5e" + FIRST + CLAIM),
    "data without a length": ("run", b"\x5e" + FIRST),
    "error output without a length": ("run", b"\x5f" + FIRST + messages.u32(1)),
    "window": ("run", b"\x5d" + FIRST + b"\0\0"),
    "end of output of no session": ("run", b"\x60"),
    "end of output of half a number": ("run", b"\x60\0\0"),
    "close of no session": ("run", b"\x61"),
    "debug": ("open", b"\x04\0" + CLAIM),
    "refused login": ("login", b"\x33" + CLAIM),
    "refused login without a reason": ("login", b"\x33" + messages.string(b"publickey")),
}


@pytest.mark.parametrize("name", sorted(CLAIMS))
def test_a_field_that_is_not_there_ends_the_connection(sshd: Sshd, hostile: HostileFactory, name: str) -> None:
    moment, payload = CLAIMS[name]
    if moment == "run":
        server = hostile(Script(steps=(Raw(payload, 50), Status(0), Eof(), Close())))
    else:
        server = hostile(Script(raw=((moment, Raw(payload, 50)),)))
    sick, well = sick_and_well(sshd, server)
    assert well.ok
    assert not sick.ok
    assert sick.rc in (None, 255), "no success is made up"
    assert "cannot be read" in sick.why
    assert is_for_people(sick.why)


def test_what_is_not_utf8_is_told_in_words(sshd: Sshd, hostile: HostileFactory) -> None:
    lists = b"\x14" + bytes(16) + messages.string(b"curve\xff\xfe") + messages.string(b"x") * 9 + b"\0" + bytes(4)
    for moment, payload in (
        ("keys", lists),
        ("service", b"\x07" + messages.u32(1) + messages.string(b"\xff\xfe") * 2),
        ("login", b"\x33" + messages.string(b"\xff\xfe,publickey") + b"\0"),
        ("open", b"\x50" + messages.string(b"\xff\xfe") + b"\1"),
        ("open", b"\x01" + messages.u32(2) + messages.string(b"\xff\xfe bye") + messages.string(b"\xff")),
    ):
        server = hostile(Script(raw=((moment, Raw(payload)),)))
        sick, well = sick_and_well(sshd, server)
        assert well.ok
        assert sick.ok or is_for_people(sick.why), sick.why


def test_requests_of_the_node_are_answered_and_do_no_harm(sshd: Sshd, hostile: HostileFactory) -> None:
    noise = (
        Raw(b"\x50" + messages.string(b"hostkeys-00@openssh.com") + b"\0" + messages.string(b"key"), 3),
        Raw(b"\x50" + messages.string(b"keepalive@openssh.com") + b"\1", 3),
        Raw(b"\x5a" + messages.string(b"x11") + messages.u32(9) * 3, 3),
        Raw(b"\x51", 3),
        Raw(b"\x52", 3),
        Raw(b"\x02" + messages.string(b"x"), 3),
        Raw(b"\x03" + messages.u32(7), 3),
        Raw(b"\xc0anything", 3),
        Raw(b"\x07" + messages.u32(0), 3),
    )
    steps = (Out(b"well\n"), Status(3), Eof(), Close())
    server = hostile(Script(raw=tuple(("open", raw) for raw in noise), steps=steps))
    sick, well = sick_and_well(sshd, server)
    assert (sick.outcome, sick.rc, bytes(sick.stdout)) == (Outcome.EXITED, 3, b"well\n")
    assert well.ok


def test_what_is_ignored_leaves_a_debug_line(
    sshd: Sshd, hostile: HostileFactory, caplog: pytest.LogCaptureFixture
) -> None:
    server = hostile(Script(raw=(("open", Raw(b"\x51", 100)), ("open", Raw(b"\x07" + messages.u32(0))))))
    with caplog.at_level("DEBUG", logger="ctask.ssh"):
        sick, _ = sick_and_well(sshd, server)
    assert sick.ok
    lines = [record.getMessage() for record in caplog.records if "ignored from the node" in record.getMessage()]
    assert 10 < len(lines) <= 20, "each, and no flood of them"
    assert all("answer to no question" in line for line in lines)


def test_a_log_handler_that_raises_ends_no_connection(sshd: Sshd, hostile: HostileFactory) -> None:
    import logging

    class Raises(logging.Handler):
        def handle(self, record: logging.LogRecord) -> bool:
            raise ZeroDivisionError("in a log handler")

    server = hostile(Script(raw=(("open", Raw(b"\x51", 5)),)))
    logger = logging.getLogger("ctask.ssh")
    handler = Raises()
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        sick, well = sick_and_well(sshd, server)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    assert sick.ok
    assert well.ok


# -- key exchange --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        "curve25519-sha256",
        "curve25519-sha256@libssh.org",
        "ecdh-sha2-nistp256",
        "ecdh-sha2-nistp521",
        "diffie-hellman-group14-sha256",
        "diffie-hellman-group16-sha512",
    ],
)
def test_servers_with_one_method_are_reached(
    sshd_factory: SshdFactory, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    # Changed keys as well, which another thread computes.
    monkeypatch.setattr(WirePacketizer, "REKEY_BYTES", 200_000)
    server = sshd_factory(f"KexAlgorithms {method}")
    with connected(target_for(server.options(), server.address(1))) as connection:
        assert run(connection, b"head -c 1000000 /dev/zero; exit 3").status == 3
        assert run(connection, b"exit 4").status == 4


def test_macs_are_nothing_to_a_cipher_that_has_its_own(sshd_factory: SshdFactory) -> None:
    server = sshd_factory("MACs umac-128-etm@openssh.com", "Ciphers aes256-gcm@openssh.com")
    with connected(target_for(server.options(), server.address(1))) as connection:
        assert run(connection, b"exit 4").status == 4
    server = sshd_factory("MACs umac-128-etm@openssh.com", "Ciphers aes256-ctr")
    with pytest.raises(HandshakeError, match=r"no common MAC: the server has umac-128-etm@openssh\.com; ctask has h"):
        connect(server)


def connect(server: Any) -> None:
    target = target_for(server.options(), server.address(1))
    SshTransport().connect(target, dial(target), lambda name: None)


def test_a_group_of_the_servers_choice_is_not_taken_unasked(sshd_factory: SshdFactory) -> None:
    server = sshd_factory("KexAlgorithms diffie-hellman-group-exchange-sha256")
    with pytest.raises(HandshakeError, match="no common key exchange algorithm: the server has diffie-hellman-group-e"):
        connect(server)


def test_a_group_of_the_servers_choice_is_taken_where_it_is_allowed(
    sshd_factory: SshdFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WirePacketizer, "REKEY_BYTES", 400_000)
    server = sshd_factory(f"KexAlgorithms {GROUP_EXCHANGE}")
    target = target_for(server.options(), server.address(1), kex_algorithms=(*KEX_ALGORITHMS, GROUP_EXCHANGE))
    with connected(target) as connection:
        assert run(connection, b"head -c 1000000 /dev/zero; exit 3").status == 3


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("+" + GROUP_EXCHANGE, (*KEX_ALGORITHMS, GROUP_EXCHANGE)),
        ("^diffie-hellman-group14-sha256", (KEX_ALGORITHMS[-1], *KEX_ALGORITHMS[:-1])),
        ("-ecdh-*,mlkem*", tuple(name for name in KEX_ALGORITHMS if not name.startswith(("ecdh", "mlkem")))),
        ("sntrup761x25519-sha512,curve25519-sha256", ("curve25519-sha256",)),
        (["curve25519-sha256", "ecdh-sha2-nistp256"], ("curve25519-sha256", "ecdh-sha2-nistp256")),
    ],
)
def test_the_methods_are_named_as_in_ssh_config(text: str, wanted: tuple[str, ...]) -> None:
    assert parse_option("kex_algorithms", text) == ("kex_algorithms", wanted)


@pytest.mark.parametrize("text", ["", "+", "none", "-*", "diffie-hellman-group1-sha1", 3, [3], None])
def test_no_method_at_all_is_refused(text: object) -> None:
    with pytest.raises(OptionError, match="kex_algorithms"):
        parse_option("kex_algorithms", text)


@pytest.mark.parametrize("host_key", ["ed25519", "ecdsa", "rsa"])
def test_each_type_of_host_key_is_verified(sshd_factory: SshdFactory, host_key: str) -> None:
    server = sshd_factory(host_keys=(host_key,))
    with connected(target_for(server.options(), server.address(1))) as connection:
        assert run(connection, b"exit 4").status == 4


def test_a_node_that_asks_for_keys_without_end_waits(sshd: Sshd, hostile: HostileFactory) -> None:
    server = hostile(Script(rekeys=1_000, steps=(Pause(1.5), Status(0), Eof(), Close())))
    task = task_for(sshd)
    reach(task, server)
    worker = task.submit("x", nodes=SICK, stdin=False, connect_timeout=5, timeout=1)
    for _ in range(5):
        assert task.run("true", nodes=WELL, timeout=5).exit_code() == 0
    worker.abort()
    assert worker.wait(10)
    # The first, those that it has ahead, and the one that is under way.
    assert 1 < server.seen.keys <= 11


def test_keys_again_and_again_before_the_login_end_it(sshd: Sshd, hostile: HostileFactory) -> None:
    lists = b"\x14" + bytes(16) + messages.string(b"curve25519-sha256") + messages.string(b"ssh-ed25519")
    lists += messages.string(b"aes128-gcm@openssh.com") * 2 + messages.string(b"hmac-sha2-256") * 2
    lists += messages.string(b"none") * 2 + messages.string(b"") * 2 + bytes(5)
    server = hostile(Script(raw=(("login", Raw(lists)),)))
    sick, well = sick_and_well(sshd, server)
    assert well.ok
    assert (sick.outcome, sick.phase) == (Outcome.UNREACHED, "auth")


def test_answers_that_wait_for_new_keys_are_bounded(
    sshd: Sshd, hostile: HostileFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The node asks and asks, each time for an answer, and never answers our own request for new keys.
    monkeypatch.setattr(WirePacketizer, "REKEY_PACKETS", 20)
    ask = Raw(b"\x50" + messages.string(b"keepalive@openssh.com") + b"\1", 100_000)
    server = hostile(Script(steps=(ask,), rekeys=-1))
    task = task_for(sshd)
    reach(task, server)
    (result,) = task.run("x", nodes=SICK, stdin=False, connect_timeout=5, timeout=20).results()
    assert result.outcome is Outcome.LOST
    assert "say too much" in result.why


# -- the reader ----------------------------------------------------------------------------------------------------


class _Flood:
    """A connection that has always more to be taken, or a healthy one that says one thing at a time."""

    def __init__(self, log: list[str], name: str, *, endless: bool) -> None:
        self.here, self.there = socket.socketpair()
        self.log, self.name, self.endless = log, name, endless
        self.over = False

    def adopted(self, reader: Reader) -> None:
        pass

    def readable(self) -> bool:
        if not self.over and (self.endless or self.here.recv(1)):
            self.log.append(self.name)
        return self.endless and not self.over

    def writable(self) -> None:
        pass

    def hung_up(self) -> None:
        pass

    def abandon(self) -> None:
        pass


def test_a_node_waits_for_one_turn_of_a_flood_however_many_flood() -> None:
    log: list[str] = []
    floods = [_Flood(log, f"flood{number}", endless=True) for number in range(32)]
    healthy = _Flood(log, "healthy", endless=False)
    reader = Reader()
    for link in (*floods, healthy):
        reader.add(link.here.fileno(), link)
    for flood in floods:
        flood.there.send(b"x")
    wait_until(lambda: len(set(log)) == 32, what="a turn of each flood")
    until = time.monotonic() + 10
    for _ in range(20):
        before = len(log)
        healthy.there.send(b"x")
        while "healthy" not in log[before:]:
            assert time.monotonic() < until, "it has no turn"
            time.sleep(0.001)
    for flood in floods:
        flood.over = True
    turns = "".join("." if name == "healthy" else "f" for name in log)
    assert reader.close()
    for link in (*floods, healthy):
        link.here.close()
        link.there.close()
    assert turns.count(".") == 20
    # Among themselves they take turns.
    counts = [log.count(flood.name) for flood in floods]
    assert max(counts) - min(counts) <= 2


def test_closing_does_not_wait_for_a_thread_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "_LAST_TURN", 0.1)
    log: list[str] = []
    held = threading.Event()
    free = threading.Event()

    class Stuck(_Flood):
        def readable(self) -> bool:
            held.set()
            free.wait(10)
            return False

    link = Stuck(log, "stuck", endless=False)
    reader = Reader()
    reader.add(link.here.fileno(), link)
    link.there.send(b"x")
    assert held.wait(5)
    assert not reader.close()
    free.set()
    reader._thread.join(5)
    assert not reader._thread.is_alive()
    reader.abandon()
    link.here.close()
    link.there.close()


TINY = {
    "ignore": b"\x02" + messages.string(b""),
    "debug": b"\x04\0" + messages.string(b"") * 2,
    "request": b"\x50" + messages.string(b"x") + b"\1",
    "unknown": b"\xc0",
    "unimplemented": b"\x03" + messages.u32(1),
    "over": b"\x60" + FIRST,
    "window": b"\x5d" + FIRST + messages.u32(1),
    "nothing": b"\x5e" + FIRST + messages.string(b""),
    "session's request": b"\x62" + FIRST + messages.string(b"x") + b"\0",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TINY))
def test_beside_a_flood_of_tiny_packets_others_pass(sshd: Sshd, tmp_path: Path, name: str) -> None:
    task = task_for(sshd)
    script = Script(steps=(Out(b"begun\n"), Raw(TINY[name], 100_000_000)))
    with hostile_process(tmp_path, script) as options:
        task.node_options(SICK, **options)
        begun = threading.Event()
        flood = task.submit("x", nodes=SICK, stdin=False, on_read=lambda *_: begun.set())
        wait_until(lambda: flood.wait(0.01) or begun.is_set(), what="the flood")
        for _ in range(3):
            well = task.submit("true", nodes=WELL, stdin=False, timeout=5, connect_timeout=5, fresh=True)
            assert well.wait(10)
            assert well.exit_code() == 0, well.failures()
        assert not flood.futures[SICK].done(), "it is a flood all the time"
        flood.abort()
        assert flood.wait(10)


# -- fields --------------------------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=50)), st.integers(0, 2**32 - 1), st.booleans(), st.binary(max_size=20))
def test_fields_are_what_was_packed(strings: list[bytes], number: int, truth: bool, rest: bytes) -> None:
    data = b"\x63" + b"".join(map(messages.string, strings)) + messages.u32(number) + bytes((truth,)) + rest
    fields = Fields(data, "x")
    assert [fields.string() for _ in strings] == strings
    assert (fields.u32(), fields.boolean()) == (number, truth)
    assert fields.so_far() + rest == data


KINDS = st.lists(st.sampled_from(["u32", "boolean", "string", "names", "number", "skip_string"]))


@given(st.binary(max_size=40), KINDS)
def test_any_bytes_are_fields_or_malformed(data: bytes, asked: list[str]) -> None:
    fields = Fields(data, "x", 0)
    text = "well"
    try:
        taken = [getattr(fields, name)() for name in asked]
    except Malformed as error:
        text = str(error)
    else:
        assert len(taken) == len(asked)
    assert is_for_people(text)


@given(st.integers(0, 1 << 600))
def test_numbers_are_what_was_packed(number: int) -> None:
    assert Fields(messages.mpint(number), "x", 0).number() == number
