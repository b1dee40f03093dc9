# SPDX-License-Identifier: Apache-2.0
"""Node groups and wildcards in node sets: what a text means, and what a set says about groups."""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctask.errors import NodeNameError, NodeSetError, NodeSetExternalError, NodeSetParseError, NoSuchGroup
from ctask.nodes import (
    RESOLVER_NOGROUP,
    NodeSet,
    Resolver,
    expand,
    fold,
    grouplist,
    set_std_group_resolver,
    std_group_resolver,
)
from ctask.nodes.resolving import no_such_group


class Tables:
    """A resolver that knows what it is given: source -> group -> words; the first source is the default one."""

    def __init__(self, tables: dict[str, dict[str, str | list[str]]]) -> None:
        self.tables = tables
        self.asked: list[tuple[str | None, str]] = []

    @property
    def default_source_name(self) -> str | None:
        return next(iter(self.tables), None)

    def sources(self) -> list[str]:
        return list(self.tables)

    def group_nodes(self, group: str, source: str | None = None) -> Iterable[str]:
        self.asked.append((source, group))
        table = self._table(source)
        if group not in table:
            raise no_such_group(group, source=source, known=table)
        words = table[group]
        return [words] if isinstance(words, str) else words

    def all_nodes(self, source: str | None = None) -> Iterable[str]:
        return [word for group in self._table(source) for word in self.group_nodes(group, source)]

    def grouplist(self, source: str | None = None) -> list[str]:
        return list(self._table(source))

    def has_node_groups(self, source: str | None = None) -> bool:
        return source == "switch"

    def node_groups(self, node: str, source: str | None = None) -> list[str]:
        self.asked.append((source, node))
        return [group for group in self._table(source) if node in NodeSet(self.group_nodes(group, source))]

    def _table(self, source: str | None) -> dict[str, str | list[str]]:
        name = self.default_source_name if source is None else source
        if name not in self.tables:
            raise NodeSetExternalError(f"no such group source: {name}", f"@{name}:")
        return self.tables[name]


SITE: dict[str, str | list[str]] = {
    "rack1": "n[1-4]",
    "rack2": ["n[5-6]", "n7", "n8"],
    "rack3": "n[9-12]",
    "all": "@rack[1-3],x1",
    "big": "@rack1,@rack2",
    "io": "io[1-2]",
    "empty": [],
    "blank": "",
    "deep": "@site:rack1!n2",
    "other": "@two:x",
    "prod": "n[1-2]",
}
TWO: dict[str, str | list[str]] = {"x": "@y,y9", "y": "y[1-3]", "r1": "n[1-4]", "dc1/row": "n1"}


@pytest.fixture
def site() -> Iterator[Tables]:
    resolver = Tables({"site": SITE, "two": TWO})
    with standard(resolver):
        yield resolver


@contextmanager
def standard(resolver: Resolver) -> Iterator[None]:
    set_std_group_resolver(resolver)
    try:
        yield
    finally:
        set_std_group_resolver(None)


@pytest.mark.parametrize(
    ("text", "folded"),
    [
        ("@rack1", "n[1-4]"),
        ("@rack2", "n[5-8]"),
        ("@site:rack1", "n[1-4]"),
        ("@rack[1-2]", "n[1-8]"),
        ("@rack[1,3]!n[2-9]", "n[1,10-12]"),
        ("@rack[1-2]&n[3-6]", "n[3-6]"),
        ("@big,x1", "n[1-8],x1"),
        ("@two:x", "y[1-3,9]"),
        ("@other", "y[1-3,9]"),
        ("@deep", "n[1,3-4]"),
        ("@two:*", "n[1-4],y[1-3,9]"),
        ("@*", "io[1-2],n[1-12],x1,y[1-3,9]"),
        ("@site:*", "io[1-2],n[1-12],x1,y[1-3,9]"),
        ("*", "io[1-2],n[1-12],x1,y[1-3,9]"),
        ("@@", "all,big,blank,deep,empty,io,other,prod,rack[1-3]"),
        ("@@site", "all,big,blank,deep,empty,io,other,prod,rack[1-3]"),
        ("@empty,n1", "n1"),
        ("@blank", ""),
        ("n*", "n[1-12]"),
        ("n?", "n[1-9]"),
        ("n*[1-2]", "n[1-2,11-12]"),
        ("n1[0-2]*", "n[10-12]"),
        ("?[1-3]", "n[1-3],x1,y[1-3]"),
        ("*1", "io1,n[1,11],x1,y1"),
        ("n*!@rack1,z5", "n[5-12],z5"),
        ("q*", ""),
    ],
)
def test_groups_and_wildcards_are_looked_up(site: Tables, text: str, folded: str) -> None:
    assert str(NodeSet(text)) == folded
    assert str(NodeSet([text])) == folded
    assert str(NodeSet("zz").union(text)) == ",".join(filter(None, [folded, "zz"]))


