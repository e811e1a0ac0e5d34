r"""Patterns on the names of modules and parameters: which layers `quantize_` means.

    "lm_head"             a module of this name, wherever it is, and all that is in it
    "layers.0"            so with several names in a row
    "*mlp*"               a glob over the whole name, or over names in a row
    r"regex:\.(q|k)_proj$"  an expression that is searched in the whole name

A pattern that matches nothing is an error: a run whose exception silently was none is lost.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from bnbx.errors import OptionError
from bnbx.registry.patterns import REGEX, expression_of, is_pattern, near


@dataclass(frozen=True)
class Pattern:
    """One pattern, compiled.

    Attributes:
        origin: where it was given: "skip['lm_head']".
        text: as it was given.
        expression: is searched in a name; one of a glob only finds a whole name.
        searched: whether it is a regular expression.
    """

    origin: str
    text: str
    expression: re.Pattern[str]
    searched: bool

    def matches(self, name: str) -> bool:
        """Whether a name, or a run of the names that it is made of, matches."""
        if self.searched or self.expression.search(name):
            return self.expression.search(name) is not None
        parts = name.split(".")
        runs = range(1, len(parts))
        return any(
            self.expression.search(".".join(parts[start : start + length]))
            for length in runs
            for start in range(len(parts) - length + 1)
        )

    def check_used(self, names: Iterable[str], what: str, others: Iterable[str] = ()) -> None:
        """Raise OptionError if it matches none of these names, which are those of `what`.

        `others` may be matched too, but are not shown.
        """
        names = list(dict.fromkeys(names))
        if not any(map(self.matches, [*names, *others])):
            raise OptionError(
                f"{self.origin} matches none of the {len(names)} {what}; {near(self.text, names)}"
            )


def compile_pattern(argument: str, text: Any) -> Pattern:
    """A pattern that was given in an argument.

    Raises:
        OptionError: it is none.
    """
    origin = f"{argument}[{text!r}]"
    if not is_pattern(text):
        raise OptionError(f"{origin}: expected a glob over names such as '*mlp*', or '{REGEX}...'")
    return Pattern(origin, text, expression_of(text, origin), text.startswith(REGEX))


def compile_patterns(argument: str, texts: Any) -> list[Pattern]:
    """Patterns from a list of them.

    Raises:
        OptionError: it is no list of patterns.
    """
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise OptionError(f"{argument}={texts!r}; expected a list of patterns, ['lm_head']")
    return [compile_pattern(argument, text) for text in texts]
