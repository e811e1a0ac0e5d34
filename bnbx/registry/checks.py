"""Finds every contradiction in an optimizer spec when the spec is made, and names it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from bnbx.errors import RuleError
from bnbx.registry.names import nearest
from bnbx.registry.options import ALIASES, CLIP, OPTIONS
from bnbx.registry.rule import Call, Code, Name, Statement, check_name, names, parse_condition

if TYPE_CHECKING:
    from bnbx.registry.optimizer import Optimizer

MAX_SWITCHES = 6
NORM = "norm_"
NUMEL = "numel"
INPUTS = ("p", "g", "step")
# What users pass beside a rule's hyperparameters. Max_unorm may be one of these.
ENGINE_ARGUMENTS = ({*OPTIONS, *ALIASES} - {CLIP}) | set(
    "params rule overrides page_dir args capturable foreach fused differentiable".split()
)
# Keys that the engine keeps beside a parameter's states.
ENGINE_STATES = frozenset("step residual gnorm_vec".split())


def bare_conditions(statement: Statement) -> list[str]:
    """The names that stand alone as the condition of a `where`."""
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


def check_spec(spec: Optimizer) -> None:
    """Raise RuleError or ValueError if the parts of `spec` contradict each other."""
    _check_names(spec)
    _check_states(spec)
    _check_sections(spec)
    _check_written(spec)
    _check_modes(spec)
    _check_everything_read(spec)
    _check_switches(spec)


def _check_names(spec: Optimizer) -> None:
    seen = {*INPUTS, NUMEL}
    for name in [*(state.name for state in spec.states), *spec.hyper]:
        check_name(name, "name")
        if name in seen:
            raise ValueError(
                f"the name {name!r} is used twice ({', '.join(sorted(seen))} are taken)"
            )
        if name.startswith(NORM):
            raise ValueError(f"{name!r}: names that begin with {NORM!r} are those of norms")
        seen.add(name)
    for name in spec.packs:
        check_name(name, "pack")
        if name in seen:
            raise ValueError(f"pack {name!r} has the name of something else")
    if taken := {*spec.hyper, *spec.packs} & ENGINE_ARGUMENTS:
        raise ValueError(f"{_list(taken)}: the engine has an argument of this name")
    packed = [name for members in spec.packs.values() for name in members]
    _check_hypers(spec, packed)
    if len(set(packed)) != len(packed):
        raise ValueError("a hyperparameter is in two packs")
    for name, hyper in spec.hyper.items():
        if hyper.default is not None:
            hyper.check(f"default of {name}", hyper.default)


def _check_states(spec: Optimizer) -> None:
    for state in spec.states:
        if state.name.endswith(("_absmax", "_type")) or state.name in ENGINE_STATES:
            taken = ", ".join(sorted(ENGINE_STATES))
            raise ValueError(
                f"state {state.name!r}: the endings _absmax and _type are taken, and {taken}"
            )
        _check_named(spec, state.name, "when", state.when, "that it exists with")
        if state.initial != "p":
            words = "whose value it begins with (or 'p'; without it, zero)"
            _check_named(spec, state.name, "initial", state.initial, words)
    if any(s.initial == "p" and s.quantized for s in spec.states):
        raise ValueError("a state that begins as the parameter has to be quantized=False")


def _check_named(spec: Optimizer, state: str, field: str, name: str | None, words: str) -> None:
    if name is not None and name not in spec.hyper:
        raise ValueError(
            f"state {state!r}: {field}={name!r} is no hyperparameter{nearest(name, spec.hyper)}; "
            f"expected the name of one {words}; there are {', '.join(spec.hyper) or '(none)'}"
        )


def _check_hypers(spec: Optimizer, named: Iterable[str]) -> None:
    strangers = [name for name in named if name not in spec.hyper]
    if strangers:
        raise ValueError(
            f"{_list(strangers)}: no such hyperparameter{nearest(strangers[0], spec.hyper)}"
        )


def _check_sections(spec: Optimizer) -> None:
    """Every name that is read is known, and no section assigns to its inputs."""
    host = {*spec.hyper, "step"}
    _check_reads("step_code", spec.step, host)
    states = {state.name for state in spec.states}
    inputs = {*host, "p", "g", *states}
    known = inputs | {*spec.step.writes}
    _check_reads("element_code", spec.element, known)
    values = {"p", "g", *states, *spec.element.writes}
    scalars = {*host, *spec.step.writes, NUMEL}
    _check_reads("tensor_code", spec.tensor, scalars | {NORM + name for name in values})
    _check_reads("apply_code", spec.apply, known | {*spec.element.writes, *spec.tensor.writes})
    clash = set(spec.step.writes) & inputs
    clash |= set(spec.element.writes) & {*host, *spec.step.writes}
    clash |= set(spec.tensor.writes) & (values | scalars)
    clash |= set(spec.apply.writes) & (scalars | states | {*spec.tensor.writes})
    clash |= {
        name
        for code in spec.sections
        for name in code.writes
        if name.startswith(NORM) or name == NUMEL
    }
    if clash:
        raise RuleError(f"{_list(clash)}: a rule may not assign to its inputs")


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


def _check_written(spec: Optimizer) -> None:
    last = "apply_code" if spec.apply.statements else "element_code"
    unwritten = {state.name for state in spec.states} - set(spec.element.writes)
    if last == "element_code":
        unwritten |= {"p"} - set(spec.element.writes)
    elif "p" not in spec.apply.writes:
        raise RuleError("apply_code never writes 'p'")
    if unwritten:
        raise RuleError(f"element_code never writes {_list(unwritten)}")
    if last == "apply_code" and "p" in spec.element.writes:
        raise RuleError("element_code writes 'p', which apply_code has to write")
    if spec.tensor.statements and last == "element_code":
        raise RuleError("tensor_code without apply_code: nothing could read what it computes")


def _check_modes(spec: Optimizer) -> None:
    if bool(spec.eval_code) != bool(spec.train_code):
        raise RuleError("eval_code and train_code undo each other: a rule has both or none")
    for mode, code in spec.modes.items():
        _check_reads(f"{mode}_code", code, {*spec.hyper, "p", *(s.name for s in spec.states)})
        if code.statements and set(code.writes) & {*spec.hyper, *(s.name for s in spec.states)}:
            raise RuleError(f"{mode}_code may write 'p' and names of its own, nothing else")
        if code.statements and "p" not in code.writes:
            raise RuleError(f"{mode}_code never writes 'p'")


def _check_everything_read(spec: Optimizer) -> None:
    read = {name for code in spec.sections for s in code.statements for name in names(s.value)}
    read |= {s.when for s in spec.states if s.when} | {s.initial for s in spec.states if s.initial}
    for constraint in spec.constraints:
        condition = set(names(parse_condition(constraint.condition)))
        if strangers := condition - set(spec.hyper):
            raise ValueError(f"constraint reads {_list(strangers)}: no such hyperparameter")
    unread = {*spec.hyper, *spec.step.writes, *spec.tensor.writes, "g"} - read
    if unread:
        raise RuleError(f"{_list(unread)}: declared or computed, but never read")


def _check_switches(spec: Optimizer) -> None:
    """With a state switched off, its name is a plain variable: it must be written before use."""
    if len(spec.switches) > MAX_SWITCHES:
        raise ValueError(f"{len(spec.switches)} switches; at most {MAX_SWITCHES}: {spec.switches}")
    for truth in itertools.product((False, True), repeat=len(spec.switches)):
        switches = dict(zip(spec.switches, truth, strict=True))
        absent = {s.name for s in spec.states} - {s.name for s in spec.active_states(switches)}
        for statement in (*spec.element.statements, *spec.apply.statements):
            early = absent & set(names(select(statement.value, switches)))
            if early:
                off = ", ".join(name for name, on in switches.items() if not on)
                raise RuleError(
                    f"state {_list(early)} does not exist when {off} is off, but is read\n"
                    f"    {statement.text}"
                )
            absent.discard(statement.target)


def _list(items: Any) -> str:
    return ", ".join(repr(item) for item in sorted(items))
