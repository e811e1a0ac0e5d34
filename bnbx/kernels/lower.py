"""Turns rule text into what a kernel runs: vector statements, and scalars made once.

Whatever depends only on hyperparameters and the step (`1 - beta1`, `lr / c1`) is the same for
every element, so it is computed once in float64 on the host and rounded to float32. What depends
on norms too (`lr * trust`) is computed once a tensor, in float64 on the device. Scalar factors of
a product or quotient are gathered into one: `lr * (m / c1) / d` becomes `((lr / c1) * m) / d`,
one multiplication and one division. So is the factor of a name that is read once: of
`u = a * m / d` and `p = p - lr * u` the kernel makes `u = m / d` and one number, `lr * a`. A
product that something is added to is not rounded by itself: `beta1 * m + (1 - beta1) * g` becomes
`fma(beta1, m, (1 - beta1) * g)`, as processors have it in one instruction, and no compiler may
choose where. Every target runs the lowered statements, the torch reference included, so all of
them round alike; the tests hold them against the text as it was written, in float64.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bnbx.errors import RuleError
from bnbx.registry.checks import NORM, NUMEL, select
from bnbx.registry.optimizer import GRADIENT, PARAMETER, STEP, UPDATE, Optimizer
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

ONE = Number(1.0)
ZERO = Number(0.0)
_MAX_NAME = 40
MAX_NODES = 150
"""Of a scalar that others are made of: they are written out, each time they are read."""


@dataclass(frozen=True)
class Lowered:
    """What a kernel runs.

    Attributes:
        element: statements for each element, up to the new states.
        apply: statements for each element that may need scalars of the tensor.
        scalars: by name, host expressions that the kernel receives as float32.
        tensor: statements in float64, once a tensor, between the two.
        tensor_scalars: by name, expressions in float64, once a tensor, rounded to float32.
        inputs: the hyperparameters and results of step_code that these read, as float64.
        norms: the names of which they read the norm.
        factors: of names whose value is without it, the factor that is theirs where they are read.
    """

    element: tuple[Statement, ...]
    apply: tuple[Statement, ...]
    scalars: Mapping[str, Expression]
    tensor: tuple[Statement, ...] = ()
    tensor_scalars: Mapping[str, Expression] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    factors: Mapping[str, Expression] = field(default_factory=dict)

    @property
    def statements(self) -> tuple[Statement, ...]:
        """All statements for each element, in order."""
        return self.element + self.apply


@dataclass(frozen=True)
class _Split:
    """A value as `scale * vector`; None stands for 1 in `scale`, for "no vector" in `vector`."""

    scale: Expression | None
    vector: Expression | None


def lower(spec: Optimizer, switches: Mapping[str, bool], *, skip_zeros: bool = False) -> Lowered:
    """Lower the sections of `spec` with its switches fixed.

    With `skip_zeros`, elements whose gradient is zero keep their parameter and states.
    """
    return _Lowering(spec, switches).run(skip_zeros)


class _Lowering:
    def __init__(self, spec: Optimizer, switches: Mapping[str, bool]) -> None:
        self.spec = spec
        self.switches = switches
        self.states = [state.name for state in spec.active_states(switches)]
        inputs = (*spec.hyper, STEP, *spec.step.writes)
        self.known: dict[str, Expression] = {name: Name(name) for name in inputs}
        self.of_tensor: set[str] = {NUMEL}
        self.scalars: dict[str, Expression] = {}
        self.tensor_scalars: dict[str, Expression] = {}
        self.scalar_names: dict[Expression, str] = {}
        self.factors: dict[str, Expression] = {}
        self.once: set[str] = set()

    def run(self, skip_zeros: bool) -> Lowered:
        applied = _live(map(self.selected, self.spec.apply.statements), {PARAMETER})
        self.once = _used_once([*map(self.selected, self.spec.element.statements), *applied])
        read_there = {name for statement in applied for name in names(statement.value)}
        tensor = _live(map(self.selected, self.spec.tensor.statements), read_there)
        norms = {n for s in tensor for n in names(s.value) if n.startswith(NORM)}
        kept = {PARAMETER, *self.states, *(n.removeprefix(NORM) for n in norms)}
        kept |= {UPDATE} if self.spec.clips_itself else set()  # whose norm update_norm tells
        element = self.vectors(self.spec.element.statements, kept)
        per_tensor = self.tensor_statements(tensor, norms)
        apply = self.vectors(applied, {PARAMETER})
        if skip_zeros:
            element, apply = self.skipping(element, apply)
        read = [s.value for s in per_tensor] + list(self.tensor_scalars.values())
        found = dict.fromkeys(n for value in read for n in names(value))
        return Lowered(
            element=tuple(element),
            apply=tuple(apply),
            scalars=dict(self.scalars),
            tensor=tuple(per_tensor),
            tensor_scalars=dict(self.tensor_scalars),
            inputs=tuple(n for n in found if n not in self.of_tensor),
            norms=tuple(sorted(n.removeprefix(NORM) for n in norms)),
            factors=dict(self.factors),
        )

    def selected(self, statement: Statement) -> Statement:
        value = select(statement.value, self.switches)
        return Statement(statement.target, value, statement.text)

    def vectors(self, statements: Sequence[Statement], kept: set[str]) -> list[Statement]:
        """Statements for each element; values that are the same for all of them become known."""
        found = []
        for statement in map(self.selected, statements):
            split = self.split(statement.value)
            if split.vector is None and statement.target not in kept:
                self.know(statement, split.scale or ONE)
                continue
            self.known.pop(statement.target, None)
            found.append(self.vector(statement, split, kept))
        return found

    def know(self, statement: Statement, value: Expression) -> None:
        """From here on, the statement's name is this host expression."""
        if not _is_small(value):
            raise RuleError(
                f"{statement.text!r} is the same for all elements, and more than {MAX_NODES} "
                "names, numbers and operations when what it reads is written out; compute it in "
                "step_code"
            )
        self.known[statement.target] = value

    def vector(self, statement: Statement, split: _Split, kept: set[str]) -> Statement:
        """The statement with its value. A scalar factor may wait for the one that reads it.

        Not that of a product: it may be what keeps `(a * g) * (a * g)` within the range of float32.
        """
        name = statement.target
        waits = name in self.once - kept and split.vector and not _is_product(split.vector)
        if waits and split.scale and _is_small(split.scale):
            self.factors[name] = split.scale
            split = _Split(None, split.vector)
        return Statement(name, fused(self.join(split)), statement.text)

    def tensor_statements(
        self, statements: Sequence[Statement], norms: set[str]
    ) -> list[Statement]:
        """Statements once a tensor; what needs neither norms nor numel is the host's."""
        self.of_tensor |= norms
        self.known |= {name: Name(name) for name in (*norms, NUMEL)}
        found = []
        for statement in statements:
            value = self.split(statement.value).scale or ONE
            if self.is_of_tensor(value):
                self.of_tensor.add(statement.target)
                found.append(Statement(statement.target, value, statement.text))
                value = Name(statement.target)
            self.know(statement, value)
        return found

    def is_of_tensor(self, value: Expression) -> bool:
        return any(name in self.of_tensor for name in names(value))

    def skipping(
        self, element: list[Statement], apply: list[Statement]
    ) -> tuple[list[Statement], list[Statement]]:
        """The statements, with the old values kept where the gradient is zero."""
        text = "skip_zeros: what has no gradient stays as it is"
        zero = Compare("==", Name(_before(GRADIENT)), ZERO)
        saved = [
            Statement(_before(name), Name(name), text)
            for name in (GRADIENT, PARAMETER, *self.states)
        ]

        def restored(name: str) -> Statement:
            return Statement(name, Call("where", (zero, Name(_before(name)), Name(name))), text)

        element = [*saved, *element, *map(restored, self.states)]
        (apply or element).append(restored(PARAMETER))
        return element, apply

    def split(self, node: Expression) -> _Split:
        match node:
            case Number():
                return _Split(node, None)
            case Name(id):
                scalar = self.known.get(id)
                return _Split(scalar or self.factors.get(id), None if scalar else node)
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
            parts[0] = self.split(Compare("!=", args[0], ZERO))
        if all(part.vector is None for part in parts):
            return _Split(Call(function, tuple(part.scale or ONE for part in parts)), None)
        if function == "where" and parts[0].vector is None:
            truth = Call("where", (parts[0].scale or ONE, ONE, ZERO))
            condition: Expression = Compare("!=", self.reference(truth), ZERO)
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
            name = _scalar_name(host, taken=set(self.scalar_names.values()))
            self.scalar_names[host] = name
            (self.tensor_scalars if self.is_of_tensor(host) else self.scalars)[name] = host
        return Name(self.scalar_names[host])


