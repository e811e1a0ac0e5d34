"""The optimizer spec: states, hyperparameters and rule text.

From it come the C++ and CUDA kernels, the torch reference, the constructor's signature, the
checks of its arguments and the layout of its state. All checks that need no values are made here,
when the spec is made.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import AfterValidator, Field, PlainSerializer, model_validator
from typing_extensions import Self

from bnbx.errors import OptionError, RuleError
from bnbx.registry.names import nearest
from bnbx.registry.rule import (
    Call,
    Code,
    Name,
    Statement,
    check_name,
    names,
    parse,
    parse_condition,
)
from bnbx.registry.spec import Frozen, Spec

PARAMETER, GRADIENT, STEP = "p", "g", "step"
MAX_SWITCHES = 6
# What users pass beside a rule's hyperparameters.
ENGINE_ARGUMENTS = ("params", "rule", "paged", "bits", "state_types", "min_8bit_size")


class Hyper(Frozen):
    """A hyperparameter: its default (None: required) and the values it may take.

    A flag is compiled into the kernel, as is the truth of any hyperparameter that the rule uses
    bare as a condition; all other values reach the kernel at launch.
    """

    default: float | bool | None
    minimum: float | None = None
    below: float | None = None
    positive: bool = False
    flag: bool = False

    def check(self, name: str, value: Any) -> float | bool:
        """Return `value` as a number this hyperparameter can take.

        Raises:
            OptionError: saying what it can take.
        """
        if self.flag:
            if not isinstance(value, bool):
                raise OptionError(f"{name}={value!r}: expected True or False")
            return value
        try:
            number = math.nan if isinstance(value, str) else float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise OptionError(f"{name}={value!r}: expected a number {self.range}") from None
        inside = (
            math.isfinite(number)
            and not (self.minimum is not None and number < self.minimum)
            and not (self.below is not None and number >= self.below)
            and not (self.positive and number <= 0)
        )
        if isinstance(value, bool) or not inside:
            raise OptionError(f"{name}={value!r}: expected a number {self.range}")
        return number

    @property
    def range(self) -> str:
        """The allowed values in words."""
        if self.flag:
            return "True or False"
        parts = [f">= {self.minimum:g}"] if self.minimum is not None else []
        parts += ["> 0"] if self.positive else []
        parts += [f"< {self.below:g}"] if self.below is not None else []
        return " and ".join(parts) or "(finite)"


def rate(default: float | None = None) -> Hyper:
    """A number >= 0, such as a learning rate or a weight decay."""
    return Hyper(default=default, minimum=0.0)


def fraction(default: float | None = None) -> Hyper:
    """A number in [0, 1), such as a decay rate."""
    return Hyper(default=default, minimum=0.0, below=1.0)


def positive(default: float | None = None) -> Hyper:
    """A number > 0."""
    return Hyper(default=default, positive=True)


def number(default: float | None = None) -> Hyper:
    """Any finite number."""
    return Hyper(default=default)


def flag(default: bool) -> Hyper:
    """True or False, compiled into the kernel."""
    return Hyper(default=default, flag=True)


class State(Frozen):
    """A tensor kept per parameter, of the parameter's shape, zero before the first step.

    Attributes:
        name: as the rule text uses it, and the key in `optimizer.state[p]`.
        signed: False if it never goes below zero; an unsigned quant table then has twice the
            resolution.
        when: name of a hyperparameter; the state exists only while that is not zero.
    """

    name: str
    signed: bool = True
    when: str | None = None


class Constraint(Frozen):
    """A condition between hyperparameters, in the rule language, that must hold."""

    condition: str
    message: str


HyperTable = Annotated[
    Mapping[str, Hyper],
    AfterValidator(lambda table: MappingProxyType(dict(table))),
    PlainSerializer(dict),
]
PackTable = Annotated[
    Mapping[str, tuple[str, ...]],
    AfterValidator(lambda table: MappingProxyType(dict(table))),
    PlainSerializer(dict),
]


class Optimizer(Spec):
    """An update rule.

    `step_code` runs on the host in float64 once a step and sees the hyperparameters and `step`
    (1 on the first). `element_code` runs on the device in float32 for each element and sees
    also `p` (the parameter), `g` (its gradient), the states, and the results of `step_code`; it
    must write `p` and every state. Scalar parts of element code (`1 - beta1`, `lr / c1`) are
    computed in float64 on the host too, rounded once. `packs` joins hyperparameters into tuples
    that users pass and groups store under one name, such as betas.
    """

    states: tuple[State, ...] = ()
    hyper: HyperTable
    packs: PackTable = Field(default_factory=dict, validate_default=True)
    constraints: tuple[Constraint, ...] = ()
    step_code: str = ""
    element_code: str

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_spec(self)
        return self

    @cached_property
    def step(self) -> Code:
        """Parsed `step_code`."""
        return parse(self.step_code, "step_code")

    @cached_property
    def element(self) -> Code:
        """Parsed `element_code`."""
        return parse(self.element_code, "element_code")

    @cached_property
    def switches(self) -> tuple[str, ...]:
        """Hyperparameters whose truth is compiled in: flags, and conditions of states."""
        bare = {
            name
            for statement in (*self.element.statements, *self.step.statements)
            for name in _bare_conditions(statement)
            if name in self.hyper
        }
        bare |= {state.when for state in self.states if state.when}
        bare |= {name for name, hyper in self.hyper.items() if hyper.flag}
        return tuple(name for name in self.hyper if name in bare)

    @cached_property
    def arguments(self) -> tuple[str, ...]:
        """What users pass: hyperparameters in order, each pack in the place of its first."""
        packed = {name: pack for pack, members in self.packs.items() for name in members}
        return tuple(dict.fromkeys(packed.get(name, name) for name in self.hyper))

    def default(self, argument: str) -> Any:
        """The default of an argument, None if it is required."""
        if argument not in self.packs:
            return self.hyper[argument].default
        values = tuple(self.hyper[name].default for name in self.packs[argument])
        return None if None in values else values

    def active_states(self, switches: Mapping[str, bool]) -> tuple[State, ...]:
        """The states that exist when the switches have these truth values."""
        return tuple(s for s in self.states if s.when is None or switches[s.when])


def _bare_conditions(statement: Statement) -> list[str]:
    found: list[str] = []

    def visit(node: Any) -> None:
        if isinstance(node, Call):
            if node.function == "where" and isinstance(node.args[0], Name):
                found.append(node.args[0].id)
            for arg in node.args:
                visit(arg)
        for attribute in ("operand", "left", "right"):
            if hasattr(node, attribute):
                visit(getattr(node, attribute))

    visit(statement.value)
    return found


def check_spec(spec: Optimizer) -> None:
    """Raise RuleError or ValueError if the parts of `spec` contradict each other."""
    _check_names(spec)
    host = {*spec.hyper, STEP}
    _check_reads("step_code", spec.step, host)
    states = {state.name for state in spec.states}
    known = {*host, PARAMETER, GRADIENT, *states, *spec.step.writes}
    _check_reads("element_code", spec.element, known)
    clash = set(spec.step.writes) & {*host, PARAMETER, GRADIENT, *states}
    clash |= set(spec.element.writes) & {*host, *spec.step.writes}
    if clash:
        raise RuleError(f"{_list(clash)}: a rule may not assign to its inputs")
    unwritten = {PARAMETER, *states} - set(spec.element.writes)
    if unwritten:
        raise RuleError(f"element_code never writes {_list(unwritten)}")
    _check_everything_read(spec)
    _check_switches(spec)


def _check_names(spec: Optimizer) -> None:
    seen: set[str] = {PARAMETER, GRADIENT, STEP}
    everything = [state.name for state in spec.states] + list(spec.hyper)
    for state in spec.states:
        if state.name.endswith(("_absmax", "_type")):
            raise ValueError(f"state {state.name!r}: the endings _absmax and _type are taken")
    for name in everything:
        check_name(name, "name")
        if name in seen:
            raise ValueError(f"the name {name!r} is used twice (p, g and step are taken)")
        seen.add(name)
    for name in spec.packs:
        check_name(name, "pack")
        if name in seen:
            raise ValueError(f"pack {name!r} has the name of something else")
    if taken := {*spec.hyper, *spec.packs} & {*ENGINE_ARGUMENTS}:
        raise ValueError(f"{_list(taken)}: the engine has an argument of this name")
    packed = [name for members in spec.packs.values() for name in members]
    strangers = [name for name in packed if name not in spec.hyper]
    strangers += [s.when for s in spec.states if s.when and s.when not in spec.hyper]
    if strangers:
        raise ValueError(
            f"{_list(strangers)}: no such hyperparameter{nearest(strangers[0], spec.hyper)}"
        )
    if len(set(packed)) != len(packed):
        raise ValueError("a hyperparameter is in two packs")
    for name, hyper in spec.hyper.items():
        if hyper.default is not None:
            hyper.check(f"default of {name}", hyper.default)


def _check_reads(section: str, code: Code, known: set[str]) -> None:
    written: set[str] = set()
    for statement in code.statements:
        for name in names(statement.value):
            if name not in known and name not in written:
                options = sorted(known | written)
                raise RuleError(
                    f"{section}: {name!r} is not known here{nearest(name, options)}; "
                    f"known: {', '.join(options)}\n    {statement.text}"
                )
        written.add(statement.target)


def _check_everything_read(spec: Optimizer) -> None:
    read = {
        name for s in (*spec.step.statements, *spec.element.statements) for name in names(s.value)
    }
    read |= {s.when for s in spec.states if s.when}
    for constraint in spec.constraints:
        condition = set(names(parse_condition(constraint.condition)))
        if strangers := condition - set(spec.hyper):
            raise ValueError(f"constraint reads {_list(strangers)}: no such hyperparameter")
    unread = {*spec.hyper, *spec.step.writes, GRADIENT} - read
    if unread:
        raise RuleError(f"{_list(unread)}: declared or computed, but never read")


def _check_switches(spec: Optimizer) -> None:
    """With a state switched off, its name is a plain variable: it must be written before use."""
    if len(spec.switches) > MAX_SWITCHES:
        raise ValueError(f"{len(spec.switches)} switches; at most {MAX_SWITCHES}: {spec.switches}")
    for truth in itertools.product((False, True), repeat=len(spec.switches)):
        switches = dict(zip(spec.switches, truth, strict=True))
        absent = {s.name for s in spec.states} - {s.name for s in spec.active_states(switches)}
        for statement in spec.element.statements:
            early = absent & set(names(select(statement.value, switches)))
            if early:
                off = ", ".join(name for name, on in switches.items() if not on)
                raise RuleError(
                    f"state {_list(early)} does not exist when {off} is off, but is read\n"
                    f"    {statement.text}"
                )
            absent.discard(statement.target)


def select(expression: Any, switches: Mapping[str, bool]) -> Any:
    """Replace each `where` on a switch by the branch that is taken."""
    if isinstance(expression, Call):
        condition = expression.args[0]
        if (
            expression.function == "where"
            and isinstance(condition, Name)
            and condition.id in switches
        ):
            return select(expression.args[1 if switches[condition.id] else 2], switches)
        return Call(expression.function, tuple(select(arg, switches) for arg in expression.args))
    if hasattr(expression, "operand"):
        return type(expression)(select(expression.operand, switches))
    if hasattr(expression, "left"):
        left, right = select(expression.left, switches), select(expression.right, switches)
        return type(expression)(expression.op, left, right)
    return expression


def _list(items: Any) -> str:
    return ", ".join(repr(item) for item in sorted(items))
