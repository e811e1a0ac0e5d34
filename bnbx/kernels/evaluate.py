"""The rule language on tensors: operations for the interpreter of `bnbx.registry.evaluate`."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from bnbx.registry.evaluate import COMMON, HOST, Operations, evaluate

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "HOST",
    "Operations",
    "evaluate",
    "fused",
    "has_float64",
    "square_root",
    "tensor_operations",
]

PIECE = 1 << 20
"""Elements whose sums are computed at a time: 64 bytes each meanwhile."""


def square_root(x: Tensor) -> Tensor:
    """The square root of a tensor, rounded correctly where that is to be had.

    torch's on a CPU is MKL's, which is not, in float32 nor, on an Emerald Rapids, in float64: there
    it is off by a unit for 0.7 % of numbers, 2 among them. NumPy's is the processor's.
    """
    import numpy as np
    import torch

    if x.device.type != "cpu" or x.dtype != torch.float64:
        return torch.sqrt(x)
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(np.asarray(np.sqrt(x.detach().numpy())))


@lru_cache(maxsize=64)
def has_float64(device_type: str) -> bool:
    """Whether a kind of device computes in float64; Apple's and some of Intel's do not."""
    import torch

    try:
        torch.ones((), dtype=torch.float32, device=device_type).double().sqrt().float()
    except (RuntimeError, TypeError):
        return False
    return True


def fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The sum a * b + c of float32 tensors, rounded once; of large ones a piece at a time.

    The product is exact in float64. Of a sum that is not, the last bit is set (it is rounded to
    odd), so that rounding to float32 can take it neither for a number halfway between two nor for
    one on the other side of it. Source: Boldo and Melquiond, "Emulation of a FMA and correctly
    rounded sums", IEEE Transactions on Computers 57(4), 2008.
    """
    import numpy as np
    import torch

    shape = np.broadcast_shapes(a.shape, b.shape, c.shape)
    if math.prod(shape) <= PIECE:
        return _fused(a, b, c)
    flat = [x.expand(shape).reshape(-1) if x.dim() else x for x in (a, b, c)]
    found = torch.empty(shape, dtype=torch.float32, device=a.device)
    for start in range(0, found.numel(), PIECE):
        piece = slice(start, start + PIECE)
        found.view(-1)[piece] = _fused(*(x[piece] if x.dim() else x for x in flat))
    return found


def _fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    import torch

    product, c = a.double() * b.double(), c.double()
    total = product + c
    added = total - product
    lost = (product - (total - added)) + (c - added)  # of finite numbers, exactly
    bits = total.view(torch.int64)
    next_to = bits + torch.where((lost > 0) == (total > 0), 1, -1)
    odd = torch.where(((lost > 0) | (lost < 0)) & (bits % 2 == 0), next_to, bits)
    return odd.view(torch.float64).float()


def tensor_operations(dtype: Any, device: Any) -> Operations:
    """Operations on tensors of a floating dtype; numbers become 0-d tensors of it.

    `min`, `max` and `sign` are spelled with comparisons, as in the kernels, so that they treat
    NaN and signed zeros alike everywhere.
    """
    import torch

    # By way of float64 roots and sums are rounded correctly.
    wide = dtype is torch.float32 and has_float64(getattr(device, "type", device))

    def sqrt(x: Any) -> Any:
        return square_root(x.double()).to(dtype) if wide else square_root(x)

    def fma(a: Any, b: Any, c: Any) -> Any:
        return fused(a, b, c) if wide else a * b + c

    one = torch.ones((), dtype=dtype, device=device)
    return {
        **COMMON,
        "number": lambda value: torch.tensor(value, dtype=dtype, device=device),
        "/": torch.div,
        "sqrt": sqrt,
        "fma": fma,
        "fms": lambda a, b, c: fma(a, b, -c),
        "fnma": lambda a, b, c: fma(-a, b, c),
        "abs": torch.abs,
        "sign": lambda x: torch.where(x > 0, one, torch.where(x < 0, -one, x)),
        "min": lambda a, b: torch.where(a < b, a, b),
        "max": lambda a, b: torch.where(a > b, a, b),
        "where": lambda condition, a, b: torch.where(condition != 0, a, b),
    }
