"""Every rule of the catalog, on each target, against its own text and against torch.optim.

No tolerance is chosen: `optimizers.rounding` derives from the text how far correct float32
arithmetic may be from it. Each step is checked from the states and parameters that the optimizer
held before it. Float32 runs are also followed freely, from the first step to the last, by the
text and by torch.optim in float64; there the bounds grow from step to step as errors do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bnbx.optimizers import engine
from bnbx.registry import optimizers
from optimizers.compare import assert_same
from optimizers.rounding import Bounded
from optimizers.text import (
    Follower,
    check_step,
    check_within,
    groups_of,
    held,
    hyperparameters,
)
from optimizers.variants import (
    CASES,
    DTYPES,
    STORAGES,
    TARGETS,
    VARIANTS,
    Run,
    copies,
    gapped,
    gradients,
    make,
    parameters,
    sampled,
    set_gradients,
    state_types,
)

STEPS = 10


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each target in turn; optimizers run on it and on nothing else."""
    monkeypatch.setattr(engine, "launch", TARGETS[request.param])
    return str(request.param)


# ---- the table of variants


def test_every_rule_has_variants() -> None:
    assert sorted(VARIANTS) == list(optimizers().names())


@pytest.mark.parametrize("rule", optimizers().names())
def test_variants_leave_nothing_at_its_default(rule: str) -> None:
    spec = optimizers().get(rule)
    groups = [group for pair in VARIANTS[rule].values() for group in pair]
    full = [{**{a: spec.default(a) for a in spec.arguments}, **group} for group in groups]
    values = [hyperparameters(spec, group) for group in full]
    for name, hyper in spec.hyper.items():
        default = 0.0 if hyper.default is None else hyper.default
        assert any(v[name] != default for v in values), name
        if name in spec.switches:
            assert {bool(v[name]) for v in values} == {True, False}, name
        if name == "weight_decay":
            assert all(v[name] > 0 for v in values)


# ---- one step at a time

# Of large tensors the last variant of each rule: the one with most states and switches.
LARGE = [(rule, list(variants)[-1]) for rule, variants in VARIANTS.items()]


def test_the_sample_has_everything_in_it() -> None:
    assert {(rule, variant) for rule, variant, *_ in sampled()} == set(CASES)
    for rule in optimizers().names():
        ways = [case[2:] for case in sampled() if case[0] == rule]
        assert {storage for storage, _ in ways} == set(STORAGES)
        assert {dtype for _, dtype in ways} == set(DTYPES)


@pytest.mark.parametrize(("rule", "variant", "storage", "dtype"), sampled(), ids=str)
def test_each_step_is_that_of_the_text_on_each_target(
    rule: str, variant: str, storage: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The targets agree to the last bit, so what is checked of the first holds for all."""
    params = parameters(dtype) + gapped(dtype)
    runs = [(run, ps, make(rule, variant, ps, storage)) for run, ps in all_targets(params)]
    optimizer = runs[0][2]
    types = state_types(optimizer.spec, storage)
    determined = total = 0
    for _ in range(STEPS):
        values = gradients(params)
        before = [held(optimizer, p, types) for p in params]
        for run, own, each in runs:
            monkeypatch.setattr(engine, "launch", run)
            set_gradients(own, values)
            each.step()
            assert_same(optimizer, each)
        groups = groups_of(optimizer)
        for p, value, old in zip(params, values, before, strict=True):
            counts = check_step(*groups[p], value, old, held(optimizer, p, types))
            determined, total = determined + counts[0], total + counts[1]
    assert determined >= 0.999 * total, "the bounds are too wide to tell codes apart"


def all_targets(params: list[Tensor]) -> Iterator[tuple[Run, list[Tensor]]]:
    """Each target with parameters to run on: the first with these, the others with copies."""
    for number, run in enumerate(TARGETS.values()):
        yield run, copies(params) if number else params


@pytest.mark.parametrize(("rule", "variant"), LARGE)
def test_a_million_elements(
    rule: str, variant: str, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many chunks, on several threads; only the last of the steps is held against the text."""
    params = parameters(torch.float32, [(1_000_000,), (1,)])
    runs = [(run, ps, make(rule, variant, ps, "dynamic8")) for run, ps in all_targets(params)]
    optimizer = runs[0][2]
    types = state_types(optimizer.spec, "dynamic8")
    for _ in range(2):
        values = gradients(params)
        before = held(optimizer, params[0], types)
        for run, own, each in runs:
            monkeypatch.setattr(engine, "launch", run)
            set_gradients(own, values)
            each.step()
            assert_same(optimizer, each)
    after = held(optimizer, params[0], types)
    determined, total = check_step(*groups_of(optimizer)[params[0]], values[0], before, after)
    assert determined >= 0.999 * total


# ---- from the first step to the last


@pytest.mark.parametrize(("rule", "variant"), CASES)
def test_ten_steps_are_those_of_the_text(rule: str, variant: str, target: str) -> None:
    params = parameters(torch.float32)
    optimizer = make(rule, variant, params)
    follower = Follower(optimizer)
    for _ in range(STEPS):
        set_gradients(params, gradients(params))
        optimizer.step()
        follower.step()
    for p in params:
        held_now = {**optimizer.state[p], "p": p.detach()}
        assert follower.values[p].keys() == held_now.keys() - {"step"}
        for name, expected in follower.values[p].items():
            check_within(expected, held_now[name])


TORCH = {
    "adagrad": torch.optim.Adagrad,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
}


TORCH_CASES = [case for case in CASES if case[0] in TORCH and case[1] != "clipped"]


def test_torch_still_lacks_the_other_rules() -> None:
    known = {name.lower() for name in dir(torch.optim)}
    assert known & set(optimizers().names()) == set(TORCH)


@pytest.mark.parametrize(("rule", "variant"), TORCH_CASES)
def test_ten_steps_are_those_of_torch(rule: str, variant: str, target: str) -> None:
    """Torch runs in float64, where its result is as good as exact; the text gives the bound."""
    params = parameters(torch.float32)
    optimizer = make(rule, variant, params)
    follower = Follower(optimizer)
    doubles = [p.detach().double().requires_grad_() for p in params]
    theirs: list[Any] = [
        TORCH[rule](doubles[number::2], **hyper)
        for number, hyper in enumerate(VARIANTS[rule][variant])
    ]
    for _ in range(STEPS):
        values = gradients(params)
        set_gradients(params, values)
        set_gradients(doubles, [value.double() for value in values])
        optimizer.step()
        for each in theirs:
            each.step()
        follower.step()
    for p, double in zip(params, doubles, strict=True):
        error = follower.values[p]["p"].error
        assert float(error.max()) < 1e-4, "a bound as wide as this would prove little"
        check_within(Bounded(double.detach(), error), p.detach())
