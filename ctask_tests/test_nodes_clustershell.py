# SPDX-License-Identifier: Apache-2.0
"""Node sets beside ClusterShell 1.10.1, which is used as a black box: the same text, the same answers.

Where ctask answers otherwise on purpose, the case is in `departures`, with its reason.
"""

from __future__ import annotations

import os
import re
import tempfile
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctask.errors import NodeSetError
from ctask.nodes import RESOLVER_NOGROUP, NodeSet

# Its configuration is looked for when it is imported; the machine's own must have no part in this.
with tempfile.TemporaryDirectory() as nothing:
    os.environ["CLUSTERSHELL_CFGDIR"] = nothing
    from ClusterShell.NodeSet import RESOLVER_NOGROUP as THEIR_NOGROUP
    from ClusterShell.NodeSet import NodeSet as TheirNodeSet
    from ClusterShell.NodeSet import NodeSetException as TheirNodeSetError
    from ClusterShell.RangeSet import RangeSetException as TheirRangeSetError

    del os.environ["CLUSTERSHELL_CFGDIR"]

#: of ClusterShell, for what it refuses by something else than an error of its own
REFUSED = (TheirNodeSetError, TheirRangeSetError, AssertionError, ValueError)

many = settings(deadline=None, suppress_health_check=[HealthCheck.filter_too_much])

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


def products(text: str) -> tuple[int, int]:
    """Return how many products a folded text has, and how many patterns."""
    items = re.split(r",(?![^[]*\])", text)
    return len(items), len({re.sub(r"\[[^]]*\]|[0-9]+", "#", item) for item in items})


@many
@given(expressions(st.just(1), 4))
def test_one_dimension_reads_counts_and_shows_as_clustershell(text: str) -> None:
    compare(text)


@many
@given(expressions(st.integers(2, 4), 2))
def test_more_dimensions_hold_the_same_nodes(text: str) -> None:
    compare(text)


def compare(text: str) -> None:
    if departs(text):
        return
    own, other = ours(text), theirs(text)
    assert (own is None) == (other is None), (text, str(own), str(other))
    if own is None:
        return
    assert sorted(own) == sorted(set(other))
    if len(set(other)) == len(other):
        assert len(own) == len(other)
        # which products a set of many dimensions is shown as is a matter of taste, where it is not one product
        if all(count == patterns for count, patterns in map(products, (str(own), str(other)))):
            assert str(own) == str(other)
