"""What a weight in codes does in place of a dense one: products and lookups.

Layers call these, and so does a quantized parameter that a model passes to torch's own
`torch.nn.functional.linear` or `embedding`, as models do whose last layer shares the weight of the
first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bnbx.errors import OptionError
from bnbx.kernels.coding import check_factor, check_tensor
from bnbx.kernels.quant_state import QuantState
from bnbx.layers import ops


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast makes of x, if it is on.

    Raises:
        UnsupportedTensorError: x is not a tensor of floats.
    """
    check_factor("x", x)
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return None  # of the meta device torch cannot say whether it is on
    return torch.get_autocast_dtype(kind)


def multiply(
    x: Tensor, codes: Tensor, state: QuantState, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The product x @ weight.T + bias, with x and bias converted to a dtype; differentiable."""
    if x.dtype != dtype:
        x = x.to(dtype)
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    found: Tensor = ops.linear_product(x, state.parts(codes), bias, state.label, state.shape or ())
    return found


def look_up(ids: Tensor, codes: Tensor, state: QuantState) -> Tensor:
    """Rows of the matrix, in its dtype."""
    check_tensor("ids", ids)
    found: Tensor = ops.embedding(
        ids, state.parts(codes), state.label, state.shape or (), state.dtype or torch.float32
    )
    return found


def entries(index: Any, codes: Tensor, state: QuantState) -> Tensor:
    """What `[index]` gives of the dense numbers; where it selects rows, no others are decoded."""
    shape = tuple(state.shape or ())
    first, *rest = index if isinstance(index, tuple) and index else (index,)
    if len(shape) == 2 and _selects_rows(first) and all(map(_selects_columns, rest)):
        ids = torch.arange(shape[0], device=codes.device)[first]
        found = look_up(ids, codes, state)
        return found[(slice(None),) * ids.dim() + tuple(rest)] if rest else found
    return dense(codes, state)[index]


def dense(codes: Tensor, state: QuantState, dtype: torch.dtype | None = None) -> Tensor:
    """The dense numbers, in the dtype that they had or in another."""
    wanted = dtype or state.dtype or torch.float32
    found: Tensor = ops.dequantize(state.parts(codes), state.label, list(state.shape or ()), wanted)
    return found


def _selects_rows(index: Any) -> bool:
    if isinstance(index, Tensor):
        return index.dtype in (torch.int64, torch.int32) or (
            index.dtype == torch.bool and index.dim() == 1
        )
    if isinstance(index, list):
        return all(isinstance(each, int) for each in index)
    return isinstance(index, (int, slice)) and not isinstance(index, bool)


def _selects_columns(index: Any) -> bool:
    return index is Ellipsis or (isinstance(index, (int, slice)) and not isinstance(index, bool))


def _linear(state: QuantState, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002 - torch's name
    return multiply(input, weight.detach(), state, bias, autocast_dtype(input) or input.dtype)


def _embedding(
    state: QuantState,
    input: Tensor,  # noqa: A002 - torch's name
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    del padding_idx, norm_type, scale_grad_by_freq, sparse  # of gradients, which codes have not
    if max_norm is not None:
        raise OptionError(f"max_norm={max_norm!r}: rows in codes cannot be renormalized in place")
    return look_up(input, weight.detach(), state)


_FUNCTIONS: Mapping[Any, Callable[..., Tensor]] = {
    torch.nn.functional.linear: _linear,
    torch.nn.functional.embedding: _embedding,
}


def in_place_of(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None
) -> Callable[[], Tensor] | None:
    """What to call in place of a function of torch, if its weight is in codes."""
    mine = _FUNCTIONS.get(func)
    if mine is None:
        return None
    named = kwargs or {}
    state = getattr(args[1] if len(args) > 1 else named.get("weight"), "quant_state", None)
    if state is None:
        return None
    return lambda: mine(state, *args, **named)
