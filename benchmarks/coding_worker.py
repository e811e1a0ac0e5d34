"""Measures quantizing and dequantizing, in a process of its own; see `process.call`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.process import Report
from benchmarks.side_by_side import Call, Row, measure_rows, title_of
from bnbx.kernels import coding
from bnbx.kernels.encoding import make_encoding

OURS, PEER, COPY = "bnbx", "bitsandbytes", "copy"
BLOCKWISE, FOUR_BITS = ("dynamic8", 256), ("nf4", 64)
OPERATIONS = {
    "quantize_blockwise": BLOCKWISE,
    "dequantize_blockwise": BLOCKWISE,
    "quantize_4bit": FOUR_BITS,
    "dequantize_4bit": FOUR_BITS,
}
"""Names in bitsandbytes' functional, with the type and the block size."""


@dataclass(frozen=True)
class Job:
    """What one process measures."""

    dtype: str
    threads: int
    operations: tuple[str, ...]
    side: int
    seconds: float

    def title(self) -> str:
        """One line."""
        return title_of(f"{self.side} x {self.side}", self.dtype, self.threads)


def measure(job: Job, report: Report) -> list[Row]:
    """Time all operations of the job."""
    x = torch.randn(job.side, job.side).to(getattr(torch, job.dtype))
    calls = partial(_calls, x=x)
    return measure_rows(job.operations, calls, OURS, job.threads, job.seconds, report)


def _calls(operation: str, x: Tensor) -> dict[str, Call]:
    """What to time, by contender."""
    name, size = OPERATIONS[operation]
    encoding = make_encoding(name, size)
    found: dict[str, Call] = {OURS: partial(coding.encode, encoding, x)}
    if operation.startswith("dequantize"):
        parts, out, source = coding.encode(encoding, x), torch.empty_like(x), x.clone()
        found[OURS] = partial(coding.decode, encoding, parts, x.shape, x.dtype, out=out)
        found[COPY] = partial(out.copy_, source)
    try:
        import bitsandbytes.functional as peer
    except ImportError:
        return found
    found[PEER] = _of_bitsandbytes(peer, operation, x, size)
    return found


def _of_bitsandbytes(peer: object, operation: str, x: Tensor, size: int) -> Call:
    function = getattr(peer, operation)
    options: dict[str, object] = {"blocksize": size}
    if operation.endswith("4bit"):
        options["quant_type"] = OPERATIONS[operation][0]
    if operation.startswith("quantize"):
        return partial(function, x, **options)
    codes, state = getattr(peer, operation.removeprefix("de"))(x, **options)
    return partial(function, codes, state)  # with `out=` it fails on a CPU
