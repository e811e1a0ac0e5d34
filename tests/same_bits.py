"""Equality to the last bit, and the inputs that bytes are compared on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def same_bits(a: Any, b: Any) -> bool:
    """Whether two tensors have the same shape, dtype and bytes; two others are equal."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and bool(a == b)
    alike = a.shape == b.shape and a.dtype == b.dtype
    return alike and torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    # A copy: of a single element, the stride may be any, which a view to bytes refuses.
    return tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def same_dicts(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """The same keys in the same order, and what they hold."""
    return list(a) == list(b) and all(same_bits(a[key], b[key]) for key in a)


def inputs(numel: int, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Numbers of many kinds, by name."""
    generator = torch.Generator().manual_seed(numel)
    normal = torch.randn(numel, generator=generator)
    spread = torch.exp(3 * torch.randn(numel, generator=generator))
    half_zero = normal.clone()
    half_zero[: numel // 2] = 0
    yield "normal", normal.to(dtype)
    yield "heavy tails", (normal * spread).clamp(-6e4, 6e4).to(dtype)
    yield "tiny", (normal * 1e-30).to(dtype)
    yield "subnormal", (normal * 1e-40).to(dtype)
    yield "zeros", half_zero.to(dtype)
    yield "ties", torch.randint(-8, 9, (numel,), generator=generator).to(dtype) / 8
    yield "one number", torch.full((numel,), 0.3).to(dtype)
    yield "large", (normal.clamp(-3, 3) * (1e4 if dtype == torch.float16 else 1e37)).to(dtype)
