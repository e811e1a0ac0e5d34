"""Which parameters of a model `quantize_` takes, how each is to be kept, and why others are left.

A parameter that several modules share is one: it is taken if all of them can use it in codes, and
all that is said of any of them is said of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList

from bnbx.errors import OptionError, UnknownNameError
from bnbx.kernels.coding import FLOATS
from bnbx.kernels.encoding import Encoding, make_encoding
from bnbx.kernels.fit import METHODS
from bnbx.layers.int8_params import Int8Params
from bnbx.layers.parameter import QuantParameter
from bnbx.layers.reclass import calls_its_class, class_of
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


class Use(NamedTuple):
    """An attribute that a parameter is; `layer` if it is the weight of one of torch's layers."""

    module: nn.Module
    attribute: str
    layer: bool


@dataclass(frozen=True)
class Choice:
    """A parameter to quantize, under the first of its names, and where it is used."""

    name: str
    param: nn.Parameter
    uses: tuple[Use, ...]
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
    """A module that has a parameter; `can` if it is a layer to be one in codes, else `why` not.

    `told` if a pattern may mean it that does nothing to it: it says why it is left.
    """

    name: str
    path: str
    module: nn.Module
    attribute: str
    can: bool = False
    why: str = ""
    nameable: bool = False
    told: bool = False

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
    for place, param in find_places(model):
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
            uses = dict.fromkeys(Use(p.module, p.attribute, p.can) for p in group)
            choices.append(Choice(group[0].name, param, tuple(uses), found))
        lazy = isinstance(param, UninitializedParameter)
        shape = () if lazy or param.is_nested else _shape(param)
        names = tuple(dict.fromkeys(place.name for place in group))
        listed.append(Listed(names, shape, 0 if lazy else _bytes(param), why, key))
    return Chosen(choices, listed)


def _shape(param: nn.Parameter) -> tuple[int, ...]:
    state = getattr(param, "quant_state", None)
    return tuple(param.shape if state is None or state.shape is None else state.shape)


def _bytes(param: torch.Tensor) -> int:
    """Bytes of a parameter, with those of its scales, or of what it is made of."""
    flatten = getattr(param, "__tensor_flatten__", None)
    if flatten is not None:
        inner = [getattr(param, name) for name in flatten()[0]]
        return sum(_bytes(each) for each in inner if isinstance(each, torch.Tensor))
    beside = getattr(param, "quant_state", None)
    scales = getattr(param, "SCB", None)
    return (
        param.numel() * param.itemsize  # torch counts no bytes of sparse ones
        + (0 if beside is None else beside.nbytes)
        + (0 if scales is None else scales.nbytes)
    )


# ---- what there is


def find_places(model: nn.Module) -> Iterable[tuple[_Place, nn.Parameter]]:
    """Parameters, wherever they are, under the names that users know them by."""
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
    module, kind = place.module, class_of(place.module)
    layer = next((each for each in LAYERS if isinstance(module, each)), None)
    if isinstance(param, (QuantParameter, Int8Params)):
        place.told = not param.is_floating_point()
        place.why = ALREADY if place.told else f"left to its {kind.__name__}"
    elif (why := _why_no_codes(param)) is not None:
        place.why = why
    elif layer is not None and place.attribute == "weight":
        place.why = _why_no_layer(module, layer) or ""
        place.can = not place.why
    elif isinstance(module, ParametrizationList):
        place.why = "it is parametrized"
    elif (made := _computed_from(module, place.attribute)) is not None:
        place.told = True
        place.why = (
            f"{made} is computed from it; make that a parameter first, such as by prune.remove"
        )
    else:
        place.nameable = True
        place.why = f"a parameter of {kind.__name__}; name it in `parameters` to quantize it"


def _why_no_codes(param: nn.Parameter) -> str | None:
    """Why a parameter cannot be in codes, wherever it is; None if it can."""
    if isinstance(param, UninitializedParameter):
        return "it has no shape before the model has run"
    # Libraries that quantize, too, and those that spread tensors over devices make tensors whose
    # elements do not lie in memory as those of plain ones do.
    if type(param).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return f"it is a tensor of another kind: {type(param).__name__}"
    if param.is_nested or param.layout is not torch.strided:
        return f"it is a tensor of another kind: {'nested' if param.is_nested else param.layout}"
    if param.dtype not in FLOATS:
        return f"{param.dtype} is neither float32, bfloat16 nor float16"
    if param.dim() < 2:
        return "fewer than two dimensions"
    return None if param.numel() else "empty"


def _why_no_layer(module: nn.Module, layer: type[nn.Module]) -> str | None:
    """Why a module that is one of torch's layers cannot be one in codes; None if it can."""
    kind = class_of(module)
    if kind is not layer:
        name = layer.__name__
        return f"{kind.__name__} is a subclass of {name}, which may use its weight in its own way"
    if not calls_its_class(module):
        return "its forward is patched, and may use the weight in its own way"
    if getattr(module, "max_norm", None) is not None:
        return "max_norm renormalizes rows in place"
    return None


def _computed_from(module: nn.Module, attribute: str) -> str | None:
    """What a module makes of `weight_orig`, `weight_g` and so on before it is called.

    Pruning, spectral_norm and weight_norm of torch.nn.utils do. In codes such a parameter saves
    little, as what is made of it is kept dense, and they could not be undone.
    """
    made = attribute.rpartition("_")[0]
    return made if isinstance(module.__dict__.get(made), torch.Tensor) else None


def _check_patterns(wishes: _Wishes, model: nn.Module, places: list[_Place]) -> None:
    """Raise OptionError for a pattern that means nothing."""
    every = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    every += [place.name for place in places]
    for pattern in wishes.skip:
        pattern.check_used(every, "modules and parameters")
    for pattern in wishes.parameters:
        found = [p.name for p in places if p.nameable or p.told]
        pattern.check_used(found, "parameters that may be named")
    usable = [p for p in places if p.can or p.nameable or p.told]
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
