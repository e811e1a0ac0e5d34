r"""Patterns on the names of modules and parameters: which layers `quantize_` means.

    "lm_head"             a module of this name, wherever it is, and all that is in it
    "layers.0"            so with several names in a row
    "*mlp*"               a glob over the whole name, or over names in a row
    r"regex:\.(q|k)_proj$"  an expression that is searched in the whole name

A pattern that matches nothing is an error: a run whose exception silently was none is lost.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from bnbx.errors import OptionError

REGEX = "regex:"
_SHOWN = 5  # names in a message


@dataclass(frozen=True)
class Pattern:
    """One pattern, compiled.

    Attributes:
        origin: where it was given: "skip['lm_head']".
        text: as it was given.
        expression: matches a whole name, or is searched in it.
        searched: whether it is searched.
    """

    origin: str
    text: str
    expression: re.Pattern[str]
    searched: bool

    def matches(self, name: str) -> bool:
        """Whether a name, or a run of the names that it is made of, matches."""
        if self.searched:
            return self.expression.search(name) is not None
        if self.expression.match(name):
            return True
        parts = name.split(".")
        runs = range(1, len(parts))
        return any(
            self.expression.match(".".join(parts[start : start + length]))
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
                f"{self.origin} matches none of the {len(names)} {what}; {_near(self.text, names)}"
            )


def compile_pattern(argument: str, text: Any) -> Pattern:
    """A pattern that was given in an argument.

    Raises:
        OptionError: it is none.
    """
    origin = f"{argument}[{text!r}]"
    if not isinstance(text, str) or not text.removeprefix(REGEX):
        raise OptionError(f"{origin}: expected a glob over names such as '*mlp*', or '{REGEX}...'")
    if not text.startswith(REGEX):
        return Pattern(origin, text, re.compile(fnmatch.translate(text)), searched=False)
    source = text.removeprefix(REGEX)
    try:
        return Pattern(origin, text, re.compile(source), searched=True)
    except (re.error, RecursionError, OverflowError) as error:
        raise OptionError(f"{origin} is no regular expression: {error}") from None


def compile_patterns(argument: str, texts: Any) -> list[Pattern]:
    """Patterns from a list of them.

    Raises:
        OptionError: it is no list of patterns.
    """
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise OptionError(f"{argument}={texts!r}; expected a list of patterns, ['lm_head']")
    return [compile_pattern(argument, text) for text in texts]


def _near(text: str, names: list[str]) -> str:
    """The names that a pattern was probably meant for, in words."""
    if not names:
        return "there are none"
    parts = re.findall(r"[A-Za-z0-9_]{2,}", re.sub(r"\\[A-Za-z]", "", text.removeprefix(REGEX)))
    scores = {name: _likeness(parts, name) for name in names}
    best = max(scores.values())
    near = [name for name, score in scores.items() if best >= 0.6 and score >= best - 0.05]
    return f"the nearest: {some(near)}" if near else f"there are: {some(names)}"


def _likeness(parts: list[str], name: str) -> float:
    """How well the words of a pattern are found among those of a name, 0 to 1."""
    words = re.findall(r"[A-Za-z0-9_]+", name.lower())
    if not parts or not words:
        return 0.0
    best = [
        max(difflib.SequenceMatcher(None, part.lower(), word).ratio() for word in words)
        for part in parts
    ]
    return sum(best) / len(best)


def some(names: list[str]) -> str:
    """A few names, and how many more there are."""
    more = f", ... ({len(names) - _SHOWN} more)" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more
