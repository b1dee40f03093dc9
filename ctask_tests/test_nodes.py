# SPDX-License-Identifier: Apache-2.0
"""Node sets and node names: the grammar, the laws of sets, and what is refused."""

from __future__ import annotations

import copy
import pickle
import string
import time
import tracemalloc
from itertools import islice, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctask.errors import NodeNameError, NodeSetError, NodeSetParseError
from ctask.nodes import RESOLVER_NOGROUP, NodeSet, fold, names

quick = settings(deadline=None, max_examples=150)

# --- strategies ---------------------------------------------------------------------------------------------

digits = st.one_of(
    st.integers(0, 130).map(str),
    st.integers(0, 12).map(lambda v: f"{v:02d}"),
    st.sampled_from(["000", "099", "100"]),
)
#: names of few patterns, so that they meet: none, one and more numbers, mixed padding
node_names = st.one_of(
    st.sampled_from(["login", "a", "n-x", "gw.site"]),
    digits.map("n{}".format),
    digits.map("n{}.site".format),
    digits,
    st.tuples(digits, digits).map(lambda pair: "r{}n{}".format(*pair)),
    st.tuples(*[st.sampled_from("012")] * 4).map(lambda four: "x{}c{}s{}b{}".format(*four)),
)
name_sets = st.sets(node_names, max_size=25)


@st.composite
def brackets(draw: st.DrawFn) -> tuple[str, set[str]]:
    """Return a bracket's text, and the numbers that it stands for, written out."""
    texts: list[str] = []
    numbers: set[str] = set()
    for _ in range(draw(st.integers(1, 3))):
        first, count = draw(st.integers(0, 120)), draw(st.integers(0, 15))
        step = draw(st.sampled_from([1, 1, 1, 2, 3, 20]))
        width = draw(st.sampled_from([0, 0, 2, 3]))
        last = first + count
        if len(str(last)) > max(width, 1) and width:
            width = 0
        texts.append(f"{first:0{width}d}-{last:0{width}d}" + (f"/{step}" if step > 1 else ""))
        numbers |= {f"{value:0{width}d}" for value in range(first, last + 1, step)}
    return ",".join(texts), numbers


@st.composite
def expressions(draw: st.DrawFn) -> tuple[str, set[str]]:
    """Return a node set as text, and its names as a reading by hand finds them."""
    text = ""
    found: set[str] = set()
    for index in range(draw(st.integers(1, 4))):
        op = draw(st.sampled_from(",!&^")) if index else ","
        one, other = draw(brackets()), draw(brackets())
        operand, members = draw(
            st.sampled_from(
                [
                    (f"n[{one[0]}]", {f"n{number}" for number in one[1]}),
                    (f"n[{one[0]}]m[{other[0]}]-x", {f"n{i}m{j}-x" for i, j in product(one[1], other[1])}),
                    (f"r1n[{one[0]}]", {f"r1n{number}" for number in one[1]}),
                    ("login", {"login"}),
                ]
            )
        )
        text += (op if index else "") + operand
        found = {",": found | members, "!": found - members, "&": found & members, "^": found ^ members}[op]
    return text, found


