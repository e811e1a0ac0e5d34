"""A rule's text as the oracle of its kernels: a step of it, and whether a kernel's agrees."""

from __future__ import annotations

import math
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
from optimizers.rounding import (
    OPERATIONS,
    TINY,
    UNIT,
    WIDE_OPERATIONS,
    Bounded,
    exact,
    norm,
    rounded,
    scalar,
)

SMALLEST_NORMAL = 2.0**-126
LARGEST = 2.0**128 - 2.0**104


def hyperparameters(spec: Optimizer, group: Mapping[str, Any]) -> dict[str, float]:
    """The values of a group, packs unpacked; None is 0."""
    found: dict[str, Any] = {}
    for argument in spec.arguments:
        if argument in spec.packs:
            found.update(zip(spec.packs[argument], group[argument], strict=True))
        else:
            found[argument] = group[argument]
    return {name: 0.0 if value is None else value for name, value in found.items()}


def spec_of(spec: Optimizer, group: Mapping[str, Any]) -> Optimizer:
    """The rule that a group runs: its clipped form where max_unorm is the engine's, and on."""
    clips = "max_unorm" not in spec.hyper and group.get("max_unorm", 0) > 0
    return spec.clipped if clips else spec


def initial_values(spec: Optimizer, hyper: Mapping[str, float], p: Tensor) -> dict[str, Tensor]:
    """The states of a parameter before its first step, float32."""
    found = {}
    for state in spec.states:
        name = state.initial or ""
        number = float(hyper[name]) if name in hyper else 0.0
        full = torch.full(p.shape, number, dtype=torch.float32)
        found[state.name] = p.detach().float().clone() if state.initial == "p" else full
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
    if spec.tensor.statements:
        known |= tensor_values(spec, host, known)
    for statement in spec.apply.statements:
        known[statement.target] = evaluate(statement.value, known, OPERATIONS)
    return {name: known[name] for name in values if name != "g"}


def tensor_values(
    spec: Optimizer, host: Mapping[str, float], known: Mapping[str, Bounded]
) -> dict[str, Bounded]:
    """What tensor_code computes, in float64, and the second pass gets rounded to float32."""
    shape = known["p"].value.shape
    wide = {name: exact(value) for name, value in host.items()} | {"numel": exact(shape.numel())}
    for name in {"p", "g", *(state.name for state in spec.states), *spec.element.writes}:
        value = known[name]
        full = Bounded(value.value.expand(shape), value.error.expand(shape))
        wide[f"norm_{name}"] = norm(full)
    for statement in spec.tensor.statements:
        wide[statement.target] = evaluate(statement.value, wide, WIDE_OPERATIONS)
    results = {name: wide[name] for name in spec.tensor.writes}
    return {name: rounded(result.value, result.error) for name, result in results.items()}


def unpacked(quant_type: QuantType, packed: Tensor, shape: torch.Size) -> Tensor:
    """Codes in bytes of their own, of a parameter's shape; the first code has the highest bits."""
    if quant_type.bits == 8:
        return packed
    bits = np.unpackbits(packed.numpy())[: shape.numel() * quant_type.bits]
    weights = 2 ** np.arange(quant_type.bits)[::-1]
    codes = bits.reshape(-1, quant_type.bits) @ weights
    return torch.from_numpy(codes.astype(np.uint8)).view(shape)


def decoded(quant_type: QuantType, signed: bool, codes: Tensor, absmax: Tensor) -> Tensor:
    """The numbers that codes and absmax stand for, in the codes' shape."""
    codebook = quant_type.codebook(signed=signed)
    numbers = [math.nan if value is None else value / codebook.unit for value in codebook.values]
    levels = torch.tensor(numbers, dtype=torch.float32)
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
            value = unpacked(quant_type, value, p.shape)
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
    initial = initial_values(spec, hyper, before.values["p"])
    start = {name: exact(value) for name, value in {**initial, **before.values}.items()}
    start = {name: start[name] for name in after.values}
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
    least = max(SMALLEST_NORMAL, codebook.unit / LARGEST)  # of what has a finite inverse
    zero = largest + allowed < least
    assert (absmax[zero] == 0).all()
    assert ((absmax.double() - largest).abs() <= allowed)[~zero].all()
    divisor = torch.where(zero, 1.0, absmax.double())[:, None]
    scaled = torch.where(zero[:, None], 0.0, codebook.unit * (value / divisor))
    # The inverse of absmax, the product with it and the threshold are each rounded once.
    room = torch.where(zero[:, None], 0.0, codebook.unit * (error / divisor))
    room = torch.where(zero[:, None], 0.0, room + 3 * UNIT * (scaled.abs() + room) + TINY)
    low = ranks(codebook, scaled - room).reshape(-1)[:numel]
    high = ranks(codebook, scaled + room).reshape(-1)[:numel]
    places = {code: place for place, code in enumerate(codebook.codes)}
    rank = np.array([places.get(code, -1) for code in range(len(codebook.values))])
    rank = rank[codes.reshape(-1).numpy()]
    assert ((low <= rank) & (rank <= high)).all()
    return int((low == high).sum()), numel


def ranks(codebook: Codebook, x: Tensor) -> npt.NDArray[np.int64]:
    """The place of the nearest table entry in ascending order; of two as near, the lower.

    Where a grid comes between, its thresholds are held to it by the tests of quant types.
    """
    ascending = np.array([codebook.values[code] for code in codebook.codes], np.float64)
    middles = (ascending[:-1] + ascending[1:]) / 2
    edges = np.array(codebook.thresholds) if codebook.grid else middles
    found: npt.NDArray[np.int64] = np.searchsorted(edges, x.numpy())
    return found


def groups_of(optimizer: Optimizer8bit) -> dict[Tensor, tuple[Optimizer, dict[str, float]]]:
    """By parameter: the rule that it runs, and the hyperparameters of its group."""
    found: dict[Tensor, tuple[Optimizer, dict[str, float]]] = {}
    for group in optimizer.param_groups:
        hyper = hyperparameters(optimizer.spec, group)
        spec = spec_of(optimizer.spec, group)
        hyper |= {name: group[name] for name in spec.hyper.keys() - hyper.keys()}
        found |= dict.fromkeys(group["params"], (spec, hyper))
    return found


class Follower:
    """The text's parameters and float32 states, stepped beside an optimizer and never corrected.

    `sign` is -1 for an optimizer that goes up.
    """

    def __init__(self, optimizer: Optimizer8bit, sign: float = 1.0) -> None:
        self.groups = groups_of(optimizer)
        self.sign = sign
        self.steps = 0
        self.values: dict[Tensor, dict[str, Bounded]] = {}
        for p, (spec, hyper) in self.groups.items():
            found = {"p": p.detach().clone(), **initial_values(spec, hyper, p)}
            active = [s.name for s in spec.states if s.when is None or hyper[s.when]]
            self.values[p] = {name: exact(found[name]) for name in ("p", *active)}

    def step(self) -> None:
        """A step on the gradients that the parameters have."""
        self.steps += 1
        for p, (spec, hyper) in self.groups.items():
            assert p.grad is not None
            values = {**self.values[p], "g": exact(self.sign * p.grad)}
            self.values[p] = step_of_text(spec, hyper, self.steps, values)
