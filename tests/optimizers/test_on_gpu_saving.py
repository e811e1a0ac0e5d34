"""Checkpoints of optimizers go to a GPU and back, and training goes on with the same bits."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import on_gpu
from bnbx.optim import create
from on_gpu import (
    all_there,
    assert_same_optimizers,
    assert_there,
    same,
)
from optimizers.compare import parameters_of
from optimizers.gpu_runs import (
    DENSE,
    SHAPES,
    pair,
    through_a_file,
    train,
)
from optimizers.variants import (
    parameters,
)

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("map_location", [None, "cpu", "cuda"])
@pytest.mark.parametrize("to_gpu", [False, True])
@pytest.mark.parametrize("bits", [32, 8, 4])
def test_checkpoints_go_from_device_to_device(
    bits: int, to_gpu: bool, map_location: str | None
) -> None:
    here, gpu = pair(bits=bits, dtype=torch.bfloat16, master="kahan")
    train(3, here, gpu)
    start, expected = (here, gpu) if to_gpu else (gpu, here)
    params = [p.detach().clone().requires_grad_() for p in parameters_of(expected)]
    ours = create("adamw", params, bits=bits, master="kahan", **DENSE)
    location = on_gpu.DEVICE if map_location == "cuda" else map_location
    ours.load_state_dict(through_a_file(start.state_dict(), map_location=location))
    for p in params:
        states = [v for v in ours.state[p].values() if isinstance(v, Tensor)]
        assert all(state.device == p.device for state in states)
    train(3, expected, ours)
    assert_same_optimizers(ours, expected)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_and_pickles(how: Callable[[Any], Any]) -> None:
    here, gpu = pair()
    train(2, here, gpu)
    other = how(gpu)
    assert_there(*parameters_of(other))
    train(2, here, other)
    assert_same_optimizers(other, here)


TORCH: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "adamw": ("adamw", torch.optim.AdamW, dict(weight_decay=0.1)),
    "adamw, fused": ("adamw", torch.optim.AdamW, dict(weight_decay=0.1, fused=True)),
    "adamw, capturable": ("adamw", torch.optim.AdamW, dict(weight_decay=0.1, capturable=True)),
    "adam, amsgrad": ("adam", torch.optim.Adam, dict(amsgrad=True)),
    "sgd": ("sgd", torch.optim.SGD, dict(momentum=0.9)),
    "rmsprop": ("rmsprop", torch.optim.RMSprop, dict(alpha=0.9, momentum=0.9)),
    "adagrad": ("adagrad", torch.optim.Adagrad, {}),
}


@pytest.mark.parametrize("name", TORCH)
def test_checkpoints_of_torch_go_on(name: str) -> None:
    rule, kind, arguments = TORCH[name]
    if on_gpu.DEVICE.type == "cpu":
        arguments = {k: v for k, v in arguments.items() if k != "capturable"}
    params = all_there(parameters(torch.float32, SHAPES))
    theirs = kind(params, lr=1e-3, **arguments)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(p.shape, device=p.device)
        theirs.step()
    ours = [p.detach().clone().requires_grad_() for p in params]
    options = {k: v for k, v in arguments.items() if k not in ("fused", "capturable")}
    mine = create(rule, ours, bits=32, lr=1e-3, **options)
    mine.load_state_dict(through_a_file(theirs.state_dict()))
    for _ in range(3):
        for p, q in zip(params, ours, strict=True):
            q.grad = torch.randn(q.shape, device=q.device)
            p.grad = q.grad.clone()
        theirs.step()
        mine.step()
    for p, q in zip(params, ours, strict=True):
        assert_there(q)
        torch.testing.assert_close(q, p, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", [32, 8])
def test_checkpoints_of_bitsandbytes_go_on(bits: int) -> None:
    """Made by its own kernels on the GPU where it has them, else on the CPU."""
    bitsandbytes: Any = pytest.importorskip("bitsandbytes", reason="the extra `peers` has it")
    params = all_there(parameters(torch.float32, [(5000,), (64, 70), (100,)]))
    theirs = bitsandbytes.optim.AdamW(params, lr=1e-3, weight_decay=0.1, optim_bits=bits)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(p.shape, device=p.device)
        theirs.step()
    ours = [p.detach().clone().requires_grad_() for p in params]
    mine = create("adamw", ours, bits=bits, lr=1e-3, weight_decay=0.1)
    mine.load_state_dict(through_a_file(theirs.state_dict()))
    for p, q in zip(params, ours, strict=True):
        quantized = bits == 8 and p.numel() >= 4096
        assert_there(mine.state[q]["m"], mine.state[q]["v"])
        assert same(mine.state[q]["m"].view(-1), theirs.state[p]["state1"].view(-1))
        assert quantized == (mine.state[q]["v"].dtype == torch.uint8)
    for _ in range(3):
        for p, q in zip(params, ours, strict=True):
            q.grad = torch.randn(q.shape, device=q.device)
            p.grad = q.grad.clone()
        theirs.step()
        mine.step()
    for p, q in zip(params, ours, strict=True):
        torch.testing.assert_close(q, p, rtol=0, atol=1e-5 if bits == 32 else 1e-3)
    # And back: what we save there, it loads.
    theirs.load_state_dict(through_a_file(mine.state_dict(save_as="bitsandbytes")))
    theirs.step()
