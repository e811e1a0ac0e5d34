"""The CPU target: plans compiled as C++ at run time and run on torch's own pool of threads."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from bnbx.kernels.batch import Batch
from bnbx.kernels.cache import key_of, load_or_build
from bnbx.kernels.codebook import tables
from bnbx.kernels.compiler import find_compiler
from bnbx.kernels.plan import Plan
from bnbx.kernels.source import render

TEMPLATE = "optimizer.cpp.j2"
ELEMENTS_PER_THREAD = 32_768  # about 20 microseconds of work, what waking a thread may cost
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
        threads, parallel = _threads(sum(t[0].numel() for b in batches for t in b.tensors))
        kernels[0].library.bnbx_run(table.ctypes.data, len(jobs), threads, parallel)


def aligned(array: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """A copy of `array` that begins on a cache line."""
    room = np.zeros(array.nbytes + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    copy = room[start : start + array.nbytes]
    copy[:] = array
    return copy


# ---- threads

_forked = False


def _after_fork() -> None:
    global _forked  # noqa: PLW0603 - a fact about the process
    _forked = True


# The OpenMP pool does not survive a fork: a child that enters it waits forever. Torch's data
# loader workers and forked trainers therefore step on one thread.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _threads(elements: int) -> tuple[int, int | None]:
    """How many threads to use for so many elements, and the address of the pool's entry."""
    wanted = min(torch.get_num_threads(), elements // ELEMENTS_PER_THREAD)
    parallel = _parallel() if wanted > 1 and not _forked else None
    return (wanted if parallel else 1), parallel


@lru_cache(maxsize=1)
def _parallel() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that torch has loaded; None without one.

    LLVM's libomp has that entry too, so this finds it on macOS as well.
    """
    bundled = Path(torch.__file__).parent / "lib"
    names = ["libgomp.so.1", *map(str, sorted(bundled.glob("lib*omp*")))]
    for name in names:
        try:
            entry = ctypes.CDLL(name).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(entry, ctypes.c_void_p).value
    return None
