"""Numbers with outliers, weights in codes, and shapes that fill no vector, tile or block."""

from __future__ import annotations

import torch
from torch import Tensor

from bnbx.kernels import int8_reference

# rows, columns, outputs: one row and few, tails of vectors, tiles, groups and blocks of rows.
SHAPES = (
    *((1, 64, 16), (1, 1, 1), (2, 65, 33), (3, 100, 7), (5, 64, 64), (6, 128, 17), (7, 513, 100)),
    *((13, 4100, 65), (70, 200, 130), (130, 64, 5)),
)


def numbers(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal numbers, and outliers in a few columns."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    if columns > 20:
        x[:, 3] *= 30
        x[0, columns // 2] = -50
        x[-1, columns - 1] = 6.0
    return x.to(dtype)


def weight(outs: int, columns: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(outs, columns, generator=generator) * 0.02
    codes, absmax, _ = int8_reference.quantize_rows(w, 0.0)
    return codes, absmax
