"""Whatever text is thrown at the parser, it gives a tree of the rule language or a RuleError.

A tree holds nothing but the nodes, names and operators of the language, so nothing else can reach
a compiler.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import get_args

from hypothesis import example, given
from hypothesis import strategies as st

from bnbx.errors import RuleError
from bnbx.registry import optimizers
from bnbx.registry.rule import (
    FLOAT32_MAX,
    FUNCTIONS,
    HOST_FUNCTIONS,
    NAME,
    RESERVED,
    Binary,
    Call,
    Code,
    Compare,
    Expression,
    Name,
    Negate,
    Number,
    Section,
    Statement,
    parse,
    parse_condition,
)

NODES = get_args(Expression)
ARITHMETIC = {"+", "-", "*", "/"}
COMPARISONS = {"<", "<=", ">", ">=", "==", "!="}
WORDS = """
    g p m lr x y_ Z _w sqrt abs sign min max where exp log sin int if else for in while def lambda
    import not and or is None True + - * / ** // % @ ~ & | ^ << >> < <= > >= == != = += := ( ) [ ]
    { } , : ; . ... # ' " \\ $ ? ! ` 0 1 2.5 1e-8 1e400 1j 0x1f 99999999999999999999 1_0 é µ \uff50
    \ud800
"""
BREAKS = [" ", "\n", "\t", "\r", "\0", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\\\n", '"""']
FRAGMENTS = [*WORDS.split(), *BREAKS]
SECTIONS: tuple[Section, ...] = ("step_code", "element_code")
VALID = [text for spec in optimizers() for text in (spec.step_code, spec.element_code) if text]


def children(expression: Expression) -> Iterator[Expression]:
    yield expression
    match expression:
        case Negate(operand):
            yield from children(operand)
        case Binary(_, left, right) | Compare(_, left, right):
            yield from itertools.chain(children(left), children(right))
        case Call(_, args):
            for arg in args:
                yield from children(arg)


def assert_closed(expression: Expression, host: bool) -> None:
    """Fail unless the tree holds nothing but nodes, names and operators of the language."""
    for node in children(expression):
        assert type(node) in NODES
        match node:
            case Number(value):
                assert type(value) is float
                assert abs(value) <= (math.inf if host else FLOAT32_MAX)
                assert math.isfinite(value)
            case Name(id):
                assert_name(id)
            case Binary(op):
                assert op in ARITHMETIC | ({"**"} if host else set())
            case Compare(op):
                assert op in COMPARISONS
            case Call(function, args):
                assert len(args) == FUNCTIONS[function]
                assert host or function not in HOST_FUNCTIONS
    conditions = [
        n.args[0] for n in children(expression) if isinstance(n, Call) and n.function == "where"
    ]
    assert all(isinstance(condition, (Compare, Name)) for condition in conditions)
    compared = [node for node in children(expression) if isinstance(node, Compare)]
    assert len(compared) == sum(isinstance(condition, Compare) for condition in conditions)


def assert_name(name: str) -> None:
    assert name.isascii()
    assert NAME.match(name)
    assert name not in RESERVED | FUNCTIONS.keys()


def assert_parses_or_refuses(text: str, section: Section) -> None:
    try:
        code = parse(text, section)
    except RuleError:
        return
    assert type(code) is Code
    for statement in code.statements:
        assert type(statement) is Statement
        assert_name(statement.target)
        assert_closed(statement.value, host=section == "step_code")
    assert set(code.writes) == {statement.target for statement in code.statements}


@st.composite
def mutations(draw: st.DrawFn) -> str:
    """A valid rule with a few pieces cut, doubled, or replaced by fragments of Python."""
    text = draw(st.sampled_from(VALID))
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.sampled_from([0, 0, 1, 2, 5, 20])))
        piece = draw(st.sampled_from(FRAGMENTS) | st.just(text[start:end] * 2))
        text = text[:start] + piece + text[end:]
    return text


@given(st.text(), st.sampled_from(SECTIONS))
@example("x = 1\\", "element_code")
def test_any_text_parses_or_is_refused(text: str, section: Section) -> None:
    assert_parses_or_refuses(text, section)


@given(st.lists(st.sampled_from(FRAGMENTS)).map("".join), st.sampled_from(SECTIONS))
def test_any_pieces_of_python_parse_or_are_refused(text: str, section: Section) -> None:
    assert_parses_or_refuses("p = " + text, section)


@given(mutations(), st.sampled_from(SECTIONS))
def test_any_mutation_of_a_rule_parses_or_is_refused(text: str, section: Section) -> None:
    assert_parses_or_refuses(text, section)


@given(st.lists(st.sampled_from(FRAGMENTS)).map("".join) | mutations() | st.text())
@example("(\nfoo())")
def test_any_constraint_parses_or_is_refused(text: str) -> None:
    try:
        condition = parse_condition(text)
    except RuleError:
        return
    if isinstance(condition, Compare):
        assert_closed(condition.left, host=True)
        assert_closed(condition.right, host=True)
    else:
        assert_closed(condition, host=True)
