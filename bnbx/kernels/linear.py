"""Products with a quantized weight, on the fastest target there is: what layers stand on.

No product makes a dense copy of the weight: one or a few rows of input are multiplied with the
codes as they are read, and for many rows the weight is decoded in panels that share one buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import inf, prod

import torch
from torch import Tensor

from bnbx.errors import UnsupportedTensorError
from bnbx.kernels import linear_cpu, linear_panels, targets
from bnbx.kernels.coding import check_numbers
from bnbx.kernels.encoding import Encoding, check_parts
from bnbx.kernels.linear_source import plan_for

Shape = tuple[int, int]
FEW_ROWS = {torch.float32: 64, torch.bfloat16: 12, torch.float16: inf}


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
    rows = x.detach().reshape(prod(x.shape[:-1]), inner)
    y = _multiply(encoding, parts, (out, inner), rows, bias if bias is None else bias.detach())
    return y.view(*x.shape[:-1], out)


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
    rows = grad.detach().reshape(prod(grad.shape[:-1]), out)
    return _grad_input(encoding, parts, (out, inner), rows).view(*grad.shape[:-1], inner)


def _multiply(
    encoding: Encoding, parts: Sequence[Tensor], shape: Shape, x: Tensor, bias: Tensor | None
) -> Tensor:
    if x.numel() == 0 or shape[0] == 0:
        y = x.new_zeros((len(x), shape[0]))
        return y if bias is None else y + bias
    target = choose(encoding, x.device.type)
    if target == "cpu" and len(x) < FEW_ROWS[x.dtype]:
        return linear_cpu.multiply(encoding, parts, shape, x, bias)
    return linear_panels.multiply(encoding, parts, shape, x, bias)


def _grad_input(encoding: Encoding, parts: Sequence[Tensor], shape: Shape, grad: Tensor) -> Tensor:
    if grad.numel() == 0 or shape[1] == 0:
        return grad.new_zeros((len(grad), shape[1]))
    if grad.dtype != torch.float16 and choose(encoding, grad.device.type) == "cpu":

        def decode(first: int, out: Tensor) -> None:
            linear_cpu.decode_columns(encoding, parts, shape, first, out)

        return linear_panels.multiply_columns(decode, shape, grad)
    return linear_panels.multiply_rows(encoding, parts, shape, grad)


@lru_cache(maxsize=1024)
def choose(encoding: Encoding, device: str) -> str:
    """The target that runs products with a weight in an encoding on a type of device."""
    ready = {"cpu": lambda: linear_cpu.kernel(plan_for(encoding, "float32"))}
    return targets.choose(device, ready, "a product with a quantized weight")


def _check_weight(
    encoding: Encoding, parts: Sequence[Tensor], shape: Sequence[int]
) -> tuple[int, int]:
    if len(shape) != 2:
        raise UnsupportedTensorError(
            f"the weight of a linear product has the shape (out, in), not {tuple(shape)}"
        )
    check_parts(encoding, shape, parts)
    return int(shape[0]), int(shape[1])


def _check_input(what: str, x: Tensor, size: int, device: torch.device) -> None:
    check_numbers(what, x)
    if x.dim() == 0 or x.shape[-1] != size:
        raise UnsupportedTensorError(
            f"{what} has shape {tuple(x.shape)}; expected (..., {size}) for this weight"
        )
    if x.device != device:
        raise UnsupportedTensorError(
            f"{what} is on {x.device}, the weight on {device}: move one to the other"
        )


def _check_bias(bias: Tensor, out: int, x: Tensor) -> None:
    if bias.dtype != x.dtype or bias.device != x.device or tuple(bias.shape) != (out,):
        raise UnsupportedTensorError(
            f"bias is {bias.dtype} of shape {tuple(bias.shape)} on {bias.device}; expected "
            f"{x.dtype} of shape ({out},) on {x.device}, as x and the weight have it"
        )
