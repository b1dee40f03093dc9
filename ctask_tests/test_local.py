# SPDX-License-Identifier: Apache-2.0
"""Local commands: output, exit, standard input, back-pressure, terminals, and ending whole sessions.

Real processes of this machine. `Recorder` is the sink; it is called in the watcher's thread and read here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ctask.errors import ConnectionLost, ExecRefused, LocalResource, NodeError
from ctask.options import Command, Stop, Target
from ctask.result import Ending
from ctask.transports.base import STDERR, STDOUT, Session, Transport
from ctask.transports.local import LocalConnection, LocalSession, LocalTransport, transport
from ctask.transports.local import processes as processes_module
from ctask.transports.local import session as session_module
from ctask.transports.watcher import close_watcher, watcher
from ctask_tests.fix_leaks import children_of, wait_until

ROOT = Path(__file__).resolve().parent.parent


class Recorder:
    """A sink that notes everything, and objects where the Protocol is broken."""

    def __init__(self, *, allow: bool = True) -> None:
        self.said: list[str] = []
        self.chunks: list[tuple[int, bytes]] = []
        self.error: NodeError | None = None
        self.result: tuple[int | None, str | None] | None = None
        self.allow = allow
        self.asked = 0
        self.flushed = 0
        self.rooms = 0
        self.unflushed = False
        self.threads: set[str] = set()
        self.wrong: list[str] = []

    def _note(self, word: str) -> None:
        self.threads.add(threading.current_thread().name)
        if "ended" in self.said:
            self.wrong.append(f"{word} after ended")
        self.unflushed = True
        self.said.append(word)

    def phase(self, name: str) -> None:
        self._note(name)

    def data(self, stream: int, chunk: bytes) -> None:
        self._note("data")
        self.chunks.append((stream, chunk))

    def flush(self) -> None:
        self.flushed += 1
        self.unflushed = False

    def widen(self, size: int) -> int:
        return 0

    def may(self, session: Session) -> bool:
        assert isinstance(session, LocalSession)
        self.asked += 1
        return self.allow

    def writable(self) -> None:
        self.rooms += 1

    def exited(self, status: int | None, signal: str | None) -> None:
        self._note("exited")
        self.result = (status, signal)

    def ended(self, error: NodeError | None) -> None:
        self._note("ended")
        self.error = error

    @property
    def over(self) -> bool:
        """Whether it has ended and was flushed, which is what makes a job look."""
        return "ended" in self.said and not self.unflushed

    def stream(self, number: int) -> bytes:
        return b"".join(chunk for stream, chunk in self.chunks if stream == number)

    @property
    def out(self) -> bytes:
        return self.stream(STDOUT)

    @property
    def err(self) -> bytes:
        return self.stream(STDERR)

    def wait(self, timeout: float = 10.0) -> Recorder:
        wait_until(lambda: self.over, timeout=timeout, what=f"the end; so far {self.said[-5:]}")
        assert self.wrong == []
        assert self.threads == {"ctask/watcher"}
        return self


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    try:
        wait_until(lambda: not session_module.sessions, timeout=2.0, what="all sessions are over, all processes reaped")
    finally:
        # One test's leftovers are not to be another's.
        left = tuple(session_module.sessions)
        LocalConnection().end(left, Stop(grace=0.1), within=2.0)
        session_module.sessions.difference_update(left)
        close_watcher()


@pytest.fixture
def here() -> LocalConnection:
    return LocalConnection()


def begin(here: LocalConnection, line: str, sink: Recorder | None = None, **options: Any) -> tuple[Any, Recorder]:
    sink = sink or Recorder()
    session = here.prepare(Command(line=line.encode(), **options), sink)
    session.start()
    return session, sink


def states(endings: dict[Session, Ending]) -> list[str]:
    return [ending.state for ending in endings.values()]


def run(here: LocalConnection, line: str, **options: Any) -> Recorder:
    return begin(here, line, **options)[1].wait()


def argv(here: LocalConnection, *words: bytes) -> Recorder:
    sink = Recorder()
    here.prepare(Command(argv=words), sink).start()
    return sink.wait()


def feed(session: LocalSession, sink: Recorder, data: bytes) -> None:
    """Write all of it, as a pool's thread does: on a short write it waits for room."""
    left = memoryview(data)
    while left:
        rooms = sink.rooms
        left = left[session.write(left) :]
        if left:
            wait_until(lambda rooms=rooms: sink.rooms > rooms, what="room on standard input")  # type: ignore[misc]


