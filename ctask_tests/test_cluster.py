# SPDX-License-Identifier: Apache-2.0
"""The embedded cluster, seen by a plain SSH client: what a command finds, what ends it, and what is left."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import paramiko
import pytest
from paramiko.common import (
    MSG_CHANNEL_CLOSE,
    MSG_CHANNEL_EOF,
    MSG_CHANNEL_REQUEST,
    cMSG_CHANNEL_REQUEST,
)

from ctask.testing import EmbeddedCluster

WITHIN = 10.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[EmbeddedCluster]:
    with EmbeddedCluster("demo[1-8]") as started:
        yield started
    assert started.left_behind() == ([], [])


class Client(paramiko.SSHClient):  # type: ignore[misc]
    """A strict client: the cluster's key and known_hosts, nothing else."""

    def __init__(
        self, cluster: EmbeddedCluster, node: str, user: str | None = None, key: paramiko.PKey = None
    ) -> None:
        super().__init__()
        sock = socket.create_connection((cluster.address(node), cluster.port), WITHIN)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.load_host_keys(str(cluster.known_hosts))
        self.set_missing_host_key_policy(paramiko.RejectPolicy())
        try:
            self.connect(
                cluster.address(node),
                cluster.port,
                username=user or cluster.user,
                pkey=key or paramiko.PKey.from_path(cluster.identity),
                allow_agent=False,
                look_for_keys=False,
                sock=sock,
            )
        except BaseException:
            self.close()
            sock.close()
            raise

    @property
    def transport(self) -> paramiko.Transport:
        return self.get_transport()

    def channel(self, **options: int) -> paramiko.Channel:
        channel = self.transport.open_session(timeout=WITHIN, **options)
        channel.settimeout(WITHIN)
        return channel

    def run(self, command: str, stdin: bytes = b"") -> tuple[int, str, str]:
        channel = self.channel()
        channel.exec_command(command)
        channel.sendall(stdin)
        channel.shutdown_write()
        output = channel.makefile("rb").read().decode()
        errors = channel.makefile_stderr("rb").read().decode()
        assert channel.status_event.wait(WITHIN)
        return channel.recv_exit_status(), output, errors


def wait_until(true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + WITHIN
    while not true():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.005)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on: state, ppid, pgrp, session, tty."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def line_of(channel: paramiko.Channel) -> str:
    text = b""
    while not text.endswith(b"\n"):
        part = channel.recv(1)
        assert part, f"ended after {text!r}"
        text += part
    return text.decode().strip()


# -- what a command finds --


def test_streams_status_and_environment(cluster: EmbeddedCluster) -> None:
    with Client(cluster, "demo3") as client:
        script = 'echo "$CTASK_NODE $USER"; pwd; ls -A "$HOME" | wc -l; echo trouble >&2; exit 7'
        rc, output, errors = client.run(script)
        home = client.run('echo "$HOME"')[1].strip()
    assert (rc, errors) == (7, "trouble\n")
    assert output.splitlines() == [f"demo3 {cluster.user}", home, "0"]
    assert home != os.path.expanduser("~")


def test_each_node_has_its_own_address_home_and_key(cluster: EmbeddedCluster) -> None:
    homes = set()
    for node in cluster.nodes:
        with Client(cluster, node) as client:
            homes.add(client.run("echo $HOME")[1])
            assert f" {cluster.address(node)} {cluster.port}\n" in client.run('echo "$SSH_CONNECTION"')[1]
    keys = {line.split()[2] for line in cluster.known_hosts.read_text().splitlines()}
    assert len(homes) == len(keys) == len(cluster.nodes) == len({*map(cluster.address, cluster.nodes)})


def test_commands_inherit_nothing_but_their_streams(cluster: EmbeddedCluster) -> None:
    with Client(cluster, "demo1") as client:
        held = client.channel()
        held.exec_command("cat")  # whose pipes a careless server would hand on
        # 3 is the listing's own
        assert client.run("ls /proc/self/fd")[1].split() == ["0", "1", "2", "3"]
        assert "SIG" not in client.run("env")[1]
        ignored = client.run("sed -n 's/^SigIgn:[[:space:]]*//p' /proc/self/status")[1]
        assert int(ignored, 16) & 0x7FFFFFFF == 0  # above are glibc's own two


