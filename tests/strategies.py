"""Hypothesis strategies: rules that nobody wrote, and hyperparameters to run them with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hypothesis import strategies as st

from bnbx.registry import Hyper, Optimizer, State, flag, fraction, number, positive, rate
from bnbx.registry.rule import Section, names, parse

STATES = ("m", "v", "trace")
HYPERS = ("lr", "beta", "eps", "decay")
STEP_RESULTS = ("c", "scale")
LOCALS = ("u", "w", "delta")
TENSOR_RESULTS = ("t", "share")
NUMBERS = ("0", "1", "2", "3", "0.5", "0.25", "0.1", "1e-3")
COMPARISONS = ("<", "<=", ">", ">=", "==", "!=")
HYPER_KINDS: Mapping[str, Hyper] = {
    "rate": rate(0.25),
    "fraction": fraction(0.5),
    "positive": positive(0.125),
    "number": number(-0.5),
    "flag": flag(True),
}


@dataclass
class _Writer:
    """Writes the lines of a section, and remembers what may be read."""

    draw: st.DrawFn
    known: list[str]
    truths: Sequence[str]
    host: bool = False
    lines: list[str] = field(default_factory=list)

    def assign(self, target: str, value: str) -> None:
        self.lines.append(f"{target} = {value}")
        if target not in self.known:
            self.known.append(target)

    def expression(self, depth: int, without: Sequence[str] = ()) -> str:
        """Any expression over what is known, except for some names."""
        if depth == 0 or self.draw(st.integers(0, 5)) == 0:
            known = [name for name in self.known if name not in without]
            return self.draw(st.sampled_from([*known, *known, *NUMBERS]))
        parts = [self.expression(depth - 1, without) for _ in range(2)]
        kind = self.draw(st.sampled_from(self._kinds()))
        match kind:
            case "negate":
                return f"-({parts[0]})"
            case "compare":
                sign = self.draw(st.sampled_from(COMPARISONS))
                yes, no = (self.expression(depth - 1, without) for _ in range(2))
                return f"where({parts[0]} {sign} {parts[1]}, {yes}, {no})"
            case "truth":
                return f"where({self.draw(st.sampled_from(self.truths))}, {', '.join(parts)})"
            case "min" | "max":
                return f"{kind}({', '.join(parts)})"
            case "abs" | "sign" | "sqrt" | "exp" | "log":
                return f"{kind}({parts[0]})"
            case "sqrt of abs":
                return f"sqrt(abs({parts[0]}))"
            case "/ more than 1":
                return f"({parts[0]}) / (abs({parts[1]}) + 1)"
        text = f" {kind} ".join(part if self.draw(st.booleans()) else f"({part})" for part in parts)
        return text if self.draw(st.booleans()) else f"({text})"

    def _kinds(self) -> list[str]:
        kinds = ["+", "-", "*", "*", "*", "/", "/", "/ more than 1", "negate", "compare"]
        kinds += ["min", "max", "abs", "sign", "sqrt", "sqrt of abs"]
        kinds += ["truth"] if self.truths else []
        return [*kinds, "**", "exp", "log"] if self.host else kinds


@st.composite
def rules(draw: st.DrawFn, max_depth: int = 3) -> Optimizer:
    """A valid optimizer: any states, hyperparameters, switches and expressions, in one pass or two.

    States that are declared unsigned never go below zero. Values may be infinite or NaN.
    """
    kinds = draw(st.lists(st.sampled_from(sorted(HYPER_KINDS)), max_size=len(HYPERS)))
    hyper = {name: HYPER_KINDS[kind] for name, kind in zip(HYPERS, kinds, strict=False)}
    depths = st.integers(1, max_depth)
    step = _Writer(draw, ["step", *hyper], list(hyper), host=True)
    for name in STEP_RESULTS[: draw(st.integers(0, len(STEP_RESULTS)))]:
        step.assign(name, step.expression(draw(depths)))
    states = [_state(draw, name, hyper) for name in STATES[: draw(st.integers(0, len(STATES)))]]
    present = [state.name for state in states if state.when is None]
    truths = [name for name in step.known if name != "step"]
    element = _Writer(draw, ["p", "g", *present, *step.known], truths)
    passes = draw(st.sampled_from([1, 1, 2, 2, 3]))  # 3: with tensor_code between the two
    free = (*LOCALS, "g", "p") if passes == 1 else (*LOCALS, "g")
    others = draw(st.lists(st.sampled_from(free), max_size=4))
    for target in draw(st.permutations([*(state.name for state in states), *others])):
        _write(element, target, {state.name: state for state in states}, draw(depths))
    tensor, apply = _Writer(draw, [], []), element
    if passes > 1:
        tensor, apply = _second_pass(draw, element, step, states, passes == 3, depths)
    writers: dict[Section, _Writer] = {
        "step_code": step,
        "element_code": element,
        "tensor_code": tensor,
        "apply_code": apply,
    }
    _finish(apply, writers, hyper, states, draw(depths))
    return Optimizer(
        name="random_rule",
        summary="drawn at random",
        states=tuple(states),
        hyper=hyper,
        step_code="\n".join(step.lines),
        element_code="\n".join(element.lines),
        tensor_code="\n".join(tensor.lines),
        apply_code="" if apply is element else "\n".join(apply.lines),
    )


def _second_pass(
    draw: st.DrawFn,
    element: _Writer,
    step: _Writer,
    states: Sequence[State],
    measured: bool,
    depths: st.SearchStrategy[int],
) -> tuple[_Writer, _Writer]:
    """What is between the passes, and the second pass but for its last line."""
    targets = {line.split(" = ")[0] for line in element.lines}
    values = sorted({"p", "g", *targets})
    tensor = _Writer(draw, [*step.known, "numel", *(f"norm_{name}" for name in values)], step.known)
    tensor.truths = [name for name in step.known if name != "step"]
    for name in TENSOR_RESULTS[: draw(st.integers(1, len(TENSOR_RESULTS)))] if measured else ():
        tensor.assign(name, tensor.expression(draw(depths)))
    results = [name for name in TENSOR_RESULTS if name in tensor.known]
    apply = _Writer(draw, [*element.known, *results], [*tensor.truths, *results])
    kept = {state.name for state in states}
    local = sorted({"g", "p", *LOCALS} - kept)
    for target in draw(st.lists(st.sampled_from(local), max_size=2)):
        apply.assign(target, apply.expression(draw(depths)))
    return tensor, apply


def _state(draw: st.DrawFn, name: str, hyper: Mapping[str, Hyper]) -> State:
    reasons = st.sampled_from([None, *hyper])
    return State(name=name, signed=draw(st.booleans()), when=draw(reasons))


def _write(element: _Writer, target: str, states: Mapping[str, State], depth: int) -> None:
    """One line: a state, which may be absent or unsigned, or a variable."""
    state = states.get(target)
    value = element.expression(depth)
    if state is not None and state.when and target not in element.known:
        element.known.append(target)
        present = element.expression(depth)
        element.known.remove(target)
        value = f"where({state.when}, {present}, {value})"
    if state is not None and not state.signed:
        shapes = st.sampled_from(["abs({0})", "({0}) * ({0})", "max({0}, 0)"])
        value = element.draw(shapes).format(value)
    element.assign(target, value)


def _finish(
    last: _Writer,
    writers: Mapping[Section, _Writer],
    hyper: Mapping[str, Hyper],
    states: list[State],
    depth: int,
) -> None:
    """The line that writes the parameter, and reads everything that nothing else has read."""
    value = last.expression(depth)
    results = [name for name in TENSOR_RESULTS if name in writers["tensor_code"].known]
    unread = {*hyper, *writers["step_code"].known, *results, "g"} - {"step"}
    for section, writer in writers.items():
        more = [f"p = {value}"] if writer is last else []
        code = parse("\n".join([*writer.lines, *more]), section)
        unread -= {name for statement in code.statements for name in names(statement.value)}
    unread -= {state.when for state in states if state.when}
    for name in sorted(unread):
        shapes = ["where({1}, {0}, g)", "({0}) * where({1}, 1, 2)"]
        if name not in hyper or not hyper[name].flag:
            shapes += ["({0}) * {1}", "({0}) / {1}", "{0} + {1}", "({0}) * (1 - {1})"]
        value = last.draw(st.sampled_from(shapes)).format(value, name)
    last.assign("p", value)


def hyper_values(spec: Optimizer) -> st.SearchStrategy[dict[str, float | bool]]:
    """Values that the hyperparameters of `spec` may take: small numbers, often zero."""
    return st.fixed_dictionaries({name: _values(hyper) for name, hyper in spec.hyper.items()})


def _values(hyper: Hyper) -> st.SearchStrategy[float | bool]:
    if hyper.flag:
        return st.booleans()
    low = 1 if hyper.positive else -64 if hyper.minimum is None else 0
    high = 31 if hyper.below else 64
    return st.integers(low, high).map(lambda units: units / 32) | st.just(float(low > 0))
