"""The CUDA target without a GPU: rendered source, unmodified, run by `cuda_on_cpu`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from bnbx.kernels import cuda
from bnbx.kernels.batch import Batch
from bnbx.kernels.codebook import tables
from bnbx.kernels.plan import Plan
from cuda_on_cpu import compile_source
from cuda_on_cpu.build import Mode
from cuda_on_cpu.launch import Module


@lru_cache(maxsize=64)
def module(plan: Plan, mode: Mode, arch: int) -> Module:
    """The plan's kernels, compiled by g++ for the emulator."""
    return compile_source(cuda.source(plan), mode, cuda_arch=arch)


def run(
    batches: Sequence[Batch],
    *,
    schedule: int = 0,
    mode: Mode = "plain",
    arch: int = 800,
    grid: int = 2,
) -> None:
    """Update all batches, with the launches and arguments of `cuda.run`.

    A grid smaller than the work makes every warp go around its loop.
    """
    for batch in batches:
        plan = batch.plan
        table, chunks = batch.rows()
        counts = (len(table) - 1, chunks)
        # What is never written before it is read shows as NaN.
        parts, values = (
            np.full(-(-size // 8), np.nan) for size in cuda.measured_bytes(plan, *counts)
        )
        found_inf = np.zeros(1, np.float32)
        if batch.found_inf is not None:
            found_inf[:] = float(batch.found_inf)
        for launch in cuda.launches(
            plan,
            table,
            counts,
            batch.scalars,
            batch.packed_inputs(),
            found_inf,
            (parts, values),
            [tables(s.codebook).pack() for s in plan.codebooks],
        ):
            reached = {id(t): t for row in batch.tensors for t in row if t.numel()}
            module(plan, mode, arch).kernel(f"bnbx_{launch.name}")(
                grid,
                cuda.threads(plan),
                list(launch.arguments),
                schedule=schedule,
                buffers=list(reached.values()),
            )
