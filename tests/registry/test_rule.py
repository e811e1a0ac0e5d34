"""The rule language is what Python says it is, and nothing else gets in.

What is accepted means what Python's own evaluation makes of it, and what is refused says why.
Texts that nobody thought of are the matter of test_rule_any_text.py.
"""

from __future__ import annotations

import keyword
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bnbx.errors import RuleError
from bnbx.kernels.evaluate import HOST, evaluate, tensor_operations
from bnbx.registry.rule import (
    CONDITION,
    FLOAT32_MAX,
    LINES,
    MAX_DEPTH,
    MAX_TEXT,
    NO_IF,
    NO_LOGIC,
    NO_LOOP,
    NOT_IN,
    Call,
    Compare,
    Expression,
    Name,
    Number,
    Section,
    check_name,
    names,
    parse,
    parse_condition,
)

# ---- what is accepted means what Python says

ELEMENT_TEXTS = """
    a
    2
    0.1
    1e-8
    .5 + 5.
    1_000 / 0x10
    a + b - c
    a - b + c
    a - (b - c)
    a + b * c
    (a + b) * c
    a * b / c
    a / b * c
    a / (b / c)
    a / b / c
    -a
    --a
    -a * -b
    a - -b
    a+-b
    -(a + b)
    sqrt(a * a + b * b)
    sqrt(2)
    abs(c - a)
    abs(a - c)
    sign(a - b) + sign(b - a) * 10
    sign(0)
    min(a, b) + max(a, b) * c
    max(max(a, b), min(b, c))
    where(a < b, a, b)
    where(a <= b, 1, 2)
    where(a > b, a, b)
    where(a >= a, 1, 2)
    where(a == a, 1, 2)
    where(a != b, 1, 2)
    where(a + b < c * c - 1, sqrt(a), -sqrt(b))
    where(a < b, where(b < c, 1, 2), where(a < c, 3, 4))
    a * (1 - a) + (1 - b) * b * b
    (
        a
        + b
    )
"""
HOST_TEXTS = """
    a ** b
    a ** b ** c
    (a ** b) ** c
    a ** -b
    -a ** 2
    (-a) ** 2
    2 ** -a ** 2
    1 - a ** 100
    exp(a) * log(b)
    exp(-a * b)
    log(exp(a))
    sqrt(1 - b ** -2)
    a * b ** 2
    a ** 2 / b ** 2
    where(zero, a, b)
    where(a, b, c)
"""
VALUES = {"a": 0.7, "b": 1.9, "c": 1.3, "zero": 0.0}
PYTHON: dict[str, Callable[..., Any]] = {
    "sqrt": math.sqrt,
    "exp": math.exp,
    "log": math.log,
    "abs": abs,
    "min": min,
    "max": max,
    "sign": lambda x: (x > 0) - (x < 0),
    "where": lambda condition, yes, no: yes if condition else no,
}


def cases(texts: str) -> list[str]:
    """One text a line, those in parentheses over several lines as one."""
    found: list[str] = []
    for line in texts.strip().splitlines():
        if found and found[-1].count("(") != found[-1].count(")"):
            found[-1] += "\n" + line
        else:
            found.append(line.strip())
    return found


def by_python(text: str) -> float:
    return float(eval(text, {"__builtins__": {}}, {**VALUES, **PYTHON}))  # the table above


def tree(text: str, section: Section) -> Expression:
    return parse(f"x = {text}", section).statements[0].value


@pytest.mark.parametrize("text", [*cases(ELEMENT_TEXTS), *cases(HOST_TEXTS)])
def test_the_host_computes_what_python_does(text: str) -> None:
    assert evaluate(tree(text, "step_code"), VALUES, HOST) == by_python(text)


