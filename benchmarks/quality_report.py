"""Says how well the trainings ended: a table with every seed's loss, and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from bnbx.demo.progress import short_loss
from bnbx.demo.report import as_json
from bnbx.demo.settings import Settings
from bnbx.demo.train import Result

Results = Mapping[int, Sequence[Result]]  # by seed, those of its runs that have ended, in order


@dataclass(frozen=True)
class Summary:
    """One run over all seeds that it has ended with.

    Attributes:
        key: of the run.
        label: for people.
        losses: the validation loss after the last step, by seed; NaN where training diverged.
        differences: the same, less that of the first run with this seed.
        state_bytes_per_parameter: of the optimizer's state.
    """

    key: str
    label: str
    losses: dict[int, float]
    differences: dict[int, float]
    state_bytes_per_parameter: float

    @property
    def mean_loss(self) -> float:
        """Over the seeds; NaN if one of them diverged."""
        return fmean(self.losses.values())

    @property
    def mean_difference(self) -> float:
        """Of loss to the first run, over the seeds; NaN if one of them diverged."""
        return fmean(self.differences.values())


def summaries(results: Results) -> list[Summary]:
    """One for each run that has ended with any seed."""
    by_key: dict[str, dict[int, Result]] = {}
    for seed, found in results.items():
        for result in found:
            by_key.setdefault(result.key, {})[seed] = result
    first = {seed: found[0].validation_loss for seed, found in results.items() if found}
    return [_summary(of_seed, first) for of_seed in by_key.values()]


def _summary(of_seed: Mapping[int, Result], first: Mapping[int, float]) -> Summary:
    one = next(iter(of_seed.values()))
    losses = {seed: result.validation_loss for seed, result in of_seed.items()}
    return Summary(
        one.key,
        one.label,
        losses,
        {seed: loss - first[seed] for seed, loss in losses.items()},
        one.state_bytes_per_parameter,
    )


def table(results: Results) -> Table:
    """One column a run: the loss of each seed, their mean, and how far that is from 32 bits."""
    made = Table(
        title="Validation loss (nats per byte) after the last step",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    found = summaries(results)
    made.add_column("", no_wrap=True)
    for summary in found:
        made.add_column(summary.label, justify="right", max_width=16)
    for seed in results:
        losses = (summary.losses.get(seed) for summary in found)
        made.add_row(f"seed {seed}", *("" if loss is None else _loss(loss) for loss in losses))
    made.add_section()
    made.add_row("mean", *(_loss(s.mean_loss) for s in found))
    for what, of in (("difference", fmean), ("  least", min), ("  most", max)):
        cells = (_loss(_over(of, s.differences.values()), sign="+") for s in found[1:])
        made.add_row(what, "", *cells)
    made.add_row("state, B/param.", *(_bytes(s) for s in found))
    return made


def _over(of: Callable[[list[float]], float], values: Iterable[float]) -> float:
    """The mean, least or most of some values; NaN if one is."""
    found = list(values)
    return math.nan if any(map(math.isnan, found)) else of(found)


def _loss(loss: float, sign: str = "-") -> str:
    return short_loss(loss, sign) if math.isfinite(loss) else "diverged"


def _bytes(summary: Summary) -> str:
    return f"{summary.state_bytes_per_parameter:.2f}"


def diverged(results: Results) -> Iterator[str]:
    """A line for each training that ended early."""
    for seed, found in results.items():
        for result in found:
            if result.diverged_at is not None:
                where = f"the loss of step {result.diverged_at} is not finite"
                yield f"{result.label}, seed {seed}: {where}"


def write_json(path: Path, results: Results, settings: Settings) -> None:
    """Write everything so far: the summaries, and for each seed what the demo writes of a run.

    Null stands for a number that is not finite.
    """
    seeds = [
        json.loads(as_json(list(found), replace(settings, seed=seed)))
        for seed, found in results.items()
    ]
    report = {"summaries": [_summary_json(s) for s in summaries(results)], "seeds": seeds}
    text = json.dumps(report, indent=1, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _summary_json(summary: Summary) -> dict[str, Any]:
    found = asdict(summary)
    for name in ("losses", "differences"):
        found[name] = {seed: _finite(value) for seed, value in found[name].items()}
    return found | {
        "mean_loss": _finite(summary.mean_loss),
        "mean_difference": _finite(summary.mean_difference),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
