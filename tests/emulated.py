"""The CUDA target without a GPU: rendered source, unmodified, run by `cuda_on_cpu`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from bnbx.kernels import cuda
from bnbx.kernels.batch import Batch
from bnbx.kernels.codebook import tables
from bnbx.kernels.plan import Plan
from cuda_on_cpu import Kernel, compile_source
from cuda_on_cpu.build import Mode


@lru_cache(maxsize=64)
def kernel(plan: Plan, mode: Mode, arch: int) -> Kernel:
    """The plan's kernel, compiled by g++ for the emulator."""
    return compile_source(cuda.source(plan), mode, cuda_arch=arch).kernel("bnbx_update")


def run(
    batches: Sequence[Batch],
    *,
    schedule: int = 0,
    mode: Mode = "plain",
    arch: int = 800,
    grid: int = 2,
) -> None:
    """Update all batches, with the arguments that `cuda.run` would pass.

    A grid smaller than the work makes every warp go around its loop.
    """
    for batch in batches:
        table, chunks = batch.rows()
        codebooks = [tables(s.codebook).pack() for s in batch.plan.codebooks]
        kernel(batch.plan, mode, arch)(
            grid,
            cuda.THREADS,
            [table, np.int64(len(table) - 1), np.int64(chunks), batch.scalars, *codebooks],
            schedule=schedule,
            buffers=[tensor for row in batch.tensors for tensor in row if tensor.numel()],
        )
