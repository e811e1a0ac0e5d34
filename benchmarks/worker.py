"""Measures one configuration: every contender on its own copies of the same parameters.

Runs in a process of its own, see `process.call`.
"""

from __future__ import annotations

import importlib
import resource
import sys
import warnings
from collections.abc import Iterator
from os import getloadavg

import torch
from torch import Tensor

from benchmarks.cases import CASES
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


def measure(job: Job, report: Report) -> Measurement:
    """Time the steps of all of the job's contenders.

    Raises:
        Exception: whatever bnbx or torch raises; a peer's error becomes its row's problem.
    """
    load = getloadavg()[0]
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    # Where bnbx falls back to plain torch operations it warns; that is not what is measured here.
    warnings.simplefilter("error", BnbxWarning)
    case = CASES[job.case]
    dtype: torch.dtype = getattr(torch, job.dtype)
    values = [(torch.randn(shape) * PARAMETER_SCALE).to(dtype) for shape in case.shapes]
    gradients = Gradients(values)
    rows, optimizers = [], {}
    for key in job.contenders:
        report(f"first step of {key}", 0.0)
        row, optimizer = _first_step(key, values, gradients.tensors)
        rows.append(row)
        if optimizer is not None:
            optimizers[key] = optimizer
    del values
    renewal = timed(gradients.renew)
    _time_rounds(job, rows, optimizers, gradients, renewal, report)
    return Measurement(
        job, len(case.shapes), case.parameters, load, renewal, _peak_rss_bytes(), rows
    )


def _first_step(
    key: str, values: list[Tensor], gradients: list[Tensor]
) -> tuple[Row, torch.optim.Optimizer | None]:
    contender = CONTENDERS[key]
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
    job: Job,
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
    times = run_rounds(
        steps, every, gradients.renew, job.seconds, lambda done: report("timing", done)
    )
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