@pytest.mark.parametrize("text", cases(ELEMENT_TEXTS))
def test_element_code_on_tensors_computes_what_python_does(text: str) -> None:
    device = torch.device("cpu")
    operations = tensor_operations(torch.float64, device)
    values = {name: torch.tensor(value, dtype=torch.float64) for name, value in VALUES.items()}
    found = evaluate(tree(text, "element_code"), values, operations)
    assert found.dtype == torch.float64
    assert float(found) == by_python(text)


@pytest.mark.parametrize("text", ["where(a, b, c)", "where(zero, b, c)"])
def test_a_name_alone_is_true_where_it_is_not_zero(text: str) -> None:
    values: dict[str, Any] = {"a": -0.5, "b": 1.0, "c": 2.0, "zero": 0.0}
    on_host = evaluate(tree(text, "element_code"), values, HOST)
    operations = tensor_operations(torch.float64, torch.device("cpu"))
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
    assert float(evaluate(tree(text, "element_code"), tensors, operations)) == on_host


def test_statements_keep_their_order_and_source() -> None:
    code = parse("\n  # first\n  x = a + g\n\n  y = (x\n    * b)\n  x = y; z = x\n", "element_code")
    assert [statement.target for statement in code.statements] == ["x", "y", "x", "z"]
    assert [statement.text for statement in code.statements[:2]] == ["x = a + g", "y = (x"]
    assert code.reads == ("a", "g", "b")
    assert code.writes == ("x", "y", "z")


def test_names_are_listed_left_to_right_with_repeats() -> None:
    expression = tree("where(a < b, -c * a, sqrt(b) - 1) + a", "element_code")
    assert list(names(expression)) == ["a", "b", "c", "a", "b", "a"]


def test_a_condition_is_an_expression_or_one_comparison() -> None:
    assert parse_condition("a <= 1") == Compare("<=", Name("a"), Number(1.0))
    assert parse_condition(" a ") == Name("a")
    assert parse_condition("where(a, 1, 0)") == Call("where", (Name("a"), Number(1.0), Number(0.0)))


# ---- what is refused says why

NAMES = "a name is lower-case ASCII letters, digits and underscores"
RESERVED_WORD = "is a reserved word; choose another name"
TOO_LARGE = "too large a number for this section's precision"
DEEP = f"expressions nest at most {MAX_DEPTH} deep"
LONG = f"characters; a rule has at most {MAX_TEXT}"
SYNTAX = "element_code line 1: "

