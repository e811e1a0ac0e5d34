"""What the runs measured, in words: the table, the line under it, and the JSON."""

from __future__ import annotations

import json
import math
import platform
from dataclasses import asdict
from typing import Any

import torch
from rich.table import Table

import bnbx
from bnbx.demo.progress import short_loss
from bnbx.demo.runs import LOW_BIT, REFERENCE, WARNING
from bnbx.demo.settings import Settings
from bnbx.demo.train import Result

NOISE = 0.05
"""Nats per byte. With the default settings and three seeds, default 8 bits ended between 0.010
below and 0.023 above 32 bits; a gap of twice that is no accident of rounding."""

HEADINGS = (
    "validation\nloss\n(nats/byte)",
    "optimizer\nstate\n(bytes)",
    "bytes\nper\nparam.",
    "step\n(ms)\n",
    "first\nstep\n(ms)",
)

CAUSE = "its evenly spaced codes round small second moments to zero"


def table(results: list[Result]) -> Table:
    """One row a run, narrow enough for 80 columns."""
    rows = Table()
    rows.add_column("optimizer", no_wrap=True)
    for heading in HEADINGS:
        rows.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        rows.add_row(
            result.label,
            short_loss(result.validation_loss),
            f"{result.state_bytes:,}",
            f"{result.state_bytes_per_parameter:.2f}",
            _milliseconds(result.step_ms, 2),
            _milliseconds(result.first_step_ms, 1),
        )
    return rows


def verdict(results: list[Result]) -> str:
    """What linear8 did in these runs, beside 32 bits and the default 8 bits."""
    by_key = {result.key: result for result in results}
    linear = by_key[WARNING.key]
    if linear.diverged_at is not None:
        return (
            f"Warning: with linear8 states the loss stopped being finite at step "
            f"{linear.diverged_at}; {CAUSE}."
        )
    reference = by_key[REFERENCE.key].validation_loss
    gap = linear.validation_loss - reference
    seen = (
        f"{short_loss(gap, sign='+')} nats/byte against 32 bits (default 8 bits: "
        f"{short_loss(by_key[LOW_BIT.key].validation_loss - reference, sign='+')})"
    )
    if gap > NOISE:
        return f"Warning: linear8 states trained worse, {seen}; {CAUSE}."
    return f"linear8 states kept up in this short run, {seen}, although {CAUSE}."


def as_json(results: list[Result], settings: Settings) -> str:
    """Settings, versions and every measurement; null stands for a number that is not finite."""
    return json_text(settings, {"runs": [_run_json(result) for result in results]})


def json_text(settings: Settings, measured: dict[str, Any]) -> str:
    """JSON of measurements, with what they were made with."""
    report = {
        "settings": asdict(settings),
        "versions": {
            "bnbx": bnbx.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "threads": torch.get_num_threads(),
        **measured,
    }
    return json.dumps(_finite(report), indent=2, allow_nan=False) + "\n"


def _run_json(result: Result) -> dict[str, Any]:
    derived = ("validation_loss", "state_bytes_per_parameter", "step_ms", "first_step_ms")
    return asdict(result) | {name: getattr(result, name) for name in derived}


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _milliseconds(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}" if math.isfinite(value) else "-"