def fused(value: Expression) -> Expression:
    """The value with what is added to a product, or taken from it, in calls that round once.

    fma(a, b, c) is a * b + c, fms(a, b, c) a * b - c, fnma(a, b, c) c - a * b. Of two products,
    the first is the one that is not rounded.
    """
    match value:
        case Binary("+" | "-" as op, Binary("*", a, b), c):
            return Call("fma" if op == "+" else "fms", (fused(a), fused(b), fused(c)))
        case Binary("+" | "-" as op, c, Binary("*", a, b)):
            return Call("fma" if op == "+" else "fnma", (fused(a), fused(b), fused(c)))
        case Binary(op, left, right):
            return Binary(op, fused(left), fused(right))
        case Compare(op, left, right):
            return Compare(op, fused(left), fused(right))
        case Negate(operand):
            return Negate(fused(operand))
        case Call(function, args):
            return Call(function, tuple(map(fused, args)))
    return value


def _before(name: str) -> str:
    """What the old value of `name` is called; no rule's name ends in an underscore."""
    return f"{name}_before_"


def _live(statements: Iterable[Statement], read: Iterable[str]) -> list[Statement]:
    """The statements without which names that are read afterwards would be others."""
    needed, found = set(read), []
    for statement in reversed([*statements]):
        if statement.target in needed:
            needed.remove(statement.target)
            needed |= set(names(statement.value))
            found.append(statement)
    return found[::-1]


