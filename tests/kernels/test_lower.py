"""Lowered rules mean what the text means, and hand kernels nothing that they could not run.

Lowering only rearranges products and quotients. So both sides are computed modulo a prime, where
every such rearrangement is exact: equal results at random values mean equal formulas. What it
does to rounding is the matter of test_lower_rounding.py.
"""

from __future__ import annotations

import itertools
import operator
import random
import re
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnbx.errors import RuleError
from bnbx.kernels.evaluate import Operations, evaluate
from bnbx.kernels.host_code import host_function
from bnbx.kernels.lower import lower, text
from bnbx.registry import Optimizer, State, flag, number, optimizers, rate
from bnbx.registry.checks import NORM, NUMEL
from bnbx.registry.optimizer import STEP
from bnbx.registry.rule import (
    Binary,
    Call,
    Compare,
    Expression,
    Negate,
    Number,
    names,
    parse,
)
from rule_runs import Switches, drawn_switches, run_lowered, run_text, stored
from strategies import rules

SEEDS = st.integers(0, 2**32 - 1)


# ---- the same formula

PRIME = 2**61 - 1


def from_float(value: float) -> int:
    exact = Fraction(value)
    return exact.numerator * pow(exact.denominator, -1, PRIME) % PRIME


FUSED = ("fma", "fms", "fnma")


def scrambled(x: int) -> int:
    """Stands for a square root: a function of which lowering may assume nothing."""
    return int(pow(x + 12345, 3, PRIME) ^ 1)


