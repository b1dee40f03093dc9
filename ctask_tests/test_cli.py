# SPDX-License-Identifier: Apache-2.0
"""The command line as people use it: in a process of its own, against a real sshd."""

from __future__ import annotations

import logging
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ctask import NodeSet, Outcome, task_self
from ctask.cli import arguments, main, openssh
from ctask.cli.feed import Feeder
from ctask.cli.terminal import Terminal, TerminalLog
from ctask.errors import CommandError, NodeNameError, NodeSetError, OptionError, UsageError
from ctask_tests.cli_program import ROOT, Cli
from ctask_tests.fix_proxy import closed_port
from ctask_tests.fix_sshd import Sshd

if TYPE_CHECKING:
    from collections.abc import Iterator

TWO = "127.0.1.[1-2]"
THREE = "127.0.1.[1-3]"


def asked(*words: str) -> arguments.Request:
    return arguments.request(arguments.read(words))


# -- what is typed -------------------------------------------------------------------------------------------------


def test_options_end_at_the_first_word_of_the_command() -> None:
    request = asked("-w", "n[1-2]", "-b", "ls", "-S", "--raw", "-w", "x")
    assert request.command == b"ls -S --raw -w x"
    assert request.gather
    assert not request.max_status
    assert asked("-w", "n1", "--", "-odd", "--").command == b"-odd --"
    assert asked("-w", "n1", "-", "x").command == b"- x"


def test_run_in_front_is_the_same() -> None:
    assert asked("run", "-w", "n1", "run", "it") == asked("-w", "n1", "run", "it")


def test_options_may_be_glued_and_bundled() -> None:
    request = asked("-bSwn[1-3]", "-f8", "--expect=3", "-oPort=2222", "true")
    assert (str(request.nodes), request.fanout, request.expect) == ("n[1-3]", 8, 3)
    assert request.gather
    assert request.max_status
    assert request.options == {"port": 2222}


def test_nodes_add_up_and_exclusions_always_win() -> None:
    assert str(asked("-w", "n[1-4]", "-x", "n2", "-w", "n2,n9", "-x", "n4", "true").nodes) == "n[1,3,9]"


def test_options_reach_the_call() -> None:
    request = asked("-w", "n1", "-t", "2.5", "-u", "0", "-l", "root", "-i", "a", "-i", "b", "--stdin", "cat")
    assert request.options == {"connect_timeout": 2.5, "timeout": 0.0, "user": "root", "identity": ["a", "b"]}
    assert request.stdin
    assert asked("-w", "n1", "--stop", "term", "--stop-grace=0", "x").options == {"stop": "term", "stop_grace": 0.0}


def test_a_hostfile_is_words_and_comments(tmp_path: Path) -> None:
    path = tmp_path / "nodes"
    path.write_text("n[1-2] n7\n# n8 is broken\n\n  n[9-10]\t\n")
    assert str(asked("--hostfile", str(path), "-x", "n7", "-w", "m1", "true").nodes) == "m1,n[1-2,9-10]"


def test_a_hostfile_says_where_it_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "nodes"
    path.write_text("n1\nn2 n[3\n")
    with pytest.raises(OptionError, match=rf"{path}:2: bad node set"):
        asked("--hostfile", str(path), "true")
    with pytest.raises(OptionError, match="No such file"):
        asked("--hostfile", str(tmp_path / "none"), "true")


def test_the_command_is_the_bytes_that_were_typed() -> None:
    assert asked("-w", "n1", "echo", os.fsdecode(b"\xff\xc3\xa9")).command == b"echo \xff\xc3\xa9"


