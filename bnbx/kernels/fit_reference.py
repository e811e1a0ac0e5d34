"""The sums that a fit of scales is made of, with torch operations: any device.

`fit_cpu.py` and `fit_cuda.py` have the same functions in C++ and CUDA; sums differ in their last
bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bnbx.kernels.coding_reference import levels_on, search_on
from bnbx.kernels.encoding import Encoding
from bnbx.kernels.packing import pack, unpack


def sums(
    encoding: Encoding,
    x: Tensor,
    factor: Tensor,
    inverse: Tensor,
    center: Tensor | None,
    norm: Tensor,
    codes: Tensor | None,
) -> Tensor:
    """What a scale does to each block, and what least squares need.

    Args:
        encoding: of the codes.
        x: (blocks, elements) float32, or a piece of longer blocks.
        factor: (blocks,), what levels are multiplied by.
        inverse: what x, less the center, is multiplied by to find its nearest code.
        center: what is added; None in encodings that have no centers.
        norm: what x and differences are multiplied by, so that squares stay in range.
        codes: (blocks, bytes) to take; None for the nearest.

    Returns:
        (5, blocks): the sum of squared differences, and with q the levels, the sums of q * x,
        q * q, and if there is a center, of q and of x.
    """
    levels = levels_on(encoding, x.device)
    if codes is None:
        _, order = search_on(encoding, x.device)
        q = levels[order.int()][_ranks(encoding, x, inverse, center)]
    else:
        q = levels[unpack(codes, encoding.quant_type, x.shape[1]).int()]
    value = q * factor[:, None]
    value = value if center is None else value + center[:, None]
    off = (x - value) * norm[:, None]
    x = x * norm[:, None]
    zero = torch.zeros_like(norm)
    q_sum, x_sum = (zero, zero) if center is None else (q.sum(1), x.sum(1))
    return torch.stack([(off * off).sum(1), (q * x).sum(1), (q * q).sum(1), q_sum, x_sum])


def write(
    encoding: Encoding,
    x: Tensor,
    inverse: Tensor,
    center: Tensor | None,
    changed: Tensor,
    codes: Tensor,
) -> None:
    """Pack the nearest codes of the blocks that have changed into `codes` (blocks, bytes)."""
    _, order = search_on(encoding, x.device)
    new = pack(order[_ranks(encoding, x, inverse, center)], encoding.quant_type)
    codes.copy_(torch.where(changed[:, None], new, codes))


def _ranks(encoding: Encoding, x: Tensor, inverse: Tensor, center: Tensor | None) -> Tensor:
    thresholds, _ = search_on(encoding, x.device)
    scaled = x * inverse[:, None] if center is None else (x - center[:, None]) * inverse[:, None]
    return torch.bucketize(scaled, thresholds, out_int32=True)
