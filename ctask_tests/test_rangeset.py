# SPDX-License-Identifier: Apache-2.0
"""Range sets: numbers and vectors of numbers as sets, in order, and as text."""

from __future__ import annotations

import copy
import pickle
from collections.abc import MutableSet
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctask import NodeSetError, RangeSet, RangeSetND, RangeSetParseError, UsageError
from ctask.errors import OptionError

quick = settings(max_examples=80)

numbers = st.one_of(
    st.integers(-12, 120).map(str), st.integers(0, 12).map("{:02d}".format), st.sampled_from(["000", "099"])
)
sets = st.sets(numbers, max_size=20)


def in_order(members: set[str]) -> list[str]:
    """Sort as the documentation says: negative numbers, then by length, then by value."""
    return sorted(members, key=lambda text: (text[0] != "-", -len(text) if text[0] == "-" else len(text), int(text)))


@pytest.mark.parametrize(
    ("text", "autostep", "shown", "members"),
    [
        ("1-5", None, "1-5", "1 2 3 4 5"),
        ("5,1-3,2", None, "1-3,5", "1 2 3 5"),
        (" 1 - 3 , 5", None, "1-3,5", "1 2 3 5"),
        ("8-12,08", None, "8-9,08,10-12", "8 9 08 10 11 12"),
        ("1-9/2", None, "1,3,5,7,9", "1 3 5 7 9"),
        ("1-9/2", 3, "1-9/2", "1 3 5 7 9"),
        ("1,3,5,7-9", 3, "1-7/2,8-9", "1 3 5 7 8 9"),
        ("1,3,7,11,15", 4, "1,3-15/4", "1 3 7 11 15"),
        ("0,2,4,6-8,10,12", 3, "0-6/2,7-8,10,12", "0 2 4 6 7 8 10 12"),
        ("5,05,7,07,9,09", 3, "5-9/2,05-09/2", "5 7 9 05 07 09"),
        ("-5--3", None, "-5--3", "-5 -4 -3"),
        ("-1-1,01", None, "-1-1,01", "-1 0 1 01"),
        ("-5,-3,-1,1", 3, "-5-1/2", "-5 -3 -1 1"),
    ],
)
def test_ranges_are_read_gone_through_and_shown(text: str, autostep: int | None, shown: str, members: str) -> None:
    ranges = RangeSet(text, autostep=autostep)
    assert str(ranges) == repr(ranges) == shown
    assert list(ranges) == members.split()
    assert RangeSet(shown) == ranges == RangeSet(members.split()) == set(members.split())


def test_a_run_that_is_too_short_costs_no_more_than_its_length() -> None:
    evens = ",".join(map(str, range(0, 40_000, 2)))
    assert str(RangeSet(evens, autostep=1e100)) == evens
    assert str(RangeSet(evens, autostep=3)) == "0-39998/2"


@quick
@given(sets, sets)
def test_range_sets_follow_the_laws_of_sets(one: set[str], other: set[str]) -> None:
    a, b = RangeSet(one), RangeSet(other)
    assert isinstance(a, MutableSet)
    assert list(a) == in_order(one)
    assert len(a) == len(one)
    for same in (b, other):
        assert [set(a | same), set(a & same), set(a - same), set(a ^ same)] == [
            one | other, one & other, one - other, one ^ other,
        ]  # fmt: skip
        assert (a <= same, a < same, a >= same, a > same) == (one <= other, one < other, one >= other, one > other)
        assert (a == same) == (one == other)
    assert set(one - b) == one - other
    assert a.isdisjoint(b) == one.isdisjoint(other)
    assert [a.index(number) for number in a] == list(range(len(a)))
    assert all((number in a) == (number in one) for number in other)
    assert list(a.intiter()) == [int(number) for number in a]
    for twin in (a.copy(), copy.deepcopy(a), pickle.loads(pickle.dumps(a)), RangeSet(a)):
        assert twin == a
        twin.add(777)
        assert twin != a
    if one:
        assert RangeSet(str(a)) == a
        assert RangeSet(str(RangeSet(a, autostep=3))) == a
        assert {a.copy().pop()} <= one