# --- the grammar --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "folded", "count"),
    [
        ("green[36-39,133]", "green[36-39,133]", 5),
        ("n1", "n1", 1),
        ("n[1]", "n1", 1),
        ("a[1-9/2]", "a[1,3,5,7,9]", 5),
        ("n[1-2/5]", "n1", 1),
        ("1,2,3", "[1-3]", 3),
        ("[1-3]", "[1-3]", 3),
        ("b[1-2],a,c3", "a,b[1-2],c3", 4),
        ("n[ 1-3 , 5 ] , m", "m,n[1-3,5]", 5),
        # digits that stand beside brackets
        ("n1[2-3]", "n[12-13]", 2),
        ("n1[02-03]", "n[102-103]", 2),
        ("n1[2-13]", "n[12-113]", 102),
        ("n0[1-9]", "n[01-09]", 9),
        ("n9[97-101/2]", "n[997,999,9101]", 3),
        ("n2[27-61,30-37/2,1-47]", "n[21-261]", 241),
        ("n9[99-101,010]", "n[999,9010,9100-9101]", 4),
        ("n0[8-12/2]", "n[08,010,012]", 3),
        ("n10[0-9]a", "n[100-109]a", 10),
        ("n[1-2]3", "n[13,23]", 2),
        ("n[1-3]0", "n[10,20,30]", 3),
        ("n[9-11]0", "n[90,100,110]", 3),
        ("n[08-10]0", "n[080,090,100]", 3),
        # padding
        ("n[08-12]", "n[08-12]", 5),
        ("n[099-101]", "n[099-101]", 3),
        ("n[99-101,099]", "n[99,099-101]", 4),
        ("n1,n01,n001", "n[1,01,001]", 3),
        ("n[1-10,01-10]", "n[1-9,01-10]", 19),
        ("n[8-12,08-09]", "n[8-9,08-12]", 7),
        ("n[1-9,05,10-12]", "n[1-9,05,10-12]", 13),
        ("n[1-16,24,013]", "n[1-16,24,013]", 18),
        ("n[02,10-37,41-499]", "n[02,10-37,41-499]", 488),
        ("n05,n[15-111]", "n[05,15-99,100-111]", 98),
        ("n[0-9,00-05]", "n[0-9,00-05]", 16),
        ("n[1-99999]", "n[1-99999]", 99999),
        # more than one number
        ("n[1-12]-n[01-05]", "n[1-12]-n[01-05]", 60),
        ("192.168.[0-1].[1-3]", "192.168.[0-1].[1-3]", 6),
        ("a1b1,a1b2,a2b1", "a1b[1-2],a2b1", 3),
        ("a1b1,a1b2,a2b1,a2b2", "a[1-2]b[1-2]", 4),
        ("fe80::1%eth0", "fe80::1%eth0", 1),
        # operators, from left to right
        ("n[1-5]!n[2-3],n9&n[1-9]", "n[1,4-5,9]", 4),
        ("n[1-10]^n[5-15]", "n[1-4,11-15]", 9),
        ("n[1-9]!n[1-3]!n[7-9]&n[1-5]", "n[4-5]", 2),
        ("n1!n1", "", 0),
        # negative numbers
        ("n[-5]", "n-5", 1),
        ("n[-5-3]", "n[-5-3]", 9),
        ("n[-8--4]", "n[-8--4]", 5),
        ("n[-0]", "n0", 1),
        ("n[-4-8/2]", "n[-4,-2,0,2,4,6,8]", 7),
        ("n[-1-1,01]", "n[-1-1,01]", 4),
        ("n[-5-3]b[-1-1]", "n[-5-3]b[-1-1]", 27),
        ("n[-100-100]", "n[-100-100]", 201),
        ("n[-3--2],n-5,n-04", "n[-5,-3--2],n-04", 4),
        ("n[-5-3],n-5", "n[-5-3]", 9),
        ("n[-5-5]3", "n[-53,-43,-33,-23,-13,03,13,23,33,43,53]", 11),
        ("n-[1-3],n-5", "n-[1-3,5]", 4),
        ("", "", 0),
        (" ", "", 0),
    ],
)
def test_text_is_read_folded_and_counted(text: str, folded: str, count: int) -> None:
    nodes = NodeSet(text)
    assert str(nodes) == folded
    assert len(nodes) == count == len(list(nodes))
    assert bool(nodes) is bool(count)


def test_a04_each_node_is_there_once() -> None:
    assert list(NodeSet("n1,n1,n[1-2]")) == ["n1", "n2"]
    assert list(NodeSet(["n1", "n[1-2]", "n2", NodeSet("n1")])) == ["n1", "n2"]


