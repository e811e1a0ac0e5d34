"""The CPU target: plans compiled as C++ at run time and run on torch's own pool of threads."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from bnbx.kernels import threads
from bnbx.kernels.batch import Batch
from bnbx.kernels.c_struct import ctypes_fields
from bnbx.kernels.codebook import tables
from bnbx.kernels.library import RUN, address, compiled
from bnbx.kernels.plan import Plan
from bnbx.kernels.signature import JOB, make_signature
from bnbx.kernels.source import render

TEMPLATE = "optimizer.cpp.j2"
ALIGNMENT = 64  # a cache line, and the widest vector


class Job(ctypes.Structure):
    """The struct `Job` of optimizer.cpp.j2."""

    _fields_ = ctypes_fields(JOB)


class Kernel:
    """A compiled plan, with the codebook tables it reads."""

    def __init__(self, plan: Plan) -> None:
        # A library that updates nothing is refused.
        self.library = compiled(render(plan, TEMPLATE), {**RUN, "bnbx_update": ((), None)})
        passes = ("measure", "reduce") if plan.measured else ()
        self.entries = {name: address(self.library, name) for name in ("update", *passes)}
        signature = make_signature(plan)
        self.part_bytes, self.values_bytes = signature.part_bytes, signature.values_bytes
        self.tables = [aligned(tables(s.codebook).pack()) for s in plan.codebooks]
        self.table_pointers = np.array([t.ctypes.data for t in self.tables], np.int64)
        self.tables_address = _address(self.table_pointers)


@lru_cache(maxsize=256)
def kernel(plan: Plan) -> Kernel:
    """The kernel of `plan`, compiled or read from the cache on first use.

    Raises:
        CompileError: there is no compiler, or it refuses the source.
    """
    return Kernel(plan)


def run(batches: Sequence[Batch]) -> None:
    """Update all batches in one native call, split over the threads by elements."""
    batches = [b for b in batches if b.found_inf is None or not bool(b.found_inf)]
    if not batches:
        return
    kernels = [kernel(batch.plan) for batch in batches]
    alive: list[npt.NDArray[Any]] = []
    table = (Job * len(batches))()
    for job, batch, native in zip(table, batches, kernels, strict=True):
        rows, chunks = batch.rows()
        given: list[npt.NDArray[Any]] = [rows, batch.scalars, batch.packed_inputs()]
        job.row_count, job.chunk_count = len(rows) - 1, chunks
        job.rows, job.scalars, job.inputs = (_address(array) for array in given)
        job.tables = native.tables_address
        if batch.plan.measured:
            sizes = (native.part_bytes * chunks, native.values_bytes * job.row_count)
            room = [np.empty(-(-size // 8), np.float64) for size in sizes]
            job.parts, job.values = (_address(array) for array in room)
            given += room
            job.measure, job.reduce = native.entries["measure"], native.entries["reduce"]
        job.update = native.entries["update"]
        alive += given
    count, parallel = threads.threads_for(sum(t[0].numel() for b in batches for t in b.tensors))
    kernels[0].library.bnbx_run(table, len(table), count, parallel)


def _address(array: npt.NDArray[Any]) -> int:
    return int(array.ctypes.data)


def aligned(array: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """A copy of `array` that begins on a cache line."""
    room = np.zeros(array.nbytes + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    copy = room[start : start + array.nbytes]
    copy[:] = array
    return copy
