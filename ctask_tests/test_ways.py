# SPDX-License-Identifier: Apache-2.0
"""Transports as the engine sees them: what they lack, what they have no room for, what a program registers.

Runs in the thread of pytest, which owns the task.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ctask import (
    ConnectError,
    ConnectionLost,
    LocalResource,
    NodeError,
    OptionError,
    Outcome,
    Retry,
    SessionRefused,
    Task,
    task_self,
    transports,
)
from ctask.options import DEFAULT_IDENTITIES, DEFAULT_KNOWN_HOSTS, Command, Target
from ctask.testing import FakeTransport, Step
from ctask.testing.fake import FakeConnection
from ctask_tests.fake_nodes import HANGS, nodes, says
from ctask_tests.fix_leaks import wait_until

#: What takes no longer, where nothing hangs.
SOON = 5.0


@pytest.fixture
def task() -> Task:
    return task_self()


@pytest.fixture
def dialed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What the watcher is asked to dial: in the tests of this file nothing may be."""
    asked: list[Any] = []

    class Watcher:
        def dial(self, *args: object) -> None:
            asked.append(args)
            raise AssertionError("a socket was opened")

    monkeypatch.setattr("ctask.making.watcher", Watcher)
    yield asked
    assert asked == []


# -- options that a way does not have -------------------------------------------------------------------------------


def fresh_call(task: Task) -> Any:
    return task.submit("echo fine", fresh=True)


def fresh_task(task: Task) -> Any:
    task.set_info("fresh", True)
    return task.submit("echo fine")


def fresh_per_node(task: Task) -> Any:
    return task.submit("echo fine %h", nodes="n[1-3]", transport="local", fresh=True)


def fresh_of_one_node(task: Task) -> Any:
    task.node_options("n2", fresh=True, transport="local")
    task.node_options("n[1,3]", transport="local")
    return task.submit("echo fine %h", nodes="n[1-3]")


def fresh_again(task: Task) -> Any:
    return task.submit("false", fresh=True, retry=Retry(3, wait=0, exit_codes=1, idempotent=True))


@pytest.mark.parametrize("way", [fresh_call, fresh_task, fresh_per_node, fresh_of_one_node, fresh_again])
def test_a_local_command_is_fresh_in_any_case(task: Task, way: Callable[[Task], Any]) -> None:
    worker = way(task)
    behind = task.submit("true")
    assert worker.wait(SOON)
    assert behind.wait(SOON)
    assert behind.ok == [behind]
    for result in worker.results():
        assert result.outcome is Outcome.EXITED
        assert len(result.attempts) == (3 if way is fresh_again else 1)


def test_local_commands_take_options_that_are_about_connections(task: Task) -> None:
    options: dict[str, Any] = {"fresh": True, "keep": 0, "port": 1, "user": "nobody", "stop_by": "signal"}
    worker = task.submit("echo %h", nodes="n[1-2]", transport="local", **options)
    assert worker.wait(SOON)
    assert sorted(result.output for result in worker.results()) == [b"n1\n", b"n2\n"]


FAKES: dict[str, dict[str, Any]] = {
    "fresh": {"fresh": True},
    "keep": {"keep": 0, "alive_interval": 0.01},
    "fresh and a retry": {"fresh": True, "retry": Retry(3, wait=0)},
    "a port": {"port": 1, "user": "nobody", "host_key_policy": "insecure-ignore"},
}


@pytest.mark.parametrize("options", FAKES.values(), ids=FAKES)
def test_a_fake_node_is_never_dialed_whatever_the_options(
    task: Task, dialed: list[Any], options: dict[str, Any]
) -> None:
    with FakeTransport(nodes()) as fake:
        for _ in range(2):
            worker = task.submit("x", nodes="n[1-3]", **options)
            assert worker.wait(SOON)
            assert worker.ok == worker.nodes
        assert len(fake.sessions) == 6


@pytest.mark.parametrize(
    "error", [ConnectionLost(), SessionRefused("no room"), ConnectError("no"), NodeError("no")], ids=lambda e: e.reason
)
@pytest.mark.parametrize("tries", [1, 3])
def test_a_fake_node_that_refuses_is_never_dialed(
    task: Task, dialed: list[Any], error: NodeError, tries: int
) -> None:
    retry = Retry(tries, wait=0, on=NodeError) if tries > 1 else None
    with FakeTransport(nodes(), refuse=lambda node, command: error) as fake:
        worker = task.submit("x", nodes="n[1-2]", retry=retry, fresh=True)
        assert worker.wait(SOON)
        assert len(fake.sessions) == 2 * tries, "asked once for each try"
    for result in worker.results():
        assert result.outcome is Outcome.UNREACHED
        assert type(result.error) is type(error)
        assert result.error.node == result.node, "each has an error of its own"
        assert len(result.attempts) == tries


