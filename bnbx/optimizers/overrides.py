r"""Overrides by parameter name: `create(..., model.named_parameters(), overrides={...})`.

    overrides={"*embed*": {"bits": 32}, r"regex:\.bias$": {"weight_decay": 0.0}}

A key is a glob over the whole name, or "regex:" and an expression that is searched in it. Of
patterns that match one name the later wins, argument by argument. A pattern that matches nothing is
an error: a run whose override silently did nothing is lost. Names of parameters reach groups here
too, since torch takes them apart itself only since 2.6.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from bnbx.errors import OptionError
from bnbx.registry.config import Layer
from bnbx.registry.options import unaliased

REGEX = "regex:"
NAMES = "param_names"
"""Key of a group's names, as in torch 2.6 and later."""

_HOW = "pass model.named_parameters() instead of model.parameters()"
_SHOWN = 5  # names in a message


@dataclass(frozen=True)
class _Pattern:
    text: str
    expression: re.Pattern[str]
    layer: Layer

    def matches(self, name: str) -> bool:
        return self.expression.search(name) is not None


@dataclass(frozen=True)
class NamePatterns:
    """Compiled overrides; see `compile_overrides`. Pickles, and compares by its patterns."""

    patterns: tuple[_Pattern, ...] = ()
    _found: dict[str, tuple[Layer, ...]] = field(default_factory=dict, compare=False, repr=False)

    def __bool__(self) -> bool:
        return bool(self.patterns)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers, for checks before there are names."""
        return tuple(pattern.layer for pattern in self.patterns)

    def layers_for(self, name: str) -> tuple[Layer, ...]:
        """The layers of the patterns that match `name`, in their order, for `resolve`."""
        found = self._found.get(name)
        if found is None:
            found = tuple(p.layer for p in self.patterns if p.matches(name))
            self._found[name] = found
        return found

    def check_all_used(self, names: Iterable[str]) -> None:
        """Raise OptionError for the patterns that match none of an optimizer's `names`."""
        names = list(names)
        for pattern in self.patterns:
            if not any(map(pattern.matches, names)):
                raise OptionError(
                    f"{pattern.layer[0]} matches none of the {len(names)} parameters; "
                    f"{_near(pattern.text, names)}"
                )

    def check_named(self, groups: Iterable[Mapping[str, Any]]) -> None:
        """Raise OptionError if a group of parameters has no names to match."""
        if not self:
            return
        for number, group in enumerate(groups):
            if group["params"] and names_of(group) is None:
                raise OptionError(
                    f"overrides={[p.text for p in self.patterns]} match names, but the parameters "
                    f"of group {number} have none: {_HOW}"
                )


def compile_overrides(overrides: Mapping[str, Mapping[str, Any]] | None) -> NamePatterns:
    """Check and compile {pattern: {argument: value}}; None is no overrides.

    Keys and values of the inner mappings are checked by `resolve`, where a rule is known.

    Raises:
        OptionError: no such mapping, or an expression that is none.
    """
    if overrides is None:
        return NamePatterns()
    if not isinstance(overrides, Mapping):
        raise OptionError(f"overrides={overrides!r}: expected {{'*embed*': {{'bits': 32}}}}")
    return NamePatterns(tuple(_compile(text, given) for text, given in overrides.items()))


def _compile(text: Any, given: Any) -> _Pattern:
    if not isinstance(text, str) or not text.removeprefix(REGEX):
        raise OptionError(
            f"overrides: the key {text!r} is no pattern; expected a glob over names such as "
            f"'*embed*', or '{REGEX}' and an expression"
        )
    origin = f"overrides[{text!r}]"
    if not isinstance(given, Mapping) or not given:
        raise OptionError(f"{origin}: {given!r}; expected arguments by name, {{'bits': 32}}")
    for key in given:
        if not isinstance(key, str):
            raise OptionError(f"{origin}: the key {key!r} is no argument's name; expected a string")
    values = {k: dict(v) if isinstance(v, Mapping) else v for k, v in unaliased(given).items()}
    return _Pattern(text, _expression(text, origin), (origin, values))


def _expression(text: str, origin: str) -> re.Pattern[str]:
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


def _near(text: str, names: list[str]) -> str:
    """The names that a pattern was probably meant for, in words."""
    parts = re.findall(r"[A-Za-z0-9_]{2,}", re.sub(r"\\[A-Za-z]", "", text.removeprefix(REGEX)))
    scores = {name: _likeness(parts, name) for name in dict.fromkeys(names)}
    best = max(scores.values(), default=0.0)
    if best >= 0.6:
        near = [name for name, score in scores.items() if score >= best - 0.05]
        return f"the nearest: {_some(near)}"
    return f"there are: {_some(list(scores)) or '(none)'}"


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


def _some(names: list[str]) -> str:
    more = f", ... ({len(names) - _SHOWN} more)" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more


def names_of(group: Mapping[str, Any]) -> list[str] | None:
    """The names of a group's parameters, in their order; None if it has none."""
    names = group.get(NAMES)
    if names is None or len(names) != len(group["params"]):
        return None
    return list(names)


def split_names(group: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a group with `(name, tensor)` pairs taken apart: torch before 2.6 refuses them.

    The names go to `group["param_names"]`, where torch 2.6 puts them, so that what follows (a state
    dict, say) is the same with every torch. A group without pairs comes back as it is.

    Raises:
        OptionError: some parameters have names and some have none.
    """
    params = group.get("params")
    if params is None or isinstance(params, (Tensor, set, str)):
        return dict(group)  # torch says what is wrong
    try:
        params = list(params)
    except TypeError:
        return dict(group)
    pairs = [item for item in params if isinstance(item, tuple) and len(item) == 2]
    if not pairs:
        return {**group, "params": params}
    if len(pairs) < len(params):
        raise OptionError(
            f"{len(pairs)} of the {len(params)} parameters of a group have names; {_HOW}"
        )
    for name, _ in pairs:
        if not isinstance(name, str):
            raise OptionError(f"a parameter has the name {name!r}; expected a string; {_HOW}")
    return {**group, "params": [p for _, p in pairs], NAMES: [name for name, _ in pairs]}
