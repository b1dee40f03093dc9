# SPDX-License-Identifier: Apache-2.0
"""Text for terminals: what is escaped, how outputs are folded, and that an account has every node once."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctask import task_self
from ctask.buffers import STDOUT, BufferStore, Capture, MemoryBudget, Output
from ctask.display import account, escape, gathered, shell_word
from ctask.errors import (
    AuthRejected,
    BannerError,
    CommandTimeout,
    ConnectionLost,
    ConnectTimeout,
    HostKeyMismatch,
    NodeError,
)
from ctask.nodes import NodeSet
from ctask.result import Attempt, Ending, Group, NodeResult, RemoteProcess, Timings
from ctask.states import Outcome
from ctask.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


# -- escape ------------------------------------------------------------------------------------------------------

SHOWN: list[tuple[str | bytes, str]] = [
    ("plain text", "plain text"),
    ("äöü 中文 🙂", "äöü 中文 🙂"),
    ("a\tb\nc", "a\tb\nc"),
    ("", ""),
    (b"caf\xc3\xa9", "café"),
    (b"no \xff utf-8 \xc3", r"no \xff utf-8 \xc3"),
    (b"\xed\xa0\x80", r"\xed\xa0\x80"),
    ("a\x00b\x7f\r", r"a\x00b\x7f\x0d"),
    ("\x1b[31mred\x1b[0m", "red"),
    ("\x1b[38;2;1;2;3mx\x1b[m", "x"),
    ("\x9b1mx", "x"),
    ("\x1b[2J\x1b[H", r"\x1b[2J\x1b[H"),
    ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
    ("\x1b]52;c;cm0gLXJm\x1b\\", r"\x1b]52;c;cm0gLXJm\x1b" + "\\"),
    ("\x85\x90", r"\x85\x90"),
    ("\u202egnp.exe\u2066", r"\u{202e}gnp.exe\u{2066}"),
    ("a\u2028b\u2029c\u061c", r"a\u{2028}b\u{2029}c\u{061c}"),
    ("\x1b[\x1b[0m31m", r"\x1b[31m"),  # dropping a colour must not make one
    ("\udcff\ud800", r"\xff\u{d800}"),
]


@pytest.mark.parametrize(("text", "shown"), SHOWN)
def test_e04_what_would_act_on_a_terminal_is_shown(text: str | bytes, shown: str) -> None:
    assert escape(text) == shown


def is_harmless(text: str) -> bool:
    turning = "\u061c\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    return not any(
        (c < " " and c not in "\n\t") or "\x7f" <= c <= "\x9f" or c in turning or "\ud800" <= c <= "\udfff"
        for c in text
    )


@given(st.binary() | st.text(st.characters()) | st.text("\x1b\x9b[]0;m\n\t\x07\u202e\x85a"))
def test_e04_escaped_text_is_harmless_and_stays_as_it_is(text: str | bytes) -> None:
    shown = escape(text)
    assert is_harmless(shown)
    assert escape(shown) == shown
    assert escape(shown.encode()) == shown


@given(st.binary())
def test_e04_raw_text_gives_the_exact_bytes_again(data: bytes) -> None:
    assert escape(data, raw=True).encode("utf-8", "surrogateescape") == data


def test_e04_colours_are_kept_where_that_is_asked_for_and_nothing_else_is() -> None:
    keep: Literal["keep"] = "keep"
    text = "\x1b[31mred\x1b[0m\x07"
    assert escape(text, colour=keep) == "\x1b[31mred\x1b[0m\\x07"


def test_e04_outputs_and_errors_are_escaped_where_they_are_shown() -> None:
    evil = "\x1b]0;title\x07"
    group = Group(NodeSet("n1"), Output(evil.encode()), 0, Outcome.EXITED, "")
    assert is_harmless(gathered([group]))
    assert evil in gathered([group], raw=True)
    error = AuthRejected(f"refused\n{evil}", phase="auth", kind=f"refused {evil}")
    worker = Fake([unreached("n1", error)])
    text = account(worker, notes=True)
    assert is_harmless(text)
    assert len(text.splitlines()) == 3  # a newline in an error does not make a row


# -- a worker that has come to these results -----------------------------------------------------------------------


@dataclass
class Job:
    node: Any
    result: NodeResult | None
    capture: Capture | None


class Fake(Worker):
    """A worker as far as it is looked at."""

    def __init__(
        self, results: Sequence[NodeResult], *, pending: Sequence[str] = (), elapsed: float = 30.4
    ) -> None:
        jobs: list[Any] = [Job(result.node, result, result._capture) for result in results]
        jobs += [Job(node, None, None) for node in pending]
        self._jobs = tuple(jobs)
        self.remote = True
        self.apart = False
        self.ok_codes = frozenset({0})
        self._nodes = NodeSet.fromlist(job.node for job in self._jobs)
        self._began_at, self._closed_at = 100.0, 100.0 + elapsed


def ended(
    node: str,
    outcome: Outcome,
    *,
    rc: int | None = None,
    output: bytes = b"",
    error: NodeError | None = None,
    ran: bool | None = True,
    ending: Ending | None = None,
    signal: str | None = None,
    seconds: float = 0.0,
) -> NodeResult:
    capture = Capture(BufferStore(MemoryBudget(1 << 20)))
    if output:
        capture.append(STDOUT, output)
    capture.seal()
    phase = error.phase if error is not None else "closing"
    return NodeResult(
        node=node,
        outcome=outcome,
        rc=rc,
        signal=signal,
        error=error,
        ran=ran,
        ok=outcome is Outcome.EXITED and rc == 0,
        attempts=(Attempt(phase, error, Timings({"running": seconds})),),
        capture=capture,
        ending=ending,
    )


#: A process that waits for a file server.
STUCK = RemoteProcess(4711, "rpm", "D", "ll_file_open")


def exited(node: str, rc: int, output: bytes = b"") -> NodeResult:
    return ended(node, Outcome.EXITED, rc=rc, output=output)


def unreached(node: str, error: NodeError) -> NodeResult:
    return ended(node, Outcome.UNREACHED, rc=255, error=error, ran=False)


def silent(node: str) -> NodeResult:
    error = ConnectTimeout(f"no answer from {node}:22 for 10 s", phase="tcp", kind="no answer for 10 s")
    return unreached(node, error)


def timed_out(node: str, state: Ending | str | None, *, ran: bool | None = True) -> NodeResult:
    ending = Ending(state) if isinstance(state, str) else state
    error = CommandTimeout("timeout after 30 s", phase="running")
    return ended(node, Outcome.TIMEOUT, error=error, ran=ran, ending=ending)


def rack() -> Fake:
    changed = HostKeyMismatch(
        "HOST KEY CHANGED. known SHA256:a (/etc/ssh/ssh_known_hosts:812), shown SHA256:b. Not connected.",
        phase="hostkey",
        kind="host key changed",
    )
    refused = AuthRejected("refused for root. offered: ed25519 SHA256:c", phase="auth", kind="refused for root")
    killed = ended("r4n44", Outcome.SIGNALED, rc=137, signal="KILL", seconds=3.1)
    good = [exited(node, 0, b"kernel-5\n") for node in NodeSet("r3n[01-48],r4n[01-41]")]
    odd = [exited("r4n42", 0), timed_out("r4n43", "gone"), killed, silent("r4n45"), silent("r4n46")]
    odd += [unreached("r4n47", changed), unreached("r4n48", refused)]
    good[-1] = exited("r4n41", 1, b"package kernel is not installed\n")
    return Fake([*good, *odd])


# -- account -------------------------------------------------------------------------------------------------------


def test_an_account_reads_as_promised() -> None:
    assert account(rack(), prefix="ctask: ", repeat="ctask -w").splitlines() == [
        "ctask: 96 nodes in 30.4 s: 89 exit 0 · 7 not",
        "  exit 0, no output        r4n42",
        "  exit 1                   r4n41",
        "  timeout after 30 s       r4n43       ended: seen to be gone",
        "  killed by SIGKILL        r4n44       ran 3.1 s; OOM?",
        "  tcp: no answer for 10 s  r4n[45-46]  not run",
        "  host key changed         r4n47       not run, nothing was sent",
        "  auth: refused for root   r4n48       not run",
        "  safe to repeat:          ctask -w 'r4n[45-48]' …",
    ]


def test_rows_come_by_status_however_large_it_is() -> None:
    worker = Fake([silent("n1"), exited("n2", 3_221_225_472), exited("n3", 1000), exited("n4", 2)], pending=["n5"])
    assert [line.split("  ")[1] for line in account(worker).splitlines()[1:]] == [
        "exit 2",
        "exit 1000",
        "exit 3221225472",
        "tcp: no answer for 10 s",
        "not ended",
    ]


def test_notes_say_what_a_row_does_not() -> None:
    lines = account(rack(), notes=True).splitlines()
    assert lines[0] == "96 nodes in 30.4 s: 89 exit 0 · 7 not"
    at = lines.index("  host key changed         r4n47       not run, nothing was sent")
    assert lines[at + 1].startswith("      HOST KEY CHANGED. known SHA256:a (/etc/ssh/ssh_known_hosts:812), shown")
    assert lines[-1] == "      offered: ed25519 SHA256:c"


def test_different_texts_of_one_failure_stay_one_row() -> None:
    results = [
        unreached(f"n{i}", BannerError(f"dropped: {i}", phase="banner", kind="dropped")) for i in range(5)
    ]
    assert account(Fake(results), notes=True).splitlines()[1:] == [
        "  banner: dropped  n[0-4]  not run",
        "      0 (and 4 more texts like it)",
    ]


def test_who_failed_without_having_ended_is_in_trouble() -> None:
    worker = Fake([exited("n1", 0, b"ok\n"), silent("n2"), timed_out("n3", "unknown")], elapsed=2.1)
    assert account(worker).splitlines() == [
        "3 nodes in 2.1 s: 1 exit 0 · 2 in trouble",
        "  tcp: no answer for 10 s  n2  not run",
        "  timeout after 30 s       n3  unknown whether it still runs",
    ]


def test_plain_success_is_one_line() -> None:
    assert account(Fake([exited("n1", 0, b"ok\n")], elapsed=0.2)) == "1 node in 0.2 s: 1 exit 0"


def test_an_empty_line_is_no_output() -> None:
    assert "exit 0, no output" in account(Fake([exited("n1", 0, b"\r\n")]))
    assert "exit 0, no output" not in account(Fake([exited("n1", 0, b"\n\n")]))


def test_a_run_that_goes_on_has_an_account() -> None:
    worker = Fake([exited("n1", 0, b"ok\n")], pending=["n2", "n3"])
    lines = account(worker).splitlines()
    assert lines[0].endswith(": 1 exit 0 · 2 not ended")
    assert lines[1] == "  not ended  n[2-3]"


DETAILS: list[tuple[NodeResult, str]] = [
    (timed_out("n1", "gone"), "ended: seen to be gone"),
    (timed_out("n1", "unknown"), "unknown whether it still runs"),
    (timed_out("n1", "alive"), "told to end, and still there"),
    (timed_out("n1", "left"), "left running"),
    (timed_out("n1", None), "ran"),
    (timed_out("n1", Ending("gone", 2)), "ended: 2 processes, seen to be gone"),
    (timed_out("n1", Ending("gone", 0)), "ended: seen to be gone"),
    (
        timed_out("n1", Ending("alive", 2, (STUCK,))),
        'ran; ended 1 process; still there: pid 4711 "rpm", D in ll_file_open',
    ),
    (timed_out("n1", Ending("alive", 1, (STUCK,))), 'ran; told to end; still there: pid 4711 "rpm", D in ll_file_open'),
    (
        timed_out("n1", Ending("alive", None, (STUCK, RemoteProcess(7))), ran=None),
        'may have run; told to end; still there: pid 4711 "rpm", D in ll_file_open; pid 7',
    ),
    (timed_out("n1", None, ran=False), "not run"),
    (timed_out("n1", "unknown", ran=None), "may have run; unknown whether it still runs"),
    (
        ended("n1", Outcome.LOST, rc=255, error=ConnectionLost(phase="running"), ran=None),
        "may have run, and may still run",
    ),
]


@pytest.mark.parametrize(("result", "detail"), DETAILS)
def test_a_row_says_whether_it_ran_and_what_became_of_it(result: NodeResult, detail: str) -> None:
    row = account(Fake([result])).splitlines()[1]
    assert row.endswith(f"  n1  {detail}")


def test_nodes_that_hang_alike_stand_together_without_their_pids() -> None:
    stuck = [Ending("alive", 2, (RemoteProcess(pid, "df", "D", "ll_statfs"),)) for pid in (11, 12)]
    same = account(Fake([timed_out(f"n{i}", ending) for i, ending in enumerate(stuck)])).splitlines()
    assert same[1:] == ['  timeout after 30 s  n[0-1]  ran; ended 1 process; still there: "df", D in ll_statfs']
    counts = account(Fake([timed_out("n1", Ending("gone", 1)), timed_out("n2", Ending("gone", 3))])).splitlines()
    assert counts[1:] == ["  timeout after 30 s  n[1-2]  ended: seen to be gone"]


def test_e04_what_a_node_says_of_its_processes_cannot_act_on_the_terminal() -> None:
    rude = RemoteProcess(7, "\x1b[2Jsh\n", "\x07", "a\nb")
    text = account(Fake([timed_out("n1", Ending("alive", 1, (rude,)))]))
    assert len(text.splitlines()) == 2
    assert all(line.isprintable() for line in text.splitlines())


def test_times_of_one_row_are_a_span() -> None:
    killed = [ended(f"n{i}", Outcome.SIGNALED, rc=143, signal="TERM", seconds=i) for i in (1, 3)]
    assert account(Fake(killed)).splitlines()[1] == "  killed by SIGTERM  n[1,3]  ran 1.0 to 3.0 s"


def test_long_node_sets_are_not_cut_and_push_only_their_own_line() -> None:
    far = [silent(f"n{i}") for i in range(1, 200, 2)]
    lines = account(Fake([*far, timed_out("m1", "gone")])).splitlines()
    assert lines[1] == "  timeout after 30 s       m1  ended: seen to be gone"
    assert lines[2].endswith(f"  {NodeSet.fromlist(result.node for result in far)}  not run")


@given(
    st.lists(
        st.sampled_from(["ok", "quiet", "1", "2", "silent", "timeout", "timeout-gone", "lost", "killed", "pending"]),
        min_size=1,
        max_size=30,
    )
)
def test_every_node_that_is_not_plainly_good_stands_in_exactly_one_row(kinds: list[str]) -> None:
    makers: dict[str, Callable[[str], NodeResult]] = {
        "ok": lambda node: exited(node, 0, b"ok\n"),
        "quiet": lambda node: exited(node, 0),
        "1": lambda node: exited(node, 1),
        "2": lambda node: exited(node, 2, b"two\n"),
        "silent": silent,
        "timeout": lambda node: timed_out(node, "unknown"),
        "timeout-gone": lambda node: timed_out(node, "gone"),
        "lost": lambda node: ended(node, Outcome.LOST, rc=255, error=ConnectionLost(phase="exec"), ran=None),
        "killed": lambda node: ended(node, Outcome.SIGNALED, rc=139, signal="SEGV"),
    }
    named = [(f"n{i}", kind) for i, kind in enumerate(kinds)]
    results = [makers[kind](node) for node, kind in named if kind != "pending"]
    worker = Fake(results, pending=[node for node, kind in named if kind == "pending"])
    rows = account(worker).splitlines()[1:]
    columns = [re.findall(r"  (n(?:\d+|\[[\d,-]+\]))(?=  |$)", row) for row in rows]
    assert all(len(found) == 1 for found in columns)
    listed = [node for found in columns for node in NodeSet(found[0])]
    expected = [node for node, kind in named if kind != "ok"]
    assert sorted(listed) == sorted(expected)


def test_local_commands_have_an_account_by_key() -> None:
    task = task_self()
    worker = task.run("exit 3", key="mkfs")
    assert worker is not None
    assert account(worker).splitlines()[1] == "  exit 3  mkfs"
    other = task.run("exit 4")
    assert other is not None
    assert account(other).splitlines()[1] == "  exit 4  exit 4"


# -- gathered ------------------------------------------------------------------------------------------------------


def test_outputs_stand_under_their_nodes_as_clush_has_them() -> None:
    groups = [
        Group(NodeSet("r3n[01-48]"), Output(b"a\nb"), 0, Outcome.EXITED, ""),
        Group(NodeSet("r4n42"), Output(b""), 0, Outcome.EXITED, ""),
        Group(NodeSet("r4n41"), Output(b"not installed"), 1, Outcome.EXITED, "exit 1"),
    ]
    assert gathered(groups).splitlines() == [
        *("---------------", "r3n[01-48] (48)", "---------------", "a", "b"),
        *("---------------", "r4n41 (1): exit 1", "---------------", "not installed"),
    ]
    assert gathered([]) == ""


def test_half_an_output_does_not_stand_with_a_whole_one() -> None:
    late = ended(
        "n3", Outcome.TIMEOUT, output=b"ok\n", error=CommandTimeout("timeout after 2 s", phase="running")
    )
    worker = Fake([exited("n1", 0, b"ok\n"), exited("n2", 0, b"ok"), late])
    assert [line for line in gathered(worker).splitlines() if line.startswith("n")] == [
        "n[1-2] (2)",
        "n3 (1): timeout after 2 s",
    ]


def test_blocks_come_by_status_and_those_without_one_last() -> None:
    lost = ended("n6", Outcome.LOST, rc=255, output=b"a\n", error=ConnectionLost(phase="running"), ran=None)
    killed = ended("n7", Outcome.SIGNALED, rc=137, signal="KILL", output=b"a\n")
    results = [timed_out("n1", "gone"), *(exited(f"n{i}", 9, b"z\n") for i in (2, 3, 4)), exited("n5", 1, b"a\n")]
    results[0] = ended(
        "n1", Outcome.TIMEOUT, output=b"a\n", error=CommandTimeout("timeout after 2 s", phase="running")
    )
    results += [lost, killed, exited("n8", 0, b"a\n"), exited("n9", 0, b"b\n"), exited("n10", 0, b"b\n")]
    assert [line for line in gathered(Fake(results)).splitlines() if line.startswith("n")] == [
        "n[9-10] (2)",
        "n8",
        "n5 (1): exit 1",
        "n[2-4] (3): exit 9",
        "n7 (1): killed by SIGKILL",
        "n6 (1): connection lost",
        "n1 (1): timeout after 2 s",
    ]


def test_an_empty_line_has_a_block_and_silence_has_none() -> None:
    worker = Fake([exited("n1", 0, b"\n"), exited("n2", 0), exited("n3", 0, b"\r\n"), exited("n4", 2)])
    assert gathered(worker) == "---------------\nn[1,3] (2)\n---------------\n"


WORDS: list[tuple[str, str]] = [
    ("n1", "n1"),
    ("n[1-4]", "'n[1-4]'"),
    ("", "''"),
    ("it's", "'it'\"'\"'s'"),
    ("ü ñ", "'ü ñ'"),
    ("=ls", "'=ls'"),
    ("=l s", "'=l s'"),
    ("a!b", "'a!b'"),
    ("a\nb\t\\'!1", "$'a\\012b\\011\\134\\047\\0411'"),
    ("\x1b[31m", "$'\\033[31m'"),
    ("\udcff7", "$'\\3777'"),
    ("\u202e", "$'\\342\\200\\256'"),
]


@pytest.mark.parametrize(("text", "word"), WORDS)
def test_a_word_for_a_shell(text: str, word: str) -> None:
    assert shell_word(text) == word


def test_a_node_set_that_is_too_long_for_one_word_is_repeated_in_several() -> None:
    names = [f"{stem}{number:040d}" for number in range(0, 3000, 2) for stem in ("a", "b")]
    text = account(Fake([silent(name) for name in names]), repeat="ctask -u 3 -w")
    line = text.splitlines()[-1].partition("safe to repeat:")[2]
    words = shlex.split(line)
    assert words[:3] + words[-1:] == ["ctask", "-u", "3", "…"]
    assert set(words[3:-1:2]) == {"-w"}
    assert max(map(len, words)) < 131_072
    assert NodeSet.fromlist(words[4:-1:2]) == NodeSet.fromlist(names)
