# SPDX-License-Identifier: Apache-2.0
"""Node sets beside ClusterShell 1.10.1, which is used as a black box: the same text, the same answers.

Where ctask answers otherwise on purpose, `departs` and the comments beside what is compared say why.
"""

from __future__ import annotations

import os
import re
import tempfile
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctask.errors import NodeSetError, RangeSetParseError
from ctask.nodes import RESOLVER_NOGROUP, NodeSet, RangeSet

# Its configuration is looked for when it is imported; the machine's own must have no part in this.
with tempfile.TemporaryDirectory() as nothing:
    os.environ["CLUSTERSHELL_CFGDIR"] = nothing
    from ClusterShell.NodeSet import RESOLVER_NOGROUP as THEIR_NOGROUP
    from ClusterShell.NodeSet import NodeSet as TheirNodeSet
    from ClusterShell.NodeSet import NodeSetException as TheirNodeSetError
    from ClusterShell.RangeSet import RangeSet as TheirRangeSet
    from ClusterShell.RangeSet import RangeSetException as TheirRangeSetError

    del os.environ["CLUSTERSHELL_CFGDIR"]

#: of ClusterShell, for what it refuses by something else than an error of its own
REFUSED = (TheirNodeSetError, TheirRangeSetError, AssertionError, ValueError)

some = settings(max_examples=60, deadline=None)
nightly = settings(some, max_examples=4000, derandomize=False)

# --- expressions --------------------------------------------------------------------------------------------

small = st.integers(0, 30)


@st.composite
def ranges(draw: st.DrawFn, *, steps: bool = True, negative: bool = False) -> str:
    """Return a number or a range, padded in most ways that there are, right and wrong."""
    first = draw(st.integers(-9, 30) if negative else small)
    if draw(st.booleans()):
        return _padded(first, draw(st.sampled_from([0, 0, 2, 3])))
    last = first + draw(st.integers(0, 12))
    width = draw(st.sampled_from([0, 0, 0, 2, 3]))
    other = width if draw(st.integers(0, 9)) else draw(st.sampled_from([0, 2, 3]))
    step = draw(st.sampled_from(["", "", "", "/1", "/2", "/3"])) if steps else ""
    return f"{_padded(first, width)}-{_padded(last, other)}{step}"


def _padded(value: int, width: int) -> str:
    return str(value) if value < 0 else str(value).zfill(width)


@st.composite
def slots(draw: st.DrawFn) -> str:
    """Return digits, or a bracket with digits before or behind it where they are allowed."""
    form = draw(st.sampled_from(["digits", "bracket", "bracket", "before", "behind", "negative"]))
    if form == "digits":
        return _padded(draw(small), draw(st.sampled_from([0, 2, 3])))
    if form == "negative":
        return f"[{','.join(draw(st.lists(ranges(negative=True), min_size=1, max_size=3)))}]"
    inside = ",".join(draw(st.lists(ranges(steps=form != "behind"), min_size=1, max_size=3)))
    glued = draw(st.sampled_from(["0", "1", "01", "9"]))
    return {"bracket": f"[{inside}]", "before": f"{glued}[{inside}]", "behind": f"[{inside}]{glued}"}[form]


@st.composite
def operands(draw: st.DrawFn, dims: st.SearchStrategy[int]) -> str:
    texts = ["n", "r", "-x", "."]
    out = "n"
    for k in range(draw(dims)):
        out += draw(slots()) + (draw(st.sampled_from(texts)) if k or draw(st.booleans()) else "c")
    return out.rstrip("-.")


def expressions(dims: st.SearchStrategy[int], most: int) -> st.SearchStrategy[str]:
    pairs = st.tuples(st.sampled_from(",,!&^"), operands(dims))
    return st.lists(pairs, min_size=1, max_size=most).map(lambda all_: "".join(op + text for op, text in all_)[1:])


# --- both ---------------------------------------------------------------------------------------------------


def ours(text: str, **style: Any) -> NodeSet | None:
    try:
        return NodeSet(text, resolver=RESOLVER_NOGROUP, **style)
    except NodeSetError:
        return None


def theirs(text: str, **style: Any) -> Any:
    try:
        return TheirNodeSet(text, resolver=THEIR_NOGROUP, **style)
    except REFUSED:
        return None


def departs(text: str) -> str | None:
    """Return why ctask may answer otherwise than ClusterShell, or None."""
    if re.search(r"[0-9]\[[^]]*(?<![0-9])-[0-9]", text) or re.search(r"\[[^]]*(?<![0-9])-[1-9][^]]*\][0-9]", text):
        return "digits glued to negative numbers: it reads n3[-5] as n[3-35], and n[-5]3 as six nodes"
    if re.search(r"(?<![0-9])[0-9]-0{2,}", text):
        return "a range that ends at 00: it takes that for 0, and refuses 1-01"
    if re.search(r"\[[^]]*(?<![0-9])0-[1-9][0-9][^]]*\][0-9]", text):
        return "digits behind 0-10: it refuses 00-100/10, which nobody wrote"
    return None


