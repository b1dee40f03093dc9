# SPDX-License-Identifier: Apache-2.0
"""What cannot be right is refused in the caller's thread, before anything is sent, in words that say what to do."""

from __future__ import annotations

import math
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctask import (
    CommandError,
    NodeNameError,
    NodeSet,
    NodeSetError,
    OptionError,
    Task,
    UsageError,
    task_self,
)
from ctask.testing import FakeTransport, close_everything
from ctask_tests.fake_nodes import Recorder, nodes
from ctask_tests.fix_hostile import HostileFactory
from ctask_tests.fix_sshd import Sshd

Verb = Callable[..., Any]

NODE = "127.0.1.1"
NAMES = st.text("abyz0189.-_", max_size=6)


@pytest.fixture
def task() -> Task:
    return task_self()


@pytest.fixture
def fake() -> Iterator[FakeTransport]:
    with FakeTransport(nodes()) as fake:
        yield fake
        close_everything()


@pytest.fixture(params=["submit", "shell", "run"])
def verb(request: pytest.FixtureRequest, task: Task) -> Verb:
    chosen: Verb = getattr(task, request.param)
    return chosen


def check_nothing_happened(task: Task, fake: FakeTransport) -> None:
    assert fake.sessions == []
    assert fake._connections == {}  # no place on a connection was asked for, which would dial
    task.resume()  # nothing was scheduled either
    assert fake.sessions == []
    assert task.workers == []
    task.run("x", nodes="n1")  # and the task is as it was
    assert task.node_buffer("n1") == "ok"


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        pytest.param({"nodes": ""}, UsageError, "node set is empty.*nothing was run; allow_empty=True", id="A09-empty"),
        pytest.param({"nodes": []}, UsageError, "node set is empty", id="A09-list"),
        pytest.param({"nodes": NodeSet()}, UsageError, "node set is empty", id="A09-set"),
        pytest.param({"nodes": None}, UsageError, "say which nodes; leave nodes out", id="A09-none"),
        pytest.param({"nodes": 5}, UsageError, "node set or names", id="A09-number"),
        pytest.param({"nodes": " "}, UsageError, "node set is empty", id="A09-blank"),
        pytest.param({"nodes": "n[1-3]!n[1-3]"}, UsageError, "node set is empty", id="A09-nothing-left"),
        pytest.param({"nodes": "@nogroup"}, UsageError, "there are no node groups", id="A09-group"),
        pytest.param({"nodes": "*"}, UsageError, "there are no node groups", id="A09-star"),
        pytest.param({"nodes": "n[1-3],-oProxyCommand=x"}, NodeNameError, "read as an option", id="A06-proxy"),
        pytest.param({"nodes": ["--help"]}, NodeNameError, "read as an option", id="A06-help"),
        pytest.param({"nodes": "../x"}, NodeNameError, "path", id="A05-path"),
        pytest.param({"nodes": ["n1", ".."]}, NodeNameError, "path", id="A05-dots"),
        pytest.param({"nodes": ["a\0b"]}, NodeNameError, "control characters", id="A05-nul"),
        pytest.param({"nodes": ["a\nb"]}, NodeNameError, "white space", id="A05-newline"),
        pytest.param({"nodes": ["$HOME"]}, NodeNameError, "shell", id="A05-shell"),
        pytest.param({"nodes": ["root@n1"]}, NodeNameError, "login", id="A05-login"),
        pytest.param({"nodes": "é1"}, NodeNameError, r"'\\xe91': only ASCII", id="A07-accent"),
        pytest.param({"nodes": "ﬁle"}, NodeNameError, r"'\\ufb01le': only ASCII", id="A07-ligature"),
        pytest.param({"nodes": ["n1", "a\u202eb"]}, NodeNameError, r"'a\\u202eb': only ASCII", id="A07-direction"),
        pytest.param({"nodes": "a[１-３]"}, NodeSetError, "position 3: .*the ASCII digits", id="A07-digits"),
        pytest.param({"nodes": "n[1-3"}, NodeSetError, r"at position 2: ", id="A01-bracket"),
        pytest.param({"nodes": "n[1-100001]"}, NodeSetError, "100,001 nodes are more than 100,000", id="A02-many"),
        pytest.param({"nodes": "a[0-999999999999]"}, NodeSetError, "1,000,000,000,000 nodes are more", id="A02-range"),
        pytest.param({"nodes": "a[1-1000]b[1-1000]"}, NodeSetError, "1,000,000 nodes are more than", id="A02-product"),
        pytest.param({"nodes": "n[1" + "," * 10_000 + "2]"}, NodeSetError, "position 5: empty range", id="A02-commas"),
        pytest.param({"nodes": "n[" * 10_000}, NodeSetError, "inside a bracket", id="A02-brackets"),
        pytest.param({"nodes": "n[1-3]", "expect": 4}, UsageError, r"expected 4 nodes, and there are 3", id="expect"),
        pytest.param({"command": "a\0b"}, CommandError, "NUL at 1", id="A10-nul"),
        pytest.param({"command": b"a\0b"}, CommandError, "NUL at 1", id="A10-nul-bytes"),
        pytest.param({"command": "x" * 131_072}, CommandError, "131,072 bytes; the limit is", id="A10-long"),
        pytest.param({"command": ["cat", "y" * 131_072]}, CommandError, "the limit is 131,072", id="A10-words"),
        pytest.param({"command": "a\udcff"}, CommandError, "give it as bytes", id="A10-surrogate"),
        pytest.param({"command": ""}, CommandError, "empty", id="A10-empty"),
        pytest.param({"command": " \n"}, CommandError, "empty", id="A10-blank"),
        pytest.param({"command": []}, CommandError, "a list of words", id="A10-no-words"),
        pytest.param({"command": 5}, CommandError, "a text, bytes or a list", id="A10-number"),
        pytest.param({"timeout": -1}, OptionError, "timeout cannot be -1", id="A11-negative"),
        pytest.param({"connect_timeout": math.nan}, OptionError, "connect_timeout cannot be nan", id="A11-nan"),
        pytest.param({"timeout": True}, OptionError, "number of seconds", id="A11-bool"),
        pytest.param({"drain_timeout": "2"}, OptionError, "number of seconds", id="A11-text"),
        pytest.param({"fanout": -3}, OptionError, "option of the whole task", id="A11-fanout"),
        pytest.param({"env": {"A": "1"}}, OptionError, "no such option: 'env'", id="A12-env"),
        pytest.param({"tiemout": 3}, OptionError, "did you mean 'timeout'", id="option"),
        pytest.param({"user": "-oX"}, OptionError, "user is a text", id="user"),
        pytest.param({"port": 70_000}, OptionError, "1 to 65535", id="port"),
        pytest.param({"address": "-oX"}, OptionError, "address is a text", id="address"),
        pytest.param({"address": "a/b"}, NodeNameError, "path", id="address-path"),
        pytest.param({"host_key_policy": "no"}, OptionError, "verify, accept-new, insecure-ignore", id="policy"),
        pytest.param({"key": "mine"}, OptionError, "label of a local command", id="key"),
        pytest.param({"on_reed": print}, OptionError, "no such event: on_reed", id="event"),
        pytest.param({"on_read": lambda worker: None}, OptionError, "called with 4 arguments", id="callback"),
        pytest.param({"handler": object()}, OptionError, "ev_", id="handler"),
        pytest.param({"stdin": None}, OptionError, "stdin is True, False", id="stdin"),
        pytest.param({"stdin": "/no/such/file"}, OptionError, "is not a file", id="stdin-file"),
        pytest.param(
            {"transport": "local", "nodes": "n[1-512]"},
            CommandError,
            r"does not name the node \(%h\) and would run 512 times on this machine",
            id="local-everywhere",
        ),
    ],
)
def test_bad_input_is_refused_before_a_packet(
    task: Task, fake: FakeTransport, verb: Verb, arguments: dict[str, Any], kind: type[UsageError], text: str
) -> None:
    arguments = {"nodes": NODE, **arguments}
    with pytest.raises(kind, match=text) as caught:
        verb(arguments.pop("command", "true"), **arguments)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)
    check_nothing_happened(task, fake)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(NAMES, st.sampled_from("\0\n\t \x1b/*$`;|<>(){}'\"\\?é３ﬁ\u202e"), NAMES)
