"""The sums that a fit of scales is made of, in C++ compiled at run time: `fit.cpp.j2`."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from bnbx.kernels import threads
from bnbx.kernels.c_code import comment
from bnbx.kernels.c_struct import PHASES, Field, ctypes_fields
from bnbx.kernels.coding_cpu import packed_tables
from bnbx.kernels.coding_source import code_traits
from bnbx.kernels.encoding import Encoding
from bnbx.kernels.library import RUN, address, compiled
from bnbx.kernels.source import fill

TEMPLATE = "fit.cpp.j2"
SUMS = 5  # of a block: the error, and what least squares need
TAKEN = 8  # elements that a lane takes at a time on CUDA
JOB = (
    Field("numbers", "const float*"),
    Field("columns", "i64"),
    Field("factor", "const float*", "one a block, as the next three"),
    Field("inverse", "const float*"),
    Field("center", "const float*"),
    Field("norm", "const float*", "keeps squares in range"),
    Field("codes", "u8*", "packed"),
    Field("stride", "i64", "bytes of a block's codes"),
    Field("changed", "const u8*", "which blocks to write codes of"),
    Field("sums", "float*", "SUMS rows, one number a block"),
    Field("given", "i64", "whether the sums are for the codes as they are, not for the nearest"),
    Field("tables", "const Tables*"),
    *PHASES,
)


class Job(ctypes.Structure):
    """The struct `Job` of fit.cpp.j2."""

    _fields_ = ctypes_fields(JOB)


def render_fit(encoding: Encoding, template: str) -> str:
    """Source text for an encoding from the template of a target ("fit.cpp.j2")."""
    spec = encoding.quant_type
    return fill(
        template,
        title=comment(f"fit scales: {encoding.describe()}"),
        subtitle=comment(f"{spec.summary} ({spec.source or 'no source given'})."),
        code=code_traits(encoding),
        job=JOB,
        sums=SUMS,
        taken=TAKEN,
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
    job.update = address(found, work)
    count, parallel = threads.threads_for(elements)
    found.bnbx_run(ctypes.byref(job), 1, count, parallel)