def test_a_group_that_is_not_there_is_an_error_that_names_the_nearest(site: Tables) -> None:
    for text in ("@pord", "n1,@pord", "@all!@pord"):
        with pytest.raises(NoSuchGroup, match=r"^no such group: @pord\. Did you mean @prod\?$") as caught:
            NodeSet(text)
        assert caught.value.text == "@pord"
        assert isinstance(caught.value, NodeSetExternalError)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with pytest.raises(NoSuchGroup, match=r"^no such group: @two:r2\. Did you mean @two:r1\?$"):
        NodeSet("@two:r2")
    with pytest.raises(NodeSetExternalError, match="no such group source: tow"):
        NodeSet("@tow:r1", missing="empty")
    assert str(NodeSet("@all!@pord", missing="empty")) == "n[1-12],x1"
    assert str(NodeSet("n1", missing="empty").union("@pord")) == "n1"


def test_where_a_group_was_looked_for_is_told() -> None:
    error = no_such_group("pord", where="source site: /etc/clustershell/groups.d/site.yaml", known=["prod", "all"])
    assert str(error) == (
        "no such group: @pord (source site: /etc/clustershell/groups.d/site.yaml). Did you mean @prod?"
    )
    assert str(no_such_group("x")) == "no such group: @x"


def test_groups_in_a_circle_are_told_with_their_path() -> None:
    circle = Tables({"s": {"a": "n1,@b", "b": "@o:c", "me": "@me"}, "o": {"c": "@s:a"}})
    with pytest.raises(NodeSetError, match=r"^node groups go in a circle: @a -> @b -> @o:c -> @a$"):
        NodeSet("@a", resolver=circle)
    with pytest.raises(NodeSetError, match=r"^node groups go in a circle: @me -> @me$"):
        NodeSet("x,@s:me", resolver=circle)
    with pytest.raises(NodeSetError, match="in a circle"):
        NodeSet("*", resolver=Tables({"s": {"a": "@*"}}))


def test_what_is_wrong_in_a_group_names_the_group() -> None:
    bad = Tables({"s": {"a": "n[1-", "b": ["a/b"], "c": "@a"}, "o": {"d": "n[3-1]"}})
    with pytest.raises(NodeSetExternalError, match=r'^@a cannot be read: bad node set "n\[1-" at position 2'):
        NodeSet("@c", resolver=bad)
    with pytest.raises(NodeSetExternalError, match=r"^@b cannot be read: bad node name"):
        NodeSet("@b", resolver=bad)
    with pytest.raises(NodeSetExternalError, match=r"^@o:d cannot be read: .* ends before it begins"):
        NodeSet("@o:d", resolver=bad)


def test_each_group_is_asked_for_once_however_often_it_is_named() -> None:
    # without that, 40 groups that name the next one twice would be 2 ** 40 questions
    deep = Tables({"s": {f"g{i}": [f"@g{i + 1}", f"@g{i + 1}"] for i in range(40)} | {"g40": "n1"}})
    assert str(NodeSet("@g0,@g1", resolver=deep)) == "n1"
    assert len(deep.asked) == 41
    endless = Tables({"s": {f"g{i}": f"@g{i + 1}" for i in range(5000)}})
    with pytest.raises(NodeSetError, match=r"more than 50 deep within each other: @g0$"):
        NodeSet("@g0", resolver=endless)


def test_a_wildcard_takes_time_for_its_length_only() -> None:
    many = Tables({"s": {"all": "a" * 200 + "[1-20]"}})
    began = time.perf_counter()
    assert not NodeSet("*a" * 40 + "*b", resolver=many)
    assert not NodeSet("*" * 100 + "[1-999999999999]b*", resolver=many)
    assert time.perf_counter() - began < 10


def test_a_resolver_is_the_sets_own_or_the_processs(site: Tables) -> None:
    own = Tables({"mine": {"rack1": "m1"}})
    nodes = NodeSet("@rack1", resolver=own)
    assert str(nodes) == "m1"
    for kin in (nodes.copy(), nodes | NodeSet("x"), NodeSet(nodes), nodes[:1]):
        assert kin.resolver is own
    assert nodes.issubset("@rack1")
    assert std_group_resolver() is site is NodeSet().resolver
    unpickled = pickle.loads(pickle.dumps(NodeSet("@rack1", autostep=3, resolver=own)))
    assert unpickled.resolver is site
    for nothing in (RESOLVER_NOGROUP, -1):
        with pytest.raises(NodeSetExternalError, match="not looked up here: @rack1"):
            NodeSet("@rack1", resolver=nothing)
        with pytest.raises(NodeSetExternalError, match="nobody knows all nodes"):
            NodeSet("n*", resolver=nothing)
    assert pickle.loads(pickle.dumps(RESOLVER_NOGROUP)) is RESOLVER_NOGROUP


