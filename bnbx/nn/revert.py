"""From codes back to dense weights: what `dequantize_` does.

Layers become torch's own in place, as they became quantized: the same objects, with their hooks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bnbx.errors import OptionError
from bnbx.kernels.coding import FLOATS
from bnbx.layers.embedding import QuantEmbedding
from bnbx.layers.int8 import Linear8bitLt
from bnbx.layers.linear import QuantLinear
from bnbx.layers.parametrize import coded_parameters, restore_parameter
from bnbx.nn.embedding8 import Embedding8bit

# Of each kind of layer: what it becomes, and the attributes that torch's own do not have.
_BECOMES: tuple[tuple[type[nn.Module], type[nn.Module], tuple[str, ...]], ...] = (
    (
        QuantLinear,
        nn.Linear,
        ("quant_state", "quant_storage", "fit", "compute_dtype", "compute_type_is_set"),
    ),
    (QuantEmbedding, nn.Embedding, ("quant_state", "quant_storage", "fit")),
    (Linear8bitLt, nn.Linear, ("state", "index", "dtype", "_used")),
    (Embedding8bit, nn.Embedding, ("dtype",)),
)


@torch.no_grad()
def dequantize_model(model: nn.Module, dtype: torch.dtype | None, requires_grad: bool) -> nn.Module:
    """See `bnbx.nn.dequantize_`."""
    if not isinstance(model, nn.Module):
        raise OptionError(f"model is {model!r:.200}; expected a torch.nn.Module")
    if dtype is not None and dtype not in FLOATS:
        raise OptionError(f"dtype={dtype!r}; expected one of {', '.join(map(str, FLOATS))}")
    made: dict[int, nn.Parameter] = {}
    kept: list[Any] = []  # so that no other parameter gets the address of one that is gone
    for module in list(model.modules()):
        for kind, plain, attributes in _BECOMES:
            if isinstance(module, kind):
                _revert(module, plain, attributes, dtype, requires_grad, made, kept)
                break
        for name, param in coded_parameters(module).items():
            if id(param) in made:
                restore_parameter(module, name, dense=made[id(param)])
                continue
            kept.append(param)
            made[id(param)] = restore_parameter(module, name, dtype)
            made[id(param)].requires_grad_(requires_grad)
    return model


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
    module.__class__ = plain
    for name in attributes:
        module.__dict__.pop(name, None)


def _convert(bias: nn.Parameter | None, dtype: torch.dtype) -> None:
    """Give a bias the dtype of its weight, which a product of torch's wants; it stays itself."""
    if bias is None:
        return
    grad, bias.grad = bias.grad, None
    bias.data = bias.data.to(dtype)
    bias.grad = None if grad is None else grad.to(dtype)
