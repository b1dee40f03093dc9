# SPDX-License-Identifier: Apache-2.0
"""Sources of node groups: in memory, commands, YAML files, and groups.conf. Commands are real shell scripts."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ctask import NodeSet, Task, task_self
from ctask.errors import (
    GroupResolverConfigError,
    GroupResolverIllegalCharError,
    GroupResolverSourceError,
    GroupSourceError,
    GroupSourceNoUpcall,
    GroupSourceQueryFailed,
    NodeSetExternalError,
    NoSuchGroup,
    UsageError,
)
from ctask.nodes import set_std_group_resolver
from ctask.nodes.groups import (
    GroupResolver,
    GroupResolverConfig,
    Groups,
    GroupSource,
    UpcallGroupSource,
    YAMLGroupLoader,
    set_std_group_resolver_config,
    shell,
)

SITE: Groups = {"prod": "n[1-90]", "test": ["n91", NodeSet("n92")], "spare": None, "both": "@prod, @test"}


@pytest.fixture(autouse=True)
def no_machine_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nothing here reads the machine's own groups."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("CLUSTERSHELL_CFGDIR", raising=False)
    monkeypatch.delenv("CTASK_CFGDIR", raising=False)
    set_std_group_resolver(GroupResolver())
    yield
    set_std_group_resolver(None)


def conf(folder: Path, text: str, files: Mapping[str, str] | None = None) -> GroupResolverConfig:
    """Write groups.conf, and files beside it; return its resolver."""
    for name, content in {"groups.conf": text, **(files or {})}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return GroupResolverConfig([folder / "groups.conf"])


# -- in memory -----------------------------------------------------------------------------------------------------


def test_groups_of_a_program_are_looked_up() -> None:
    resolver = GroupResolver(GroupSource("site", SITE))
    assert str(NodeSet("@both!n3", resolver=resolver)) == "n[1-2,4-92]"
    assert str(NodeSet("@site:test", resolver=resolver)) == "n[91-92]"
    assert not NodeSet("@spare", resolver=resolver)
    assert len(NodeSet("@*", resolver=resolver)) == 92
    assert resolver.node_groups("n91") == ["test", "both"]


def test_a_group_of_which_nobody_can_tell_whether_it_is_there_is_refused() -> None:
    mapped = UpcallGroupSource("x", map_upcall="[ $GROUP != prod ] || echo n[1-3]")
    with pytest.raises(NoSuchGroup, match="give the source a `list`"):
        NodeSet("@prod!@pord", resolver=GroupResolver(mapped))
    assert NodeSet("@prod!@pord", resolver=GroupResolver(mapped), missing="empty") == NodeSet("n[1-3]")
    listed = UpcallGroupSource("x", map_upcall="[ $GROUP != prod ] || echo n[1-3]", list_upcall="echo prod idle")
    assert not NodeSet("@idle", resolver=GroupResolver(listed))
    with pytest.raises(NoSuchGroup, match=r"no such group: @pord\. Did you mean @prod\?"):
        NodeSet("@prod!@pord", resolver=GroupResolver(listed))


def test_an_unknown_group_is_an_error_that_names_the_nearest() -> None:
    resolver = GroupResolver(GroupSource("site", SITE, origin="/etc/clustershell/groups.d/site.yaml"))
    with pytest.raises(NoSuchGroup) as caught:
        NodeSet("@both!@pord", resolver=resolver)
    assert str(caught.value) == (
        "no such group: @pord (source site: /etc/clustershell/groups.d/site.yaml). Did you mean @prod?"
    )
    assert not NodeSet("@pord", resolver=resolver, missing="empty")


def test_a_program_may_go_on_changing_its_groups() -> None:
    groups = {"a": "n1"}
    resolver = GroupResolver(GroupSource("site", groups))
    groups["a"] = "n2"
    assert str(NodeSet("@a", resolver=resolver)) == "n2"


@pytest.mark.parametrize("value", [7, b"n1", {"a": "b"}, ["n1", 2]])
def test_what_are_no_nodes_is_refused(value: object) -> None:
    resolver = GroupResolver(GroupSource("site", {"a": value}))  # type: ignore[dict-item]
    with pytest.raises(GroupSourceError, match="text"):
        NodeSet("@a", resolver=resolver)


def test_sources_have_names_of_their_own_and_a_default() -> None:
    resolver = GroupResolver(GroupSource("one", {"a": "n1"}))
    resolver.add_source(GroupSource("two", {"a": "m1"}))
    with pytest.raises(GroupResolverSourceError, match="already"):
        resolver.add_source(GroupSource("two"))
    resolver.default_source_name = "two"
    assert resolver.sources() == ["two", "one"]
    assert str(NodeSet("@a,@one:a", resolver=resolver)) == "m1,n1"
    with pytest.raises(GroupResolverSourceError, match=r"@tow:a: no such group source: tow\. Did you mean two\?"):
        resolver.group_nodes("a", "tow")
    with pytest.raises(GroupResolverSourceError, match="no source was added"):
        GroupResolver().group_nodes("a")


@pytest.mark.parametrize("name", ["a b", "a,b", "a*", "a@b", "", "a\tb"])
def test_a_group_with_such_a_name_is_refused(name: str) -> None:
    resolver = GroupResolver(GroupSource("site", {name: "n1"}))
    with pytest.raises(GroupResolverIllegalCharError):
        resolver.group_nodes(name)
    with pytest.raises(GroupResolverIllegalCharError):
        resolver.grouplist()
    assert issubclass(GroupResolverIllegalCharError, UsageError)


# -- commands ------------------------------------------------------------------------------------------------------


def test_commands_tell_groups(tmp_path: Path) -> None:
    (tmp_path / "groups").write_text("web: n[1-4] n9\nold:\n")
    source = UpcallGroupSource(
        "file",
        map_upcall=r"sed -n 's/^$GROUP:\(.*\)/\1/p' $CFGDIR/groups",
        list_upcall=r"sed -n 's/^\([0-9A-Za-z_-]*\):.*/\1/p' groups",
        all_upcall="echo n[1-4], n9",
        reverse_upcall='echo web "$NODE-of-$SOURCE"',
        cfgdir=str(tmp_path),
    )
    resolver = GroupResolver(source)
    assert str(NodeSet("@web", resolver=resolver)) == "n[1-4,9]"
    assert str(NodeSet("@*", resolver=resolver)) == "n[1-4,9]"
    assert resolver.grouplist() == ["web", "old"]
    assert resolver.node_groups("n1") == ["web", "n1-of-file"]
    assert not NodeSet("@old", resolver=resolver)
    with pytest.raises(NoSuchGroup, match="Did you mean @web"):
        NodeSet("@weeb", resolver=resolver)


NAMES = ["$(touch pwned)", "`touch pwned`", "a;touch${IFS}pwned", "a'b", 'a"b', "a|b", "a/e#", "--help", "..", "a\\b"]


@pytest.mark.parametrize("command", ["echo $GROUP", "echo '$GROUP'", 'echo "$GROUP"', "eval echo $GROUP"])
@pytest.mark.parametrize("name", NAMES)
def test_a_name_cannot_run_anything(tmp_path: Path, name: str, command: str) -> None:
    resolver = GroupResolver(UpcallGroupSource("bad", map_upcall=command, cfgdir=str(tmp_path)))
    with pytest.raises(UsageError):
        NodeSet(f"@{name}", resolver=resolver)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command",
    [
        "printf %s $GROUP",
        "printf %s '$GROUP'",
        'printf %s "$GROUP"',
        'printf %s "$(printf %s $GROUP)"',
        'printf %s "`printf %s ${GROUP}`"',
        "printf %s \"$(printf %s '$GROUP')\"",
        "printf %s $GROUP # it's a comment: \" '",
        "(printf %s ''); printf %s $GROUP",
    ],
)
def test_quotes_do_not_matter_where_a_name_stands(tmp_path: Path, command: str) -> None:
    # what is handed on is harmless by itself; this is what stands behind it
    value = "$(touch pwned) `touch pwned` ' \" \\ *"
    assert shell.run(command, variables={"GROUP": value}, folder=str(tmp_path), timeout=20) == value
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "due"),
    [
        ("echo $GROUPS $$1 $HOME", "echo $GROUPS $1 $HOME"),
        (r"echo \$GROUP \'$NODE", r"echo \$GROUP \'" + '"${NODE}"'),
        ("a#$GROUP", 'a#"${GROUP}"'),
        ("# '$GROUP\n'$GROUP'", "# '$GROUP\n''\"${GROUP}\"''"),
    ],
)
def test_the_rest_of_a_command_stays_as_it_is(command: str, due: str) -> None:
    assert shell.quoted(command) == due


def test_a_command_that_fails_says_so(tmp_path: Path) -> None:
    source = UpcallGroupSource("slurm", map_upcall="echo sinfo: no controller >&2; exit 3", origin="/etc/x.conf")
    with pytest.raises(GroupSourceQueryFailed) as caught:
        NodeSet("@a", resolver=GroupResolver(source))
    assert str(caught.value).startswith(
        "`map` of source slurm: /etc/x.conf for 'a' exited with 3: sinfo: no controller; it is: echo"
    )
    with pytest.raises(GroupSourceNoUpcall, match="no command `list`"):
        source.resolv_list()
    gone = UpcallGroupSource("x", map_upcall="true", cfgdir=str(tmp_path / "gone"))
    with pytest.raises(GroupSourceQueryFailed, match="could not be started"):
        gone.resolv_map("a")


def test_a_command_that_hangs_is_killed_with_what_it_started(tmp_path: Path) -> None:
    source = UpcallGroupSource("x", map_upcall="sleep 600 & echo $! >pid; wait", cfgdir=str(tmp_path), timeout=0.5)
    with pytest.raises(GroupSourceQueryFailed, match=r"did not end within 0\.5 s"):
        source.resolv_map("a")
    process = Path("/proc", (tmp_path / "pid").read_text().strip(), "stat")
    deadline = time.monotonic() + 10
    while process.exists() and ") Z" not in process.read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not process.exists() or ") Z" in process.read_text()


def test_a_command_that_floods_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shell, "MOST", 1 << 20)
    with pytest.raises(GroupSourceQueryFailed, match="more than 1 MiB"):
        UpcallGroupSource("x", map_upcall="yes n1").resolv_map("a")


def test_standard_input_is_closed_and_no_terminal_can_be_asked() -> None:
    source = UpcallGroupSource("x", map_upcall="cat; cat /dev/tty 2>/dev/null || echo n1")
    assert source.resolv_map("a") == ["n1"]


def counting(tmp_path: Path, **upcalls: str) -> tuple[UpcallGroupSource, Path]:
    log = tmp_path / "log"
    log.touch()
    texts = {key: f"echo x >>{log}; {text}" for key, text in upcalls.items()}
    return UpcallGroupSource("x", **texts), log  # type: ignore[arg-type]  # texts alone


def test_answers_are_kept_and_failures_are_not(tmp_path: Path) -> None:
    source, log = counting(tmp_path, map_upcall="echo n1")
    assert source.resolv_map("a") == source.resolv_map("a") == ["n1"]
    assert len(log.read_text().split()) == 1
    source.clear_cache()
    source.resolv_map("a")
    assert len(log.read_text().split()) == 2
    source.cache_time = 0
    source.clear_cache()
    source.resolv_map("a")
    source.resolv_map("a")
    assert len(log.read_text().split()) == 4
    source, log = counting(tmp_path, map_upcall="false")
    for _ in range(2):
        with pytest.raises(GroupSourceQueryFailed):
            source.resolv_map("a")
    assert len(log.read_text().split()) == 6


def test_threads_that_ask_the_same_share_one_command(tmp_path: Path) -> None:
    source, log = counting(tmp_path, map_upcall="until [ -e go ]; do sleep 0.02; done; echo n1; exit $(cat go)")
    source.cfgdir = str(tmp_path)
    for status, results in ((0, {"n1"}), (1, {"GroupSourceQueryFailed"})):
        log.write_text("")
        (tmp_path / "go").unlink(missing_ok=True)
        waiting = threading.Barrier(5)

        def ask(group: str, waiting: threading.Barrier = waiting) -> str:
            waiting.wait(20)
            try:
                return ",".join(source.resolv_map(group))
            except NodeSetExternalError as error:
                return type(error).__name__

        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(ask, f"g{status}") for _ in range(4)]
            waiting.wait(20)
            while not log.read_text():
                time.sleep(0.01)
            time.sleep(0.1)  # for the others to come to the same question; one that is late runs it anew
            (tmp_path / "ready").write_text(str(status))
            (tmp_path / "ready").rename(tmp_path / "go")
            assert {one.result(20) for one in asked} == results
        if not status:
            assert len(log.read_text().split()) == 1


def test_a_forked_child_asks_anew(tmp_path: Path) -> None:
    program = (
        "import os\nfrom ctask.nodes.groups import UpcallGroupSource\n"
        "source = UpcallGroupSource('x', map_upcall='echo n1')\n"
        "source._cache._lock.acquire()\n"  # as if another thread held it
        "child = os.fork()\n"
        "if not child:\n    os._exit(0 if source.resolv_map('a') == ['n1'] else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=False)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_mapall_tells_all_groups_at_once(tmp_path: Path) -> None:
    source, log = counting(tmp_path, mapall_upcall="echo 'a: n1 n2'; echo; echo b:; echo 'a: n3'")
    resolver = GroupResolver(source)
    assert str(NodeSet("@a", resolver=resolver)) == "n[1-3]"
    assert not NodeSet("@b", resolver=resolver)
    assert str(NodeSet("@*", resolver=resolver)) == "n[1-3]"
    with pytest.raises(NoSuchGroup):
        NodeSet("@c", resolver=resolver)
    assert len(log.read_text().split()) == 1
    both = UpcallGroupSource("x", map_upcall="echo m$GROUP", mapall_upcall="echo a: n1")
    assert (both.resolv_map("a"), both.resolv_map("z")) == (["n1"], ["mz"])
    with pytest.raises(GroupSourceQueryFailed, match="'nonsense'"):
        UpcallGroupSource("x", mapall_upcall="echo a: n1; echo nonsense").resolv_map("a")


# -- YAML ----------------------------------------------------------------------------------------------------------

YAML = 'site:\n  all: "@prod,@test"\n  prod: n[1-90]\n  test: [n91, "n[92-93]"]\n  none:\nracks:\n  "1": n[1-9]\n'


def test_what_stands_behind_a_hash_names_no_node_in_any_source(tmp_path: Path) -> None:
    listed = "n1 # n2\n#n3\n  # n4: n5\nn6, # n7,\nn8#n9\n"
    (tmp_path / "nodes").write_text(listed)
    (tmp_path / "table").write_text("# old: n5\na: n1 # n2\n\n #b: n3\na: n6,n8\n")
    (tmp_path / "names").write_text("a # b\n# c\n")
    asked = UpcallGroupSource(
        "site", "cat nodes", "cat nodes", "cat names", "cat names", cfgdir=str(tmp_path), cache_time=0
    )
    at_once = UpcallGroupSource("site", mapall_upcall="cat table", cfgdir=str(tmp_path), cache_time=0)
    (tmp_path / "site.yaml").write_text('site:\n  a: |\n    n1 # n2\n    #n3\n    n6,n8\n  l: [n1, "#n2", "n3 # n4"]\n')
    read = GroupResolver(*YAMLGroupLoader(str(tmp_path / "site.yaml")))
    sources = [GroupSource("site", {"a": listed}), asked, at_once]
    for resolver in (*map(GroupResolver, sources), read):
        assert str(NodeSet("@a", resolver=resolver)) == "n[1,6,8]"
    assert str(NodeSet("@l", resolver=read)) == "n[1,3]"
    assert str(NodeSet.fromall(resolver=GroupResolver(asked))) == "n[1,6,8]"
    assert asked.resolv_list() == asked.resolv_reverse("n1") == at_once.resolv_list() == ["a"]


def test_yaml_files_have_sources_with_groups(tmp_path: Path) -> None:
    resolver = conf(tmp_path, "[Main]\ndefault: site\nautodir: $CFGDIR/groups.d\n", {"groups.d/site.yaml": YAML})
    assert str(NodeSet("@test,@racks:1", resolver=resolver)) == "n[1-9,91-93]"
    assert len(NodeSet("@*", resolver=resolver)) == 93
    assert not NodeSet("@none", resolver=resolver)
    with pytest.raises(NoSuchGroup, match=r"@pord \(source site: .*/groups\.d/site\.yaml\)\. Did you mean @prod\?"):
        NodeSet("@pord", resolver=resolver)


def test_a_yaml_file_that_changes_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(YAML)
    loader = YAMLGroupLoader(str(path), cache_time=0)
    source = next(iter(loader))
    assert source.resolv_map("prod") == ["n[1-90]"]
    path.write_text("site: {prod: n1}")
    assert (source.resolv_map("prod"), source.resolv_list()) == (["n1"], ["prod"])
    path.write_text("site: {prod: [")
    with pytest.raises(GroupResolverConfigError, match=r"site\.yaml cannot be used"):
        source.resolv_map("prod")
    kept = YAMLGroupLoader(str(tmp_path / "other.yaml")) if path.rename(tmp_path / "other.yaml") is None else loader
    with pytest.raises(GroupResolverConfigError, match="No such file"):
        kept.groups("site")


@pytest.mark.parametrize("text", ["- a", "site: [a]", "site: {1: n1}", "no: {a: n1}", "site: {a: n1", ""])
def test_a_yaml_file_that_is_none_of_groups_is_named(tmp_path: Path, text: str) -> None:
    resolver = conf(tmp_path, "[Main]\nautodir: groups.d\n", {"groups.d/site.yaml": text})
    with pytest.raises(GroupResolverConfigError, match=r"groups\.d/site\.yaml"):
        NodeSet("@a", resolver=resolver)


def test_without_pyyaml_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    resolver = conf(tmp_path, "[Main]\nautodir: groups.d\n", {"groups.d/site.yaml": YAML})
    with pytest.raises(GroupResolverConfigError, match="pip install PyYAML"):
        resolver.sources()


# -- groups.conf ---------------------------------------------------------------------------------------------------


def test_groups_conf_is_read_as_clustershell_reads_it(tmp_path: Path) -> None:
    resolver = conf(
        tmp_path,
        '[Main]\ndefault: own\nconfdir: /nonexistent "$CFGDIR/more.d" $CFGDIR/more.d\nautodir: $CFGDIR/groups.d\n'
        "[own]\nmap: echo $CFGDIR %N $$CFGDIR; pwd\nlist: echo a\n[x1,x2]\nmap: echo $SOURCE-$GROUP\n",
        {
            "more.d/b.conf": "[b]\nmap: echo $CFGDIR\n[Main]\ndefault: b\n",
            "more.d/a.conf": "[a]\nmapall: echo a: n1\ncache_time: 0\n",
            "groups.d/site.yaml": YAML,
        },
    )
    assert resolver.sources() == ["own", "a", "b", "site", "racks", "x1", "x2"]
    assert resolver.group_nodes("g") == [str(tmp_path), "%N", str(tmp_path), str(tmp_path)]
    assert resolver.group_nodes("g", "b") == [str(tmp_path / "more.d")]
    assert (resolver.group_nodes("g", "x1"), resolver.group_nodes("g", "x2")) == (["x1-g"], ["x2-g"])


def test_later_files_win_key_by_key(tmp_path: Path) -> None:
    conf(tmp_path / "a", "[Main]\ndefault: s\n[s]\nmap: echo old\nall: echo everything\n[t]\nmap: echo t\n")
    conf(tmp_path / "b", "[s]\nmap: echo new\n")
    paths = [tmp_path / name / "groups.conf" for name in ("a", "none", "b")]
    resolver = GroupResolverConfig(paths)
    assert (resolver.group_nodes("g"), resolver.all_nodes()) == (["new"], ["everything"])
    assert resolver.sources() == ["s", "t"]


WRONG = [
    ("[s]\nall: echo n1\n", "`map`, or `mapall`"),
    ("[Main]\ndefault: x\n[s]\nmap: a\n", "default source 'x' is not there; sources: s"),
    ("[s]\nmap: a\n[s]\nmap: b\n", "already exists"),
    ("[s]\nmap: a\n[t,s]\nmap: b\n", "already"),
    ("[s]\nmap: a\ncache_time: soon\n", "cache_time of .s. is seconds"),
    ("[s]\nmap: a\ntimeout: 0\n", "more than 0 seconds"),
    ("[s]\nmap: a\ncache_time: -1\n", "0 or more seconds"),
    ("map: a\n", "no section headers"),
    ("[Main]\nconfdir: 'x\n", "No closing quotation"),
    ("[Main]\nconfdir: groups.conf\n", "to be a folder"),
]


@pytest.mark.parametrize(("text", "reason"), WRONG)
def test_a_config_that_cannot_be_used_is_refused_with_its_name(tmp_path: Path, text: str, reason: str) -> None:
    resolver = conf(tmp_path, text)
    for _ in range(2):  # and not half loaded
        with pytest.raises(GroupResolverConfigError, match=reason) as caught:
            NodeSet("@a", resolver=resolver)
        assert str(tmp_path) in str(caught.value)


def test_without_groups_conf_the_folder_beside_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "groups.d").mkdir()
    (tmp_path / "groups.d" / "site.yaml").write_text(YAML)
    assert str(NodeSet("@racks:1", resolver=GroupResolverConfig([tmp_path / "groups.conf"]))) == "n[1-9]"


def test_without_any_config_it_is_said_where_was_looked(tmp_path: Path) -> None:
    with pytest.raises(GroupResolverSourceError, match=f"no groups.conf, and no groups.d.*{tmp_path}"):
        NodeSet("@a", resolver=GroupResolverConfig([tmp_path / "groups.conf"]))


def test_where_config_is_looked_for() -> None:
    def looked(**environment: str) -> list[str]:
        program = "from ctask.nodes.groups import config_paths; print(*config_paths('f'))"
        environment["HOME"] = "/home/me"
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=20, check=True
        )
        return done.stdout.split()

    system = ["/etc/clustershell/f", "/etc/ctask/f"]
    assert looked() == [*system, "/home/me/.config/clustershell/f", "/home/me/.config/ctask/f"]
    own = ["/x/clustershell/f", "/x/ctask/f", "/c/f", "/d/f"]
    assert looked(XDG_CONFIG_HOME="/x", CLUSTERSHELL_CFGDIR="/c", CTASK_CFGDIR="/d") == [*system, *own]


def test_the_groups_of_a_process_come_from_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conf(tmp_path, "[Main]\ndefault: mine\n[mine]\nmap: echo n1\n")
    monkeypatch.setenv("CTASK_CFGDIR", str(tmp_path))
    set_std_group_resolver(None)
    assert str(NodeSet("@g")) == "n1"
    conf(tmp_path / "b", "[s]\nmap: echo n2\n")
    set_std_group_resolver_config(tmp_path / "b" / "groups.conf")
    assert str(NodeSet("@g")) == "n2"


def test_threads_that_are_the_first_read_the_files_once(tmp_path: Path) -> None:
    resolver = conf(tmp_path, "[Main]\nautodir: groups.d\n", {"groups.d/site.yaml": YAML})
    with ThreadPoolExecutor(8) as pool:
        found = [pool.submit(lambda: NodeSet("@site:*", resolver=resolver)) for _ in range(16)]
        assert {len(one.result()) for one in found} == {93}


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_what_may_not_be_read_is_left_out(tmp_path: Path) -> None:
    resolver = conf(tmp_path, "[Main]\nautodir: groups.d\n[s]\nmap: echo n1\n", {"groups.d/site.yaml": YAML})
    (tmp_path / "groups.d" / "site.yaml").chmod(0)
    assert resolver.sources() == ["s"]


# -- in runs, and in the examples ----------------------------------------------------------------------------------

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_a_task_takes_groups_wherever_nodes_are_asked_for() -> None:
    set_std_group_resolver(GroupResolver(GroupSource("site", {"prod": "n[1-3]", "down": "n2", "none": ""})))
    task = task_self()
    task.node_options("@down", transport="local")
    worker = task.run("echo %h", nodes="@prod!@down", transport="local", expect=2)
    assert str(worker.ok) == "n[1,3]"
    worker = task.run("echo %h", nodes=["@down", "n3"], transport="local")
    assert str(worker.ok) == "n[2-3]"
    with pytest.raises(UsageError, match="the node set is empty"):
        task.run("reboot", nodes="@none")


@pytest.mark.parametrize("call", [Task.run, Task.shell, Task.submit])
@pytest.mark.parametrize("nodes", ["@prod!@pord", "@pord", ["n1", "@pord"]])
def test_an_unknown_group_is_refused_before_anything_is_sent(call: Callable[..., object], nodes: object) -> None:
    set_std_group_resolver(GroupResolver(GroupSource("site", {"prod": "n[1-3]"})))
    with pytest.raises(NoSuchGroup) as caught:
        call(task_self(), "reboot", nodes=nodes)
    assert str(caught.value) == "no such group: @pord. Did you mean @prod? Nothing was run."


def test_the_example_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "guard.py"))
    assert capsys.readouterr().out == "NodeSetError: no such group: @pord. Did you mean @prod? Nothing was run.\n"


#: What the programs of a site would print, by what they are asked.
FAKES = {
    "sinfo": """case "$*" in
        "-h -o %N -p compute") echo 'n[1-4]'; echo n9 ;;
        "-h -o %N -t drained") echo n4 ;;
        "-h -o %N") echo 'n[1-9]' ;;
        "-h -o %R") echo compute; echo gpu ;;
        "-h -o %T") echo 'idle*'; echo drained ;;
        "-h -N -o %R -n n1") echo compute ;;
        "-h -N -o %T -n n4") echo 'drained$' ;;
    esac""",
    "squeue": """case "$*" in
        *"-o %N -j 4711") echo 'n[1-2]' ;;
        *"-o %N -u alice") echo n1; echo 'n[2-3]' ;;
        *"-j "*) echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1 ;;
        *"-o %i") echo 4711 ;;
        *"-o %u") echo alice ;;
        *"-o %i -w n1") echo 4711 ;;
    esac""",
    "nodeattr": """case "$*" in
        --expand) echo 'n1 compute,rack=1'; echo 'n2 compute,rack=2'; echo 'l1 login' ;;
        "-l n1") echo compute; echo rack=1 ;;
    esac""",
    "ansible-inventory": """cat <<'END'
{"_meta": {"hostvars": {}}, "all": {"children": ["ungrouped", "web"]}, "ungrouped": {"hosts": ["db1"]},
 "web": {"hosts": ["w1", "w2"], "children": ["edge"]}, "edge": {"hosts": ["e1"]}}
