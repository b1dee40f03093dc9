# SPDX-License-Identifier: Apache-2.0
"""What programs do with node sets besides reading them: parts, places, and how they are shown."""

from __future__ import annotations

import copy
import operator
import pickle
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ctask
from ctask import NodeSet, NodeSetError, OptionError, expand, fold
from ctask.nodes import RESOLVER_NOGROUP
from ctask.nodes.scatter import Scattered

quick = settings(max_examples=60)

digits = st.one_of(st.integers(0, 30).map(str), st.integers(0, 12).map("{:02d}".format))
names = st.one_of(
    st.sampled_from(["login", "gw.site", "n-3", "n-12"]),
    digits.map("n{}".format),
    st.tuples(digits, digits).map(lambda pair: "r{}n{}".format(*pair)),
    st.tuples(*[st.sampled_from("012")] * 3).map(lambda three: "x{}c{}s{}".format(*three)),
)
#: some of them are shown with negative numbers
node_sets = st.tuples(st.sets(names, max_size=25), st.sampled_from(["", "n[-5-1]", "r[-1-1]n[2,-3]"])).map(
    lambda pair: NodeSet(pair[0]) | NodeSet(pair[1])
)


@quick
@given(node_sets, st.integers(-30, 30), st.integers(-30, 30), st.integers(1, 7))
def test_parts_and_places_are_those_of_the_list(nodes: NodeSet, start: int, stop: int, count: int) -> None:
    listed = list(nodes)
    assert len(set(listed)) == len(listed) == len(nodes)
    assert list(nodes[start:stop]) == listed[start:stop]
    assert [nodes.index(name) for name in nodes] == list(range(len(nodes)))
    parts = [list(part) for part in nodes.split(count)]
    assert [name for part in parts for name in part] == listed
    assert len(parts) == min(count, len(nodes))
    assert not parts or max(map(len, parts)) - min(map(len, parts)) <= 1
    assert [str(one) for one in nodes.nsiter()] == listed
    assert list(nodes.striter()) == listed
    blocks = list(nodes.contiguous())
    assert NodeSet(blocks) == nodes
    assert sum(map(len, blocks)) == len(nodes)


@quick
@given(node_sets, node_sets, st.sampled_from([None, 2, 3, 4]), st.sampled_from([None, [], [0], [-1], [1, 0]]))
def test_however_it_is_shown_it_is_the_same_set(
    one: NodeSet, other: NodeSet, autostep: int | None, fold_axis: list[int] | None
) -> None:
    shown = NodeSet(one, autostep=autostep, fold_axis=fold_axis)
    assert NodeSet(str(shown)) == one == shown
    for made in (one, one | other, one & other, one - other, one ^ other):
        again = NodeSet(str(made))
        assert (str(again), list(again)) == (str(made), list(made))
    for twin in (shown.copy(), copy.copy(shown), copy.deepcopy(shown), pickle.loads(pickle.dumps(shown))):
        assert (str(twin), twin.autostep, twin.fold_axis, list(twin)) == (
            str(shown), shown.autostep, shown.fold_axis, list(shown),
        )  # fmt: skip
    assert set(one | other) == set(one) | set(other)
    assert set(one ^ other) == set(one) ^ set(other)
    assert (one >= other) == (set(one) >= set(other))


# numbers with and without a sign, names with a hyphen, and patterns whose places are between theirs
_ranges = st.lists(st.sampled_from(["-12", "-3--1", "-2", "-1", "-1-1", "0", "1-2", "3", "01"]), min_size=1, max_size=3)
_axes = st.one_of(_ranges.map(lambda few: f"[{','.join(few)}]"), st.sampled_from(["-1", "-2", "0", "1", "3", "-01"]))
_written = st.one_of(
    st.tuples(st.sampled_from(["n{}", "n-{}", "n{}x", "n+{}", "m{}"]), _axes).map(lambda one: one[0].format(one[1])),
    st.tuples(st.sampled_from(["r{}n{}", "r{}n-{}", "r-{}n{}", "r{}n{}x"]), _axes, _axes).map(
        lambda one: one[0].format(*one[1:])
    ),
    st.tuples(_axes, _axes, _axes).map(lambda three: "x{}c{}s{}".format(*three)),
)
_steps = st.lists(st.tuples(st.sampled_from("|&-^"), st.lists(_written, min_size=1, max_size=3)), max_size=4)
_operations = {"|": operator.or_, "&": operator.and_, "-": operator.sub, "^": operator.xor}


