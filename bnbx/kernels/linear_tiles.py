"""Products of many rows of bfloat16 by a CPU's matrix unit, where it has one that may be used.

The weight is decoded to what the unit reads (templates/cpu_linear_tiles.h), a panel at a time:
torch would pack each panel, and x with each of them. Elsewhere panels are torch's: `linear_panels`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bnbx.kernels import linear_cpu, linear_panels, threads
from bnbx.kernels.encoding import Encoding
from bnbx.kernels.linear_source import MOST_OUTPUTS, SIDE, SIDE_ACROSS

MOST_ROWS = 512  # of x at a time: their sums with a panel of the weight fit into the second cache
LEAST_ROWS = 64
WORK = 4  # a row of outputs takes about so much less time than elements that threads count by


class Pieces(NamedTuple):
    """How a product is cut up: rows of x and outputs at a time, and the floats of each thread."""

    rows: int
    outputs: int
    room: int


def multiply(
    encoding: Encoding,
    parts: Sequence[Tensor],
    shape: tuple[int, int],
    x: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """The product x (rows, in) @ weight.T + bias; all sizes above 0."""
    if not linear_cpu.has_tiles(encoding, x.dtype):
        return linear_panels.multiply(encoding, parts, shape, x, bias)
    return _multiply(encoding, parts, shape, x, bias, across=False)


def multiply_across(
    encoding: Encoding, parts: Sequence[Tensor], shape: tuple[int, int], grad: Tensor
) -> Tensor | None:
    """The product grad (rows, out) @ weight; None where there are no such products."""
    if not linear_cpu.has_tiles(encoding, grad.dtype):
        return None
    return _multiply(encoding, parts, shape, grad, None, across=True)


def _multiply(
    encoding: Encoding,
    parts: Sequence[Tensor],
    shape: tuple[int, int],
    x: Tensor,
    bias: Tensor | None,
    *,
    across: bool,
) -> Tensor:
    x = x if x.stride(1) == 1 else x.contiguous()
    bias = bias if bias is None else bias.contiguous()
    y = x.new_empty((len(x), shape[1 if across else 0]))
    library, job = linear_cpu.job_for(encoding, parts, shape, y)
    count, parallel = threads.threads_for(shape[0] * shape[1] // WORK)
    side = SIDE_ACROSS if across else SIDE
    pieces = cut(library, shape, len(x), count, y.shape[1], side)
    room = x.new_empty(count * pieces.room, dtype=torch.float32)
    job.inputs, job.x, job.room = len(x), x.data_ptr(), room.data_ptr()
    job.bias = None if bias is None else bias.data_ptr()
    library.bnbx_multiply_tiles(
        ctypes.byref(job), x.stride(0), pieces.rows, pieces.outputs, across, count, parallel
    )
    return y


def cut(
    library: ctypes.CDLL, shape: tuple[int, int], rows: int, count: int, outputs: int, side: int
) -> Pieces:
    """Pieces for so many threads, which together take no more than a panel of `linear_panels`."""
    dense = shape[0] * shape[1] * torch.bfloat16.itemsize
    share = max(dense * linear_panels.SHARE, linear_panels.LEAST_BYTES)
    share = share / torch.float32.itemsize / count
    rows = min(rows, MOST_ROWS)
    while rows > LEAST_ROWS and library.bnbx_room_for_tiles(rows, side) > share:
        rows //= 2
    most = int(share // library.bnbx_room_for_tiles(rows, side))
    outputs = max(min(most, MOST_OUTPUTS // side, -(-outputs // side)), 1) * side
    return Pieces(rows, outputs, library.bnbx_room_for_tiles(rows, outputs))