END""",
    "getent": "printf '127.0.0.1 localhost\\n10.0.0.1 n1 n1.example\\n10.0.0.2 n2\\n10.0.0.9 login\\n'",
}

READY = [
    ("slurm.conf", "@slurm:compute", "n[1-4,9]"),
    ("slurm.conf", "@slurm:*", "n[1-9]"),
    ("slurm.conf", "@slurm:gpu", ""),
    ("slurm.conf", "@slurmstate:drained", "n4"),
    ("slurm.conf", "@@slurmstate", "drained,idle"),
    ("slurm.conf", "@slurmjob:4711", "n[1-2]"),
    ("slurm.conf", "@slurmuser:alice", "n[1-3]"),
    ("genders.conf", "@genders:compute", "n[1-2]"),
    ("genders.conf", "@genders:rack=2", "n2"),
    ("genders.conf", "@genders:rack", "n[1-2]"),
    ("genders.conf", "@genders:*", "l1,n[1-2]"),
    ("ansible.conf", "@ansible:web", "e1,w[1-2]"),
    ("ansible.conf", "@ansible:all", "db1,e1,w[1-2]"),
    ("hosts.conf", "@hosts:n", "n[1-2]"),
    ("hosts.conf", "@hosts:*", "login,n[1-2]"),
    ("hosts.conf", "@local:prod", "n[1-9]"),
]


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The ready sources with programs that answer for a site's."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, script in FAKES.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    folder = tmp_path / "etc"
    shutil.copytree(EXAMPLES / "groups", folder)
    (folder / "groups").write_text("# ours\nprod: n[1-8] n9  # and more\n")
    return folder


@pytest.mark.parametrize(("name", "nodes", "due"), READY)
def test_the_ready_sources_do_what_they_say(ready: Path, name: str, nodes: str, due: str) -> None:
    assert str(NodeSet(nodes, resolver=GroupResolverConfig([ready / name]))) == due


def test_the_ready_sources_know_what_they_have_not(ready: Path) -> None:
    for group in ("slurm:computer", "slurmjob:4712"):
        with pytest.raises(NoSuchGroup, match=f"no such group: @{group}"):
            NodeSet(f"@{group}", resolver=GroupResolverConfig([ready / "slurm.conf"]))
    with pytest.raises(NoSuchGroup, match=r"no such group: @rak \(source genders: .*\)\. Did you mean @rack"):
        NodeSet("@rak", resolver=GroupResolverConfig([ready / "genders.conf"]))


def test_the_ready_sources_know_the_groups_of_a_node(ready: Path) -> None:
    slurm = GroupResolverConfig([ready / "slurm.conf"])
    assert (slurm.node_groups("n1"), slurm.node_groups("n4", "slurmstate")) == (["compute"], ["drained"])
    assert slurm.node_groups("n1", "slurmjob") == ["4711"]
    assert GroupResolverConfig([ready / "genders.conf"]).node_groups("n1") == ["compute", "rack=1"]


@pytest.mark.parametrize(
    ("name", "program", "nodes"),
    [
        ("slurm.conf", "sinfo", "@slurmstate:*"),
        ("slurm.conf", "sinfo", "@@slurmstate"),
        ("genders.conf", "nodeattr", "@genders:*"),
        ("genders.conf", "nodeattr", "@@genders"),
        ("ansible.conf", "ansible-inventory", "@@ansible"),
    ],
)
def test_a_ready_source_whose_program_fails_is_not_empty(
    ready: Path, tmp_path: Path, name: str, program: str, nodes: str
) -> None:
    (tmp_path / "bin" / program).write_text("#!/bin/sh\necho no connection >&2\nexit 1\n")
    with pytest.raises(GroupSourceError, match="no connection"):
        NodeSet(nodes, resolver=GroupResolverConfig([ready / name]))