def test_a05_no_name_with_such_a_character_is_a_node(
    task: Task, fake: FakeTransport, before: str, wrong: str, after: str
) -> None:
    # Without the operators of node sets: "n&x" is an expression, and its names are fine.
    with pytest.raises(UsageError) as caught:
        task.submit("true", nodes=["n1", f"n{before}{wrong}{after}x"])  # at its ends white space does no harm
    assert str(caught.value).isprintable()  # nothing of it reaches a terminal as it stands
    assert fake.sessions == []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(("timeout", "connect_timeout", "drain_timeout")),
    st.one_of(st.none(), st.integers(), st.floats(), st.booleans(), st.text(max_size=3)),
)
def test_a11_a_time_limit_is_a_number_or_none(task: Task, fake: FakeTransport, name: str, value: object) -> None:
    fine = value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0)
    fake.sessions.clear()
    if fine and (not value or float(value) > 5):  # type: ignore[arg-type]
        task.run("true", nodes="n1", **{name: value})  # type: ignore[call-overload]
        assert task.node_buffer("n1") == "ok"
        assert task.num_timeout() == 0
    elif not fine:
        for call in (task.submit, task.shell):
            with pytest.raises(OptionError, match=name):
                call("true", nodes="n1", **{name: value})  # type: ignore[arg-type]
        with pytest.raises(OptionError, match=name):
            task.set_info(name, value)
        with pytest.raises(OptionError, match=name):
            task.node_options("n1", **{name: value})
        assert fake.sessions == []


