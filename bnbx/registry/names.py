"""Did-you-mean: the nearest known name, for every error about an unknown one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"`, or an empty string if nothing known is near."""
    matches = difflib.get_close_matches(str(name).lower(), list(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` is almost certainly a misspelling of, if there is one."""
    matches = difflib.get_close_matches(str(name).lower(), list(known), n=1, cutoff=0.75)
    return matches[0] if matches else None