def test_nodes_come_in_the_order_of_patterns_then_numbers() -> None:
    nodes = NodeSet("b2,a10,a9,a01,a-1,a,aa1,a1-1,a1")
    assert list(nodes) == ["a", "a1", "a9", "a01", "a10", "a1-1", "a-1", "aa1", "b2"]
    assert list(NodeSet("r[2,1]n[10,9]")) == ["r1n9", "r1n10", "r2n9", "r2n10"]


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "position", "reason"),
    [
        ("n[1-3", 1, "bracket not closed"),
        ("a[1-", 1, "bracket not closed"),
        ("a[", 1, "bracket not closed"),
        ("a[1-3]b[", 7, "bracket not closed"),
        ("a[1-[2]]", 4, "inside a bracket"),
        ("a]", 1, "without an opening one"),
        ("a[1-3]]", 6, "without an opening one"),
        ("a[]", 2, "empty range"),
        ("a[1,,2]", 4, "empty range"),
        ("a[1, ,2]", 4, "empty range"),
        ("a[3-1]", 2, "ends before it begins"),
        ("a[1-5/0]", 2, "a step is 1 or more"),
        ("a[5/2]", 2, "a step needs a range"),
        ("a[1-x]", 2, "not a number or a range"),
        ("a[1!2]", 2, "not a number or a range"),
        ("a[-05]", 2, "no padding"),
        ("a[-1-05]", 2, "padding"),
        ("a[-9--11]", 2, "ends before it begins"),
        ("a[--5]", 2, "not a number or a range"),
        ("a1[-5]", 3, "no digits may stand before"),
        ("a[1-3][4-5]", 6, "a second bracket"),
        ("a[1-2]3[4-5]", 7, "a second bracket"),
        ("a[1-5/2]0", 2, "no digits may follow"),
        ("n[1-05]", 2, "padding"),
        ("n[01-5]", 2, "padding"),
        ("n[0-010]", 2, "padding"),
        ("n[7,01-120]", 4, "padding"),
        ("n0[1-10]", 3, "padding"),
        ("a[１-３]", 2, "ASCII digits"),
        ("a[" + "9" * 300 + "]", 2, "longer than 255 digits"),
        (",", 0, "no node before ','"),
        ("a,,b", 2, "no node before ','"),
        ("a[1],,b", 5, "no node before ','"),
        (",a", 0, "no node before ','"),
        ("a,", 1, "no node after ','"),
        ("a, ", 1, "no node after ','"),
        ("!a", 0, "no node before '!'"),
        ("a&", 1, "no node after '&'"),
        ("a,@", 2, "the name of a group is missing"),
        ("a,@site:", 7, "the name of a group is missing"),
        ("@:prod", 1, "the name of a source is missing"),
        ("a,@rack*", 7, "cannot be part of a group's name"),
        ("@site:@x", 6, "cannot be part of a group's name"),
        ("@a b", 2, "cannot be part of a group's name"),
        ("@rack[1-999999999999]", 1, "at most 100000 groups"),
        ("n[0-999999999999/2]", 2, "at most 100000"),
        ("n[0-999999999999]3", 2, "at most 100000"),
    ],
)
def test_a01_bad_text_is_refused_with_its_position(text: str, position: int, reason: str) -> None:
    with pytest.raises(NodeSetError, match=r"^bad node set ") as caught:
        NodeSet(text, resolver=RESOLVER_NOGROUP)
    assert caught.value.text == text
    assert caught.value.position == position
    assert isinstance(caught.value, NodeSetParseError)
    assert reason in caught.value.reason


BAD_NAMES = [
    ("a\0b", "control character"),
    ("a\x1b[0m", "control character"),
    ("a\x0bb", "control character"),
    ("a\nb", "white space"),
    ("a b", "white space"),
    ("a/b", "path"),
    ("../x", "path"),
    ("a..b", "path"),
    (".", "path"),
    ("$HOME", "shell"),
    ("`id`", "shell"),
    ("a;id", "shell"),
    ("a'b", "shell"),
    ('a"b', "shell"),
    ("a\\b", "shell"),
    ("a|b", "shell"),
    ("a>b", "shell"),
    ("a(b)", "shell"),
    ("a{b}", "shell"),
    ("root@n1", "login"),
    ("-oProxyCommand=x", "option"),
    ("--help", "option"),
    ("é1", "ASCII"),
    ("ﬁle", "ASCII"),
    ("\u202en1", "ASCII"),
    ("n１", "ASCII"),
    ("n\u2003", "ASCII"),
    ("n" * 256, "longer than 255"),
]


