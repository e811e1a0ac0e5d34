"""C text of rules: exact numbers, no room for a compiler's choice, and no way out of a comment."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from importlib.resources import files
from keyword import iskeyword
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bnbx.errors import CompileError, SpecError
from bnbx.kernels.c_code import c_expression, c_statements, literal
from bnbx.kernels.compiler import find_compiler
from bnbx.kernels.lower import lower
from bnbx.kernels.plan import make_plan
from bnbx.kernels.source import render
from bnbx.registry import Optimizer, State, rate
from bnbx.registry.rule import FLOAT32_MAX, Expression, parse
from rule_runs import drawn_switches
from strategies import rules

TEMPLATES = ("optimizer.cpp.j2", "optimizer.cu.j2")


def source_of(spec: Optimizer, template: str) -> str:
    types = {state.name: None for state in spec.states}
    return render(make_plan(spec, {}, "float32", "float32", types), template)


# ---- numbers and expressions


@given(st.floats(-FLOAT32_MAX, FLOAT32_MAX))
@example(0.0)
@example(-0.0)
@example(1e16)
@example(16777216.0)
@example(1e-45)
@example(FLOAT32_MAX)
def test_a_literal_reads_back_as_the_float32(value: float) -> None:
    written = literal(value)
    assert re.fullmatch(r"-?(\d+\.\d*|\d+(\.\d+)?e[+-]\d+)f", written)
    with np.errstate(over="ignore"):
        expected = np.float32(value)
    read = np.float32(float(written[:-1]))
    assert read.tobytes() == expected.tobytes()


def tree(text: str) -> Expression:
    return parse(f"x = {text}", "element_code").statements[0].value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", "a"),
        ("1", "1.0f"),
        ("0.1", "0.1f"),
        ("1e-8", "1e-08f"),
        ("-a", "(-a)"),
        ("-(-a)", "(-(-a))"),
        ("a + b - c", "((a + b) - c)"),
        ("a - (b - c)", "(a - (b - c))"),
        ("a * b / c * a", "(((a * b) / c) * a)"),
        ("a + b * -c", "(a + (b * (-c)))"),
        ("sqrt(a * b)", "rule_sqrt((a * b))"),
        ("max(a, min(b, 2))", "rule_max(a, rule_min(b, 2.0f))"),
        ("where(a + b < c, a, -b)", "rule_where(((a + b) < c), a, (-b))"),
    ],
)
def test_c_expressions(text: str, expected: str) -> None:
    assert c_expression(tree(text)) == expected


def test_variables_are_declared_once_and_inputs_never() -> None:
    statements = parse("u = g\np = p + u\nu = u * u\nw = sqrt(u)", "element_code").statements
    assert c_statements(statements, ["p", "g"]) == [
        *("// u = g", "Number u = g;"),
        *("// p = p + u", "p = p + u;"),
        *("// u = u * u", "u = u * u;"),
        *("// w = sqrt(u)", "Number w = rule_sqrt(u);"),
    ]


TOKENS = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d*)?(?:e[+-]\d+)?f)|(?P<name>Number|[a-z][a-z0-9_]*)"
    r"|(?P<sign><=|>=|==|!=|[-+*/<>(),=;]))"
)


@given(rules(), st.integers(0, 2**32 - 1))
def test_statements_hold_nothing_but_tokens_of_the_language(spec: Optimizer, seed: int) -> None:
    lowered = lower(spec, drawn_switches(spec, seed))
    variables = {*spec.element.reads, *spec.element.writes, *spec.apply.reads, *spec.apply.writes}
    variables |= {*lowered.scalars, *lowered.tensor_scalars, "Number"}
    called = ("sqrt", "abs", "sign", "min", "max", "where", "fma", "fms", "fnma")
    functions = {f"rule_{name}" for name in called}
    for line in c_statements(lowered.statements, ["p", "g"]):
        if line.startswith("// "):
            continue
        end = 0
        while end < len(line):
            token = TOKENS.match(line, end)
            assert token is not None, line
            assert token["name"] is None or token["name"] in variables | functions
            assert "--" not in token[0]
            end = token.end()
        assert line.endswith(";")
        assert line.count(";") == 1
        assert "--" not in line


# ---- texts of a spec inside a source: what follows a comment is still compiled


def code_of(source: str) -> list[str]:
    """The lines that a C compiler is left with: lines joined, then comments dropped."""
    joined = re.sub(r"\\[ \t]*\n", "", source)
    lines = [line.split("//")[0].rstrip() for line in re.split(r"[\r\n]", joined)]
    return [line for line in lines if line]


PLAIN = "p = p - lr * g"


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(
    "code",
    [
        "p = p - lr * g  # all of it",
        "p = p - lr * g  # \\",
        "p = p - lr * g  # \\ ",
        "p = p - \\\nlr * g",
        "p = p \\\n- lr \\\n* g",
        "p = (  # \\\np - lr * g)",
        "p = p - lr * g  # */ int x; /*",
        "p = p - lr * g  # \N{LATIN SMALL LETTER E WITH ACUTE}",
    ],
)
def test_lines_of_a_rule_stay_in_their_comments(template: str, code: str) -> None:
    hyper = dict(lr=rate(0.1))
    plain = Optimizer(name="r", summary="s", hyper=hyper, element_code=PLAIN)
    try:
        spec = Optimizer(name="r", summary="s", hyper=hyper, element_code=code)
    except SpecError:
        return
    assert code_of(source_of(spec, template)) == code_of(source_of(plain, template))


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("field", ["summary", "source"])
@pytest.mark.parametrize(
    "text",
    [
        "two\nint lines() { return 1; }\n//",
        "a\rb",
        "ends in \\",
        "\\\n",
        "a\u2028b",
        "a\x0bb",
        "*/",
    ],
)
def test_words_of_a_spec_stay_in_their_comments(template: str, field: str, text: str) -> None:
    """A spec may come from a stranger's checkpoint: it can be wrong, but it runs no code."""
    fields: dict[str, Any] = {"summary": "s", "source": "t"}
    hyper = dict(lr=rate(0.1))
    plain = Optimizer(name="r", hyper=hyper, element_code=PLAIN, **fields)
    try:
        spec = Optimizer(name="r", hyper=hyper, element_code=PLAIN, **{**fields, field: text})
    except SpecError:
        return
    assert code_of(source_of(spec, template)) == code_of(source_of(plain, template))