@quick
@given(st.lists(_written, max_size=4), _steps, st.slices(12), st.sampled_from([None, 2, 3]))
def test_read_from_its_text_a_set_is_shown_and_gone_through_as_it_was(
    first: list[str], steps: list[tuple[str, list[str]]], cut: slice, autostep: int | None
) -> None:
    nodes, names = NodeSet(first, autostep=autostep), set(NodeSet(first))
    sets = [nodes]
    for sign, operand in steps:
        other = NodeSet(operand)
        nodes, names = _operations[sign](nodes, other), _operations[sign](names, set(other))
        sets.append(nodes)
    assert set(nodes) == names
    listed = list(nodes)
    assert [name for part in nodes.split(3) for name in part] == listed
    assert list(nodes[cut]) == sorted(listed[cut], key=listed.index)
    expression = "!".join("^".join(few) for _, few in steps)
    for one in (*sets, *nodes.split(3), nodes[cut], *nodes.contiguous(), NodeSet(expression)):
        again = NodeSet(str(one), autostep=autostep)
        assert (str(again), list(again)) == (str(NodeSet(one, autostep=autostep)), list(one))
    assert [str(nodes & NodeSet(name)) for name in listed] == listed


@pytest.mark.parametrize(
    ("text", "options", "shown"),
    [
        ("n[1-9/2]", {"autostep": 3}, "n[1-9/2]"),
        ("n[1-9/2]", {"autostep": 6}, "n[1,3,5,7,9]"),
        ("n[1-9/2]a[2,4,6]", {"autostep": 3}, "n[1-9/2]a[2-6/2]"),
        ("n[08,10,12,14]", {"autostep": 3}, "n[08-14/2]"),
        ("n[-5,-3,-1,1]", {"autostep": 3}, "n[-5-1/2]"),
        ("a[1-2]b[3-4]", {"fold_axis": [0]}, "a[1-2]b3,a[1-2]b4"),
        ("a[1-2]b[3-4]", {"fold_axis": [-1]}, "a1b[3-4],a2b[3-4]"),
        ("a[1-2]b[3-4]", {"fold_axis": []}, "a1b3,a1b4,a2b3,a2b4"),
        ("a[1-2]b[3-4]", {"fold_axis": (0, 1)}, "a[1-2]b[3-4]"),
        ("a[1-2]b[3-4]", {"fold_axis": [5]}, "a1b3,a1b4,a2b3,a2b4"),
        ("a[1-2]b[3-4],n[1-3]", {"fold_axis": [0]}, "a[1-2]b3,a[1-2]b4,n[1-3]"),
        ("a[1-2]b[3-4],n[1-3]", {"fold_axis": [1]}, "a1b[3-4],a2b[3-4],n1,n2,n3"),
        ("a[1-2]b[3-4],n[1-3]", {"fold_axis": [-1]}, "a1b[3-4],a2b[3-4],n[1-3]"),
        ("a[1-2]b[3-4]c[5-6]", {"fold_axis": [0, 2]}, "a[1-2]b3c[5-6],a[1-2]b4c[5-6]"),
        ("n[1-3],login", {"fold_axis": []}, "login,n1,n2,n3"),
        ("n[1-999999999999]", {"fold_axis": [0]}, "n[1-999999999999]"),
    ],
)
def test_steps_and_axes_are_a_matter_of_showing(text: str, options: dict[str, int], shown: str) -> None:
    nodes = NodeSet(text, **options)  # type: ignore[arg-type]
    assert str(nodes) == shown
    assert str(nodes | NodeSet("zz")) == f"{shown},zz"
    assert str(NodeSet(nodes)) == shown