@pytest.mark.parametrize("value", [-1, math.nan, True, "soon"])
def test_a11_deadlines_are_numbers_as_well(task: Task, fake: FakeTransport, value: Any) -> None:
    worker = task.submit("true", nodes="n1")
    worker.wait()
    fake.sessions.clear()
    task.shell("true", nodes="n2")
    calls: list[Verb] = [task.resume, task.join, worker.wait]
    calls += [lambda deadline: task.run("true", nodes="n3", deadline=deadline)]
    calls += [lambda deadline: task.run(timeout=deadline)]
    for call in calls:
        with pytest.raises(OptionError, match="deadline"):
            call(deadline=value)
    assert fake.sessions == []
    task.resume()  # what was scheduled before is still there, what was refused is not
    assert [session.connection.target.address for session in fake.sessions] == ["n2"]


@pytest.mark.parametrize("value", [0, None, math.inf])
def test_a11_no_limit_has_three_names(task: Task, fake: FakeTransport, value: Any) -> None:
    task.run("true", nodes="n1", timeout=value, connect_timeout=value, deadline=value)
    worker = task.submit("true", nodes="n1")
    task.resume(value)
    assert worker.done()


@pytest.mark.parametrize("value", [0, -1, 1.0, True, math.nan, "64", None])
def test_a11_a_fan_out_is_a_positive_whole_number(task: Task, fake: FakeTransport, value: Any) -> None:
    with pytest.raises(OptionError, match="1 or more"):
        task.set_info("fanout", value)
    task.set_info("fanout", 10**9)  # however large
    task.run("true", nodes="n[1-3]")
    assert task.max_retcode() == 0


def test_run_without_a_command_takes_a_time_only(task: Task) -> None:
    with pytest.raises(OptionError, match="without a command there is no nodes"):
        task.run(nodes="n1")  # type: ignore[call-overload]


def test_a04_a_node_that_is_named_twice_runs_once(task: Task, fake: FakeTransport) -> None:
    story = Recorder()
    worker = task.run("true", nodes="n1,n1,n[1-2]", handler=story, expect=2)
    assert worker is not None
    assert list(worker.futures) == ["n1", "n2"]
    assert story.names().count("pickup") == len(fake.sessions) == 2
    task.run("true", nodes=["n2", "n1", "n2"])
    assert len(fake.sessions) == 4


def test_a04_a_node_that_is_named_twice_runs_once_on_the_node(task: Task, sshd: Sshd, tmp_path: Path) -> None:
    mark = sshd.folder / f"ran-{tmp_path.name}"
    story = Recorder()
    with mark.open("w"):
        mark.chmod(0o666)
    nodes = f"{NODE},{NODE},127.0.1.[1-2]"
    task.run(f"echo $SSH_CONNECTION >>{mark}", nodes=nodes, handler=story, expect=2, **sshd.options())
    ran = sorted(line.split()[2] for line in mark.read_text().splitlines())
    mark.unlink()
    assert ran == [NODE, "127.0.1.2"]
    assert story.names().count("pickup") == 2


