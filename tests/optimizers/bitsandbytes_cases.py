"""Rules with the classes of bitsandbytes that have them, and how steps of both are compared.

A next step is held against the text of the rule: both libraries compute the same formula with
about as many float32 operations in another order, so each lies within the text's own rounding
bound, which for bitsandbytes is doubled.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from bnbx.optim import create
from bnbx.optimizers.engine import Optimizer8bit
from bnbx.registry import quant_types
from optimizers.compare import equal, parameters_of
from optimizers.rounding import Bounded, exact
from optimizers.saved import train
from optimizers.text import check_within, decoded, hyperparameters, step_of_text

bitsandbytes: Any = pytest.importorskip("bitsandbytes", reason="the extra `peers` has it")

SHAPES = [(5000,), (64, 70), (100,), ()]
NEST = "__bnb_optimizer_quant_state__"
BETAS = (0.8, 0.95)


@dataclass(frozen=True)
class Case:
    """A rule with the class of bitsandbytes that has it, and the arguments of both."""

    rule: str
    name: str
    theirs: dict[str, Any]
    state_keys: dict[str, str] = field(default_factory=dict)


M1 = {"m": "state1"}
V1 = {"v": "state1"}
TWO = {"m": "state1", "v": "state2"}
SIGNED = ("rmsprop", "adagrad")  # their states have no sign, and the table of those that have
HUGE = 1e30  # a bound on norms that bounds nothing: its 8-bit kernels on a CPU leave it out
CASES = {
    case.rule: case
    for case in (
        Case("adamw", "AdamW", dict(betas=BETAS, eps=1e-6, weight_decay=0.1), state_keys=TWO),
        Case("adam", "Adam", dict(betas=BETAS, eps=1e-6), state_keys=TWO),
        Case(
            "ademamix",
            "AdEMAMix",
            dict(betas=(*BETAS, 0.999), alpha=3.0, t_alpha=20, t_beta3=20, weight_decay=0.1),
            state_keys={"m1": "state1[0]", "m2": "state1[1]", "v": "state2"},
        ),
        Case("lion", "Lion", dict(betas=BETAS, weight_decay=0.1), state_keys=M1),
        Case("lamb", "LAMB", dict(betas=BETAS, max_unorm=HUGE), state_keys=TWO),
        Case("lars", "LARS", dict(momentum=0.9, weight_decay=0.1, max_unorm=HUGE), state_keys=M1),
        Case("sgd", "SGD", dict(momentum=0.9, weight_decay=0.1), state_keys=M1),
        Case("rmsprop", "RMSprop", dict(alpha=0.9, eps=1e-6, weight_decay=0.1), state_keys=V1),
        Case("adagrad", "Adagrad", dict(eps=1e-6, weight_decay=0.1), state_keys=V1),
    )
}
BITS = (8, 32)
EVERY = [(rule, bits) for rule in CASES for bits in BITS]
EQUAL = [(rule, bits) for rule, bits in EVERY if bits == 32 or rule not in SIGNED]
LR = 1e-3


def theirs_of(case: Case, params: list[Tensor], bits: int) -> Any:
    return theirs_with(case, params, bits, lr=LR, **case.theirs)


def theirs_with(case: Case, params: list[Tensor], bits: int, **arguments: Any) -> Any:
    made: Any = getattr(bitsandbytes.optim, case.name)
    return made(groups_of(params), optim_bits=bits, **arguments)


def groups_of(params: list[Tensor]) -> list[dict[str, Any]]:
    """Two groups, the second with a learning rate of its own."""
    return [{"params": params[:2]}, {"params": params[2:], "lr": 5 * LR}]


def ours_of(case: Case, params: list[Tensor], bits: int = 8, **arguments: Any) -> Optimizer8bit:
    """An optimizer whose values all have to come from the checkpoint, but for max_unorm."""
    kept = {k: v for k, v in case.theirs.items() if k == "max_unorm"}
    made: Optimizer8bit = create(case.rule, groups_of(params), bits=bits, **kept, **arguments)
    return made


def part(saved: dict[str, Any], key: str) -> Any:
    """An entry of bitsandbytes' states, or the i-th of a stack: `key[i]`."""
    found = re.fullmatch(r"(\w+)(?:\[(\d)\])?", key)
    assert found
    value = saved.get(found[1])
    return value if value is None or found[2] is None else value[int(found[2])]


