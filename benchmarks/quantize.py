"""Times quantizing and dequantizing beside bitsandbytes and a copy of the same bytes.

This is the command line: `python benchmarks/quantize.py`. README.md in this folder says how the
timing is done, and why so.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.coding_worker import COPY, OPERATIONS, OURS, PEER, Job
from benchmarks.command import words, writable
from benchmarks.side_by_side import Row, milliseconds, run

CORES = os.cpu_count() or 1
DTYPES = ("float32", "bfloat16")
LEGEND = (
    "quantize: times faster than bitsandbytes, with the same table and block size.",
    "dequantize: times a copy of the output's bytes, into memory that is there already.",
)

app = typer.Typer(
    add_completion=False, rich_markup_mode="markdown", pretty_exceptions_show_locals=False
)


@app.command()
def main(
    only: Annotated[
        str, typer.Option(metavar="LIST", help=f"Which of {', '.join(OPERATIONS)}.")
    ] = ",".join(OPERATIONS),
    dtype: Annotated[str, typer.Option(metavar="LIST", help="Of the numbers.")] = ",".join(DTYPES),
    threads: Annotated[str, typer.Option(metavar="LIST", help="Thread counts.")] = (
        "1,2" if CORES > 1 else "1"
    ),
    side: Annotated[int, typer.Option(min=64, help="Rows and columns of the tensor.")] = 4096,
    seconds: Annotated[
        float, typer.Option(min=0.01, help="Time for the rounds of each operation.")
    ] = 4.0,
    json: Annotated[
        Path | None,
        typer.Option(callback=writable, help="Write machine, medians and every time here."),
    ] = None,
) -> None:
    """Time quantizing and dequantizing: bnbx, bitsandbytes, and a copy of the output's bytes.

    All work on the same tensor, in turns, in one process for each dtype and thread count.
    """
    counts = words(threads, tuple(map(str, range(1, CORES + 1))), "--threads")
    operations = words(only, tuple(OPERATIONS), "--only")
    jobs = [
        Job(kind, int(count), operations, side, seconds)
        for kind in words(dtype, DTYPES, "--dtype")
        for count in counts
    ]
    run(jobs, "benchmarks.coding_worker", table, json, LEGEND)


def table(job: Job, rows: list[Row]) -> Table:
    """The medians of a job."""
    made = Table(title=job.title(), box=SIMPLE_HEAD, pad_edge=False)
    made.add_column("operation")
    for name in (OURS, PEER, COPY):
        made.add_column(f"{name} ms", justify="right")
    for name in ("x faster", "x copy"):
        made.add_column(name, justify="right")
    for row in rows:
        peer, copy = row.ratio(PEER), row.ratio(COPY)
        made.add_row(
            row.label,
            *(milliseconds(row.median(name)) for name in (OURS, PEER, COPY)),
            f"{1 / peer:.1f}" if peer else "-",
            f"{copy:.2f}" if copy else "-",
        )
    return made


if __name__ == "__main__":
    app()
