"""A rule's text as the oracle of its kernels: a step of it, and whether a kernel's agrees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bnbx.kernels.evaluate import HOST, evaluate
from bnbx.optimizers.engine import Optimizer8bit
from bnbx.registry import Optimizer, quant_types
from bnbx.registry.quant_type import Codebook, QuantType
from optimizers.rounding import OPERATIONS, TINY, UNIT, Bounded, exact, scalar

SMALLEST_NORMAL = 2.0**-126


def hyperparameters(spec: Optimizer, group: Mapping[str, Any]) -> dict[str, float]:
    """The values of a group, packs unpacked."""
    found: dict[str, float] = {}
    for argument in spec.arguments:
        if argument in spec.packs:
            found.update(zip(spec.packs[argument], group[argument], strict=True))
        else:
            found[argument] = group[argument]
    return found


def step_of_text(
    spec: Optimizer, hyper: Mapping[str, float], step: int, values: Mapping[str, Bounded]
) -> dict[str, Bounded]:
    """The text as it is written, run once: `values` has p, g and the states; so has the result."""
    host: dict[str, float] = {**hyper, "step": step}
    for statement in spec.step.statements:
        host[statement.target] = evaluate(statement.value, host, HOST)
    known = {name: scalar(value) for name, value in host.items()} | {"step": exact(step)}
    # A state that is switched off is not read, but both branches of a `where` are evaluated.
    known |= {state.name: exact(torch.zeros_like(values["g"].value)) for state in spec.states}
    known |= values
    for statement in spec.element.statements:
        known[statement.target] = evaluate(statement.value, known, OPERATIONS)
    return {name: known[name] for name in values if name != "g"}


def decoded(quant_type: QuantType, signed: bool, codes: Tensor, absmax: Tensor) -> Tensor:
    """The numbers that codes and absmax stand for, in the codes' shape."""
    levels = torch.tensor(quant_type.codebook(signed=signed).values, dtype=torch.float32)
    scale = absmax.repeat_interleave(quant_type.block_size)[: codes.numel()]
    return levels[codes.long()] * scale.view_as(codes)


@dataclass
class Held:
    """A copy of what an optimizer holds of a parameter: values of p and the states, and codes."""

    step: int
    values: dict[str, Tensor]
    codes: dict[str, tuple[QuantType, bool, Tensor, Tensor]]


def held(optimizer: Optimizer8bit, p: Tensor, state_types: Mapping[str, str]) -> Held:
    """What `optimizer` holds of `p` now; before the first step nothing but p."""
    saved = optimizer.state[p]
    found = Held(saved.get("step", 0), {"p": p.detach().clone()}, {})
    for state in optimizer.spec.states:
        if state.name not in saved:
            continue
        value = saved[state.name].clone()
        if f"{state.name}_absmax" in saved:
            quant_type = quant_types().get(state_types[state.name])
            absmax = saved[f"{state.name}_absmax"].clone()
            found.codes[state.name] = (quant_type, state.signed, value, absmax)
            value = decoded(quant_type, state.signed, value, absmax)
        found.values[state.name] = value
    return found


def check_step(
    spec: Optimizer, hyper: Mapping[str, float], gradient: Tensor, before: Held, after: Held
) -> tuple[int, int]:
    """Assert that the step from `before` to `after` is the text's, up to float32 rounding.

    Returns:
        How many codes the text determines, and how many there are: a state that lies within its
        own rounding of the middle between two codes may get either.
    """
    assert after.step == before.step + 1
    shape = gradient.shape
    start = {name: exact(torch.zeros(shape)) for name in after.values} | {
        name: exact(value) for name, value in before.values.items()
    }
    expected = step_of_text(spec, hyper, after.step, {**start, "g": exact(gradient)})
    determined = total = 0
    for name, value in after.values.items():
        if name in after.codes:
            counts = check_codes(expected[name], *after.codes[name])
            determined, total = determined + counts[0], total + counts[1]
        else:
            check_within(expected[name], value)
    return determined, total


def check_within(expected: Bounded, value: Tensor) -> None:
    """Assert that a value is one that the bound allows: rounding to a dtype keeps the order."""
    assert not value.isnan().any()
    assert (expected.low.to(value.dtype) <= value).all()
    assert (value <= expected.high.to(value.dtype)).all()


def check_codes(
    expected: Bounded, quant_type: QuantType, signed: bool, codes: Tensor, absmax: Tensor
) -> tuple[int, int]:
    """Assert that codes and absmax are those of the nearest table entries; counts as above."""
    codebook = quant_type.codebook(signed=signed)
    size, numel = quant_type.block_size, codes.numel()
    value, error = (
        torch.nn.functional.pad(t.reshape(-1), (0, -numel % size)).view(-1, size)
        for t in (expected.value, expected.error)
    )
    largest, allowed = value.abs().amax(1), error.amax(1)
    zero = largest + allowed < SMALLEST_NORMAL
    assert (absmax[zero] == 0).all()
    assert ((absmax.double() - largest).abs() <= allowed)[~zero].all()
    divisor = torch.where(zero, 1.0, absmax.double())[:, None]
    scaled = torch.where(zero[:, None], 0.0, value / divisor)
    # The inverse of absmax, the product with it and the threshold are each rounded once.
    room = torch.where(zero[:, None], 0.0, error / divisor)
    room = torch.where(zero[:, None], 0.0, room + 3 * UNIT * (scaled.abs() + room) + TINY)
    low = ranks(codebook, scaled - room).reshape(-1)[:numel]
    high = ranks(codebook, scaled + room).reshape(-1)[:numel]
    rank = np.argsort(codebook.codes)[codes.reshape(-1).numpy()]
    assert ((low <= rank) & (rank <= high)).all()
    return int((low == high).sum()), numel


def ranks(codebook: Codebook, x: Tensor) -> npt.NDArray[np.int64]:
    """The place of the nearest table entry in ascending order; of two as near, the lower."""
    ascending = np.sort(np.array(codebook.values, np.float64))
    found: npt.NDArray[np.int64] = np.searchsorted((ascending[:-1] + ascending[1:]) / 2, x.numpy())
    return found