def test_standard_input_is_whole_and_back_pressure_holds(cluster: EmbeddedCluster) -> None:
    sent = os.urandom(1024) * 5000
    with Client(cluster, "demo1") as client:
        assert client.run("wc -c", sent)[1].strip() == str(len(sent))
        channel = client.channel()
        channel.exec_command("sleep 0.2; cat")
        writer = threading.Thread(target=lambda: (channel.sendall(sent), channel.shutdown_write()))
        writer.start()
        assert channel.makefile("rb").read() == sent
        writer.join()


def test_input_that_nobody_reads_is_taken_and_dropped(cluster: EmbeddedCluster, tmp_path: Path) -> None:
    sent = tmp_path / "sent"
    with Client(cluster, "demo1") as client:
        channel = client.channel()
        channel.exec_command(f"exec <&-; until [ -e {sent} ]; do sleep 0.02; done; echo done")
        channel.sendall(b"x" * 4_000_000)
        sent.touch()
        assert channel.makefile("rb").read() == b"done\n"


def test_output_stays_within_the_window(cluster: EmbeddedCluster) -> None:
    window = 32768
    with Client(cluster, "demo2") as client:
        channel = client.channel(window_size=window)
        channel.exec_command("head -c 1000000 /dev/zero")
        wait_until(lambda: len(channel.in_buffer) >= window)
        for _ in range(3):  # round trips of the same connection, behind what was sent too much
            assert client.run("echo")[0] == 0
        assert len(channel.in_buffer) == window
        assert len(channel.makefile("rb").read()) == 1_000_000
        assert channel.recv_exit_status() == 0


def test_both_streams_interleaved_arrive_whole(cluster: EmbeddedCluster) -> None:
    with Client(cluster, "demo2") as client:
        channel = client.channel()
        part = "head -c 1000000 /dev/zero"
        channel.exec_command(f"for i in 1 2 3; do {part}; {part} >&2; done")
        errors: list[bytes] = []
        reader = threading.Thread(target=lambda: errors.append(channel.makefile_stderr("rb").read()))
        reader.start()
        assert len(channel.makefile("rb").read()) == 3_000_000
        reader.join()
        assert len(errors[0]) == 3_000_000


# -- what the client is told --


@pytest.fixture
def told(cluster: EmbeddedCluster) -> Iterator[tuple[Client, list[Any]]]:
    """A client, and what the server says of its channels, in order."""
    words: list[Any] = []
    with Client(cluster, "demo4") as client:
        table = client.transport._channel_handler_table

        def on_request(channel: paramiko.Channel, message: paramiko.Message) -> None:
            words.append(message.get_text())
            message.get_boolean()
            words.append(message.get_text() if words[-1] == "exit-signal" else message.get_int())
            message.rewind()
            message.get_int()
            table[MSG_CHANNEL_REQUEST](channel, message)

        def spy(name: str, kind: int) -> Callable[..., None]:
            def on_message(channel: paramiko.Channel, message: paramiko.Message) -> None:
                words.append(name)
                table[kind](channel, message)

            return on_message

        client.transport._channel_handler_table = {
            **table,
            MSG_CHANNEL_REQUEST: on_request,
            MSG_CHANNEL_EOF: spy("eof", MSG_CHANNEL_EOF),
            MSG_CHANNEL_CLOSE: spy("close", MSG_CHANNEL_CLOSE),
        }
        yield client, words


def test_status_then_eof_then_close(told: tuple[Client, list[Any]]) -> None:
    client, words = told
    client.run("echo hello; exit 3")
    wait_until(lambda: "close" in words)
    assert words == ["exit-status", 3, "eof", "close"]


def test_a_signal_is_told_by_its_name(told: tuple[Client, list[Any]]) -> None:
    client, words = told
    client.channel().exec_command("kill -TERM $$")
    wait_until(lambda: "close" in words)
    assert words == ["exit-signal", "TERM", "eof", "close"]


def test_status_comes_while_a_child_holds_the_output(told: tuple[Client, list[Any]]) -> None:
    client, words = told
    channel = client.channel()
    channel.exec_command("{ until [ -e $HOME/end ]; do sleep 0.01; done; rm $HOME/end; echo late; } & exit 5")
    wait_until(lambda: words == ["exit-status", 5])
    client.run("touch $HOME/end")
    assert channel.makefile("rb").read() == b"late\n"
    wait_until(lambda: words.count("close") == 2)
    assert words.count("exit-status") == 2


