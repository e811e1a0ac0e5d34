"""Renders lowered statements as C, the part that C++ and CUDA have in common.

Every operator is parenthesized and every constant is a literal of the precision at hand, so that
the compiler has no order of evaluation or precision to choose. Calls go to `rule_*` functions
that each target's template defines.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

import numpy as np

from bnbx.registry.rule import (
    Binary,
    Call,
    Compare,
    Expression,
    Name,
    Negate,
    Number,
    Statement,
)


def literal(value: float) -> str:
    """A float32 literal that reads back as float32(value)."""
    shortest = str(np.float32(value))
    return f"{shortest}f" if "." in shortest or "e" in shortest else f"{shortest}.0f"


def comment(text: str) -> str:
    """The text as it may stand in a line comment: no character of it can end or extend the line."""
    return re.sub(r"[^ -~]|\\|\?\?/", " ", text).strip()


def literal64(value: float) -> str:
    """A float64 literal of this value."""
    return repr(float(value))


def c_expression(expression: Expression, literal: Callable[[float], str] = literal) -> str:
    """C text of a lowered expression; its precision is that of its literals and names."""

    def text(part: Expression) -> str:
        return c_expression(part, literal)

    match expression:
        case Number(value):
            return literal(value) if value >= 0 else f"({literal(value)})"
        case Name(id):
            return id
        case Negate(operand):
            return f"(-{text(operand)})"
        case Binary(op, left, right) | Compare(op, left, right):
            return f"({text(left)} {op} {text(right)})"
        case Call(function, args):
            return f"rule_{function}({', '.join(map(text, args))})"


def c_statements(
    statements: Iterable[Statement],
    declared: Iterable[str],
    c_type: str = "Number",
    literal: Callable[[float], str] = literal,
    remarks: Mapping[str, str] = MappingProxyType({}),
) -> list[str]:
    """C lines for the statements, each with its rule text; names not in `declared` are declared.

    `remarks` on names follow the texts that write them.
    """
    seen = set(declared)
    lines = []
    for statement in statements:
        value = c_expression(statement.value, literal)
        if isinstance(statement.value, (Binary, Compare)):
            value = value[1:-1]
        declare = "" if statement.target in seen else f"{c_type} "
        seen.add(statement.target)
        told = comment(statement.text + remarks.get(statement.target, ""))
        lines += [f"// {told}", f"{declare}{statement.target} = {value};"]
    return lines