def _used_once(statements: Sequence[Statement]) -> set[str]:
    """Names that one statement writes and one reads."""
    writes = Counter(statement.target for statement in statements)
    reads = Counter(name for statement in statements for name in names(statement.value))
    return {name for name, count in writes.items() if count == reads[name] == 1}


def _is_product(vector: Expression) -> bool:
    """Whether two vectors are multiplied, on top or in the numerator of quotients."""
    while isinstance(vector, Binary) and vector.op == "/":
        vector = vector.left
    return isinstance(vector, Binary) and vector.op == "*"


def _is_small(value: Expression) -> bool:
    """Whether it has at most MAX_NODES nodes, shared parts as often as they occur."""
    left: list[Any] = [value]
    for _ in range(MAX_NODES):
        if not left:
            return True
        node = left.pop()
        for part in ("operand", "left", "right"):
            left += [getattr(node, part)] if hasattr(node, part) else []
        left += getattr(node, "args", ())
    return not left


def _product(a: Expression | None, b: Expression | None) -> Expression | None:
    if a is None or b is None or ONE in (a, b):
        return b if a is None or a == ONE else a
    for one, other in ((b, a), (a, b)):
        if isinstance(one, Binary) and one.op == "/" and one.left == ONE:
            return Binary("/", other, one.right)
    return Binary("*", a, b)


def _quotient(a: Expression | None, b: Expression | None) -> Expression | None:
    if isinstance(b, Binary) and b.op == "/" and b.left == ONE:
        return _product(a, b.right)
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


def _scalar_name(host: Expression, taken: set[str]) -> str:
    """A readable identifier. It ends in an underscore, so no rule can have written it itself."""
    if isinstance(host, Call) and host.function == "where" and host.args[1:] == (ONE, ZERO):
        host = host.args[0]
    words = "".join(_WORDS.get(char, char) for char in text(host).replace("==", "="))
    name = re.sub(r"\W+", "_", words).strip("_").lower() + "_"
    name = f"k_{name}" if name[0].isdigit() else name
    if len(name) <= _MAX_NAME and name not in taken:
        return name
    numbered = (f"scalar_{n}_" for n in itertools.count())
    return next(name for name in numbered if name not in taken)
