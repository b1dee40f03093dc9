# SPDX-License-Identifier: Apache-2.0
"""What a program's own code does in our threads: log handlers, callbacks, keys, transports, errors that raise.

Each test lets one such thing raise all the time, and holds everything else to going on.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import ctask
from ctask import LocalResource, Outcome, Retry, SessionRefused, Task, TaskError, logs, task_self, transports
from ctask.testing import FakeTransport
from ctask.testing.fake import FakeConnection, FakeSession
from ctask_tests.fake_nodes import HANGS, nodes, says
from ctask_tests.fix_leaks import wait_until
from ctask_tests.fix_sshd import Sshd
from ctask_tests.real_nodes import task_of

SOON = 10.0


class Wild(Exception):
    """An exception that cannot even be looked at."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    __str__ = __repr__


def raises(*_: object, **__: object) -> Any:
    raise ValueError("of the program")


def leaves(*_: object, **__: object) -> Any:
    sys.exit("of the program")


def leaves_ours(*_: object) -> None:
    """In a thread of the program's own it is meant."""
    if threading.current_thread().name.startswith("ctask"):
        leaves()


class BadHandler(logging.Handler):
    def __init__(self, act: Callable[..., Any]) -> None:
        super().__init__(logging.DEBUG)
        self.act = act
        self.seen = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.seen += 1
        self.act(record)