def test_eof_of_a_command_that_closes_its_output_and_runs_on(told: tuple[Client, list[Any]]) -> None:
    client, words = told
    channel = client.channel()
    channel.exec_command("exec >&- 2>&-; read end; exit 4")
    wait_until(lambda: words == ["eof"])
    channel.sendall(b"\n")
    wait_until(lambda: "close" in words)
    assert words == ["eof", "exit-status", 4, "close"]


def test_signal_requests_reach_the_group_and_only_known_ones(told: tuple[Client, list[Any]]) -> None:
    client, words = told
    channel = client.channel()
    # A child that dash has forked and that has not come to its exec swallows a signal that its parent has a trap for.
    channel.exec_command("trap 'echo asked; exit 9' TERM; sh -c 'echo ready; exec sleep 1000' & wait")
    assert line_of(channel) == "ready"
    request(channel, "TERM")
    assert line_of(channel) == "asked"
    wait_until(lambda: "close" in words)
    assert words == ["exit-status", 9, "eof", "close"]


def request(channel: paramiko.Channel, name: str) -> None:
    message = paramiko.Message()
    message.add_byte(cMSG_CHANNEL_REQUEST)
    message.add_int(channel.remote_chanid)
    message.add_string("signal")
    message.add_boolean(False)
    message.add_string(name)
    channel.transport._send_user_message(message)


def test_environment_requests_are_refused(cluster: EmbeddedCluster) -> None:
    with Client(cluster, "demo1") as client:
        channel = client.channel()
        channel.set_environment_variable("LC_ALL", "C")
        channel.exec_command('echo "LC_ALL=$LC_ALL"')
        assert line_of(channel) == "LC_ALL="


# -- whose children they are, and how they end --


def test_commands_are_children_of_their_connections_process(cluster: EmbeddedCluster) -> None:
    with Client(cluster, "demo5") as client, Client(cluster, "demo5") as other:
        channels = [client.channel() for _ in range(3)]
        for channel in channels:
            channel.exec_command("echo $$; read end")
        pids = [int(line_of(channel)) for channel in channels]
        parent = {stat(pid)[1] for pid in pids}
        assert len(parent) == 1
        for pid in pids:
            assert [int(field) for field in stat(pid)[2:4]] == [pid, pid]  # a group and a session of its own
        session = parent.pop()
        children = Path(f"/proc/{session}/task/{session}/children").read_text().split()
        assert [int(pid) for pid in children] == pids  # in the order of their exec requests
        assert other.run("echo $PPID")[1].strip() != session


def test_a_second_channel_finds_and_ends_a_session(cluster: EmbeddedCluster) -> None:
    with Client(cluster, "demo5") as client:
        bystander, target = client.channel(), client.channel()
        bystander.exec_command("echo $$; cat")
        target.exec_command("trap '' TERM; sleep 1000 & echo $! $$; wait; wait")
        line_of(bystander)
        pids = [int(pid) for pid in line_of(target).split()]
        script = """
            for pid in $(cat /proc/$PPID/task/$PPID/children); do
                n=$((n + 1))
                [ "$n" != 2 ] || target=$pid
            done
            echo $n
            kill -s TERM -- -$target; kill -s KILL -- -$target
        """
        assert client.run("exec /bin/sh -s", script.encode())[:2] == (0, "3\n")
        wait_until(lambda: not any(map(alive, pids)))
        bystander.sendall(b"still here\n")
        assert line_of(bystander) == "still here"


def test_commands_outlive_their_connection(cluster: EmbeddedCluster) -> None:
    client = Client(cluster, "demo6")
    channel = client.channel()
    channel.exec_command("echo $PPID $$; cat; sleep 1000")
    session, pid = map(int, line_of(channel).split())
    client.close()
    wait_until(lambda: not alive(session))
    assert alive(pid)
    wait_until(lambda: stat(pid)[1] != str(session))
    children = Path(f"/proc/{pid}/task/{pid}/children")
    # cat saw the end of its input
    wait_until(lambda: "sleep" in Path("/proc", *children.read_text().split()[:1], "comm").read_text())
    os.kill(pid, signal.SIGKILL)


def test_a_killed_session_process_ends_the_connection(cluster: EmbeddedCluster) -> None:
    with Client(cluster, "demo6") as client:
        os.kill(int(client.run("echo $PPID")[1]), signal.SIGKILL)
        wait_until(lambda: not client.transport.is_active())


