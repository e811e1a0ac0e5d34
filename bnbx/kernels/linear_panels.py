"""Products of many rows with a quantized weight: panels of it are decoded into one small buffer.

torch multiplies with each panel, at its own speed; the dense weight never exists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bnbx.kernels import coding
from bnbx.kernels.encoding import Encoding

SHARE = 1 / 32  # of the dense weight's bytes, what a panel takes
LEAST_BYTES, MOST_BYTES = 256 * 1024, 4 * 1024 * 1024  # of a panel: between the caches' sizes
MULTIPLE = 16  # of a panel's rows or columns: what matrix products are fast with
Decode = Callable[[int, Tensor], None]  # the columns from a number on, to a buffer


def panel_size(shape: tuple[int, int], across: int, itemsize: int) -> int:
    """How many rows or columns of the weight make a panel; it is the dimension `across`."""
    line = shape[1 - across] * itemsize  # bytes of one row or column
    room = min(max(line * shape[across] * SHARE, LEAST_BYTES), MOST_BYTES)
    size = max(int(room / line) // MULTIPLE * MULTIPLE, MULTIPLE)
    return min(size, shape[across])


@torch.no_grad()
def multiply(
    encoding: Encoding,
    parts: Sequence[Tensor],
    shape: tuple[int, int],
    x: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """The product x (rows, in) @ weight.T + bias; all sizes above 0."""
    out, inner = shape
    size = panel_size(shape, 0, x.dtype.itemsize)
    room = x.new_empty((size, inner))
    y = x.new_empty((len(x), out))
    for first in range(0, out, size):
        panel = room[: out - first]
        coding.decode_rows(encoding, parts, shape, panel, first)
        here = slice(first, first + len(panel))
        if bias is None:
            torch.mm(x, panel.t(), out=y[:, here])
        else:
            torch.addmm(bias[here], x, panel.t(), out=y[:, here])
    return y


@torch.no_grad()
def multiply_columns(decode: Decode, shape: tuple[int, int], grad: Tensor) -> Tensor:
    """The product grad (rows, out) @ weight, by columns of the weight: each sum is made in one go.

    Args:
        decode: fills a buffer (out, some columns) with the columns from a number on.
        shape: of the weight.
        grad: of float32 or bfloat16.
    """
    out, inner = shape
    size = panel_size(shape, 1, grad.dtype.itemsize)
    room = grad.new_empty(out * size)
    y = grad.new_empty((len(grad), inner))
    for first in range(0, inner, size):
        width = min(size, inner - first)
        panel = room[: out * width].view(out, width)
        decode(first, panel)
        torch.mm(grad, panel, out=y[:, first : first + width])
    return y


@torch.no_grad()
def multiply_rows(
    encoding: Encoding, parts: Sequence[Tensor], shape: tuple[int, int], grad: Tensor
) -> Tensor:
    """The product grad (rows, out) @ weight, by rows of the weight: sums are kept in float32."""
    out, inner = shape
    size = panel_size(shape, 0, torch.float32.itemsize)
    room = grad.new_empty((size, inner), dtype=torch.float32)
    y = grad.new_zeros((len(grad), inner), dtype=torch.float32)
    for first in range(0, out, size):
        panel = room[: out - first]
        coding.decode_rows(encoding, parts, shape, panel, first)
        torch.addmm(y, grad[:, first : first + len(panel)].float(), panel, out=y)
    return y.to(grad.dtype)
