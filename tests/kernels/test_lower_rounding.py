"""Lowering changes how results round, and nothing more: bounded in float64, rule by rule.

The bound follows every operation of the text (a running error analysis), so that it is wide where
numbers cancel and tight where they do not.
"""

from __future__ import annotations

import math
import operator
import random
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bnbx.kernels.evaluate import HOST, Operations, evaluate, tensor_operations
from bnbx.kernels.lower import lower
from bnbx.registry import Optimizer, optimizers
from bnbx.registry.checks import NUMEL
from bnbx.registry.optimizer import STEP
from rule_runs import run_lowered, run_text, stored
from strategies import hyper_values, rules

SEEDS = st.integers(0, 2**32 - 1)

EPSILON = 2.0**-52


@dataclass(frozen=True)
class Measured:
    """A float64 number, and how far rounding may have moved it, in units of EPSILON."""

    value: float
    error: float = 0.0

    @property
    def bound(self) -> float:
        return 64 * EPSILON * self.error


LOST = Measured(math.nan, math.inf)  # what rounding alone decides


def given_value(value: float) -> Measured:
    return Measured(value) if math.isfinite(value) else LOST


def measured(value: float, error: float) -> Measured:
    finite = math.isfinite(value) and math.isfinite(error)
    tiny = 0 < abs(value) < 1e-250
    return Measured(value, error + abs(value)) if finite and not tiny else LOST


def quotient(a: Measured, b: Measured) -> Measured:
    if not abs(b.value) > b.bound:
        return LOST
    value = a.value / b.value
    return measured(value, (a.error + abs(value) * b.error) / abs(b.value))


def root(a: Measured) -> Measured:
    if a == Measured(0.0):
        return a
    if not a.value > 4 * a.bound:
        return LOST
    value = math.sqrt(a.value)
    return measured(value, a.error / value)


def compare(function: Any) -> Any:
    """True, False, or None where rounding alone decides."""

    def result(a: Measured, b: Measured) -> bool | None:
        unsure = a.bound + b.bound
        if math.isnan(a.value + b.value) or (unsure > 0 and abs(a.value - b.value) <= unsure):
            return None
        return bool(function(a.value, b.value))

    return result


def choose(condition: bool | Measured | None, a: Measured, b: Measured) -> Measured:
    if isinstance(condition, Measured):
        condition = compare(operator.ne)(condition, Measured(0.0))
    return LOST if condition is None else a if condition else b


def sign(a: Measured) -> Measured:
    positive, negative = (compare(f)(a, Measured(0.0)) for f in (operator.gt, operator.lt))
    return LOST if positive is None else Measured(float(positive) - float(negative))


MEASURED: Operations = {
    "number": lambda value: Measured(float(value)),
    "+": lambda a, b: measured(a.value + b.value, a.error + b.error),
    "-": lambda a, b: measured(a.value - b.value, a.error + b.error),
    "*": lambda a, b: measured(
        a.value * b.value, abs(a.value) * b.error + abs(b.value) * a.error
    ),
    "/": quotient,
    "negate": lambda a: Measured(-a.value, a.error),
    "sqrt": root,
    "abs": lambda a: Measured(abs(a.value), a.error),
    "sign": sign,
    "min": lambda a, b: Measured(min(a.value, b.value), max(a.error, b.error)),
    "max": lambda a, b: Measured(max(a.value, b.value), max(a.error, b.error)),
    "where": choose,
    **{op: compare(f) for op, f in [("<", operator.lt), ("<=", operator.le), (">", operator.gt),
                                    (">=", operator.ge), ("==", operator.eq), ("!=", operator.ne)]},
}  # fmt: skip


@settings(max_examples=200)
@given(rules(), st.data(), SEEDS, st.sampled_from([1, 2, 1000]))
def test_lowering_moves_results_by_rounding_only(
    spec: Optimizer, data: st.DataObject, seed: int, step: int
) -> None:
    host: dict[str, Any] = {**data.draw(hyper_values(spec)), STEP: step, NUMEL: 1}
    switches = {name: bool(host[name]) for name in spec.switches}
    for statement in spec.step.statements:
        host[statement.target] = evaluate(statement.value, host, HOST)
    source = random.Random(seed)
    rows = [
        {name: source.choice([0.0, 1.0, source.gauss(0, 1), source.gauss(0, 1e-3)])
         for name in ("g", *stored(spec, switches))}
        for _ in range(8)
    ]  # fmt: skip
    lowered = lower(spec, switches)
    operations = tensor_operations(torch.float64, torch.device("cpu"))
    columns = {n: torch.tensor([row[n] for row in rows], dtype=torch.float64) for n in rows[0]}
    scalars = {
        name: torch.tensor(float(evaluate(value, host, HOST)), dtype=torch.float64)
        for name, value in lowered.scalars.items()
    }
    assume(all(value.isfinite() for value in scalars.values()))
    inputs = {n: torch.tensor(float(value), dtype=torch.float64) for n, value in host.items()}
    found = run_lowered(lowered, columns, scalars, inputs, operations)
    for index, row in enumerate(rows):
        start = {name: given_value(float(value)) for name, value in {**host, **row}.items()}
        expected = run_text(spec, switches, start, MEASURED, MEASURED["abs"])
        for name in stored(spec, switches):
            assert_close(float(found[name].expand(8)[index]), expected[name])


def assert_close(found: float, expected: Measured) -> None:
    if math.isfinite(expected.value) and math.isfinite(expected.error):
        assert abs(found - expected.value) <= expected.bound, (found, expected)


def test_the_bound_is_tight_where_nothing_cancels() -> None:
    """So the test above could fail: an Adam step is held to a few hundred units of rounding."""
    adam = optimizers().get("adam")
    start = {name: Measured(0.5) for name in ("p", "g", "m", "v", *adam.hyper, "c1", "c2")}
    found = run_text(adam, {"amsgrad": False}, start, MEASURED)["p"]
    assert 0 < found.bound < 1e-12
