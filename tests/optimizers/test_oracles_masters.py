"""Learning rates so small that bfloat16 stalls, by the engine; and states that are not there."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

import bnbx.optim
from bnbx.errors import BnbxWarning, OptionError
from bnbx.kernels import cpu, master
from bnbx.kernels.signature import make_signature
from bnbx.kernels.source import render
from bnbx.optimizers.engine import Optimizer8bit
from bnbx.registry import optimizers

LR, STEPS, SIZE = 1e-6, 200, 1 << 14
# A usual size of weights; bfloat16 numbers there are 2**-13 apart, a hundred times lr.
START, STEP = 0.02, 2.0**-13


def start(dtype: torch.dtype, scale: int) -> Tensor:
    """Weights in [0.016, 0.031) times `scale`, a power of two, which bfloat16 has exactly."""
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(128, 250, (SIZE,), generator=generator)
    return (places.float() * STEP * scale).to(dtype).requires_grad_()


def trained(
    dtype: torch.dtype, scale: int = 1, **options: Any
) -> tuple[Tensor, Tensor, Optimizer8bit]:
    """Weights before and after; gradients all point one way, so that each step is lr long."""
    p = start(dtype, scale)
    before = p.detach().clone()
    optimizer = bnbx.optim.create("adamw", [p], lr=LR, weight_decay=0.0, bits=32, **options)
    assert isinstance(optimizer, Optimizer8bit)
    p.grad = torch.full((SIZE,), 0.5, dtype=dtype)
    for _ in range(STEPS):
        optimizer.step()
    return before.float(), p, optimizer


@pytest.fixture(scope="module")
def moved_in_float32() -> float:
    """How far a float32 run goes: the same for every weight, but for its roundings."""
    before, p, _ = trained(torch.float32)
    moved = (p.detach().double() - before.double()).mean()
    assert float(moved) == pytest.approx(-LR * STEPS, rel=1e-3)
    return float(moved)


def test_plain_bfloat16_stalls() -> None:
    before, p, optimizer = trained(torch.bfloat16)
    assert torch.equal(p.detach().float(), before)
    assert "residual" not in optimizer.state[p]


@pytest.mark.parametrize("scale", [1, 32], ids=["usual", "near one"])
@pytest.mark.parametrize("name", ["kahan", "residual"])
def test_masters_move_as_float32_does(name: str, scale: int, moved_in_float32: float) -> None:
    """Each step's sum is rounded stochastically to what the residual can hold.

    kahan: the residual is at most half a step of the parameter, and of 8 bits itself: its own steps
    are 2**-8 of that. residual: its steps are a 127th of half a step. The parameters' steps are 32
    times as large near one, so that an update there is a thousandth of them, and less than half of
    what either residual can tell apart: rounded to nearest, it would be lost.
    """
    before, p, optimizer = trained(torch.bfloat16, scale, master=name)
    held = master.load(name, p.detach(), optimizer.state[p]["residual"]).double()
    moved = held - before.double()
    step = STEP * scale
    unit = step / 2 * 2.0**-8 if name == "kahan" else step / 2 / 127
    # Independent errors, of variance at most update * unit each; float32 rounds each sum; and
    # the residual leaves out what is within a 128th of a unit of a whole one.
    sigma = math.sqrt(STEPS * LR * unit / SIZE)
    rounding = STEPS * (2.0**-24 * 0.04 * scale + (unit / 128 if name == "residual" else 0.0))
    allowed = 6 * sigma + rounding
    assert abs(float(moved.mean()) - moved_in_float32) <= allowed
    assert allowed < 0.25 * abs(moved_in_float32), "a bound as wide as this would prove little"
    assert bool(((p.detach().double() - held).abs() <= step / 2 * (1 + 2.0**-6)).all())
    if scale == 1:  # it arrives in the weights themselves: all that moved by more than half a step
        assert float((p.detach().float() - before).abs().max()) >= STEP


def test_stochastic_rounding_moves_as_float32_does_in_the_mean(moved_in_float32: float) -> None:
    """Each step adds independent errors of variance at most lr * STEP to each weight."""
    before, p, optimizer = trained(torch.bfloat16, master="stochastic")
    moved = p.detach().double() - before.double()
    sigma = math.sqrt(STEPS * LR * STEP / SIZE)
    assert abs(float(moved.mean()) - moved_in_float32) < 6 * sigma
    assert 6 * sigma < 0.05 * abs(moved_in_float32)
    assert "residual" not in optimizer.state[p]
    assert len(set(moved.tolist())) > 2


@pytest.mark.parametrize("name", ["stochastic", "kahan", "residual"])
def test_a_master_of_a_float32_parameter_is_none(name: str) -> None:
    _, plain, _ = trained(torch.float32)
    _, p, optimizer = trained(torch.float32, master=name)
    assert torch.equal(p, plain)
    assert "residual" not in optimizer.state[p]


def test_stochastic_runs_repeat_themselves() -> None:
    assert torch.equal(trained(torch.bfloat16, master="stochastic")[1],
                       trained(torch.bfloat16, master="stochastic")[1])  # fmt: skip


@pytest.mark.parametrize(("name", "bytes_"), [("kahan", 2), ("residual", 1)])
def test_what_a_master_costs(name: str, bytes_: int) -> None:
    _, p, optimizer = trained(torch.bfloat16, master=name)
    kept = optimizer.state[p]["residual"]
    assert kept.shape == p.shape
    assert kept.element_size() == bytes_


def test_what_kahan_keeps_follows_the_dtype_of_its_parameter() -> None:
    """`model.half()` in mid-run: what rounding has lost is added back all the same."""
    _, p, optimizer = trained(torch.bfloat16, master="kahan")
    kept = optimizer.state[p]["residual"]
    total = p.detach().float() + kept.float()
    p.grad, p.data = None, p.data.half()
    p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    kept = optimizer.state[p]["residual"]
    assert kept.dtype is torch.float16
    assert torch.allclose(p.detach().float() + kept.float(), total, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("name", "other"), [("kahan", "residual"), ("residual", "kahan")])
def test_a_master_cannot_become_another_in_mid_run(name: str, other: str) -> None:
    _, p, optimizer = trained(torch.bfloat16, master=name)
    before = p.detach().clone()
    optimizer.param_groups[0]["master"] = other
    message = f"as master='{name}' keeps it, but its parameter now asks for master='{other}'"
    with pytest.raises(OptionError, match=message):
        optimizer.step()
    assert torch.equal(p, before)
    fresh = bnbx.optim.create("adamw", [p], bits=32, master=other)
    with pytest.warns(BnbxWarning, match="residual|master"):
        fresh.load_state_dict(optimizer.state_dict())
    fresh.param_groups[0]["master"] = other
    fresh.step()


# ---- states that are switched off

OPTIONAL = [
    ("sgd", dict(momentum=0.0), ("m",)),
    ("lars", dict(momentum=0.0), ("m",)),
    ("rmsprop", dict(momentum=0.0, centered=False), ("m", "mean")),
    ("rmsprop", dict(momentum=0.9, centered=False), ("mean",)),
    ("rmsprop", dict(momentum=0.0, centered=True), ("m",)),
    ("adam", dict(amsgrad=False), ("vmax",)),
    ("adamw", dict(amsgrad=False), ("vmax",)),
    ("lamb", dict(amsgrad=False), ("vmax",)),
]


@pytest.mark.parametrize(("rule", "off", "absent"), OPTIONAL, ids=str)
@pytest.mark.parametrize("bits", [4, 8, 32])
def test_a_state_that_is_off_takes_no_memory_and_no_column(
    rule: str, off: dict[str, Any], absent: tuple[str, ...], bits: int
) -> None:
    p = torch.randn(512).requires_grad_()
    p.grad = torch.randn(512)
    optimizer = bnbx.optim.create(rule, [p], lr=0.1, bits=bits, min_8bit_size=0, **off)
    optimizer.step()
    names = {state.name for state in optimizers().get(rule).states}
    assert set(absent) <= names
    keys = {key for key in optimizer.state[p] if key != "step"}
    suffixes = ("_absmax", "_type") if bits < 32 else ()
    present = names - set(absent)
    assert keys == present | {name + suffix for name in present for suffix in suffixes}
    plan = optimizer._slots.plan(p, p.grad.dtype, optimizer.resolved(p))
    columns = {column.name for column in make_signature(plan).columns}
    assert present <= columns
    source = render(plan, cpu.TEMPLATE)
    for name in absent:
        assert not {name, f"{name}_absmax"} & columns
        assert not re.search(rf"\b(State|Most|Largest)_{name}\b|->{name}_\b", source)
    for name in present:
        assert re.search(rf"\bState_{name}\b", source)
