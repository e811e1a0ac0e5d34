"""The codes of 8-bit states are those that bitsandbytes gives the same float32 states.

bitsandbytes quantizes blocks on a CPU in two ways. For float64 input it searches the nearest table
entry. For float32 input, the dtype that its own optimizers pass, it first rounds each scaled value
to a grid of 65536 points over [-1, 1], then takes the entry nearest to the grid point; values
smaller than the grid are lost. bnbx equals the first bit for bit. The second may differ from the
nearest entry, and the tests show that this rounding is all that it differs by.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from bnbx.optim import create
from bnbx.optimizers.engine import Optimizer8bit
from bnbx.registry import quant_types
from optimizers.text import decoded
from optimizers.variants import gradients, parameters
from oracles import bitsandbytes_functional

BLOCK = 256
SHAPES = [(1,), (255,), (256,), (4096,), (17, 241), (3, 5000)]
ARGUMENTS: dict[str, dict[str, Any]] = {
    "adamw": dict(lr=1e-2, betas=(0.8, 0.95), weight_decay=0.1),
    "lion": dict(lr=1e-3, betas=(0.8, 0.95), weight_decay=0.1),
}


@dataclass(frozen=True)
class Quantized:
    """A state of one parameter after a step: what was to be quantized, and what bnbx made of it."""

    signed: bool
    state: Tensor
    codes: Tensor
    absmax: Tensor

    def blocks(self, value: Tensor) -> Tensor:
        """A value per block, for each element."""
        return value.repeat_interleave(BLOCK)[: self.codes.numel()]


def quantized_steps(rule: str, steps: int = 5) -> Iterator[Quantized]:
    """Every quantized state of some steps of `rule`.

    The float32 state before quantization is that of a 32-bit optimizer which is handed the same
    decoded states, and takes the same step.
    """
    params = parameters(torch.float32, SHAPES)
    optimizer = create(rule, params, bits=8, min_8bit_size=0, **ARGUMENTS[rule])
    for _ in range(steps):
        wide_params = [p.detach().clone().requires_grad_() for p in params]
        wide = create(rule, wide_params, bits=32, **ARGUMENTS[rule])
        hand_over(optimizer, wide)
        for p, q, value in zip(params, wide_params, gradients(params), strict=True):
            p.grad, q.grad = value, value.clone()
        optimizer.step()
        wide.step()
        for p, q in zip(params, wide_params, strict=True):
            assert torch.equal(p, q)
            saved, floats = optimizer.state[p], wide.state[q]
            for state in optimizer.spec.active_states(optimizer.resolved(p).switches):
                codes, absmax = saved[state.name], saved[f"{state.name}_absmax"]
                value = floats[state.name].view(-1)
                yield Quantized(state.signed, value, codes.view(-1), absmax)


def hand_over(narrow: Optimizer8bit, wide: Optimizer8bit) -> None:
    """Load the states of an 8-bit optimizer into a 32-bit one, decoded."""
    quant_type = quant_types().get("dynamic8")
    saved, target = narrow.state_dict(), wide.state_dict()
    for index, entry in saved["state"].items():
        target["state"][index] = {"step": entry["step"]} | {
            s.name: decoded(quant_type, s.signed, entry[s.name], entry[f"{s.name}_absmax"])
            for s in narrow.spec.states
            if s.name in entry
        }
    wide.load_state_dict(target)


def table(*, signed: bool) -> Tensor:
    found: Tensor = bitsandbytes_functional().create_dynamic_map(signed=signed)
    return found


def bitsandbytes_codes(found: Quantized, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    code = table(signed=found.signed)
    quantize = torch.ops.bitsandbytes.quantize_blockwise
    codes, absmax = quantize(found.state.to(dtype), code, BLOCK)
    return codes, absmax


@pytest.mark.parametrize("rule", ARGUMENTS)
def test_codes_are_those_of_the_exact_search(rule: str) -> None:
    zero_blocks = subnormal_blocks = 0
    for found in quantized_steps(rule):
        codes, absmax = bitsandbytes_codes(found, torch.float64)
        subnormal = (absmax > 0) & (absmax < 2.0**-126)
        assert torch.equal(found.absmax[~subnormal], absmax[~subnormal])
        # Where absmax is zero, bitsandbytes looks for the entry nearest to 0 * inf and finds the
        # lowest; a subnormal absmax, whose inverse may be infinite, counts as zero in bnbx. Such
        # blocks decode to zero under any codes, here they have that of zero.
        zero = found.blocks(absmax) < 2.0**-126
        assert torch.equal(found.codes[~zero], codes[~zero])
        assert (found.absmax[subnormal] == 0).all()
        code_of_zero = table(signed=found.signed).abs().argmin()
        assert (found.codes[zero] == code_of_zero).all()
        zero_blocks += int((absmax == 0).sum())
        subnormal_blocks += int(subnormal.sum())
    assert zero_blocks > 0
    assert subnormal_blocks > 0 or rule == "lion"  # it has no second moment


@pytest.mark.parametrize("rule", ARGUMENTS)
def test_codes_differ_from_those_of_the_grid_only_by_its_rounding(rule: str) -> None:
    differing = total = 0
    for found in quantized_steps(rule):
        codes, absmax = bitsandbytes_codes(found, torch.float32)
        usable = found.blocks(found.absmax) > 0
        assert torch.equal(found.absmax[found.absmax > 0], absmax[found.absmax > 0])
        x = (found.state / found.blocks(absmax))[usable].double()
        ours, theirs = found.codes[usable].long(), codes[usable].long()
        values = table(signed=found.signed).double()
        apart = ours != theirs
        assert nearest_of_grid(values, x[apart], theirs[apart]).all()
        assert ((values[ours] - x).abs() <= (values[theirs] - x).abs())[apart].all()
        differing, total = differing + int(apart.sum()), total + len(x)
    assert 0 < differing < total / 2


def nearest_of_grid(values: Tensor, x: Tensor, codes: Tensor) -> Tensor:
    """Whether each code's value is the nearest one to the grid point that x is rounded to.

    bitsandbytes computes the place on the grid, up to 65535, in float32: the scaling of x, the
    sum and the product are off by 2**-9 each at most. So close to the middle between two points, x
    may go to either. The points themselves, at most 1 in magnitude, are off by 2**-24 at most.
    """
    place = (x + 1) * 32767.5
    found = torch.zeros_like(x, dtype=torch.bool)
    for nudge in (-(2.0**-7), 2.0**-7):
        point = (place + nudge).round() / 32767.5 - 1
        distance = (values[None] - point[:, None]).abs()
        reached = (values[codes] - point).abs()
        found |= reached <= distance.amin(1) + 2.0**-22
    return found
