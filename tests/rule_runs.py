"""Runs element code in any arithmetic: as it was written, and as kernels do after lowering."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from bnbx.kernels.evaluate import Operations, evaluate
from bnbx.kernels.lower import Lowered
from bnbx.registry import Optimizer
from bnbx.registry.checks import select

Switches = Mapping[str, bool]
Values = Mapping[str, Any]


def drawn_switches(spec: Optimizer, seed: int) -> dict[str, bool]:
    source = random.Random(seed)
    return {name: source.random() < 0.5 for name in spec.switches}


def stored(spec: Optimizer, switches: Switches) -> list[str]:
    """What a kernel reads and writes for each element."""
    return ["p", *(state.name for state in spec.active_states(switches))]


def run_text(spec: Optimizer, switches: Switches, start: Values, by: Operations) -> Values:
    """The element code as it was written."""
    values = dict(start)
    for statement in spec.element.statements:
        values[statement.target] = evaluate(select(statement.value, switches), values, by)
    return values


def run_lowered(lowered: Lowered, elements: Values, scalars: Values, by: Operations) -> Values:
    """What a kernel does; it sees the tensors and its scalars, and nothing else."""
    values = {**elements, **scalars}
    for statement in lowered.statements:
        values[statement.target] = evaluate(statement.value, values, by)
    return values