def _items(text: str) -> list[str]:
    return re.split(r",(?![^[]*\])", text)


def products(text: str) -> tuple[int, int]:
    """Return how many products a folded text has, and how many patterns."""
    items = _items(text)
    return len(items), len({re.sub(r"\[[^]]*\]|[0-9]+", "#", item) for item in items})


def compare(text: str) -> tuple[NodeSet, Any] | None:
    """Hold both against each other; return them where both can read the text and mean the same by it."""
    if departs(text):
        return None
    own, other = ours(text), theirs(text)
    assert (own is None) == (other is None), (text, str(own), str(other))
    if own is None:
        return None
    assert sorted(own) == sorted(set(other))
    if len(set(other)) < len(other):
        return None  # it has a node twice: once as n-5, and once as n[-5]
    assert len(own) == len(other)
    # Which products a set of several dimensions is shown as, and in which order, is another matter where it is not one
    # product: ctask's are in the order of their numbers. And it shows n[-5],n3x as n-5,n3x, which it reads as n3x,n-5.
    stable = list(TheirNodeSet(str(other), resolver=THEIR_NOGROUP)) == list(other)
    if stable and all(count == patterns for count, patterns in map(products, (str(own), str(other)))):
        assert str(own) == str(other)
    return own, other


@some
@given(expressions(st.just(1), 4))
def test_one_dimension_reads_counts_and_shows_as_clustershell(text: str) -> None:
    compare(text)


@some
@given(expressions(st.integers(2, 4), 2))
def test_more_dimensions_hold_the_same_nodes(text: str) -> None:
    compare(text)


@pytest.mark.nightly
@pytest.mark.timeout(900)
@nightly
@given(st.one_of(expressions(st.just(1), 4), expressions(st.integers(2, 4), 2)))
def test_many_expressions_mean_the_same(text: str) -> None:
    compare(text)


@some
@given(expressions(st.just(1), 2), expressions(st.just(1), 2), st.integers(1, 5), st.slices(12))
def test_one_dimension_has_the_same_parts_and_places(one: str, other: str, count: int, cut: slice) -> None:
    both, more = compare(one), compare(other)
    if both is None or more is None:
        return
    own, their = both
    for a, b in ((own | more[0], their | more[1]), (own - more[0], their - more[1]), (own ^ more[0], their ^ more[1])):
        assert set(a) == set(b)
    assert (own <= more[0], own > more[0], own == more[0]) == (their <= more[1], their > more[1], their == more[1])
    # its order is that of the patterns, too, and within them of the numbers
    assert list(own) == list(their)
    if any("-" in name for name in own):
        return  # it does not find n-5 in n[-5], and fails on contiguous parts that end at -1
    assert [str(part) for part in own.split(count)] == [str(part) for part in their.split(count)]
    assert [str(part) for part in own.contiguous()] == [str(part) for part in their.contiguous()]
    assert [own.index(name) for name in own] == [their.index(name) for name in their]
    if cut.step is None or cut.step > 0:  # it knows no other negative steps than [::-n]
        assert str(own[cut]) == str(their[cut])


@some
@given(operands(st.integers(1, 3)), st.sampled_from([[0], [-1], [1], [-2], [0, 1], [0, -1], [7]]))
def test_axes_are_folded_the_same(text: str, axes: list[int]) -> None:
    if compare(text) and len(NodeSet(text)) < 300:  # ClusterShell takes its time
        own, their = ours(text, fold_axis=axes), theirs(text, fold_axis=axes)
        # what is written out comes in the order of the numbers; ClusterShell's order is another one
        assert sorted(_items(str(own))) == sorted(_items(str(their)))


@some
@given(st.lists(ranges(negative=True), min_size=1, max_size=8), st.sampled_from([None, 3, 4, 5]))
def test_range_sets_read_and_show_the_same(texts: list[str], autostep: int | None) -> None:
    text = ",".join(texts)
    if departs(f"n[{text}]"):
        return
    try:
        their = TheirRangeSet(text, autostep=autostep)
    except REFUSED:
        with pytest.raises(RangeSetParseError):
            RangeSet(text)
        return
    own = RangeSet(text, autostep=autostep)
    assert list(own) == list(their)
    assert own.padding == their.padding
    assert [str(part) for part in own.split(3)] == [str(part) for part in their.split(3)]
    for step in re.finditer(r"-([0-9]+)/[0-9]+,([0-9]+)", str(their)):
        if int(step[1]) + 1 == int(step[2]):
            return  # a number right behind a range with a step: ClusterShell does not see the next step then
    assert str(own) == str(their)
    assert [(part.start, part.stop) for part in own.slices()] == [(part.start, part.stop) for part in their.slices()]


def test_it_was_imported_without_a_configuration() -> None:
    assert theirs("@nodes") is not None  # a name, where no groups are known
    assert "CLUSTERSHELL_CFGDIR" not in os.environ