def test_a12_no_environment_is_sent(task: Task, hostile: HostileFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    # What a variable is to be on a node stands in the command: sshd takes hardly any (AcceptEnv), and says nothing.
    monkeypatch.setenv("LC_ALL", "C")
    server = hostile()
    for pty in (False, True):
        worker = task.run("true", nodes="n1", address=server.address, pty=pty, **server.options())
        assert worker is not None
        assert worker.result("n1").rc == 0
    assert "env" not in server.seen.requests


def test_an_empty_set_that_may_be(task: Task, fake: FakeTransport) -> None:
    story = Recorder()
    worker = task.run("true", nodes="", allow_empty=True, handler=story, check=True)
    assert worker is not None
    assert list(worker.results()) == []
    assert worker.groups() == []
    assert worker.wait()
    assert worker.exit_code() == 0
    assert "no nodes" in repr(worker)
    assert fake.sessions == []
    with pytest.raises(UsageError, match="expected 3 nodes"):
        task.run("true", nodes="", allow_empty=True, expect=3)


def test_a10_bytes_go_to_the_node_as_they_are(task: Task, sshd: Sshd) -> None:
    worker = task.run(b"printf %s \xff\xfe", nodes=NODE, **sshd.options())
    assert worker is not None
    assert worker.result(NODE).stdout == b"\xff\xfe"
    # The longest that is taken, in bytes, is the longest that a node's shell can be given.
    before, after = "printf %s ", "| wc -c"
    text = "é" * ((131_071 - len(before) - len(after)) // 2)
    worker = task.run(f"{before}{text}{after}", nodes=NODE, **sshd.options())
    assert task.node_buffer(NODE) == str(len(text) * 2)


def test_bad_input_on_real_nodes_makes_no_connection(task: Task, sshd: Sshd) -> None:
    sshd.wait_idle()
    before = len(sshd.log())
    for arguments in ({"timeout": -1}, {"expect": 2}, {"stdin": None}, {"command": "a\0b"}):
        given = {"nodes": NODE, "command": "true", **sshd.options(), **arguments}
        with pytest.raises(UsageError):
            task.run(**given)  # type: ignore[call-overload]
    # The next one that is right is the first that the server hears of.
    task.run("true", nodes=NODE, **sshd.options())
    assert sshd.log(before).count("Connection from") == 1


LONG = "n" * 64
#: what no resolver can know, and the words that say what to do
UNKNOWABLE = [
    ("h:22", r"port=22, or -o Port=22\), and the name as h$"),
    ("h[1-2]:2222", "port=2222.*as h1$"),
    ("10.0.0.1:22", "and the name as 10.0.0.1"),
    ("h:ssh", "a port is an option of its own"),
    ("h:22:33", "no IPv6 address"),
    ("::1:99999", "no IPv6 address"),
    ("1::2::3", "no IPv6 address"),
    (":22", "no IPv6 address"),
    ("fe80::1%", "no zone"),
    (LONG, "has 64 characters, .* no.* 63"),
    (f"a.{LONG}.example", "64 characters"),
    (f"{LONG}.", "64 characters"),
    ("a." * 126 + "bc", "254 characters"),
    ("a." * 126 + "bc.", "254 characters|longer than 255"),
    (".h", "empty part"),
]


@pytest.mark.parametrize(("name", "reason"), UNKNOWABLE)
def test_b03_a_name_that_no_resolver_knows_is_asked_of_none(
    task: Task, monkeypatch: pytest.MonkeyPatch, name: str, reason: str
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: asked.append(args))
    for some in (f"n1,{name}", ["n1", name]):
        with pytest.raises(NodeNameError, match=reason):
            task.run("true", nodes=some)
    (address,) = list(NodeSet(name))[:1]
    with pytest.raises(NodeNameError, match=f"bad address .* of node 'n1': .*({reason})"):
        task.run("true", nodes="n1", address=address)
    task.node_options("n2", address=address)
    with pytest.raises(NodeNameError, match="of node 'n2'"):
        task.run("true", nodes="n[1-2]")
    assert asked == []
    assert task.workers == []


def test_b03_only_what_goes_to_the_resolver_is_judged(task: Task, fake: FakeTransport) -> None:
    """A name is a label where another address is given, or where nothing is looked up."""
    for name in ("h:22", LONG, ".h", "n" * 255):
        assert task.run("true", nodes=name, address="127.0.0.1", check=True)
        assert task.shell("true", key=name)
        task.run("exit 0 # %h", nodes=name, transport="local", check=True)


def test_b03_names_that_a_resolver_may_know_are_asked(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def look_up(name: bytes | str, *_: object, **__: object) -> None:
        asked.append(name.decode() if isinstance(name, bytes) else name)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    names = ["h.", "h_x", "_h", "a+b", "h%x", "n" * 63, "a." * 126 + "b", "a." * 126 + "b.", "xn--4ca.example", "h#x"]
    worker = task.run("true", nodes=names)
    assert worker is not None
    assert sorted(asked) == sorted(names)
    assert {result.why for result in worker.results()} == {"resolve: the name has no address"}


@pytest.mark.parametrize("name", ["[::1]", "[::1]:22", "[h]:22"])
def test_b03_brackets_are_no_part_of_an_address(task: Task, name: str) -> None:
    for call in (lambda: NodeSet.fromlist([name]), lambda: task.run("true", nodes="n1", address=name)):
        with pytest.raises(ValueError, match=r"without brackets|not a number or a range: 'h'"):
            call()