def test_a_fake_node_that_loses_its_connection_is_never_dialed(task: Task, dialed: list[Any]) -> None:
    lost = [Step("running"), Step("lost", error=ConnectionLost())]
    with FakeTransport(nodes(lost)):
        worker = task.submit("x", nodes="n[1-2]", retry=Retry(2, wait=0, on=ConnectionLost, idempotent=True))
        assert worker.wait(SOON)
    errors = [result.error for result in worker.results()]
    assert [error.node for error in errors if error is not None] == ["n1", "n2"]


def test_what_begins_after_a_fake_transport_was_left_is_told_and_not_dialed(task: Task, dialed: list[Any]) -> None:
    with FakeTransport(nodes()):
        worker = task.shell("x", nodes="n[1-2]")
    task.resume(SOON)
    assert {result.outcome for result in worker.results()} == {Outcome.UNREACHED}
    assert all("left" in result.why for result in worker.results())


def test_fake_transports_within_each_other_stand_until_each_is_left(task: Task, dialed: list[Any]) -> None:
    outer, inner = FakeTransport(nodes(says(b"outer"))), FakeTransport(nodes(says(b"inner")))
    said = []

    def ask() -> None:
        said.append(task.submit("x", nodes="n").result("n", SOON).output)

    outer.__enter__()
    ask()
    inner.__enter__()
    ask()
    outer.__exit__(None, None, None)  # not in the order of a `with`, as fixtures may
    ask()
    inner.__exit__(None, None, None)
    assert said == [b"outer", b"inner", b"inner"]
    with outer.__class__(nodes(says(b"a"))):
        with FakeTransport(nodes(says(b"b"))):
            ask()
        ask()
    assert said[3:] == [b"b", b"a"]


def test_a_script_that_raises_ends_its_own_node_only(task: Task, caplog: pytest.LogCaptureFixture) -> None:
    def script(node: str, command: Command) -> Any:
        if node == "n1":
            raise KeyError("no such node in the script")
        if node == "n2":
            return [Step("running"), Step("call", call=lambda: 1 / 0)]
        return says(b"fine")

    def refuse(node: str, command: Command) -> NodeError | None:
        if node == "n3":
            raise ValueError("nor here")
        return None

    with FakeTransport(script, refuse=refuse):
        worker = task.submit("x", nodes="n[1-4]")
        assert worker.wait(SOON)
    found = {result.node: result for result in worker.results()}
    assert found.pop("n4").ok
    assert all(isinstance(result.error, LocalResource) for result in found.values())
    assert "no such node in the script" in found["n1"].why
    assert "ZeroDivisionError" in found["n2"].why
    assert "nor here" in found["n3"].why
    assert "no such node in the script" in caplog.text


# -- room -----------------------------------------------------------------------------------------------------------


class Narrow(FakeTransport):
    """Has places for so many commands; says what it is asked, and may lie about its room."""

    def __init__(self, places: int, *, lies: bool = False) -> None:
        super().__init__(nodes(HANGS, **dict.fromkeys(("quick", *(f"q{n}" for n in range(20))), says(b"fine\n"))))
        self.places = places
        self.lies = lies
        self.asked = 0
        self.waiters: list[Callable[[], None]] = []

    def take(self, target: Any) -> FakeConnection | None:  # type: ignore[override]
        self.asked += 1
        if not self.places:
            return None
        self.places -= 1
        return super().take(target)

    def give_back(self, connection: FakeConnection) -> None:
        super().give_back(connection)
        self.places += 1
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            waiter()

    def when_room(self, call: Callable[[], None]) -> None:
        if self.lies:
            call()
        else:
            self.waiters.append(call)


def open_up(narrow: Narrow, task: Task, places: int) -> None:
    """Make places, as the transport would: in the dispatcher."""

    def more() -> None:
        narrow.places += places
        waiters, narrow.waiters = narrow.waiters, []
        for waiter in waiters:
            waiter()

    task._engine.dispatcher.post(None, more)


@pytest.mark.parametrize("lies", [False, True])
def test_a_way_without_room_holds_up_no_other_and_costs_nothing(
    task: Task, dialed: list[Any], caplog: pytest.LogCaptureFixture, lies: bool
) -> None:
    caplog.set_level("WARNING")
    with Narrow(0, lies=lies) as narrow:
        waits = task.submit("x", nodes="quick")
        wait_until(lambda: narrow.asked)
        local = task.submit("echo fine")
        assert local.wait(SOON)
        asked = narrow.asked
        time.sleep(0.3)  # a spin would ask some 10,000 times
        assert narrow.asked - asked < 20
        assert not waits.done()
        assert "ulimit" not in caplog.text, "what this transport has no room for, nobody here knows"
        open_up(narrow, task, 1)
        assert waits.wait(SOON)
        assert waits.ok == waits.nodes


def test_places_that_come_one_by_one_are_all_used(task: Task, dialed: list[Any]) -> None:
    with Narrow(2) as narrow:
        worker = task.submit("x", nodes="q[0-19]")
        assert worker.wait(SOON)
        assert worker.ok == worker.nodes
        assert narrow.places == 2


