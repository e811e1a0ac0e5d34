"""Patterns on names: globs, and expressions after "regex:"; and what one was probably meant for."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable

from bnbx.errors import OptionError

REGEX = "regex:"
_SHOWN = 5  # names in a message


def is_pattern(text: object) -> bool:
    """Whether it is a text with something in it."""
    return isinstance(text, str) and bool(text.removeprefix(REGEX))


def expression_of(text: str, origin: str) -> re.Pattern[str]:
    r"""What to search a name with: for a glob, an expression that only finds a whole name.

    Args:
        text: a glob, or "regex:" and an expression.
        origin: where it was given, for messages: r"overrides['regex:\.bias$']".

    Raises:
        OptionError: it is no regular expression.
    """
    if not text.startswith(REGEX):
        return re.compile(r"\A" + fnmatch.translate(text))  # which anchors only the end
    source = text.removeprefix(REGEX)
    try:
        return re.compile(source)
    except re.error as error:
        position = "" if error.pos is None else f"\n  {source}\n  {' ' * error.pos}^"
        raise OptionError(
            f"{origin} is no regular expression: {error.msg}{position}\n"
            "a plain glob needs no prefix: '*.bias'"
        ) from None
    except (RecursionError, OverflowError) as error:
        raise OptionError(f"{origin} is too large a regular expression: {error}") from None


def near(text: str, names: Iterable[str]) -> str:
    """The names that a pattern which matches none of them was probably meant for, in words."""
    parts = re.findall(r"[A-Za-z0-9_]{2,}", re.sub(r"\\[A-Za-z]", "", text.removeprefix(REGEX)))
    scores = {name: _likeness(parts, name) for name in dict.fromkeys(names)}
    best = max(scores.values(), default=0.0)
    if best >= 0.6:
        return f"the nearest: {some(n for n, score in scores.items() if score >= best - 0.05)}"
    return f"there are: {some(scores) or '(none)'}"


def some(names: Iterable[str]) -> str:
    """A few names, and how many more there are."""
    every = list(names)
    more = f", ... ({len(every) - _SHOWN} more)" if len(every) > _SHOWN else ""
    return ", ".join(map(repr, every[:_SHOWN])) + more


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
