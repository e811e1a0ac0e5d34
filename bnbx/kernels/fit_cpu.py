"""The sums that a fit of scales is made of, in C++ compiled at run time: `fit.cpp.j2`."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from bnbx.kernels import threads
from bnbx.kernels.c_code import comment
from bnbx.kernels.coding_cpu import packed_tables
from bnbx.kernels.coding_source import code_traits
from bnbx.kernels.encoding import Encoding
from bnbx.kernels.library import RUN, compiled
from bnbx.kernels.source import fill

TEMPLATE = "fit.cpp.j2"
SUMS = 5


class Job(ctypes.Structure):
    """The struct `Job` of fit.cpp.j2."""

    _fields_ = (
        ("numbers", ctypes.c_void_p),
        ("columns", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("factor", "inverse", "center", "norm", "codes")),
        ("stride", ctypes.c_int64),
        ("changed", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("given", ctypes.c_int64),
        ("tables", ctypes.c_void_p),
        ("row_count", ctypes.c_int64),
        ("chunk_count", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("update", "measure", "reduce")),
    )


def render_fit(encoding: Encoding, template: str) -> str:
    """Source text for an encoding from the template of a target ("fit.cpp.j2")."""
    spec = encoding.quant_type
    return fill(
        template,
        title=comment(f"fit scales: {encoding.describe()}"),
        subtitle=comment(f"{spec.summary} ({spec.source or 'no source given'})."),
        code=code_traits(encoding),
    )


@lru_cache(maxsize=512)
def library(encoding: Encoding) -> ctypes.CDLL:
    """The compiled source for an encoding; how scales are quantized does not matter to it.

    Raises:
        CompileError: there is no compiler, or it refuses the source.
    """
    if encoding.second is not None:
        return library(replace(encoding, second=None))
    return compiled(render_fit(encoding, TEMPLATE), RUN)


def sums(
    encoding: Encoding,
    x: Tensor,
    factor: Tensor,
    inverse: Tensor,
    center: Tensor | None,
    norm: Tensor,
    codes: Tensor | None,
) -> Tensor:
    """Five numbers a block, (5, blocks); see `bnbx.kernels.fit_reference.sums`."""
    found = torch.empty((SUMS, len(x)), dtype=torch.float32, device="cpu")
    job, kept = _job(encoding, x, inverse, center)
    kept += [plain(factor), plain(norm)]
    job.factor, job.norm = kept[-2].data_ptr(), kept[-1].data_ptr()
    job.sums, job.given = found.data_ptr(), int(codes is not None)
    if codes is not None:
        job.codes, job.stride = codes.data_ptr(), codes.stride(0)
    _run(encoding, job, "sums", x.numel())
    return found


def write(
    encoding: Encoding,
    x: Tensor,
    inverse: Tensor,
    center: Tensor | None,
    changed: Tensor,
    codes: Tensor,
) -> None:
    """Pack the codes of the blocks that have changed; see `bnbx.kernels.fit_reference.write`."""
    job, kept = _job(encoding, x, inverse, center)
    kept.append(changed.to(torch.uint8))
    job.changed = kept[-1].data_ptr()
    job.codes, job.stride = codes.data_ptr(), codes.stride(0)
    _run(encoding, job, "write", x.numel())


def _job(
    encoding: Encoding, x: Tensor, inverse: Tensor, center: Tensor | None
) -> tuple[Job, list[Tensor]]:
    """A job, and the tensors whose memory it names."""
    job = Job()
    kept = [x.contiguous(), plain(inverse)]
    job.numbers, job.inverse = kept[0].data_ptr(), kept[1].data_ptr()
    if center is not None:
        kept.append(plain(center))
        job.center = kept[-1].data_ptr()
    job.chunk_count, job.columns = x.shape
    job.tables = packed_tables(encoding)[0].ctypes.data
    return job, kept


def plain(x: Tensor) -> Tensor:
    """A number a block, as kernels read them."""
    return x.float().contiguous()


def _run(encoding: Encoding, job: Job, work: str, elements: int) -> None:
    found = library(encoding)
    job.update = ctypes.cast(getattr(found, f"bnbx_{work}"), ctypes.c_void_p).value
    count, parallel = threads.threads_for(elements)
    found.bnbx_run(ctypes.byref(job), 1, count, parallel)