def test_options_that_cannot_be_are_refused() -> None:
    for options in ({"autostep": "x"}, {"autostep": -1}, {"fold_axis": 0}, {"fold_axis": ["0"]}, {"missing": "maybe"}):
        with pytest.raises(OptionError, match=next(iter(options))):
            NodeSet("n1", **options)
    for nbr in (0, -1):
        with pytest.raises(OptionError, match="give 1 or more"):
            NodeSet("n1").split(nbr)
    with pytest.raises(NodeSetError, match="more than 1000000 names"):
        str(NodeSet("n[1-999999999999]", fold_axis=[]))


def test_the_place_of_a_node() -> None:
    nodes = NodeSet("m5,n[-2-999999999999]")
    assert [nodes.index(name) for name in ("m5", "n-2", "n0", "n999999999999")] == [0, 1, 3, 10**12 + 2]
    assert nodes.index(NodeSet("n3")) == 6
    few = NodeSet("n[1-9]")
    assert few.index("n3", -9) == 2
    assert few.index("n3", 2, 3) == 2
    for node, span in (("n33", ()), ("n3", (3,)), ("n3", (0, 2)), ("n9", (-3, -1)), ("n03", ())):
        with pytest.raises(ValueError, match="is not in the node set"):
            few.index(node, *span)
    for node in ("n[1-2]", ""):
        with pytest.raises(NodeSetError, match="give one node"):
            few.index(node)


def test_parts_of_huge_sets_cost_nothing() -> None:
    tracemalloc.start()
    try:
        nodes = NodeSet("a[1-1000000]b[1-1000000],n[1-999999999999]")
        one, two, three = nodes.split(3)
        assert len(one) + len(two) + len(three) == len(nodes) == 2 * 10**12 - 1
        assert not one & two
        assert str(NodeSet("a[1-10]b[1-10]")[5:27]) == "a1b[6-10],a2b[1-10],a3b[1-7]"
        assert nodes[10**12 - 1 : 10**12 + 1] == NodeSet("a1000000b1000000,n1")
        assert nodes.index(nodes[123_456_789_012]) == 123_456_789_012
        assert ",".join(map(str, nodes.contiguous())) == str(nodes) == "a[1-1000000]b[1-1000000],n[1-999999999999]"
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_contiguous_parts() -> None:
    def parts(text: str, **style: int) -> list[str]:
        return [str(part) for part in NodeSet(text, **style).contiguous()]  # type: ignore[arg-type]

    assert parts("n[1-3,5-6,8],m[1-2],x") == ["m[1-2]", "n[1-3]", "n[5-6]", "n8", "x"]
    assert parts("a[1-2,4]b[1-2]") == ["a[1-2]b[1-2]", "a4b[1-2]"]
    assert parts("a[1-2]b[1,3]c[1-2]") == ["a[1-2]b1c[1-2]", "a[1-2]b3c[1-2]"]
    assert parts("n[9-12,013]") == ["n[9-12]", "n013"]
    assert parts("n[9,08-12]") == ["n9", "n[08-12]"]
    assert parts("n[-3-3]") == ["n[-3-3]"]
    assert parts("n[1-9/2]", autostep=3) == ["n1", "n3", "n5", "n7", "n9"]


def test_many_are_added_and_some_have_to_be_there() -> None:
    nodes = NodeSet("n1")
    nodes.updaten(["n2", NodeSet("n[4-5]"), "m1,n3"])
    assert str(nodes) == "m1,n[1-5]"
    nodes.difference_update("n[1-2]", strict=True)
    with pytest.raises(KeyError, match="n9"):
        nodes.difference_update("n[3,9]", strict=True)
    assert str(nodes) == "m1,n[3-5]"


