"""Measures products with a quantized weight, in a process of its own; see `process.call`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.process import Report
from benchmarks.timing import Times, cost, periods, ratios, run_rounds

OURS, DENSE, PEER = "bnbx", "dense", "bitsandbytes"
CODES, PANELS = "codes", "panels"
PEER_TYPES = ("nf4", "fp4")
BACKWARD = "backward"
Call = Callable[[], object]


@dataclass(frozen=True)
class Job:
    """What one process measures: the layer beside others, or the two ways of its product."""

    quant_type: str
    dtype: str
    threads: int
    rows: tuple[int, ...]
    side: int
    seconds: float
    crossover: bool = False
    backward: bool = False

    def title(self) -> str:
        """One line."""
        word = "thread" if self.threads == 1 else "threads"
        what = ", gradient to the input" if self.backward else ""
        return (
            f"{self.quant_type}, {self.side} x {self.side}, {self.dtype}, "
            f"{self.threads} {word}{what}"
        )

    @property
    def reference(self) -> str:
        """The contender that takes part in every round."""
        return CODES if self.crossover else OURS


@dataclass
class Row:
    """The seconds of a product, by contender and round."""

    rows: int
    reference: str
    times: dict[str, Times] = field(default_factory=dict)

    def median(self, name: str) -> float | None:
        """Seconds; None for a contender that is not there."""
        return median(self.times[name].values()) if name in self.times else None

    def faster(self, other: str) -> float | None:
        """How many times the reference is faster than another, the median over rounds."""
        if other not in self.times:
            return None
        return 1 / median(ratios(self.times[self.reference], self.times[other]))

    def data(self) -> dict[str, object]:
        """Everything, as plain data."""
        medians = {name: self.median(name) for name in self.times}
        every = {name: [*times.values()] for name, times in self.times.items()}
        return {"rows": self.rows, "median_s": medians, "times_s": every}


def measure(job: Job, report: Report) -> list[Row]:
    """Time all numbers of rows of the job."""
    from bnbx.errors import BnbxWarning

    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    warnings.simplefilter("error", BnbxWarning)
    weight = torch.randn(job.side, job.side) * 0.02
    make = _both_ways if job.crossover else _backward if job.backward else _layers
    found = []
    for number, rows in enumerate(job.rows):
        x = torch.randn(rows, job.side).to(getattr(torch, job.dtype))
        with torch.no_grad():
            calls = make(job.quant_type, weight, x)
            for function in calls.values():
                function()
            costs = {name: cost(function) for name, function in calls.items()}
            rounds = periods(costs, 0.0, job.reference)
            share = number / len(job.rows)

            def tell(fraction: float, share: float = share, rows: int = rows) -> None:
                report(f"{rows} rows", share + fraction / len(job.rows))

            times = run_rounds(calls, rounds, lambda: None, job.seconds, tell)
        found.append(Row(rows, job.reference, times))
    return found


def _layers(quant_type: str, weight: Tensor, x: Tensor) -> Mapping[str, Call]:
    """The layers that a user has the choice of."""
    from bnbx.nn import QuantLinear

    out, inner = weight.shape
    ours = _filled(QuantLinear(inner, out, bias=False, quant_type=quant_type), weight)
    others = weight.to(x.dtype)
    found: dict[str, Call] = {
        OURS: lambda: ours(x),
        DENSE: lambda: nn.functional.linear(x, others),
    }
    try:
        import bitsandbytes.nn as peer
    except ImportError:
        return found
    if quant_type in PEER_TYPES:
        layer = peer.Linear4bit(
            inner, out, bias=False, compute_dtype=x.dtype, quant_type=quant_type
        )
        theirs = _filled(layer, weight)
        found[PEER] = lambda: theirs(x)
    return found


def _filled(layer: Any, weight: Tensor) -> Any:
    """The layer with this weight, quantized."""
    layer.weight.data.copy_(weight)
    return layer.to("cpu").eval()


def _backward(quant_type: str, weight: Tensor, x: Tensor) -> Mapping[str, Call]:
    """The gradient to the input; x is that of the output."""
    from bnbx.kernels import coding, linear
    from bnbx.kernels.encoding import make_encoding

    encoding = make_encoding(quant_type)
    parts = coding.encode(encoding, weight)
    others = weight.to(x.dtype)
    return {
        OURS: lambda: linear.grad_input(encoding, parts, tuple(weight.shape), x),
        DENSE: lambda: x @ others,
    }


def _both_ways(quant_type: str, weight: Tensor, x: Tensor) -> Mapping[str, Call]:
    """The kernel that multiplies codes as it reads them, and panels: who is faster when."""
    from bnbx.kernels import coding, linear_cpu, linear_panels
    from bnbx.kernels.encoding import make_encoding

    encoding, shape = make_encoding(quant_type), (weight.shape[0], weight.shape[1])
    parts = coding.encode(encoding, weight)
    return {
        CODES: lambda: linear_cpu.multiply(encoding, parts, shape, x, None),
        PANELS: lambda: linear_panels.multiply(encoding, parts, shape, x, None),
    }
