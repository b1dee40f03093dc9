# SPDX-License-Identifier: Apache-2.0
"""`ctask nodes` beside the released `nodeset` of ClusterShell 1.10.1, as a black box; and where it differs, why."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ctask.cli import main
from ctask.cli.groups import named

ROOT = Path(__file__).resolve().parent.parent

GROUPS = """\
[Main]
default: site
[site]
mapall: echo 'prod: n[1-4]'; echo 'test: n[5-6]'; echo 'mix: @prod,n6'; echo 'none:'
[two]
map: echo m[1-3]
list: echo x y
all: echo m[1-9]
"""

#: Standard input before a bar, and the words; what is told on standard output, and the status, have to be the same.
SAME = """\
-c n[1-3] n3
-c n1 -x n1
-f n1 n2 -i n2 n3
-f n[1-3] -i n[2-5] -X n9 n10
-f -a -x n2
-f -x n2 -a
-f n[1-4,7]!n3,m1
-e n[1-3]
-e -S \\n n[1-3]
-e -S , -O %s-ib n[1-3]
-f -O %s-ib n[1-3]
-c -O x%s n[1-3]
-f --split 2 n[1-5]
-e --split=2 n[1-5]
-c --split 2 n[1-5]
-f --split=9 n[1-2]
-f --contiguous n[1-2,5]
-e --contiguous n[1-2,5]
-f -I 0-1,3 n[1-9]
-f -I 7 n[1-3]
-f --autostep 3 n[1-9/2]
-f --autostep auto n[1-9/2]
-f --autostep 50% n[1-9/2],n[20-40]
-f --autostep 100% n[1-9/2]
-f --axis 1 a[1-2]b[3-4]
-f --axis=-1 a[1-2]b[3-4]
-f --axis 1-2 a[1-2]b[3-4]
-l
-ll
-lll
-L
-LL
-LLL
-l -s two
-ll -s two
-lll -s two -G
-l n1
-ll n[1,6]
-lll n[1,6]
-L n1
-LLL n1 m2
--list-sources
--list-sources -q
--groupsources
-r n[1-6]
-r n[1-5]
-r -s two m[1-3]
-r -s two -G m[1-3,7]
--index n3 n[1-5]
--index n9 n[1-5]
-R -f 1-3,7
-R -e 1-3
-R -c 1-9
-R -f 1-9 -x 3
-R -f 01-03
-f
-c
-e
-c @none
-f @*
-f @@
-f -a -s two
-f --pick 5 n1
-f @mix!n1
-f n*&@test
n1 n2\\n# c\\nn3 # x\\nn5\\n | -f
n1\\n | -f n7 -x -
n[1-4]\\n | -f n9 - -x n2
n[1-4]\\n | -f -i n[2-3]
@prod @two:x\\n | -e
"""

#: The program that answers for ClusterShell: many questions in one process.
NODESET = """
import contextlib, io, json, sys
from ClusterShell.CLI.Nodeset import main
answers = []
for typed, words in json.load(sys.stdin):
    out = io.StringIO()
    kept, sys.stdin, sys.argv = sys.stdin, io.StringIO(typed), ["nodeset", *words]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
            main()
        status = 0
    except SystemExit as end:
        status = end.code or 0
    sys.stdin = kept
    answers.append([out.getvalue(), status])
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def conf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("groups") / "groups.conf"
    path.write_text(GROUPS)
    return path


Ask = Callable[..., tuple[str, str, int]]


