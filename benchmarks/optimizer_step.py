"""Times the optimizer step of bnbx's 8-bit AdamW beside its peers.

This is the command line: `python benchmarks/optimizer_step.py`. README.md in this folder says how
the timing is done, and why so.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine, report
from benchmarks.cases import CASES
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
BUSY = 0.5  # load average before this benchmark adds its own
INTERRUPTED = 130  # as shells report Ctrl-C
Advance = Callable[[str, str, float], None]  # configuration, activity, configurations done

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


def _words(text: str, known: tuple[str, ...], option: str) -> tuple[str, ...]:
    chosen = tuple(word.strip() for word in text.split(","))
    for word in chosen:
        if word not in known:
            raise typer.BadParameter(f"{word!r} is none of {', '.join(known)}.", param_hint=option)
    return tuple(dict.fromkeys(chosen))


def _thread_counts(text: str) -> tuple[int, ...]:
    counts = _words(text, tuple(map(str, range(1, CORES + 1))), "--threads")
    return tuple(map(int, counts))


def _writable(path: Path | None) -> Path | None:
    """Refuse, before minutes of measuring, a file that could not be written after them."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise typer.BadParameter(f"{path}: expected the name of a file in an existing folder.")
    return path


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
        typer.Option(callback=_writable, help="Write machine, medians and every time here."),
    ] = None,
) -> None:
    """Measure what was asked for; HELP is what the user reads."""
    cases = _words(case, (*CASES, STARTUP), "--case")
    contenders = _words(only, tuple(CONTENDERS), "--only")
    jobs = [
        Job(name, kind, count, contenders, seconds)
        for name in cases
        if name != STARTUP
        for kind in _words(dtype, DTYPES, "--dtype")
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
    for name, value in about.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        console.print(f"{name.replace('_', ' ')}: {text}", markup=False, highlight=False)
    load = os.getloadavg()[0]
    if load > BUSY:
        console.print(f"Programs are running already (load average {load:.1f}): expect noise.")
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
    with _progress(console, len(jobs) + bool(repeats)) as advance:
        for number, job in enumerate(jobs):
            done = _measure(job, _part(advance, job.title(), number))
            findings.measurements.append(done)
            findings.save()
            console.print(report.table(done))
        if repeats:
            findings.startup = measure_startup(repeats, _part(advance, STARTUP, len(jobs)))
            findings.save()
            console.print(report.startup_table(findings.startup))
    if jobs:
        for line in report.LEGEND:
            console.print(line, highlight=False, markup=False)


def _part(advance: Advance, title: str, number: int) -> Report:
    """The progress of one configuration, as progress of the whole."""
    return lambda what, fraction: advance(title, what, number + fraction)


def _measure(job: Job, progress: Report) -> Measurement:
    """The job, done in a process with empty kernel caches."""
    with tempfile.TemporaryDirectory(prefix="bnbx-benchmark-") as caches:
        environment = {
            "OMP_NUM_THREADS": str(job.threads),
            "BNBX_CACHE_DIR": f"{caches}/bnbx",
            "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor",
        }
        done: Measurement = call("benchmarks.worker", "measure", job, environment, progress)
        return done


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Advance]:
    """A bar over all configurations; where there is no terminal, a line for each of them."""
    if not (console.is_interactive and console.file.isatty()):
        began: set[str] = set()

        def say(title: str, _what: str, _done: float) -> None:
            if title not in began:
                console.print(f"{title} ...", highlight=False)
                began.add(title)

        yield say
        return
    columns = (BarColumn(bar_width=16), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda title, what, done: progress.update(
            task, description=f"{title}: {what}", completed=done
        )


if __name__ == "__main__":
    app()
