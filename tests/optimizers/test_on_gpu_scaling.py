"""Scaled losses on a GPU: a step that overflows is left out, and nobody waits to know."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import on_gpu
from bnbx.optim import create
from on_gpu import (
    all_there,
    assert_same_optimizers,
    same,
)
from optimizers.compare import parameters_of
from optimizers.gpu_runs import (
    DENSE,
    SHAPES,
    STEPS,
    give,
    grads_of,
    pair,
)
from optimizers.variants import (
    parameters,
)

pytestmark = pytest.mark.gpu


def scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler(on_gpu.DEVICE.type, init_scale=1024.0, growth_interval=2)


@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("overflows", [(0,), (2, 3), (5,)], ids=str)
def test_a_grad_scaler_with_overflows(overflows: tuple[int, ...], bits: int) -> None:
    """Steps that overflow leave no trace, not even in the count; the others divide."""
    params = parameters(torch.float32, SHAPES)
    here = create("adamw", params, bits=bits, **DENSE)
    gpu = create("adamw", all_there(params), bits=bits, **DENSE)
    scaling = scaler()
    for step in range(STEPS):
        scale = scaling.get_scale()
        values = [torch.randn(p.shape) for p in params]
        give([value * scale for value in values], gpu)
        if step in overflows:
            gpu.param_groups[0]["params"][-1].grad.view(-1)[77] = torch.inf
        scaling.scale(torch.zeros((), device=on_gpu.DEVICE))
        scaling.step(gpu)
        scaling.update()
        if step not in overflows:
            give(values, here)
            here.step()
        assert (scaling.get_scale() < scale) == (step in overflows)
    count = STEPS - len(overflows)
    assert {saved["step"] for saved in gpu.state_dict()["state"].values()} == {count}
    assert_same_optimizers(gpu, here)


def test_a_grad_scaler_with_clipping_of_all_kinds() -> None:
    params = parameters(torch.float32, SHAPES[3:])
    gpu = create("adamw", all_there(params), percentile_clipping=50, max_unorm=0.1, **DENSE)
    scaling = scaler()
    for step in range(4):
        give([torch.randn(p.shape) * scaling.get_scale() for p in params], gpu)
        before = copy.deepcopy(gpu.state_dict())
        if step == 2:
            gpu.param_groups[0]["params"][0].grad[3] = torch.nan
        scaling.scale(torch.zeros((), device=on_gpu.DEVICE))
        scaling.unscale_(gpu)
        nn.utils.clip_grad_norm_(parameters_of(gpu), 1.0)
        scaling.step(gpu)
        scaling.update()
        if step == 2:
            after = gpu.state_dict()["state"]
            for number, saved in before["state"].items():
                assert all(same(value, after[number][key]) for key, value in saved.items())
    assert {saved["step"] for saved in gpu.state_dict()["state"].values()} == {3}


def test_the_argument_grad_scale() -> None:
    here, gpu = pair()
    for scale in (4.0, 0.5):
        values = [value * scale for value in grads_of(here)]
        give(values, here, gpu)
        here.step(grad_scale=torch.tensor(scale))
        gpu.step(grad_scale=torch.tensor(scale, device=on_gpu.DEVICE))
    assert_same_optimizers(gpu, here)
