"""Expressions evaluate as IEEE 754 says, on numbers and on tensors, where Python raises too."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bnbx.kernels.evaluate import HOST, Operations, evaluate, fused, has_float64, tensor_operations
from bnbx.registry.rule import Binary, Call, Compare, Expression, Name, Negate, Number, parse

CPU = torch.device("cpu")
SPECIAL = [
    *(0.0, 1.0, 2.0, 3.0, 0.5, 1 / 3, 1e-8, 1e8, 1e-30, 1e30, 1e200, 1e-200),
    *(5e-324, 2.2250738585072014e-308, 1.7976931348623157e308, math.inf, math.nan),
]
VALUES = [*SPECIAL, *(-value for value in SPECIAL)]
PAIRS = list(itertools.product(VALUES, VALUES))

# The definitions, in numpy's float64, which follows IEEE 754 without raising.
Oracle = Callable[..., Any]
UNARY: dict[str, Oracle] = {
    "sqrt": np.sqrt,
    "abs": np.abs,
    "sign": lambda x: np.where(x > 0, 1.0, np.where(x < 0, -1.0, x)),
}
HOST_UNARY: dict[str, Oracle] = {"exp": np.exp, "log": np.log}
BINARY: dict[str, Oracle] = {"+": np.add, "-": np.subtract, "*": np.multiply, "/": np.divide}
CHOICE: dict[str, Oracle] = {
    "min": lambda a, b: np.where(a < b, a, b),
    "max": lambda a, b: np.where(a > b, a, b),
}
COMPARISONS: dict[str, Oracle] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}


def same(found: Any, expected: Any) -> bool:
    """Equal, signs of zero included; any NaN is like any other."""
    found, expected = float(found), float(expected)
    if math.isnan(expected):
        return math.isnan(found)
    return found == expected and math.copysign(1, found) == math.copysign(1, expected)


def oracle(function: Oracle, *arguments: float) -> Any:
    with np.errstate(all="ignore"):
        return function(*(np.float64(argument) for argument in arguments))


def call(function: str, *names: str) -> Call:
    return Call(function, tuple(Name(name) for name in names))


A, B = Name("a"), Name("b")
TWO: list[tuple[Expression, Oracle]] = [
    *((Binary(op, A, B), function) for op, function in BINARY.items()),
    *((call(name, "a", "b"), function) for name, function in CHOICE.items()),
]
ONE: list[tuple[Expression, Oracle]] = [
    *((call(name, "a"), function) for name, function in UNARY.items()),
    (Negate(A), np.negative),
]


def label(value: Any) -> str:
    match value:
        case Binary(op) | Compare(op):
            return str(op)
        case Call(function):
            return str(function)
        case Negate():
            return "negate"
    return ""


@pytest.mark.parametrize(("expression", "function"), TWO, ids=label)
def test_two_operands(expression: Expression, function: Oracle) -> None:
    operations = tensor_operations(torch.float64, CPU)
    for a, b in PAIRS:
        expected = oracle(function, a, b)
        found = evaluate(expression, {"a": a, "b": b}, HOST)
        assert type(found) is float
        assert same(found, expected), (a, b, found, expected)
    columns = (torch.tensor(column, dtype=torch.float64) for column in zip(*PAIRS, strict=True))
    tensor = evaluate(expression, dict(zip("ab", columns, strict=True)), operations)
    assert tensor.dtype == torch.float64
    for (a, b), found in zip(PAIRS, tensor.tolist(), strict=True):
        assert same(found, oracle(function, a, b)), (a, b, found)


@pytest.mark.parametrize(("expression", "function"), ONE, ids=label)
def test_one_operand(expression: Expression, function: Oracle) -> None:
    tensor = torch.tensor(VALUES, dtype=torch.float64)
    on_tensors = evaluate(expression, {"a": tensor}, tensor_operations(torch.float64, CPU))
    for a, on_tensor in zip(VALUES, on_tensors.tolist(), strict=True):
        expected = oracle(function, a)
        found = evaluate(expression, {"a": a}, HOST)
        assert type(found) is float
        assert same(found, expected), (a, found, expected)
        assert same(on_tensor, expected), (a, on_tensor, expected)


@pytest.mark.parametrize("name", HOST_UNARY)
def test_functions_of_the_host(name: str) -> None:
    for a in VALUES:
        expected = float(oracle(HOST_UNARY[name], a))
        found = evaluate(call(name, "a"), {"a": a}, HOST)
        if math.isfinite(expected) and expected != 0:
            assert math.isclose(found, expected, rel_tol=1e-15), (a, found, expected)
        else:
            assert same(found, expected), (a, found, expected)


# Where Python's math.pow raises, and what C's pow gives (C17, F.10.4.4).
POWERS: list[tuple[float, float, float]] = [
    (0.0, -1.0, math.inf),
    (0.0, -2.0, math.inf),
    (0.0, -0.5, math.inf),
    (-0.0, -1.0, -math.inf),
    (-0.0, -3.0, -math.inf),
    (-0.0, -2.0, math.inf),
    (-0.0, -0.5, math.inf),
    (-8.0, 1 / 3, math.nan),
    (-8.0, -0.5, math.nan),
    (1e200, 2.0, math.inf),
    (1e200, 1e200, math.inf),
    (-1e200, 2.0, math.inf),
    (-1e200, 3.0, -math.inf),
    (1e-200, -3.0, math.inf),
    (-1e-200, -3.0, -math.inf),
    (-1e-200, -4.0, math.inf),
]


@pytest.mark.parametrize(("a", "b", "expected"), POWERS)
def test_powers_that_python_raises_for(a: float, b: float, expected: float) -> None:
    with pytest.raises((ValueError, OverflowError)):
        math.pow(a, b)
    found = evaluate(Binary("**", A, B), {"a": a, "b": b}, HOST)
    assert same(found, expected), found


def test_powers_of_the_host() -> None:
    for a, b in itertools.product([0.0, 1e-8, 0.5, 0.9, 0.999, 1.0], [0, 1, 2, 3, 100, 10**6]):
        found = evaluate(Binary("**", A, B), {"a": a, "b": b}, HOST)
        assert math.isclose(found, a**b, rel_tol=1e-15), (a, b, found)
        assert type(found) is float


@pytest.mark.parametrize("op", COMPARISONS)
def test_comparisons(op: str) -> None:
    condition = Compare(op, A, B)
    chosen = Call("where", (condition, Number(1.0), Number(2.0)))
    columns = (torch.tensor(column, dtype=torch.float64) for column in zip(*PAIRS, strict=True))
    values = dict(zip("ab", columns, strict=True))
    tensor = evaluate(chosen, values, tensor_operations(torch.float64, CPU)).tolist()
    for (a, b), on_tensor in zip(PAIRS, tensor, strict=True):
        expected = COMPARISONS[op](a, b)
        assert evaluate(condition, {"a": a, "b": b}, HOST) is expected
        assert evaluate(chosen, {"a": a, "b": b}, HOST) == (1.0 if expected else 2.0)
        assert on_tensor == (1.0 if expected else 2.0)


def test_a_name_is_true_on_the_host_unless_it_is_zero() -> None:
    chosen = Call("where", (A, Number(1.0), Number(2.0)))
    for value in [*VALUES, True, False, 0, 1]:
        assert evaluate(chosen, {"a": value}, HOST) == (2.0 if value == 0 else 1.0)


def test_steps_and_flags_are_numbers_too() -> None:
    """`step` is a Python int, however large, and a flag a bool."""
    text = "x = 1 - beta**step + flag / step + sqrt(step) * -flag"
    value = parse(text, "step_code").statements[0].value
    for step in (1, 10, 10**6, 2**62):
        expected = 1 - 0.999**step + 1 / step - math.sqrt(step)
        found = evaluate(value, {"beta": 0.999, "step": step, "flag": True}, HOST)
        assert math.isclose(found, expected, rel_tol=1e-15)
    ratio = parse("x = flag / other", "step_code").statements[0].value
    assert evaluate(ratio, {"flag": True, "other": False}, HOST) == math.inf


FLOATS = st.floats(width=32)


@given(st.lists(FLOATS, min_size=1, max_size=64))
def test_float32_square_roots_are_rounded_correctly(values: list[float]) -> None:
    """As a processor's instruction rounds them; torch's own on a CPU sometimes do not."""
    x = np.array(values, np.float32)
    operations = tensor_operations(torch.float32, CPU)
    found = evaluate(call("sqrt", "a"), {"a": torch.from_numpy(x)}, operations)
    with np.errstate(invalid="ignore"):
        expected = np.sqrt(x)
    assert found.dtype == torch.float32
    assert np.array_equal(found.numpy(), expected, equal_nan=True)


def test_float32_square_roots_of_every_mantissa() -> None:
    bits = np.arange(0x3F800000, 0x40800000, 61, dtype=np.uint32)
    x = bits.view(np.float32)
    operations = tensor_operations(torch.float32, CPU)
    found = evaluate(call("sqrt", "a"), {"a": torch.from_numpy(x)}, operations)
    assert np.array_equal(found.numpy(), np.sqrt(x))


@given(FLOATS, FLOATS)
def test_float32_operations_are_rounded_once(a: float, b: float) -> None:
    """A float64 result rounded to float32 is the rounded result, for these five operations."""
    operations = tensor_operations(torch.float32, CPU)
    values = {name: torch.tensor(value) for name, value in (("a", a), ("b", b))}
    for expression, function in TWO:
        found = evaluate(expression, values, operations)
        with np.errstate(all="ignore"):
            expected = np.float32(oracle(function, a, b))
        assert found.dtype == torch.float32
        assert same(found, expected), (expression, a, b)


HALVES = [1.0, 1 + 2.0**-23, 1 + 2.0**-12, 1 - 2.0**-24, 2.0**-24, 2.0**-48, 2.0**-60, 2.0**-149]
HALFWAY = st.builds(operator.mul, st.sampled_from(HALVES), st.sampled_from([-1.0, 1.0]))


def rounded_once(exact: Fraction) -> float:
    """The float32 nearest to a number, of two the one with an even last bit; by comparing."""
    with np.errstate(over="ignore"):
        near = np.float32(float(exact))
        around = [near, *(np.nextafter(near, np.float32(end)) for end in (-np.inf, np.inf))]

    def rank(x: np.float32) -> tuple[Fraction, int]:
        return abs(Fraction(float(x)) - exact), int(x.view(np.uint32)) & 1

    return float(min(filter(np.isfinite, around), key=rank))


@settings(max_examples=1000)
@given(*[FLOATS | HALFWAY] * 3)
def test_a_fused_sum_of_float32_is_rounded_once(a: float, b: float, c: float) -> None:
    values = [float(np.float32(x)) for x in (a, b, c)]
    found = fused(*(torch.tensor(x) for x in values))
    assert found.dtype == torch.float32
    if not all(map(math.isfinite, values)):
        with np.errstate(all="ignore"):
            assert same(found, np.float64(values[0]) * values[1] + values[2])
        return
    exact = Fraction(values[0]) * Fraction(values[1]) + Fraction(values[2])
    if abs(exact) >= 2**128 - 2**103:
        assert same(found, math.copysign(math.inf, exact))
    elif exact:
        assert found.item() == rounded_once(exact)
    else:
        assert found.item() == 0


def test_large_sums_are_fused_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    source = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(shape, generator=source) for shape in ((3, 7), (), (7,)))
    for given_to in ((a, b, c), (b, a, c), (c, c, b), (b, b, a)):
        whole = fused(*given_to)
        monkeypatch.setattr("bnbx.kernels.evaluate.PIECE", 4)
        assert torch.equal(fused(*given_to), whole)
        monkeypatch.undo()
    assert fused(a[:0], b, c).shape == (0, 7)


def test_devices_without_float64_are_told_by_trying(monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_float64("cpu")
    assert has_float64("meta")

    def refuses(*args: Any, **kwargs: Any) -> None:
        raise TypeError("no float64 here")

    has_float64.cache_clear()
    monkeypatch.setattr(torch.Tensor, "double", refuses)
    try:
        assert not has_float64("cpu")
        operations = tensor_operations(torch.float32, CPU)
    finally:
        has_float64.cache_clear()
    a, b = torch.tensor(1 + 2.0**-23), torch.tensor(1 - 2.0**-23)
    assert operations["fma"](a, b, -torch.ones(())) == 0  # rounded twice


def test_the_three_forms_of_a_fused_sum() -> None:
    operations = tensor_operations(torch.float32, CPU)
    a, b, c = (torch.tensor(x) for x in (1 + 2.0**-23, 1 - 2.0**-23, 1.0))
    assert operations["fms"](a, b, c) == -(2.0**-46)
    assert operations["fnma"](a, b, c) == 2.0**-46
    assert operations["fma"](-a, b, c) == 2.0**-46
    assert tensor_operations(torch.float64, CPU)["fma"](a.double(), b.double(), -c.double()) == -(
        2.0**-46
    )


def test_numbers_take_the_dtype_of_the_section() -> None:
    number = parse("x = 0.1", "element_code").statements[0].value
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        operations: Operations = tensor_operations(dtype, CPU)
        found = evaluate(number, {}, operations)
        assert found.dtype == dtype
        assert found.shape == ()
        assert found == torch.tensor(0.1, dtype=dtype)
    assert evaluate(number, {}, HOST) == 0.1
    assert type(evaluate(Number(1.0), {}, HOST)) is float


def test_tensors_of_any_shape_and_scalars_mix() -> None:
    value = parse("x = where(a < 2, min(a, b), -a) * b", "element_code").statements[0].value
    operations = tensor_operations(torch.float32, CPU)
    values = {"a": torch.tensor([[1.0, 2.0], [3.0, -4.0]]), "b": torch.tensor(0.5)}
    found = evaluate(value, values, operations)
    assert found.tolist() == [[0.25, -1.0], [-1.5, -2.0]]


def test_operations_leave_their_arguments_alone() -> None:
    operations = tensor_operations(torch.float32, CPU)
    value = parse("x = sqrt(abs(-a)) + sign(a) * max(a, 1) / a", "element_code")
    a = torch.tensor([1.0, -2.0, 4.0])
    before = a.clone()
    evaluate(value.statements[0].value, {"a": a}, operations)
    assert torch.equal(a, before)


def test_a_name_that_is_missing_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="b"):
        evaluate(Binary("+", A, B), {"a": 1.0}, HOST)
