"""The engine's options, beside a rule's hyperparameters: their defaults, values and other names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bnbx.errors import OptionError

if TYPE_CHECKING:
    from bnbx.registry.optimizer import Optimizer

CLIP = "max_unorm"  # by which some rules call a hyperparameter of their own
MASTERS = ("none", "stochastic", "kahan", "residual")


@dataclass(frozen=True)
class Option:
    """A default, and a check that returns whether a value is allowed, with words for the error."""

    default: Any
    allowed: Callable[[Any], bool]
    words: str


def _whole(value: Any, low: int, high: float) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e38


def _switch(value: Any) -> bool:
    return isinstance(value, bool)


# `bits` and `state_types` are checked where they are resolved, against the catalog of quant types.
TABLE: Mapping[str, Option] = {
    "bits": Option(8, lambda value: True, ""),
    "state_types": Option(None, lambda value: True, ""),
    "min_8bit_size": Option(4096, lambda v: _whole(v, 0, float("inf")), "a whole number >= 0"),
    "block_wise": Option(True, _switch, "True or False"),
    "percentile_clipping": Option(100, lambda v: _whole(v, 1, 100), "a whole number, 1 to 100"),
    "skip_zeros": Option(False, _switch, "True or False"),
    CLIP: Option(0.0, _number, "a number >= 0"),
    "master": Option("none", lambda v: v in MASTERS, f"one of {', '.join(MASTERS)}"),
    "maximize": Option(False, _switch, "True or False"),
    "paged": Option(False, lambda v: _switch(v) or v == "managed", "True, False or 'managed'"),
}
OPTIONS: Mapping[str, Any] = {name: option.default for name, option in TABLE.items()}
# What the libraries that users come from call them.
ALIASES: Mapping[str, str] = {"optim_bits": "bits", "is_paged": "paged"}


def options_of(spec: Optimizer) -> dict[str, Any]:
    """The options that apply to a rule, with their defaults: its own max_unorm is none of them."""
    return {name: value for name, value in OPTIONS.items() if name not in spec.hyper}


def check_option(name: str, value: Any) -> Any:
    """Return `value`.

    Raises:
        OptionError: it cannot be the value of option `name`.
    """
    option = TABLE[name]
    if not option.allowed(value):
        raise OptionError(f"{name}={value!r}: expected {option.words}")
    return value


def unaliased(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values by our names.

    Raises:
        OptionError: a value is given by both names.
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        own = ALIASES.get(name, name)
        if own in found:
            raise OptionError(f"{own} is given twice, as {own!r} and by its other name")
        found[own] = value
    return found
