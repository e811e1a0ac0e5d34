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
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine
from benchmarks.command import INTERRUPTED, introduce, part, progress, words
from benchmarks.process import ProcessError, Report, call
from benchmarks.timing import Times, cost, periods, ratios, run_rounds

CORES = os.cpu_count() or 1
OURS = "bnbx"
ROWS = (1, 8, 64, 512)
THRESHOLD = 6.0
EVERY_COLUMN = 500  # of so many holds outliers
Call = Callable[[], object]

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
        word = "thread" if self.threads == 1 else "threads"
        return f"{self.side} x {self.side}, {self.dtype}, {self.threads} {word}"


@dataclass
class Row:
    """The seconds of a product, by contender and round."""

    rows: int
    times: dict[str, Times] = field(default_factory=dict)

    def median(self, name: str) -> float | None:
        """Seconds; None for a contender that is not there."""
        return median(self.times[name].values()) if name in self.times else None

    def ratio(self, other: str) -> float | None:
        """The median of bnbx's time over the other's in the same round."""
        return median(ratios(self.times[OURS], self.times[other])) if other in self.times else None


def measure(job: Job, report: Report) -> list[Row]:
    """Time all numbers of rows of the job."""
    import torch

    from bnbx.errors import BnbxWarning

    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    warnings.simplefilter("error", BnbxWarning)
    logging.disable(logging.WARNING)  # bitsandbytes says in each product that it goes by float16
    weight = torch.randn(job.side, job.side) * 0.02
    found = []
    for number, rows in enumerate(job.rows):
        x = torch.randn(rows, job.side)
        x[:, ::EVERY_COLUMN] *= 20
        with torch.no_grad():
            calls = _calls(weight, x.to(getattr(torch, job.dtype)))
            for function in calls.values():
                function()
            costs = {name: cost(function) for name, function in calls.items()}
            rounds = periods(costs, 0.0, OURS)
            share = number / len(job.rows)

            def tell(fraction: float, share: float = share, rows: int = rows) -> None:
                report(f"{rows} rows", share + fraction / len(job.rows))

            times = run_rounds(calls, rounds, lambda: None, job.seconds, tell)
        found.append(Row(rows, times))
    return found


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
) -> None:
    """Time the int8 layer, threshold 6 and a few outlier columns, beside its peers."""
    counts = words(threads, tuple(map(str, range(1, CORES + 1))), "--threads")
    sizes = tuple(int(size) for size in rows.split(","))
    jobs = [
        Job(kind, int(count), sizes, side, seconds)
        for kind in words(dtype, ("float32", "bfloat16", "float16"), "--dtype")
        for count in counts
    ]
    console = Console()
    introduce(console, machine.describe())
    try:
        with progress(console, len(jobs)) as advance:
            for number, job in enumerate(jobs):
                with tempfile.TemporaryDirectory(prefix="bnbx-benchmark-") as caches:
                    settings = {"OMP_NUM_THREADS": str(job.threads), "BNBX_CACHE_DIR": caches}
                    tell = part(advance, job.title(), number)
                    found = call("benchmarks.linear_int8", "measure", job, settings, tell)
                console.print(table(job, found))
    except ProcessError as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("Interrupted.")
        raise typer.Exit(INTERRUPTED) from None
    console.print("In parentheses: bnbx's time over the contender's.", highlight=False)


def table(job: Job, found: list[Row]) -> Table:
    """The medians of a job in milliseconds, with ratios."""
    made = Table(title=job.title())
    made.add_column("rows", justify="right")
    names = list(found[0].times)
    for name in names:
        made.add_column(name, justify="right")
    for row in found:
        made.add_row(str(row.rows), *(_cell(row, name) for name in names))
    return made


def _cell(row: Row, name: str) -> str:
    seconds, ratio = row.median(name), row.ratio(name)
    if seconds is None or ratio is None:
        return "-"
    return f"{seconds * 1e3:.2f}" + ("" if name == OURS else f" ({ratio:.2f})")


if __name__ == "__main__":
    app()
