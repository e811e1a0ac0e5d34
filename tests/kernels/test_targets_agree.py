"""Random rules and random tables: C++, emulated CUDA and the torch reference give the same bits."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import emulated
from bnbx.errors import OptionError
from bnbx.kernels import cpu, reference
from bnbx.kernels.plan import Storage, make_plan
from bnbx.registry import Optimizer, QuantType, State, optimizers, quant_types, rate
from bnbx.registry.config import resolve
from bnbx.registry.grid import float32
from bnbx.registry.quant_type import BLOCK_SIZES, FLOAT32
from plans import (
    Case,
    assert_equal_bits,
    cases,
    copy,
    feature_case,
    feature_cases,
    feature_product,
    make_batch,
    mixed_cases,
)
from strategies import rules

SIZES = (1, 257, 1000)
EXAMPLES = 12  # each compiles two kernels
MORE_EXAMPLES = 150
DTYPES = ("float32", "bfloat16", "float16")


def assert_targets_agree(case: Case, seed: int, *, cuda: bool = True) -> None:
    """Run a batch on every target that has no need of a device."""
    # Norms are summed in an order of each target's own. Two squares add up the same in any order,
    # so a rule that nobody wrote, which may hang on the last bit of a norm, gets no more.
    random = case.name == "random" and case.plan.lowered.norms
    sizes = (1, 2, 2, 1, 2) if random else SIZES
    expected = make_batch(case, sizes, step=1 + seed % 3, seed=seed)
    native, cuda_source = copy(expected), copy(expected)
    reference.run([expected])
    cpu.run([native])
    assert_equal_bits(native, expected)
    if cuda:
        emulated.run([cuda_source], schedule=seed % 4)
        assert_equal_bits(cuda_source, expected)


def random_case(rule: Optimizer, quantized: list[bool], dtype: str) -> Case | None:
    """The rule with its default hyperparameters, its states quantized as told."""
    required = {name: 0.5 for name, hyper in rule.hyper.items() if hyper.default is None}
    try:
        resolved = resolve(rule, quant_types(), [("test", required)])
    except OptionError:
        return None
    default = quant_types().find(lambda t: t.state_default)
    types = {s.name: default if q else None for s, q in zip(rule.states, quantized, strict=False)}
    plan = make_plan(rule, resolved.switches, dtype, dtype, types)
    return Case("random", plan, resolved)


def check_random_rule(rule: Optimizer, quantized: list[bool], dtype: str, seed: int) -> None:
    case = random_case(rule, quantized, dtype)
    if case is not None:
        assert_targets_agree(case, seed)


ARGUMENTS = {
    "rule": rules(),
    "quantized": st.lists(st.booleans(), min_size=4, max_size=4),
    "dtype": st.sampled_from(DTYPES),
    "seed": st.integers(0, 1000),
}


@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck), deadline=None)
@given(**ARGUMENTS)
def test_random_rules(rule: Optimizer, quantized: list[bool], dtype: str, seed: int) -> None:
    check_random_rule(rule, quantized, dtype, seed)


@pytest.mark.slow
@settings(max_examples=MORE_EXAMPLES, suppress_health_check=list(HealthCheck), deadline=None)
@given(**ARGUMENTS)
def test_many_random_rules(rule: Optimizer, quantized: list[bool], dtype: str, seed: int) -> None:
    check_random_rule(rule, quantized, dtype, seed)


REGISTERED = [*cases(DTYPES), *mixed_cases(), *feature_cases()]


@pytest.mark.parametrize("case", REGISTERED, ids=lambda case: case.name)
def test_registered_rules(case: Case) -> None:
    """C++ on more sizes and steps; CUDA source has a test file of its own."""
    for seed in range(3):
        assert_targets_agree(case, seed, cuda=False)


@pytest.mark.slow
def test_the_product_of_all_options() -> None:
    """AdamW in every seventh way that a plan can be asked for: 7 divides no number of choices."""
    adamw = optimizers().get("adamw")
    for number, way in enumerate(feature_product(adamw)[::7]):
        assert_targets_agree(feature_case(adamw, way, number), number, cuda=False)


# ---- runs repeat themselves


MEASURED = [case for case in feature_cases() if case.plan.measured]


def test_measured_plans_are_among_the_cases() -> None:
    assert len(MEASURED) >= 8
    assert any(case.plan.whole for case in MEASURED)
    assert any(case.plan.lowered.norms for case in MEASURED)


@pytest.mark.parametrize("case", MEASURED, ids=lambda case: case.name)
def test_bits_do_not_depend_on_the_number_of_threads(case: Case) -> None:
    """Norms are summed by chunks, in order, whoever summed the chunks."""
    start = make_batch(case, (130_000, 1, 70_000))
    runs = []
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            runs.append(copy(start))
            cpu.run([runs[-1]])
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert_equal_bits(run, runs[0])


@pytest.mark.parametrize("case", MEASURED[:4], ids=lambda case: case.name)
def test_bits_do_not_depend_on_the_grid(case: Case) -> None:
    start = make_batch(case, (3000, 1, 700))
    runs = []
    for grid, schedule in ((1, 0), (2, 1), (7, 2)):
        runs.append(copy(start))
        emulated.run([runs[-1]], grid=grid, schedule=schedule)
    for run in runs[1:]:
        assert_equal_bits(run, runs[0])


@pytest.mark.parametrize("case", [cases()[0], *MEASURED[:3]], ids=lambda case: case.name)
@pytest.mark.parametrize("target", [reference.run, cpu.run, emulated.run])
def test_found_inf_leaves_everything_untouched(case: Case, target: Any) -> None:
    for found, touched in ((1.0, False), (float("inf"), False), (0.0, True)):
        start = make_batch(case)
        batch = copy(start)
        batch.found_inf = torch.tensor([found])
        target([batch])
        changed = [
            not torch.equal(a.view(torch.uint8), b.view(torch.uint8))
            for ours, theirs in zip(batch.tensors, start.tensors, strict=True)
            for a, b in zip(ours, theirs, strict=True)
        ]
        assert any(changed) is touched


# ---- what is extreme does the same everywhere, in every master


BIG = {"float32": 3.4028235e38, "bfloat16": 3.3895314e38, "float16": 65504.0}
TINY = {"float32": 1e-45, "bfloat16": 9.2e-41, "float16": 6e-8}
EXTREME = [
    feature_case(
        optimizers().get(rule),
        dict(type=kind, master=master, skip_zeros=skip, block_wise=True, clip=False, dtype=dtype),
    )
    for rule, kind, skip in (("sgd", FLOAT32, False), ("adamw", "state4", True))
    for dtype in DTYPES
    for master in ("none", "stochastic", "kahan", "residual")
    if master == "none" or dtype != "float32"
]


@pytest.mark.parametrize("case", EXTREME, ids=lambda case: case.name)
def test_extreme_values_do_the_same_everywhere(case: Case) -> None:
    dtype = case.plan.parameter
    big, tiny = BIG[dtype], TINY[dtype]
    values = [0.0, 1.0, tiny, 3 * tiny, 200 * tiny, big, big / 2, float("inf"), float("nan")]
    values += [1e-30, 6.2e-5, 6e-5, 1e30, 255 / 256, 1 + 2**-8]
    values += [-value for value in values]
    rows = torch.tensor(list(itertools.product(values, values)), dtype=torch.float64)
    expected = make_batch(case, (len(rows), len(rows)), seed=5)
    for number, row in enumerate(expected.tensors):
        row[0].copy_(rows[:, 0])
        row[1].copy_(rows[:, 1])
        row[-1].fill_(1.0 if number else -1e-3)
    native, cuda_source = copy(expected), copy(expected)
    reference.run([expected])
    cpu.run([native])
    assert_equal_bits(native, expected)
    emulated.run([cuda_source])
    assert_equal_bits(cuda_source, expected)


def random_type(bits: int, block_size: int, ordered: bool) -> QuantType:
    """A table without a form that makes its search easy."""
    random = np.random.default_rng(bits * block_size + ordered)
    tables = []
    for lowest in (-1.0, 0.0):
        values = [float32(x) for x in random.uniform(lowest, 1, 2**bits)]
        values[0] = 1.0
        tables.append(tuple(sorted(values) if ordered else values))
    name = f"random{bits}_{block_size}"
    return QuantType(
        name=name, summary="random", bits=bits, values=tables[0], unsigned_values=tables[1],
        block_size=block_size,
    )  # fmt: skip


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize(("bits", "block_size"), [(2, 64), (3, 128), (4, 128), (8, 256), (8, 512)])
def test_random_tables(bits: int, block_size: int, ordered: bool) -> None:
    assert block_size in BLOCK_SIZES
    case = next(c for c in cases() if len(c.plan.quantized) == 2)
    kind = random_type(bits, block_size, ordered)
    storages = tuple(replace(s, quant_type=kind) for s in case.plan.storages)
    plan = replace(case.plan, storages=storages)
    assert_targets_agree(replace(case, plan=plan), seed=1, cuda=block_size <= 256)


EVERYTHING = Optimizer(
    name="everything",
    summary="each function and comparison of the language, next to where comparisons turn",
    states=(State(name="m"), State(name="v", signed=False)),
    hyper=dict(lr=rate(0.5)),
    element_code="""
        s = sign(g)
        m = where(s > 0, 0.5 * m, m) + where(s >= 1, g, -g) - where(s < 1, 0.25, 0) * m
        m = m + where(s <= -1, g, 0) + where(s == 1, p, -p) + where(s != -1, g, 2 * g)
        v = abs(max(min(v, 2), 0.5 * v) - where(lr, g, s) / (1 + abs(m))) + where(lr > 1, s, 0 * s)
        m = g * m - max(g, m * m - v) + g * p
        p = p - lr * where(s > 1, p, m) / (1 + sqrt(v)) - where(s < -1, p, 0)
    """,
)


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_function_and_comparison(dtype: str) -> None:
    case = random_case(EVERYTHING, [True, True], dtype)
    assert case is not None
    assert_targets_agree(case, 0)


def test_states_with_blocks_of_different_length() -> None:
    case = next(c for c in cases() if len(c.plan.quantized) == 2)
    first, second = case.plan.storages
    short = Storage(first.state, random_type(4, 64, ordered=True))
    plan = replace(case.plan, storages=(short, second))
    assert_targets_agree(replace(case, plan=plan), seed=2)


def test_step_scalars_overflow_to_infinity_and_not_to_an_exception() -> None:
    rule = Optimizer.from_json(
        cases()[0].plan.spec.to_json().replace("1 - beta1**step", "1 / (beta1 - beta1)")
    )
    case = random_case(rule, [True, True], "float32")
    assert case is not None
    assert_targets_agree(case, seed=0, cuda=False)


def test_the_magnitude_of_a_negative_zero_is_zero() -> None:
    rule = Optimizer(
        name="by_zero",
        summary="divides by a zero that was negative",
        states=(State(name="m"),),
        hyper={"lr": rate(0.5)},
        element_code="m = g",
        tensor_code="t = abs(min(-(0), norm_m))",
        apply_code="p = lr / t + m",
    )
    case = random_case(rule, [False], "float32")
    assert case is not None
    batch = make_batch(case, (2,))
    assert_targets_agree(case, seed=0)
    cpu.run([batch])
    assert torch.equal(batch.tensors[0][0], torch.full((2,), torch.inf))
