# SPDX-License-Identifier: Apache-2.0
"""How a program ends: by a real SIGINT (row H09) and by leaving while everything runs (row H10)."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from ctask_tests.child import Child
from ctask_tests.fix_leaks import wait_until
from ctask_tests.fix_proxy import deaf, silent
from ctask_tests.fix_sshd import Sshd

#: Every kind of job that a program can leave behind. Remote commands read their input: they end with the connection.
EVERYTHING = """
task.node_options("deaf", address=GIVEN["deaf"][0], port=GIVEN["deaf"][1])
task.node_options("silent", address=GIVEN["silent"][0], port=GIVEN["silent"][1])
address, options = GIVEN["address"], GIVEN["options"]
dialing = task.submit("true", nodes="deaf,silent")
remote = task.submit("echo up; cat", nodes=address, stdin=True, **options)
local = task.submit("echo $$; exec sleep 600", key="local")
scheduled = task.shell("echo never", nodes=address, **options)
busy, own = threading.Event(), Task()
def block(worker, node, sname, msg):
    busy.set()
    time.sleep(600)
own.run("echo up; cat", nodes=address, on_read=block, **options)
wait_until(lambda: remote.node_buffer(address) == "up" and local.node_buffer("local") and busy.is_set())
assert not dialing.done()
say("running", local.node_buffer("local"))
"""

LEAVING = {
    "the end": ("say('leaving', time.monotonic())", 0),
    "sys.exit": ("say('leaving', time.monotonic()); sys.exit(7)", 7),
    "beside a daemon thread": (
        """
threading.Thread(target=lambda: task_self().run("cat", key="daemon"), daemon=True).start()
wait_until(lambda: threading.active_count() > 4)
say("leaving", time.monotonic())
""",
        0,
    ),
}


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_interpreter_still_has_what_the_closing_needs() -> None:
    # A private function: where a Python has it no longer, another way must be found (docs/design.md, "The exit").
    assert callable(threading._register_atexit)  # type: ignore[attr-defined]


@pytest.mark.parametrize("way", LEAVING)
def test_h10_the_interpreter_exits_with_everything_running(sshd: Sshd, way: str) -> None:
    program, status = LEAVING[way]
    with deaf() as no_answer, silent() as no_word:
        given = {"deaf": no_answer, "silent": no_word, "address": sshd.address(1), "options": dict(sshd.options())}
        with Child(EVERYTHING + program, **given) as child:
            pid = int(child.expect("running"))
            left = float(child.expect("leaving"))
            assert child.end() == status
            assert time.monotonic() - left < 2.5  # promised: 2 s
            assert child.errors() == ""
            assert child.line() == ""
    wait_until(lambda: not alive(pid), what="the local command's end")
    sshd.wait_idle()


def test_h10_what_does_not_heed_term_is_killed(sshd: Sshd) -> None:
    program = """
worker = task.submit("trap '' TERM; echo $$; while :; do sleep 0.1; done", key="deaf")
wait_until(lambda: worker.node_buffer("deaf"))
say(worker.node_buffer("deaf"))
say("leaving", time.monotonic())
sys.exit(3)
"""
    with Child(program) as child:
        pid = int(child.line())
        left = float(child.expect("leaving"))
        assert child.end() == 3
        assert time.monotonic() - left < 2.5
        assert child.errors() == ""
    wait_until(lambda: not alive(pid), what="the local command's end")


def test_h10_with_idle_connections_it_leaves_at_once(sshd: Sshd) -> None:
    program = """
task.run("echo hi", nodes=GIVEN["nodes"], **GIVEN["options"])
own = Task()
own.run("echo hi", key="local")
own.join()
say("leaving", time.monotonic())
"""
    with Child(program, nodes=sshd.nodes(8), options=dict(sshd.options())) as child:
        left = float(child.expect("leaving"))
        assert child.end() == 0
        assert time.monotonic() - left < 2
        assert child.errors() == ""
    sshd.wait_idle()


def test_h10_a_users_own_thread_does_its_work_to_the_end(sshd: Sshd) -> None:
    program = """
def work():
    mine = task_self()
    # From its first line on: early Pythons 3.12 start no thread once the main one has ended.
    started = lambda worker, node, sname, msg: begun.set()
    mine.run("echo worked; sleep 0.7", nodes=GIVEN["address"], on_read=started, **GIVEN["options"])
    say(mine.node_buffer(GIVEN["address"]))
    mine.run("echo and again", nodes=GIVEN["address"], **GIVEN["options"])
    say(mine.node_buffer(GIVEN["address"]))
    mine.run("echo here as well", key="local")
    say(mine.node_buffer("local"))
begun = threading.Event()
threading.Thread(target=work).start()
begun.wait()
say("leaving")
sys.exit(5)
"""
    with Child(program, address=sshd.address(1), options=dict(sshd.options())) as child:
        child.expect("leaving")
        assert [child.line() for _ in range(3)] == ["worked", "and again", "here as well"]
        assert child.end() == 5
        assert child.errors() == ""


@pytest.mark.load
def test_b03_a_resolver_that_hangs_holds_neither_the_run_nor_the_exit() -> None:
    program = """
import socket
import ctask.transports.ssh  # loading it takes a second on a busy machine, and is no part of what is promised
socket.getaddrinfo = lambda *_, **__: time.sleep(600)
began = time.monotonic()
try:
    task.run("true", nodes="hangs", deadline=0.3)
except TaskTimeout:
    say("raised", time.monotonic() - began)