# -- logging -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["handler", "handler that leaves", "filter", "filter of a handler", "record factory"])
def bad_logging(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Logging that raises for every record, in whichever part of it."""
    root, ours = logging.getLogger(), logging.getLogger("ctask.ssh")
    level = root.level
    root.setLevel(logging.DEBUG)
    factory = logging.getLogRecordFactory()
    handler: logging.Handler = logging.NullHandler(logging.DEBUG)
    match request.param:
        case "handler":
            handler = BadHandler(raises)
        case "handler that leaves":
            handler = BadHandler(leaves_ours)
        case "filter of a handler":
            handler.addFilter(raises)
        case "record factory":
            logging.setLogRecordFactory(raises)
    guarded = [logging.getLogger(name) for name in logs.NAMES] if request.param == "filter" else []
    for logger in guarded:
        logger.addFilter(raises)
    root.addHandler(handler)
    yield
    root.removeHandler(handler)
    for logger in guarded:
        logger.removeFilter(raises)
    logging.setLogRecordFactory(factory)
    root.setLevel(level)
    ours.debug("well again")


def test_logging_that_raises_breaks_nothing_on_real_nodes(bad_logging: None, sshd: Sshd) -> None:
    """Connections are made and lost, sessions ended, timeouts told: all of it is logged at DEBUG."""
    task = task_of(sshd)
    addresses = sshd.nodes(3)
    worker = task.run("echo fine", nodes=addresses, stdin=False)
    assert worker is not None
    assert worker.ok == worker.nodes
    again = task.run("echo fine", nodes=addresses, stdin=False, fresh=True)
    assert again is not None
    assert again.ok == again.nodes
    late = task.run("sleep 60", nodes=addresses, stdin=False, timeout=0.3)
    assert late is not None
    assert {result.outcome for result in late.results()} == {Outcome.TIMEOUT}
    wrong = task.run("true", nodes=addresses[:1], stdin=False, port=1, retry=Retry(2, wait=0))
    assert wrong is not None
    assert wrong.unreached == wrong.nodes
    local = task.run("echo local")
    assert local is not None
    assert local.ok == [local]


def test_logging_that_raises_breaks_no_waits(bad_logging: None) -> None:
    """What handlers, callbacks, policies and posts raise is logged in the midst of what must go on."""
    task = task_self()
    with FakeTransport(nodes(HANGS, quick=says(b"fine\n"))) as fake:
        worker = task.submit("x", nodes="quick,n[1-3]", on_done=raises)
        for future in worker:
            future.add_done_callback(raises)
        wait_until(lambda: sum(session.sent for session in fake.sessions) == 4)
        victim = worker.jobs[1]
        task._engine.dispatcher.post(victim, raises)
        assert isinstance(worker.futures[victim.node].exception(SOON), LocalResource)
        worker.abort()
        assert worker.wait(SOON)
        assert task.submit("x", nodes="quick").result("quick", SOON).ok
        with pytest.raises(TaskError):
            task.join(SOON)  # of the handler
        other = Task()
        doomed = other.submit("x", nodes="n[4-5]")
        other._engine.dispatcher.post(None, leaves)
        assert all(isinstance(future.exception(SOON), ctask.TaskFailed) for future in doomed)
        assert not task.failed


def test_a_handler_that_raises_is_told_of_on_stderr_unless_the_program_does_not_want_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log, bad = logging.getLogger("ctask.job"), BadHandler(raises)
    log.addHandler(bad)
    try:
        log.error("x")
        assert "ctask goes on" in (said := capsys.readouterr().err)
        assert "ValueError: of the program" in said
        monkeypatch.setattr(logging, "raiseExceptions", False)
        log.error("x")
        assert capsys.readouterr().err == ""
        monkeypatch.setattr(logging, "raiseExceptions", True)
        monkeypatch.setattr(sys, "stderr", None)
        log.error("x")
        assert bad.seen == 3
    finally:
        log.removeHandler(bad)


def test_records_name_the_line_that_logs(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("ctask.job").error("x %s", 1)
    assert caplog.records[-1].funcName == "test_records_name_the_line_that_logs"
    assert caplog.records[-1].getMessage() == "x 1"


def test_a_thread_of_the_program_s_may_be_ended_by_its_log_handler() -> None:
    log, bad = logging.getLogger("ctask.job"), BadHandler(leaves)
    log.addHandler(bad)
    try:
        with pytest.raises(SystemExit):
            log.error("x")
    finally:
        log.removeHandler(bad)


# -- callbacks -----------------------------------------------------------------------------------------------------


def test_a_done_callback_that_raises_keeps_no_other_from_being_called(caplog: pytest.LogCaptureFixture) -> None:
    bad = BadHandler(raises)
    standard = logging.getLogger("concurrent.futures")
    standard.addHandler(bad)
    called: list[str] = []
    try:
        with FakeTransport(nodes(HANGS)) as fake:
            worker = task_self().submit("x", nodes="n")
            future = worker.futures["n"]
            for _ in range(3):
                future.add_done_callback(raises)
                future.add_done_callback(lambda future: called.append(future.node))

            async def wait() -> Any:
                wrapped = asyncio.wrap_future(future)
                asyncio.get_running_loop().call_later(0.05, fake.sessions[0].end, None)
                await asyncio.wait_for(asyncio.wait([wrapped]), SOON)
                return wrapped.exception()

            wait_until(lambda: fake.sessions and fake.sessions[0].sent)
            asyncio.run(wait())
            future.add_done_callback(raises)
            future.add_done_callback(lambda future: called.append("late"))
    finally:
        standard.removeHandler(bad)
    assert called == ["n", "n", "n", "late"]
    assert "exception calling callback of the future of n" in caplog.text


def test_what_handlers_and_callbacks_are_cannot_break_their_telling(caplog: pytest.LogCaptureFixture) -> None:
    class Bad:
        def __call__(self, *args: object) -> None:
            raise Wild

        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("no such look")

        __repr__ = raises

    caplog.set_level(logging.CRITICAL + 1)
    task = task_self()
    with FakeTransport(nodes()):
        worker = task.shell("x", nodes="n[1-2]")
        worker.handlers.done = (Bad(), Bad())
        with pytest.raises(ctask.HandlerError) as raised:
            task.resume(SOON)
    assert [type(error) for error in raised.value.exceptions] == [Wild] * 4


@pytest.mark.parametrize("part", ["on", "wait", "attempts"])
@pytest.mark.parametrize("error", [ValueError("x"), Wild()], ids=["plain", "wild"])
def test_a_retry_policy_that_raises_is_no_retry(part: str, error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL + 1)

    def bad(_: object) -> Any:
        raise error

    given: dict[str, Any] = {part: bad}
    task = task_self()
    with FakeTransport(nodes(), refuse=lambda node, command: SessionRefused("no room")):
        worker = task.submit("x", nodes="n[1-3]", retry=Retry(**given))
        assert worker.wait(SOON)
    assert all(len(result.attempts) == 1 for result in worker.results())
    assert not task.failed


# -- values --------------------------------------------------------------------------------------------------------


class Key:
    """A key that behaves while it is submitted, and then no more."""

    def __init__(self) -> None:
        self.wild = False

    def _look(self) -> None:
        if self.wild:
            raise RuntimeError("of the key")

    def __hash__(self) -> int:
        self._look()
        return 7

    def __eq__(self, other: object) -> bool:
        self._look()
        return self is other

    def __repr__(self) -> str:
        self._look()
        return "key"


def test_a_key_that_raises_when_it_is_looked_at_is_no_matter_to_our_threads(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL + 1)
    task = task_self()
    keys = [Key() for _ in range(3)]
    workers = [task.shell("echo fine", key=key) for key in keys[:2]]
    workers.append(task.shell("exec sleep 60", key=keys[2]))
    futures = [next(iter(worker)) for worker in workers]
    for key in keys:
        key.wild = True
    for worker in workers:
        task._start(worker)
    task._roster.take_scheduled()
    assert futures[0].result(SOON).output == b"fine\n"
    assert futures[1].result(SOON).output == b"fine\n"
    workers[2].abort()
    assert isinstance(futures[2].exception(SOON), ctask.Aborted)
    for key in keys:
        key.wild = False


def test_destructors_that_raise_and_hooks_that_do_are_no_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The collector runs in whichever thread it comes up in: the dispatcher's and the reader's among them."""

    class Dies:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            raise ValueError("of a destructor")

    monkeypatch.setattr(sys, "unraisablehook", raises)
    monkeypatch.setattr(threading, "excepthook", raises)
    monkeypatch.setattr(warnings, "showwarning", raises)
    task = task_self()
    thresholds = gc.get_threshold()
    gc.set_threshold(20, 1, 1)
    try:
        with FakeTransport(nodes(says(b"fine\n"))):
            for _ in range(30):
                for _ in range(20):
                    Dies()
                worker = task.submit("x", nodes="n[1-5]")
                assert worker.wait(SOON)
                assert worker.ok == worker.nodes
    finally:
        gc.set_threshold(*thresholds)
        gc.collect()


def test_a_task_that_dies_by_an_error_that_cannot_be_looked_at_tells_everybody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Out(SystemExit):
        __repr__ = raises

    caplog.set_level(logging.CRITICAL + 1)
    task = task_self()
    with FakeTransport(nodes(HANGS)) as fake:
        worker = task.submit("x", nodes="n[1-3]")
        wait_until(lambda: len(fake.sessions) == 3)

        def out() -> None:
            raise Out

        task._engine.dispatcher.post(None, out)
        assert all(isinstance(future.exception(SOON), ctask.TaskFailed) for future in worker)
        wait_until(lambda: task.failed)
        with pytest.raises(TaskError, match="Out"):
            task.resume()


# -- transports ------------------------------------------------------------------------------------------------------


class Sick(FakeTransport):
    """A transport, connections and sessions with a part that raises."""

    def __init__(self, part: str) -> None:
        super().__init__(nodes(HANGS, quick=says(b"fine\n")))
        self.part = part

    def take(self, target: Any) -> FakeConnection:
        connection = super().take(target)
        if target.address.startswith("sick"):
            return SickConnection(self, target)
        return connection

    def give_back(self, connection: FakeConnection) -> None:
        if self.part == "give_back" and isinstance(connection, SickConnection):
            raise Wild
        super().give_back(connection)


class SickConnection(FakeConnection):
    """Raises in the part that its transport names."""

    def prepare(self, command: Any, sink: Any) -> FakeSession:
        part = self.transport.part  # type: ignore[attr-defined]
        if part == "prepare":
            raise Wild
        session = super().prepare(command, sink)
        if part in ("try_start", "drop", "close"):

            def bad(*_: object) -> Any:
                raise Wild

            setattr(session, part, bad)
        return session

    def end(self, *args: Any, **how: Any) -> Any:
        if self.transport.part == "end":  # type: ignore[attr-defined]
            raise Wild
        return super().end(*args, **how)

    def retire(self) -> None:
        if self.transport.part == "retire":  # type: ignore[attr-defined]
            raise Wild
        super().retire()


@pytest.mark.parametrize("part", ["prepare", "try_start", "drop", "close", "end", "retire", "give_back"])
@pytest.mark.parametrize("how", ["abort", "timeout", "quick", "death"])
def test_a_transport_of_the_program_s_that_raises_harms_its_own_nodes_only(
    part: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL + 1)
    task = task_self()
    task.set_info("stop_grace", 0)
    with Sick(part) as sick:
        sick.part = part
        timeout = 0.1 if how == "timeout" else None
        worker = task.submit("x", nodes="sick[1-2]", timeout=timeout)
        well = task.submit("x", nodes="quick")
        assert well.result("quick", SOON).ok
        if how == "quick":
            for session in list(sick.sessions):
                sick.finish(session, None)
            worker.abort()
        elif how == "abort":
            worker.abort()
        elif how == "death":
            task._engine.dispatcher.post(None, leaves)
        for future in worker:
            assert isinstance(future.exception(SOON), ctask.NodeError)
        assert task.failed == (how == "death") or how == "death"
        if how != "death":
            assert task.submit("x", nodes="quick").result("quick", SOON).ok
    assert transports.transport("ssh") is not sick