def test_terminal(cluster: EmbeddedCluster) -> None:
    with Client(cluster, "demo7") as client:
        channel = client.channel()
        channel.get_pty("vt100", width=97, height=23)
        channel.exec_command("echo $TERM; stty size; [ -t 1 ] && [ -t 2 ] && echo both; exit 6")
        assert channel.makefile("rb").read().split() == [b"vt100", b"23", b"97", b"both"]
        assert channel.recv_exit_status() == 6
        channel = client.channel()
        channel.get_pty()
        channel.exec_command("echo $$; exec sleep 1000")
        pid = int(line_of(channel))
        client.close()
        wait_until(lambda: not alive(pid))  # it was hung up on


def test_terminal_gives_the_last_words_of_many(cluster: EmbeddedCluster) -> None:
    with Client(cluster, "demo7") as client:
        for _ in range(10):
            channel = client.channel()
            channel.get_pty()
            channel.exec_command("head -c 100000 /dev/zero | tr '\\0' x; echo; echo last")
            assert channel.makefile("rb").read() == b"x" * 100_000 + b"\r\nlast\r\n"


# -- who may come in --


def test_only_the_clusters_user_and_key_may_log_in(cluster: EmbeddedCluster) -> None:
    with pytest.raises(paramiko.AuthenticationException):
        Client(cluster, "demo1", user="mallory")
    with pytest.raises(paramiko.AuthenticationException):
        Client(cluster, "demo1", key=paramiko.ECDSAKey.generate())


def test_sessions_are_bounded(cluster: EmbeddedCluster) -> None:
    with Client(cluster, "demo8") as client:
        channels = [client.channel() for _ in range(10)]
        with pytest.raises(paramiko.ChannelException, match="Connect failed"):
            client.channel()
        channels[3].close()
        wait_until(lambda: channels[3].closed)
        client.channel()


def test_the_openssh_client_finds_a_server_like_its_own(cluster: EmbeddedCluster) -> None:
    def ssh(*command: str) -> subprocess.CompletedProcess[bytes]:
        options = {
            "UserKnownHostsFile": str(cluster.known_hosts),
            "GlobalKnownHostsFile": "/dev/null",
            "StrictHostKeyChecking": "yes",
            "BatchMode": "yes",
            "RekeyLimit": "2M",  # several while the output comes
        }
        given = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        place = ["-i", str(cluster.identity), "-p", str(cluster.port), "-l", cluster.user]
        return subprocess.run(
            ["ssh", "-F", "none", *given, *place, cluster.address("demo1"), *command],
            capture_output=True,
            check=False,
            input=b"x" * 10_000_000,
            timeout=25,
        )

    done = ssh("cat; echo word >&2; exit 5")
    assert (done.returncode, len(done.stdout), done.stderr) == (5, 10_000_000, b"word\n")


# -- bad days --


def test_bad_days_and_their_end() -> None:
    with EmbeddedCluster("bad[1-4]") as cluster:
        before = Client(cluster, "bad1")
        cluster.refuse("bad1")
        wait_until(lambda: not before.transport.is_active())
        before.close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((cluster.address("bad1"), cluster.port), WITHIN)

        cluster.silence("bad2")
        with socket.create_connection((cluster.address("bad2"), cluster.port), WITHIN) as silent:
            cluster.change_key("bad[3]")  # an answered question later there is still no word
            silent.setblocking(False)
            with pytest.raises(BlockingIOError):
                silent.recv(1)
            with pytest.raises(paramiko.BadHostKeyException):
                Client(cluster, "bad3")

            with Client(cluster, "bad4") as client:
                cluster.drop(["bad4"])
                wait_until(lambda: not client.transport.is_active())

            cluster.restore("bad[1-4]")
            silent.settimeout(WITHIN)
            assert silent.recv(1) == b""
        for node in cluster.nodes:
            with Client(cluster, node) as client:
                assert client.run("echo $CTASK_NODE")[1] == f"{node}\n"


def test_a_node_can_have_programs_of_its_own(cluster: EmbeddedCluster) -> None:
    cluster.command("demo[1-2]", "df", "echo 97%")
    cluster.command("demo2", "df", "#!/bin/cat")
    with Client(cluster, "demo1") as one, Client(cluster, "demo2") as two:
        assert one.run("df")[1] == "97%\n"
        assert two.run("df")[1] == "#!/bin/cat"


