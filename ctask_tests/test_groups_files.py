# SPDX-License-Identifier: Apache-2.0
"""Which files the groups of a process come from, which of two sources a name is of, and whose files are refused."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ctask.errors import GroupResolverConfigError, NoSuchGroup
from ctask.nodes import NodeSet
from ctask.nodes.groups import GroupResolverConfig, YAMLGroupLoader, config, trust
from ctask.nodes.resolving import set_std_group_resolver

SITE = 'site:\n  compute: "n[1-4]"\n  login: "l1"\n'
SLURM = "[slurm]\nmap: echo s9\nlist: echo compute\n"

LOCAL = "[Main]\ndefault: local\n[local]\nmap: [ $GROUP != compute ] || echo m1\nlist: echo compute\n"

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a file to another account")


@pytest.fixture(autouse=True)
def folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The places where configuration is looked for lie in a folder of the test: sys/, usr/ and env/."""
    mask = os.umask(0o022)
    monkeypatch.setattr(config, "SYSTEM_FOLDERS", (tmp_path / "sys/clustershell", tmp_path / "sys/ctask"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "usr"))
    monkeypatch.delenv("CLUSTERSHELL_CFGDIR", raising=False)
    monkeypatch.delenv("CTASK_CFGDIR", raising=False)
    yield tmp_path
    os.umask(mask)
    set_std_group_resolver(None)


def write(folder: Path, **files: str) -> None:
    """Write files; their names have `__` for `/`, and no ending: it is .yaml in groups.d, .conf elsewhere."""
    for name, text in files.items():
        ending = ".yaml" if "groups__d" in name else ".conf"
        path = folder / (name.replace("groups__d", "groups.d").replace("__", "/") + ending)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def nodes(text: str, resolver: GroupResolverConfig | None = None) -> str:
    return str(NodeSet(text, resolver=resolver or GroupResolverConfig()))


