"""LLM.int8() (arXiv:2208.07339) on the fastest target there is: what functions and layers stand on.

Rows of numbers are kept as 8-bit codes and their absmax; the product of an input with a weight in
codes is made in integers, but for the columns of the input that hold outliers, which are made in
floats. Nothing is converted to float16 on the way.

A row with NaN in it gives NaN for that row and no other. So does one with infinity, unless there is
a threshold: then infinity is an outlier like any other, and gives what a dense product gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bnbx.errors import OptionError, UnsupportedTensorError
from bnbx.kernels import int8_cpu, int8_cuda, int8_reference, targets
from bnbx.kernels.coding import FLOATS, check_factor, check_numbers
from bnbx.kernels.memory import as_rows, check_memory, reshaped

MOST_COLUMNS = 131_071  # so many products of two codes add up to less than 2**31
PANEL_SHARE = 0.05  # of a dense weight is decoded at a time


def quantize_rows(x: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of numbers to codes.

    The bytes are those of bitsandbytes' int8_vectorwise_quant where that takes the dtype: a code is
    x * (1 / absmax * 127), rounded to the nearest integer, ties to even. With a threshold, absmax
    is that of the numbers below it; and where there are several rows, all codes of a column that
    holds an outlier in any of them are 0.

    Args:
        x: (..., columns) float32, bfloat16 or float16, any strides.
        threshold: magnitude from which on a number is an outlier; 0 for none.

    Returns:
        codes: (..., columns) int8, -127 to 127; 0 in rows with NaN or infinity.
        absmax: (rows,) float32, where rows is the product of the leading sizes.
        outliers: (columns,) bool, the columns that hold an outlier.

    Raises:
        UnsupportedTensorError: x has another dtype or layout, or no dimension.
        OptionError: the threshold is negative or NaN.
    """
    check_threshold(threshold)
    check_memory((x,))
    codes, absmax, outliers = choose(x.device.type).quantize_rows(_rows("x", x), threshold)
    return codes.view(x.shape), absmax, outliers