def test_mistakes_are_told() -> None:
    with pytest.raises(ValueError, match="at least one node"):
        EmbeddedCluster([])
    idle = EmbeddedCluster(["a1", "a2"])
    with pytest.raises(RuntimeError, match="not started"):
        _ = idle.port
    with EmbeddedCluster("a1") as cluster:
        with pytest.raises(KeyError):
            cluster.refuse("b1")
        with pytest.raises(ValueError, match="cannot be called"):
            cluster.command("a1", "../x", "true")
    with pytest.raises(RuntimeError, match="closed"):
        cluster.drop("a1")


def test_use_tells_a_task_how_its_nodes_are_reached() -> None:
    class Task:
        def __init__(self) -> None:
            self.told: dict[str, dict[str, object]] = {}

        def node_options(self, nodes: Any, **options: object) -> None:
            for node in [nodes] if isinstance(nodes, str) else nodes:
                self.told.setdefault(node, {}).update(options)

    task: Any = Task()
    with EmbeddedCluster("u[1-2]").use(task) as cluster:
        assert task.told["u2"] == {
            "user": cluster.user,
            "port": cluster.port,
            "identity": str(cluster.identity),
            "known_hosts": str(cluster.known_hosts),
            "address": cluster.address("u2"),
        }


# -- what is left --


def test_close_ends_daemons_that_hide() -> None:
    cluster = EmbeddedCluster("d1").start()
    folder = cluster.identity.parent
    assert folder.stat().st_mode & 0o777 == 0o700
    with Client(cluster, "d1") as client:
        script = "setsid env -i sh -c 'trap \"\" TERM HUP; sleep 1000 & wait' >/dev/null 2>&1 & echo $!"
        pid = int(client.run(script)[1])
        client.run("echo keep > $HOME/file")
        processes, files = cluster.left_behind()
        assert len(processes) >= 3
        assert any(name.endswith("/home/file") for name in files)
    assert alive(pid)
    cluster.close()
    cluster.close()
    assert not alive(pid)
    assert cluster.left_behind() == ([], [])
    assert not folder.exists()


def test_two_clusters_live_beside_each_other(cluster: EmbeddedCluster) -> None:
    with EmbeddedCluster("demo[1-8]") as second:
        assert second.address("demo1") != cluster.address("demo1")
        with Client(second, "demo1") as client:
            assert client.run("echo $CTASK_NODE")[1] == "demo1\n"


def test_a_port_that_is_taken_is_told() -> None:
    with socket.create_server(("", 0)) as everywhere:
        port = everywhere.getsockname()[1]
        with pytest.raises(OSError, match=f"no free .* {port}"):
            EmbeddedCluster("p1", port=port).start()


PROGRAM = """
import json, sys, time
from ctask.testing import EmbeddedCluster
cluster = EmbeddedCluster("k[1-3]").start()
print(json.dumps([str(cluster.identity), cluster.left_behind()[0]]), flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("victim", ["program", "keeper", "server"])
def test_nothing_outlives_a_kill(victim: str) -> None:
    root = Path(__file__).parents[1]
    program = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, cwd=root)
    assert program.stdout is not None
    with program, contextlib.ExitStack() as stack:
        stack.callback(program.kill)
        identity, processes = json.loads(program.stdout.readline())
        keeper, server = sorted(processes)
        os.kill({"program": program.pid, "keeper": keeper, "server": server}[victim], signal.SIGKILL)
        wait_until(lambda: not alive(keeper) and not alive(server))
        wait_until(lambda: not Path(identity).parent.exists())


def test_close_cleans_up_where_the_keeper_could_not() -> None:
    cluster = EmbeddedCluster("k1").start()
    with Client(cluster, "k1") as client:
        client.run("sleep 1000 >/dev/null 2>&1 &")
        os.kill(min(cluster.left_behind()[0]), signal.SIGKILL)
    cluster.close()
    wait_until(lambda: not any(map(alive, cluster.left_behind()[0])))
    assert not cluster.identity.parent.exists()


def test_the_demo_does_what_it_should() -> None:
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "examples/demo.py"],
        capture_output=True,
        check=False,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=25,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "nothing is left behind (0 processes, 0 files)." in done.stdout.splitlines()[-2]


def test_64_connections_at_once() -> None:
    with EmbeddedCluster("many[1-64]") as cluster:
        said: dict[str, str] = {}

        def talk(node: str) -> None:
            with Client(cluster, node) as client:
                said[node] = client.run("echo $CTASK_NODE")[1].strip()

        threads = [threading.Thread(target=talk, args=(node,)) for node in cluster.nodes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert said == {node: node for node in cluster.nodes}
