"""Measures one configuration: every contender on its own copies of the same parameters.

Runs in a process of its own, see `process.call`.
"""

from __future__ import annotations

import importlib
import resource
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import getloadavg

import torch
from torch import Tensor

from benchmarks.cases import CASES, Shape
from benchmarks.contenders import CONTENDERS, REFERENCE, Contender
from benchmarks.process import Report
from benchmarks.results import Job, Measurement, Row
from benchmarks.timing import cost, periods, run_rounds, timed
from bnbx.errors import BnbxWarning

PARAMETER_SCALE = 0.02
GRADIENT_SCALE = 1e-3
SLACK = 1 << 20
"""Places in the pool of noise at which a gradient may begin."""


class Gradients:
    """Gradients that change between rounds and cost a copy to change.

    Each is a stretch of one pool of normal noise, begun at a random place. Contenders share them:
    a step only reads its gradients.
    """

    def __init__(self, like: list[Tensor]) -> None:
        largest = max(t.numel() for t in like)
        self._pool = (torch.randn(largest + SLACK) * GRADIENT_SCALE).to(like[0].dtype)
        self.tensors = [torch.empty_like(t) for t in like]
        self.renew()

    def renew(self) -> None:
        """Give every gradient other values."""
        places = torch.randint(SLACK, (len(self.tensors),)).tolist()
        for tensor, place in zip(self.tensors, places, strict=True):
            tensor.copy_(self._pool[place : place + tensor.numel()].view_as(tensor))


@dataclass
class Trial:
    """What came of timing contenders; their optimizers are still there to be looked at."""

    rows: list[Row]
    optimizers: dict[str, torch.optim.Optimizer]
    load_average: float
    renewal_s: float
    peak_rss_bytes: int


def measure(job: Job, report: Report) -> Measurement:
    """Time the steps of all of the job's contenders.

    Raises:
        Exception: whatever bnbx or torch raises; a peer's error becomes its row's problem.
    """
    case = CASES[job.case]
    chosen = {key: CONTENDERS[key] for key in job.contenders}
    trial = attempt(chosen, case.shapes, job.dtype, job.threads, job.seconds, report)
    return Measurement(
        job,
        len(case.shapes),
        case.parameters,
        trial.load_average,
        trial.renewal_s,
        trial.peak_rss_bytes,
        trial.rows,
    )


def attempt(
    contenders: Mapping[str, Contender],
    shapes: Sequence[Shape],
    dtype: str,
    threads: int,
    seconds: float,
    report: Report,
) -> Trial:
    """Time the steps of contenders on their own copies of parameters of these shapes.

    Raises:
        Exception: what a contender raises that is not optional.
    """
    load = getloadavg()[0]
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    # Where bnbx falls back to plain torch operations it warns; that is not what is measured here.
    warnings.simplefilter("error", BnbxWarning)
    kind: torch.dtype = getattr(torch, dtype)
    values = [(torch.randn(shape) * PARAMETER_SCALE).to(kind) for shape in shapes]
    gradients = Gradients(values)
    rows, optimizers = [], {}
    for key, contender in contenders.items():
        report(f"first step of {key}", 0.0)
        row, optimizer = _first_step(key, contender, values, gradients.tensors)
        rows.append(row)
        if optimizer is not None:
            optimizers[key] = optimizer
    del values
    renewal = timed(gradients.renew)
    _time_rounds(seconds, rows, optimizers, gradients, renewal, report)
    return Trial(rows, optimizers, load, renewal, _peak_rss_bytes())


def _first_step(
    key: str, contender: Contender, values: list[Tensor], gradients: list[Tensor]
) -> tuple[Row, torch.optim.Optimizer | None]:
    if not contender.installed():
        return Row(key, problem=contender.advice()), None
    parameters = [torch.nn.Parameter(value.clone()) for value in values]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    try:
        optimizer = contender.make(parameters)
        first = timed(optimizer.step)
    except Exception as error:
        if not contender.optional:
            raise
        return Row(key, problem=f"{type(error).__name__}: {error}"), None
    row = Row(key, version=_version(contender), first_step_s=first)
    row.state_bytes = state_bytes(optimizer)
    return row, optimizer


def _time_rounds(
    seconds: float,
    rows: list[Row],
    optimizers: dict[str, torch.optim.Optimizer],
    gradients: Gradients,
    renewal: float,
    report: Report,
) -> None:
    """Fill in the rows' times."""
    if not optimizers:
        return
    costs = {}
    for key, optimizer in optimizers.items():
        report(f"next steps of {key}", 0.0)
        costs[key] = cost(optimizer.step)
    steps = {key: optimizer.step for key, optimizer in optimizers.items()}
    every = periods(costs, renewal, REFERENCE)
    report("timing", 0.0)
    times = run_rounds(steps, every, gradients.renew, seconds, lambda done: report("timing", done))
    for row in rows:
        if row.key in times:
            row.period, row.times = every[row.key], times[row.key]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's state tensors; storage that several share counts once."""
    storages = {}
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                for tensor in _plain_tensors(value):
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that a wrapper subclass is made of, or the tensor itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain_tensors(getattr(tensor, name))


def _version(contender: Contender) -> str:
    version: str = importlib.import_module(contender.module).__version__
    return version


def _peak_rss_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
