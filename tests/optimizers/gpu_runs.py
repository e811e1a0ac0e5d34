"""The same optimizer on the CPU and on a GPU, with the same gradients."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bnbx.optim import create
from bnbx.optimizers.engine import Optimizer8bit
from on_gpu import (
    all_there,
    assert_same_optimizers,
    assert_there,
)
from optimizers.compare import parameters_of
from optimizers.variants import (
    gapped,
    gradients,
    parameters,
)

STEPS = 6
STORAGES = ("float32", "dynamic8", "state4")  # bits 32, 8 and 4
SHAPES = ((), (1,), (7,), (255,), (257,), (16, 16), (3, 5, 7), (33, 129), (4097,), (100, 113))
BIG = ((300, 257), (70_001,), (7,), (128, 513))  # those that paging is for, and one that is not
DENSE: dict[str, Any] = dict(lr=1e-2, min_8bit_size=0)


def model_parameters(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Many of odd sizes, and some whose elements lie apart."""
    return parameters(dtype, SHAPES) + gapped(dtype)


def give(values: Sequence[Tensor], *runs: Optimizer8bit) -> None:
    """Every run gets the same gradients, where its parameters are."""
    for run in runs:
        for p, value in zip(parameters_of(run), values, strict=True):
            p.grad = value.to(p.device, copy=True)


def grads_of(optimizer: Optimizer8bit) -> list[Tensor]:
    return gradients([p.detach().cpu() for p in parameters_of(optimizer)])


def train(steps: int, *runs: Optimizer8bit) -> None:
    """The same steps of several optimizers; the first says which gradients there are."""
    for _ in range(steps):
        give(grads_of(runs[0]), *runs)
        for run in runs:
            run.step()


def pair(rule: str = "adamw", dtype: torch.dtype = torch.float32, **arguments: Any) -> Any:
    """The same optimizer on the CPU and on the device."""
    params = model_parameters(dtype)
    arguments = {**DENSE, **arguments}
    return create(rule, params, **arguments), create(rule, all_there(params), **arguments)


def check(steps: int, here: Optimizer8bit, gpu: Optimizer8bit) -> None:
    train(steps, here, gpu)
    assert_there(*parameters_of(gpu))
    assert_same_optimizers(gpu, here)


def through_a_file(saved: Any, **arguments: Any) -> Any:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True, **arguments)
