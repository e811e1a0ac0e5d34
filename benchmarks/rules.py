"""Times every rule of bnbx in every width, beside torch's fused AdamW and the peers.

This is the command line: `python benchmarks/rules.py`. README.md in this folder says how the
timing is done, and what the columns mean.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine, rule_report
from benchmarks.command import INTERRUPTED, introduce, part, progress, words, writable
from benchmarks.contenders import CONTENDERS
from benchmarks.process import ProcessError, Report, call
from benchmarks.results import count
from benchmarks.rule_contenders import MOMENTUM, contenders, rules, widths
from benchmarks.rule_results import RuleJob, RuleMeasurement

CORES = os.cpu_count() or 1
DTYPES = ("float32", "bfloat16", "float16")
LEAST_NUMEL = 4096
"""The smallest tensor whose states bnbx and its peers quantize."""
OVERHEAD_S = 10.0
"""Of a rule: starting a process, importing the libraries, filling the tensors."""
COMPILE_S = 4.0
"""Of a kernel of bnbx that is not in its cache."""
TORCHAO_S = 15.0
"""Of an optimizer of torchao, which torch.compile takes 10 to 20 seconds for."""

HELP = """Time every rule in every width: bnbx, with torch's fused AdamW and the peers beside it.

A rule has a process of its own, in which all step copies of one vector with the same gradients, in
turns. A peer that lacks the rule, is not installed or fails costs a dash and a line that says so.

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
    measurements: list[RuleMeasurement] = field(default_factory=list)

    def add(self, measurement: RuleMeasurement) -> None:
        """Take in a rule, and write the JSON if it was asked for."""
        self.measurements.append(measurement)
        if self.path is not None:
            rule_report.write_json(self.path, self.machine, self.measurements)


@app.command(help=HELP)
def main(
    chosen: Annotated[
        str | None, typer.Option("--rules", metavar="LIST", help="Which rules; default: all.")
    ] = None,
    bits: Annotated[
        str | None, typer.Option(metavar="LIST", help="Widths of states; default: all.")
    ] = None,
    only: Annotated[
        str, typer.Option(metavar="LIST", help="Which libraries; ratios need torch among them.")
    ] = ",".join(CONTENDERS),
    dtype: Annotated[str, typer.Option(help=f"Of the parameter: {', '.join(DTYPES)}.")] = DTYPES[0],
    threads: Annotated[int, typer.Option(min=1, max=CORES, help="Of every library.")] = 1,
    numel: Annotated[
        int, typer.Option(min=LEAST_NUMEL, help="Elements of the vector that is stepped.")
    ] = 1 << 24,
    seconds: Annotated[float, typer.Option(min=0.01, help="For the rounds of each rule.")] = 10.0,
    json: Annotated[
        Path | None,
        typer.Option(callback=writable, help="Write machine, medians and every time here."),
    ] = None,
) -> None:
    """Measure what was asked for; HELP is what the user reads."""
    names = rules() if chosen is None else words(chosen, rules(), "--rules")
    known = tuple(map(str, widths()))
    wanted = tuple(map(int, known if bits is None else words(bits, known, "--bits")))
    libraries = words(only, tuple(CONTENDERS), "--only")
    (kind,) = words(dtype, DTYPES, "--dtype")
    jobs = [RuleJob(name, wanted, libraries, kind, threads, numel, seconds) for name in names]
    console = Console()
    findings = Findings(json, machine.describe())
    introduce(console, findings.machine)
    console.print(_announcement(jobs), highlight=False)
    try:
        _run(console, findings, jobs)
    except ProcessError as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("Interrupted.")
        raise typer.Exit(INTERRUPTED) from None
    finally:
        _conclude(console, findings)
    if any(m.failures() for m in findings.measurements):
        raise typer.Exit(1)


def _announcement(jobs: list[RuleJob]) -> str:
    """How long this will take, and what part of it is not ours to shorten."""
    compiled = sum(
        key.startswith("torchao-") and contender.installed()
        for job in jobs
        for key, contender in contenders(job.rule, job.bits, job.only).items()
    )
    total = sum(job.seconds + OVERHEAD_S + COMPILE_S * len(job.bits) for job in jobs)
    total += compiled * TORCHAO_S
    text = (
        f"{count(len(jobs), 'rule')}: up to about {total / 60:.1f} minutes, less where kernels are "
        f"in the cache. Rules with a momentum run with {MOMENTUM}."
    )
    if compiled:
        text += (
            f"\n{compiled * TORCHAO_S / 60:.1f} of these minutes are for torchao, whose "
            f"{count(compiled, 'optimizer')} torch.compile takes 10 to 20 seconds each for: "
            "--only bnbx,torch,bitsandbytes leaves them out."
        )
    return text


def _run(console: Console, findings: Findings, jobs: list[RuleJob]) -> None:
    with progress(console, len(jobs)) as advance:
        for number, job in enumerate(jobs):
            findings.add(_measure(job, part(advance, job.rule, number)))
            console.print(rule_report.summary(findings.measurements[-1]), highlight=False)


def _measure(job: RuleJob, tell: Report) -> RuleMeasurement:
    """The job, done in a process whose thread count holds in every library."""
    environment = {"OMP_NUM_THREADS": str(job.threads)}
    done: RuleMeasurement = call("benchmarks.rule_worker", "measure_rule", job, environment, tell)
    return done


def _conclude(console: Console, findings: Findings) -> None:
    """The tables of what was measured, however far it came."""
    measurements = findings.measurements
    if not measurements:
        return
    for table in rule_report.tables(measurements):
        console.print(table)
    for lines in (
        rule_report.legend(),
        rule_report.problems(measurements),
        rule_report.verdicts(measurements),
    ):
        for line in lines:
            console.print(line, highlight=False, markup=False)
    if findings.path is not None:
        console.print(f"Results: {findings.path}", soft_wrap=True, markup=False)


if __name__ == "__main__":
    app()
