"""Random rules and random tables: C++, emulated CUDA and the torch reference give the same bits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import emulated
from bnbx.errors import OptionError
from bnbx.kernels import cpu, reference
from bnbx.kernels.plan import Storage, make_plan
from bnbx.registry import Optimizer, QuantType, quant_types
from bnbx.registry.config import resolve
from bnbx.registry.quant_type import BLOCK_SIZES, float32
from plans import Case, assert_equal_bits, cases, copy, make_batch, mixed_cases
from strategies import rules

SIZES = (1, 257, 1000)
EXAMPLES = 12  # each compiles two kernels
MORE_EXAMPLES = 150
DTYPES = ("float32", "bfloat16", "float16")


def assert_targets_agree(case: Case, seed: int, *, cuda: bool = True) -> None:
    """Run a batch on every target that has no need of a device."""
    expected = make_batch(case, SIZES, step=1 + seed % 3, seed=seed)
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


@pytest.mark.parametrize("case", [*cases(DTYPES), *mixed_cases()], ids=lambda case: case.name)
def test_registered_rules(case: Case) -> None:
    """C++ on more sizes and steps; CUDA source has a test file of its own."""
    for seed in range(3):
        assert_targets_agree(case, seed, cuda=False)


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
