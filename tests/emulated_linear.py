"""The CUDA kernels of products with quantized weights, without a GPU: see `emulated.py`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from bnbx.kernels import linear_cuda
from bnbx.kernels.cuda_module import THREADS, Launch
from bnbx.kernels.dtypes import DTYPE_NAMES
from bnbx.kernels.encoding import Encoding
from bnbx.kernels.linear_source import LinearPlan, plan_for
from cuda_on_cpu import compile_source
from cuda_on_cpu.build import Mode
from cuda_on_cpu.launch import Module
from emulated_coding import held_parts


@lru_cache(maxsize=64)
def module(plan: LinearPlan, mode: Mode) -> Module:
    """The plan's kernels, compiled by g++ for the emulator."""
    return compile_source(linear_cuda.source(plan), mode)


def _run(plan: LinearPlan, each: Launch, mode: Mode, schedule: int, grid: int) -> None:
    kernel = module(plan, mode).kernel(f"bnbx_{each.name}")
    kernel(max(min(each.blocks, grid), 1), THREADS, list(each.arguments), schedule=schedule)


def multiply(
    encoding: Encoding,
    parts: Sequence[Tensor],
    shape: tuple[int, int],
    x: Tensor,
    bias: Tensor | None,
    *,
    mode: Mode = "plain",
    schedule: int = 0,
    grid: int = 2,
) -> Tensor:
    """What `linear_cuda.multiply` does; a grid smaller than the work makes blocks go around."""
    plan = plan_for(encoding, DTYPE_NAMES[x.dtype])
    y = torch.full((len(x), shape[0]), -7.0, dtype=x.dtype)
    held = held_parts(encoding, parts)
    for each in linear_cuda.multiply_launches(shape, x, bias, y, held):
        _run(plan, each, mode, schedule, grid)
    return y


def decode_columns(
    encoding: Encoding,
    parts: Sequence[Tensor],
    shape: tuple[int, int],
    first: int,
    out: Tensor,
    *,
    mode: Mode = "plain",
    grid: int = 2,
) -> None:
    """What `linear_cuda.decode_columns` does."""
    each = linear_cuda.decode_launch(shape, first, out, held_parts(encoding, parts))
    _run(plan_for(encoding, DTYPE_NAMES[out.dtype]), each, mode, 0, grid)
