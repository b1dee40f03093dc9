# SPDX-License-Identifier: Apache-2.0
"""The harness itself: the sshd and the leak check do what the other tests rely on.

Runs in the thread of pytest.
"""

from __future__ import annotations

import os
import pwd
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctask_tests.fix_leaks import Snapshot, children_of, find_leaks, settle, wait_until
from ctask_tests.fix_sshd import Sshd, find_sshd, fingerprint, public_key, tied_to_us
from ctask_tests.plain_ssh import ssh, start_ssh

if TYPE_CHECKING:
    from ctask_tests.fix_sshd import SshdFactory


def test_home_and_agent_are_not_the_users() -> None:
    assert os.environ["HOME"] != pwd.getpwuid(os.geteuid()).pw_dir
    assert Path(os.environ["HOME"]).is_dir()
    assert "SSH_AUTH_SOCK" not in os.environ


def test_one_sshd_is_254_nodes_with_sh(sshd: Sshd) -> None:
    for node in (*sshd.nodes(2), sshd.address(254)):
        answer = ssh(sshd.options(), node, "echo $SSH_CONNECTION $0; id -un")
        assert answer.rc == 0, answer.err
        connection, user = answer.out.splitlines()
        assert connection.split()[2] == node
        assert user == sshd.user
    assert sshd.nodes(3, first=5) == ["127.0.1.5", "127.0.1.6", "127.0.1.7"]


def test_without_sshd_a_laptop_skips_and_ci_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="openssh-server"):
        find_sshd()
    monkeypatch.setenv("CI", "1")
    with pytest.raises(pytest.fail.Exception, match="openssh-server"):
        find_sshd()


def test_sshd_starts_with_nobody_connected(sshd_factory: SshdFactory) -> None:
    server = sshd_factory("MaxStartups 1")
    assert server.connections() == []
    assert ssh(server.options(), server.address(1), "true").rc == 0


def test_sshd_variants(sshd_factory: SshdFactory) -> None:
    server = sshd_factory("ForceCommand echo forced", host_keys=("ed25519", "ecdsa"), user_keys=2)
    assert [line.split()[0] for line in server.host_key_lines] == ["ssh-ed25519", "ecdsa-sha2-nistp256"]
    for identity in server.identities:
        options = server.options()
        options["identity"] = identity
        assert ssh(options, server.address(1), "true").out == "forced\n"
    assert ssh(server.options(), server.address(1), "true", "HostKeyAlgorithms=ecdsa-sha2-nistp256").rc == 0


def test_sshd_logs_each_key_it_was_offered(sshd: Sshd) -> None:
    options, since = sshd.options(), len(sshd.log())
    options["identity"] = sshd.new_key("stranger")
    assert ssh(options, sshd.address(1), "true").rc == 255
    offered = re.escape(fingerprint(public_key(options["identity"])))
    sshd.wait_log(f"Failed publickey for {sshd.user} .*{offered}", since=since)
    assert "Accepted publickey" not in sshd.log(since)


def test_a_key_is_authorized_with_options(sshd: Sshd) -> None:
    options = sshd.options()
    options["identity"] = sshd.new_key("bound")
    sshd.authorize(options["identity"], options='command="echo bound"')
    assert ssh(options, sshd.address(1), "true").out == "bound\n"


def test_sessions_are_found_and_killed_by_node(sshd_factory: SshdFactory) -> None:
    server = sshd_factory()
    one = start_ssh(server.options(), server.address(1), "sleep 60")
    two = start_ssh(server.options(), server.address(2), "sleep 60")
    with one, two:
        assert len(server.connections()) == 2
        assert len(server.sessions()) == 2
        assert server.sessions(server.address(1)) != server.sessions(server.address(2))
        # A session is there a moment before its command has come to its exec.
        wait_until(lambda: list(server.processes().values()).count("sleep 60") == 2, what="both commands run")
        assert server.kill_session(server.address(1)) == 1
        assert one.wait(10) == 255
        assert two.poll() is None
        server.kill_master()
        assert two.poll() is None
        assert len(server.sessions(server.address(2))) == 0  # its parent is gone, and with it the trace
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((server.address(1), server.port))
        server.stop()
        wait_until(lambda: not server.processes(), what="the commands have ended")
        assert two.wait(10) == 255


