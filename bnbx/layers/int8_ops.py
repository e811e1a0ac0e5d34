"""LLM.int8() as operations that torch.compile and torch.export see: `torch.ops.bnbx.*`.

    llm_int8_linear(x, codes, absmax, master, bias, threshold, keep)  x @ weight.T + bias; outliers
    llm_int8_grad_input(grad, codes, absmax)                          grad @ weight
    int8_quantize_rows(x, threshold)                                  codes, absmax, outliers
    int8_dequantize_rows(codes, absmax, dtype)                        the weight itself

No result has a shape that depends on data: outliers are marks, one for each column. Gradients go
straight through the rounding to codes: to x, as if it had not been quantized, to the bias, and to
`master`, the float weight that codes were made of, if it is given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bnbx.kernels import int8
from bnbx.kernels.memory import as_rows
from bnbx.kernels.operation import define, differentiate

# ---- the product


def _linear(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    master: Tensor | None,
    bias: Tensor | None,
    threshold: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    del master, keep  # they are for the gradient
    return int8.linear(x, codes, absmax, bias, threshold)


def _linear_fake(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    master: Tensor | None,
    bias: Tensor | None,
    threshold: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    del absmax, master, bias, keep
    outs, columns = codes.shape
    torch._check(  # type: ignore[no-untyped-call]
        x.dim() > 0 and x.shape[-1] == columns,
        lambda: f"x has shape {tuple(x.shape)}; expected (..., {columns}) for this weight",
    )
    outliers = x.new_empty(columns if threshold > 0 else 0, dtype=torch.bool)
    return x.new_empty((*x.shape[:-1], outs)), outliers


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, codes, absmax, master, bias, _, keep = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.bias_dtype = None if bias is None else bias.dtype
    weight = (codes, absmax) if keep or master is None else (None, None)
    ctx.save_for_backward(x if master is not None else None, *weight, master)


def _linear_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    x, codes, absmax, master = ctx.saved_tensors
    rows = as_rows(grad)
    grad_x = grad_master = grad_bias = None
    if ctx.needs_input_grad[0]:
        if codes is None:
            codes, absmax, _ = quantize(master.detach(), 0.0)
        grad_x = grad_input(grad, codes, absmax)
    if ctx.needs_input_grad[3]:
        grad_master = (rows.t() @ as_rows(x)).to(master.dtype)
    if ctx.needs_input_grad[4]:
        grad_bias = rows.sum(0, dtype=ctx.bias_dtype)
    return grad_x, None, None, grad_master, grad_bias, None, None


linear = define(
    "llm_int8_linear(Tensor x, Tensor codes, Tensor absmax, Tensor? master, Tensor? bias, "
    "float threshold, bool keep) -> (Tensor, Tensor)",
    _linear,
    _linear_fake,
)
differentiate("llm_int8_linear", _linear_backward, _linear_setup)


# ---- its gradient for x


def _grad_input(grad: Tensor, codes: Tensor, absmax: Tensor) -> Tensor:
    return int8.grad_input(grad, codes, absmax)


def _grad_input_fake(grad: Tensor, codes: Tensor, absmax: Tensor) -> Tensor:
    del absmax
    return grad.new_empty((*grad.shape[:-1], codes.shape[1]))


def _grad_input_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs[1:])


def _grad_input_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    codes, absmax = ctx.saved_tensors
    weight = dequantize(codes, absmax, grad.dtype)
    return grad @ weight.t(), None, None


grad_input = define(
    "llm_int8_grad_input(Tensor grad, Tensor codes, Tensor absmax) -> Tensor",
    _grad_input,
    _grad_input_fake,
)
differentiate("llm_int8_grad_input", _grad_input_backward, _grad_input_setup)


# ---- to codes and back: without gradients


def _rows(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    return int8.quantize_rows(x, threshold)


def _rows_fake(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    del threshold
    count = 1
    for size in x.shape[:-1]:
        count *= size
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    absmax = x.new_empty(count, dtype=torch.float32)
    return codes, absmax, x.new_empty(x.shape[-1], dtype=torch.bool)


def _numbers(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    return int8.dequantize_rows(codes, absmax, dtype)


def _numbers_fake(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    del absmax
    return torch.empty(codes.shape, dtype=dtype, device=codes.device)


quantize = define(
    "int8_quantize_rows(Tensor x, float threshold) -> (Tensor, Tensor, Tensor)",
    _rows,
    _rows_fake,
    gradient=False,
)
dequantize = define(
    "int8_dequantize_rows(Tensor codes, Tensor absmax, ScalarType dtype) -> Tensor",
    _numbers,
    _numbers_fake,
    gradient=False,
)
