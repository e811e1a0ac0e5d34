"""Times Linear8bitLt beside dense products, bitsandbytes, and torch's integer product alone.

`python benchmarks/linear_int8.py` prints a table for each thread count; `measure` is for processes
that another benchmark starts (see `process.call`). bitsandbytes multiplies integers only in
evaluation mode: in training mode, in which a layer is made, it decodes the weight to floats each
time. Both are measured. The integer product is what bitsandbytes' evaluation mode stands on: no
layer over it can be faster, however little it does besides.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.command import words, writable
from benchmarks.process import Report
from benchmarks.side_by_side import (
    Call,
    Contenders,
    Row,
    measure_rows,
    milliseconds,
    run,
    title_of,
)

CORES = os.cpu_count() or 1
OURS = "bnbx"
ROWS = (1, 8, 64, 512)
THRESHOLD = 6.0
EVERY_COLUMN = 500  # of so many holds outliers

app = typer.Typer(
    add_completion=False, rich_markup_mode="markdown", pretty_exceptions_show_locals=False
)


@dataclass(frozen=True)
class Job:
    """What one process measures."""

    dtype: str
    threads: int
    rows: tuple[int, ...]
    side: int
    seconds: float

    def title(self) -> str:
        """One line."""
        return title_of(f"{self.side} x {self.side}", self.dtype, self.threads)


def measure(job: Job, report: Report) -> list[Row]:
    """Time all numbers of rows of the job."""
    import torch

    logging.disable(logging.WARNING)  # bitsandbytes says in each product that it goes by float16
    weight = torch.randn(job.side, job.side) * 0.02

    def contenders(rows: str) -> Contenders:
        x = torch.randn(int(rows), job.side)
        x[:, ::EVERY_COLUMN] *= 20
        return _calls(weight, x.to(getattr(torch, job.dtype)))

    labels = [str(rows) for rows in job.rows]
    return measure_rows(labels, contenders, OURS, job.threads, job.seconds, report)


def _calls(weight: Any, x: Any) -> dict[str, Call]:
    """What to time, by contender."""
    import torch

    from bnbx.layers.int8 import Linear8bitLt

    codes = torch.randint(-127, 128, x.shape, dtype=torch.int8)
    ours = _int8(Linear8bitLt, weight)
    others = weight.to(x.dtype)
    transposed = ours.weight.detach().t()
    found: dict[str, Call] = {
        OURS: lambda: ours(x),
        "dense": lambda: torch.nn.functional.linear(x, others),
        "dense float32": lambda: torch.nn.functional.linear(wide, weight),
        "int_mm": lambda: torch._int_mm(codes, transposed),
    }
    wide = x.float()
    if x.dtype == torch.float32:
        del found["dense"]
    try:
        import bitsandbytes as peer
    except ImportError:
        return found
    theirs = [_int8(peer.nn.Linear8bitLt, weight).train(mode) for mode in (False, True)]
    found["bitsandbytes"] = lambda: theirs[0](x)
    found["bitsandbytes, training"] = lambda: theirs[1](x)
    return found


def _int8(kind: Any, weight: Any) -> Any:
    """A frozen layer with this weight."""
    outs, columns = weight.shape
    made = kind(columns, outs, bias=False, has_fp16_weights=False, threshold=THRESHOLD)
    made.weight.data.copy_(weight)
    return made.to("cpu").eval()


@app.command()
def main(
    rows: Annotated[str, typer.Option(metavar="LIST", help="Rows of input.")] = ",".join(
        map(str, ROWS)
    ),
    dtype: Annotated[str, typer.Option(metavar="LIST", help="Of the input.")] = "float32,bfloat16",
    threads: Annotated[str, typer.Option(metavar="LIST", help="Thread counts.")] = (
        "1,2" if CORES > 1 else "1"
    ),
    side: Annotated[int, typer.Option(min=64, help="Rows and columns of the weight.")] = 4096,
    seconds: Annotated[float, typer.Option(min=0.01, help="Time for each number of rows.")] = 4.0,
    json: Annotated[
        Path | None,
        typer.Option(callback=writable, help="Write machine, medians and every time here."),
    ] = None,
) -> None:
    """Time the int8 layer, threshold 6 and a few outlier columns, beside its peers."""
    counts = words(threads, tuple(map(str, range(1, CORES + 1))), "--threads")
    sizes = tuple(int(size) for size in rows.split(","))
    jobs = [
        Job(kind, int(count), sizes, side, seconds)
        for kind in words(dtype, ("float32", "bfloat16", "float16"), "--dtype")
        for count in counts
    ]
    legend = ["In parentheses: bnbx's time over the contender's."]
    run(jobs, "benchmarks.linear_int8", table, json, legend)


def table(job: Job, found: list[Row]) -> Table:
    """The medians of a job in milliseconds, with ratios."""
    title = f"{job.title()}; milliseconds"
    made = Table(title=title, box=SIMPLE_HEAD, padding=0, pad_edge=False, min_width=len(title))
    made.add_column("rows", justify="right")
    names = list(found[0].times)
    for name in names:
        made.add_column(name, justify="right")
    for row in found:
        made.add_row(row.label, *(_cell(row, name) for name in names))
    return made


def _cell(row: Row, name: str) -> str:
    seconds, ratio = row.median(name), row.ratio(name)
    if seconds is None or ratio is None:
        return "-"
    return milliseconds(seconds) + ("" if name == OURS else f" ({ratio:.2f})")


if __name__ == "__main__":
    app()