worker = task.run("true", nodes="hangs", connect_timeout=0.2)
(result,) = worker.results()
say(type(result.error).__name__, result.phase, result.outcome.name)
say("leaving", time.monotonic())
"""
    with Child(program) as child:
        assert 0.3 <= float(child.expect("raised")) < 1.3
        assert child.line() == "ResolveError resolve UNREACHED"
        left = float(child.expect("leaving"))
        assert child.end() == 0
        assert time.monotonic() - left < 2.5, "promised: 2 s"
        assert child.errors() == ""


# -- H09 -------------------------------------------------------------------------------------------------------------

#: What is going on when Ctrl-C comes, in run().
INTERRUPTED = {
    "connect": 'task.run("true", nodes="silent", on_pickup=go)',
    "read": 'task.run("yes; cat", nodes=ADDRESS, on_read=go, **OPTIONS)',
    "quiet command": 'task.run("echo up; cat", nodes=ADDRESS, on_read=go, **OPTIONS)',
    "local command": 'task.run("echo up; exec sleep 600", key="local", on_read=go)',
    "handler": """
def block(*_):
    go()
    time.sleep(600)
task.run("echo up; cat", nodes=ADDRESS, on_read=block, **OPTIONS)
""",
    "handler that waits": """
def block(worker, *_):
    go()
    worker.wait()
task.run("echo up; cat", nodes=ADDRESS, on_read=block, **OPTIONS)
""",
    "many of each": """
task.shell("true", nodes="silent", on_pickup=go)
task.shell("echo up; exec sleep 600", nodes=GIVEN["nodes"], **OPTIONS)
task.shell("exec sleep 600", key="local")
task.resume()
""",
}

#: In these, Ctrl-C only stops the waiting.
WAITING = {
    "join": "task.join()",
    "wait": "worker.wait()",
    "results": "list(worker.results())",
    "result": "worker.result(ADDRESS)",
    "as_completed": "list(as_completed(worker))",
}

BEGIN = """
ADDRESS, OPTIONS, told = GIVEN["address"], GIVEN["options"], []
task.node_options("silent", address=GIVEN["silent"][0], port=GIVEN["silent"][1])
def go(*_):
    if not told:
        told.append(1)
        say("go")
"""

END = """
except KeyboardInterrupt:
    say("raised", time.monotonic())
else:
    say("it was not raised")
workers = task.workers
wait_until(lambda: all(worker.done() for worker in workers))
say(sorted({result.outcome.name for worker in workers for result in worker.results()}))
close_everything()
until = time.monotonic() + 2
while threading.active_count() > 1 and time.monotonic() < until:
    time.sleep(0.005)  # they are on their last lines
say(sorted(thread.name for thread in threading.enumerate()))
"""


def indented(program: str) -> str:
    return "try:\n" + "".join(f"    {line}\n" for line in program.strip().splitlines())


@pytest.mark.parametrize("what", INTERRUPTED)
def test_h09_ctrl_c_in_run_ends_everything_and_raises(sshd: Sshd, what: str) -> None:
    with silent() as no_word:
        given = {"address": sshd.address(1), "nodes": sshd.nodes(6), "options": dict(sshd.options()), "silent": no_word}
        with Child(BEGIN + indented(INTERRUPTED[what]) + END.lstrip("\n"), **given) as child:
            child.expect("go")
            interrupted = child.interrupt()
            raised = float(child.expect("raised"))
            assert raised - interrupted < 1.5  # promised: 1 s
            assert child.line() == "['ABORTED']"
            assert child.line() == "['MainThread']"
            assert child.end() == 0
            assert child.errors() == ""
    sshd.wait_idle()


@pytest.mark.parametrize("what", WAITING)
def test_h09_ctrl_c_in_a_wait_only_stops_the_waiting(sshd: Sshd, what: str) -> None:
    begin = """
worker = task.submit("read x; echo got $x", nodes=ADDRESS, stdin=True, **OPTIONS)
wait_until(lambda: worker.jobs[0].phase == "running")
main = threading.main_thread().ident
def waits():
    # As soon as the main thread waits in the pump.
    wait_until(lambda: sys._current_frames()[main].f_code.co_name == "_sleep")
    go()
threading.Thread(target=waits, daemon=True).start()
"""
    end = """
except KeyboardInterrupt:
    say("raised", time.monotonic())
worker.write("an answer\\n")
say(worker.result(ADDRESS).stdout.text)
"""
    with silent() as no_word:
        given = {"address": sshd.address(1), "options": dict(sshd.options()), "silent": no_word}
        with Child(BEGIN + begin + indented(WAITING[what]) + end.lstrip("\n"), **given) as child:
            child.expect("go")
            interrupted = child.interrupt()
            assert float(child.expect("raised")) - interrupted < 1
            assert child.line() == "got an answer"
            assert child.end() == 0
            assert child.errors() == ""
    sshd.wait_idle()


def test_h09_nobody_catches_it(sshd: Sshd) -> None:
    program = BEGIN + 'task.run("echo up; cat", nodes=ADDRESS, on_read=go, **OPTIONS)'
    with silent() as no_word:
        given = {"address": sshd.address(1), "options": dict(sshd.options()), "silent": no_word}
        with Child(program, **given) as child:
            child.expect("go")
            interrupted = child.interrupt()
            assert child.end() == -signal.SIGINT
            assert time.monotonic() - interrupted < 3.5  # 1 s for run(), 2 s for the exit
            assert child.errors().count("Traceback") == 1
            assert child.errors().splitlines()[-1] == "KeyboardInterrupt"
    sshd.wait_idle()