WRONG: list[tuple[list[str], type[UsageError], str]] = [
    ([], UsageError, "on which nodes"),
    (["true"], OptionError, "no such command of ctask: 'true'"),
    (["run", "true"], UsageError, "on which nodes"),
    (["-w"], OptionError, "-w takes a value"),
    (["-w", "n1"], CommandError, "the command is missing"),
    (["-w", "", "true"], UsageError, "no nodes in -w ''"),
    (["-w", "a[1-", "true"], NodeSetError, "at position 2"),
    (["-w", "a[3-1]", "true"], NodeSetError, "a[3-1]"),
    (["-w", "-oProxyCommand=x", "true"], NodeNameError, "option"),
    (["-w", "--help", "true"], NodeNameError, "option"),
    (["-w", "../x", "true"], NodeNameError, "path"),
    (["-w", "n1;reboot", "true"], NodeNameError, "shell"),
    (["-w", "n\x1b", "true"], NodeNameError, "control"),
    (["-w", "@nogroup", "true"], NodeSetError, "@nogroup"),
    (["-w", "n[1-3]", "-x", "n[1-5]", "true"], UsageError, "no nodes are left"),
    (["-g", "nogroup", "true"], NodeSetError, "@nogroup"),
    (["-a", "-x", "@nogroup", "true"], NodeSetError, "Nothing was run."),
    (["-w", "n1", "--groupsconf", "/nonexistent/g", "true"], OptionError, "no such file"),
    (["-w", "n1", "--groupsconf", "/", "true"], OptionError, "not a regular file"),
    (["-w", "n1", "-z", "true"], OptionError, "no such option: -z"),
    (["-w", "n1", "--hostfil", "x", "true"], OptionError, "did you mean --hostfile"),
    (["-w", "n1", "--raw=1", "true"], OptionError, "--raw takes no value"),
    (["-w", "n1", "-f", "0", "true"], OptionError, "-f takes a whole number"),
    (["-w", "n1", "-f", "-1", "true"], OptionError, "-f takes a whole number"),
    (["-w", "n1", "-f", "1.5", "true"], OptionError, "-f takes a whole number"),
    (["-w", "n1", "--expect", "x", "true"], OptionError, "--expect takes a whole number"),
    (["-w", "n1", "-t", "nan", "true"], OptionError, "-t takes seconds"),
    (["-w", "n1", "-u", "-3", "true"], OptionError, "-u takes seconds"),
    (["-w", "n1", "-u", "5m", "true"], OptionError, "-u takes seconds"),
    (["-w", "n1", "--stop", "nuke", "true"], OptionError, "stop is one of leave, term, kill, not 'nuke'"),
    (["-w", "n1", "--stop-grace", "inf", "true"], OptionError, "stop_grace is a number of seconds"),
    (["-w", "n1", "-l", "-x", "true"], OptionError, "user"),
    (["-w", "n1", "-l", "a b", "true"], OptionError, "user"),
    (["-w", "n1", "--stdin", "-n", "true"], OptionError, "contradict"),
    (["-w", "n1", "-o", "Port=0", "true"], OptionError, "Port is a number"),
    (["-w", "n1", "-o", "ProxyJump=x", "true"], OptionError, "-o ProxyJump is not taken; there are Port, "),
    (["-w", "n1", "-o", "User=x", "true"], OptionError, "-l USER"),
    (["-w", "n1", "-o", "StrictHostKeyChecking=ask", "true"], OptionError, "ask is refused"),
    (["-w", "n1", "-o", "StrictHostKeyChecking=maybe", "true"], OptionError, "maybe"),
    (["-w", "n1", "-o", "Port", "true"], OptionError, "OPTION=VALUE"),
    (["-w", "n1", "-o", "Port=", "true"], OptionError, "without a value"),
]


@pytest.mark.parametrize(("words", "kind", "text"), WRONG, ids=lambda value: str(value)[:40])
def test_what_cannot_be_right_is_refused(words: list[str], kind: type[UsageError], text: str) -> None:
    with pytest.raises(kind) as caught:
        asked(*words)
    assert text in str(caught.value)


OPENSSH: list[tuple[list[str], dict[str, Any]]] = [
    ([], {}),
    (["Port=22"], {"port": 22}),
    (["port 22"], {"port": 22}),
    (["  PORT  =  22 "], {"port": 22}),
    (["Port=22", "Port=23"], {"port": 23}),
    (["StrictHostKeyChecking=yes"], {"host_key_policy": "verify"}),
    (["stricthostkeychecking Accept-New"], {"host_key_policy": "accept-new"}),
    (["StrictHostKeyChecking=no"], {"host_key_policy": "insecure-ignore"}),
    (
        ["UserKnownHostsFile=/a /b", "GlobalKnownHostsFile /c=d"],
        {"known_hosts": ["/a", "/b", "/c=d"]},
    ),
    (
        ["UserKnownHostsFile=none"],
        {"known_hosts": ["/dev/null", "/etc/ssh/ssh_known_hosts", "/etc/ssh/ssh_known_hosts2"]},
    ),
    (
        ["GlobalKnownHostsFile=/g"],
        {"known_hosts": ["~/.ssh/known_hosts", "~/.ssh/known_hosts2", "/g"]},
    ),
]


@pytest.mark.parametrize(("texts", "options"), OPENSSH)
def test_openssh_options_are_taken_in_their_forms(texts: list[str], options: dict[str, Any]) -> None:
    assert openssh.options(texts) == options


