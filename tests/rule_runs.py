"""Runs a rule's sections in any arithmetic: as they were written, and as kernels do after lowering.

A tensor has one element here, or each column of values stands for many such tensors: so the norm of
a name is a function of its value, and `numel` a number that comes with the host's.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

from bnbx.kernels.evaluate import Operations, evaluate
from bnbx.kernels.lower import Lowered
from bnbx.registry import Optimizer
from bnbx.registry.checks import NORM, NUMEL, select

Switches = Mapping[str, bool]
Values = Mapping[str, Any]
Norm = Callable[[Any], Any]


def drawn_switches(spec: Optimizer, seed: int) -> dict[str, bool]:
    source = random.Random(seed)
    return {name: source.random() < 0.5 for name in spec.switches}


def stored(spec: Optimizer, switches: Switches) -> list[str]:
    """What a kernel reads and writes for each element."""
    return ["p", *(state.name for state in spec.active_states(switches))]


def run_text(
    spec: Optimizer, switches: Switches, start: Values, by: Operations, norm: Norm = abs
) -> Values:
    """The sections of a step after step_code, as they were written."""
    values = dict(start)
    for code in (spec.element, spec.tensor, spec.apply):
        for statement in code.statements:
            values[statement.target] = evaluate(select(statement.value, switches), values, by)
        if code is spec.element and spec.tensor.statements:
            named = {"p", "g", *(state.name for state in spec.states), *spec.element.writes}
            values |= {NORM + name: norm(values[name]) for name in named if name in values}
    return values


def run_lowered(
    lowered: Lowered, elements: Values, scalars: Values, host: Values, by: Operations,
    norm: Norm = abs,
) -> Values:  # fmt: skip
    """What a kernel does; it sees the tensors and its scalars, and nothing else.

    Between the passes it sees its inputs among `host`, and the norms that it measured.
    """
    values = {**elements, **scalars}
    for statement in lowered.element:
        values[statement.target] = evaluate(statement.value, values, by)
    if lowered.tensor_scalars:
        found = {name: host[name] for name in (*lowered.inputs, NUMEL)}
        found |= {NORM + name: norm(values[name]) for name in lowered.norms}
        for statement in lowered.tensor:
            found[statement.target] = evaluate(statement.value, found, by)
        values |= {n: evaluate(value, found, by) for n, value in lowered.tensor_scalars.items()}
    for statement in lowered.apply:
        values[statement.target] = evaluate(statement.value, values, by)
    return values
