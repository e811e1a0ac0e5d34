"""Measures quantizing and dequantizing, in a process of its own; see `process.call`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from benchmarks.process import Report
from benchmarks.timing import Times, cost, periods, ratios, run_rounds
from bnbx.errors import BnbxWarning
from bnbx.kernels import coding
from bnbx.kernels.encoding import make_encoding

Call = Callable[[], object]
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
        word = "thread" if self.threads == 1 else "threads"
        return f"{self.side} x {self.side}, {self.dtype}, {self.threads} {word}"


@dataclass
class Row:
    """The seconds of an operation, by contender and round."""

    operation: str
    times: dict[str, Times] = field(default_factory=dict)

    def median(self, name: str) -> float | None:
        """Seconds; None for a contender that is not there."""
        return median(self.times[name].values()) if name in self.times else None

    def ratio(self, other: str) -> float | None:
        """The median of bnbx's time over the other's in the same round."""
        if other not in self.times:
            return None
        return median(ratios(self.times["bnbx"], self.times[other]))

    def data(self) -> dict[str, object]:
        """Everything, as plain data."""
        medians = {name: self.median(name) for name in self.times}
        every = {name: [*times.values()] for name, times in self.times.items()}
        return {"operation": self.operation, "median_s": medians, "times_s": every}


def measure(job: Job, report: Report) -> list[Row]:
    """Time all operations of the job."""
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    warnings.simplefilter("error", BnbxWarning)
    x = torch.randn(job.side, job.side).to(getattr(torch, job.dtype))
    rows = []
    for number, operation in enumerate(job.operations):
        calls = _calls(operation, x)
        for function in calls.values():
            function()
        costs = {name: cost(function) for name, function in calls.items()}
        rounds = periods(costs, 0.0, "bnbx")
        share = number / len(job.operations)

        def tell(fraction: float, share: float = share, operation: str = operation) -> None:
            report(operation, share + fraction / len(job.operations))

        rows.append(Row(operation, run_rounds(calls, rounds, lambda: None, job.seconds, tell)))
    return rows


def _calls(operation: str, x: Tensor) -> dict[str, Call]:
    """What to time, by contender."""
    name, size = OPERATIONS[operation]
    encoding = make_encoding(name, size)
    parts = coding.encode(encoding, x)
    out = torch.empty_like(x)
    if operation.startswith("quantize"):
        ours: Call = lambda: coding.encode(encoding, x)  # noqa: E731
    else:
        ours = lambda: coding.decode(encoding, parts, x.shape, x.dtype, out=out)  # noqa: E731
    found: dict[str, Call] = {"bnbx": ours}
    try:
        import bitsandbytes.functional as peer
    except ImportError:
        pass
    else:
        found["bitsandbytes"] = _of_bitsandbytes(peer, operation, x, size)
    if operation.startswith("dequantize"):
        source = x.clone()
        found["copy"] = lambda: out.copy_(source)
    return found


def _of_bitsandbytes(peer: object, operation: str, x: Tensor, size: int) -> Call:
    function = getattr(peer, operation)
    options: dict[str, object] = {"blocksize": size}
    if operation.endswith("4bit"):
        options["quant_type"] = OPERATIONS[operation][0]
    if operation.startswith("quantize"):
        return lambda: function(x, **options)
    codes, state = getattr(peer, operation.removeprefix("de"))(x, **options)
    return lambda: function(codes, state)  # with `out=` it fails on a CPU
