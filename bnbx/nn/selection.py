"""Which parameters of a model `quantize_` takes, how each is to be kept, and why others are left.

A parameter that several modules share is one: it is taken if all of them can use it in codes, and
all that is said of any of them is said of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList

from bnbx.errors import OptionError, UnknownNameError
from bnbx.kernels.coding import FLOATS
from bnbx.kernels.encoding import Encoding, make_encoding
from bnbx.layers.fit import METHODS
from bnbx.layers.int8_params import Int8Params
from bnbx.layers.parameter import QuantParameter
from bnbx.nn.patterns import Pattern, compile_pattern, compile_patterns
from bnbx.registry import QuantType, quant_types
from bnbx.registry.names import nearest
from bnbx.registry.patterns import some

ARGUMENTS = ("quant_type", "block_size", "double", "fit", "compute_dtype")
LAYERS = (nn.Linear, nn.Embedding)
ALREADY = "quantized already"


@dataclass(frozen=True)
class Settings:
    """How a parameter is to be kept."""

    encoding: Encoding
    fit: str | None
    compute_dtype: torch.dtype | None


@dataclass(frozen=True)
class Choice:
    """A parameter to quantize, under the first of its names, and the attributes that it is."""

    name: str
    param: nn.Parameter
    places: tuple[tuple[nn.Module, str], ...]
    settings: Settings


@dataclass(frozen=True)
class Listed:
    """A parameter: its names, sizes, and why it is left, if it is; `key` is that of its choice."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    nbytes: int
    why: str | None
    key: int


@dataclass(frozen=True)
class Chosen:
    """All parameters of a model, and those of them to quantize, in its order."""

    choices: list[Choice]
    listed: list[Listed]


@dataclass
class _Place:
    """A module that has a parameter; `can` if it is able to use it in codes, else `why` not."""

    name: str
    path: str
    module: nn.Module
    attribute: str
    can: bool = False
    why: str = ""
    nameable: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """What patterns may match."""
        return (self.name, self.path) if self.path else (self.name,)


@dataclass(frozen=True)
class _Override:
    pattern: Pattern
    values: Mapping[str, Any] | None


@dataclass
class _Wishes:
    """The arguments of `quantize_`, checked."""

    base: Mapping[str, Any]
    skip: list[Pattern]
    overrides: list[_Override]
    parameters: list[Pattern]
    made: dict[tuple[Any, ...], Settings] = field(default_factory=dict)


