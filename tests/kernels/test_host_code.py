"""The host's part of a step as a Python function: what the interpreter gives, bit for bit."""

from __future__ import annotations

import itertools
import math
import re
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnbx.kernels.host_code import host_function, host_source
from bnbx.kernels.lower import lower
from bnbx.registry import Optimizer
from bnbx.registry.evaluate import HOST, evaluate
from bnbx.registry.optimizer import STEP
from bnbx.registry.rule import parse
from rule_runs import drawn_switches
from strategies import hyper_values, rules

SPECIAL = [0.0, -0.0, 1.0, -2.0, 0.5, 1e-300, 1e300, math.inf, -math.inf, math.nan]


def bits(value: float) -> bytes:
    """NaN is like any other NaN."""
    return b"nan" if math.isnan(value) else struct.pack("<d", value)


@settings(max_examples=300)
@given(rules(), st.integers(0, 2**32 - 1), st.data())
def test_a_rule_gives_the_scalars_that_the_interpreter_gives(
    spec: Optimizer, seed: int, data: st.DataObject
) -> None:
    lowered = lower(spec, drawn_switches(spec, seed))
    given_values = {**data.draw(hyper_values(spec)), STEP: data.draw(st.integers(1, 10**6))}
    host = host_function(spec.step.statements, lowered.scalars.values(), lowered.inputs)
    scalars, inputs = host(given_values)
    values = dict(given_values)
    for statement in spec.step.statements:
        values[statement.target] = evaluate(statement.value, values, HOST)
    expected = [evaluate(value, values, HOST) for value in lowered.scalars.values()]
    assert [*map(bits, scalars)] == [*map(bits, expected)]
    assert [*map(bits, inputs)] == [bits(values[name]) for name in lowered.inputs]


TEXTS = ["a + b", "a - b", "a * b", "a / b", "a ** b", "-a ** b", "(-a) ** b", "a / (b / a)"]
TEXTS += ["sqrt(a)", "exp(a)", "log(a)", "abs(a)", "sign(a)", "min(a, b)", "max(a, b)", "1e-8"]
TEXTS += [f"where(a {op} b, a, -b)" for op in ("<", "<=", ">", ">=", "==", "!=")]
TEXTS += ["where(a, b, 1)"]


@pytest.mark.parametrize("text", TEXTS)
def test_every_operation_follows_ieee_754_as_the_interpreter_does(text: str) -> None:
    (statement,) = parse(f"x = {text}", "step_code").statements
    host = host_function([statement], [], ["x"])
    for a, b in itertools.product(SPECIAL, SPECIAL):
        _, (found,) = host({"a": a, "b": b})
        assert bits(found) == bits(evaluate(statement.value, {"a": a, "b": b}, HOST)), (a, b)


def test_a_name_that_is_written_later_is_read_from_outside_first() -> None:
    statements = parse("b = a + 1\na = b * 2\nc = a", "step_code").statements
    assert host_function(statements, [], ["a", "b", "c"])({"a": 1.0}) == ([], [4.0, 2.0, 4.0])


TOKENS = re.compile(
    r"\s*(?:\d+(?:\.\d+)?(?:e[+-]\d+)?|[a-z][a-z0-9_]*|[A-Z]+|<=|>=|==|!=|[-+*<>(),=\[\]])"
)


@given(rules(), st.integers(0, 2**32 - 1))
def test_the_text_holds_nothing_but_tokens_of_the_language(spec: Optimizer, seed: int) -> None:
    lowered = lower(spec, drawn_switches(spec, seed))
    scalars = tuple(lowered.scalars.values())
    first, *lines = host_source(spec.step.statements, scalars, lowered.inputs).splitlines()
    assert first == "def host(GIVEN):"
    known = {*spec.hyper, STEP, *spec.step.writes, "return"}
    for line in lines:
        found = re.fullmatch(r"    ([a-z][a-z0-9_]*) = GIVEN\['\1'\]", line)
        text = found[1] if found else line
        end = 0
        while end < len(text):
            token = TOKENS.match(text, end)
            assert token is not None, line
            word = token[0].strip()
            assert not word.islower() or word in known or word[0].isdigit()
            assert not word.isupper() or word in {*map(str.upper, HOST), "DIVIDE", "POWER"}
            end = token.end()