@pytest.mark.parametrize(
    ("text", "shown", "listed"),
    [
        # nothing is lost: as names are written
        ("n[-5]", "n-5", "n-5"),
        ("n[-5],m1,r[-1]n[-3]", "m1,n-5,r-1n-3", "m1 n-5 r-1n-3"),
        ("n[-5],n-[-3]", "n-5,n--3", "n-5 n--3"),
        ("n[-5-3]&n3,n4x", "n3,n4x", "n3 n4x"),
        ("n[-5-3]&n[-5-3]!n[-4-3]", "n-5", "n-5"),
        ("n-4,n3!n[-5]", "n3,n-4", "n3 n-4"),
        # n-5 would come behind n3x, 0 and 01 be folded with 5, and the numbers of r come behind those without a sign
        ("n[-5],n3x", "n[-5],n3x", "n-5 n3x"),
        ("n-5,n3x", "n3x,n-5", "n3x n-5"),
        ("n[-5],n-[0,01]", "n[-5],n-[0,01]", "n-5 n-0 n-01"),
        ("r[-1-1]n[-3,2],r[0-1]n0", "r[-1]n[-3,2],r[0-1]n[-3,0,2]", "r-1n-3 r-1n2 r0n-3 r0n0 r0n2 r1n-3 r1n0 r1n2"),
        ("r[-1-0]n[2,-3]!r0n-3", "r[-1]n[-3,2],r0n2", "r-1n-3 r-1n2 r0n2"),
        # the text would be the same, the order would not
        ("r3n[-2-1],r[1,5]n7!r3n[-1-1]", "r[1,5]n7,r3n[-2]", "r1n7 r3n-2 r5n7"),
    ],
)
def test_a_single_negative_number_has_a_bracket_where_it_would_be_lost(text: str, shown: str, listed: str) -> None:
    for nodes in (NodeSet(text), NodeSet(shown), NodeSet(text, fold_axis=[0, 1])):
        assert (str(nodes), " ".join(nodes)) == (shown, listed)
    assert NodeSet(shown) == NodeSet(listed.split())
    assert sorted(str(NodeSet(text, fold_axis=[])).split(",")) == sorted(listed.split())


def test_what_is_taken_out_or_cleared_says_nothing_about_signs() -> None:
    nodes = NodeSet("n-4,n3")
    assert str(nodes - NodeSet("n[-5]")) == str(NodeSet("n-4,n3!n[-5]")) == "n3,n-4"
    nodes = NodeSet("n[-5-3]")
    nodes.clear()
    nodes.update("n-4,n3")
    assert str(nodes) == "n3,n-4"
    assert str(NodeSet("n[-5-3]") - NodeSet("n-5,n3")) == "n[-4-2]"


def test_negative_numbers_and_hyphens_are_the_same_node() -> None:
    nodes = NodeSet("n[-5-3]")
    assert nodes == NodeSet([f"n{i}" for i in range(-5, 4)]) == NodeSet("n-[1-5],n[0-3]")
    assert list(nodes) == [f"n{i}" for i in range(-5, 4)]
    assert len(nodes | NodeSet("n-5")) == 9
    assert "n-5" in nodes
    assert "n[-2-2]" in nodes
    assert str(nodes - NodeSet("n-1")) == "n[-5--2,0-3]"
    assert str(nodes[2:7]) == "n[-3-1]"
    assert str(NodeSet("n-0,n-01,n-2") | NodeSet("n[-1]")) == "n[-2--1],n-[0,01]"
    assert str(pickle.loads(pickle.dumps(nodes))) == "n[-5-3]"


