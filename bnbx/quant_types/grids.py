"""Number grids in float32 arithmetic, from which tables are built.

The tables of 8-bit types are compatible with files other libraries wrote, so they must come out
the same to the last bit; those libraries build them with torch.linspace in float32.
"""

from __future__ import annotations

from itertools import pairwise

from bnbx.registry.quant_type import float32


def linspace(start: float, end: float, count: int) -> list[float]:
    """`count` evenly spaced float32 numbers, rounded as torch.linspace rounds them.

    It counts up from `start` in the first half and down from `end` in the second, each sum
    rounded once (a fused multiply-add).
    """
    start, end = float32(start), float32(end)
    if count == 1:
        return [start]
    step = float32(float32(end - start) / (count - 1))
    half = count // 2
    return [
        float32(start + step * i) if i < half else float32(end - step * (count - 1 - i))
        for i in range(count)
    ]


def midpoints(grid: list[float]) -> list[float]:
    """The float32 mid-points between neighbors."""
    return [float32(float32(low + high) / 2) for low, high in pairwise(grid)]
