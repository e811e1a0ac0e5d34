"""Streams: a step runs on the current one, waits for nothing, and leaves no memory to chance."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import on_gpu
from bnbx.errors import BnbxError, NotYetError
from bnbx.optim import create
from on_gpu import (
    all_there,
    assert_same_optimizers,
    keep_busy,
    no_waiting,
    side_stream,
    there,
)
from optimizers.compare import parameters_of
from optimizers.gpu_runs import (
    BIG,
    DENSE,
    SHAPES,
    STEPS,
    give,
    grads_of,
    model_parameters,
    train,
)
from optimizers.variants import (
    CASES,
    gradients,
    make,
    parameters,
)

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("rule", "variant"), CASES)
def test_a_step_does_not_wait_for_the_device(rule: str, variant: str) -> None:
    """From the second on: the first makes constants and kernels."""
    gpu = make(rule, variant, all_there(parameters(torch.float32)), "dynamic8")
    train(2, gpu)
    give(grads_of(gpu), gpu)
    with no_waiting():
        gpu.step()


@pytest.mark.parametrize(
    "options",
    [
        dict(master="stochastic"),
        dict(master="kahan"),
        dict(percentile_clipping=50),
        dict(max_unorm=0.1),
        dict(block_wise=False),
        dict(skip_zeros=True),
        dict(bits=4),
    ],
    ids=str,
)
def test_options_do_not_wait_for_the_device(options: dict[str, Any]) -> None:
    gpu = create("adamw", all_there(model_parameters(torch.bfloat16)), **{**DENSE, **options})
    train(2, gpu)
    give(grads_of(gpu), gpu)
    with no_waiting():
        gpu.step()


def test_a_learning_rate_that_changes_does_not_wait() -> None:
    gpu = create("adamw", all_there(model_parameters()), **DENSE)
    train(2, gpu)
    for lr in (1e-3, 1e-4):
        gpu.param_groups[0]["lr"] = lr
        give(grads_of(gpu), gpu)
        with no_waiting():
            gpu.step()


def test_a_step_returns_while_the_device_is_busy() -> None:
    if on_gpu.DEVICE.type == "cpu":
        pytest.skip("a CPU is never behind")
    gpu = create("adamw", all_there(model_parameters()), **DENSE)
    train(2, gpu)
    give(grads_of(gpu), gpu)
    cuda: Any = torch.cuda
    cuda.synchronize()
    event = cuda.Event()
    keep_busy(2_000_000_000)  # a second
    event.record()
    gpu.step()
    assert not event.query()
    cuda.synchronize()


@pytest.mark.parametrize("paged", [False, True])
def test_a_step_runs_on_the_current_stream(paged: bool) -> None:
    """Gradients that a busy side stream has yet to write are the ones that it reads."""
    params = parameters(torch.float32, BIG)
    here = create("adamw", params, **DENSE)
    gpu = create("adamw", all_there(params), paged=paged, **DENSE)
    for _ in range(3):
        values = gradients(params)
        give(values, here)
        give([torch.zeros_like(value) for value in values], gpu)
        pinned = [there(value) for value in values]
        with side_stream():
            keep_busy()
            for p, value in zip(parameters_of(gpu), pinned, strict=True):
                p.grad.copy_(value)  # type: ignore[union-attr]
            gpu.step()
        here.step()
    assert_same_optimizers(gpu, here)


def test_memory_that_is_freed_after_a_step_is_not_reused_before_it_ran() -> None:
    params = parameters(torch.float32, [(300, 257)] * 8)
    here = create("adamw", params, **DENSE)
    gpu = create("adamw", all_there(params), **DENSE)
    for _ in range(4):
        give(gradients(params), here, gpu)
        keep_busy()
        gpu.step()
        gpu.zero_grad()
        rubbish = [torch.full((300, 257), torch.nan, device=on_gpu.DEVICE) for _ in params]
        here.step()
        del rubbish
    assert_same_optimizers(gpu, here)


@pytest.mark.parametrize("rule", ["adamw", "lamb"])
def test_two_runs_are_equal(rule: str) -> None:
    params = parameters(torch.bfloat16, [*SHAPES, (1000, 1001)])
    first, second = (
        create(rule, all_there(params), master="stochastic", max_unorm=0.1, **DENSE)
        for _ in range(2)
    )
    train(STEPS, first, second)
    assert_same_optimizers(first, second)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
def test_a_graph_cannot_freeze_a_step() -> None:
    """A replay would repeat the scalars, and read a table of rows that is no longer there."""
    if on_gpu.DEVICE.type == "cpu":
        pytest.skip("there are no graphs on a CPU")
    with pytest.raises(NotYetError, match="capturable"):
        create("adamw", all_there(parameters(torch.float32)), capturable=True, **DENSE)
    gpu = create("adamw", all_there(parameters(torch.float32, [(300, 257)])), **DENSE)
    train(2, gpu)
    give(grads_of(gpu), gpu)
    cuda: Any = torch.cuda
    graph = cuda.CUDAGraph()

    def capture() -> None:
        with cuda.graph(graph):
            gpu.step()

    with pytest.raises((RuntimeError, BnbxError), match="captur"):
        capture()
    cuda.synchronize()
    train(1, gpu)
