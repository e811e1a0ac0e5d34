"""The optimizer_update functions on a GPU: the bits of the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import on_gpu
from bnbx import functional
from on_gpu import assert_there, same
from same_bits import FLOATS

pytestmark = pytest.mark.gpu


N, STEPS = 3001, 4
TWO = ("adam", "lamb", "ademamix")
NAMES = ("adam", "lion", "momentum", "rmsprop", "adagrad", "lars", "lamb", "ademamix")
ONE_BETA = ("momentum", "lars", "rmsprop", "adagrad")


def gradient(step: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(step)).to(dtype)


def step32(device: Any, name: str, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    mixing = name == "ademamix"
    p, norm = gradient(0, dtype).to(device), torch.zeros(1, device=device)
    state1 = torch.zeros((2, N) if mixing else N, device=device)
    state2 = torch.zeros(N, device=device) if name in TWO else None
    for step in range(1, STEPS + 1):
        functional.optimizer_update_32bit(
            name,
            gradient(step, dtype).to(device),
            p,
            state1,
            0.9,
            1e-8,
            step,
            1e-2,
            state2,
            0.0 if name in ONE_BETA else 0.99,
            0.999 if mixing else 0.0,
            5.0 if mixing else 0.0,
            unorm_vec=norm,
            **options,
        )
    return [t for t in (p, state1, state2) if t is not None]


def step8(device: Any, name: str, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    mixing = name == "ademamix"
    shape = (2, N) if mixing else (N,)
    blocks = -(-N // 256)
    p = gradient(0, dtype).to(device)
    signed, unsigned = (functional.create_dynamic_map(signed=s).to(device) for s in (True, False))
    state1 = torch.full(shape, 127, dtype=torch.uint8, device=device)
    absmax1 = torch.zeros((2, blocks) if mixing else blocks, device=device)
    two = name in TWO
    state2 = torch.zeros(N, dtype=torch.uint8, device=device) if two else None
    absmax2 = torch.zeros(blocks, device=device) if two else None
    for step in range(1, STEPS + 1):
        functional.optimizer_update_8bit_blockwise(
            name,
            gradient(step, dtype).to(device),
            p,
            state1,
            state2,
            0.9,
            0.0 if name in ONE_BETA else 0.99,
            0.999 if mixing else 0.0,
            5.0 if mixing else 0.0,
            1e-8,
            step,
            1e-2,
            signed,
            unsigned if two else None,
            absmax1,
            absmax2,
            **options,
        )
    return [t for t in (p, state1, state2, absmax1, absmax2) if t is not None]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_optimizer_updates(name: str, dtype: torch.dtype) -> None:
    options: dict[str, Any] = dict(weight_decay=0.1, gnorm_scale=0.5)
    for run in (step32, step8):
        found = run(on_gpu.DEVICE, name, dtype, **options)
        assert_there(*found)
        assert all(map(same, found, run("cpu", name, dtype, **options))), run.__name__


def test_optimizer_updates_take_scales_of_the_device() -> None:
    found = step32(
        on_gpu.DEVICE, "adam", torch.float32, gnorm_scale=torch.tensor(0.5, device=on_gpu.DEVICE)
    )
    expected = step32("cpu", "adam", torch.float32, gnorm_scale=torch.tensor(0.5))
    assert all(map(same, found, expected))


def test_bounded_updates() -> None:
    for name in ("adam", "lars"):
        found, expected = (
            step32(device, name, torch.float32, max_unorm=0.05) for device in (on_gpu.DEVICE, "cpu")
        )
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-6, atol=1e-7)


def test_updates_with_one_scale_for_a_tensor() -> None:
    made = []
    for device in ("cpu", on_gpu.DEVICE):
        p, g = gradient(0, torch.float32).to(device), gradient(1, torch.float32).to(device)
        signed, unsigned = (
            functional.create_dynamic_map(signed=s).to(device) for s in (True, False)
        )
        states = [torch.full((N,), n, dtype=torch.uint8, device=device) for n in (127, 0)]
        maxima = [torch.zeros(1, device=device) for _ in range(4)]
        update: Any = functional.optimizer_update_8bit
        update("adam", g, p, *states, 0.9, 0.99, 1e-8, 1, 1e-2, signed, unsigned, *maxima)
        made.append([p, *states, *maxima])
    assert all(map(same, *made))