@pytest.fixture
def ask(conf: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Ask:
    def ask(*words: str, stdin: str = "") -> tuple[str, str, int]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        monkeypatch.setattr(sys, "stdout", open(1, "w", closefd=False))  # noqa: SIM115 (descriptor 1 stays)
        monkeypatch.setattr(sys, "stderr", open(2, "w", closefd=False))  # noqa: SIM115
        status = main(["nodes", "--groupsconf", str(conf), *words])
        out, err = capfdbinary.readouterr()
        return out.decode(), err.decode(), status

    return ask


def test_answers_are_those_of_nodeset(conf: Path, ask: Ask) -> None:
    parts = [line.rpartition(" | ") for line in SAME.splitlines()]
    questions = [(typed.replace("\\n", "\n"), words.split()) for typed, _, words in parts]
    asked = json.dumps([(typed, ["--groupsconf", str(conf), *words]) for typed, words in questions])
    done = subprocess.run(
        [sys.executable, "-c", NODESET], input=asked, capture_output=True, text=True, timeout=60, check=True
    )
    theirs = json.loads(done.stdout)
    ours = []
    for typed, words in questions:
        out, _, status = ask(*words, stdin=typed)
        ours.append([out, status])
    assert len({answer[0] for answer in theirs}) > 40  # they are answers, not the same complaint
    different = [
        (question, mine, its) for question, mine, its in zip(questions, ours, theirs, strict=True) if mine != its
    ]
    assert different == []


def test_the_last_line_of_standard_input_needs_no_newline(ask: Ask) -> None:
    # nodeset loses its last character
    assert ask("-f", stdin="n1\nnode1") == ("n1,node1\n", "", 0)


def test_options_may_stand_behind_nodes(ask: Ask) -> None:
    # nodeset takes them for nodes
    out, err, status = ask("n[1-9]", "--pick", "1", "-c")
    assert (out, err, status) == ("1\n", "", 0)
    assert ask("-f", "--", "-n")[2] == 2


def test_an_operation_needs_something_on_its_left(ask: Ask) -> None:
    # nodeset warns, and goes on with the empty set
    out, err, status = ask("-f", "-x", "n2", "n1", "n2")
    assert (out, status) == ("", 2)
    assert err == "ctask: -x n2: no nodes stand before it; nodes are combined left to right\n"


def test_an_unknown_group_is_an_error_here_too(ask: Ask) -> None:
    out, err, status = ask("-f", "@*", "-x", "@pord")
    assert (out, status) == ("", 2)
    assert err.startswith("ctask: no such group: @pord (source site: ")
    assert err.endswith("). Did you mean @prod?\n")


def test_a_bad_node_set_is_shown_with_a_caret(ask: Ask) -> None:
    assert ask("-f", "n[1-3") == (
        "",
        'ctask: bad node set "n[1-3" at position 2: bracket not closed\n              n[1-3\n               ^\n',
        2,
    )


def test_many_names_are_written_as_they_are_made(ask: Ask) -> None:
    out, _, status = ask("-e", "-S", ",", "n[1-10000]")
    assert (out, status) == (",".join(f"n{number}" for number in range(1, 10001)) + "\n", 0)
    assert ask("-c", "n[1-999999999999]") == ("999999999999\n", "", 0)


def test_picked_nodes_are_of_the_set(ask: Ask) -> None:
    picked = {ask("-f", "--pick", "1", "n[1-3]")[0].strip() for _ in range(60)}
    assert picked == {"n1", "n2", "n3"}


WRONG = [
    ("", "say what is to be done"),
    ("-c -e n1", "-c and -e are two"),
    ("-f --pick 0 n1", "--pick takes a whole number"),
    ("-f --split x n1", "--split takes a whole number"),
    ("-f --split 2 --contiguous n1", "two ways"),
    ("-f --autostep x n1", "--autostep takes"),
    ("-f --axis 0 n1", "--axis 0"),
    ("-f --axis 1 -R 1", "--axis is of nodes"),
    ("-r -R 1", "-r is of nodes"),
    ("-l -R 1", "groups are of nodes"),
    ("-f -a -R", "-a is all nodes"),
    ("-e -O %d n1", "-O '%d'"),
    ("-f -O %s/x n1", "cannot be folded"),
    ("--index n[1-2] n1", "--index takes one node"),
    ("-f -I x n1", "bad range set"),
    ("-f -s tow n1", "no such group source: tow. Did you mean two?"),
    ("-f @no:x", "no such group source: no"),
    ("-f -z", "no such option: -z; ctask nodes --help lists them"),
    ("-f --autostp=3 n1", "did you mean --autostep?"),
    ("-f n1 -x", "-x takes a value"),
]


@pytest.mark.parametrize(("words", "text"), WRONG)
def test_what_cannot_be_right_is_refused(ask: Ask, words: str, text: str) -> None:
    out, err, status = ask(*words.split())
    assert (out, status) == ("", 2)
    assert text in err


def test_help_lists_the_options(ask: Ask) -> None:
    out, _, status = ask("--help")
    assert status == 0
    assert "--list-sources" in out


RUDE = "p\\033[2Jq\\007\\nr\\302\\220\\342\\200\\256\\377"


def test_e04_names_of_groups_cannot_act_on_a_terminal(ask: Ask, tmp_path: Path) -> None:
    # They are what a source prints: a name of a partition, an attribute, a job.
    conf = tmp_path / "groups.conf"
    lines = f"printf '{RUDE}'"
    conf.write_text(f"[s\x1b]0;x\x07]\nmap: echo n1\nlist: {lines}\nreverse: {lines}\nall: echo n1\n")
    conf.chmod(0o600)
    for words in ("-l", "-ll", "-lll", "-L", "-LL", "-l n1", "-lll n1", "-L n1", "-r n1", "--list-sources", "-ll -s x",
                  "-f @pord", "-f @s:x", "-e @@"):  # fmt: skip
        out, err, _ = ask("--groupsconf", str(conf), *words.split())
        assert (out + err).replace("\n", "").isprintable(), words
    assert ask("--groupsconf", str(conf), "-l")[0].splitlines() == ["@p\\x1b[2Jq\\x07", "@r\\x90\\u{202e}\\xff"]


@pytest.mark.parametrize(
    ("typed", "due"),
    [("web", "@web"), ("rack[1,3],web", "@rack[1,3],@web"), ("@a!b&s:c^d", "@a!@b&@s:c^@d"), ("a, b", "@a,@b")],
)
def test_groups_are_named_without_their_sign(typed: str, due: str) -> None:
    assert named(typed) == due


def test_it_is_a_program(conf: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ctask", "nodes", "--groupsconf", conf, "-f", "-", "-x", "@test"],
        input="@mix", cwd=ROOT, capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr, done.returncode) == ("n[1-4]\n", "", 0)


# -- the command that runs commands --------------------------------------------------------------------------------


def run(conf: Path, *words: str) -> tuple[str, int]:
    done = subprocess.run(
        [sys.executable, "-m", "ctask", "--groupsconf", conf, *words],
        cwd=ROOT, capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    assert done.stdout == ""
    return done.stderr, done.returncode


@pytest.mark.parametrize("words", [["-w", "@*", "-x", "@pord"], ["-a", "-X", "pord"], ["-g", "pord"]])
def test_an_unknown_group_stops_a_run(conf: Path, words: list[str]) -> None:
    err, status = run(conf, *words, "reboot")
    due = f"ctask: no such group: @pord (source site: {conf}). Did you mean @prod? Nothing was run.\n"
    assert (err, status) == (due, 2)