@settings(max_examples=12)
@given(
    st.lists(st.tuples(st.integers(0, 4000), st.sampled_from([1, 1, 2, 9, 400])), min_size=40, max_size=300),
    st.lists(st.tuples(st.integers(0, 4000), st.sampled_from([1, 1, 2, 9, 400])), max_size=300),
    st.sampled_from(["{}", "{:04d}", "{:03d}"]),
)
def test_scattered_sets_follow_the_laws_of_sets(
    one: list[tuple[int, int]], other: list[tuple[int, int]], form: str
) -> None:
    def names_of(runs: list[tuple[int, int]], every: int) -> set[str]:
        values = (first + every * i for first, count in runs for i in range(count))
        return {"n" + form.format(value) for value in values}

    x, y = names_of(one, 2), names_of(other, 1)
    a, b = NodeSet(x), NodeSet(y)
    for left, right in ((a, b), (b, a), (a, NodeSet(str(b))), (NodeSet(str(a)), b)):
        p, q = set(left), set(right)
        operations = [(left | right, p | q), (left & right, p & q), (left - right, p - q), (left ^ right, p ^ q)]
        for made, wanted in operations:
            assert len(made) == len(wanted)
            assert str(made) == fold(sorted(wanted))
            assert made == NodeSet(sorted(wanted)) == NodeSet(str(made))
            assert all(name in made for name in list(wanted)[:20])
            assert list(made) == list(NodeSet(str(made)))
            assert [str(part) for part in made.split(3)] == [str(part) for part in NodeSet(str(made)).split(3)]


def test_scattered_sets_are_kept_as_bits_where_that_takes_less_room() -> None:
    def kept(text: str) -> object:
        [space] = NodeSet(text)._patterns.values()
        return space[0][0]

    assert isinstance(kept(",".join(f"n{i}" for i in range(0, 4000, 3))), Scattered)
    assert isinstance(kept(f"n[{','.join(str(i) for i in range(0, 4000, 3))}]"), Scattered)
    assert not isinstance(kept(",".join(f"n{i}" for i in range(0, 4_000_000_000, 3_000_000))), Scattered)
    assert not isinstance(kept("n[1-4000,999999999999]"), Scattered)
    apart = NodeSet(",".join(f"n{i}" for i in range(0, 4000, 3)))
    assert len(apart | NodeSet("n[1-999999999999]")) == 10**12
    assert len(apart | NodeSet("n999999999999")) == len(apart) + 1
    assert str(apart & NodeSet("n[4-999999999999]&n[1-9]")) == "n[6,9]"


@pytest.mark.parametrize("size", [3, 500])
def test_long_lists_are_read_as_short_ones_are(size: int) -> None:
    def listed(form: str) -> list[str]:
        return [form.format(i) for i in range(1, size + 1)]

    assert fold(listed("n{}")) == f"n[1-{size}]"
    assert fold(listed("a{}b7")) == f"a[1-{size}]b7"
    assert fold([*listed("n{}"), "m1,m2"]) == f"m[1-2],n[1-{size}]"
    assert fold([*listed("n{}.site"), "n1x.site"]).startswith(f"n[1-{size}].site,n1x.site")
    assert fold([NodeSet("n0"), *listed("n{}")]) == f"n[0-{size}]"
    assert fold(f"n{i:03d}" for i in range(size)) == f"n[000-{size - 1:03d}]"
    for wrong in ("n 1", "n1\nn2", "", "-n1", "n" + "1" * 300, "n１", "n1/", 5):
        with pytest.raises(ValueError, match="bad node name"):
            NodeSet([*listed("n{}"), wrong])  # type: ignore[list-item]
    for form in ("-n{}", "n..{}", "n/{}", "n {}"):
        with pytest.raises(ValueError, match="bad node name"):
            NodeSet(listed(form))


def test_what_is_exported() -> None:
    assert expand("n[1-3]") == ["n1", "n2", "n3"]
    assert fold(["n1", "n2"]) == fold("n1,n2") == "n[1-2]"
    for name in ctask.__all__:
        assert getattr(ctask, name)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        ctask.Nothing  # noqa: B018
    assert NodeSet("n1", resolver=RESOLVER_NOGROUP).resolver is RESOLVER_NOGROUP