# The inverse of zero is zero, which keeps every law that lowering uses.
MODULAR: Operations = {
    "number": from_float,
    "+": lambda a, b: (a + b) % PRIME,
    "-": lambda a, b: (a - b) % PRIME,
    "*": lambda a, b: a * b % PRIME,
    "/": lambda a, b: a * pow(b, PRIME - 2, PRIME) % PRIME,
    "negate": lambda a: -a % PRIME,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "sqrt": scrambled,
    "abs": lambda a: min(a, PRIME - a),
    "sign": lambda a: int(a > 0) + int(a > PRIME // 2),
    "min": min,
    "max": max,
    "where": lambda condition, a, b: a if condition else b,
    "fma": lambda a, b, c: (a * b + c) % PRIME,
    "fms": lambda a, b, c: (a * b - c) % PRIME,
    "fnma": lambda a, b, c: (c - a * b) % PRIME,
}


def assert_same_formula(spec: Optimizer, switches: Switches, seed: int) -> None:
    source = random.Random(seed)
    lowered = lower(spec, switches)
    of_the_host = {STEP, NUMEL, *spec.hyper, *spec.step.writes}
    for _ in range(4):
        inputs = [*stored(spec, switches), "g", *sorted(of_the_host)]
        start = {name: source.choice([0, 1, source.randrange(PRIME)]) for name in inputs}
        host = {name: start[name] for name in of_the_host}
        elements = {name: start[name] for name in start.keys() - of_the_host}
        scalars = {n: evaluate(value, host, MODULAR) for n, value in lowered.scalars.items()}
        found = run_lowered(lowered, elements, scalars, host, MODULAR, measured)
        expected = run_text(spec, switches, start, MODULAR, measured)
        for name in stored(spec, switches):
            assert found[name] == expected[name], (name, lowered)


def measured(x: int) -> int:
    """Stands for a norm: another function of which lowering may assume nothing."""
    return scrambled(x + 54321)


@settings(max_examples=400)
@given(rules(), SEEDS)
def test_a_lowered_rule_is_the_formula_of_its_text(spec: Optimizer, seed: int) -> None:
    assert_same_formula(spec, drawn_switches(spec, seed), seed)


@pytest.mark.parametrize("spec", list(optimizers()), ids=lambda spec: spec.name)
def test_every_registered_rule_keeps_its_formula_for_all_switches(spec: Optimizer) -> None:
    for truth in itertools.product((False, True), repeat=len(spec.switches)):
        assert_same_formula(spec, dict(zip(spec.switches, truth, strict=True)), 0)


def rule(code: str, *hyper: str, step_code: str = "", states: str = "", **more: Any) -> Optimizer:
    return Optimizer(
        name="r",
        summary="s",
        states=tuple(State(name=name) for name in states.split()),
        hyper={**{name: number(0.5) for name in hyper}, **more},
        step_code=step_code,
        element_code=code,
    )


AWKWARD: dict[str, Optimizer] = {
    "a name that another scalar would get": rule(
        "p = p - lr / c * g + min(lr_over_c, g)", "lr", "c", "lr_over_c"
    ),
    "the same the other way round": rule(
        "p = min(lr_over_c, g) + p - lr / c * g", "lr", "c", "lr_over_c"
    ),
    "a name that a literal would give": rule("p = p - (1 - a) * g + min(k_1_minus_a, g)", "a",
                                             "k_1_minus_a"),
    "the name of a long scalar": rule(
        "p = p * (a * a * a + a * a * a + a * a * a + a * a) + min(scalar_0, g)", "a", "scalar_0"
    ),
    "the names of two long scalars": rule(
        "p = p * (a * a * a + a * a * a + a * a * a + a * a) + min(scalar_1, g)\n"
        "p = p * (a * a * a + a * a * a + a * a * a - a * a) + min(scalar_1 + 1, g)",
        "a", "scalar_1",
    ),
    "names that differ in signs alone": rule(
        "p = p + min(a + b, g) + min(a - b, g) + min(-a + b, g) + min(a * b, g) + min(a / b, g)",
        "a", "b",
    ),
    "names that differ in brackets alone": rule(
        "p = min(a - (b - c), g) + min(a - b - c, p) + min(a / (b / c), g) + min(a / b / c, p)",
        "a", "b", "c",
    ),
    "a variable that is scalar, then not": rule(
        "u = a * 2\nw = u + 1\nu = u * g\np = p * w + u", "a"
    ),
    "a variable that is not scalar, then is": rule("u = a * g\nu = a\np = p * u + g", "a"),
    "a gradient replaced by a scalar": rule("p = p * g\ng = a\np = p + g", "a"),
    "a parameter set to a scalar, then read": rule("p = a * g\np = a\np = p * p + a", "a"),
    "a state set to a scalar": rule("m = a / 3\np = m * g * m", "a", states="m"),
    "a state set to a literal": rule("m = 0\nm = m + 1\np = p * g + m", states="m"),
    "only literals": rule("p = (1 + 2) * g * 3 / (4 - 5) - -6"),
    "terms with divisors": rule("p = (g / a + b) / (p / b + a * g) - (b * p - g / a) + g / a / b",
                                "a", "b"),
    "terms with one divisor": rule("p = g / a + p / a + b / a - (b - p / a)", "a", "b"),
    "factors that wait": rule("u = a * g\nw = u / b\np = p - w + a", "a", "b"),
    "factors that cannot wait": rule("u = a * g\nw = u / b\np = p - w * w + u", "a", "b"),
    "a factor of a name written twice": rule("u = a * g\nu = b * p\np = g + u", "a", "b"),
    "a gradient with a factor": rule("g = a * g\np = p - b * g", "a", "b"),
    "a gradient read before its factor": rule("p = p - b * g\ng = a * p", "a", "b"),
    "signs everywhere": rule("p = -(-(a * -g)) / -(-p * -a) - -(-g)", "a"),
    "quotients of quotients": rule("p = a / (b / (g / (a / (p / b))))", "a", "b"),
    "one in every place": rule("p = 1 * g / 1 * (1 / p) / (1 / g) * (1 * 1) / (a / 1) * 1", "a"),
    "scalars in conditions": rule(
        "p = where(a < 1, g, p) + where(a, g, 1) + where(a < g, 1, a) + where(2 * a == b, g, 3)",
        "a", "b", step_code="",
    ),
    "steps": rule("p = p + where(step == 1, g, c * g) / step", "a", step_code="c = a * step"),
    "computed truths": rule("u = g\np = where(c, g, p) + where(u, 1, 2)", "a", step_code="c = a"),
    "flags": rule("p = p - lr * where(fast, g, sign(g)) * where(on, 1, lr)", lr=rate(0.1),
                  fast=flag(False), on=flag(True)),
}  # fmt: skip


@pytest.mark.parametrize("label", AWKWARD)
def test_awkward_rules_keep_their_formula(label: str) -> None:
    spec = AWKWARD[label]
    for truth in itertools.product((False, True), repeat=len(spec.switches)):
        for seed in range(10):
            assert_same_formula(spec, dict(zip(spec.switches, truth, strict=True)), seed)


# ---- what kernels are given


@given(rules(), SEEDS)
def test_kernels_get_elements_and_scalars_apart(spec: Optimizer, seed: int) -> None:
    switches = drawn_switches(spec, seed)
    lowered = lower(spec, switches)
    of_the_host = {STEP, *spec.hyper, *spec.step.writes}
    known = {"g", *stored(spec, switches)}
    used: set[str] = set()
    scalars = set(lowered.scalars)
    for place, statement in enumerate(lowered.statements):
        second = place >= len(lowered.element)
        read = set(names(statement.value))
        assert read <= known | scalars | (set(lowered.tensor_scalars) if second else set())
        used |= read
        known.add(statement.target)
        code = spec.apply_code if second else spec.element_code
        assert statement.text in code.splitlines()
    assert {statement.target for statement in lowered.statements} >= set(stored(spec, switches))
    assert not known & of_the_host
    for name, value in [*lowered.scalars.items(), *lowered.tensor_scalars.items()]:
        assert re.fullmatch(r"[a-z][a-z0-9_]*_", name)
        assert len(name) <= 40
        assert name in used
        assert not isinstance(value, Number)
    assert all(set(names(value)) <= of_the_host for value in lowered.scalars.values())
    assert not scalars & set(lowered.tensor_scalars)
    assert len(set(lowered.scalars.values())) == len(lowered.scalars)


@given(rules(), SEEDS)
def test_what_a_tensor_needs_is_measured_and_no_more(spec: Optimizer, seed: int) -> None:
    lowered = lower(spec, drawn_switches(spec, seed))
    of_the_host = {STEP, *spec.hyper, *spec.step.writes}
    known = {NUMEL, *lowered.inputs, *(NORM + name for name in lowered.norms)}
    needed = {name for value in lowered.tensor_scalars.values() for name in names(value)}
    needed |= {name for statement in lowered.tensor for name in names(statement.value)}
    for statement in lowered.tensor:
        assert set(names(statement.value)) <= known
        known.add(statement.target)
        assert statement.text in spec.tensor_code.splitlines()
    for value in lowered.tensor_scalars.values():
        assert set(names(value)) <= known
        assert set(names(value)) & {NUMEL, *spec.tensor.writes, *(NORM + n for n in lowered.norms)}
    assert set(lowered.inputs) == needed & of_the_host
    assert bool(lowered.tensor) <= bool(lowered.tensor_scalars)


def test_a_tensor_code_that_nobody_needs_costs_nothing() -> None:
    """With its switch off LAMB's and LARS' second pass needs no first."""
    lars = optimizers().get("lars")
    off = lower(lars, dict(momentum=True, nesterov=False, max_unorm=False))
    assert (off.tensor, dict(off.tensor_scalars), off.norms) == ((), {}, ())
    on = lower(lars, dict(momentum=True, nesterov=False, max_unorm=True))
    assert on.norms == ("p", "u")
    assert set(on.inputs) == {"lr", "max_unorm"}


@settings(max_examples=200)
@given(rules(), SEEDS)
def test_skipped_elements_stay_as_they_are(spec: Optimizer, seed: int) -> None:
    """And the others are what they were, but that norms see what was left as it is."""
    switches, source = drawn_switches(spec, seed), random.Random(seed)
    lowered, plain = lower(spec, switches, skip_zeros=True), lower(spec, switches)
    host = {n: source.randrange(PRIME) for n in (STEP, NUMEL, *spec.hyper, *spec.step.writes)}
    scalars = {n: evaluate(value, host, MODULAR) for n, value in lowered.scalars.items()}
    start = {name: source.randrange(1, PRIME) for name in ("g", *stored(spec, switches))}
    found = run_lowered(lowered, {**start, "g": 0}, scalars, host, MODULAR, measured)
    moved = run_lowered(lowered, start, scalars, host, MODULAR, measured)
    scalars = {n: evaluate(value, host, MODULAR) for n, value in plain.scalars.items()}
    expected = run_lowered(plain, start, scalars, host, MODULAR, measured)
    for name in stored(spec, switches):
        assert found[name] == start[name]
        assert moved[name] == expected[name]


@given(rules(), SEEDS)
def test_kernels_get_operations_that_they_have(spec: Optimizer, seed: int) -> None:
    for statement in lower(spec, drawn_switches(spec, seed)).statements:
        for node in walk(statement.value):
            match node:
                case Binary("+" | "-", left, right):
                    assert "*" not in {getattr(part, "op", None) for part in (left, right)}
                case Binary(op):
                    assert op in {"*", "/"}
                case Call(function, args):
                    assert function in {"sqrt", "abs", "sign", "min", "max", "where", *FUSED}
                    assert isinstance(args[0], Compare) is (function == "where")


def walk(expression: Expression) -> list[Expression]:
    match expression:
        case Negate(operand):
            inner = [operand]
        case Binary(_, left, right) | Compare(_, left, right):
            inner = [left, right]
        case Call(_, args):
            inner = list(args)
        case _:
            inner = []
    return [expression, *(node for part in inner for node in walk(part))]


def test_a_product_that_something_is_added_to_is_not_rounded() -> None:
    code = "p = abs(g * p + 2) - sqrt(p - g * g) * max(g * g - 3, p * g - g * p)"
    (statement,) = lower(rule(code), {}).statements
    assert text(statement.value) == (
        "fnma(sqrt(fnma(g, g, p)), max(fms(g, g, 3), fms(p, g, g * p)), abs(fma(g, p, 2)))"
    )


def test_scalar_factors_are_gathered() -> None:
    found = lower(rule("p = lr * (g / c) / (p + 1)", "lr", "c"), {})
    (statement,) = found.statements
    assert text(statement.value) == "lr_over_c_ * g / (p + 1)"
    assert {name: text(value) for name, value in found.scalars.items()} == {"lr_over_c_": "lr / c"}


def test_an_adamw_step_as_kernels_run_it() -> None:
    found = lower(optimizers().get("adamw"), {"amsgrad": False})
    shown = [f"{statement.target} = {text(statement.value)}" for statement in found.statements]
    assert shown == [
        "m = fma(beta1_, m, k_1_minus_beta1_ * g)",
        "v = fma(beta2_, v, k_1_minus_beta2_ * g * g)",
        "vmax = v",
        "u = m / (sqrt(vmax) + c2_times_eps_)",
        "p = k_1_minus_lr_times_weight_decay_ * p",
        "p = fnma(lr_times_c2_over_c1_, u, p)",
    ]
    assert {name: text(value) for name, value in found.factors.items()} == {"u": "c2 / c1"}


def test_an_update_whose_norm_others_may_ask_for_is_whole() -> None:
    code = "u = a * g\np = p - max_unorm * u"
    assert set(lower(rule(code, "a", "max_unorm"), {}).factors) == set()
    assert set(lower(rule(code.replace("max_unorm", "b"), "a", "b"), {}).factors) == {"u"}


def test_a_product_keeps_its_factor() -> None:
    # g * g alone would be subnormal where (a * g) * (a * g) is a number like any other.
    for code in ("u = (a * g) * (a * g)", "u = (a * g) * (a * g) / m"):
        found = lower(rule(f"m = g\n{code}\np = p - u", "a", states="m"), {})
        assert not found.factors
        assert text(found.statements[1].value).startswith("a_times_a_ * g * g")


@pytest.mark.parametrize("line", ["c = max(c, a - c)", "c = c + a"])
def test_scalars_that_grow_are_refused(line: str) -> None:
    code = "\n".join(["c = a * 2", *[line] * 200, "p = p - c * g"])
    with pytest.raises(RuleError, match=r"more than 150 names.*compute it in step_code"):
        lower(rule(code, "a"), {})


def test_a_long_chain_of_factors_does_not_wait_for_ever() -> None:
    code = "\n".join(["u = a * sqrt(g)", *["u = a * sqrt(u)"] * 99, "p = p - u"])
    assert len(lower(rule(code, "a"), {}).scalars) == 1
    chain = [f"w{i + 1} = w{i} / a" for i in range(300)]
    found = lower(rule("\n".join(["w0 = a * sqrt(g)", *chain, "p = p - w300"]), "a"), {})
    host = host_function([], found.scalars.values(), [])
    assert set(host({"a": 1.0})[0]) == {1.0}


def test_what_no_element_depends_on_is_not_computed_for_each() -> None:
    found = lower(rule("u = a + 1\nw = u * u\np = p - w * g", "a"), {})
    (statement,) = found.statements
    assert text(statement.value) == "fnma(a_plus_1_times_a_plus_1_, g, p)"
    assert [text(value) for value in found.scalars.values()] == ["(a + 1) * (a + 1)"]


# ---- expressions as text

SHOWN = """
    a
    -a
    -(-a)
    1
    0.1
    1e-08
    12345678.9
    1e+300
    a + b - c
    a - (b - c)
    a - (b + c)
    a - -b
    a * b / c
    a / (b * c)
    a / (b / c)
    a * (b / c)
    -a * b
    -(a * b)
    -(a + b) * c
    (a + b) * (a - b)
    a ** b
    a ** b ** c
    (a ** b) ** c
    (-a) ** b
    -a ** b
    a ** -b
    2 ** -(a ** b)
    (a * b) ** c
    a * b ** c
    sqrt(a + b) * max(a, -b)
    where(a < b, c, -c)
    where(a - b != c * 2, where(a, b, c), 0)
    exp(-a) - log(b ** 2)
"""


@pytest.mark.parametrize("shown", [line.strip() for line in SHOWN.strip().splitlines()])
def test_text_reads_back_as_the_same_expression(shown: str) -> None:
    value = parse(f"x = {shown}", "step_code").statements[0].value
    assert parse(f"x = {text(value)}", "step_code").statements[0].value == value


@given(rules(), SEEDS)
def test_text_of_any_expression_reads_back(spec: Optimizer, seed: int) -> None:
    scalars = lower(spec, drawn_switches(spec, seed)).scalars.values()
    for value in [*scalars, *(statement.value for statement in spec.step.statements)]:
        assert parse(f"x = {text(value)}", "step_code").statements[0].value == value