@pytest.mark.parametrize(("name", "reason"), BAD_NAMES)
def test_a05_a06_a07_bad_names_are_refused_with_what_is_wrong(name: str, reason: str) -> None:
    with pytest.raises(NodeNameError, match=reason) as caught:
        names.check(name)
    assert str(caught.value).isascii()
    assert str(caught.value).isprintable()
    if "[" not in name:
        for nodes in (name, f"n[1-2],{name}", [name], ["n1", name]):
            with pytest.raises(NodeNameError, match=reason):
                NodeSet(nodes)


@pytest.mark.parametrize("name", ["", "*", "n?", "a,b", "n[1]", "a!b", "a&b", "a^b", "n1\n", " n1"])
def test_a05_a_name_is_no_node_set(name: str) -> None:
    with pytest.raises(NodeNameError, match=r"^bad node name "):
        names.check(name)


def test_a06_ranges_do_not_hide_a_bad_name() -> None:
    for text in ("-x[1-3]", "a/b[1-3]", "a[1-3]$x", "é[1-2]", "n[1-2].." + "x", "n" * 250 + "[1-999999]"):
        with pytest.raises(NodeNameError, match=r"^bad node name "):
            NodeSet(text)


@pytest.mark.parametrize("name", ["n1", "0", "a.b-c_d", "192.168.0.1", "fe80::1%eth0", "::1", "n" * 255])
def test_good_names_pass(name: str) -> None:
    names.check(name)
    assert list(NodeSet([name])) == [name]


@pytest.mark.parametrize("nodes", [5, b"n1", 1.5, object()])
def test_a09_what_is_no_nodes_is_refused(nodes: object) -> None:
    with pytest.raises(NodeSetError, match="give text, a NodeSet or names, not "):
        NodeSet(nodes)  # type: ignore[arg-type]


@pytest.mark.parametrize("element", [5, b"n1", None, "", " "])
def test_a09_elements_of_lists_are_names(element: object) -> None:
    with pytest.raises(NodeNameError, match=r"^bad node name "):
        NodeSet(["n1", element])  # type: ignore[list-item]


def test_elements_of_lists_may_be_node_sets() -> None:
    assert fold(["n[1-3]", "n5,m1", " n4 "]) == "m1,n[1-5]"
    assert NodeSet.fromlist("n1,n2") == NodeSet("n[1-2]")
    assert fold(name for name in ("n2", "n1")) == "n[1-2]"
    with pytest.raises(NodeSetError) as caught:
        NodeSet(["n1", "n[1-"])
    assert (caught.value.text, caught.value.position) == ("n[1-", 1)


# --- size ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count", "first", "last"),
    [
        ("a[0-999999999999]", 10**12, "a0", "a999999999999"),
        ("a[1-1000]b[1-1000]c[1-1000]", 10**9, "a1b1c1", "a1000b1000c1000"),
        ("a[1-1000000]b[1-1000000]!a5b5", 10**12 - 1, "a1b1", "a1000000b1000000"),
    ],
)
def test_a02_huge_ranges_cost_nothing(text: str, count: int, first: str, last: str) -> None:
    tracemalloc.start()
    try:
        nodes = NodeSet(text)
        assert len(nodes) == count
        assert (nodes[0], nodes[-1], next(iter(nodes))) == (first, last, first)
        assert last in nodes
        assert list(nodes[-2:])[1] == last
        assert list(islice(nodes[:], 1)) == [first]
        assert len(nodes - NodeSet(last)) == count - 1
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a02_what_would_have_to_be_written_out_is_refused() -> None:
    with pytest.raises(NodeSetError, match="at most 1000000 elements"):
        NodeSet("a[0-999999999999]")[1::2]
    with pytest.raises(NodeSetError, match="more than can be counted off"):
        len(NodeSet("a[0-999999999999]b[0-999999999999]"))


