"""Quantize and dequantize on the fastest target there is: what functions and layers stand on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bnbx.errors import QuantizedDataError, UnsupportedTensorError
from bnbx.kernels import coding_reference
from bnbx.kernels.encoding import Encoding, check_parts

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def encode(
    encoding: Encoding, x: Tensor, *, rand: Tensor | None = None, seed: int | None = None
) -> list[Tensor]:
    """Quantize.

    Args:
        encoding: see `bnbx.kernels.encoding`.
        x: float32, bfloat16 or float16, any shape and strides.
        rand: numbers in [0, 1) to round stochastically with: element i goes to the upper of its
            two neighbors if `rand[i % len(rand)]` is below its place between them.
        seed: the same with noise that is made from this number (32 bits) and the place of i.

    Returns:
        The parts (see `bnbx.kernels.encoding`), on the device of x.

    Raises:
        UnsupportedTensorError: x has another dtype or layout.
    """
    check_numbers("x", x)
    if rand is not None and (
        rand.dtype != torch.float32 or rand.device != x.device or not rand.numel()
    ):
        raise UnsupportedTensorError(
            f"rand is {rand.dtype} of {rand.numel()} elements on {rand.device}; expected float32 "
            f"numbers in [0, 1) on {x.device}"
        )
    return coding_reference.encode(encoding, x, rand, seed)


def decode(
    encoding: Encoding,
    parts: Sequence[Tensor],
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Dequantize.

    Args:
        encoding: see `bnbx.kernels.encoding`.
        parts: of a tensor of `shape`.
        shape: of the result.
        dtype: of the result: float32, bfloat16 or float16.
        out: a contiguous tensor of this shape and dtype to fill.

    Raises:
        QuantizedDataError: the parts do not fit the encoding and the shape.
    """
    check_parts(encoding, shape, parts)
    if dtype not in FLOATS:
        raise UnsupportedTensorError(f"dequantized to {dtype}; expected one of {FLOATS}")
    if out is not None and (
        out.dtype != dtype
        or out.shape != torch.Size(shape)
        or not out.is_contiguous()
        or out.device != parts[0].device
    ):
        raise QuantizedDataError(
            f"out is {out.dtype} of shape {tuple(out.shape)} on {out.device}; expected {dtype} of "
            f"shape {tuple(shape)} on {parts[0].device}, contiguous"
        )
    found = coding_reference.decode(encoding, parts, shape, dtype)
    return found if out is None else out.copy_(found)


def check_numbers(what: str, x: Tensor) -> None:
    """Raise UnsupportedTensorError unless x is a plain tensor of floats that kernels read."""
    if not isinstance(x, Tensor):
        raise UnsupportedTensorError(f"{what} is {type(x).__name__}; expected a torch.Tensor")
    if x.dtype not in FLOATS:
        raise UnsupportedTensorError(
            f"{what} is {x.dtype}; expected float32, bfloat16 or float16: convert it first"
        )
    if x.layout is not torch.strided:
        raise UnsupportedTensorError(f"{what} is {x.layout}; expected a dense tensor")