# ---- names of a rule beside the names of a kernel


USES = "p = p - lr * sqrt(abs(g)) * sign(g) * min(g, max(p, 1))"


def words_of_kernels() -> list[str]:
    """Every word in the templates that Python could take for a name."""
    folder = files("bnbx.kernels") / "templates"
    text = "\n".join(file.read_text(encoding="utf-8") for file in folder.iterdir())
    words = set(re.findall(r"\b[a-z][a-z0-9_]*\b", text)) - {"p", "g", "lr"}
    return sorted(word for word in words if not iskeyword(word))


def with_variable(*words: str) -> Optimizer:
    code = "\n".join([*(f"{word} = g * p" for word in words), USES])
    return Optimizer(name="r", summary="s", hyper=dict(lr=rate(0.1)), element_code=code)


def with_state(*words: str) -> Optimizer:
    states = tuple(State(name=word) for word in words)
    code = "\n".join([*(f"{word} = {word} + g * p" for word in words), USES])
    hyper = dict(lr=rate(0.1))
    return Optimizer(name="r", summary="s", states=states, hyper=hyper, element_code=code)


def allowed(make: Callable[..., Optimizer], word: str) -> bool:
    try:
        return make(word).name == "r"
    except SpecError:
        return False


def assert_compiles(spec: Optimizer) -> None:
    try:
        command = find_compiler().command
    except CompileError as error:
        pytest.skip(f"needs a C++ compiler: {error}")
    flags = ["-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    source = source_of(spec, "optimizer.cpp.j2")
    done = subprocess.run(
        [*command, *flags], input=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("make", [with_variable, with_state])
def test_every_name_that_the_language_allows_compiles(make: Callable[..., Optimizer]) -> None:
    words = [word for word in words_of_kernels() if allowed(make, word)]
    assert len(words) > 100
    for start in range(0, len(words), 60):  # a rule has a limited length
        assert_compiles(make(*words[start : start + 60]))
