"""Results in memory of the caller's: written straight into it, wherever that does no harm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bnbx.functional import checks


def straight(*given: Tensor | None) -> bool:
    """Whether to write into memory: some is given, and this is no trace, which knows no memory."""
    return any(one is not None for one in given) and not torch.compiler.is_compiling()


def room(
    given: Tensor | None, shape: Sequence[int], dtype: torch.dtype, read: Sequence[Tensor]
) -> Tensor:
    """Memory for an operation to fill: what is given, or new where that cannot be.

    It cannot where elements do not lie side by side, or where what is read may lie among them.
    New memory is on the device of what is read.
    """
    # A single element counts as contiguous whatever its stride, which views to bytes refuse.
    fits = given is not None and given.is_contiguous() and given.numel() > 1
    if given is None or not fits or any(checks.overlap(given, tensor) for tensor in read):
        return torch.empty(tuple(shape), dtype=dtype, device=read[0].device)
    return given.detach().view(tuple(shape))


def kept(given: Tensor | None, made: Tensor) -> Tensor:
    """What was made; in the given memory, if there is some, which `room` may have been."""
    if given is None:
        return made
    if not torch.compiler.is_compiling() and checks.overlap(given, made):
        return given
    return given.copy_(made.view(given.shape))