def test_a02_overlaps_beyond_reason_are_refused() -> None:
    # "an odd number of the 24 is 0": every number before it decides what the last one has to be
    text = "^".join("".join(f"x{'0' if i == k else '[0-1]'}" for i in range(24)) for k in range(24))
    with pytest.raises(NodeSetError, match="overlap in too many ways"):
        NodeSet(text)


@pytest.mark.parametrize(
    "text",
    [
        ",".join(f"n{i * 7 % 100_003}" for i in range(50_000)),
        ", ".join(f"r{i % 100}n{i}" for i in range(30_000)),
        ",".join(f"n[{i}-{i + 2}]" for i in range(0, 60_000, 4)),
        ",".join(f"n{i}!n{i + 1}" for i in range(0, 12_000, 3)),
        "^".join(f"n{i}" for i in range(0, 24_000, 3)),
        ",".join(f"login{'abcdefghij'[i % 10]}x{'k' * (i // 10 % 200)}" for i in range(20_000)),
    ],
    ids=["names", "two-numbers", "ranges", "chain", "either", "plain"],
)
def test_long_texts_are_read_in_time_that_grows_with_them(text: str) -> None:
    # each takes a fraction of a second; in time that grows with the square they would take minutes
    began = time.perf_counter()
    assert NodeSet(str(NodeSet(text)))
    assert time.perf_counter() - began < 10


# --- the laws -----------------------------------------------------------------------------------------------


@quick
@given(name_sets)
def test_a03_fold_and_expand_are_inverse(members: set[str]) -> None:
    nodes = NodeSet.fromlist(members)
    listed = list(nodes)
    assert sorted(listed) == sorted(members)
    assert len(nodes) == len(members)
    assert NodeSet(str(nodes)) == nodes == NodeSet(listed)
    assert list(NodeSet(str(nodes))) == listed
    assert fold(reversed(listed)) == str(nodes)


@quick
@given(expressions())
def test_a03_text_means_what_it_says(case: tuple[str, set[str]]) -> None:
    text, members = case
    nodes = NodeSet(text)
    assert set(nodes) == members
    assert len(nodes) == len(members)
    assert fold(nodes) == str(nodes)
    assert NodeSet(members) == nodes
    assert all(name in nodes for name in members)


@quick
@given(name_sets, name_sets)
def test_sets_follow_the_laws_of_sets(one: set[str], other: set[str]) -> None:
    a, b = NodeSet(one), NodeSet(other)
    assert set(a | b) == one | other
    assert set(a & b) == one & other
    assert set(a - b) == one - other
    assert set(a ^ b) == one ^ other
    assert len(a | b) == len(a) + len(b) - len(a & b)
    assert (a | b) - b == a - b
    assert (a <= b, a < b, a >= b, a > b, a == b) == (
        one <= other, one < other, one >= other, one > other, one == other,
    )  # fmt: skip
    assert a.isdisjoint(b) == one.isdisjoint(other)
    assert (b in a) == (other <= one)
    assert all((name in a) == (name in one) for name in other)
    assert (set(a), set(b)) == (one, other)


@quick
@given(name_sets, st.slices(25))
def test_indexes_and_slices_are_those_of_the_list(members: set[str], cut: slice) -> None:
    nodes = NodeSet(members)
    listed = list(nodes)
    assert [nodes[i] for i in range(-len(listed), len(listed))] == listed * 2
    assert set(nodes[cut]) == set(listed[cut])
    for wrong in (len(listed), -len(listed) - 1):
        with pytest.raises(IndexError):
            nodes[wrong]


@settings(deadline=None, max_examples=600)
@given(
    st.one_of(
        st.text(alphabet="an01259[[]],,--//!&^ .", max_size=24),
        st.text(alphabet=string.printable + "é１\0\u2003", max_size=16),
        st.text(max_size=12),
        st.from_regex(r"a[0-9]?\[[0-9]{1,3}-[0-9]{1,3}(/[0-9])?\](b\[[0-9,-]{1,5}\])?[0-9]?", fullmatch=True),
    )
)
def test_a01_any_text_is_a_node_set_or_a_usage_error(text: str) -> None:
    for given_as in (text, [text]):
        nodes, error = _read(given_as)
        if error is None:
            assert NodeSet(str(nodes)) == nodes
            for name in islice(nodes, 50):
                names.check(name)
                assert name in nodes
        else:
            assert str(error).isprintable()
            assert error.position is None or 0 <= error.position < len(text)


