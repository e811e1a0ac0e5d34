"""Resolves what a user asked for into what the engine does: a pure function over the registry.

Values come in layers (spec defaults, then the constructor's arguments, then a parameter group,
then overrides); a later layer wins, and every resolved value remembers the layer it came from.
Nothing is allocated before everything has been resolved.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from bnbx.errors import OptionError, UnknownNameError
from bnbx.registry.catalog import Catalog
from bnbx.registry.evaluate import HOST, evaluate
from bnbx.registry.names import nearest
from bnbx.registry.optimizer import UPDATE, Optimizer, State
from bnbx.registry.options import CLIP, OPTIONS, check_option, options_of
from bnbx.registry.quant_type import FLOAT32, QuantType
from bnbx.registry.rule import parse_condition

Layer = tuple[str, Mapping[str, Any]]
DEFAULT, ARGUMENT = "default", "argument"
_SHOWN = re.compile(r"(?<![\w.])(\w+)=")  # arguments that a message shows with their values


@dataclass(frozen=True)
class Resolved:
    """What a parameter gets.

    Attributes:
        hyper: value by hyperparameter, packs unpacked.
        switches: truth of the hyperparameters that are compiled in.
        state_types: quant type name by state, "float32" for none.
        options: value by option; see `bnbx.registry.options`.
        clip: whether the rule runs in its clipped form.
        origins: the layer that each argument's value came from.
    """

    hyper: Mapping[str, float | bool]
    switches: Mapping[str, bool]
    state_types: Mapping[str, str]
    options: Mapping[str, Any]
    clip: bool
    origins: Mapping[str, str]

    @property
    def min_8bit_size(self) -> int:
        """Tensors with fewer elements keep their states in float32."""
        return int(self.options["min_8bit_size"])

    def active(self, state: State) -> bool:
        """Whether the state exists with these hyperparameters."""
        return state.when is None or self.switches[state.when]

    @cached_property
    def kernel_key(self) -> tuple[Any, ...]:
        """The part of it that decides how states are stored and kernels compiled.

        Equal ones are one object, so that a step can compare them by `is`.
        """
        chosen = ("min_8bit_size", "block_wise", "skip_zeros", "master")
        options = tuple((name, self.options[name]) for name in chosen)
        switches, types = tuple(self.switches.items()), tuple(self.state_types.items())
        return _shared((switches, types, options, self.clip))


@lru_cache(maxsize=1024)
def _shared(key: tuple[Any, ...]) -> tuple[Any, ...]:
    return key


def resolve(spec: Optimizer, types: Catalog[QuantType], layers: Sequence[Layer]) -> Resolved:
    """Merge `layers` over the defaults of `spec` and check every value.

    Raises:
        UnknownNameError: a key that is no argument, or a quant type or state that is not there.
        OptionError: a value out of range, or a required one missing.
    """
    values = {**options_of(spec), **{a: spec.default(a) for a in spec.arguments}}
    origins = dict.fromkeys(values, DEFAULT)
    for origin, layer in layers:
        check_known(spec, layer, origin)
        values.update(layer)
        origins.update(dict.fromkeys(layer, origin))
    try:
        return _resolved(spec, types, values, origins)
    except OptionError as error:
        members = {member: pack for pack, each in spec.packs.items() for member in each}
        shown = set(_SHOWN.findall(str(error)))
        named = [name for name in (*values, *members) if name in shown]
        names = {members.get(name, name) for name in named}
        told = {origins[name] for name in names} - {DEFAULT, ARGUMENT}
        where = f" (from {', '.join(sorted(told))})" if told else ""
        raise OptionError(f"{error}{where}") from None


def _resolved(
    spec: Optimizer, types: Catalog[QuantType], values: Mapping[str, Any], origins: dict[str, str]
) -> Resolved:
    hyper = _hyper(spec, values)
    for constraint in spec.constraints:
        if not evaluate(parse_condition(constraint.condition), hyper, HOST):
            raise OptionError(f"{spec.name}: {constraint.message}")
    options = {name: check_option(name, values[name]) for name in OPTIONS if name not in spec.hyper}
    clip = options.get(CLIP, 0.0) > 0
    if clip:
        _check_clip(spec)
        hyper[CLIP] = float(options[CLIP])
    return Resolved(
        hyper=hyper,
        switches={name: bool(hyper[name]) for name in spec.switches},
        state_types=_named(
            origins["state_types"],
            lambda: _state_types(spec, types, values["bits"], values["state_types"]),
        ),
        options=options,
        clip=clip,
        origins=origins,
    )


def _named(origin: str, resolved: Callable[[], dict[str, str]]) -> dict[str, str]:
    """What `resolved` returns; where it misses a name, the error tells who gave that name."""
    try:
        return resolved()
    except UnknownNameError as error:
        if origin in (DEFAULT, ARGUMENT):
            raise
        raise UnknownNameError(f"{origin}: {error}") from None


def _check_clip(spec: Optimizer) -> None:
    if not spec.can_clip:
        raise OptionError(
            f"{spec.name}: {CLIP} needs a rule that writes its update as {UPDATE!r} in "
            "element_code and p in apply_code; this one does not"
        )


def check_known(spec: Optimizer, names: Iterable[str], origin: str = ARGUMENT) -> None:
    """Raise UnknownNameError for a name that is neither an argument of `spec` nor an option."""
    prefix = "" if origin == ARGUMENT else f"{origin}: "
    known = (*spec.arguments, *options_of(spec))
    for name in names:
        if name not in known:
            raise UnknownNameError(
                f"{prefix}{spec.name} has no argument {name!r}{nearest(name, known)}; "
                f"it has: {', '.join(known)}"
            )


def _hyper(spec: Optimizer, values: Mapping[str, Any]) -> dict[str, float | bool]:
    found: dict[str, Any] = {}
    for argument in spec.arguments:
        value = values[argument]
        if value is None and spec.required(argument):
            raise OptionError(f"{spec.name}: {argument} is required")
        if argument in spec.packs:
            found.update(_unpack(spec, argument, value))
        else:
            found[argument] = value
    return {name: _checked(spec, name, found[name]) for name in spec.hyper}


def _checked(spec: Optimizer, name: str, value: Any) -> float | bool:
    try:
        return spec.hyper[name].check(name, value)
    except OptionError as error:
        raise OptionError(f"{spec.name}: {error}") from None


def _unpack(spec: Optimizer, pack: str, value: Any) -> dict[str, Any]:
    members = spec.packs[pack]
    if not isinstance(value, (tuple, list)) or len(value) != len(members):
        raise OptionError(
            f"{spec.name}: {pack}={value!r}: expected {len(members)} numbers ({', '.join(members)})"
        )
    return dict(zip(members, value, strict=True))


def _state_types(
    spec: Optimizer, types: Catalog[QuantType], bits: Any, chosen: Any
) -> dict[str, str]:
    default = FLOAT32 if bits == 32 and type(bits) is int else _default_type(types, bits)
    states = [state.name for state in spec.states if state.quantized]
    if chosen is None:
        chosen = {}
    if isinstance(chosen, str):
        chosen = dict.fromkeys(states, chosen)
    for given in chosen.values() if isinstance(chosen, Mapping) else (chosen,):
        if isinstance(given, QuantType):
            raise OptionError(_no_name(given, types))
    if not isinstance(chosen, Mapping):
        raise OptionError(f"state_types={chosen!r}: expected a quant type's name, or one by state")
    for state, name in chosen.items():
        if state not in states:
            raise UnknownNameError(
                f"{spec.name} has no state {state!r} to quantize{nearest(str(state), states)}; "
                f"it has: {', '.join(states) or '(none)'}"
            )
        if name != FLOAT32:
            types.get(name)
    found = {state: chosen.get(state, default) for state in states}
    return {state.name: found.get(state.name, FLOAT32) for state in spec.states}


def _no_name(given: QuantType, types: Catalog[QuantType]) -> str:
    """What to do with a spec in the place of its name: not print it, which may take a page."""
    how = (
        f"pass {given.name!r}"
        if types.holds(given)
        else (
            "only registered types hold states, since checkpoints name them; register it by the "
            f"hook register_quant_types (docs/plugins.md), then pass {given.name!r}"
        )
    )
    return f"state_types=(the QuantType {given.name!r} itself): expected a quant type's name; {how}"


def _default_type(types: Catalog[QuantType], bits: Any) -> str:
    found = types.find(lambda t: t.state_default and t.bits == bits and type(bits) is int)
    if found is None:
        known = sorted({t.bits for t in types if t.state_default} | {32}, reverse=True)
        raise OptionError(
            f"bits={bits!r}: expected one of {', '.join(map(str, known))}; "
            "for other quant types pass state_types"
        )
    return found.name
