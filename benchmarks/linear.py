"""Times the linear layer with a quantized weight, beside a dense one and bitsandbytes' Linear4bit.

This is the command line: `python benchmarks/linear.py`. README.md in this folder says how the
timing is done, and why so.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.command import words, writable
from benchmarks.linear_worker import (
    CODES,
    DECODING,
    DENSE,
    LAYERS,
    OURS,
    PANELS,
    PEER,
    PEER_TRAINING,
    Job,
)
from benchmarks.side_by_side import Row, milliseconds, run
from bnbx.registry import quant_types

CORES = os.cpu_count() or 1
DTYPES = ("float32", "bfloat16", "float16")
LEGEND = (
    "In parentheses: how many times faster bnbx is. "
    "dense is torch.nn.functional.linear in the dtype of the input. bitsandbytes decodes its "
    "weight in training mode; in evaluation mode it multiplies in bfloat16, whatever the input. "
    f"Fewer than {DECODING} rows go through {LAYERS} layers, one after the other; times are those "
    "of one."
)
CROSSOVER = "codes: multiplied as they are read, for few rows; panels: decoded first, for many."
ROWS, CROSSOVER_ROWS = "1,4,16,512", "1,2,4,8,12,16,32,64,128,512"

app = typer.Typer(
    add_completion=False, rich_markup_mode="markdown", pretty_exceptions_show_locals=False
)


@app.command()
def main(
    quant_type: Annotated[str, typer.Option(metavar="LIST", help="Types of the weight.")] = "nf4",
    rows: Annotated[str, typer.Option(metavar="LIST", help="Rows of input.")] = "",
    dtype: Annotated[str, typer.Option(metavar="LIST", help="Of the input.")] = "float32,bfloat16",
    threads: Annotated[str, typer.Option(metavar="LIST", help="Thread counts.")] = (
        "1,2" if CORES > 1 else "1"
    ),
    side: Annotated[int, typer.Option(min=64, help="Rows and columns of the weight.")] = 4096,
    seconds: Annotated[
        float, typer.Option(min=0.01, help="Time for the rounds of each product.")
    ] = 4.0,
    backward: Annotated[bool, typer.Option(help="Time the gradient to the input.")] = False,
    crossover: Annotated[
        bool, typer.Option(help="Time the two ways of a product against each other.")
    ] = False,
    json: Annotated[
        Path | None,
        typer.Option(callback=writable, help="Write machine, medians and every time here."),
    ] = None,
) -> None:
    """Time products of a few and of many rows with a quantized weight.

    All contenders multiply the same numbers, in turns, in one process for each type, dtype and
    thread count.
    """
    counts = words(threads, tuple(map(str, range(1, CORES + 1))), "--threads")
    wanted = (rows or (CROSSOVER_ROWS if crossover else ROWS)).split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in wanted):
        raise typer.BadParameter(f"{rows!r}: expected whole numbers.", param_hint="--rows")
    if backward and crossover:
        raise typer.BadParameter("one of them at a time.", param_hint="--backward, --crossover")
    jobs = [
        Job(name, kind, int(count), tuple(map(int, wanted)), side, seconds, crossover, backward)
        for name in words(quant_type, quant_types().names(), "--quant-type")
        for kind in words(dtype, DTYPES, "--dtype")
        for count in counts
    ]
    run(jobs, "benchmarks.linear_worker", table, json, [CROSSOVER if crossover else LEGEND])


def table(job: Job, rows: list[Row]) -> Table:
    """The medians of a job, and how many times the reference is faster than each other."""
    names = (CODES, PANELS) if job.crossover else (OURS, DENSE, PEER, PEER_TRAINING)
    made = Table(title=f"{job.title()}; milliseconds")
    made.add_column("rows", justify="right")
    for name in names:
        made.add_column(name, justify="right")
    for row in rows:
        made.add_row(row.label, *(_cell(row, name) for name in names))
    return made


def _cell(row: Row, name: str) -> str:
    ratio = row.ratio(name)
    more = "" if name == row.reference or ratio is None else f" ({1 / ratio:.2f} x)"
    return milliseconds(row.median(name)) + more


if __name__ == "__main__":
    app()
