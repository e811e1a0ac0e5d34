"""Products with a quantized weight, on the fastest target there is: what layers stand on.

No product makes a dense copy of the weight: a few rows of input (any number, where that is faster)
are multiplied with the codes as they are read, and for many rows the weight is decoded in panels
that share one buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from math import prod

import torch
from torch import Tensor

from bnbx.errors import UnsupportedTensorError
from bnbx.kernels import linear_cpu, linear_cuda, linear_panels, linear_tiles, targets
from bnbx.kernels.coding import FLOATS, check_factor, check_numbers
from bnbx.kernels.encoding import Encoding, check_parts
from bnbx.kernels.memory import as_rows, check_memory, reshaped

Shape = tuple[int, int]
Multiply = Callable[[Encoding, Sequence[Tensor], Shape, Tensor, Tensor | None], Tensor]
MultiplyAcross = Callable[[Encoding, Sequence[Tensor], Shape, Tensor], Tensor | None]
DecodeColumns = Callable[[Encoding, Sequence[Tensor], Shape, int, Tensor], None]


@dataclass(frozen=True)
class Native:
    """What a native target does: products of a few rows, columns of the weight."""

    ready: Callable[[Encoding], object]
    multiply: Multiply
    multiply_many: Multiply
    """The same, faster for many rows."""
    multiply_across: MultiplyAcross
    """The product of a gradient with the weight, if there is a kernel for it."""
    decode_columns: DecodeColumns
    few_rows: Callable[[Encoding, torch.dtype, int], float]
    """Fewer rows than these, each of so many numbers, are multiplied as codes are read."""
    fast_panels: Callable[[torch.dtype], bool]
    """Whether panels may have a dtype; if not, gradients are made in float32."""


NATIVE = {
    "cpu": Native(
        linear_cpu.ready,
        linear_cpu.multiply,
        linear_tiles.multiply,
        linear_tiles.multiply_across,
        linear_cpu.decode_columns,
        linear_cpu.few_rows,
        linear_cpu.fast_panels,
    ),
    "cuda": Native(
        linear_cuda.ready,
        linear_cuda.multiply,
        linear_panels.multiply,
        lambda *_: None,
        linear_cuda.decode_columns,
        linear_cuda.few_rows,
        linear_cuda.fast_panels,
    ),
}


def linear(
    encoding: Encoding,
    parts: Sequence[Tensor],
    shape: Sequence[int],
    x: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """The product x @ weight.T + bias.

    Args:
        encoding: of the weight; see `bnbx.kernels.encoding`.
        parts: of the weight.
        shape: of the weight: (out, in).
        x: (..., in), float32, bfloat16 or float16, any strides; there may be no rows.
        bias: (out,), of the dtype of x.

    Returns:
        (..., out), of the dtype of x.

    Raises:
        QuantizedDataError: the parts do not fit the encoding and the shape.
        UnsupportedTensorError: x or bias has another dtype, layout, shape or device.
    """
    out, inner = _check_weight(encoding, parts, shape)
    _check_input("x", x, inner, parts[0].device)
    if bias is not None:
        _check_bias(bias, out, x)
    y = _multiply(encoding, parts, (out, inner), as_rows(x), bias)
    return reshaped(y, (*x.shape[:-1], out))


def grad_input(
    encoding: Encoding, parts: Sequence[Tensor], shape: Sequence[int], grad: Tensor
) -> Tensor:
    """The product grad @ weight: the gradient of `linear` for its input.

    Args:
        encoding: of the weight; see `bnbx.kernels.encoding`.
        parts: of the weight.
        shape: of the weight: (out, in).
        grad: (..., out), float32, bfloat16 or float16, any strides; there may be no rows.

    Returns:
        (..., in), of the dtype of grad.

    Raises:
        QuantizedDataError: the parts do not fit the encoding and the shape.
        UnsupportedTensorError: grad has another dtype, layout, shape or device.
    """
    out, inner = _check_weight(encoding, parts, shape)
    _check_input("grad", grad, out, parts[0].device)
    found = _grad_input(encoding, parts, (out, inner), as_rows(grad))
    return reshaped(found, (*grad.shape[:-1], inner))


def _multiply(
    encoding: Encoding, parts: Sequence[Tensor], shape: Shape, x: Tensor, bias: Tensor | None
) -> Tensor:
    if x.numel() == 0 or shape[0] == 0:
        y = x.new_zeros((x.shape[0], shape[0]))
        return y if bias is None else y + bias
    native = NATIVE.get(target_for(encoding, x.device.type))
    if native is not None:
        few = x.shape[0] < native.few_rows(encoding, x.dtype, shape[1])
        multiply = native.multiply if few else native.multiply_many
        return multiply(encoding, parts, shape, x, bias)
    return linear_panels.multiply(encoding, parts, shape, x, bias)


def _grad_input(encoding: Encoding, parts: Sequence[Tensor], shape: Shape, grad: Tensor) -> Tensor:
    if grad.numel() == 0 or shape[1] == 0:
        return grad.new_zeros((len(grad), shape[1]))
    native = NATIVE.get(target_for(encoding, grad.device.type))
    if native is None or not native.fast_panels(grad.dtype):
        return linear_panels.multiply_rows(encoding, parts, shape, grad)
    found = native.multiply_across(encoding, parts, shape, grad)
    if found is not None:
        return found
    decode = partial(native.decode_columns, encoding, parts, shape)
    return linear_panels.multiply_columns(decode, shape, grad)


@lru_cache(maxsize=1024)
def target_for(encoding: Encoding, device: str) -> str:
    """The target that runs products with a weight in an encoding on a type of device."""
    ready = {name: partial(native.ready, encoding) for name, native in NATIVE.items()}
    return targets.choose(device, ready, "Products with a quantized weight run").name


def _check_weight(
    encoding: Encoding, parts: Sequence[Tensor], shape: Sequence[int]
) -> tuple[int, int]:
    if len(shape) != 2:
        raise UnsupportedTensorError(
            f"the weight of a linear product has the shape (out, in), not {tuple(shape)}"
        )
    out, inner = shape
    if min(out, inner) < 0 or not _as_expected(parts, _expected(encoding, out, inner)):
        check_parts(encoding, shape, parts)
    for part in parts:
        if not part.data_ptr():
            check_memory(parts)  # some may be empty, and have no memory for that
            break
    return out, inner


def _as_expected(parts: Sequence[Tensor], expected: tuple[tuple[torch.dtype, int], ...]) -> bool:
    if len(parts) != len(expected):
        return False
    device = parts[0].device
    for part, (dtype, numel) in zip(parts, expected, strict=True):
        if part.dtype != dtype or part.numel() != numel or part.device != device:
            return False
        if not part.is_contiguous():
            return False
    return True


@lru_cache(maxsize=4096)
def _expected(encoding: Encoding, out: int, inner: int) -> tuple[tuple[torch.dtype, int], ...]:
    """What `check_parts` asks of parts, looked up: a product of one row has no time for more."""
    return tuple((dtype, prod(size)) for size, dtype in encoding.shapes((out, inner)).values())


def _check_input(what: str, x: Tensor, size: int, device: torch.device) -> None:
    if type(x) is not Tensor or x.dtype not in FLOATS or x.layout is not torch.strided:
        check_factor(what, x)
        check_numbers(what, x)
    if not x.data_ptr():
        check_memory((x,))
    if x.dim() == 0 or x.shape[-1] != size:
        raise UnsupportedTensorError(
            f"{what} has shape {tuple(x.shape)}; expected (..., {size}) for this weight"
        )
    if x.device != device:
        raise UnsupportedTensorError(
            f"{what} is on {x.device}, the weight on {device}: move one to the other"
        )


def _check_bias(bias: Tensor, out: int, x: Tensor) -> None:
    check_memory((bias,))
    if bias.dtype != x.dtype or bias.device != x.device or tuple(bias.shape) != (out,):
        raise UnsupportedTensorError(
            f"bias is {bias.dtype} of shape {tuple(bias.shape)} on {bias.device}; expected "
            f"{x.dtype} of shape ({out},) on {x.device}, as x and the weight have it"
        )
