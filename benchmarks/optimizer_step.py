"""Times the optimizer step of bnbx's 8-bit AdamW beside its peers.

This is the command line: `python benchmarks/optimizer_step.py`. README.md in this folder says how
the timing is done, and why so.
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine, report
from benchmarks.cases import CASES
from benchmarks.command import INTERRUPTED, introduce, part, progress, words, writable
from benchmarks.contenders import CONTENDERS
from benchmarks.process import ProcessError, Report, call
from benchmarks.results import Job, Measurement, Startup, count
from benchmarks.startup import measure_startup

STARTUP = "startup"
CORES = os.cpu_count() or 1
DTYPES = ("float32", "bfloat16")
OVERHEAD_S = 10.0
"""Of a configuration: starting a process, importing the libraries, filling the tensors."""
STARTUP_REPEAT_S = 8.0

HELP = f"""Time AdamW's step: bnbx in 8 bits, torch's fused, bitsandbytes' and torchao's in 8 bits.

All of them step copies of the same parameters with the same gradients, in turns, in one process
for each case, dtype and thread count. A peer that is not installed gets a line that says so.

Cases:

{chr(10).join(f"- **{name}**: {case.summary}" for name, case in CASES.items())}
- **{STARTUP}**: import of bnbx, and the first kernel with and without a cache

A list is words with commas between them. Close other programs first; the column "middle half",
the quartiles of the ratios, shows how steady the machine was.
"""

app = typer.Typer(
    add_completion=False, rich_markup_mode="markdown", pretty_exceptions_show_locals=False
)


@dataclass
class Findings:
    """What was measured so far, kept on disk too, so that an interrupted run loses nothing."""

    path: Path | None
    machine: dict[str, object]
    measurements: list[Measurement] = field(default_factory=list)
    startup: Startup | None = None

    def save(self) -> None:
        """Write the JSON, if it was asked for."""
        if self.path is not None:
            report.write_json(self.path, self.machine, self.measurements, self.startup)


def _thread_counts(text: str) -> tuple[int, ...]:
    counts = words(text, tuple(map(str, range(1, CORES + 1))), "--threads")
    return tuple(map(int, counts))


@app.command(help=HELP)
def main(
    case: Annotated[
        str, typer.Option(metavar="LIST", help="Which cases.")
    ] = "large,single,transformer,startup",
    dtype: Annotated[
        str, typer.Option(metavar="LIST", help="Of parameters and gradients.")
    ] = ",".join(DTYPES),
    threads: Annotated[
        str, typer.Option(metavar="LIST", help="Thread counts, up to the number of cores.")
    ] = "1,2" if CORES > 1 else "1",
    only: Annotated[
        str, typer.Option(metavar="LIST", help="Which optimizers; ratios need torch among them.")
    ] = ",".join(CONTENDERS),
    seconds: Annotated[
        float, typer.Option(min=0.01, help="Time for the rounds of each configuration.")
    ] = 10.0,
    repeats: Annotated[
        int, typer.Option(min=1, help="Fresh processes for each figure of startup.")
    ] = 5,
    json: Annotated[
        Path | None,
        typer.Option(callback=writable, help="Write machine, medians and every time here."),
    ] = None,
) -> None:
    """Measure what was asked for; HELP is what the user reads."""
    cases = words(case, (*CASES, STARTUP), "--case")
    contenders = words(only, tuple(CONTENDERS), "--only")
    jobs = [
        Job(name, kind, count, contenders, seconds)
        for name in cases
        if name != STARTUP
        for kind in words(dtype, DTYPES, "--dtype")
        for count in _thread_counts(threads)
    ]
    console = Console()
    findings = Findings(json, machine.describe())
    repeats = repeats if STARTUP in cases else 0
    _introduce(console, findings.machine, jobs, repeats)
    try:
        _run(console, findings, jobs, repeats)
    except ProcessError as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("Interrupted.")
        raise typer.Exit(INTERRUPTED) from None
    finally:
        if json is not None and (findings.measurements or findings.startup):
            console.print(f"Results: {json}", soft_wrap=True, markup=False)


def _introduce(console: Console, about: dict[str, object], jobs: list[Job], repeats: int) -> None:
    """The machine, and how long this will take."""
    introduce(console, about)
    compiling = sum(
        CASES[job.case].torchao_first_step
        for job in jobs
        if "torchao" in job.contenders and CONTENDERS["torchao"].installed()
    )
    total = sum(job.seconds + OVERHEAD_S for job in jobs) + compiling + repeats * STARTUP_REPEAT_S
    console.print(
        f"{count(len(jobs), 'configuration')}{' and startup' if repeats else ''}: about "
        f"{total / 60:.1f} minutes, {compiling / 60:.1f} of them for torchao to compile.",
        highlight=False,
    )


def _run(console: Console, findings: Findings, jobs: list[Job], repeats: int) -> None:
    with progress(console, len(jobs) + bool(repeats)) as advance:
        for number, job in enumerate(jobs):
            done = _measure(job, part(advance, job.title(), number))
            findings.measurements.append(done)
            findings.save()
            console.print(report.table(done))
        if repeats:
            findings.startup = measure_startup(repeats, part(advance, STARTUP, len(jobs)))
            findings.save()
            console.print(report.startup_table(findings.startup))
    if jobs:
        for line in report.LEGEND:
            console.print(line, highlight=False, markup=False)


def _measure(job: Job, tell: Report) -> Measurement:
    """The job, done in a process with empty kernel caches."""
    with tempfile.TemporaryDirectory(prefix="bnbx-benchmark-") as caches:
        environment = {
            "OMP_NUM_THREADS": str(job.threads),
            "BNBX_CACHE_DIR": f"{caches}/bnbx",
            "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor",
        }
        done: Measurement = call("benchmarks.worker", "measure", job, environment, tell)
        return done


if __name__ == "__main__":
    app()
