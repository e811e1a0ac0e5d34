"""The host's part of a step, step_code and what kernels are given of it, as one Python function.

A step is often followed by work that leaves none of Python's memory in the processor's caches, and
a walk over an expression's nodes then reads each of them from memory: of AdEMAMix's 16.8 million
parameters a step on one thread of a Granite Rapids takes 22 ms, and of that the walk took 0.25.
The operations are the table's of `bnbx.registry.evaluate`, so the results are the interpreter's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from bnbx.registry.evaluate import HOST
from bnbx.registry.rule import (
    Binary,
    Call,
    Compare,
    Expression,
    Name,
    Negate,
    Number,
    Statement,
    names,
)

HostFunction = Callable[[Mapping[str, float]], tuple[list[float], list[float]]]

# Those of the table that are Python's own operators on numbers.
_OPERATORS = {"+", "-", "*", "<", "<=", ">", ">=", "==", "!="}


def host_function(
    statements: Iterable[Statement], scalars: Iterable[Expression], inputs: Iterable[str]
) -> HostFunction:
    """What gives `scalars` and `inputs` as they are after `statements`, from the names' values."""
    source = host_source(tuple(statements), tuple(scalars), tuple(inputs))
    scope: dict[str, Any] = {_function(name): function for name, function in HOST.items()}
    exec(compile(source, "<step_code>", "exec"), scope)  # noqa: S102 - of parsed expressions
    found: HostFunction = scope["host"]
    return found


def host_source(
    statements: Sequence[Statement], scalars: Sequence[Expression], inputs: Sequence[str]
) -> str:
    """The function's text, rendered from the parsed rule, of which no text of its author is left.

    Names of the rule language are lower-case words, so none hides a function of the table, which
    are upper-case here.
    """
    written: set[str] = set()
    given: dict[str, None] = {}
    for read, target in [
        *((names(s.value), s.target) for s in statements),
        *((names(value), "") for value in scalars),
        (iter(inputs), ""),
    ]:
        given |= dict.fromkeys(name for name in read if name not in written)
        written.add(target)
    lines = [f"{name} = GIVEN[{name!r}]" for name in given]
    lines += [f"{s.target} = {python(s.value)}" for s in statements]
    lines += [f"return [{', '.join(map(python, scalars))}], [{', '.join(inputs)}]"]
    return "\n    ".join(["def host(GIVEN):", *lines])


def python(expression: Expression) -> str:
    """Python text of an expression."""
    match expression:
        case Number(value):
            return repr(float(value))
        case Name(id):
            return id
        case Negate(operand):
            return f"(-{python(operand)})"
        case Binary(op, left, right) | Compare(op, left, right):
            if op in _OPERATORS:
                return f"({python(left)} {op} {python(right)})"
            return f"{_function(op)}({python(left)}, {python(right)})"
        case Call(function, args):
            return f"{_function(function)}({', '.join(map(python, args))})"


_WORDS = {"/": "DIVIDE", "**": "POWER"}


def _function(name: str) -> str:
    return _WORDS.get(name, name.upper())