def pid_of(session: LocalSession) -> int:
    process = session.started(time.monotonic() + 5)
    assert process is not None
    return process.pid


def alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def pids_in(sink: Recorder, count: int) -> list[int]:
    """The numbers that a command has printed, once there are as many."""
    wait_until(lambda: len(sink.out.split()) >= count, what=f"{count} pids")
    return [int(word) for word in sink.out.split()[:count]]


class TestTransport:
    def test_it_is_always_there_and_dials_nothing(self) -> None:
        local: Transport = LocalTransport()
        target = Target(transport="local", address="n1")
        local.check(target)
        connection = local.take(target)
        assert connection is not None
        assert connection is local.take(Target(transport="local"))
        assert connection.target.transport == "local"
        assert (local.dials, local.reserve(), local.shunned(target, 0.0)) == (False, False, False)
        local.keep(connection)
        local.give_back(connection)
        connection.retire()
        assert local.take(target) is connection
        with pytest.raises(RuntimeError):
            local.connect(target, None, lambda _: None)  # type: ignore[arg-type]

    def test_i01_it_has_room_for_as_many_as_there_are_descriptors_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        monkeypatch.setattr(resource, "getrlimit", lambda _: (26 + 4 * 3 + 1, hard))
        local: Transport = LocalTransport()
        target = Target(transport="local")
        told: list[str] = []
        local.when_room(lambda: told.append("now"))
        taken = [local.take(target) for _ in range(3)]
        assert None not in taken
        assert local.take(target) is None
        local.when_room(lambda: told.append("later"))
        assert told == ["now"]
        assert taken[0] is not None
        local.give_back(taken[0])
        assert told == ["now", "later"]
        assert local.take(target) is not None
        assert local.take(target) is None

    def test_there_is_one_in_a_process(self) -> None:
        assert transport() is transport()


class TestOutput:
    def test_what_it_tells_in_which_order(self, here: LocalConnection) -> None:
        sink = run(here, "echo out; echo err >&2; exit 3")
        assert sink.said[:2] == ["exec", "running"]
        assert sink.said[-1] == "ended"
        assert sink.said.count("exited") == 1
        assert (sink.out, sink.err, sink.result, sink.error) == (b"out\n", b"err\n", (3, None), None)

    def test_e05_both_streams_of_3_mb_interleaved_are_whole(self, here: LocalConnection) -> None:
        program = (
            "import os\n"
            "for i in range(300):\n"
            "    os.write(1, b'%04d' % i + b'o' * 9996)\n"
            "    os.write(2, b'%04d' % i + b'e' * 9996)\n"
        )
        sink = argv(here, sys.executable.encode(), b"-c", program.encode())
        for stream, letter in ((STDOUT, b"o"), (STDERR, b"e")):
            assert sink.stream(stream) == b"".join(b"%04d" % i + letter * 9996 for i in range(300))
        assert sink.result == (0, None)

    def test_output_that_comes_together_is_flushed_once(self, here: LocalConnection) -> None:
        sink = run(here, "head -c 3000000 /dev/zero")
        assert len(sink.out) == 3_000_000
        assert sink.flushed <= len(sink.chunks) + 3

    def test_bytes_are_kept_as_they_are(self, here: LocalConnection) -> None:
        everything = bytes(range(256))
        octal = "".join(f"\\{byte:03o}" for byte in everything)
        assert run(here, f"printf '{octal}'").out == everything

    def test_arguments_are_given_without_a_shell(self, here: LocalConnection) -> None:
        sink = argv(here, b"printf", b"%s|", b"a b", b"$HOME", b"'", b"\xff")
        assert sink.out == b"a b|$HOME|'|\xff|"

    def test_a_reader_that_says_no_is_not_read_for_until_credit_is_given(self, here: LocalConnection) -> None:
        session, sink = begin(here, "head -c 3000000 /dev/zero; echo done >&2", Recorder(allow=False))
        wait_until(lambda: sink.asked == 1)
        passed = threading.Event()
        watcher().at(time.monotonic() + 0.05, passed.set)
        assert passed.wait(5)
        assert sink.asked == 1
        assert session_module.CREDIT <= len(sink.out) < session_module.CREDIT + session_module.CHUNK
        assert "exited" not in sink.said
        session.give()
        wait_until(lambda: sink.asked == 2)
        assert len(sink.out) < 2 * (session_module.CREDIT + session_module.CHUNK)
        sink.allow = True
        session.give()
        sink.wait()
        assert (len(sink.out), sink.err) == (3_000_000, b"done\n")

    def test_an_exit_overtakes_output_that_is_not_read(self, here: LocalConnection) -> None:
        size = session_module.CREDIT + session_module.CHUNK  # what is left fits into the pipe
        session, sink = begin(here, f"head -c {size} /dev/zero; exit 5", Recorder(allow=False))
        wait_until(lambda: sink.result is not None)
        assert sink.result == (5, None)
        assert "ended" not in sink.said
        session.give()
        assert len(sink.wait().out) == size


