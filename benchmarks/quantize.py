"""Times quantizing and dequantizing beside bitsandbytes and a copy of the same bytes.

This is the command line: `python benchmarks/quantize.py`. README.md in this folder says how the
timing is done, and why so.
"""

from __future__ import annotations

import json as jsons
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine
from benchmarks.coding_worker import OPERATIONS, Job, Row
from benchmarks.command import INTERRUPTED, introduce, part, progress, words, writable
from benchmarks.process import ProcessError, call

CORES = os.cpu_count() or 1
DTYPES = ("float32", "bfloat16")
LEGEND = (
    "quantize: times faster than bitsandbytes, which is asked for the same codes.",
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
    console, about = Console(), machine.describe()
    introduce(console, about)
    found: list[dict[str, object]] = []
    try:
        with progress(console, len(jobs)) as advance:
            for number, job in enumerate(jobs):
                with tempfile.TemporaryDirectory(prefix="bnbx-benchmark-") as caches:
                    settings = {"OMP_NUM_THREADS": str(job.threads), "BNBX_CACHE_DIR": caches}
                    tell = part(advance, job.title(), number)
                    rows = call("benchmarks.coding_worker", "measure", job, settings, tell)
                found += [
                    {"dtype": job.dtype, "threads": job.threads, **row.data()} for row in rows
                ]
                console.print(table(job, rows))
                if json is not None:
                    json.write_text(jsons.dumps({"machine": about, "rows": found}, indent=1))
    except ProcessError as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("Interrupted.")
        raise typer.Exit(INTERRUPTED) from None
    for line in LEGEND:
        console.print(line, highlight=False, markup=False)


def table(job: Job, rows: list[Row]) -> Table:
    """The medians of a job."""
    made = Table(title=job.title())
    made.add_column("operation")
    for name in ("bnbx ms", "bitsandbytes ms", "copy ms", "x faster", "x copy"):
        made.add_column(name, justify="right")
    for row in rows:
        peer, copy = row.ratio("bitsandbytes"), row.ratio("copy")
        made.add_row(
            row.operation,
            *(_ms(row.median(name)) for name in ("bnbx", "bitsandbytes", "copy")),
            f"{1 / peer:.1f}" if peer else "-",
            f"{copy:.2f}" if copy else "-",
        )
    return made


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.2f}"


if __name__ == "__main__":
    app()
