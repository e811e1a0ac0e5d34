"""What torch is fast with on this machine's processor."""

from __future__ import annotations

import platform
from functools import lru_cache

import torch


@lru_cache(maxsize=1)
def lacks_16_bits() -> bool:
    """Whether torch multiplies float32 faster on the CPU than bfloat16 and float16.

    It does on x86 without AVX-512, where each number is converted by itself: 512 rows times a
    4096 x 4096 weight take 200 ms in float32 on a thread of a Zen 3, 1600 in bfloat16 and 1250 in
    float16; the gradient to them takes 68 s in bfloat16. With AVX-512, bfloat16 is several times as
    fast as float32.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    return torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
