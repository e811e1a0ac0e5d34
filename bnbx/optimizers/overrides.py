r"""Overrides by parameter name: `create(..., model.named_parameters(), overrides={...})`.

    overrides={"*embed*": {"bits": 32}, r"regex:\.bias$": {"weight_decay": 0.0}}

A key is a glob over the whole name, or "regex:" and an expression that is searched in it. Of
patterns that match one name the later wins, argument by argument. A pattern that matches nothing is
an error: a run whose override silently did nothing is lost. Names of parameters reach groups here
too, since torch takes them apart itself only since 2.6.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from bnbx.errors import OptionError
from bnbx.registry.config import Layer
from bnbx.registry.options import unaliased
from bnbx.registry.patterns import REGEX, expression_of, is_pattern, near

NAMES = "param_names"
"""Key of a group's names, as in torch 2.6 and later."""

_HOW = "pass model.named_parameters() instead of model.parameters()"


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
                    f"{near(pattern.text, names)}"
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
    if not is_pattern(text):
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
    return _Pattern(text, expression_of(text, origin), (origin, values))


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