REFUSED: list[tuple[str, str]] = [
    # statements
    *((text, LINES) for text in (
        "import os", "from os import path",
        "p += g", "p: float = g", "a = b = g", "a, b = g", "(p, *a) = g", "p.data = g", "p[0] = g",
        "def f(): p = g", "async def f(): p = g", "class c: p = g", "return g", "yield g", "pass",
        "break", "del p", "global p", "assert g", "raise g", "with g: p = g", "g", "sqrt(g)",
        "'docstring'", "with g:\n    p = g", "def f():\n    p = g",
    )),
    *((text, NO_IF) for text in (
        "if g: p = g", "if g > 0:\n    p = g\nelse:\n    p = 0", "if g > 0:",
        "u = g\nif u > 0:\n\n  # up\n  p = u",
    )),
    *((text, NO_LOOP) for text in (
        "for i in g: p = i", "while g: p = g", "for i in g:\n    p = i", "while g:\n    p = g",
    )),
    # expressions
    *((f"p = {text}", NOT_IN) for text in (
        "g.real", "g.__class__", "g[0]", "g[0:1]", "'text'", "b'text'", "f'{g}'",
        "'a' 'b'", "lambda: g", "(q := g)", "(g, p)", "[g]", "{g}", "{g: p}", "[i for i in g]",
        "(i for i in g)", "g @ g", "g % 2", "g << 1", "g >> 1", "g & p", "g | p", "g ^ p",
        "~g", "+g", "1j", "True", "False", "None", "...",
        "await g", "min(a=g, b=p)", "min(g, b=p)", "sqrt(x=g)", "min(**g)",
        "min(*g, p)", "sqrt(*g)", "sqrt(g)(p)", "(lambda: g)()",
    )),
    *((f"p = {text}", NO_IF) for text in ("g if p else g", "yield_ if g else p")),
    *((f"p = {text}", NO_LOGIC) for text in ("not g", "g and p", "g or p")),
    ("p = g // 2", "there is no '//'; write '/', which does not round"),
    ("p = torch.sign(g)", "functions are called by name alone; write sign(x)"),
    ("p = torch.where(g > p, g, p)", "by name alone; write where(x, y, z)"),
    ("p = g.sqrt()", "functions are called by name alone; write sqrt(x)"),
    ("p = torch.maximum(g, p)", "called by name alone; did you mean 'max'?; there are abs, exp, "),
    # the host's alone
    ("p = g ** 2", "'**' belongs in step_code; write x * x, or compute it there"),
    ("p = exp(g)", "'exp' belongs in step_code"),
    ("p = log(g)", "'log' belongs in step_code"),
    # conditions
    ("p = g < p", "a comparison may only be the first argument of 'where'"),
    ("p = (g < p) * g", "a comparison may only be the first argument of 'where'"),
    ("p = where(g < p, g > p, p)", "a comparison may only be the first argument of 'where'"),
    ("p = where((g < p) < g, g, p)", "a comparison may only be the first argument of 'where'"),
    *((f"p = where({text}, g, p)", CONDITION) for text in (
        "0 < g < 1", "g + p", "-g", "1", "True", "g in p", "g is p", "g is not p",
        "where(g, p, g)", "sqrt(g)",
    )),
    *((f"p = where({text}, g, p)", NO_LOGIC) for text in ("not g", "g < 1 and p > 1")),
    # calls
    ("p = min(g)", "min takes 2 arguments, 1 given"),
    ("p = max(g, p, g)", "max takes 2 arguments, 3 given"),
    ("p = min(*g)", "min takes 2 arguments, 1 given"),
    ("p = where(g < p, g)", "where takes 3 arguments, 2 given"),
    ("p = sqrt()", "sqrt takes 1 arguments, 0 given"),
    ("p = sin(g)", "unknown function 'sin'; did you mean 'sign'?; there are abs, exp, log, max, "
     "min, sign, sqrt, where"),
    ("p = __import__(g)", "unknown function '__import__'"),
    ("p = g(p)", "unknown function 'g'"),
    # names
    *((f"{text} = g", NAMES) for text in ("P", "pT", "_p", "__p", "p_", "p__", "µ", "пи")),
    *((f"p = {text}", NAMES) for text in ("G", "_g", "g_", "é", "__name__")),
    *((f"{text} = g", RESERVED_WORD) for text in ("int", "half", "sqrt", "where", "exp", "double")),
    *((f"p = {text}", RESERVED_WORD) for text in ("float", "min", "register", "template")),
    # numbers
    *((f"p = {text}", TOO_LARGE) for text in ("1e999", "1e39", "3.5e38", "9" * 40, "9" * 400)),
    # size
    ("p = " + "-" * (MAX_DEPTH + 1) + "g", DEEP),
    ("p = " + "sqrt(" * (MAX_DEPTH + 1) + "g" + ")" * (MAX_DEPTH + 1), DEEP),
    ("p = " + " + ".join(["g"] * (MAX_DEPTH + 2)), DEEP),
    ("p = " + "where(g < p, " * (MAX_DEPTH + 1) + "g" + ", p)" * (MAX_DEPTH + 1), DEEP),
    ("p = g\n" * 2000, LONG),
    ("p = g  # " + "x" * MAX_TEXT, LONG),
    # no Python at all
    *((text, SYNTAX) for text in (
        "p =", "p = g +", "= g", "p = g p", "p = 1__0", "p = 0777", "p = (g", "p = g)", "1 = g",
        "p = 'text", "p = $g", "p = g; = p", "try: p = g", "class = g",
    )),
    # not even text that a tokenizer takes
    ("p = \ud800", "element_code"),
    ("p = " + "(" * 3000 + "g" + ")" * 3000, "element_code"),
    ("p = " + "-" * 7000 + "g", "element_code"),
    ("p = " + "9" * 5000, "element_code"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), REFUSED, ids=[ascii(t)[:40] for t, _ in REFUSED])
