"""What layers compute, as operations that torch.compile and torch.export see: `torch.ops.bnbx.*`.

    linear(x, parts, bias, encoding, shape)          x @ weight.T + bias
    linear_grad_input(grad, parts, encoding, shape)  grad @ weight
    dequantize(parts, encoding, shape, dtype)        the weight itself
    embedding(ids, parts, encoding, shape, dtype)    rows of it

A weight is its parts (see `bnbx.kernels.encoding`), the label of its encoding and its shape. It is
frozen: gradients flow to x and bias, of any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from bnbx.errors import UnsupportedTensorError
from bnbx.kernels import coding, linear, rows
from bnbx.kernels.encoding import from_label
from bnbx.kernels.memory import as_rows
from bnbx.kernels.operation import COMPLIANT, define, differentiate

_TAGS = (*COMPLIANT, torch.Tag.needs_fixed_stride_order)


# ---- linear


def _linear(
    x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, encoding: str, shape: Sequence[int]
) -> Tensor:
    return linear.linear(from_label(encoding), parts, shape, x, bias)


def _linear_fake(
    x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, encoding: str, shape: Sequence[int]
) -> Tensor:
    torch._check(  # type: ignore[no-untyped-call]
        x.dim() > 0 and x.shape[-1] == shape[1],
        lambda: f"x has shape {tuple(x.shape)}; expected (..., {shape[1]}) for this weight",
    )
    return x.new_empty((*x.shape[:-1], shape[0]))


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    _, parts, _, ctx.encoding, ctx.shape = inputs
    ctx.count = len(parts)
    ctx.save_for_backward(*parts)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = linear_grad_input(grad, ctx.saved_tensors, ctx.encoding, ctx.shape)
    if ctx.needs_input_grad[2]:
        grad_bias = as_rows(grad).sum(0)
    return grad_x, [None] * ctx.count, grad_bias, None, None


def _grad_input(
    grad: Tensor, parts: Sequence[Tensor], encoding: str, shape: Sequence[int]
) -> Tensor:
    return linear.grad_input(from_label(encoding), parts, shape, grad)


def _grad_input_fake(
    grad: Tensor, parts: Sequence[Tensor], encoding: str, shape: Sequence[int]
) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], shape[1]))


def _grad_input_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    _, parts, ctx.encoding, ctx.shape = inputs
    ctx.count = len(parts)
    ctx.save_for_backward(*parts)


def _grad_input_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    found = linear_product(grad, ctx.saved_tensors, None, ctx.encoding, ctx.shape)
    return found, [None] * ctx.count, None, None


# ---- the weight, and rows of it


def _numbers(
    parts: Sequence[Tensor], encoding: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    return coding.decode(from_label(encoding), parts, shape, dtype)


def _numbers_fake(
    parts: Sequence[Tensor], encoding: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    return parts[0].new_empty(tuple(shape), dtype=dtype)


def _embedding(
    ids: Tensor, parts: Sequence[Tensor], encoding: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    if ids.dtype not in (torch.int64, torch.int32):
        raise UnsupportedTensorError(f"ids are {ids.dtype}; expected int64 or int32")
    return rows.decode_rows(from_label(encoding), parts, shape, ids, dtype)


def _embedding_fake(
    ids: Tensor, parts: Sequence[Tensor], encoding: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    return parts[0].new_empty((*ids.shape, prod(shape[1:])), dtype=dtype)


linear_product = define(
    "linear(Tensor x, Tensor[] parts, Tensor? bias, str encoding, int[] shape) -> Tensor",
    _linear,
    _linear_fake,
    tags=_TAGS,
)
linear_grad_input = define(
    "linear_grad_input(Tensor grad, Tensor[] parts, str encoding, int[] shape) -> Tensor",
    _grad_input,
    _grad_input_fake,
    tags=_TAGS,
)
dequantize = define(
    "dequantize(Tensor[] parts, str encoding, SymInt[] shape, ScalarType dtype) -> Tensor",
    _numbers,
    _numbers_fake,
    tags=_TAGS,
)
embedding = define(
    "embedding(Tensor ids, Tensor[] parts, str encoding, int[] shape, ScalarType dtype) -> Tensor",
    _embedding,
    _embedding_fake,
    anywhere=("ids",),  # as in torch.nn.Embedding
    tags=_TAGS,
)
differentiate("linear", _linear_backward, _linear_setup)
differentiate("linear_grad_input", _grad_input_backward, _grad_input_setup)