@quick
@given(sets, st.slices(20), st.integers(1, 5))
def test_parts_of_range_sets_are_those_of_the_list(members: set[str], cut: slice, count: int) -> None:
    ranges = RangeSet(members)
    listed = list(ranges)
    assert set(ranges[cut]) == set(listed[cut])
    assert [ranges[i] for i in range(-len(listed), len(listed))] == listed * 2
    parts = [list(part) for part in ranges.split(count)]
    assert [number for part in parts for number in part] == listed
    assert not parts or max(map(len, parts)) - min(map(len, parts)) <= 1
    assert RangeSet(number for part in ranges.contiguous() for number in part) == ranges


def test_numbers_are_added_and_taken_out() -> None:
    ranges = RangeSet("1-3")
    ranges.add(5)
    ranges.add("7", pad=3)
    ranges.add("09")
    assert str(ranges) == "1-3,5,09,007"
    ranges.remove(7, pad=3)
    ranges.discard("09")
    ranges.discard(99)
    with pytest.raises(KeyError, match="9"):
        ranges.remove(9)
    with pytest.raises(KeyError, match="4"):
        ranges.difference_update("3-4", strict=True)
    ranges.difference_update("3-4")
    ranges.union_update("10-12")
    ranges.updaten(["20", RangeSet("21"), ["22"]])
    assert str(ranges) == "1-2,5,10-12,20-22"
    ranges |= {"30"}
    ranges &= RangeSet("20-40")
    assert str(ranges) == "20-22,30"
    ranges.clear()
    assert not ranges
    assert str(ranges) == ""
    with pytest.raises(TypeError):
        hash(ranges)


def test_ranges_of_ints_and_slices() -> None:
    ranges = RangeSet()
    ranges.add_range(-3, 3)
    ranges.add_range(98, 102, pad=3)
    ranges.add_range(10, 20, 4)
    assert str(ranges) == "-3-2,10,14,18,098-101"
    assert str(RangeSet.fromone(slice(5))) == "0-4"
    assert str(RangeSet.fromone(slice(1, 6, 2), pad=2)) == "01,03,05"
    assert str(RangeSet.fromone(7, pad=3)) == "007"
    assert str(RangeSet.fromlist(["1-3", 7, RangeSet("9")])) == "1-3,7,9"
    assert list(RangeSet("1-3,07").slices()) == [slice(1, 4, 1), slice(7, 8, 1)]
    assert list(RangeSet("-5--3,1-9/2", autostep=3).slices()) == [slice(-5, -2, 1), slice(1, 10, 2)]
    assert [str(part) for part in RangeSet("1-9/2", autostep=3).contiguous()] == ["1", "3", "5", "7", "9"]
    assert RangeSet("1").dim() == 1


def test_padding_is_that_of_the_longest_and_can_be_changed() -> None:
    assert [RangeSet(text).padding for text in ("1-9", "01-09", "01-09,001", "10-12")] == [None, 2, 3, None]
    ranges = RangeSet("-2--1,1-12,0100")
    ranges.padding = 3
    assert str(ranges) == "-2--1,001-012,100"
    ranges.padding = None
    assert str(ranges) == "-2--1,1-12,100"
    ints: list[tuple[object, str, bool]] = [(3, "1-5", True), (3, "01-05", False), ("03", "01-05", True)]
    assert [element in RangeSet(text) for element, text, _ in ints] == [there for _, _, there in ints]
    assert RangeSet("2-3") in RangeSet("1-5")
    for absent in ("2-3", "", "x", None, 1.5, "-0"):
        assert absent not in RangeSet("0-5")
    assert RangeSet("1-2") != set(range(1, 3))
    assert RangeSet("1-2") != RangeSet("01-02")
    assert RangeSet("1-3") != "1-3"


def test_ranges_stay_ranges() -> None:
    huge = RangeSet("1-999999999999,-5")
    assert len(huge) == 10**12
    assert (huge[0], huge[-1], huge.index("999999999999")) == ("-5", "999999999999", 10**12 - 1)
    assert [str(part) for part in huge.split(2)] == ["-5,1-499999999999", "500000000000-999999999999"]
    assert str(huge - RangeSet("7")) == "-5,1-6,8-999999999999"


