"""`bnbx rules`: the optimizers that are registered, for a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bnbx.describe.text import owner
from bnbx.registry import Catalog, Optimizer, State


def list_rules(rules: Catalog[Optimizer], console: Console) -> None:
    """Print one line for each registered optimizer."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("rule", style="bold", no_wrap=True)
    table.add_column("states", overflow="fold")
    table.add_column("what it is", overflow="fold")
    table.add_column("source", style="dim", overflow="fold")
    for spec in rules:
        states = ", ".join(map(_state, spec.states))
        package = owner(rules.package(spec.name), "bnbx.optimizers.rules")
        table.add_row(spec.name, states or "-", Text.assemble(spec.summary, package), spec.source)
    console.print(table)
    console.print()
    console.print(
        f"{len(rules)} rules. States in brackets exist only with an option on. "
        "`bnbx.optim.create(RULE, params)` makes an optimizer of one."
    )


def _state(state: State) -> str:
    return f"({state.name})" if state.when else state.name