def test_help_and_version_go_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: ctask [run] -w NODES")
    assert max(map(len, out.splitlines())) <= 120
    assert all(f"\n  {option.name} " in out for option in arguments.OPTIONS)
    assert err == ""
    assert main(["run", "--version"]) == 0
    assert capsys.readouterr().out.startswith("ctask 0.")
    assert main([]) == 2
    assert "--help" in capsys.readouterr().err


CARETS = [
    ("n[1-3", "ctask: bad node set", "              n[1-3\n               ^\n"),
    ("n1,,n2", "ctask: bad node set", "              n1,,n2\n                 ^\n"),
    ("n\x1b[1", "ctask: bad node set", "              n\\x1b[1\n                   ^\n"),
]


@pytest.mark.parametrize(("text", "first", "rest"), CARETS)
def test_a_bad_node_set_has_a_caret(
    capsys: pytest.CaptureFixture[str], text: str, first: str, rest: str
) -> None:
    assert main(["-w", text, "true"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(first)
    assert err.split("\n", 1)[1] == rest


def test_a_bad_node_set_in_a_file_has_a_caret_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "nodes"
    path.write_text("n1 n[2\n")
    assert main(["--hostfile", str(path), "true"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"ctask: {path}:1: bad node set")
    assert err.endswith("              n[2\n               ^\n")


def test_e04_a_warning_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    log = TerminalLog(Terminal())
    record = logging.makeLogRecord({"msg": "known_hosts %s: skipped", "args": ("a\nctask: exit 0\x1b[2J",)})
    log.emit(record)
    err = capfd.readouterr().err
    assert err == "ctask: known_hosts a\\x0actask: exit 0\\x1b[2J: skipped\n"


# -- what runs -----------------------------------------------------------------------------------------------------


@pytest.fixture
def cli(sshd: Sshd) -> Iterator[Cli]:
    yield Cli(sshd)
    sshd.wait_idle()


def test_lines_come_behind_their_nodes_and_streams_stay_apart(cli: Cli) -> None:
    code, out, err = cli("-w", TWO, "echo a b; printf tail; echo wrong >&2")
    assert code == 0
    expected = [f"127.0.1.{n}: {line}" for n in (1, 2) for line in ("a b", "tail")]
    assert sorted(out.decode().splitlines()) == expected
    assert sorted(err.splitlines()) == ["127.0.1.1: wrong", "127.0.1.2: wrong"]


def test_the_same_output_is_gathered_once(cli: Cli) -> None:
    command = "echo é; echo wrong >&2"
    code, out, err = cli("-b", "-w", THREE, "-x", "127.0.1.2", command)
    assert (code, sorted(err.splitlines())) == (0, ["127.0.1.1: wrong", "127.0.1.3: wrong"])
    assert out.decode() == "---------------\n127.0.1.[1,3] (2)\n---------------\né\n"
    code, out, err = cli("-B", "-w", THREE, "-x", "127.0.1.2", command)
    assert (code, err) == (0, "")
    assert out.decode() == "---------------\n127.0.1.[1,3] (2)\n---------------\né\nwrong\n"


def test_exit_status_1_where_some_exited_otherwise(cli: Cli) -> None:
    script = 'case "$SSH_CONNECTION" in *127.0.1.1\\ *) exit 7;; *127.0.1.2\\ *) kill -9 $$;; esac; echo ok'
    code, out, err = cli("-b", "-w", THREE, script)
    assert code == 1
    assert out.decode().splitlines()[-1] == "ok"
    lines = err.splitlines()
    assert lines[0].startswith("ctask: 3 nodes in ")
    assert lines[0].endswith(" s: 1 exit 0 · 2 not")
    assert [line.split("  ran")[0] for line in lines[1:]] == [
        "  exit 7             127.0.1.1",
        "  killed by SIGKILL  127.0.1.2",
        "ctask: exit 1",
    ]
    code, _, err = cli("-S", "-w", "127.0.1.[1,3]", script)
    assert code == 7
    assert err.endswith("ctask: exit 7\n")


def test_exit_status_3_where_some_were_not_reached(cli: Cli) -> None:
    with closed_port() as (node, port):
        code, out, err = cli("-o", f"Port={port}", "-w", node, "true")
        largest = cli("-S", "-o", f"Port={port}", "-w", node, "true")[0]
    assert (code, out, largest) == (3, b"", 255)
    repeat = shlex.join(["ctask", *cli.way, "-o", f"Port={port}"])
    assert err.splitlines()[1:] == [
        f"  tcp: refused     {node}  not run",
        f"  safe to repeat:  {repeat} -w {node} …",
        "ctask: exit 3",
    ]


def test_exit_status_3_after_a_timeout(cli: Cli) -> None:
    code, out, err = cli("-u", "0.5", "-w", TWO, "echo there; exec sleep 3")
    assert code == 3
    assert out.count(b": there\n") == 2
    assert f"  timeout after 0.5 s  {TWO}  ended: 1 process, seen to be gone" in err
    assert "safe to repeat" not in err


def test_silent_success_is_told_and_plain_success_is_not(cli: Cli) -> None:
    code, _, err = cli("-w", TWO, "true")
    assert code == 0
    assert err.splitlines()[1:] == [f"  exit 0, no output  {TWO}"]


def test_e04_what_nodes_print_cannot_act_on_the_terminal(cli: Cli) -> None:
    script = "printf '\\033[31mred\\033[0m \\033]52;c;eA==\\007 \\342\\200\\256 \\377\\n'"
    shown = "red \\x1b]52;c;eA==\\x07 \\u{202e} \\xff\n"
    raw = b"\x1b[31mred\x1b[0m \x1b]52;c;eA==\x07 \xe2\x80\xae \xff\n"
    node = "127.0.1.1"
    assert cli("-w", node, script) == (0, f"{node}: {shown}".encode(), "")
    assert cli("-b", "-w", node, script)[1].endswith(f"\n{shown}".encode())
    assert cli("--raw", "-w", node, script)[1] == f"{node}: ".encode() + raw
    assert cli("--raw", "-b", "-w", node, script)[1].endswith(b"\n" + raw)


def test_a_size_that_is_not_expected_is_refused(cli: Cli, sshd: Sshd) -> None:
    before = len(sshd.log())
    code, out, err = cli("--expect", "3", "-w", TWO, "true")
    assert (code, out) == (2, b"")
    assert "expected 3 nodes" in err
    assert "Connection from" not in sshd.log(before)
    assert cli("--expect", "2", "-w", TWO, "echo")[0] == 0


def test_an_unknown_host_key_is_refused_unless_told_otherwise(cli: Cli, tmp_path: Path) -> None:
    mine = tmp_path / "known"
    nowhere = ["-o", "UserKnownHostsFile=/dev/null", "-o", "GlobalKnownHostsFile=none", "-w", TWO]
    code, _, err = cli(*nowhere, "echo ok")
    assert code == 3
    assert f"  host key not known  {TWO}  not run, nothing was sent\n      " in err
    assert "SHA256:" in err
    words = ["ctask", *cli.way, *nowhere[:-2], "-o", "StrictHostKeyChecking=accept-new", "-w", TWO]
    assert f"         {shlex.join(words)} …" in err.splitlines()
    code, out, err = cli(*nowhere, "-o", "StrictHostKeyChecking=no", "echo ok")
    assert (code, out.count(b"ok\n")) == (0, 2)
    assert err == f"ctask: host keys of {TWO} are NOT verified: StrictHostKeyChecking no (-o)\n"
    new = ["-o", f"UserKnownHostsFile={mine}", "-o", "StrictHostKeyChecking accept-new", "-w", TWO]
    assert cli(*new, "echo ok")[0] == 0
    assert len(mine.read_text().splitlines()) == 2


def test_standard_input_reaches_every_node(cli: Cli) -> None:
    data = b"".join(b"line %d\n" % n for n in range(30_000))
    code, out, err = cli("-b", "--stdin", "-w", THREE, "cat", given=data)
    assert (code, err) == (0, "")
    assert out == b"---------------\n127.0.1.[1-3] (3)\n---------------\n" + data


def test_standard_input_that_is_closed_cannot_be_sent() -> None:
    command = 'exec "$@" <&-'
    words = ["sh", "-c", command, "sh", sys.executable, "-m", "ctask", "--stdin", "-w", "n1", "cat"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, timeout=20, check=False)
    assert (done.returncode, done.stderr) == (2, b"ctask: --stdin: standard input is closed\n")


def test_too_long_an_input_is_not_ended_on_the_nodes_but_aborts_them(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In this process, so that the limit can be lowered: no node may take half an input for a whole one.
    reader, writer = os.pipe()
    with os.fdopen(reader) as stdin, os.fdopen(writer, "wb") as source:
        monkeypatch.setattr("sys.stdin", stdin)
        worker = task_self().submit(
            "cat >/dev/null; echo end", nodes=TWO, stdin=True, **cli.options, drain_timeout=0.1
        )
        said: list[str] = []
        terminal = Terminal()
        monkeypatch.setattr(terminal, "say", said.append)
        source.write(b"x" * 2000)
        source.flush()
        feeder = Feeder(worker, terminal, most=1000)
        feeder.start()
        assert worker.wait(10)
    assert len(said) == 1
    assert "ended on all nodes" in said[0]
    assert {result.outcome for result in worker.results()} == {Outcome.ABORTED}
    assert {str(result.stdout) for result in worker.results()} == {""}


def lines_until(stream: Any, count: int) -> list[bytes]:
    return [stream.readline() for _ in range(count)]


def all_interrupted(rows: list[str]) -> bool:
    """Whether these rows of an account have both nodes, once each, with what is known of them.

    Ctrl-C promises a second. A node that is slower with its last word, as on a busy machine, is named as what it is.
    """
    told = [re.fullmatch(r"  interrupted +(\S+)  (.*)", row) for row in rows]
    known = {"ended: 1 process, seen to be gone", "unknown whether it still runs"}
    nodes = [node for match in told if match and match[2] in known for node in NodeSet(match[1])]
    return len(rows) in (1, 2) and sorted(nodes) == sorted(NodeSet(TWO))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_tells_who_is_missing_and_exits(cli: Cli, number: int, status: int) -> None:
    with cli.start("--stdin", "-w", TWO, "echo up; exec cat", stdin=subprocess.PIPE) as process:
        assert sorted(lines_until(process.stdout, 2)) == [b"127.0.1.1: up\n", b"127.0.1.2: up\n"]
        began = time.monotonic()
        process.send_signal(number)
        assert process.stderr is not None
        err = process.stderr.read().decode()
        assert process.wait() == status
        assert time.monotonic() - began < 4
        assert process.stdin is not None
        process.stdin.close()
    lines = err.splitlines()
    assert lines[0] == f"ctask: interrupted, without {TWO} (2 of 2)"
    assert lines[1].endswith(": none exit 0 · 2 in trouble")
    assert lines[-1] == f"ctask: exit {status}"
    assert all_interrupted(lines[2:-1])


def test_a_reader_who_goes_away_ends_the_run_quietly(cli: Cli) -> None:
    with cli.start("-w", TWO, "while echo y; do :; done") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().endswith(b": y\n")
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


def test_a_full_disk_ends_the_run_with_a_word(cli: Cli) -> None:
    with open("/dev/full", "wb") as full:
        code, _, err = cli("-w", TWO, "echo y", stdout=full)
    assert (code, err) == (1, "ctask: output cannot be written: No space left on device\n")


def test_on_a_terminal_a_line_tells_who_is_waited_for(cli: Cli) -> None:
    leader, follower = pty.openpty()
    shown = b""
    try:
        with cli.start("--stdin", "-w", TWO, "cat", stdin=subprocess.PIPE, stderr=follower) as process:
            os.close(follower)
            deadline = time.monotonic() + 10
            while b"(running" not in shown and time.monotonic() < deadline:
                if select.select([leader], [], [], 0.1)[0]:
                    shown += os.read(leader, 4096)
            assert process.stdin is not None
            process.stdin.write(b"line\n")
            process.stdin.close()
            assert process.wait(timeout=10) == 0
            try:
                while data := os.read(leader, 4096):
                    shown += data
            except OSError:  # the other side is closed
                pass
    finally:
        os.close(leader)
    text = shown.decode()
    assert re.search(rf"ctask: 0/2  waiting \d+ s for {re.escape(TWO)}  \(", text)
    assert text.rpartition("\r\x1b[K")[2].startswith("ctask: 2 nodes in ")


def test_on_a_terminal_the_first_ctrl_c_tells_and_the_second_ends(cli: Cli) -> None:
    leader, follower = pty.openpty()
    shown = b""

    def read_until(text: bytes) -> None:
        nonlocal shown
        deadline = time.monotonic() + 10
        while text not in shown:
            assert time.monotonic() < deadline, shown
            if select.select([leader], [], [], 0.1)[0]:
                shown += os.read(leader, 4096)

    try:
        with cli.start("-w", TWO, "echo up; exec sleep 60", stderr=follower) as process:
            os.close(follower)
            assert len(lines_until(process.stdout, 2)) == 2
            process.send_signal(signal.SIGINT)
            read_until(f"ctask: waiting for {TWO} (2 of 2); Ctrl-C again within 2 s ends them".encode())
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=10) == 130
            read_until(b"ctask: exit 130")
    finally:
        os.close(leader)
    assert f"ctask: interrupted, without {TWO} (2 of 2)".encode() in shown
    lines = shown.decode().splitlines()
    assert all_interrupted([line for line in lines if line.startswith("  interrupted ")]), lines
