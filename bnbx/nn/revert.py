"""From codes back to dense weights: what `dequantize_` does.

Layers become torch's own in place, as they became quantized: the same objects, with their hooks.
Those that would not compute then what they do now are left, and so is what they share.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from bnbx.errors import BnbxWarning, OptionError
from bnbx.kernels.coding import FLOATS
from bnbx.layers.embedding import QuantEmbedding
from bnbx.layers.int8 import Linear8bitLt
from bnbx.layers.linear import QuantLinear
from bnbx.layers.parametrize import coded_parameters, restore_parameter
from bnbx.layers.reclass import calls_its_class, change_class, class_of
from bnbx.nn.embedding8 import Embedding8bit
from bnbx.nn.selection import find_places
from bnbx.registry.patterns import some

# Of each kind of layer: what it becomes, and the attributes that torch's own do not have.
_BECOMES: tuple[tuple[type[nn.Module], type[nn.Module], tuple[str, ...]], ...] = (
    (
        QuantLinear,
        nn.Linear,
        ("quant_state", "quant_storage", "fit", "compute_dtype", "compute_type_is_set"),
    ),
    (QuantEmbedding, nn.Embedding, ("quant_state", "quant_storage", "fit")),
    (Linear8bitLt, nn.Linear, ("state", "index", "dtype", "_used")),
    (Embedding8bit, nn.Embedding, ("dtype", "_kept")),
)


@torch.no_grad()
def dequantize_model(model: nn.Module, dtype: torch.dtype | None, requires_grad: bool) -> nn.Module:
    """See `bnbx.nn.dequantize_`."""
    if not isinstance(model, nn.Module):
        raise OptionError(f"model is {model!r:.200}; expected a torch.nn.Module")
    if dtype is not None and dtype not in FLOATS:
        raise OptionError(f"dtype={dtype!r}; expected one of {', '.join(map(str, FLOATS))}")
    left = _left(model)
    made: dict[int, nn.Parameter] = {}
    kept: list[Any] = []  # so that no other parameter gets the address of one that is gone
    for module in list(model.modules()):
        for kind, plain, attributes in _BECOMES:
            if isinstance(module, kind) and id(module.weight) not in left:
                _revert(module, plain, attributes, dtype, requires_grad, made, kept)
                break
        for name, param in coded_parameters(module).items():
            if id(param) in left:
                continue
            if id(param) in made:
                restore_parameter(module, name, dense=made[id(param)])
                continue
            kept.append(param)
            made[id(param)] = restore_parameter(module, name, dtype)
            made[id(param)].requires_grad_(requires_grad)
    if left:
        _warn_of_left(model, left)
    return model


def _left(model: nn.Module) -> dict[int, str]:
    """By the id of their weight, layers that stay in codes, and why."""
    found: dict[int, str] = {}
    for module in model.modules():
        if not any(isinstance(module, row[0]) for row in _BECOMES):
            continue
        kind, weight = class_of(module), id(module.weight)
        base = next(each for each in kind.__mro__ if _is_ours(each))
        if kind is not base:
            found[weight] = (
                f"{kind.__name__} is a subclass of {base.__name__}, which may use its weight in "
                "its own way"
            )
        elif not calls_its_class(module):
            found[weight] = "a forward is patched, and may use the weight in its own way"
    return found


def _is_ours(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == __name__.partition(".")[0]


def _warn_of_left(model: nn.Module, left: Mapping[int, str]) -> None:
    names: dict[str, list[str]] = {why: [] for why in left.values()}
    for place, param in find_places(model):
        if id(param) in left:
            names[left[id(param)]].append(place.name)
    told = "; ".join(f"{some(found)}: {why}" for why, found in names.items())
    warnings.warn(f"dequantize_ leaves in codes {told}", BnbxWarning, stacklevel=5)


def _revert(
    module: Any,
    plain: type[nn.Module],
    attributes: tuple[str, ...],
    dtype: torch.dtype | None,
    requires_grad: bool,
    made: dict[int, nn.Parameter],
    kept: list[Any],
) -> None:
    weight = module.weight
    if id(weight) not in made:
        kept.append(weight)
        known = module.dense_dtype if isinstance(module, Linear8bitLt) else None
        dense = module.dequantized_weight(dtype or known)
        made[id(weight)] = nn.Parameter(dense, requires_grad=requires_grad)
    module._parameters["weight"] = made[id(weight)]
    if dtype is not None:
        _convert(getattr(module, "bias", None), dtype)
    change_class(module, plain)
    for name in attributes:
        module.__dict__.pop(name, None)


def _convert(bias: nn.Parameter | None, dtype: torch.dtype) -> None:
    """Give a bias the dtype of its weight, which a product of torch's wants; it stays itself."""
    if bias is None:
        return
    grad, bias.grad = bias.grad, None
    bias.data = bias.data.to(dtype)
    bias.grad = None if grad is None else grad.to(dtype)