class TestExit:
    @pytest.mark.parametrize("status", [0, 1, 126, 127, 128, 255])
    def test_f01_statuses_are_exact(self, here: LocalConnection, status: int) -> None:
        assert run(here, f"exit {status}").result == (status, None)

    @pytest.mark.parametrize("name", ["TERM", "KILL", "SEGV", "HUP", "PIPE", "USR1"])
    def test_f02_a_signal_is_told_by_name(self, here: LocalConnection, name: str) -> None:
        sink = run(here, f"ulimit -c 0; kill -s {name} $$")
        assert (sink.result, sink.error) == ((None, name), None)

    def test_f02_a_signal_without_a_name_of_its_own(self, here: LocalConnection) -> None:
        number = signal.SIGRTMIN + 3
        assert run(here, f"kill -{number} $$").result == (None, "RTMIN+3")

    def test_f05_a_background_child_that_holds_the_output(self, here: LocalConnection) -> None:
        session, sink = begin(here, "sleep 60 & echo $!; exit 7")
        wait_until(lambda: sink.result is not None)
        (child,) = pids_in(sink, 1)
        assert (sink.result, "ended" in sink.said) == ((7, None), False)
        session.close()
        sink.wait()
        assert sink.error is None
        assert alive(child)  # what it left in the background stays
        os.kill(child, signal.SIGKILL)

    def test_closing_lets_run_what_runs(self, here: LocalConnection) -> None:
        session, sink = begin(here, "echo $$; exec sleep 60")
        (pid,) = pids_in(sink, 1)
        session.close()
        sink.wait()
        assert (alive(pid), transport().living(), sink.result) == (True, 1, None)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not transport().living())  # reaped all the same
        assert sink.wrong == []

    def test_e13_an_end_of_output_alone_ends_nothing(self, here: LocalConnection, tmp_path: Path) -> None:
        fifo = tmp_path / "go"
        os.mkfifo(fifo)
        session, sink = begin(here, f"exec >&- 2>&-; read x < {fifo}; exit 3")
        wait_until(lambda: not session._outputs and "running" in sink.said)
        assert "ended" not in sink.said
        fifo.write_text("go\n")
        assert sink.wait().result == (3, None)

    @pytest.mark.parametrize("failure", [errno.ENOSYS, errno.EMFILE])
    def test_without_pidfd_ends_are_seen_too(
        self, here: LocalConnection, monkeypatch: pytest.MonkeyPatch, failure: int
    ) -> None:
        def none(_: int) -> int:
            raise OSError(failure, os.strerror(failure))

        monkeypatch.setattr(os, "pidfd_open", none)
        assert run(here, "echo a; exit 4").result == (4, None)
        assert run(here, "exec >&- 2>&-; sleep 0.1; exit 5").result == (5, None)
        session, sink = begin(here, "trap '' TERM; echo $$; while :; do sleep 1; done")
        (pid,) = pids_in(sink, 1)
        assert states(here.end([session], Stop(grace=0.1), within=5.0)) == ["gone"]
        assert not alive(pid)
        sink.wait()

    def test_a_status_that_somebody_else_took_is_not_known(
        self, here: LocalConnection, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        taken: list[int] = []

        def robbed(pid: int, _: int) -> tuple[int, int]:
            taken.append(waitpid(pid, 0)[0])
            raise ChildProcessError(errno.ECHILD, "No child processes")

        waitpid = os.waitpid
        monkeypatch.setattr(os, "waitpid", robbed)
        session, sink = begin(here, "echo last words; sleep 60 & exit 3")
        sink.wait()
        assert isinstance(sink.error, ConnectionLost)
        assert (sink.out, sink.result, len(taken)) == (b"last words\n", None, 1)
        monkeypatch.undo()
        assert states(here.end([session], Stop(grace=5.0), within=5.0)) == ["gone"]  # the child that it left


class TestStart:
    def test_a_program_that_does_not_exist_was_not_run(self, here: LocalConnection) -> None:
        sink = argv(here, b"no-such-program-here")
        assert isinstance(sink.error, ExecRefused)
        assert (sink.error.reason, sink.error.phase) == ("no such program: no-such-program-here", "exec")
        assert sink.said == ["exec", "ended"]

    def test_a_file_that_may_not_be_run(self, here: LocalConnection, tmp_path: Path) -> None:
        path = tmp_path / "data"
        path.write_text("no program")
        sink = argv(here, str(path).encode())
        assert isinstance(sink.error, ExecRefused)
        assert sink.error.reason == f"not a program that may be run: {path}"

    def test_no_descriptors_left(self, here: LocalConnection, monkeypatch: pytest.MonkeyPatch) -> None:
        made: list[int] = []
        pipe = os.pipe

        def few() -> tuple[int, int]:
            if len(made) == 2:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            made.append(1)
            return pipe()

        monkeypatch.setattr(os, "pipe", few)
        _, sink = begin(here, "true", stdin=True)
        sink.wait()
        assert isinstance(sink.error, LocalResource)
        assert (sink.error.phase, sink.said) == ("open", ["ended"])

    def test_one_that_is_dropped_before_its_process_never_runs(self, here: LocalConnection, tmp_path: Path) -> None:
        mark = tmp_path / "ran"
        hold, held = threading.Event(), threading.Event()

        def block() -> None:
            held.set()
            hold.wait(5)

        watcher().call(block)
        assert held.wait(5)
        session, sink = begin(here, f"touch {mark}")
        kept, kept_sink = begin(here, "true")
        assert session.drop()
        assert session.drop()
        hold.set()
        kept_sink.wait()
        assert not kept.drop()
        sink.wait()
        assert (sink.said, sink.error, mark.exists()) == (["ended"], None, False)
        assert states(here.end([session], Stop(grace=1.0), within=1.0)) == ["gone"]

    def test_one_that_is_dropped_unstarted_says_nothing(self, here: LocalConnection) -> None:
        sink = Recorder()
        session = here.prepare(Command(line=b"true"), sink)
        assert session.drop()
        session.start()
        assert session.try_start()
        run(here, "true")
        assert sink.said == []

    def test_drops_race_with_starts_and_both_sides_agree(self, here: LocalConnection, tmp_path: Path) -> None:
        begun = [(*begin(here, f"touch {tmp_path}/{number}"), number) for number in range(60)]
        dropped = [session.drop() for session, _, _ in reversed(begun)][::-1]
        for _, sink, _ in begun:
            sink.wait()
        assert [not (tmp_path / str(number)).exists() for _, _, number in begun] == dropped
        assert any(dropped)

    def test_a_command_begins_as_in_a_fresh_session(self, here: LocalConnection) -> None:
        program = (
            "import os, signal\n"
            "ignored = [s.name for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)"
            " if signal.getsignal(s) == signal.SIG_IGN]\n"
            "mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())\n"
            "fds = [int(f) for f in os.listdir('/proc/self/fd') if os.path.exists('/proc/self/fd/' + f)]\n"
            "print(os.getsid(0) == os.getpid() == os.getpgid(0), ignored, mask, *sorted(fds))\n"
        )
        read, write = os.pipe()
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            sink = argv(here, sys.executable.encode(), b"-c", program.encode())
        finally:
            signal.signal(signal.SIGHUP, before)
            os.close(read)
            os.close(write)
        # What is inheritable in this process (its caller may have had a reason) is inherited; nothing of ours is.
        kept = {fd for fd in map(int, os.listdir("/proc/self/fd")) if _inheritable(fd)}
        assert sink.out.decode().rstrip() == " ".join(["True [] set()", *map(str, sorted({0, 1, 2} | kept))])

    def test_it_works_where_the_standard_descriptors_are_closed(self) -> None:
        done = _python(
            """
            import os
            for fd in (0, 1):
                os.close(fd)
            from ctask_tests.test_local import Recorder
            from ctask.options import Command
            from ctask.transports.local import transport
            sink = Recorder()
            session = transport().take(None).prepare(Command(line=b"cat; echo err >&2", stdin=True), sink)
            session.start()
            session.close_stdin()
            sink.wait()
            os.write(2, sink.out + sink.err + str(sink.result).encode())
            """
        )
        assert (done.returncode, done.stderr) == (0, "err\n(0, None)")


class TestInput:
    def test_without_input_a_command_reads_the_end_at_once(self, here: LocalConnection) -> None:
        assert run(here, "cat; echo $?").out == b"0\n"

    def test_what_is_written_arrives_and_then_the_end(self, here: LocalConnection) -> None:
        session, sink = begin(here, "sort", stdin=True)
        feed(session, sink, b"b\na\n")
        feed(session, sink, b"c\n")
        session.close_stdin()
        session.close_stdin()
        assert sink.wait().out == b"a\nb\nc\n"
        assert session.write(memoryview(b"late")) == 4

    def test_megabytes_through_cat_are_whole(self, here: LocalConnection) -> None:
        data = os.urandom(1 << 20) * 5
        session, sink = begin(here, "cat", stdin=True)
        feed(session, sink, data)
        session.close_stdin()
        assert sink.wait().out == data

    def test_the_end_may_be_asked_for_before_the_process_is_there(self, here: LocalConnection) -> None:
        sink = Recorder()
        session = here.prepare(Command(line=b"cat; echo end", stdin=True), sink)
        session.close_stdin()
        session.start()
        assert sink.wait().out == b"end\n"

    def test_e12_64_mb_for_a_command_that_reads_nothing(self, here: LocalConnection) -> None:
        session, sink = begin(here, "true", stdin=True)
        feed(session, sink, bytes(64 << 20))
        session.close_stdin()
        assert sink.wait().result == (0, None)

    def test_e12_no_signal_reaches_a_program_that_asked_for_sigpipe(self) -> None:
        done = _python(
            """
            import signal, sys
            from ctask_tests.test_local import Recorder, feed
            from ctask.options import Command
            from ctask.transports.local import transport
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            sink = Recorder()
            session = transport().take(None).prepare(Command(line=b"exec <&-; sleep 0.2; exit 3", stdin=True), sink)
            session.start()
            feed(session, sink, bytes(4 << 20))
            print(sink.wait().result)
            """
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "(3, None)\n", "")

    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12 and newer warn of the test itself
    def test_a_forked_child_does_not_keep_the_input_open(self, here: LocalConnection) -> None:
        session, sink = begin(here, "cat; echo end", stdin=True)
        feed(session, sink, b"data\n")
        read, write = os.pipe()
        child = os.fork()
        if not child:
            try:
                os.close(write)
                os.read(read, 1)  # until the test is over
            finally:
                os._exit(0)
        os.close(read)
        session.close_stdin()
        assert sink.wait().out == b"data\nend\n"
        os.close(write)
        os.waitpid(child, 0)


class TestTerminal:
    def test_f11_a_command_with_a_terminal_of_its_own(self, here: LocalConnection) -> None:
        sink = run(here, "test -t 0 && test -t 1 && test -t 2 && echo yes; echo err >&2; stty size </dev/tty", pty=True)
        assert (sink.out, sink.err) == (b"yes\r\nerr\r\n24 80\r\n", b"")
        assert sink.result == (0, None)

    def test_input_and_its_end_go_through_the_terminal(self, here: LocalConnection) -> None:
        session, sink = begin(here, "stty -echo; echo ready; cat; echo end", stdin=True, pty=True)
        wait_until(lambda: b"ready" in sink.out)
        feed(session, sink, b"line\npart")
        session.close_stdin()
        assert sink.wait().out == b"ready\r\nline\r\npartend\r\n"

    def test_without_input_it_reads_the_end(self, here: LocalConnection) -> None:
        assert run(here, "cat; echo end", pty=True).out == b"end\r\n"

    def test_f11_closing_hangs_the_command_up(self, here: LocalConnection) -> None:
        session, sink = begin(here, "echo $$; exec sleep 60", pty=True)
        (pid,) = pids_in(sink, 1)
        session.close()
        sink.wait()
        wait_until(lambda: not alive(pid))


class TestEnding:
    def test_a_command_is_ended_by_term(self, here: LocalConnection) -> None:
        session, sink = begin(here, "trap 'echo bye; exit 9' TERM; echo $$; while :; do sleep 0.02; done")
        pids_in(sink, 1)
        assert states(here.end([session], Stop(grace=5.0), within=5.0)) == ["gone"]
        assert sink.over  # told before `end` returned, with what it said last
        assert sink.wait().out.endswith(b"bye\n")
        assert sink.result == (9, None)

    def test_one_that_ignores_term_is_killed_after_its_grace(self, here: LocalConnection) -> None:
        session, sink = begin(here, "trap '' TERM; (while :; do sleep 1; done) & echo $$ $!; wait; wait")
        pids = pids_in(sink, 2)
        begun = time.monotonic()
        assert states(here.end([session], Stop(grace=0.3), within=5.0)) == ["gone"]
        assert time.monotonic() - begun >= 0.3
        assert [alive(pid) for pid in pids] == [False, False]
        assert sink.wait().result == (None, "KILL")

    def test_other_process_groups_of_the_session_are_told_too(self, here: LocalConnection) -> None:
        # `timeout` makes a group of its own: a TERM to the leader's group leaves it and its child alive.
        session, sink = begin(here, "timeout 60 sh -c 'echo $PPID $$; exec sleep 60' & wait")
        pids = pids_in(sink, 2)
        assert states(here.end([session], Stop(grace=10.0), within=5.0)) == ["gone"]
        assert [alive(pid) for pid in pids] == [False, False]
        sink.wait()

    def test_what_a_reaped_leader_left_behind_is_ended(self, here: LocalConnection) -> None:
        session, sink = begin(here, "sleep 60 & (trap '' TERM; while :; do sleep 1; done) & echo $!; exit 0")
        (stubborn,) = pids_in(sink, 1)
        wait_until(lambda: sink.result is not None)
        assert transport().living() == 0
        assert states(here.end([session], Stop(grace=0.2), within=5.0)) == ["gone"]
        assert not alive(stubborn)
        sink.wait()

    @pytest.mark.parametrize("heeds", [True, False], ids=["heeds", "ignores"])
    def test_what_su_waits_for_is_a_part_of_the_command(
        self, here: LocalConnection, tmp_path: Path, heeds: bool
    ) -> None:
        # By the name: what another program starts so has left on purpose.
        su = tmp_path / "su"
        shutil.copy(shutil.which("dash") or "/bin/sh", su)
        inner = tmp_path / "inner"
        inner.write_text(f"{'' if heeds else 'trap : TERM'}\n(trap '' TERM; echo $$; exec sleep 60) & wait; wait\n")
        outer = tmp_path / "outer"
        outer.write_text(f"trap 'kill $!; exit' TERM; setsid sh {inner} & echo $!; wait\n")
        session, sink = begin(here, f"{su} {outer}; true")
        pids_in(sink, 2)
        begun = time.monotonic()
        ending = here.end([session], Stop("term", 0.3), within=0.5)[session]
        assert ending.state == "alive", "by term only"
        assert "sleep" in [process.name for process in ending.processes]
        assert time.monotonic() - begun >= 0.3
        other, sink = begin(here, f"{su} {outer}; true")
        pids = pids_in(sink, 2)
        assert states(here.end([other], Stop("kill", 0.2), within=5.0)) == ["gone"]
        assert not any(alive(pid) for pid in pids)
        for process in ending.processes:
            with contextlib.suppress(ProcessLookupError):  # one that heeds TERM may have needed longer
                os.kill(process.pid, signal.SIGKILL)

    @pytest.mark.skipif(os.geteuid() != 0 or shutil.which("su") is None, reason="only root's su asks for no password")
    def test_a_command_of_su_is_ended_as_well(self, here: LocalConnection) -> None:
        line = "su root -s /bin/sh -c 'trap \"\" TERM HUP; echo $$; sleep 60 & echo $!; wait; wait'"
        session, sink = begin(here, line)
        pids = pids_in(sink, 2)
        (ending,) = here.end([session], Stop("kill", 0.2), within=5.0).values()
        assert ending.state == "gone"
        assert ending.ended is not None
        assert ending.ended >= 3, "su, the shell, and its child"
        assert not any(alive(pid) for pid in pids)

    def test_a_number_that_is_anothers_by_now_gets_no_signal(self, here: LocalConnection) -> None:
        # A stranger, seen as if it had got the number of a command that has ended.
        stranger = subprocess.Popen(["sleep", "60"], start_new_session=True)
        process = processes_module.Process(stranger.pid)
        process.ended = 1.0  # long before the stranger began
        results = processes_module.end_sessions([process], Stop(grace=0.05), 2.0, watcher().at)
        assert results == {process: Ending("gone", 0)}
        assert stranger.poll() is None
        stranger.kill()
        stranger.wait()

    def test_members_that_cannot_be_proven_are_left_and_said_to_be_unknown(self, here: LocalConnection) -> None:
        session, sink = begin(here, "sleep 60 & echo $!; exit 0")
        (child,) = pids_in(sink, 1)
        wait_until(lambda: sink.result is not None)
        process = session.started(0.0)
        process.ended = 1.0  # as if the session's number had been given away since
        assert states(here.end([session], Stop(grace=0.05), within=2.0)) == ["unknown"]
        assert alive(child)
        sink.wait()
        os.kill(child, signal.SIGKILL)

    def test_the_promise_comes_before_the_grace_and_the_kill_still_comes(self, here: LocalConnection) -> None:
        session, sink = begin(here, "trap '' TERM; echo $$; while :; do sleep 1; done")
        (pid,) = pids_in(sink, 1)
        begun = time.monotonic()
        assert states(here.end([session], Stop(grace=0.6), within=0.1)) == ["alive"]
        assert time.monotonic() - begun < 0.6
        assert alive(pid)
        wait_until(lambda: not alive(pid))
        assert time.monotonic() - begun >= 0.6
        sink.wait()

    def test_many_are_ended_together(self, here: LocalConnection) -> None:
        begun = [begin(here, "echo $$; exec sleep 60") for _ in range(20)]
        pids = [pids_in(sink, 1)[0] for _, sink in begun]
        endings = here.end([session for session, _ in begun], Stop(grace=5.0), within=5.0)
        assert states(endings) == ["gone"] * 20
        assert not any(alive(pid) for pid in pids)
        for _, sink in begun:
            sink.wait()

    def test_one_that_has_just_been_asked_for_is_ended_or_never_runs(self, here: LocalConnection) -> None:
        for _ in range(20):
            session, sink = begin(here, "sleep 60")
            assert states(here.end([session], Stop(grace=5.0), within=5.0)) == ["gone"]
            sink.wait()

    def test_a_stranger_to_this_transport_is_not_known(self, here: LocalConnection) -> None:
        foreign: Any = object()
        assert states(here.end([foreign], Stop(grace=1.0), within=1.0)) == ["unknown"]

    def test_at_the_exit_all_are_ended(self, here: LocalConnection) -> None:
        soft, soft_sink = begin(here, "echo $$; exec sleep 60")
        hard, hard_sink = begin(here, "trap '' TERM; echo $$; while :; do sleep 1; done")
        left, left_sink = begin(here, "sleep 60 & echo $!; exit 0")
        pids = [pids_in(sink, 1)[0] for sink in (soft_sink, hard_sink, left_sink)]
        wait_until(lambda: left_sink.result is not None)
        begun = time.monotonic()
        transport().terminate_all(0.3)
        assert time.monotonic() - begun < 5.0
        assert [alive(pid) for pid in pids] == [False, False, True]  # the last had ended by itself
        left.close()
        for sink in (soft_sink, hard_sink, left_sink):
            sink.wait()
        os.kill(pids[2], signal.SIGKILL)
        assert (soft.drop(), hard.drop()) == (False, False)


def test_nothing_is_left_after_hundreds_of_commands(here: LocalConnection) -> None:
    run(here, "true")
    before, others = sorted(os.listdir("/proc/self/fd")), set(children_of(os.getpid()))
    begun = [
        begin(here, line, stdin=stdin)
        for line in ("true", "cat", "echo a; exit 1", "kill -9 $$")
        for stdin in (False, True)
        for _ in range(25)
    ]
    for session, _ in begun:
        session.close_stdin()
    for _, sink in begun:
        sink.wait()
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert set(children_of(os.getpid())) == others
    assert transport().living() == 0


def _inheritable(fd: int) -> bool:
    try:
        return os.get_inheritable(fd)
    except OSError:
        return False


def _python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