@pytest.mark.parametrize("part", ["take", "when_room"])
def test_a_transport_that_raises_ends_its_own_jobs_only(
    task: Task, dialed: list[Any], monkeypatch: pytest.MonkeyPatch, part: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Narrow(0) as narrow:
        def broken(*_: object) -> Any:
            raise RuntimeError("of the transport")

        monkeypatch.setattr(narrow, part, broken)
        worker = task.submit("x", nodes="n")
        local = task.submit("true")
        assert local.wait(SOON)
        if part == "take":
            assert worker.wait(SOON)
            assert isinstance(worker.futures["n"].exception(), LocalResource)
        else:
            worker.abort()
            assert worker.wait(SOON)
        assert "of the transport" in caplog.text
        assert not task.failed


# -- what a program registers ---------------------------------------------------------------------------------------


@pytest.fixture
def own() -> Iterator[FakeTransport]:
    """A transport under a name of its own."""
    fake = FakeTransport(nodes(HANGS, quick=says(b"by another way\n")))
    fake._thread.start()
    transports.register("own", fake)
    yield fake
    transports.register("own", None)
    with fake._changed:
        fake._stopped = True
        fake._changed.notify()
    fake._thread.join()


def test_a_registered_transport_can_be_named(task: Task, own: FakeTransport) -> None:
    assert task.submit("x", nodes="quick", transport="own").result("quick", SOON).output == b"by another way\n"
    task.node_options("quick", transport="own")
    assert task.submit("x", nodes="quick").result("quick", SOON).ok
    other = Task()
    other.set_info("transport", "own")
    assert other.submit("x", nodes="quick").result("quick", SOON).ok
    other.close()
    assert len(own.sessions) == 3


def test_a_name_that_is_none_is_refused_and_never_another_way(task: Task, own: FakeTransport) -> None:
    task.set_info("transport", "own")
    transports.register("own", None)
    with pytest.raises(OptionError, match="own"):
        task.submit("x", nodes="quick")
    for name in ("own", "shh", "", "SSH", None, 1):
        with pytest.raises(OptionError, match="one of local, ssh"):
            task.submit("x", nodes="quick", transport=name)
    with pytest.raises(OptionError, match="no transport 'shh'"):
        transports.transport("shh")


def test_a_job_keeps_the_transport_that_it_was_submitted_to(task: Task, own: FakeTransport) -> None:
    worker = task.submit("x", nodes="n1", transport="own")
    wait_until(lambda: own.sessions and own.sessions[0].sent)
    transports.register("own", None)
    worker.abort()
    assert worker.wait(SOON)
    assert next(iter(own._connections.values())).places == 0


#: For each field of a target a value of an option that sets it, and another.
FIELDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "transport": ({"transport": "own"}, {"transport": "ssh"}),
    "port": ({"port": 22}, {"port": 23}),
    "user": ({"user": "a"}, {"user": "b"}),
    "identities": ({"identity": "/a"}, {"identity": "/b"}),
    "named_identities": ({}, {"identity": DEFAULT_IDENTITIES}),
    "known_hosts": ({"known_hosts": "/a"}, {"known_hosts": "/b"}),
    "named_known_hosts": ({}, {"known_hosts": DEFAULT_KNOWN_HOSTS}),
    "host_key_policy": ({"host_key_policy": "verify"}, {"host_key_policy": "accept-new"}),
    "kex_algorithms": ({}, {"kex_algorithms": "curve25519-sha256"}),
    "keep": ({"keep": 1}, {"keep": 2}),
    "alive_interval": ({"alive_interval": 1}, {"alive_interval": None}),
}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Target) if field.name != "address"])
def test_targets_that_differ_in_anything_but_their_address_are_checked_each(
    task: Task, own: FakeTransport, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    checked: list[Target] = []
    one, other = FIELDS[field]
    task.node_options("n[1,3]", **one)
    task.node_options("n[2,4]", **other)
    with FakeTransport(nodes()) as fake:
        for way in (fake, own):
            monkeypatch.setattr(way, "check", checked.append)
        task.shell("x", nodes="n[1-4]")
    assert [target.address for target in checked] == ["n1", "n2"]
    assert getattr(checked[0], field) != getattr(checked[1], field)


def test_a_named_key_that_does_not_exist_is_refused_beside_a_node_that_names_none(task: Task) -> None:
    task.node_options("n2", identity=DEFAULT_IDENTITIES)
    with pytest.raises(OptionError, match="id_rsa does not exist"):
        task.submit("x", nodes="n[1-2]")
    task.node_options("n4", known_hosts=[*DEFAULT_KNOWN_HOSTS[:-1], "/nowhere"])
    with pytest.raises(OptionError, match="/nowhere"):
        task.submit("x", nodes="n[3-4]")


@pytest.mark.parametrize("made", [object(), 1, "ssh", threading], ids=["object", "int", "str", "module"])
def test_what_is_no_transport_is_not_registered(made: object) -> None:
    with pytest.raises(OptionError, match="no transport: it lacks dials, check"):
        transports.register("mine", made)
    with pytest.raises(OptionError):
        transports.transport("mine")
