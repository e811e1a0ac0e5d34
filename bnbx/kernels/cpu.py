"""The CPU target: plans compiled as C++ at run time and run on torch's own pool of threads."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bnbx.kernels import threads
from bnbx.kernels.batch import Batch
from bnbx.kernels.cache import key_of, load_or_build
from bnbx.kernels.codebook import tables
from bnbx.kernels.compiler import find_compiler
from bnbx.kernels.plan import Plan
from bnbx.kernels.source import render

TEMPLATE = "optimizer.cpp.j2"
ALIGNMENT = 64  # a cache line, and the widest vector


class Kernel:
    """A compiled plan, with the codebook tables it reads."""

    def __init__(self, plan: Plan) -> None:
        source = render(plan, TEMPLATE)
        compiler = find_compiler()
        key = key_of(source, *compiler.key())
        library = load_or_build(key, source, ".cpp", compiler.compile, _open)
        self.library = library
        self.update = ctypes.cast(library.bnbx_update, ctypes.c_void_p).value or 0
        self.tables = [aligned(tables(s.codebook).pack()) for s in plan.codebooks]
        self.table_pointers = np.array([t.ctypes.data for t in self.tables], np.int64)


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.bnbx_run.argtypes = [pointer, integer, integer, pointer]
    library.bnbx_run.restype = None
    _ = library.bnbx_update  # a library without it is refused here
    return library


@lru_cache(maxsize=256)
def kernel(plan: Plan) -> Kernel:
    """The kernel of `plan`, compiled or read from the cache on first use.

    Raises:
        CompileError: there is no compiler, or it refuses the source.
    """
    return Kernel(plan)


def run(batches: Sequence[Batch]) -> None:
    """Update all batches in one native call, split over the threads by elements."""
    kernels = [kernel(batch.plan) for batch in batches]
    alive, jobs = [], []
    for batch, compiled in zip(batches, kernels, strict=True):
        rows, chunks = batch.rows()
        alive.append(rows)
        jobs.append(
            [
                rows.ctypes.data,
                len(rows) - 1,
                chunks,
                batch.scalars.ctypes.data,
                compiled.table_pointers.ctypes.data,
                compiled.update,
            ]
        )
    if jobs:
        table = np.array(jobs, np.int64)
        count, parallel = threads.threads_for(sum(t[0].numel() for b in batches for t in b.tensors))
        kernels[0].library.bnbx_run(table.ctypes.data, len(jobs), count, parallel)


def aligned(array: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """A copy of `array` that begins on a cache line."""
    room = np.zeros(array.nbytes + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    copy = room[start : start + array.nbytes]
    copy[:] = array
    return copy
