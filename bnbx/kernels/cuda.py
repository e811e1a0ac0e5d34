"""The CUDA target: plans compiled by NVRTC through CuPy, launched on torch's current stream.

One launch updates all tensors of a batch. A step never waits for the device: the row table and
the scalars travel from pinned memory on the same stream as the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnbx.errors import TargetError
from bnbx.kernels.batch import Batch
from bnbx.kernels.codebook import tables
from bnbx.kernels.plan import Plan
from bnbx.kernels.source import render

TEMPLATE = "optimizer.cu.j2"
# No multiply-add contraction: a step has the same bits on every target.
OPTIONS = ("--std=c++17", "--fmad=false")
THREADS = 256
PIECE = 256  # elements that a warp takes at a time; blocks of states fit into it
PIECES_PER_LAUNCHED_BLOCK = THREADS // 32
BLOCKS_PER_MULTIPROCESSOR = 8
HOW_TO = "pip install 'bnbx[cuda13]' (or 'bnbx[cuda12]', for the CUDA version of your driver)"


def source(plan: Plan) -> str:
    """CUDA source of `plan`.

    Raises:
        TargetError: the plan has blocks that are longer than a warp's piece.
    """
    for storage in plan.quantized:
        if storage.block_size > PIECE:
            raise TargetError(
                f"CUDA kernels have blocks of at most {PIECE} elements; "
                f"state {storage.state.name!r} has {storage.block_size}"
            )
    return render(plan, TEMPLATE)


class Kernel:
    """A compiled plan on one device, with its codebook tables there."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        cupy = _cupy()
        with torch.cuda.device(device):
            module = cupy.RawModule(code=source(plan), options=OPTIONS)
            try:
                self.function = module.get_function("bnbx_update")
            except cupy.cuda.compiler.CompileException as error:
                raise TargetError(
                    f"NVRTC refused the kernel of {plan.describe()}: {error}"
                ) from error
        self.tables = [
            torch.from_numpy(tables(s.codebook).pack()).to(device) for s in plan.codebooks
        ]
        self.most_blocks = (
            torch.cuda.get_device_properties(device).multi_processor_count
            * BLOCKS_PER_MULTIPROCESSOR
        )


def _cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise TargetError(f"CuPy is not installed ({error})") from None
    return cupy


def kernel(plan: Plan) -> Kernel:
    """The kernel of `plan` on torch's current device, compiled on first use.

    Raises:
        TargetError: CuPy is missing, or NVRTC refuses the source.
    """
    return _kernel(plan, torch.cuda.current_device())


@lru_cache(maxsize=256)
def _kernel(plan: Plan, index: int) -> Kernel:
    return Kernel(plan, torch.device("cuda", index))


def run(batches: Sequence[Batch]) -> None:
    """Update all batches, one launch each, on the current stream of their device."""
    cupy = _cupy()
    for batch in batches:
        device = batch.tensors[0][0].device
        compiled = _kernel(batch.plan, device.index)
        table, chunks = batch.rows()
        pieces = chunks * batch.plan.chunk // PIECE
        if pieces == 0:
            continue
        rows, scalars = _send(table, device), _send(batch.scalars, device)
        sizes = (np.int64(len(table) - 1), np.int64(chunks))
        pointers = [np.uint64(t.data_ptr()) for t in (scalars, *compiled.tables)]
        grid = min(-(-pieces // PIECES_PER_LAUNCHED_BLOCK), compiled.most_blocks)
        stream = torch.cuda.current_stream(device)
        with cupy.cuda.Device(device.index), cupy.cuda.ExternalStream(stream.cuda_stream):
            compiled.function((grid,), (THREADS,), (np.uint64(rows.data_ptr()), *sizes, *pointers))


def _send(array: Any, device: torch.device) -> Tensor:
    """Copy to the device without waiting; torch keeps the pinned memory until it has arrived."""
    return torch.from_numpy(array).pin_memory().to(device, non_blocking=True)
