"""What the benchmarks of single operations share: contenders timed in turns, and jobs in processes.

A job is what one process measures, with one dtype and thread count; a row is one operation of it.
"""

from __future__ import annotations

import json as jsons
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.command import INTERRUPTED, introduce, part, progress
from benchmarks.process import ProcessError, Report, call
from benchmarks.timing import Times, cost, periods, ratios, run_rounds

Call = Callable[[], object]
Contenders = Mapping[str, Call]


class Job(Protocol):
    """What a process is told; it can be pickled."""

    @property
    def dtype(self) -> str:
        """Of the numbers."""

    @property
    def threads(self) -> int:
        """How many."""

    def title(self) -> str:
        """One line."""


def title_of(what: str, dtype: str, threads: int) -> str:
    """The line of a job."""
    return f"{what}, {dtype}, {threads} {'thread' if threads == 1 else 'threads'}"


@dataclass
class Row:
    """The seconds of an operation, by contender and round."""

    label: str
    reference: str
    times: dict[str, Times] = field(default_factory=dict)

    def median(self, name: str) -> float | None:
        """Seconds; None for a contender that is not there."""
        return median(self.times[name].values()) if name in self.times else None

    def ratio(self, other: str) -> float | None:
        """The reference's time over another's in the same round, the median over rounds."""
        if other not in self.times:
            return None
        return median(ratios(self.times[self.reference], self.times[other]))

    def share(self, count: int) -> None:
        """Let times be those of one of `count` operations that each call made."""
        for times in self.times.values():
            times.update({number: seconds / count for number, seconds in times.items()})

    def data(self) -> dict[str, object]:
        """Everything, as plain data."""
        medians = {name: self.median(name) for name in self.times}
        every = {name: [*times.values()] for name, times in self.times.items()}
        return {"label": self.label, "median_s": medians, "times_s": every}


def measure_rows(
    labels: Sequence[str],
    contenders: Callable[[str], Contenders],
    reference: str,
    threads: int,
    seconds: float,
    report: Report,
) -> list[Row]:
    """Time each label's contenders in turns; the reference takes part in every round."""
    import torch

    from bnbx.errors import BnbxWarning

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    # Where bnbx falls back to plain torch operations it warns; that is not what is measured.
    warnings.simplefilter("error", BnbxWarning)
    found = []
    with torch.no_grad():
        for number, label in enumerate(labels):
            calls = contenders(label)
            for function in calls.values():
                function()
            costs = {name: cost(function) for name, function in calls.items()}

            def tell(fraction: float, number: int = number, label: str = label) -> None:
                report(label, (number + fraction) / len(labels))

            rounds = periods(costs, 0.0, reference)
            times = run_rounds(calls, rounds, lambda: None, seconds, tell)
            found.append(Row(label, reference, times))
    return found


def run(
    jobs: Iterable[Job],
    worker: str,
    show: Callable[[Any, list[Row]], Table],
    json: Path | None,
    legend: Sequence[str],
) -> None:
    """Measure jobs in processes of their own and print their tables.

    Args:
        jobs: what to measure.
        worker: the module whose function `measure(job, report)` gives a job's rows.
        show: makes the table of a job.
        json: a file for machine, medians and every time, kept up to date; None for none.
        legend: lines below the tables.

    Raises:
        typer.Exit: a process failed, or the user interrupted.
    """
    console, about, jobs = Console(), machine.describe(), list(jobs)
    introduce(console, about)
    found: list[dict[str, object]] = []
    try:
        with progress(console, len(jobs)) as advance:
            for number, job in enumerate(jobs):
                with tempfile.TemporaryDirectory(prefix="bnbx-benchmark-") as caches:
                    settings = {"OMP_NUM_THREADS": str(job.threads), "BNBX_CACHE_DIR": caches}
                    tell = part(advance, job.title(), number)
                    rows = call(worker, "measure", job, settings, tell)
                about_job = {"job": job.title(), "dtype": job.dtype, "threads": job.threads}
                found += [{**about_job, **row.data()} for row in rows]
                console.print(show(job, rows))
                if json is not None:
                    json.write_text(jsons.dumps({"machine": about, "rows": found}, indent=1))
    except ProcessError as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("Interrupted.")
        raise typer.Exit(INTERRUPTED) from None
    for line in legend:
        console.print(line, highlight=False, markup=False)


def milliseconds(seconds: float | None) -> str:
    """A cell of a table."""
    return "-" if seconds is None else f"{seconds * 1e3:.2f}"