def _read(nodes: str | list[str]) -> tuple[NodeSet, NodeSetError | None]:
    try:
        return NodeSet(nodes, resolver=RESOLVER_NOGROUP), None
    except NodeSetError as error:
        return NodeSet(), error
    except NodeNameError as error:
        return NodeSet(), NodeSetError("", None, str(error))


# --- what programs do with them -----------------------------------------------------------------------------


def test_methods_take_whatever_stands_for_nodes() -> None:
    nodes = NodeSet("n[1-5]")
    assert str(nodes.union("n6")) == "n[1-6]"
    assert str(nodes.difference(["n1", "n2"])) == "n[3-5]"
    assert str(nodes.intersection(NodeSet("n[5-9]"))) == "n5"
    assert str(nodes.symmetric_difference("n[5-6]")) == "n[1-4,6]"
    assert nodes.issuperset("n[2-3]")
    assert nodes.issubset("n[1-9]")
    assert not nodes.issubset("n[1-4],m[1-9]")
    nodes.update(["m1"])
    nodes.add("m2")
    nodes.difference_update("n[1-3],x")
    assert str(nodes) == "m[1-2],n[4-5]"
    nodes.intersection_update("m1,n[1-9]")
    nodes.symmetric_difference_update("n5,n6")
    assert str(nodes) == "m1,n[4,6]"
    nodes.remove(name for name in ("n4", "m1"))
    with pytest.raises(KeyError, match="n7"):
        nodes.remove("n[6-7]")
    assert str(nodes) == "n6"
    nodes.clear()
    assert not nodes


def test_operators_take_node_sets_only() -> None:
    nodes = same = NodeSet("n[1-5]")
    nodes |= NodeSet("n6")
    nodes -= NodeSet("n1")
    nodes &= NodeSet("n[1-5]")
    nodes ^= NodeSet("n[5,9]")
    assert str(same) == "n[2-4,9]"
    nodes -= nodes
    assert not same
    for operation in ("|", "&", "-", "^", "<", "|="):
        with pytest.raises(TypeError):
            exec(f"nodes {operation} 'n1'", {"nodes": nodes})
    assert NodeSet("n1") != "n1"


def test_what_is_in_a_node_set() -> None:
    nodes = NodeSet("n[1-5],r1n[1-2],login")
    assert "n3" in nodes
    assert "login" in nodes
    assert "n[2-3],r1n2" in nodes
    assert NodeSet("n[1-5]") in nodes
    for absent in ("n6", "n03", "r2n1", "", "n 1", "x" * 300, "n[5-6]", NodeSet("m"), 3, None):
        assert absent not in nodes
    with pytest.raises(NodeSetError, match="bracket not closed"):
        assert "n[1-" in nodes


def test_a_node_set_is_a_value_of_its_own() -> None:
    nodes = NodeSet("green[36-39,133]")
    assert repr(nodes) == "NodeSet('green[36-39,133]')"
    for twin in (
        nodes.copy(),
        copy.copy(nodes),
        copy.deepcopy(nodes),
        pickle.loads(pickle.dumps(nodes)),
        NodeSet(nodes),
    ):
        assert twin == nodes
        twin.add("x")
        assert twin != nodes
    with pytest.raises(TypeError):
        hash(nodes)
    assert NodeSet() == NodeSet(None) == NodeSet([])


def test_a_node_set_may_change_while_it_is_gone_through() -> None:
    nodes = NodeSet("a,n[1-3]r[1-2]")
    seen = []
    for name in nodes:
        seen.append(name)
        nodes.remove(name)
    assert len(seen) == 7
    assert not nodes
