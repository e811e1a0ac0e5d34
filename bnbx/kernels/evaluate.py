"""The rule language on tensors: operations for the interpreter of `bnbx.registry.evaluate`."""

from __future__ import annotations

from typing import Any

from bnbx.registry.evaluate import COMMON, HOST, Operations, evaluate

__all__ = ["HOST", "Operations", "evaluate", "tensor_operations"]


def tensor_operations(dtype: Any, device: Any) -> Operations:
    """Operations on tensors of a floating dtype; numbers become 0-d tensors of it.

    `min`, `max` and `sign` are spelled with comparisons, as in the kernels, so that they treat
    NaN and signed zeros alike everywhere.
    """
    import torch

    def sqrt(x: Any) -> Any:
        # torch's float32 square root on a CPU is MKL's, which is not always rounded correctly;
        # by way of float64 it is, for every float32 number. MPS has no float64.
        wide = dtype is torch.float32 and getattr(device, "type", device) != "mps"
        return torch.sqrt(x.double()).to(dtype) if wide else torch.sqrt(x)

    one = torch.ones((), dtype=dtype, device=device)
    return {
        **COMMON,
        "number": lambda value: torch.tensor(value, dtype=dtype, device=device),
        "/": torch.div,
        "sqrt": sqrt,
        "abs": torch.abs,
        "sign": lambda x: torch.where(x > 0, one, torch.where(x < 0, -one, x)),
        "min": lambda a, b: torch.where(a < b, a, b),
        "max": lambda a, b: torch.where(a > b, a, b),
        "where": lambda condition, a, b: torch.where(condition != 0, a, b),
    }
