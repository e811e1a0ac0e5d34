"""Turns element code into what a kernel runs: vector statements, and scalars made on the host.

Whatever depends only on hyperparameters and the step (`1 - beta1`, `lr / c1`) is the same for
every element, so it is computed once in float64 on the host and rounded to float32. Scalar
factors of a product or quotient are gathered into one: `lr * (m / c1) / d` becomes
`((lr / c1) * m) / d`, one multiplication and one division. Every target runs the lowered
statements, the torch reference included, so all of them round alike; the tests hold them against
the text as it was written, in float64.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass

from bnbx.registry.optimizer import PARAMETER, Optimizer, select
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

ONE = Number(1.0)
_MAX_NAME = 40


@dataclass(frozen=True)
class Lowered:
    """What a kernel runs for each element, and the host expressions it receives as scalars."""

    statements: tuple[Statement, ...]
    scalars: Mapping[str, Expression]


@dataclass(frozen=True)
class _Split:
    """A value as `scale * vector`; None stands for 1 in `scale`, for "no vector" in `vector`."""

    scale: Expression | None
    vector: Expression | None


def lower(spec: Optimizer, switches: Mapping[str, bool]) -> Lowered:
    """Lower the element code of `spec` with its switches fixed."""
    return _Lowering(spec, switches).run()


class _Lowering:
    def __init__(self, spec: Optimizer, switches: Mapping[str, bool]) -> None:
        self.spec = spec
        self.switches = switches
        self.stored = {PARAMETER, *(s.name for s in spec.active_states(switches))}
        inputs = (*spec.hyper, "step", *spec.step.writes)
        self.known: dict[str, Expression] = {name: Name(name) for name in inputs}
        self.scalars: dict[str, Expression] = {}
        self.scalar_names: dict[Expression, str] = {}

    def run(self) -> Lowered:
        statements = []
        for statement in self.spec.element.statements:
            split = self.split(select(statement.value, self.switches))
            if split.vector is None and statement.target not in self.stored:
                self.known[statement.target] = split.scale or ONE
                continue
            self.known.pop(statement.target, None)
            value = self.join(split)
            statements.append(Statement(statement.target, value, statement.text))
        return Lowered(tuple(statements), dict(self.scalars))

    def split(self, node: Expression) -> _Split:
        match node:
            case Number():
                return _Split(node, None)
            case Name(id):
                scalar = self.known.get(id)
                return _Split(scalar, None) if scalar is not None else _Split(None, node)
            case Negate(operand):
                return self.negate(self.split(operand))
            case Binary("*" | "/" as op, left, right):
                return self.scale(op, self.split(left), self.split(right))
            case Binary(op, left, right):
                return self.combine(lambda a, b: Binary(op, a, b), left, right)
            case Compare(op, left, right):
                return self.combine(lambda a, b: Compare(op, a, b), left, right)
            case Call(function, args):
                return self.call(function, args)

    def negate(self, part: _Split) -> _Split:
        if part.vector is not None and part.scale is None:
            return _Split(None, Negate(part.vector))
        return _Split(Negate(part.scale or ONE), part.vector)

    def scale(self, op: str, left: _Split, right: _Split) -> _Split:
        if op == "*":
            vectors = [v for v in (left.vector, right.vector) if v is not None]
            vector = Binary("*", *vectors) if len(vectors) == 2 else next(iter(vectors), None)
            return _Split(_product(left.scale, right.scale), vector)
        scale = _quotient(left.scale, right.scale)
        if right.vector is None:
            return _Split(scale, left.vector)
        return _Split(scale, Binary("/", left.vector or ONE, right.vector))

    def combine(self, make: type | object, left: Expression, right: Expression) -> _Split:
        parts = [self.split(left), self.split(right)]
        if all(part.vector is None for part in parts):
            return _Split(make(*(part.scale or ONE for part in parts)), None)  # type: ignore[operator]
        return _Split(None, make(*(self.join(part) for part in parts)))  # type: ignore[operator]

    def call(self, function: str, args: tuple[Expression, ...]) -> _Split:
        parts = [self.split(arg) for arg in args]
        if function == "where" and not isinstance(args[0], Compare):
            parts[0] = self.split(Compare("!=", args[0], Number(0.0)))
        if all(part.vector is None for part in parts):
            return _Split(Call(function, tuple(part.scale or ONE for part in parts)), None)
        if function == "where" and parts[0].vector is None:
            truth = Call("where", (parts[0].scale or ONE, ONE, Number(0.0)))
            condition: Expression = Compare("!=", self.reference(truth), Number(0.0))
        else:
            condition = self.join(parts[0])
        return _Split(None, Call(function, (condition, *(self.join(p) for p in parts[1:]))))

    def join(self, part: _Split) -> Expression:
        """One vector expression for a split value; makes scalars as needed."""
        if part.vector is None:
            return self.reference(part.scale or ONE)
        if part.scale is None or part.scale == ONE:
            return part.vector
        return _multiply(self.reference(part.scale), part.vector)

    def reference(self, host: Expression) -> Expression:
        """How the kernel reads a host expression: a literal, or a scalar by name."""
        if isinstance(host, Number):
            return host
        if isinstance(host, Negate) and isinstance(host.operand, Number):
            return Number(-host.operand.value)
        if host not in self.scalar_names:
            name = _scalar_name(host, taken=self.scalars)
            self.scalar_names[host] = name
            self.scalars[name] = host
        return Name(self.scalar_names[host])


def _product(a: Expression | None, b: Expression | None) -> Expression | None:
    if a is None or b is None or ONE in (a, b):
        return b if a is None or a == ONE else a
    if isinstance(b, Binary) and b.op == "/" and b.left == ONE:
        return Binary("/", a, b.right)
    return Binary("*", a, b)


def _quotient(a: Expression | None, b: Expression | None) -> Expression | None:
    return a if b is None or b == ONE else Binary("/", a or ONE, b)


def _multiply(scale: Expression, vector: Expression) -> Expression:
    """`scale * vector`, with the scale on the leftmost factor of the numerator."""
    match vector:
        case Binary("*" | "/" as op, left, right):
            return Binary(op, _multiply(scale, left), right)
        case Number(1.0):
            return scale
    return Binary("*", scale, vector)


_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2, "**": 4}


def text(expression: Expression) -> str:
    """The expression as rule text, for comments and names."""
    return _text(expression, 0)


def _text(expression: Expression, around: int) -> str:
    match expression:
        case Number(value):
            return f"{value:g}" if float(f"{value:g}") == value else repr(value)
        case Name(id):
            return id
        case Negate(operand):
            return f"-{_text(operand, 3)}" if around < 3 else f"(-{_text(operand, 3)})"
        case Compare(op, left, right):
            return f"{text(left)} {op} {text(right)}"
        case Binary(op, left, right):
            own = _PRECEDENCE[op]
            near, far = (own, own - 1) if op == "**" else (own - 1, own)  # ** groups to the right
            inner = f"{_text(left, near)} {op} {_text(right, far)}"
            return f"({inner})" if own <= around else inner
        case Call(function, args):
            return f"{function}({', '.join(text(arg) for arg in args)})"


_WORDS = {"-": " minus ", "+": " plus ", "/": " over ", "*": " times ", ".": " point "}
_WORDS |= {"=": " equals ", "<": " below ", ">": " above ", "!": " not "}


def _scalar_name(host: Expression, taken: Mapping[str, Expression]) -> str:
    """A readable identifier. It ends in an underscore, so no rule can have written it itself."""
    if isinstance(host, Call) and host.function == "where" and host.args[1:] == (ONE, Number(0.0)):
        host = host.args[0]
    words = "".join(_WORDS.get(char, char) for char in text(host).replace("==", "="))
    name = re.sub(r"\W+", "_", words).strip("_").lower() + "_"
    name = f"k_{name}" if name[0].isdigit() else name
    if len(name) <= _MAX_NAME and name not in taken:
        return name
    numbered = (f"scalar_{n}_" for n in itertools.count())
    return next(name for name in numbered if name not in taken)
