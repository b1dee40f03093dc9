# SPDX-License-Identifier: Apache-2.0
"""Words of a command line: options from a table, glued, bundled or apart, each with its value.

Pure functions, in the main thread.
"""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ctask.errors import OptionError

__all__ = ["Option", "Table"]

#: Columns of a help text.
_WIDTH = 110


@dataclass(frozen=True, slots=True)
class Option:
    """One option, as it is typed and as `--help` tells it; a switch has no value."""

    name: str
    value: str
    text: str


class Table:
    """The options of a command.

    Args:
        options: in the order in which they are told.
        spellings: other names of some of them.
        help_by: what lists them, for errors.
    """

    def __init__(self, options: Sequence[Option], spellings: Mapping[str, str], help_by: str) -> None:
        self._options = options
        self._spellings = spellings
        self._help_by = help_by
        self._known = {option.name: option for option in options}

    def take(self, word: str, rest: list[str]) -> list[tuple[str, str]]:
        """Return the options of one word, with their values; a value that stands apart is taken from `rest`.

        Understood are `--name`, `--name value`, `--name=value`, `-b`, `-bS`, `-w value` and `-wvalue`.

        Raises:
            OptionError: no such option, one without its value, or a switch with one.
        """
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            option = self._option(name)
            if equals and not option.value:
                raise OptionError(f"{name} takes no value")
            return [(option.name, value if equals else self._value(option, rest))]
        found: list[tuple[str, str]] = []
        letters = word[1:]
        while letters:
            option = self._option(f"-{letters[0]}")
            letters = letters[1:]
            if option.value and letters:
                return [*found, (option.name, letters)]
            found.append((option.name, self._value(option, rest)))
        return found

    def valued(self, name: str) -> bool:
        """Return whether an option of the table has a value."""
        return bool(self._known[name].value)

    def told(self) -> str:
        """Return the lines of a help text."""
        width = max(len(f"{option.name} {option.value}") for option in self._options) + 4
        lines = []
        for option in self._options:
            first = f"  {option.name} {option.value}".ljust(width)
            lines.append(textwrap.fill(option.text, _WIDTH, initial_indent=first, subsequent_indent=" " * width))
        return "\n".join(lines) + "\n"

    def _option(self, name: str) -> Option:
        option = self._known.get(self._spellings.get(name, name))
        if option is None:
            names = [*self._known, *self._spellings]
            near = difflib.get_close_matches(name, names, 1) if name.startswith("--") else []
            hint = f"did you mean {near[0]}?" if near else f"{self._help_by} lists them"
            raise OptionError(f"no such option: {name}; {hint}")
        return option

    def _value(self, option: Option, rest: list[str]) -> str:
        if not option.value:
            return ""
        if not rest:
            raise OptionError(f"{option.name} takes a value: {option.name} {option.value}")
        return rest.pop(0)