def same_states(case: Case, ours: Optimizer8bit, theirs: Any) -> int:
    """Assert that both hold the same bits; returns how many states are quantized."""
    quantized = 0
    for p, q in zip(parameters_of(ours), parameters_of(theirs), strict=True):
        saved, other = ours.state[p], theirs.state[q]
        assert saved["step"] == other["step"] > 0
        for name, key in case.state_keys.items():
            assert equal(saved[name], part(other, key)), name
            absmax = part(other, key.replace("state", "absmax"))
            assert (absmax is None) == (f"{name}_absmax" not in saved)
            if absmax is not None:
                assert equal(saved[f"{name}_absmax"], absmax), name
                quantized += 1
    return quantized


Values = dict[str, Tensor]


def values_of(case: Case, ours: Optimizer8bit, p: Tensor) -> Values:
    """What the text starts from: the parameter and its states, decoded."""
    found = {"p": p.detach().clone()}
    signed = {state.name: state.signed for state in ours.spec.states}
    for name in case.state_keys:
        value = ours.state[p][name].clone()
        if f"{name}_absmax" in ours.state[p]:
            quant_type = quant_types().get(ours.state[p][f"{name}_type"])
            absmax = ours.state[p][f"{name}_absmax"]
            value = decoded(quant_type, signed[name], value, absmax)
        found[name] = value
    return found


def compare_steps(case: Case, ours: Optimizer8bit, theirs: Any, first: int) -> None:
    """Step both from the same states, and hold both against the text."""
    params, others = parameters_of(ours), parameters_of(theirs)
    before = [values_of(case, ours, p) for p in params]
    groups = [group for group in ours.param_groups for _ in group["params"]]
    grads = train(theirs, others, first, 1)
    train(ours, params, first, 1)
    for p, q, g, start, group in zip(params, others, grads, before, groups, strict=True):
        hyper = hyperparameters(ours.spec, group)
        values = {name: exact(value) for name, value in start.items()}
        step = ours.state[p]["step"]
        text = step_of_text(ours.spec, hyper, step, {**values, "g": exact(g)})
        check_within(text["p"], p.detach())
        check_within(Bounded(text["p"].value, 2 * text["p"].error), q.detach())
        after = values_of(case, ours, p)
        for name, key in case.state_keys.items():
            theirs_now = part(theirs.state[q], key)
            if theirs_now.dtype == torch.float32:
                check_within(Bounded(text[name].value, 2 * text[name].error), theirs_now)
            else:
                check_codes(case, ours, name, text[name], after[name], theirs.state[q])


def check_codes(
    case: Case, ours: Optimizer8bit, name: str, text: Bounded, mine: Tensor, saved: dict[str, Any]
) -> None:
    """Their code is that of a point on a grid of 65536 at most half its step away (and a little).

    So it is farther from the value than ours by a step at most, in units of absmax; see
    test_bitsandbytes_codes.
    """
    key = case.state_keys[name]
    quant_type = quant_types().get("dynamic8")
    signed = next(state.signed for state in ours.spec.states if state.name == name)
    absmax = part(saved, key.replace("state", "absmax"))
    value = decoded(quant_type, signed, part(saved, key), absmax).double()
    scale = absmax.repeat_interleave(256)[: value.numel()].view_as(value).double()
    room = scale * (1 + 2.0**-6) / 32767.5 + 4 * text.error
    usable = scale >= 2.0**-126  # the inverse of a subnormal number may be infinite
    near = (value - text.value).abs() <= (mine.double() - text.value).abs() + room
    assert near[usable].all()
