"""Did-you-mean: the nearest known name, for every error about an unknown one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONG = 6  # letters, from which two of them may be wrong in a name that is meant


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"`, or an empty string if nothing known is near."""
    matches = difflib.get_close_matches(str(name).lower(), list(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` is almost certainly a misspelling of, if there is one.

    A name with a known one as a word among others, such as "no_weight_decay", is one of its own.
    """
    text = str(name).lower()
    matches = difflib.get_close_matches(text, list(known), cutoff=0.75)
    return next((match for match in matches if _is_slip(text, match)), None)


def _is_slip(text: str, known: str) -> bool:
    """Whether a slip of the hand, or two in a longer name, made `text` of `known`."""
    more_words = f"_{known}_" in f"_{text}_" and text.strip("_") != known
    return not more_words and _slips(text, known) <= (1 if len(known) < LONG else 2)


def _slips(a: str, b: str) -> int:
    """How many letters to insert, leave out, replace, or exchange with their neighbor."""
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, last, row = row, before, [i]
        for j, y in enumerate(b, 1):
            found = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y))
            if last and j > 1 and (x, a[i - 2]) == (b[j - 2], y):
                found = min(found, last[j - 2] + 1)
            row.append(found)
    return row[-1]
