"""Measures products with a quantized weight, in a process of its own; see `process.call`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.process import Report
from benchmarks.side_by_side import Call, Contenders, Row, measure_rows, title_of

OURS, DENSE, PEER = "bnbx", "dense", "bitsandbytes"
PEER_TRAINING = "its training mode"
CODES, PANELS = "codes", "panels"
PEER_TYPES = ("nf4", "fp4")
DECODING = 16  # fewer rows than these are those of a model that writes text
LAYERS = 8  # of it, one after the other, so that a weight is not in the caches any more


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
        what = ", gradient to the input" if self.backward else ""
        return title_of(
            f"{self.quant_type}, {self.side} x {self.side}{what}", self.dtype, self.threads
        )

    @property
    def reference(self) -> str:
        """The contender that takes part in every round."""
        return CODES if self.crossover else OURS


def measure(job: Job, report: Report) -> list[Row]:
    """Time all numbers of rows of the job."""
    weight = torch.randn(job.side, job.side) * 0.02
    make = _both_ways if job.crossover else _backward if job.backward else _layers

    def contenders(rows: str) -> Contenders:
        x = torch.randn(int(rows), job.side).to(getattr(torch, job.dtype))
        return make(job.quant_type, weight, x)

    labels = [str(rows) for rows in job.rows]
    found = measure_rows(labels, contenders, job.reference, job.threads, job.seconds, report)
    if make is _layers:
        for row in found:
            row.share(layers_of(int(row.label)))
    return found


def layers_of(rows: int) -> int:
    """How many layers a call goes through."""
    return LAYERS if rows < DECODING else 1


def _layers(quant_type: str, weight: Tensor, x: Tensor) -> Mapping[str, Call]:
    """The layers that a user has the choice of, as many as `layers_of` says of each."""
    from bnbx.nn import QuantLinear

    out, inner = weight.shape
    count = layers_of(len(x))

    def ours() -> nn.Module:
        return _filled(QuantLinear(inner, out, bias=False, quant_type=quant_type), weight)

    def dense() -> nn.Module:
        layer = nn.Linear(inner, out, bias=False, dtype=x.dtype)
        layer.weight.data.copy_(weight)
        return layer

    found = {OURS: _through(ours, count, x), DENSE: _through(dense, count, x)}
    try:
        import bitsandbytes.nn as peer
    except ImportError:
        return found
    if quant_type in PEER_TYPES:

        def theirs() -> nn.Module:
            layer = peer.Linear4bit(
                inner, out, bias=False, compute_dtype=x.dtype, quant_type=quant_type
            )
            return _filled(layer, weight)

        found[PEER] = _through(theirs, count, x)
        found[PEER_TRAINING] = _through(lambda: theirs().train(), count, x)
    return found


def _through(make: Callable[[], nn.Module], count: int, x: Tensor) -> Call:
    """A call that gives x to so many layers."""
    layers = [make() for _ in range(count)]

    def call() -> None:
        for layer in layers:
            layer(x)

    return call


def _filled(layer: nn.Module, weight: Any) -> nn.Module:
    """The layer with this weight, quantized."""
    layer.get_parameter("weight").data.copy_(weight)
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
