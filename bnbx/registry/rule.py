"""The rule language: a closed subset of Python in which update rules are written.

A text is a list of `name = expression` lines. Expressions are numbers, names, `+ - * /`, unary
minus, `sqrt abs sign min max where`, and comparisons as the first argument of `where`; host
sections (run once a step, in float64) also have `**`, `exp` and `log`. There are no loops, no
`if`, no attributes, no subscripts. The text is parsed with `ast`, never executed, and turned into
the small immutable tree below; every target is rendered from that tree, so nothing outside the
language can reach a compiler.

`exp`, `log` and `**` stay on the host because no two math libraries round them alike, and element
code promises the same bits on every target.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from bnbx.errors import RuleError
from bnbx.registry.names import nearest

Section = Literal[
    "step_code",
    "element_code",
    "tensor_code",
    "apply_code",
    "eval_code",
    "train_code",
    "read_code",
    "constraint",
]
HOST_SECTIONS = ("step_code", "constraint")

FUNCTIONS = {"sqrt": 1, "abs": 1, "sign": 1, "exp": 1, "log": 1, "min": 2, "max": 2, "where": 3}
HOST_FUNCTIONS = frozenset({"exp", "log"})
OPERATORS: dict[type[ast.operator], str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.Pow: "**",
}
COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
}
# Words that are fine in Python but mean something to C++, CUDA or the loops around a rule. A test
# looks through the rendered kernels for what is missing here.
RESERVED = frozenset(
    """alignas alignof and_eq asm auto bitand bitor bool case catch char compl const constexpr
    default delete do double dynamic_cast else enum explicit export extern false float for friend
    goto if inline int long mutable namespace new not not_eq operator or or_eq private protected
    public register reinterpret_cast return short signed sizeof static struct switch template this
    throw true try typedef typeid typename union unsigned using virtual void volatile wchar_t while
    xor xor_eq half char8_t char16_t char32_t concept consteval constinit const_cast co_await
    co_return co_yield decltype noexcept nullptr requires static_assert static_cast thread_local
    to_float from_float larger_magnitude noise round_stochastically load_parameter store_parameter
    place_of calm_zone half_step bits_of u32 root64 make_scale""".split()
)
NO_IF = "there is no 'if' in the rule language; write where(condition, a, b)"
NO_LOOP = "there are no loops in the rule language; its lines say what is done once"
NO_LOGIC = "there is no 'and', 'or' or 'not'; write one where(...) inside of another"
CONDITION = "a condition is one comparison, or a name, which is true where it is not zero"
NOT_IN = "not in the rule language"
LINES = "only lines of the form 'name = expression' are allowed"
# What to write instead, by what Python calls it.
INSTEAD: dict[type[ast.AST], str] = {
    ast.If: NO_IF,
    ast.IfExp: NO_IF,
    ast.For: NO_LOOP,
    ast.While: NO_LOOP,
    ast.BoolOp: NO_LOGIC,
    ast.Not: NO_LOGIC,
    ast.FloorDiv: "there is no '//'; write '/', which does not round to whole numbers",
}
BLOCKS = {"if": NO_IF, "for": NO_LOOP, "while": NO_LOOP}
_BLOCK = re.compile(r"after '(\w+)' statement on line (\d+)")
NAME = re.compile(r"[a-z][a-z0-9_]*(?<!_)\Z")
FLOAT32_MAX = 3.4028234663852886e38
MAX_TEXT = 8_000
MAX_DEPTH = 40


@dataclass(frozen=True)
class Number:
    """A literal."""

    value: float


@dataclass(frozen=True)
class Name:
    """A variable, state, hyperparameter or earlier result."""

    id: str


@dataclass(frozen=True)
class Negate:
    """Unary minus."""

    operand: Expression


@dataclass(frozen=True)
class Binary:
    """`left op right`, op one of + - * / and, on the host, **."""

    op: str
    left: Expression
    right: Expression


@dataclass(frozen=True)
class Compare:
    """`left op right`, op one of < <= > >= == !=; a condition."""

    op: str
    left: Expression
    right: Expression


@dataclass(frozen=True)
class Call:
    """One of FUNCTIONS applied to its arguments."""

    function: str
    args: tuple[Expression, ...]


Expression = Number | Name | Negate | Binary | Compare | Call


@dataclass(frozen=True)
class Statement:
    """`target = value`, with the source line it came from."""

    target: str
    value: Expression
    text: str


@dataclass(frozen=True)
class Code:
    """A parsed section: its statements, and the names it reads before (or without) writing them."""

    statements: tuple[Statement, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]


def names(expression: Expression) -> Iterator[str]:
    """Yield the names that `expression` reads, left to right, repeats included."""
    match expression:
        case Name(id):
            yield id
        case Negate(operand):
            yield from names(operand)
        case Binary(_, left, right) | Compare(_, left, right):
            yield from names(left)
            yield from names(right)
        case Call(_, args):
            for arg in args:
                yield from names(arg)


def check_name(name: str, what: str) -> str:
    """Return `name` if it can name a state, hyperparameter or variable; else raise RuleError."""
    if not NAME.match(name):
        raise RuleError(
            f"{what} {name!r}: a name is lower-case ASCII letters, digits and underscores, "
            "begins with a letter and does not end with an underscore"
        )
    if name in FUNCTIONS or name in RESERVED or name.startswith("rule_"):
        raise RuleError(f"{what} {name!r} is a reserved word; choose another name")
    return name


@lru_cache(maxsize=1024)
def parse(text: str, section: Section) -> Code:
    """Parse the lines of a section.

    Raises:
        RuleError: naming the line and the construct that is not in the language.
    """
    lines = [line.strip() for line in text.strip().splitlines()]
    reader = _Reader(lines, section)
    statements = tuple(reader.statement(node) for node in _body(lines, section))
    writes: dict[str, None] = {}
    reads: dict[str, None] = {}
    for statement in statements:
        reads.update(dict.fromkeys(n for n in names(statement.value) if n not in writes))
        writes[statement.target] = None
    return Code(statements, tuple(reads), tuple(writes))


@lru_cache(maxsize=256)
def parse_condition(text: str) -> Expression:
    """Parse a single host expression, such as a constraint between hyperparameters."""
    lines = text.strip().splitlines()
    body = _body(lines, "constraint")
    if len(body) != 1 or not isinstance(body[0], ast.Expr):
        raise RuleError(f"constraint {text!r}: expected one expression")
    reader = _Reader(lines, "constraint")
    node = body[0].value
    return reader.condition(node) if isinstance(node, ast.Compare) else reader.expression(node)


def _body(lines: list[str], section: Section) -> list[ast.stmt]:
    text = "\n".join(lines)
    if not all(line.partition("#")[0].isascii() for line in lines):
        # Python would read some of these characters as others that look like them.
        raise RuleError(
            f"{section}: {text[:60]!r} is not all ASCII (comments apart); a name is lower-case "
            "ASCII letters, digits and underscores"
        )
    if len(text) > MAX_TEXT:
        raise RuleError(f"{section}: {len(text)} characters; a rule has at most {MAX_TEXT}")
    try:
        return ast.parse(text).body
    except IndentationError as error:
        raise _block(error, lines, section) from None
    except SyntaxError as error:
        if error.lineno is None or not 0 < error.lineno <= len(lines):
            raise RuleError(f"{section}: {error.msg}") from None
        line = lines[error.lineno - 1]
        raise RuleError(f"{section} line {error.lineno}: {error.msg}: {line!r}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise RuleError(f"{section}: cannot be parsed: {error}") from None


def _block(error: IndentationError, lines: list[str], section: Section) -> RuleError:
    """What to say of an `if` or a loop over several lines, whose indents mean nothing here."""
    found = _BLOCK.search(error.msg)
    word, number = found.groups() if found else ("", (error.lineno or 2) - 1)
    line = lines[min(int(number), len(lines)) - 1]
    return RuleError(f"{section} line {number}: {line!r}: {BLOCKS.get(word, LINES)}")


def _instead(node: ast.expr) -> str:
    """Why an expression is refused: what to write instead, where that is known."""
    return INSTEAD.get(_kind(node), NOT_IN)


def _kind(node: ast.expr) -> type[ast.AST]:
    """What INSTEAD knows an expression by: its operator, if that is a kind of its own."""
    operator = type(getattr(node, "op", None))
    return operator if operator in (ast.Not, ast.FloorDiv) else type(node)


def _functions(name: str) -> str:
    """The function that is meant by a name of another library, or all that there are."""
    if name in FUNCTIONS:
        places = ", ".join("xyz"[: FUNCTIONS[name]])
        return f"; write {name}({places})"
    return f"{nearest(name, FUNCTIONS)}; there are {', '.join(sorted(FUNCTIONS))}"


class _Reader:
    """Turns `ast` nodes into the tree above, refusing everything outside the language."""

    def __init__(self, lines: list[str], section: Section) -> None:
        self.lines = lines
        self.section: Section = section
        self.host = section in HOST_SECTIONS

    def statement(self, node: ast.stmt) -> Statement:
        match node:
            case ast.Assign(targets=[ast.Name(id=target)], value=value):
                check_name(target, f"{self._place(node)}: name")
                return Statement(target, self.expression(value), self._line(node))
        raise self._refuse(node, INSTEAD.get(type(node), LINES))

    def expression(self, node: ast.expr, depth: int = 0) -> Expression:
        if depth > MAX_DEPTH:
            raise self._refuse(
                node, f"expressions nest at most {MAX_DEPTH} deep; give a part a name"
            )
        match node:
            case ast.Name(id=name):
                check_name(name, f"{self._place(node)}: name")
                return Name(name)
            case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
                return self._number(node, value)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return Negate(self.expression(operand, depth + 1))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                return self._binary(node, OPERATORS[type(op)], left, right, depth + 1)
            case ast.Call(func=ast.Name(id=function), args=args, keywords=[]):
                return self._call(node, function, args, depth + 1)
            case ast.Compare():
                raise self._refuse(node, "a comparison may only be the first argument of 'where'")
            case ast.Call(func=ast.Attribute(attr=function)):  # torch.sign(m), m.sqrt()
                why = f"functions are called by name alone{_functions(function)}"
                raise self._refuse(node, why)
        raise self._refuse(node, _instead(node))

    def condition(self, node: ast.expr, depth: int = 0) -> Expression:
        match node:
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in COMPARISONS:
                return Compare(
                    COMPARISONS[type(op)],
                    self.expression(left, depth + 1),
                    self.expression(right, depth + 1),
                )
            case ast.Name():
                return self.expression(node, depth)
        raise self._refuse(node, INSTEAD.get(_kind(node), CONDITION))

    def _binary(
        self, node: ast.expr, op: str, left: ast.expr, right: ast.expr, depth: int
    ) -> Expression:
        if op == "**" and not self.host:
            raise self._refuse(node, "'**' belongs in step_code; write x * x, or compute it there")
        return Binary(op, self.expression(left, depth), self.expression(right, depth))

    def _call(self, node: ast.expr, function: str, args: list[ast.expr], depth: int) -> Expression:
        if function not in FUNCTIONS:
            raise self._refuse(node, f"unknown function {function!r}{_functions(function)}")
        if len(args) != FUNCTIONS[function]:
            raise self._refuse(
                node, f"{function} takes {FUNCTIONS[function]} arguments, {len(args)} given"
            )
        if function in HOST_FUNCTIONS and not self.host:
            raise self._refuse(
                node,
                f"{function!r} belongs in step_code: element code has the same bits on every "
                "target, and no two math libraries round it alike",
            )
        if function == "where":
            condition, *branches = args
            tree = [self.condition(condition, depth)]
            return Call(function, (*tree, *(self.expression(arg, depth) for arg in branches)))
        return Call(function, tuple(self.expression(arg, depth) for arg in args))

    def _number(self, node: ast.expr, value: int | float) -> Number:
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if (not self.host and abs(number) > FLOAT32_MAX) or not math.isfinite(number):
            raise self._refuse(node, "too large a number for this section's precision")
        return Number(number)

    def _place(self, node: ast.stmt | ast.expr) -> str:
        return f"{self.section} line {node.lineno}"

    def _line(self, node: ast.stmt | ast.expr) -> str:
        return self.lines[node.lineno - 1]

    def _refuse(self, node: ast.stmt | ast.expr, why: str) -> RuleError:
        part = ast.get_source_segment("\n".join(self.lines), node) or ast.dump(node)
        part = part if len(part) <= 60 else part[:57] + "..."
        return RuleError(f"{self._place(node)}: {part!r}: {why}\n    {self._line(node)}")
