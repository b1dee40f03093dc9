# SPDX-License-Identifier: Apache-2.0
"""What befalls the connections of a fault proxy by chance: a seeded mixture of toxics, and a record of what struck.

A `Mixture` is frozen and draws from nothing but its arguments. A `Passage` is written by its proxy's thread and may
be read by others.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from ctask_tests.proxy_lanes import After, AtBytes, Delay, Fin, Rst, Rule, Slice, Stall, Throttle, When, Xor

__all__ = ["GENTLE", "TOXICS", "Fate", "Mixture", "Passage"]

_WAYS: tuple[Literal["up", "down"], ...] = ("up", "down")


@dataclass(frozen=True, slots=True)
class Fate:
    """What was drawn for one connection: the toxic's name, and its rules."""

    name: str
    rules: tuple[Rule, ...] = ()


@dataclass(slots=True)
class Passage:
    """One accepted connection of a proxy.

    Attributes:
        address: where it was accepted.
        number: how many this address had accepted before it.
        fate: what the mixture drew for it; "none" without a mixture.
        struck: a rule has acted. False: nothing was done to any byte of it.
    """

    address: str
    number: int
    fate: Fate
    struck: bool = False


@dataclass(frozen=True)
class Mixture:
    """Let each connection draw its own fate, by its address and its number there, whatever the order of all.

    Args:
        seed: the same one draws the same fates.
        weights: toxic (a key of `TOXICS`) -> how often, in proportion.
        span: toxics strike at a byte from 1 to this; small numbers as often as large ones (a handshake is about 4 KB).
        seconds: or at a time up to this one.
    """

    seed: int
    weights: Mapping[str, float]
    span: int = 32_768
    seconds: float = 1.0

    def fate(self, address: str, number: int) -> Fate:
        """Draw for the `number`-th connection (from 0) to `address`."""
        dice = random.Random(f"{self.seed}/{address}/{number}")
        names = sorted(self.weights)
        name = dice.choices(names, [self.weights[name] for name in names])[0]
        return Fate(name, TOXICS[name](dice, self))


def _byte(dice: random.Random, mixture: Mixture) -> AtBytes:
    return AtBytes(round(math.exp(dice.uniform(0.0, math.log(mixture.span)))))


def _sometime(dice: random.Random, mixture: Mixture) -> When:
    return dice.choice((_byte(dice, mixture), After(dice.uniform(0.0, mixture.seconds))))


def _nothing(dice: random.Random, mixture: Mixture) -> tuple[Rule, ...]:
    return ()


def _far(dice: random.Random, mixture: Mixture) -> tuple[Rule, ...]:
    do = Delay(dice.uniform(0.0, 0.03), jitter=dice.uniform(0.0, 0.02))
    return tuple(Rule(way, AtBytes(0), do) for way in _WAYS)


def _narrow(dice: random.Random, mixture: Mixture) -> tuple[Rule, ...]:
    return tuple(Rule(way, AtBytes(0), Throttle(dice.uniform(50_000, 1_000_000))) for way in _WAYS)


def _sliced(dice: random.Random, mixture: Mixture) -> tuple[Rule, ...]:
    return tuple(Rule(way, AtBytes(0), Slice(dice.randint(16, 512))) for way in _WAYS)


def _reset(dice: random.Random, mixture: Mixture) -> tuple[Rule, ...]:
    return (Rule(dice.choice(_WAYS), _sometime(dice, mixture), Rst()),)


def _ended(dice: random.Random, mixture: Mixture) -> tuple[Rule, ...]:
    return (Rule(dice.choice(_WAYS), _sometime(dice, mixture), Fin()),)


def _stalled(dice: random.Random, mixture: Mixture) -> tuple[Rule, ...]:
    return (Rule(dice.choice(_WAYS), _sometime(dice, mixture), Stall()),)


def _corrupted(dice: random.Random, mixture: Mixture) -> tuple[Rule, ...]:
    return (Rule(dice.choice(_WAYS), _byte(dice, mixture), Xor()),)


#: The toxics that a mixture knows by name.
TOXICS: Mapping[str, Callable[[random.Random, Mixture], tuple[Rule, ...]]] = MappingProxyType(
    {
        "none": _nothing,
        "delay": _far,
        "throttle": _narrow,
        "slice": _sliced,
        "rst": _reset,
        "fin": _ended,
        "stall": _stalled,
        "corrupt": _corrupted,
    }
)
#: Those of them that harm nobody: a command behind one ends as if there were none.
GENTLE = frozenset({"none", "delay", "throttle", "slice"})
