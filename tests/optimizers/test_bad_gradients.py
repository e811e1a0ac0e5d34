"""What NaN and infinite gradients do: the harm shows, and reaches no further than its block."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bnbx.kernels.lower import lower
from bnbx.optim import create
from bnbx.optimizers import engine
from bnbx.optimizers.engine import Optimizer8bit
from optimizers.compare import assert_same, equal
from optimizers.variants import CASES, TARGETS, VARIANTS, copies, gradients, parameters

SIZE, AT = 1100, 300
ELEMENT = torch.arange(SIZE) == AT
BLOCK = torch.arange(SIZE) // 256 == AT // 256
BAD = (math.nan, math.inf, -math.inf)
SIGNS = ("lion", "cautious_lion")


def has_norms(rule: str, variant: str) -> bool:
    """Whether every element's update depends on all gradients of the tensor."""
    p = parameters(torch.float32, [(3,)])[0]
    optimizer = create(rule, [p], **VARIANTS[rule][variant][0])
    resolved = optimizer.resolved(p)
    spec = optimizer.spec.clipped if resolved.clip else optimizer.spec
    return bool(lower(spec, resolved.switches).norms)


LOCAL = [case for case in CASES if not has_norms(*case)]
WITH_NORMS = [case for case in CASES if case not in LOCAL]


def three_steps(
    rule: str, p: Tensor, bad: float, **arguments: Any
) -> tuple[Optimizer8bit, list[Tensor]]:
    """The parameter after each of three steps; one element of the second gradient is `bad`."""
    optimizer = create(rule, [p], min_8bit_size=0, **arguments)
    seen = []
    for step in range(3):
        torch.manual_seed(step)
        p.grad = gradients([p])[0]
        if step == 1:
            p.grad[AT] = bad
        optimizer.step()
        seen.append(p.detach().clone())
    return optimizer, seen


def clean_and_dirty(
    rule: str, variant: str, bad: float, **arguments: Any
) -> tuple[list[Tensor], list[Tensor]]:
    params = parameters(torch.float32, [(SIZE,)])
    arguments = {**VARIANTS[rule][variant][0], **arguments}
    runs = [
        three_steps(rule, p, value, **arguments)[1]
        for p, value in zip(params + copies(params), (1.0, bad), strict=True)
    ]
    assert equal(runs[0][0], runs[1][0])
    return runs[0], runs[1]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(("rule", "variant"), CASES)
def test_targets_agree_about_bad_gradients(
    rule: str, variant: str, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = parameters(torch.float32, [(SIZE,)])
    optimizers = []
    for run, p in zip(TARGETS.values(), params + copies(params), strict=True):
        monkeypatch.setattr(engine, "launch", run)
        optimizers.append(three_steps(rule, p, bad, **VARIANTS[rule][variant][0])[0])
    assert_same(*optimizers)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(("rule", "variant"), LOCAL)
def test_harm_stays_in_the_element_then_in_its_block(rule: str, variant: str, bad: float) -> None:
    clean, dirty = clean_and_dirty(rule, variant, bad)
    assert equal(clean[1][~ELEMENT], dirty[1][~ELEMENT])
    assert equal(clean[2][~BLOCK], dirty[2][~BLOCK])


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(("rule", "variant"), CASES)
def test_harm_shows(rule: str, variant: str, bad: float) -> None:
    """At once in the element, and in the block from the next step on.

    Lion's sign makes a step of ordinary size of an infinite gradient, by whatever library. ADOPT
    clips one to an ordinary size, and divides by it from the next step on.
    """
    p = parameters(torch.float32, [(SIZE,)])[0]
    optimizer, seen = three_steps(rule, p, bad, **VARIANTS[rule][variant][0])
    if not (rule in (*SIGNS, "adopt") and math.isinf(bad)):
        assert not seen[1][AT].isfinite()
    if "m" in optimizer.state[p]:
        assert seen[2][BLOCK].isnan().all()


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(("rule", "variant"), LOCAL)
def test_harm_stays_in_the_element_where_states_are_float32(
    rule: str, variant: str, bad: float
) -> None:
    clean, dirty = clean_and_dirty(rule, variant, bad, bits=32)
    assert equal(clean[2][~ELEMENT], dirty[2][~ELEMENT])


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(("rule", "variant"), WITH_NORMS)
def test_harm_stays_in_its_tensor(rule: str, variant: str, bad: float) -> None:
    """Norms carry it to all of a tensor, and not to the next one, though one launch has both."""

    def other(value: float) -> Tensor:
        torch.manual_seed(0)
        params = parameters(torch.float32, [(SIZE,), (SIZE,)])
        optimizer = create(rule, params, min_8bit_size=0, **VARIANTS[rule][variant][0])
        for _ in range(3):
            for p, g in zip(params, gradients(params), strict=True):
                p.grad = g
            params[0].grad[AT] = value  # type: ignore[index]
            optimizer.step()
        return params[1].detach()

    assert equal(other(1.0), other(bad))
