"""The picture of the trainings: validation loss against the step, a line a seed, a broad one mean.

The scale is set by where the runs start, as in `bnbx.demo.plot`. A line to a point far above it
would show a rise between validations as if it had been measured: so it ends in a cross instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from benchmarks.quality_report import Results, Summary, summaries
from bnbx.demo.plot import FOOTROOM, HEADROOM, TICKS
from bnbx.demo.progress import short_loss
from bnbx.demo.train import Result


@dataclass(frozen=True)
class Style:
    """How one run is drawn. The colors are Okabe and Ito's, told apart with any color vision."""

    color: str
    width: float
    dash: str


# Curves that nearly coincide are drawn one over the other, from broad to narrow.
STYLES = (
    Style("#56B4E9", 7.0, "-"),
    Style("#000000", 3.5, "--"),
    Style("#009E73", 1.8, "-"),
    Style("#D55E00", 1.8, "-."),
)


def draw(results: Results, path: Path, title: str) -> None:
    """Write the PNG. The figure is made without pyplot, which would keep global state."""
    figure = Figure(figsize=(9, 5.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    every = [result for found in results.values() for result in found]
    least = min(loss for r in every for loss in r.validation_losses if math.isfinite(loss))
    top = HEADROOM * max(result.validation_losses[0] for result in every)
    for summary, style in zip(summaries(results), STYLES, strict=False):
        _draw_run(axes, [r for r in every if r.key == summary.key], summary, style, top)
    axes.set_yscale("log")
    axes.set_ylim(FOOTROOM * least, top)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(FixedLocator(TICKS))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlim(left=0)
    axes.set_xlabel("training step", fontsize=12)
    axes.set_ylabel("validation loss (nats per byte)", fontsize=12)
    axes.set_title(title, fontsize=12, loc="left", pad=14)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=11, loc="upper right")
    figure.savefig(path, format="png")


def _draw_run(
    axes: Axes, found: Sequence[Result], summary: Summary, style: Style, top: float
) -> None:
    """Each seed thinly, with a cross where it left the scale, and their mean."""
    curves = [_below(result, top) for result in found]
    for result, losses in zip(found, curves, strict=True):
        steps = result.validation_steps[: len(losses)]
        axes.plot(steps, losses, color=style.color, linewidth=0.8, alpha=0.5)
        if result.diverged_at is not None or len(losses) < len(result.validation_losses):
            axes.plot(steps[-1:], losses[-1:], "x", color=style.color, markersize=9)
    shared = min(map(len, curves))
    axes.plot(
        found[0].validation_steps[:shared],
        [fmean(column) for column in zip(*(losses[:shared] for losses in curves), strict=True)],
        color=style.color,
        linewidth=style.width,
        linestyle=style.dash,
        label=(
            f"{summary.label}: {short_loss(summary.mean_loss)}, "
            f"{summary.state_bytes_per_parameter:.2f} bytes of state per parameter"
        ),
    )


def _below(result: Result, top: float) -> list[float]:
    """The validation losses up to the first that is off the scale."""
    return list(takewhile(lambda loss: loss <= top, result.validation_losses))
