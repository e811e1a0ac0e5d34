"""Times the linear layer with a quantized weight, beside a dense one and bitsandbytes' Linear4bit.

This is the command line: `python benchmarks/linear.py`. README.md in this folder says how the
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
from benchmarks.command import INTERRUPTED, introduce, part, progress, words, writable
from benchmarks.linear_worker import CODES, DENSE, OURS, PANELS, PEER, Job, Row
from benchmarks.process import ProcessError, call
from bnbx.registry import quant_types

CORES = os.cpu_count() or 1
DTYPES = ("float32", "bfloat16", "float16")
LEGEND = "dense is torch.nn.functional.linear in the dtype of the input."
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
    console, about = Console(), machine.describe()
    introduce(console, about)
    found: list[dict[str, object]] = []
    try:
        with progress(console, len(jobs)) as advance:
            for number, job in enumerate(jobs):
                with tempfile.TemporaryDirectory(prefix="bnbx-benchmark-") as caches:
                    settings = {"OMP_NUM_THREADS": str(job.threads), "BNBX_CACHE_DIR": caches}
                    tell = part(advance, job.title(), number)
                    made = call("benchmarks.linear_worker", "measure", job, settings, tell)
                about_job = {"type": job.quant_type, "dtype": job.dtype, "threads": job.threads}
                found += [{**about_job, "backward": backward, **row.data()} for row in made]
                console.print(table(job, made))
                if json is not None:
                    json.write_text(jsons.dumps({"machine": about, "rows": found}, indent=1))
    except ProcessError as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("Interrupted.")
        raise typer.Exit(INTERRUPTED) from None
    console.print(CROSSOVER if crossover else LEGEND, highlight=False, markup=False)


def table(job: Job, rows: list[Row]) -> Table:
    """The medians of a job, and how many times faster its reference is than each other."""
    names = (CODES, PANELS) if job.crossover else (OURS, DENSE, PEER)
    made = Table(title=job.title())
    made.add_column("rows", justify="right")
    for name in names:
        made.add_column(f"{name} ms", justify="right")
    for name in names[1:]:
        made.add_column(f"x faster than {name}", justify="right")
    for row in rows:
        medians = [row.median(name) for name in names]
        faster = [row.faster(name) for name in names[1:]]
        made.add_row(
            str(row.rows),
            *("-" if found is None else f"{found * 1e3:.2f}" for found in medians),
            *("-" if found is None else f"{found:.2f}" for found in faster),
        )
    return made


if __name__ == "__main__":
    app()
