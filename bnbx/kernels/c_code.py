"""Renders lowered statements as C, the part that C++ and CUDA have in common.

Every operator is parenthesized and every constant is a float32 literal, so that the compiler has
no order of evaluation or precision to choose. Calls go to `rule_*` functions that each target's
template defines.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

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


def c_expression(expression: Expression) -> str:
    """C text of a lowered expression."""
    match expression:
        case Number(value):
            return literal(value) if value >= 0 else f"({literal(value)})"
        case Name(id):
            return id
        case Negate(operand):
            return f"(-{c_expression(operand)})"
        case Binary(op, left, right) | Compare(op, left, right):
            return f"({c_expression(left)} {op} {c_expression(right)})"
        case Call("where", (condition, yes, no)):
            return f"({c_expression(condition)} ? {c_expression(yes)} : {c_expression(no)})"
        case Call(function, args):
            return f"rule_{function}({', '.join(c_expression(arg) for arg in args)})"


def c_statements(statements: Iterable[Statement], declared: Iterable[str]) -> list[str]:
    """C lines for the statements, each with its rule text; names not in `declared` are declared."""
    seen = set(declared)
    lines = []
    for statement in statements:
        value = c_expression(statement.value)
        if isinstance(statement.value, (Binary, Compare)):
            value = value[1:-1]
        declare = "" if statement.target in seen else "float "
        seen.add(statement.target)
        lines += [f"// {comment(statement.text)}", f"{declare}{statement.target} = {value};"]
    return lines
