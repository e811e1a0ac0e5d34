"""`bnbx describe` and `bnbx types`: the facts of quant types, for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from bnbx.describe.data import LABELS
from bnbx.describe.facts import Error, Facts, Level, bits_per_element, levels_of, scale_words
from bnbx.kernels.encoding import make_encoding
from bnbx.registry import Catalog, QuantType

WHOLE = 16
"""Tables of more codes are shown in part: both ends, and around zero."""
SHOWN = 3

GAP = Text("…", style="dim")


def describe(facts: Facts, console: Console) -> None:
    """Print everything about one type."""
    spec = facts.spec
    title = Text.assemble((spec.name, "bold"), ": ", spec.summary)
    console.print(Padding(title, (1, 0, 1, 0)))
    console.print(_overview(facts))
    console.print(Padding(_tables(facts), (1, 0, 1, 0)))


def list_types(types: Catalog[QuantType], console: Console) -> None:
    """Print one line for each registered type."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("type", style="bold", no_wrap=True)
    table.add_column("bits", justify="right")
    table.add_column("stored", justify="right", no_wrap=True)
    table.add_column("block", justify="right")
    table.add_column("what it is", overflow="fold")

    for spec in types:
        encoding = make_encoding(spec)
        package = owner(types.package(spec.name), "bnbx.quant_types")
        table.add_row(
            spec.name,
            str(spec.bits),
            short(bits_per_element(encoding)),
            str(encoding.block_size or spec.scale.per),
            Text.assemble(spec.summary, package),
        )
    console.print(table)
    console.print()
    console.print(f"{len(types)} types. `bnbx describe TYPE` says more of one; `bnbx plot` draws.")


def owner(package: str, built_in: str) -> Text:
    """Where a spec comes from, unless it is one of ours."""
    return Text("" if package == built_in else f" (from {package})", style="dim")


def _overview(facts: Facts) -> RenderableType:
    spec = facts.spec
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, value in (
        ("source", spec.source or "none given"),
        ("registered by", facts.package or "nobody"),
        ("bits", _bits(facts)),
        ("scale", scale_words(spec, facts.encoding.block_size)),
        ("codes written", f"{facts.written} of {2**spec.bits}"),
        ("zero", "exact" if facts.zero else "not exact"),
        ("smallest", f"{facts.smallest:.3g} of a block's largest magnitude"),
        ("ties", _ties(spec)),
        ("unsigned", _unsigned(spec)),
        ("means", _roles(spec)),
    ):
        if value:
            grid.add_row(label, value)
    return grid


def _bits(facts: Facts) -> str:
    return f"{facts.spec.bits} a code, {short(facts.bits_per_element)} with scales"


def _ties(spec: QuantType) -> str:
    if spec.grid:
        return f"after rounding to one of {spec.grid} points, to the lower number"
    return "to the even code" if spec.ties == "even" else "to the lower number"


def _unsigned(spec: QuantType) -> str:
    if spec.unsigned_values is None:
        return "no table of its own; uses the signed one"
    levels = [x.level for x in levels_of(spec.codebook(signed=False)) if x.written]
    above = [level for level in levels if level]
    zero = "zero and " if len(above) < len(levels) else ""
    return f"a table of its own: {zero}{len(above)} numbers from {min(above):.3g} to {max(above):g}"


def _roles(spec: QuantType) -> str:
    roles = [f"bits={spec.bits} of optimizer states"] if spec.state_default else []
    roles += ["double quantization of scales"] if spec.scale_default else []
    return ", ".join(roles)


def _tables(facts: Facts) -> RenderableType:
    """Side by side where the terminal is wide enough, else one below the other."""
    levels = Group(_levels(facts), Text())
    return Columns([levels, Group(_errors(facts.errors), Text(), _note())], padding=(0, 6))


def _levels(facts: Facts) -> Table:
    natural = facts.spec.unit != 1
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("code", justify="right")
    table.add_column("level", justify="right")
    if natural:
        table.add_column("number", justify="right")
    table.add_column("written above", justify="right")
    for level in shown(facts.levels):
        if level is None:
            table.add_row(*[GAP] * len(table.columns))
            continue
        number = [_number(level.value)] if natural else []
        style = None if level.written else "dim"
        table.add_row(
            f"{level.code:0{facts.spec.bits}b}",
            "none" if level.level is None else _level(level.level),
            *number,
            _above(level),
            style=style,
        )
    return table


def shown(levels: Sequence[Level]) -> list[Level | None]:
    """The rows of a table to show; None where some are left out."""
    if len(levels) <= WHOLE:
        return list(levels)
    numbers = [level for level in levels if level.level is not None and level.written]
    middle = min(range(len(numbers)), key=lambda i: abs(numbers[i].level or 0.0))
    start, end = max(middle - SHOWN, SHOWN), min(middle + SHOWN + 1, len(numbers) - SHOWN)
    before: list[Level | None] = [None] if start > SHOWN else []
    after: list[Level | None] = [None] if end < len(numbers) - SHOWN else []
    return [*numbers[:SHOWN], *before, *numbers[start:end], *after, *numbers[-SHOWN:]]


def _above(level: Level) -> str:
    if not level.written:
        return "not written"
    return "-" if level.above is None else _level(level.above)


def _errors(errors: dict[str, Error]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("error on")
    table.add_column("mean", justify="right")
    table.add_column("RMS", justify="right")
    table.add_column("dB", justify="right")
    for key, error in errors.items():
        table.add_row(LABELS[key], percent(error.mean), percent(error.rms), f"{error.decibels:.1f}")
    return table


def _note() -> Text:
    return Text("errors as shares of the data", style="dim")


def percent(share: float) -> str:
    """Three digits: "9.21 %"."""
    digits = max(0, 2 - math.floor(math.log10(100 * share))) if share > 0 else 0
    return f"{100 * share:.{digits}f} %"


def short(bits: float) -> str:
    """Bits per element without needless zeros, at most three decimals."""
    return f"{bits:.3f}".rstrip("0").rstrip(".")


def _level(level: float) -> str:
    """Six decimals; in powers of ten where these would say little."""
    return f"{level:.6f}" if level == 0 or abs(level) >= 1e-3 else f"{level:.1e}"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"