@pytest.mark.parametrize("text", ["", " ", "a", "1,,2", "1-", "3-1", "1-3/0", "5/2", "-05", "1-05", "--1", "1" * 300])
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(RangeSetParseError, match=r"^bad range set ") as caught:
        RangeSet(text)
    assert isinstance(caught.value, NodeSetError)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_what_is_no_number_is_refused() -> None:
    for wrong in ("5-6", "", "x", "-05"):
        with pytest.raises(RangeSetParseError):
            RangeSet("1").add(wrong)
    for arguments in ((5, 1), (1, 1), (1, 5, 0), (0, 10**9, 2)):
        with pytest.raises(RangeSetParseError):
            RangeSet().add_range(*arguments)
    for given_value in (5, b"1", 1.5):
        with pytest.raises(RangeSetParseError):
            RangeSet(given_value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'33' is not in the range set"):
        RangeSet("1-9").index(33)
    for autostep in ("x", -1, float("nan")):
        with pytest.raises(OptionError):
            RangeSet("1", autostep=autostep)  # type: ignore[arg-type]
    with pytest.raises(OptionError):
        RangeSet("1").split(0)


# --- vectors ------------------------------------------------------------------------------------------------

firsts = st.sampled_from(["1-2", "1,3", "5", "01-02", "-1-1"])
vectors = st.lists(st.tuples(firsts, st.sampled_from(["3", "3-5", "07"])))


@quick
@given(vectors, vectors)
def test_sets_of_vectors_follow_the_laws_of_sets(one: list[tuple[str, str]], other: list[tuple[str, str]]) -> None:
    def written_out(rows: list[tuple[str, str]]) -> set[tuple[str, ...]]:
        return {pair for first, second in rows for pair in product(RangeSet(first), RangeSet(second))}

    a, b = RangeSetND(one), RangeSetND(other)
    x, y = written_out(one), written_out(other)
    assert set(a) == x
    assert len(a) == len(x)
    assert (set(a | b), set(a & b), set(a - b), set(a ^ b)) == (x | y, x & y, x - y, x ^ y)
    assert (a <= b, a < b, a == b) == (x <= y, x < y, x == y)
    assert [a.index(row) for row in a] == list(range(len(a)))
    assert all(row in a for row in x)
    assert RangeSetND(a.veclist) == a == pickle.loads(pickle.dumps(a))
    assert set(a[1:3]) == set(list(a)[1:3])
    assert {row for part in a.contiguous() for row in part} == x


def test_vectors_are_shown_in_lines() -> None:
    rows = RangeSetND([["1-2", "3-4"], ["5", "06"]])
    assert str(rows) == "1-2; 3-4\n5; 06\n"
    assert repr(rows) == "RangeSetND([['1-2', '3-4'], ['5', '06']])"
    assert (rows.dim(), rows.pads(), RangeSetND().dim(), str(RangeSetND())) == (2, (0, 2), 0, "")
    assert list(rows.iter_padding())[-1] == (("5", "06"), [None, 2])
    assert rows[-1] == ("5", "06")
    assert (5, "06") in rows
    assert RangeSetND([["1", "3"]]) in rows
    assert ("9", "9") not in rows
    assert "1" not in rows
    rows.fold()
    rows.update([[slice(7, 9), 1]])
    assert str(rows) == "1-2; 3-4\n5; 06\n7-8; 1\n"
    assert str(RangeSetND([["1-9/2", "1-3"]], autostep=3)) == "1-9/2; 1-3\n"
    assert str(RangeSetND([[1, 2]], pads=[2, 3])) == "01; 002\n"
    with pytest.raises(ValueError, match="is not in the range set"):
        rows.index(("9", "9"))


@pytest.mark.parametrize("rows", [[["1"], ["1", "2"]], "1", [[]], [["x", "1"]], 5, [[RangeSet(), "1"]]])
def test_what_is_no_set_of_vectors_is_refused(rows: object) -> None:
    with pytest.raises(RangeSetParseError):
        RangeSetND(rows)  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        RangeSetND([["1", "2"]]).update([["1", "2", "3"]])