def test_all_nodes_and_the_names_of_groups(site: Tables) -> None:
    assert str(NodeSet.fromall()) == "io[1-2],n[1-12],x1,y[1-3,9]"
    assert str(NodeSet.fromall("two", autostep=3)) == "n[1-4],y[1-3,9]"
    assert grouplist() == list(SITE)
    assert grouplist("two") == list(TWO)
    assert grouplist("two", resolver=Tables({"two": {"a": "n1"}})) == ["a"]
    assert expand("@rack1") == ["n1", "n2", "n3", "n4"]
    assert fold("@rack1,n5") == "n[1-5]"


@pytest.mark.parametrize(
    ("nodes", "options", "text"),
    [
        ("n[1-8]", {}, "@big"),
        ("n[1-12]", {}, "@big,@rack3"),
        ("n[1-12],x1", {}, "@all"),
        ("n[1-9],io[1-2]", {}, "@big,@io,n9"),
        ("n[1-9]", {"overlap": True}, "@big,@deep,@prod,@rack[1-2],n9"),
        ("n[1-9]", {"groupsource": "site"}, "@site:big,n9"),
        ("n[1-9]", {"groupsource": "two", "noprefix": True}, "@r1,n[5-9]"),
        ("n[1-4,6,8,10,12]", {"autostep": 3}, "@rack1,n[6-12/2]"),
        ("zz", {}, "zz"),
        ("", {}, ""),
    ],
)
def test_regroup_takes_the_largest_groups_first(
    site: Tables, nodes: str, options: dict[str, str], text: str
) -> None:
    assert NodeSet(nodes).regroup(**options) == text  # type: ignore[arg-type]


def test_regroup_is_the_same_set(site: Tables) -> None:
    nodes = NodeSet("n[1-7,9-12],io1,y[1-3]")
    assert NodeSet(nodes.regroup()) == nodes
    assert NodeSet(nodes.regroup("two")) == nodes


def test_groups_are_those_that_share_a_node(site: Tables) -> None:
    shared = NodeSet("n[1-2],io1").groups()
    assert {name: (str(group), str(held)) for name, (group, held) in shared.items()} == {
        "@rack1": ("n[1-4]", "n[1-2]"),
        "@all": ("n[1-12],x1", "n[1-2]"),
        "@big": ("n[1-8]", "n[1-2]"),
        "@io": ("io[1-2]", "io1"),
        "@deep": ("n[1,3-4]", "n1"),
        "@prod": ("n[1-2]", "n[1-2]"),
    }
    assert list(NodeSet("n2").groups("two")) == ["@two:r1"]
    assert list(NodeSet("n2").groups("two", noprefix=True)) == ["@r1"]


def test_a_set_is_explained_by_the_groups_that_hold_it_and_little_else() -> None:
    switch = Tables({"site": {}, "switch": {f"sw{i}": f"n[{36 * i + 1}-{36 * i + 36}]" for i in range(20)}})
    stale = NodeSet("n[37-72],n3", resolver=switch)
    found = stale.explained_by("switch")
    assert found == [("@switch:sw1", 36, 36), ("@switch:sw0", 1, 36)]
    assert (found[0].group, found[0].held, found[0].size) == found[0]
    assert ("switch", "n3") not in switch.asked  # 20 groups are less to look at than 37 nodes
    assert NodeSet("n3", resolver=switch).explained_by("switch") == [("@switch:sw0", 1, 36)]
    assert ("switch", "n3") in switch.asked  # and one node is less than 20 groups
    nested = Tables({"s": {"row": "n[1-72]", "sw1": "n[1-36]", "half": "n[1-18]", "x": "m1"}})
    assert NodeSet("n[1-35]", resolver=nested).explained_by() == [
        ("@sw1", 35, 36),
        ("@half", 18, 18),
        ("@row", 35, 72),
    ]


group_names = st.sampled_from(["a", "b", "c", "g1", "g2"])
words = st.lists(
    st.one_of(
        st.sampled_from(["n1", "n[1-3]", "m[2-4]", "@a!n1", "@o:b", "@*", "@o:*", "n*", "", "n["]),
        group_names.map("@{}".format),
    ),
    max_size=3,
)


@settings(deadline=None, max_examples=150)
@given(
    st.dictionaries(group_names, words, max_size=5),
    st.dictionaries(group_names, words, max_size=3),
    st.text(alphabet="abgno123@@@:*?[]-,!&^", max_size=12),
)
def test_whatever_groups_hold_a_text_is_a_node_set_or_an_error(
    one: dict[str, list[str]], other: dict[str, list[str]], text: str
) -> None:
    resolver = Tables({"s": dict(one), "o": dict(other)})
    for given_text in (text, "@a,@g[1-2]&n*", "@o:b^@*"):
        with suppress(NodeSetError, NodeNameError):
            nodes = NodeSet(given_text, resolver=resolver, missing="empty")
            assert NodeSet(str(nodes)) == nodes


def test_errors_of_text_are_told_from_those_of_groups(site: Tables) -> None:
    with pytest.raises(NodeSetParseError):
        NodeSet("@rack1,n[")
    with pytest.raises(NodeSetExternalError):
        NodeSet("@@nowhere")
