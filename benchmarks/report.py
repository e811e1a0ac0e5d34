"""Says what was measured: a table for each configuration, one for the startup, and JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks.contenders import CONTENDERS, REFERENCE
from benchmarks.results import KERNEL_TOTAL, Measurement, Row, Startup, count, middle_half

HEADINGS = (
    "n",
    "median\nms",
    "min\nms",
    "ns per\nparam.",
    "times\ntorch",
    "middle\nhalf",
    "first\nstep s",
    "state\nB/param.",
)
LEGEND = (
    "bnbx, bitsandbytes, torchao: 8-bit states. torch fused: states of the parameters' dtype.",
    "n: rounds that it ran in; /k: it is slow and ran in every k-th round.",
    "times torch: median, over the rounds that both ran in, of its time over torch's.",
    "middle half: quartiles of the same.",
    "first step: with empty caches, so with compilation; it is in no other column.",
    "state: bytes of optimizer state per parameter.",
)


def table(measurement: Measurement) -> Table:
    """One row a contender; one that could not run has the reason in place of figures."""
    title = (
        f"{measurement.job.title()} ({count(measurement.tensors, 'tensor')}, "
        f"{count(measurement.parameters, 'parameter')})"
    )
    # Narrow enough for 80 columns, however slow a contender is.
    made = Table(
        title=title,
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
        min_width=len(title),
    )
    made.add_column("AdamW", overflow="fold")
    for heading in HEADINGS:
        made.add_column(heading, justify="right", no_wrap=True)
    for row in measurement.rows:
        label = CONTENDERS[row.key].label
        if row.problem is None:
            made.add_row(label, *_figures(measurement, row))
        else:
            made.add_row(f"{label}\n{row.problem}", *"-" * len(HEADINGS))
    return made


def _figures(measurement: Measurement, row: Row) -> tuple[str, ...]:
    ratios = measurement.ratios(row, REFERENCE)
    return (
        f"{len(row.times)}" + (f" /{row.period}" if row.period > 1 else ""),
        three_digits(row.median_s * 1e3),
        three_digits(row.min_s * 1e3),
        f"{row.median_s * 1e9 / measurement.parameters:.2f}",
        three_digits(median(ratios)) if ratios else "-",
        "-".join(map(three_digits, middle_half(ratios))) if ratios else "-",
        f"{row.first_step_s:.2f}",
        f"{row.state_bytes / measurement.parameters:.2f}",
    )


def three_digits(value: float) -> str:
    """Three digits or more: the machine is not steady enough for the fourth."""
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def startup_table(startup: Startup) -> Table:
    """Milliseconds of imports and of making a kernel, and of the parts of the latter."""
    made = Table(title="startup", title_justify="left", box=SIMPLE_HEAD, padding=0, pad_edge=False)
    made.add_column("what", overflow="fold")
    for heading in ("n", "median ms", "min ms"):
        made.add_column(heading, justify="right", no_wrap=True)
    for what, seconds in startup.imports.items():
        _startup_row(made, what, seconds)
    plain, with_bnbx = (median(seconds) for seconds in startup.imports.values())
    made.add_row("  bnbx's part: the difference", "", f"{(with_bnbx - plain) * 1e3:.1f}", "")
    _kernel_rows(made, "a kernel, compiled (empty cache)", startup.compile)
    _kernel_rows(made, "a kernel, loaded from the cache", startup.load)
    return made


def _kernel_rows(made: Table, title: str, parts: dict[str, list[float]]) -> None:
    made.add_section()
    _startup_row(made, title, parts[KERNEL_TOTAL])
    for part, seconds in parts.items():
        if part != KERNEL_TOTAL:
            _startup_row(made, f"  {part}", seconds)


def _startup_row(made: Table, what: str, seconds: list[float]) -> None:
    made.add_row(
        what, str(len(seconds)), f"{median(seconds) * 1e3:.1f}", f"{min(seconds) * 1e3:.1f}"
    )


def write_json(
    path: Path,
    machine: dict[str, object],
    measurements: list[Measurement],
    startup: Startup | None,
) -> None:
    """Write everything measured so far: the machine, every single time, and the medians."""
    report = {
        "machine": machine,
        "measurements": [_measurement_json(measurement) for measurement in measurements],
        "startup": asdict(startup) if startup else None,
    }
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _measurement_json(measurement: Measurement) -> dict[str, Any]:
    rows = [row_json(row, measurement.ratios(row, REFERENCE)) for row in measurement.rows]
    return asdict(measurement) | {"rows": rows}


def row_json(row: Row, ratios: list[float]) -> dict[str, Any]:
    """A row with its medians. Times become two lists, since JSON has no numbers as keys."""
    found = asdict(row)
    del found["times"]
    if row.problem is not None:
        return found
    return found | {
        "median_s": row.median_s,
        "min_s": row.min_s,
        "ratio_to_torch": median(ratios) if ratios else None,
        "rounds": list(row.times),
        "seconds": list(row.times.values()),
    }
