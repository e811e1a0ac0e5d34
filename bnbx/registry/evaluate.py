"""Runs expressions of the rule language in Python: one interpreter, a table of operations.

The table here is for numbers on the host; `bnbx.kernels.evaluate` has one for tensors. It follows
IEEE 754 where Python raises
(division by zero, overflow), so that a schedule that leaves the range gives inf or nan, as it
would in a kernel, and not an exception in the middle of a step.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from bnbx.registry.rule import Binary, Call, Compare, Expression, Name, Negate, Number

Operations = Mapping[str, Callable[..., Any]]

COMMON: dict[str, Callable[..., Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "negate": operator.neg,
}


def evaluate(expression: Expression, values: Mapping[str, Any], operations: Operations) -> Any:
    """The value of `expression`, with `values` for its names and `operations` for the rest."""
    match expression:
        case Number(value):
            return operations["number"](value)
        case Name(id):
            return values[id]
        case Negate(operand):
            return operations["negate"](evaluate(operand, values, operations))
        case Binary(op, left, right) | Compare(op, left, right):
            return operations[op](
                evaluate(left, values, operations), evaluate(right, values, operations)
            )
        case Call(function, args):
            return operations[function](*(evaluate(arg, values, operations) for arg in args))


def _divide(a: float, b: float) -> float:
    if b == 0:
        return (
            math.nan
            if a == 0 or math.isnan(a)
            else math.copysign(math.inf, a) * math.copysign(1, b)
        )
    return a / b


def _power(a: float, b: float) -> float:
    try:
        return math.pow(a, b)
    except OverflowError:
        return -math.inf if a < 0 and b % 2 == 1 else math.inf
    except ValueError:  # 0 to a negative power, or a negative base to a fraction
        odd = b % 2 == 1
        return (math.copysign(math.inf, a) if odd else math.inf) if a == 0 else math.nan


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf if x == 0 else math.nan


HOST: Operations = {
    **COMMON,
    "number": float,
    "/": _divide,
    "**": _power,
    "sqrt": lambda x: math.sqrt(x) if x >= 0 else math.nan,
    "abs": abs,
    "sign": lambda x: 1.0 if x > 0 else -1.0 if x < 0 else x,
    "exp": _exp,
    "log": _log,
    "min": lambda a, b: a if a < b else b,
    "max": lambda a, b: a if a > b else b,
    "where": lambda condition, a, b: a if condition else b,
}
