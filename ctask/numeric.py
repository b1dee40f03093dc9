# SPDX-License-Identifier: Apache-2.0
"""Numbers as users give them: times, counts and exit statuses, checked where they come in.

Pure functions; they run in the thread that calls ctask. What leaves them can be added to a clock and handed to a lock
or a queue: nothing overflows later, in a thread of ours.
"""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Iterable
from typing import Any

from ctask.errors import OptionError

__all__ = ["LONGEST", "MOST_STATUS", "duration", "limit", "patience", "shown", "statuses", "whole"]

#: Seconds, 31 years: a longer limit is none, and a longer time counts as this one.
LONGEST = 1e9
#: The largest exit status: SSH carries 32 bits (RFC 4254 6.10), and some nodes use them.
MOST_STATUS = 2**32 - 1


def limit(name: str, value: object) -> float | None:
    """Return a time limit; None, 0 and infinity are none.

    Raises:
        OptionError: negative, NaN, a bool, or no number at all.
    """
    seconds = _limited(name, value)
    return None if seconds == 0 else seconds


def patience(name: str, value: object, *, past: bool = False) -> float | None:
    """Return how long a call waits: 0 only looks; None and infinity wait as long as it takes.

    Args:
        past: a negative number only looks as well, as everywhere in the standard library.

    Raises:
        OptionError: negative without `past`, NaN, a bool, or no number at all.
    """
    if past and (seconds := _real(value)) is not None and seconds < 0:
        return 0.0
    return _limited(name, value)


def duration(name: str, value: object) -> float:
    """Return a time that is no limit: 0 means at once.

    Raises:
        OptionError: negative, NaN, infinite, a bool, or no number at all.
    """
    seconds = _real(value)
    if seconds is None or not 0 <= seconds < math.inf:
        raise OptionError(f"{name} is a number of seconds, 0 or more, not {shown(value)}")
    return min(seconds, LONGEST)


def whole(name: str, value: object, least: int, most: int | None = None) -> int:
    """Return a whole number; without `most`, one beyond what a machine can count is the largest that it can.

    Raises:
        OptionError: out of range, a bool, or no whole number.
    """
    found = int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else None
    if found is None or found < least or (most is not None and found > most):
        span = f"{least} to {most}" if most is not None else f"{least} or more"
        raise OptionError(f"{name} is a whole number, {span}, not {shown(value)}")
    return min(found, sys.maxsize) if most is None else found


def statuses(name: str, value: object) -> frozenset[int]:
    """Return a set of exit statuses, given as one or several.

    Raises:
        OptionError: not a status among them.
    """
    items = [value] if isinstance(value, numbers.Integral) else value
    if not isinstance(items, Iterable) or isinstance(items, (str, bytes, bytearray)):
        raise OptionError(f"{name} is an exit status or a set of them, 0 to {MOST_STATUS}, not {shown(value)}")
    return frozenset(whole(f"{name}: an exit status", item, 0, MOST_STATUS) for item in items)


def shown(value: object) -> str:
    """Return the `repr` of a value for a message, which thousands of digits are not to fill."""
    try:
        text = repr(value)
    except ValueError:  # more digits than Python writes
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)"


def _limited(name: str, value: object) -> float | None:
    if value is None:
        return None
    seconds = _real(value)
    if seconds is None:
        raise OptionError(f"{name} is a number of seconds or None, not {shown(value)}")
    if not seconds >= 0:  # NaN is not either
        raise OptionError(f"{name} cannot be {shown(value)}: say a number of seconds, or None for no limit")
    return None if seconds > LONGEST else abs(seconds)  # no -0


def _real(value: object) -> float | None:
    """Return a number as the nearest float, which is 0 or infinite only where it is; None: it is not real."""
    if isinstance(value, bool) or not isinstance(value, numbers.Number):
        return None
    number: Any = value
    try:
        found = float(number)
        return math.copysign(sys.float_info.min, number) if found == 0 and number != 0 else found
    except OverflowError:
        return sys.float_info.max if number > 0 else -sys.float_info.max
    except (TypeError, ValueError):  # complex; a signalling NaN
        return None