def dequantize_rows(codes: Tensor, absmax: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Codes to numbers: code * absmax / 127, in float32, rounded to `dtype`.

    Args:
        codes: (..., columns) int8.
        absmax: float32, one for each row.
        dtype: of the result: float32, bfloat16 or float16.

    Raises:
        UnsupportedTensorError: the tensors or the dtype are others.
    """
    if dtype not in FLOATS:
        raise UnsupportedTensorError(f"dequantized to {dtype}; expected one of {FLOATS}")
    check_memory((codes, absmax))
    if codes.dim() == 0:
        raise UnsupportedTensorError("codes are a scalar; expected (..., columns)")
    columns = codes.shape[-1]
    count = codes.numel() // columns if columns else math.prod(codes.shape[:-1])
    rows = codes.reshape(count, columns)
    rows = rows if rows.stride(1) == 1 or columns < 2 else rows.contiguous()
    check_weight(rows, absmax)
    target, scales = choose(codes.device.type), absmax.reshape(-1).contiguous()
    found: Tensor = target.dequantize_rows(rows, scales, dtype)
    return found.view(codes.shape)


def linear(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    bias: Tensor | None = None,
    threshold: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The product x @ weight.T + bias, x being quantized row by row on the way.

    Memory beside the result: codes of some rows of x at a time, at most about 4 % of the bytes that
    the weight would have in the dtype of x (64 rows, if that is more); and floats for the outlier
    columns of x and of 64 rows of the weight.

    Args:
        x: (..., in) float32, bfloat16 or float16, any strides; there may be no rows.
        codes: of the weight, (out, in) int8, contiguous.
        absmax: of the weight, (out,) float32.
        bias: (out,), any float dtype.
        threshold: columns of x with a magnitude of at least this are multiplied in floats; 0 for
            none. The paper has 6.

    Returns:
        y: (..., out), of the dtype of x.
        outliers: (in,) bool, the columns of x that held an outlier; (0,) without a threshold.

    Raises:
        UnsupportedTensorError: a tensor has another dtype, shape, layout or device, or `in` is more
            than 131071, where a sum of products could overflow 32 bits.
        OptionError: the threshold is negative or NaN.
    """
    check_threshold(threshold)
    check_memory((x, codes, absmax, bias))
    check_weight(codes, absmax)
    outs, columns = codes.shape
    if x.dim() and x.shape[-1] != columns:
        raise UnsupportedTensorError(
            f"x has shape {tuple(x.shape)}; expected (..., {columns}) for a weight of shape "
            f"{tuple(codes.shape)}"
        )
    if columns > MOST_COLUMNS:
        raise UnsupportedTensorError(
            f"int8 products of {columns} columns may overflow 32 bits; at most {MOST_COLUMNS}"
        )
    if bias is not None and (tuple(bias.shape) != (outs,) or not bias.is_floating_point()):
        raise UnsupportedTensorError(
            f"bias is {bias.dtype} of shape {tuple(bias.shape)}; expected floats of shape ({outs},)"
        )
    check_factor("x", x)
    rows = _rows("x", x)
    for what, tensor in (("weight", codes), ("absmax", absmax), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise UnsupportedTensorError(
                f"x is on {x.device}, {what} on {tensor.device}: move one to the other"
            )
    target = choose(x.device.type)
    weight = codes.contiguous(), absmax.reshape(-1).contiguous()
    y, outliers = target.linear(rows, *weight, bias, threshold)
    return reshaped(y, (*x.shape[:-1], outs)), outliers


def grad_input(grad: Tensor, codes: Tensor, absmax: Tensor) -> Tensor:
    """The product grad @ weight: the gradient of `linear` for x, straight through the rounding.

    At most about 5 % of the weight is decoded at a time.

    Args:
        grad: (..., out) float32, bfloat16 or float16, any strides; there may be no rows.
        codes: of the weight, (out, in) int8.
        absmax: of the weight, (out,) float32.

    Returns:
        (..., in), of the dtype of grad.

    Raises:
        UnsupportedTensorError: a tensor has another dtype, shape, layout or device.
    """
    check_memory((grad, codes, absmax))
    check_weight(codes, absmax)
    outs, columns = codes.shape
    rows = _rows("grad", grad)
    if rows.shape[1] != outs:
        raise UnsupportedTensorError(
            f"grad has shape {tuple(grad.shape)}; expected (..., {outs}) for a weight of shape "
            f"{tuple(codes.shape)}"
        )
    found = rows.new_empty((len(rows), columns))
    width = max(1, int(columns * PANEL_SHARE))
    for at in range(0, columns, width):
        panel = dequantize_rows(codes[:, at : at + width], absmax, grad.dtype)
        found[:, at : at + width] = rows @ panel
    return reshaped(found, (*grad.shape[:-1], columns))


def check_threshold(threshold: Any) -> None:
    """Raise OptionError unless the threshold is a magnitude."""
    if not hasattr(threshold, "__float__") or not threshold >= 0:  # NaN too
        raise OptionError(
            f"threshold is {threshold!r:.200}; expected a magnitude from which on numbers are "
            "outliers (6.0 in the paper), or 0 for no outliers"
        )


def check_weight(codes: Tensor, absmax: Tensor) -> None:
    """Raise UnsupportedTensorError unless these are the codes and the absmax of rows."""
    if codes.dtype != torch.int8 or codes.dim() != 2 or codes.layout is not torch.strided:
        raise UnsupportedTensorError(
            f"the weight is {codes.dtype} of shape {tuple(codes.shape)}; expected int8 codes of "
            "shape (out, in). A float weight is quantized first: by `.to(device)` of its module, "
            "or by quantize_rows"
        )
    if absmax.dtype != torch.float32 or absmax.numel() != codes.shape[0]:
        raise UnsupportedTensorError(
            f"absmax is {absmax.dtype} of shape {tuple(absmax.shape)}; expected float32 of shape "
            f"({codes.shape[0]},), one for each row of codes of shape {tuple(codes.shape)}"
        )
    if absmax.device != codes.device:
        raise UnsupportedTensorError(
            f"codes are on {codes.device}, absmax on {absmax.device}: move one to the other"
        )


def _rows(what: str, x: Tensor) -> Tensor:
    """The tensor as (rows, columns), with neighbors of a row side by side in memory."""
    check_numbers(what, x)
    if x.dim() == 0:
        raise UnsupportedTensorError(f"{what} is a scalar; expected (..., columns)")
    rows = as_rows(x.detach())
    return rows if rows.stride(1) == 1 or rows.shape[1] < 2 else rows.contiguous()


@lru_cache(maxsize=8)
def choose(device: str) -> ModuleType:
    """What runs on a type of device: the native kernels, or torch operations, with a warning."""
    ready: dict[str, Callable[[], object]] = {
        "cpu": int8_cpu.library,
        "cuda": lambda: int8_cuda.kernels(torch.cuda.current_device()),
    }
    native = {"cpu": int8_cpu, "cuda": int8_cuda}
    target = targets.choose(device, ready, "Products of int8 codes run").name
    return native.get(target, int8_reference)