def test_refused_in_element_code(text: str, message: str) -> None:
    with pytest.raises(RuleError) as caught:
        parse(text, "element_code")
    assert message in str(caught.value)
    assert str(caught.value).startswith("element_code")


@pytest.mark.parametrize("text", ["p = 1e999", "p = 1" + "0" * 309, "p = " + "9" * 5000])
def test_the_host_refuses_numbers_that_float64_lacks(text: str) -> None:
    with pytest.raises(RuleError, match=r"^step_code"):
        parse(text, "step_code")


def test_numbers_go_up_to_the_largest_of_the_section() -> None:
    assert tree("3.4028234663852886e38", "element_code") == Number(FLOAT32_MAX)
    assert tree("1e308", "step_code") == Number(1e308)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected one expression"),
        ("a = 1", "expected one expression"),
        ("a\nb", "expected one expression"),
        ("0 < a < 1", CONDITION),
        ("where(a)", "where takes 3 arguments, 1 given"),
        ("a and b", NO_LOGIC),
        ("a.b", NOT_IN),
        ("(\n  a.b\n)", NOT_IN),
        ("where(\n  a,\n  b.c,\n  0\n)", NOT_IN),
        ("a >", "constraint line 1"),
    ],
)
def test_refused_as_a_constraint(text: str, message: str) -> None:
    with pytest.raises(RuleError) as caught:
        parse_condition(text)
    assert message in str(caught.value)


def test_an_error_shows_the_line_and_the_culprit() -> None:
    with pytest.raises(RuleError) as caught:
        parse("x = g\n\n    p = x + g.real * 2", "element_code")
    message = "element_code line 3: 'g.real': not in the rule language\n    p = x + g.real * 2"
    assert str(caught.value) == message


def test_null_bytes_are_refused_without_a_line_that_is_none() -> None:
    with pytest.raises(RuleError) as caught:
        parse("p = g\0", "element_code")
    assert "null bytes" in str(caught.value)
    assert "None" not in str(caught.value)


def test_names_that_python_folds_to_ascii_are_refused() -> None:
    """Python reads a full-width p as p; a rule that means two things is none."""
    with pytest.raises(RuleError, match=NAMES):
        parse("\uff50 = g", "element_code")


# Everything that is a word to the C++ standard (2020), but can be a name in Python.
CPP_KEYWORDS = """
    alignas alignof and_eq asm auto bitand bitor bool case catch char char8_t char16_t char32_t
    compl concept const consteval constexpr constinit const_cast co_await co_return co_yield
    decltype default delete do double dynamic_cast enum explicit export extern false float friend
    goto inline int long mutable namespace new noexcept not_eq nullptr operator or_eq private
    protected public register reinterpret_cast requires short signed sizeof static static_assert
    static_cast struct switch template this thread_local throw true typedef typeid typename union
    unsigned using virtual void volatile wchar_t xor xor_eq
""".split()


@pytest.mark.parametrize("word", CPP_KEYWORDS)
def test_words_of_cpp_cannot_be_names(word: str) -> None:
    assert not keyword.iskeyword(word)
    with pytest.raises(RuleError, match="reserved word"):
        check_name(word, "name")


@pytest.mark.parametrize("name", ["a", "a1", "a_b", "x2y", "long_name_with_5_parts", "type", "p"])
def test_names_that_are_fine(name: str) -> None:
    assert check_name(name, "name") == name


@pytest.mark.parametrize("name", ["", "1a", "a-b", "a b", "a\n", "A", "a_", "_a", "aé", "a.b"])
def test_names_that_are_not(name: str) -> None:
    with pytest.raises(RuleError, match="state '"):
        check_name(name, "state")