# -- groups.d beside groups.conf -----------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["sys/ctask", "usr/ctask", "env"])
def test_a_groups_conf_beside_groups_d_changes_no_group(
    folders: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CTASK_CFGDIR", str(folders / "env"))
    write(folders / place, groups__d__site=SITE)
    assert nodes("@compute") == "n[1-4]"
    write(folders / "sys/clustershell", more__x="[x]\nmap: echo s8\nlist: echo compute\n")
    for other in ("sys/clustershell", "sys/ctask", "usr/clustershell", "usr/ctask", "env"):
        write(folders / other, groups=f"[Main]\nconfdir: {folders}/sys/clustershell/more\n" + SLURM)
        assert nodes("@compute") == "n[1-4]", other
        assert nodes("@slurm:compute") == "s9"


def test_a_file_that_is_named_has_its_folder_too(folders: Path) -> None:
    write(folders / "x", groups=SLURM, groups__d__site=SITE, other=SLURM)
    assert GroupResolverConfig([folders / "x/groups.conf"]).sources() == ["site", "slurm"]
    assert GroupResolverConfig([folders / "x/other.conf"]).sources() == ["slurm"]  # "one file and no other"


def test_autodir_says_otherwise(folders: Path) -> None:
    write(folders / "usr/ctask", groups="[Main]\nautodir: other.d\n" + SLURM, groups__d__site=SITE)
    assert GroupResolverConfig().sources() == ["slurm"]
    write(folders / "usr/ctask", groups="[Main]\nautodir:\n" + SLURM)
    assert GroupResolverConfig().sources() == ["slurm"]
    write(folders / "usr/ctask", groups="[Main]\nautodir: $CFGDIR/groups.d\n" + SLURM)
    assert GroupResolverConfig().sources() == ["site", "slurm"]


def test_the_system_s_autodir_does_not_hide_a_user_s_groups(folders: Path) -> None:
    write(folders / "usr/ctask", groups__d__site=SITE)
    write(folders / "sys/ctask", groups="[Main]\nautodir: $CFGDIR/more.d\n", groups__d__hidden="hidden: {a: n1}\n")
    (folders / "sys/ctask/more.d").mkdir()
    (folders / "sys/ctask/more.d/more.yaml").write_text("more: {a: n1}\n")
    assert GroupResolverConfig().sources() == ["site", "more"]
    # and what it names stays what it names when the user has a file as well
    write(folders / "usr/ctask", groups=SLURM)
    assert set(GroupResolverConfig().sources()) == {"site", "more", "slurm"}


def test_clustershell_s_folders_are_read_as_clustershell_reads_them(folders: Path) -> None:
    write(folders / "sys/clustershell", groups="[local]\nmap: echo n1\n", groups__d__site=SITE)
    assert GroupResolverConfig().sources() == ["local"]
    write(folders / "sys/clustershell", groups="[Main]\nautodir: $CFGDIR/groups.d\n[local]\nmap: echo n1\n")
    assert GroupResolverConfig().sources() == ["site", "local"]
    # the first of several is the default one
    write(folders / "sys/clustershell", groups="[a]\nmap: echo n1\n")
    write(folders / "usr/clustershell", groups="[b]\nmap: echo n2\n")
    assert GroupResolverConfig().default_source_name == "a"


@pytest.mark.parametrize("other", ["sys/ctask", "usr/clustershell", "sys/clustershell"])
def test_of_two_places_the_stronger_one_has_the_name(folders: Path, other: str) -> None:
    write(folders / other, groups__d__site="site: {compute: m1}\nmore: {compute: m2}\n")
    write(folders / "usr/ctask", groups__d__site=SITE)
    resolver = GroupResolverConfig()
    assert resolver.default_source_name == "site"
    assert nodes("@compute", resolver) == "n[1-4]"


def test_a_source_that_one_place_has_twice_is_refused(folders: Path) -> None:
    write(folders / "usr/ctask", groups__d__site=SITE, groups="[site]\nmap: echo n9\n")
    with pytest.raises(GroupResolverConfigError, match=r"groups\.conf: .*'site' already, in .*site\.yaml"):
        GroupResolverConfig().sources()


def test_a_relative_xdg_config_home_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", "here")
    assert Path("~/.config/ctask/f").expanduser() in config.config_paths("f")


# -- what is told --------------------------------------------------------------------------------------------------


def told(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)


@pytest.mark.parametrize("rival", [SLURM, "[slurm]\nmap: echo s9\n", "[slurm]\nmapall: echo compute: s9\n"])
def test_a_name_that_two_sources_have_is_told_once(
    folders: Path, caplog: pytest.LogCaptureFixture, rival: str
) -> None:
    write(folders / "usr/ctask", groups__d__site=SITE, groups=rival)
    resolver = GroupResolverConfig()
    for _ in range(2):
        assert nodes("@compute,@site:compute,@slurm:compute", resolver) == "n[1-4],s9"
    assert told(caplog).count("\n") == 0
    for part in ("@compute is that of source site (", "site.yaml", "source slurm (", "default: site", "@site:compute"):
        assert part in told(caplog)


@pytest.mark.parametrize(
    ("rival", "group"),
    [
        ("[slurm]\nmap: echo s9\nlist: echo batch\n", "@compute"),  # another name
        (SLURM, "@login"),
        (SLURM, "@site:compute"),
        ("[Main]\ndefault: site\n" + SLURM, "@compute"),  # it was said which
        ("[slurm]\nmap: :\n", "@compute"),
    ],
)
def test_what_can_mean_one_thing_only_is_not_told(
    folders: Path, caplog: pytest.LogCaptureFixture, rival: str, group: str
) -> None:
    write(folders / "usr/ctask", groups__d__site=SITE, groups=rival)
    assert nodes(group)
    assert not told(caplog)


def test_what_the_program_or_the_command_line_chose_is_not_told(
    folders: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(folders / "usr/ctask", groups__d__site=SITE, groups=SLURM)
    resolver = GroupResolverConfig()
    resolver.default_source_name = "slurm"
    assert nodes("@compute", resolver) == "s9"
    assert not told(caplog)


def test_a_default_of_the_system_is_told_where_a_user_has_the_name(
    folders: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As ClusterShell's package has it: `default: local`."""
    write(folders / "sys/clustershell", groups=LOCAL)
    write(folders / "usr/ctask", groups__d__site=SITE)
    assert nodes("@compute") == "m1"
    assert "@compute is that of source local" in told(caplog)
    assert "source site (" in told(caplog)
    with pytest.raises(NoSuchGroup, match=r"no such group: @login .*There is @site:login$"):
        nodes("@login")
    caplog.clear()
    write(folders / "usr/ctask", groups="[Main]\ndefault: site\n")
    assert nodes("@compute") == "n[1-4]"
    write(folders / "usr/ctask", groups="[Main]\ndefault: local\n")
    assert nodes("@compute") == "m1"
    write(folders / "usr/ctask", groups="[Main]\ndefault:\n")  # as if no file had chosen
    assert nodes("@compute") == "n[1-4]"
    assert not told(caplog)


def test_a_source_that_cannot_say_holds_nothing_up(
    folders: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "RIVAL_TIMEOUT", 0.2)
    write(folders / "usr/ctask", groups__d__site=SITE, groups="[slurm]\nmap: echo s9\nlist: sleep 60\n")
    assert nodes("@compute") == "n[1-4]"
    assert "could not be asked" in told(caplog)
    assert "default: site" in told(caplog)


def test_what_stands_in_a_file_and_means_nothing_is_told(folders: Path, caplog: pytest.LogCaptureFixture) -> None:
    main = "[Main]\ndefalt: slurm\nautodirs: x\nconfdir: more\ngroupsdir: more\n"
    write(folders / "usr/ctask", groups=main + SLURM + "lst: a\ncache-time: 3\n", groups__d__site=SITE)
    write(folders / "usr/ctask", more__a="[Main]\ndefault: a\n[a]\nmap: echo n1\nfoo: 3\n")
    (folders / "usr/ctask/groups.d/forgotten.yml").write_text(SITE)
    (folders / "usr/ctask/groups.d/.#lock.yaml").symlink_to("me@here")
    assert GroupResolverConfig().sources() == ["site", "a", "slurm"]
    for part in (
        "[Main] has an unknown key defalt; did you mean default?",
        "[Main] has an unknown key autodirs; did you mean autodir?",
        "groupsdir is another name of confdir",
        "[slurm] has an unknown key lst; did you mean list?",
        "[slurm] has an unknown key cache-time; did you mean cache_time?",
        "[a] has an unknown key foo; there are map",
        "a.conf: default of [Main] is left out",
        "forgotten.yml is left out: only *.yaml are read",
    ):
        assert part in told(caplog)


def test_a_file_that_is_found_by_two_ways_is_told_of_once(
    folders: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folders / "usr/ctask", groups=SLURM + "lst: a\n", groups__d__site=SITE)
    monkeypatch.setenv("CTASK_CFGDIR", str(folders / "usr/ctask"))
    assert GroupResolverConfig().sources() == ["site", "slurm"]
    assert told(caplog).count("unknown key lst") == 1


@pytest.mark.parametrize("key", ["CTASK_CFGDIR", "CLUSTERSHELL_CFGDIR"])
def test_a_folder_of_the_environment_that_is_not_there_is_told(
    folders: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    write(folders / "usr/ctask", groups__d__site=SITE)
    monkeypatch.setenv(key, str(folders / "nowhere"))
    assert nodes("@compute") == "n[1-4]"
    assert told(caplog) == f"{key} is {folders / 'nowhere'}, and there is no such folder"


def test_a_handler_of_the_log_may_ask_for_a_group(folders: Path) -> None:
    class Asking(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(nodes("@compute", resolver))

    write(folders / "usr/ctask", groups=SLURM + "lst: a\n", groups__d__site=SITE)
    found: list[str] = []
    resolver, handler = GroupResolverConfig(), Asking(logging.WARNING)
    config.log.addHandler(handler)
    try:
        assert nodes("@login", resolver) == "l1"
    finally:
        config.log.removeHandler(handler)
    assert set(found) == {"n[1-4]"}


@pytest.mark.parametrize(
    "text",
    [
        "site:\n  compute: n1\n  login: l1\n  compute: n2\n",
        "site: {a: n1}\nother: {a: n1}\nsite: {a: n2}\n",
        "site: {a: n1, 'a': n2}\n",
    ],
)
def test_a_name_that_stands_twice_in_yaml_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(GroupResolverConfigError, match=r"s\.yaml cannot be used: '.*' stands there twice.* line"):
        YAMLGroupLoader(str(tmp_path / "s.yaml"))


def test_a_merge_in_yaml_may_be_overridden(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("a: &a {x: n1, y: n2}\nb: &b {<<: *a, x: n3}\nc: {<<: *b, y: n4}\n")
    assert YAMLGroupLoader(str(tmp_path / "s.yaml")).groups("c") == {"x": "n3", "y": "n4"}


# -- whose files are refused ---------------------------------------------------------------------------------------

FILES = ["groups.conf", "groups.d/site.yaml", "groups.conf.d/more.conf"]


@pytest.fixture
def tree(folders: Path) -> Path:
    """A folder of configuration that runs as it is."""
    folder = folders / "usr/ctask"
    write(folder, groups="[Main]\nconfdir: groups.conf.d\n[own]\nmap: echo n1\n", groups__d__site=SITE)
    (folder / "groups.conf.d").mkdir()
    (folder / "groups.conf.d/more.conf").write_text("[more]\nmap: echo n1\n")
    assert GroupResolverConfig().sources() == ["site", "more", "own"]
    return folder


def refused(part: str) -> str:
    with pytest.raises(GroupResolverConfigError) as caught:
        GroupResolverConfig().sources()
    assert part in str(caught.value)
    return str(caught.value)


@needs_root
@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_account_is_refused(tree: Path, name: str) -> None:
    os.chown(tree / name, 4242, 0)
    assert f"{tree / name} is not used: the owner is uid 4242" in refused(f"chown root {tree / name}")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("mode", [0o646, 0o666, 0o602])
def test_a_file_that_others_may_write_to_is_refused(tree: Path, name: str, mode: int) -> None:
    (tree / name).chmod(mode)
    assert f"(mode {mode:04o})" in refused(f"chmod go-w {tree / name}")


@needs_root
@pytest.mark.parametrize("gid", [0, 4242])
def test_root_has_no_group_of_its_own(tree: Path, gid: int) -> None:
    os.chown(tree / "groups.conf", 0, gid)
    (tree / "groups.conf").chmod(0o664)
    refused("mode 0664")


@pytest.mark.parametrize("where", ["", "groups.d", "groups.conf.d", ".."])
def test_a_folder_in_which_others_may_put_a_file_is_refused(tree: Path, where: str) -> None:
    folder = Path(os.path.abspath(tree / where))
    folder.chmod(0o757)
    refused(f"folder {folder} on the way to it, others may write to it (mode 0757)")
    folder.chmod(0o1777)  # as /tmp: nobody replaces what is another's
    assert GroupResolverConfig().sources()


@needs_root
def test_a_folder_of_another_account_is_refused(tree: Path) -> None:
    os.chown(tree.parent, 4242, 0)
    refused(f"folder {tree.parent} on the way to it, the owner is uid 4242")


def test_a_symbolic_link_is_judged_by_what_it_leads_to(tree: Path, folders: Path) -> None:
    write(folders / "there", groups="[x]\nmap: echo n1\n")
    (tree / "groups.conf").unlink()
    (tree / "groups.conf").symlink_to(folders / "there/groups.conf")
    assert GroupResolverConfig().sources() == ["site", "x"]
    (folders / "there").chmod(0o777)
    refused(f"folder {folders / 'there'} on the way to it")
    (folders / "there").chmod(0o755)
    (folders / "there/groups.conf").chmod(0o666)
    refused("mode 0666")


@needs_root
def test_a_symbolic_link_of_another_account_is_refused(tree: Path) -> None:
    (tree / "groups.conf").rename(tree / "real")
    (tree / "groups.conf").symlink_to("real")
    os.chown(tree / "groups.conf", 4242, 0, follow_symlinks=False)
    refused(f"symbolic link {tree / 'groups.conf'} on the way to it, the owner is uid 4242")


def test_a_masked_file_is_empty_and_a_fifo_is_not_waited_for(tree: Path) -> None:
    (tree / "groups.conf").unlink()
    (tree / "groups.conf").symlink_to("/dev/null")
    assert GroupResolverConfig().sources() == ["site"]
    (tree / "groups.conf").unlink()
    os.mkfifo(tree / "groups.conf")
    refused("it is not a regular file")


def test_a_yaml_file_is_judged_again_when_it_is_read_again(tree: Path) -> None:
    loader = YAMLGroupLoader(str(tree / "groups.d/site.yaml"), cache_time=0)
    (tree / "groups.d/site.yaml").chmod(0o666)
    with pytest.raises(GroupResolverConfigError, match="mode 0666"):
        loader.groups("site")


def test_nothing_of_a_refused_file_is_run(tree: Path, folders: Path) -> None:
    write(tree, groups=f"[own]\nmap: touch {folders}/ran; echo n1\n")
    (tree / "groups.conf").chmod(0o666)
    env = {**os.environ, "CTASK_CFGDIR": ""}
    command = [sys.executable, "-m", "ctask", "-w", "@own:x", "true"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert f"chmod go-w {tree}/groups.conf" in done.stderr
    assert not (folders / "ran").exists()


def test_the_group_of_an_account_alone_may_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import grp
    import pwd

    path = tmp_path / "f"
    path.write_text("x")
    status = path.stat()
    owned = os.stat_result((0o100664, *status[1:4], 4242, 4243, *status[6:]))
    alice = pwd.struct_passwd(("alice", "x", 4242, 4243, "", "/", ""))
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: alice)
    groups = [("alice", [], True), ("alice", ["alice"], True), ("alice", ["bob"], False), ("hpc", [], False)]
    for name, members, alone in groups:
        monkeypatch.setattr(grp, "getgrgid", lambda gid, g=(name, "x", 4243, members): grp.struct_group(g))
        assert bool(trust._writable_by_others(owned, path)) is not alone


def test_a_group_that_is_not_there_is_an_error_as_before(tree: Path) -> None:
    with pytest.raises(NoSuchGroup):
        nodes("@site:nothing")
