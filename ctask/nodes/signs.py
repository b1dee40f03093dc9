# SPDX-License-Identifier: Apache-2.0
"""Negative numbers in node sets: ``n[-5-3]``.

The name ``n-5`` is a text with a hyphen and the number 5, however it came about: `unsigned` makes it so, so that each
name has one place, is in a set once, and equals itself. That a set was written with negative numbers is kept beside
its patterns, as *signs*, and only matters where it is shown, or gone through: `signed` puts the numbers back.

A text has the signs of its brackets only: ``n[-5-3]`` has one, ``n-5`` has none. Where one that matters would be lost
by that (`is_lost`), single numbers have brackets as well, ``n[-5]``, so that the text is read as what was shown.

Runs in any thread; pure functions, nothing to guard.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import islice
from typing import TypeAlias

from ctask.nodes.order import in_order, products
from ctask.nodes.ranges import padded_spans
from ctask.nodes.space import EMPTY, Axis, Budget, Patterns, Space, Span, Template, box, coalesce, code, merge, pieces

__all__ = ["NO_SIGNS", "Signs", "in_pattern", "is_lost", "signed", "unsigned", "without_signs"]

#: (template, dimension) of the numbers that are to be shown with their sign
Signs: TypeAlias = frozenset[tuple[Template, int]]
NO_SIGNS: Signs = frozenset()


def unsigned(template: Template, space: Space) -> tuple[Patterns, Signs]:
    """Return a pattern as patterns without negative numbers, and the signs that it had."""
    patterns = {template: space}
    signs = set()
    for k in range(len(template) - 1):
        for key, whole in list(patterns.items()):
            negative, rest = _divided(whole, k, _turned)
            if negative:
                signs.add((key, k))
                patterns.pop(key)
                patterns.update({_hyphened(key, k): negative, **({key: rest} if rest else {})})
    return patterns, frozenset(signs)


def signed(patterns: Patterns, signs: Signs) -> Patterns:
    """Return patterns with the signs that they are to be shown with."""
    shown = dict(patterns)
    # the last dimension first, as signs are found from the first one on
    for template, k in sorted(signs, key=lambda sign: -sign[1]):
        whole = shown.get(_hyphened(template, k), EMPTY)
        moved, rest = _divided(whole, k, _returned)
        if moved:
            shown[template] = merge(shown.get(template, EMPTY), moved, ",", Budget())
            shown.pop(_hyphened(template, k))
            shown.update({_hyphened(template, k): rest} if rest else {})
    return shown


def without_signs(patterns: Patterns) -> Patterns:
    """Return shown patterns as they are kept."""
    found: Patterns = {}
    for template, space in patterns.items():
        for key, part in unsigned(template, space)[0].items():
            found[key] = merge(found.get(key, EMPTY), part, ",", Budget())
    return found


def in_pattern(template: Template, codes: Sequence[int], among: Template) -> list[int] | None:
    """Return the codes of a name as they would stand in a shown pattern, or None where it cannot be in it."""
    if len(template) != len(among):
        return None
    found = []
    for k, number in enumerate(codes):
        if template[k] == among[k]:
            found.append(number)
        elif template[k] == among[k] + "-":
            [moved, _] = _returned(((number, number),))
            if not moved:
                return None
            found.append(moved[0][0])
        else:
            return None
    return found if template[-1] == among[-1] else None


def is_lost(patterns: Patterns, shown: Patterns) -> bool:
    """Return whether patterns are shown as another text, or in another order, once read from text without ``[-5]``."""
    again = signed(patterns, _signs_of_text(shown))
    return again != shown and _written(again) != _written(shown)


def _signs_of_text(shown: Patterns) -> Signs:
    """Return the signs that are read from shown patterns where single numbers stand without brackets."""
    signs: set[tuple[Template, int]] = set()
    for template, space in shown.items():
        for axes in products(space):
            # as `unsigned` finds them: from the first dimension on, with what the ones before it turn into
            keys = [_as_text(template, axes)]
            for k, axis in enumerate(axes):
                if axis[0][0] < 0 and not _is_single(axis):
                    signs.update((key, k) for key in keys)
                    keys = [_hyphened(key, k) for key in keys] + (keys if axis[-1][1] >= 0 else [])
    return frozenset(signs)


def _written(shown: Patterns) -> list[tuple[Template, Space]]:
    """Return patterns in order, those of one product as they are read: where it is equal, text and order of names are.

    A pattern of several products stays whole: their names may come by turns.
    """
    found = []
    for template in in_order(shown):
        [axes, *more] = islice(products(shown[template]), 2)
        key = template if more else _as_text(template, axes)
        if key != template:
            turned = [coalesce(_turned(axis)[0]) if _is_negative(axis) else axis for axis in axes]
            found.append((key, box(turned)))
        else:
            found.append((template, shown[template]))
    return found


def _as_text(template: Template, axes: Sequence[Axis]) -> Template:
    """Return the template that a product is read with: ``n-5`` is the text ``n-`` with 5."""
    for k, axis in enumerate(axes):
        if _is_negative(axis):
            template = _hyphened(template, k)
    return template


def _is_negative(axis: Axis) -> bool:
    """Whether an axis is a single negative number, which has no bracket around it."""
    return axis[0][0] < 0 and _is_single(axis)


def _is_single(axis: Axis) -> bool:
    return len(axis) == 1 and axis[0][0] == axis[0][1]


def _hyphened(template: Template, k: int) -> Template:
    return (*template[:k], template[k] + "-", *template[k + 1 :])


def _divided(space: Space, k: int, divide: Callable[[Axis], tuple[list[Span], list[Span]]]) -> tuple[Space, Space]:
    """Divide a space by the numbers of one dimension."""
    found: tuple[defaultdict[Space, list[Span]], ...] = (defaultdict(list), defaultdict(list))
    for axis, sub in space:
        if k == 0:
            for side, spans in zip(found, divide(axis), strict=True):
                side[sub] += spans
        else:
            for side, part in zip(found, _divided(sub, k - 1, divide), strict=True):
                if part:
                    side[part] += axis
    one, other = (
        tuple(sorted((coalesce(spans), sub) for sub, spans in side.items() if spans)) for side in found
    )
    return one, other


def _turned(axis: Axis) -> tuple[list[Span], list[Span]]:
    """Return the negative numbers, without their sign, and the others."""
    moved, rest = [], []
    for low, high in axis:
        if low < 0:
            moved += padded_spans(-min(high, -1), -low, 1)
        if high >= 0:
            rest.append((max(low, 0), high))
    return moved, rest


def _returned(axis: Axis) -> tuple[list[Span], list[Span]]:
    """Return what may stand behind a sign, with it, and the others: 0 and what is padded."""
    moved, rest = [], []
    for span in axis:
        for width, low, high in pieces(*span):
            least = max(low, 10 ** (width - 1))
            if least <= high:
                moved.append((-high, -least))
            if low < least:
                rest.append((code(str(low).zfill(width)), code(str(min(high, least - 1)).zfill(width))))
    return moved, rest
