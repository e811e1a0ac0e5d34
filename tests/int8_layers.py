"""Int8 layers to test with, and inputs with outliers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bnbx.layers.int8 import Linear8bitLt


def layer(
    columns: int = 96, outs: int = 40, *, threshold: float = 6.0, frozen: bool = True, **more: Any
) -> Any:
    """A layer with weights that float16 holds, quantized if it is frozen."""
    torch.manual_seed(0)
    made = Linear8bitLt(columns, outs, has_fp16_weights=not frozen, threshold=threshold, **more)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(parameter.half())
    return made.to("cpu")


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """With outliers in two columns; float16 holds them."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    x[..., 5] *= 20
    x[..., 17] += 30
    return x.half().to(dtype)


def error(got: Tensor, expected: Tensor) -> float:
    wanted = expected.detach().double()
    return float((got.detach().double() - wanted).norm() / wanted.norm())