def test_sshd_dies_with_the_process_that_started_it() -> None:
    find_sshd()
    if not tied_to_us():
        pytest.skip("no setpriv that knows --pdeathsig (util-linux 2.33)")
    program = (
        "import time\nfrom ctask_tests.fix_sshd import Sshd\n"
        "server = Sshd(); server.start(); print(server.port, server.folder, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        port, folder = child.stdout.readline().split()
        child.kill()
    for path in Path(folder).iterdir():  # what a killed process cannot clean up
        path.unlink()
    Path(folder).rmdir()

    def refused() -> bool:
        try:
            socket.create_connection(("127.0.1.1", int(port))).close()
        except ConnectionRefusedError:
            return True
        except ConnectionResetError:  # it is about to
            return False
        return False

    wait_until(refused, what="sshd has died")


def test_interrupts_of_the_terminal_do_not_reach_sshd(sshd: Sshd) -> None:
    """It leads a session of its own: Ctrl-C is pytest's, which stops it in order."""
    assert sshd._process is not None
    assert os.getsid(sshd._process.pid) == sshd._process.pid
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_leaks_are_named() -> None:
    before = Snapshot.take()
    event = threading.Event()
    thread = threading.Thread(target=event.wait, name="forgotten")
    thread.start()
    reader, writer = os.pipe()
    with subprocess.Popen(["sleep", "60"]) as child:
        text = "\n".join(find_leaks(before, grace=0.0))
        child.kill()
    os.close(reader)
    os.close(writer)
    event.set()
    assert "thread 'forgotten'" in text
    assert "event.wait" in text or "in wait" in text
    assert f"descriptor {reader}: pipe:[" in text
    assert f"child {child.pid}: sleep 60" in text
    assert find_leaks(before, grace=2.0) == []


def test_a_descriptor_that_was_replaced_is_a_leak() -> None:
    old = os.open("/dev/null", os.O_RDONLY)
    before = Snapshot.take()
    os.close(old)
    new, other = os.pipe()
    leaks = find_leaks(before, grace=0.0)
    os.close(new)
    os.close(other)
    assert len(leaks) == 2


def test_zombies_are_leaks() -> None:
    before = Snapshot.take()
    child = subprocess.Popen(["true"])
    wait_until(lambda: children_of(os.getpid())[child.pid].state == "Z")
    leaks = find_leaks(before, grace=0.0)
    child.wait()
    assert len(leaks) == 1
    assert f"child {child.pid}: [true] Z" in leaks[0]


def test_what_lasts_is_let_through_once() -> None:
    before = Snapshot.take()
    event = threading.Event()
    thread = threading.Thread(target=event.wait, name="ctask/watcher", daemon=True)
    thread.start()
    loop, wake = select.epoll(), os.eventfd(0)
    first = find_leaks(before, grace=0.0)
    later = Snapshot.take()
    more = os.eventfd(0)
    second = find_leaks(later, grace=0.0)
    loop.close()
    os.close(wake)
    os.close(more)
    event.set()
    thread.join()
    assert first == []
    assert len(second) == 1


def test_tasks_and_kept_connections_are_ended_first(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    testing = types.ModuleType("ctask.testing")
    testing.__dict__["close_everything"] = lambda: ended.append("all")
    monkeypatch.setitem(sys.modules, "ctask", types.ModuleType("ctask"))
    monkeypatch.setitem(sys.modules, "ctask.testing", testing)
    settle()
    assert ended == ["all"]


@pytest.mark.leaks_ok
def test_a_marked_test_may_leak(request: pytest.FixtureRequest) -> None:
    child = subprocess.Popen(["sleep", "0"])
    request.addfinalizer(child.wait)


@given(st.integers())
def test_the_check_gets_along_with_hypothesis(number: int) -> None:
    """An autouse fixture of function scope does not fail its health check."""
    assert number is not None


def test_a_leaking_test_fails(tmp_path: Path) -> None:
    program = (
        "import os\nfrom ctask_tests import fix_leaks\n\n"
        "def test_leaks():\n    fix_leaks.GRACE = 0.01\n    os.pipe()\n"
    )
    (tmp_path / "test_leaking.py").write_text(program)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "ctask_tests.fix_leaks", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [*command, "--rootdir", str(tmp_path), str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        env=environment,
    )
    assert done.returncode == 1, done.stdout
    assert "left behind by this test" in done.stdout
    assert "pipe:[" in done.stdout
