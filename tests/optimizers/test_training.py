"""Every rule trains with quantized states as it does with states in float32.

Each step being that of the text (test_rules.py) does not tell whether rounding the states in
between lets a rule diverge: a difference of two of them, or a division by one, can.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnbx.optimizers.engine import Optimizer8bit
from optimizers.variants import CASES, VARIANTS

STEPS = 100
# Where the variants' own, made for ten steps of random gradients, would hardly move: by rule.
RATES = {"adagrad": 0.1, "lars": 1.0, "sgd": 0.3}


@lru_cache(maxsize=1)
def problem() -> tuple[nn.Module, Tensor, Tensor]:
    """Sums of four numbers modulo 64, from a table of them."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(64, 64), nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 64)
    )
    x = torch.randint(0, 64, (256, 4))
    return model, x, x.sum(1) * 7 % 64


def arguments_of(rule: str, variant: str) -> dict[str, Any]:
    found = {**VARIANTS[rule][variant][0], "weight_decay": 0.0, "lr": RATES.get(rule, 1e-3)}
    if "max_unorm" in found:
        found |= dict(max_unorm=max(found["max_unorm"], 0.3), lr=max(found["lr"], 0.03))
    return found


def losses(rule: str, arguments: dict[str, Any], bits: int) -> tuple[float, float]:
    """The first and the last."""
    model, x, y = problem()
    model = copy.deepcopy(model)
    optimizer = Optimizer8bit(model.parameters(), rule, bits=bits, **arguments)
    found = []
    for _ in range(STEPS):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        found.append(loss.item())
    return found[0], found[-1]


@lru_cache(maxsize=64)
def in_float32(rule: str, variant: str) -> tuple[float, float]:
    return losses(rule, arguments_of(rule, variant), 32)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("rule", "variant"), CASES)
def test_the_loss_falls_as_with_states_in_float32(rule: str, variant: str, bits: int) -> None:
    first, expected = in_float32(rule, variant)
    assert expected < 0.9 * first  # else this would say nothing
    _, found = losses(rule, arguments_of(rule, variant), bits)
    assert found < expected + 0.1 * (first - expected)
