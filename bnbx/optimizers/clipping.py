"""Percentile clipping: a gradient's norm is held to a percentile of the last 100 norms.

As bitsandbytes' `percentile_clipping`: per parameter, of the norms before any scaling, the first of
which fills the whole history. All of it stays on the parameter's device.
"""

from __future__ import annotations

import torch
from torch import Tensor

NORMS = "gnorm_vec"
HISTORY = 100


def clip_factor(g: Tensor, squares: Tensor, step: int, percentile: int) -> Tensor:
    """What to multiply a gradient by; the history takes in its norm.

    Args:
        g: the gradient.
        squares: squared norms of the last steps (100,), changed in place.
        step: number of the step, 1 for the first.
        percentile: 1 to 99; the norm at this place of the sorted history is the largest allowed.

    Returns:
        A float32 tensor of no dimensions, on the gradient's device: 1, or less. A gradient that
        is not finite is left as it is and does not enter the history.
    """
    square = g.float().square().sum()
    finite = square.isfinite()
    begun = squares.amax() > 0
    squares.copy_(torch.where(begun | ~finite, squares, square))
    place = step % HISTORY
    squares[place] = torch.where(finite, square, squares[place])
    allowed = squares.sort().values[percentile]
    over = finite & (square > allowed)
    one = torch.ones_like(square)
    return torch.where(over, (allowed / torch.where(over, square, one)).sqrt(), one)
