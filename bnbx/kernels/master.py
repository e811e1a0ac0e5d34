"""How 16-bit parameters keep what rounding would lose, with torch operations.

`stochastic` rounds up or down at random so that the mean is right (Gupta et al.,
arXiv:1502.02551); `kahan` keeps the rounding error in the parameter's dtype and adds it back at
the next step (Kahan 1965; Zamirai et al., arXiv:2010.06192); `residual` keeps it as a fraction of
half a step of the parameter in 8 bits, which makes a 24-bit master of a bfloat16 parameter
(FlashOptim, arXiv:2602.23349). The error that is kept is rounded stochastically, unlike there:
with lr=1e-6 and weights near 1 an update is below the resolution of 24 bits too, and rounding to
nearest loses all of it. templates/master.h says the same in C; the bits are equal.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASTERS = ("none", "stochastic", "kahan", "residual")
MASK = 0xFFFFFFFF


def residual_dtype(master: str, parameter: torch.dtype) -> torch.dtype | None:
    """The dtype of the tensor that a master keeps beside a 16-bit parameter, if it keeps one."""
    return {"kahan": parameter, "residual": torch.int8}.get(master)


def master_that_keeps(residual: torch.dtype) -> str:
    """The master that keeps a tensor of this dtype."""
    return "residual" if residual is torch.int8 else "kahan"


def load(master: str, p: Tensor, residual: Tensor | None) -> Tensor:
    """The parameter in float32."""
    value = p.float()
    if residual is None:
        return value
    if master == "kahan":
        return value + residual.float()
    part = torch.full((), 1 / 127, dtype=torch.float32, device=p.device)
    return value + residual.float() * part * half_step(p)


def store(
    master: str, x: Tensor, p: Tensor, residual: Tensor | None, seed: int, first_place: int
) -> None:
    """Write `x` (float32) to the parameter (1-d), and what that loses to its residual."""
    if master == "none":
        p.copy_(x.to(p.dtype))
        return
    random = noise(seed, torch.arange(first_place, first_place + x.numel(), device=x.device))
    if residual is None:
        p.copy_(round_stochastically(x, random, p.dtype))
        return
    p.copy_(x.to(p.dtype))
    lost = x - p.float()
    if master == "kahan":
        lost = torch.where(lost.isfinite(), lost, torch.zeros_like(lost))
        residual.copy_(round_stochastically(lost, random, p.dtype))
        return
    half = half_step(p)
    part = lost * (1.0 / half) * 127.0
    part = torch.where(half > 0, part, torch.zeros_like(part))
    calm = 1 / 128 if p.dtype is torch.bfloat16 else 1 / 16  # see calm_zone in master.h
    part = part + ((random >> 9).float() * (1 / 8388608) * (1 - 2 * calm) + (calm - 0.5))
    part = torch.where(part > -127.0, part, torch.full_like(part, -127.0))
    part = torch.where(part < 127.0, part, torch.full_like(part, 127.0))
    residual.copy_(part.round())


def half_step(p: Tensor) -> Tensor:
    """Half the distance to the next larger magnitude; 0 where that is of no use."""
    bits = p.view(torch.int16).int() & 0x7FFF
    if p.dtype is torch.bfloat16:
        exponent = bits >> 7
        useful = (exponent >= 16) & (exponent != 0xFF)
        shifted = exponent - 8
    else:
        exponent = bits >> 10
        useful = exponent != 0x1F
        shifted = exponent.clamp(min=1) + 101
    half = (torch.where(useful, shifted, 1) << 23).view(torch.float32)
    return torch.where(useful, half, torch.zeros_like(half))


def noise(seed: int, places: Tensor) -> Tensor:
    """32 evenly distributed bits by seed and place, in int64."""
    x = (places & MASK) ^ (((places >> 32) * 0x9E3779B1) & MASK) ^ seed
    x = x ^ (x >> 16)
    x = _multiply(x, 0x7FEB352D)
    x = x ^ (x >> 15)
    x = _multiply(x, 0x846CA68B)
    return x ^ (x >> 16)


def _multiply(x: Tensor, factor: int) -> Tensor:
    """The low 32 bits of a product of 32-bit numbers; int64 has no room for all of it."""
    low = x * (factor & 0xFFFF)
    high = (x * (factor >> 16) & 0xFFFF) << 16
    return (low + high) & MASK


def round_stochastically(x: Tensor, random: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` (float32) in bfloat16 or float16, up or down by the bits of `random`.

    Only what rounding to nearest makes infinite becomes infinite.
    """
    bits = x.view(torch.int32).long() & MASK
    magnitude, sign = bits & 0x7FFFFFFF, bits & 0x80000000
    if dtype is torch.bfloat16:
        rounded = _finite(magnitude, (magnitude + (random & 0xFFFF)) & 0xFFFF0000, 0x7F7F0000)
    else:
        places = _floats(magnitude) * 16777216.0 + (random >> 18).float() * (1 / 16384)
        small = magnitude < 0x38800000
        places = torch.where(small, places, torch.zeros_like(places))
        steps = (places.int().float() * (1 / 16777216.0)).view(torch.int32).long()
        large = _finite(magnitude, (magnitude + (random & 0x1FFF)) & 0xFFFFE000, 0x477FE000)
        rounded = torch.where(small, steps, large)
    value = torch.where(magnitude < 0x7F800000, _floats(rounded | sign), x)
    return value.to(dtype)


def _finite(magnitude: Tensor, up: Tensor, largest: int) -> Tensor:
    """`up`, but the largest number where rounding to nearest would give that."""
    step = largest & -largest
    over = (magnitude < largest + step // 2) & (up == largest + step)
    return torch.where(over, torch.full_like(up, largest), up)


def _floats(bits: Tensor) -> Tensor:
    """Bits in int64 as float32."""
    signed = torch.where(bits >= 2**31, bits - 2**32, bits)
    return signed.int().view(torch.float32)