def select(
    model: Any,
    base: Mapping[str, Any],
    skip: Iterable[str],
    overrides: Mapping[str, Any] | None,
    parameters: Iterable[str],
) -> Chosen:
    """What `quantize_` with these arguments is to do; changes nothing.

    Raises:
        OptionError: see `quantize_`.
        UnknownNameError: see `quantize_`.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"model is {model!r:.200}; expected a torch.nn.Module")
    wishes = _Wishes(
        base,
        compile_patterns("skip", skip),
        _overrides(overrides),
        compile_patterns("parameters", parameters),
    )
    settings_of(wishes, base, "quantize_")
    groups: dict[int, list[_Place]] = {}
    params: dict[int, nn.Parameter] = {}
    for place, param in _places(model):
        params[id(param)] = param
        _judge(place, param)
        groups.setdefault(id(param), []).append(place)
    _check_patterns(wishes, model, [place for group in groups.values() for place in group])
    choices, listed = [], []
    for key, group in groups.items():
        param = params[key]
        why = _why_left(wishes, group)
        if why is None:
            found = _common_settings(wishes, group)
            unique = {(id(p.module), p.attribute): (p.module, p.attribute) for p in group}
            choices.append(Choice(group[0].name, param, tuple(unique.values()), found))
        lazy = isinstance(param, UninitializedParameter)
        shape = () if lazy else _shape(param)
        names = tuple(dict.fromkeys(place.name for place in group))
        listed.append(Listed(names, shape, 0 if lazy else _bytes(param), why, key))
    return Chosen(choices, listed)


def _shape(param: nn.Parameter) -> tuple[int, ...]:
    state = getattr(param, "quant_state", None)
    return tuple(param.shape if state is None or state.shape is None else state.shape)


def _bytes(param: nn.Parameter) -> int:
    """Bytes of a parameter, with those of its scales."""
    beside = getattr(param, "quant_state", None)
    scales = getattr(param, "SCB", None)
    return (
        param.nbytes
        + (0 if beside is None else beside.nbytes)
        + (0 if scales is None else scales.nbytes)
    )


# ---- what there is


def _places(model: nn.Module) -> Iterable[tuple[_Place, nn.Parameter]]:
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute, param in module._parameters.items():
            if param is None:
                continue
            name = f"{path}.{attribute}" if path else attribute
            if isinstance(module, ParametrizationList) and isinstance(param, QuantParameter):
                # The module that reads it knows it by this name.
                name = path.replace("parametrizations.", "")
            yield _Place(name, path, module, attribute), param


def _judge(place: _Place, param: nn.Parameter) -> None:
    """Whether a module can use its parameter in codes."""
    module, kind = place.module, type(place.module)
    layer = next((each for each in LAYERS if isinstance(module, each)), None)
    of_layer = layer is not None and place.attribute == "weight"
    if isinstance(param, (QuantParameter, Int8Params)):
        place.why = ALREADY if not param.is_floating_point() else f"left to its {kind.__name__}"
    elif isinstance(param, UninitializedParameter):
        place.why = "it has no shape before the model has run"
    elif param.dtype not in FLOATS:
        place.why = f"{param.dtype} is neither float32, bfloat16 nor float16"
    elif param.dim() < 2:
        place.why = "fewer than two dimensions"
    elif not param.numel():
        place.why = "empty"
    elif of_layer and kind not in LAYERS:
        base = layer.__name__ if layer is not None else ""
        place.why = (
            f"{kind.__name__} is a subclass of {base}, which may use its weight in its own way"
        )
    elif isinstance(module, nn.Embedding) and module.max_norm is not None:
        place.why = "max_norm renormalizes rows in place"
    elif isinstance(module, ParametrizationList):
        place.why = "it is parametrized"
    elif of_layer:
        place.can = True
    else:
        place.nameable = True
        place.why = f"a parameter of {kind.__name__}; name it in `parameters` to quantize it"


def _check_patterns(wishes: _Wishes, model: nn.Module, places: list[_Place]) -> None:
    """Raise OptionError for a pattern that means nothing."""
    every = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    every += [place.name for place in places]
    for pattern in wishes.skip:
        pattern.check_used(every, "modules and parameters")
    for pattern in wishes.parameters:
        found = [p.name for p in places if p.nameable or p.why == ALREADY]
        pattern.check_used(found, "parameters that may be named")
    usable = [p for p in places if p.can or p.nameable or p.why == ALREADY]
    shown = [p.path if p.can and p.path else p.name for p in usable]
    others = [name for place in usable for name in place.names]
    for override in wishes.overrides:
        override.pattern.check_used(shown, "weights that can be quantized", others)


# ---- what is wanted


def _overrides(given: Mapping[str, Any] | None) -> list[_Override]:
    if given is None:
        return []
    if not isinstance(given, Mapping):
        raise OptionError(f"overrides={given!r:.200}; expected {{'*mlp*': 'mxfp4'}}")
    return [_override(text, value) for text, value in given.items()]


def _override(text: Any, value: Any) -> _Override:
    pattern = compile_pattern("overrides", text)
    if value is None:
        return _Override(pattern, None)
    if isinstance(value, (str, QuantType)):
        return _Override(pattern, {"quant_type": value})
    if not isinstance(value, Mapping) or not value:
        raise OptionError(
            f"{pattern.origin}={value!r:.200}; expected a quant type, {{'block_size': 32}}, or None"
        )
    for key in value:
        if key not in ARGUMENTS:
            raise UnknownNameError(
                f"{pattern.origin}: there is no argument {key!r}{nearest(str(key), ARGUMENTS)}; "
                f"there are: {', '.join(ARGUMENTS)}"
            )
    return _Override(pattern, dict(value))


def _why_left(wishes: _Wishes, group: list[_Place]) -> str | None:
    """Why a parameter is left; None if it is to be quantized."""
    found = {place.name: _why_place_left(wishes, place) for place in group}
    for name, why in found.items():
        if why is not None:
            return why if set(found.values()) == {why} else f"shared with {name}: {why}"
    return None


def _why_place_left(wishes: _Wishes, place: _Place) -> str | None:
    for pattern in wishes.skip:
        if any(map(pattern.matches, place.names)):
            return pattern.origin
    if not place.can and not (place.nameable and _is_named(wishes, place)):
        return place.why
    matching = [o for o in wishes.overrides if any(map(o.pattern.matches, place.names))]
    if matching and matching[-1].values is None:
        return f"{matching[-1].pattern.origin} = None"
    return None


def _is_named(wishes: _Wishes, place: _Place) -> bool:
    """Whether `parameters`, or an override that gives a type, means this parameter."""
    typed = [o.pattern for o in wishes.overrides if o.values and "quant_type" in o.values]
    return any(pattern.matches(place.name) for pattern in (*wishes.parameters, *typed))


def _common_settings(wishes: _Wishes, group: list[_Place]) -> Settings:
    found = {place.name: _settings(wishes, place) for place in group}
    if len(set(found.values())) > 1:
        told = "; ".join(f"{name}: {each.encoding.describe()}" for name, each in found.items())
        raise OptionError(
            f"{some(list(found))} are one parameter, but overrides want it kept in several ways: "
            f"{told}. Give all of its names the same"
        )
    return next(iter(found.values()))


def _settings(wishes: _Wishes, place: _Place) -> Settings:
    values = dict(wishes.base)
    origin = "quantize_"
    for override in wishes.overrides:
        if override.values is None or not any(map(override.pattern.matches, place.names)):
            continue
        origin = override.pattern.origin
        if "quant_type" in override.values:
            # Another type comes with its own block size, and with scales as they suit it.
            values["block_size"] = None
            values["double"] = values["double"] and _takes_double(override.values["quant_type"])
        values.update(override.values)
    return settings_of(wishes, values, origin)


def _takes_double(quant_type: str | QuantType) -> bool:
    spec = quant_types().get(quant_type) if isinstance(quant_type, str) else quant_type
    return spec.scale.dtype == "float32"


def settings_of(wishes: _Wishes, values: Mapping[str, Any], origin: str) -> Settings:
    """Checked settings.

    Raises:
        OptionError: a value that is none, or that the type cannot have; `origin` is named.
        UnknownNameError: no such quant type.
    """
    key = tuple(values[name] for name in ARGUMENTS)
    if key in wishes.made:
        return wishes.made[key]
    quant_type, block_size, double, fit, compute_dtype = key
    if not isinstance(quant_type, (str, QuantType)):
        raise OptionError(f"{origin}: quant_type={quant_type!r:.200}; expected a name or a spec")
    if fit is not None and fit not in METHODS:
        raise OptionError(f"{origin}: fit={fit!r}; expected one of {', '.join(METHODS)}, or None")
    if compute_dtype is not None and compute_dtype not in FLOATS:
        raise OptionError(
            f"{origin}: compute_dtype={compute_dtype!r}; expected one of "
            f"{', '.join(map(str, FLOATS))}, or None"
        )
    if not isinstance(double, bool):
        raise OptionError(f"{origin}: double={double!r}; expected True or False")
    try:
        encoding = make_encoding(quant_type, block_size, double=double)
    except OptionError as error:
        raise OptionError(f"{origin}: {error}") from None
    wishes.made[key] = Settings(encoding, fit, compute_dtype)
    return wishes.made[key]
