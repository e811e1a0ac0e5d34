"""The CUDA kernels that quantize and dequantize, without a GPU: see `emulated.py`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from bnbx.kernels import coding_cuda
from bnbx.kernels.coding_cpu import ascending_numbers
from bnbx.kernels.coding_source import CodingPlan
from bnbx.kernels.cuda_module import THREADS
from bnbx.kernels.dtypes import DTYPE_NAMES
from bnbx.kernels.encoding import Encoding
from cuda_on_cpu import compile_source
from cuda_on_cpu.build import Mode
from cuda_on_cpu.launch import Module


@lru_cache(maxsize=64)
def module(plan: CodingPlan, mode: Mode, arch: int) -> Module:
    """The plan's kernels, compiled by g++ for the emulator."""
    return compile_source(coding_cuda.source(plan), mode, cuda_arch=arch)


def held_parts(encoding: Encoding, parts: Sequence[Tensor]) -> dict[str, object]:
    second = encoding.second_tables
    found: dict[str, object] = dict(zip(encoding.parts, parts, strict=True))
    found["tables"] = encoding.tables.pack()
    if second is not None:
        found["second_tables"] = second.pack()
    return found


def encode(
    encoding: Encoding,
    x: Tensor,
    rand: Tensor | None = None,
    seed: int | None = None,
    *,
    schedule: int = 0,
    mode: Mode = "plain",
    arch: int = 800,
    grid: int = 2,
) -> list[Tensor]:
    """What `coding_cuda.encode` does; a grid smaller than the work makes warps go around."""
    plan = CodingPlan(encoding, DTYPE_NAMES[x.dtype], rand is not None or seed is not None)
    parts = [part.fill_(0) for part in encoding.empty(x.shape, x.device)]
    numbers = ascending_numbers(encoding)
    whole = np.array(coding_cuda.NOTHING, np.int32)
    noise = (rand, 0 if rand is None else rand.numel(), numbers, len(numbers), seed or 0)
    launches = coding_cuda.encode_launches(
        plan, x.shape, x, whole, held_parts(encoding, parts), noise
    )
    for launch in launches:
        module(plan, mode, arch).kernel(f"bnbx_{launch.name}")(
            grid, THREADS, list(launch.arguments), schedule=schedule
        )
    return parts


def decode(
    encoding: Encoding,
    parts: Sequence[Tensor],
    shape: Sequence[int],
    dtype: torch.dtype,
    start: int = 0,
    count: int | None = None,
    *,
    schedule: int = 0,
    mode: Mode = "plain",
    grid: int = 2,
) -> Tensor:
    """Elements from number `start` on, as `coding_cuda.decode` writes them."""
    count = int(np.prod(shape)) - start if count is None else count
    out = torch.full((count,), -7.0, dtype=dtype)
    plan = CodingPlan(encoding, DTYPE_NAMES[dtype])
    launch = coding_cuda.decode_launch(plan, shape, out, start, count, held_parts(encoding, parts))
    module(plan, mode, 800).kernel("bnbx_decode")(
        grid, THREADS, list(launch.arguments), schedule=schedule
    )
    return out
