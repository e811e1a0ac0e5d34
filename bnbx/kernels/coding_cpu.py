"""Quantize and dequantize on a CPU: C++ compiled at run time, on torch's own pool of threads."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from torch import Tensor

from bnbx.kernels import threads
from bnbx.kernels.c_struct import ctypes_fields
from bnbx.kernels.coding_source import JOB, PARTS, CodingPlan, render_coding
from bnbx.kernels.cpu import aligned
from bnbx.kernels.dtypes import DTYPE_NAMES
from bnbx.kernels.encoding import Encoding
from bnbx.kernels.library import RUN, address, compiled
from bnbx.kernels.memory import in_large_pages

TEMPLATE = "coding.cpp.j2"
U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]


class Job(ctypes.Structure):
    """The struct `Job` of coding.cpp.j2."""

    _fields_ = ctypes_fields(JOB, Parts=PARTS)


class Kernel:
    """A compiled plan."""

    def __init__(self, plan: CodingPlan) -> None:
        self.library = compiled(render_coding(plan, TEMPLATE), RUN)
        names = ("encode", "decode", "measure")
        self.entries = {name: address(self.library, name) for name in names}

    def run(self, job: Job, work: str, elements: int) -> None:
        """Run a phase of the kernel on as many threads as `elements` are worth."""
        job.update = self.entries[work]
        count, parallel = threads.threads_for(elements)
        self.library.bnbx_run(ctypes.byref(job), 1, count, parallel)


@lru_cache(maxsize=512)
def kernel(plan: CodingPlan) -> Kernel:
    """The kernel of `plan`, compiled or read from the cache on first use.

    Raises:
        CompileError: there is no compiler, or it refuses the source.
    """
    return Kernel(plan)


@lru_cache(maxsize=512)
def packed_tables(encoding: Encoding) -> tuple[U8, U8 | None]:
    """The tables of an encoding as kernels read them: of codes, and of scales if there are any."""
    second = encoding.second_tables
    return aligned(encoding.tables.pack()), aligned(second.pack()) if second else None


@lru_cache(maxsize=512)
def ascending_numbers(encoding: Encoding) -> F32:
    """The numbers that codes are written for, ascending, in the unit of thresholds."""
    codebook = encoding.codebook
    return np.array([codebook.values[code] for code in codebook.codes], np.float32)


def _job(encoding: Encoding, parts: Sequence[Tensor], shape: Sequence[int]) -> Job:
    job = Job()
    for name, part in zip(encoding.parts, parts, strict=True):
        setattr(job, name, part.data_ptr())
    codes, scales = packed_tables(encoding)
    job.tables = codes.ctypes.data
    job.second_tables = scales.ctypes.data if scales is not None else None
    _, job.columns = encoding.grid(shape)
    return job


def encode(
    encoding: Encoding,
    x: Tensor,
    rand: Tensor | None = None,
    seed: int | None = None,
    out: Sequence[Tensor] = (),
) -> list[Tensor]:
    """The parts of `x`, whose scales are not quantized yet; see `bnbx.kernels.coding.encode`."""
    assert encoding.second is None
    parts = encoding.empty(x.shape, x.device, out)
    parts[len(out) :] = map(in_large_pages, parts[len(out) :])
    x = x.contiguous()
    plan = CodingPlan(encoding, DTYPE_NAMES[x.dtype], rand is not None or seed is not None)
    job = _job(encoding, parts, x.shape)
    rows, columns = encoding.grid(x.shape)
    job.numbers, job.count = x.data_ptr(), x.numel()
    if plan.stochastic:
        numbers = ascending_numbers(encoding)
        job.ascending, job.written, job.seed = numbers.ctypes.data, len(numbers), seed or 0
    if rand is not None:
        rand = rand.contiguous()
        job.rand, job.rand_count = rand.data_ptr(), rand.numel()
    compiled = kernel(plan)
    scale = encoding.quant_type.scale
    chunks = -(-columns // plan.chunk)
    job.chunk_count = rows if encoding.per == "row" else max(chunks, 1)
    job.high = job.low = -(2**31)
    if scale.tensor_scale or encoding.per == "tensor":
        job.measure = compiled.entries["measure"]
    compiled.run(job, "encode", x.numel())
    return parts


def decode(
    encoding: Encoding, parts: Sequence[Tensor], shape: Sequence[int], out: Tensor, start: int
) -> None:
    """Decode the elements from number `start` on to `out`; see `coding.decode_rows`."""
    if out.numel() == 0:
        return
    plan = CodingPlan(encoding, DTYPE_NAMES[out.dtype])
    job = _job(encoding, parts, shape)
    job.numbers, job.start, job.count = out.data_ptr(), start, out.numel()
    if encoding.per == "row":
        job.chunk_count = out.numel() // job.columns
    else:
        job.chunk_count = -(-(start + out.numel()) // plan.chunk) - start // plan.chunk
    kernel(plan).run(job, "decode", out.numel())
