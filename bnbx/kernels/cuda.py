"""The CUDA target: plans compiled by NVRTC through CuPy, launched on torch's current stream.

One launch updates all tensors of a batch; where the plan is measured, two more come before it. A
step never waits for the device: the row table and
the scalars travel from pinned memory on the same stream as the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnbx.kernels.batch import Batch
from bnbx.kernels.codebook import tables
from bnbx.kernels.cuda_module import LANES, PIECE, CudaModule, Launch, warps
from bnbx.kernels.plan import Plan
from bnbx.kernels.signature import make_signature
from bnbx.kernels.source import render

TEMPLATE = "optimizer.cu.j2"


def source(plan: Plan) -> str:
    """CUDA source of `plan`."""
    return render(plan, TEMPLATE)


def threads(plan: Plan) -> int:
    """Threads of a launched block."""
    return warps(plan.longest) * LANES


class Kernel:
    """A compiled plan on one device, with its codebook tables there."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        names = ("measure", "reduce", "update") if plan.measured else ("update",)
        self.module = CudaModule(source(plan), names, device, plan.describe())
        self.tables = [
            torch.from_numpy(tables(s.codebook).pack()).to(device) for s in plan.codebooks
        ]
        self.zero = torch.zeros(1, dtype=torch.float32, device=device)


def kernel(plan: Plan) -> Kernel:
    """The kernel of `plan` on torch's current device, compiled on first use.

    Raises:
        TargetError: CuPy is missing, or NVRTC refuses the source.
    """
    return _kernel(plan, torch.cuda.current_device())


@lru_cache(maxsize=256)
def _kernel(plan: Plan, index: int) -> Kernel:
    return Kernel(plan, torch.device("cuda", index))


def launches(
    plan: Plan,
    rows: Any,
    counts: tuple[int, int],
    scalars: Any,
    inputs: Any,
    found_inf: Any,
    room: tuple[Any, Any],
    codebooks: Sequence[Any],
) -> list[Launch]:
    """The kernels that update a batch, in order; memory as the launcher holds it.

    `counts` are those of rows and chunks, `room` is for parts and values (`measured_bytes`).
    """
    row_count, chunk_count = map(np.int64, counts)
    blocks = -(-counts[1] * plan.chunk // (warps(plan.longest) * PIECE))
    start = (rows, row_count, chunk_count, scalars, inputs, found_inf)
    if not plan.measured:
        return [Launch("update", blocks, (*start, *codebooks))]
    parts, values = room
    return [
        Launch("measure", blocks, (*start, parts, *codebooks)),
        Launch("reduce", counts[0], (rows, row_count, inputs, found_inf, parts, values)),
        Launch("update", blocks, (*start, values, *codebooks)),
    ]


def measured_bytes(plan: Plan, row_count: int, chunk_count: int) -> tuple[int, int]:
    """Bytes for the parts and the values of a launch; at least one each."""
    signature = make_signature(plan)
    pieces = chunk_count * plan.chunk // PIECE
    return max(signature.part_bytes * pieces, 8), max(signature.values_bytes * row_count, 8)


def run(batches: Sequence[Batch]) -> None:
    """Update all batches, on the current stream of their device."""
    for batch in batches:
        device = batch.tensors[0][0].device
        compiled = _kernel(batch.plan, device.index)
        table, chunks = batch.rows()
        if chunks == 0:
            continue
        counts = (len(table) - 1, chunks)
        kept = [_send(array, device) for array in (table, batch.scalars, batch.packed_inputs())]
        kept.append(compiled.zero if batch.found_inf is None else batch.found_inf.float())
        sizes = measured_bytes(batch.plan, *counts)
        kept += [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]
        rows, scalars, inputs, found_inf, parts, values = kept
        room = (parts, values)
        queue = launches(
            batch.plan, rows, counts, scalars, inputs, found_inf, room, compiled.tables
        )
        compiled.module.launch(queue, threads(batch.plan))


def _send(array: Any, device: torch.device) -> Tensor:
    """Copy to the device without waiting; torch keeps the pinned memory until it has arrived."""
    return torch.from_numpy(array).pin_memory().to(device, non_blocking=True)
