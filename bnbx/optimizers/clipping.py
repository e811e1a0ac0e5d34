"""Percentile clipping: a gradient's norm is held to a percentile of the last 100 norms.

As bitsandbytes' `percentile_clipping`: per parameter, of the norms of unscaled gradients, the first
of which fills the whole history. All of it stays on the parameter's device.
"""

from __future__ import annotations

import torch
from torch import Tensor

NORMS = "gnorm_vec"
HISTORY = 100
ROW = 4096  # elements summed in a row; torch sums each row in one order on any number of threads


def clip_factor(
    g: Tensor,
    squares: Tensor,
    step: int,
    percentile: int,
    *,
    scale: Tensor,
    found_inf: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What to multiply a gradient by, and the history with its norm.

    Args:
        g: the gradient, dense or of sparse rows.
        squares: squared norms of the last steps (100,); they stay as they are.
        step: number of the step, 1 for the first.
        percentile: 1 to 99; the norm at this place of the sorted history is the largest allowed.
        scale: what a kernel multiplies the gradient by before all else (1,).
        found_inf: not zero where the step is going to be left out (1,), or None.

    Returns:
        A float32 tensor (1,) on the gradient's device, 1 or less, and the history after the step.
        A gradient that is not finite is left as it is and does not enter the history; nor does
        that of a step which is left out.
    """
    square = _sum_of_squares(g, scale)
    finite = square.isfinite()
    entering = finite
    if found_inf is not None:
        entering = entering & (found_inf.to(g.device, non_blocking=True) == 0)
    begun = squares.amax() > 0
    place = torch.arange(HISTORY, device=g.device) == step % HISTORY
    norms = torch.where(entering & (place | ~begun), square, squares)
    allowed = norms.sort().values[percentile]
    over = finite & (square > allowed)
    one = torch.ones_like(square)
    return torch.where(over, (allowed / torch.where(over, square, one)).sqrt(), one), norms


def _sum_of_squares(g: Tensor, scale: Tensor) -> Tensor:
    """The squared norm of `g * scale` (1,), the same bits on any number of threads."""
    values = g.coalesce().values() if g.is_sparse else g
    sums = (values.reshape(-1).float() * scale).square()
    while sums.numel() != 1:
        sums = torch.nn.functional.pad(sums, (0, -sums.numel() % ROW or ROW * (not sums.numel())))
        sums = sums.view(-1, ROW).sum(1)
    return sums
