"""Products of many rows with a quantized weight: panels of it are decoded into one small buffer.

torch multiplies with each panel, at its own speed; the dense weight never exists. Where torch is
slow with numbers of 16 bits, panels are float32, and so are pieces of x, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bnbx.kernels import coding, processor
from bnbx.kernels.encoding import Encoding

# What a panel takes of the dense weight's bytes, a twentieth of which is the limit for all memory.
# With each panel torch packs x anew; that of float32 x takes longer than decoding does. 512 rows by
# 4096 x 4096 take 125 ms with 1 / 32 on a thread of a Granite Rapids, 111 so (dense: 107).
SHARE, WIDE_SHARE = 1 / 32, 1 / 21
LEAST_BYTES, MOST_BYTES = 256 * 1024, 4 * 1024 * 1024  # of a panel: between the caches' sizes
# On a GPU each panel costs two launches, which take the host longer than it takes a GPU to multiply
# 16 rows with a whole 4096 x 4096 weight; 32 panels of that took 5 ms on an H100.
GPU_BYTES = 64 * 1024 * 1024
MULTIPLE = 16  # of a panel's rows or columns: what matrix products are fast with
PIECE_BYTES, MOST_ROWS = 384 * 1024, 256  # of x that are converted at a time
Pieces = tuple[Tensor, Tensor]  # room for a piece of x, and for its products with a panel
Decode = Callable[[int, Tensor], None]  # the columns from a number on, to a buffer


def dtype_of_panels(x: Tensor) -> torch.dtype:
    """What x is multiplied in."""
    return torch.float32 if x.device.type == "cpu" and processor.lacks_16_bits() else x.dtype


def panel_size(
    shape: tuple[int, int],
    across: int,
    itemsize: int,
    dense_itemsize: int = 0,
    device: str = "cpu",
) -> int:
    """How many rows or columns of the weight make a panel; it is the dimension `across`.

    Args:
        shape: of the weight.
        across: 0 for rows, 1 for columns.
        itemsize: of the panel's numbers.
        dense_itemsize: of a dense weight's, if it is not the same.
        device: type of the one that multiplies.
    """
    line = shape[1 - across] * itemsize  # bytes of one row or column
    dense_itemsize = dense_itemsize or itemsize
    share = WIDE_SHARE if dense_itemsize == torch.float32.itemsize else SHARE
    dense = shape[0] * shape[1] * dense_itemsize
    room = min(max(dense * share, LEAST_BYTES), MOST_BYTES) if device == "cpu" else GPU_BYTES
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
    dtype = dtype_of_panels(x)
    size = panel_size(shape, 0, dtype.itemsize, x.dtype.itemsize, x.device.type)
    room = x.new_empty((size, inner), dtype=dtype)
    y = x.new_empty((len(x), out))
    pieces = _room_for_pieces(x, dtype, inner, size)
    for first in range(0, out, size):
        panel = room[: out - first]
        coding.decode_rows(encoding, parts, shape, panel, first)
        here = slice(first, first + len(panel))
        _multiply_panel(x, panel.t(), None if bias is None else bias[here], y[:, here], pieces)
    return y


@torch.no_grad()
def multiply_columns(decode: Decode, shape: tuple[int, int], grad: Tensor) -> Tensor:
    """The product grad (rows, out) @ weight, by columns of the weight: each sum is made in one go.

    Args:
        decode: fills a buffer (out, some columns) with the columns from a number on.
        shape: of the weight.
        grad: of a dtype that torch is fast with; any, where panels are float32.
    """
    out, inner = shape
    dtype = dtype_of_panels(grad)
    size = panel_size(shape, 1, dtype.itemsize, grad.dtype.itemsize, grad.device.type)
    room = grad.new_empty(out * size, dtype=dtype)
    y = grad.new_empty((len(grad), inner))
    pieces = _room_for_pieces(grad, dtype, out, size)
    for first in range(0, inner, size):
        width = min(size, inner - first)
        panel = room[: out * width].view(out, width)
        decode(first, panel)
        _multiply_panel(grad, panel, None, y[:, first : first + width], pieces)
    return y


def _room_for_pieces(x: Tensor, dtype: torch.dtype, inner: int, width: int) -> Pieces | None:
    """What `_multiply_in_pieces` needs for panels (inner, width), if x has to be converted.

    Made once for all panels: made for each, it would leave gaps in the allocator's memory.
    """
    if x.dtype == dtype:
        return None
    rows = min(len(x), MOST_ROWS)
    columns = min(max(PIECE_BYTES // (rows * dtype.itemsize), MULTIPLE), inner)
    return x.new_empty((rows * columns,), dtype=dtype), x.new_empty((rows * width,), dtype=dtype)


def _multiply_panel(
    x: Tensor, panel: Tensor, bias: Tensor | None, y: Tensor, pieces: Pieces | None
) -> None:
    """Fill y with x @ panel + bias."""
    if pieces is not None:
        _multiply_in_pieces(x, panel, bias, y, pieces)
    elif bias is None:
        torch.mm(x, panel, out=y)
    else:
        torch.addmm(bias, x, panel, out=y)


def _multiply_in_pieces(
    x: Tensor, panel: Tensor, bias: Tensor | None, y: Tensor, pieces: Pieces
) -> None:
    """Fill y with x @ panel + bias, in the panel's dtype; never is all of x converted to it."""
    room, sums = pieces
    rows = min(len(x), MOST_ROWS)
    columns = len(room) // rows
    for first in range(0, len(x), rows):
        some, result = x[first : first + rows], y[first : first + rows]
        total = sums[: result.numel()].view(result.shape)
        total.copy_(bias) if bias is not None else total.zero_()
        for column in range(0, len(panel), columns):
            part = some[:, column : column + columns]
            piece = room[: part.numel()].view(part.shape).copy_(part)
            total.addmm_(piece, panel[column : column + columns])
        result.copy_(total)


@torch.no_grad()
def multiply_rows(
    encoding: Encoding, parts: Sequence[Tensor], shape: tuple[int, int], grad: Tensor
) -> Tensor:
    """The product grad (rows, out) @ weight, by rows of the weight: sums are kept in float32."""
    out, inner = shape
    size = panel_size(shape, 0, torch.float32.itemsize, grad.dtype.itemsize, grad.device.type)
    room = grad.new_empty((size, inner), dtype=torch.float32)
    y = grad.new_zeros((len(grad), inner), dtype=torch.float32)
    for first in range(0, out, size):
        panel = room[: out - first]
        coding.decode_rows(encoding, parts, shape, panel, first)
        torch.addmm(y, grad[:, first : first + len(panel)].float(), panel, out=y)
    return y.to(grad.dtype)
