"""The picture: validation loss and smoothed training loss of each run against the step.

A run with linear states can blow up by ten orders of magnitude. The scale is therefore set by
where the runs start, and a run that leaves it is marked where it goes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from bnbx.demo.progress import short_loss
from bnbx.demo.train import Result

SMOOTHING = 0.9
"""Weight of the past in the running mean of the training loss."""

HEADROOM = 1.2
"""The top of the scale, as a multiple of the loss before training."""

FOOTROOM = 0.85
"""The bottom of the scale, as a multiple of the lowest validation loss."""


TICKS = (0.5, 1, 1.5, 2, 2.5, 3, 4, 5, 6)
FINE_TICKS = tuple(0.2 * i for i in range(1, 40))
"""Where the scale spans less than an octave or so."""

WIDE = 2.5


@dataclass(frozen=True)
class Style:
    """How one run is drawn. The colors are Okabe and Ito's, told apart with any color vision."""

    color: str
    width: float
    marker: str
    dash: str


# The first two curves nearly coincide: a broad one, and a narrow dashed one drawn over it.
STYLES = (
    Style("#56B4E9", 6.0, "", "-"),
    Style("#000000", 1.6, "o", "--"),
    Style("#D55E00", 2.2, "^", "-"),
)


def draw(results: list[Result], path: Path, title: str) -> None:
    """Write the PNG of runs with different optimizers."""
    notes = [f"{r.state_bytes_per_parameter:.2f} bytes of state per parameter" for r in results]
    draw_runs(results, notes, path, title)


def draw_runs(results: Sequence[Result], notes: Sequence[str], path: Path, title: str) -> None:
    """Write the PNG, with a note on each run in the legend.

    The figure is made without pyplot, which would keep global state.
    """
    figure = Figure(figsize=(9, 5.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    bottom = FOOTROOM * min(min(result.validation_losses) for result in results)
    top = HEADROOM * max(result.validation_losses[0] for result in results)
    for result, style, note in zip(results, STYLES, notes, strict=False):
        _draw_run(axes, result, style, top, note)
    for result, style in zip(results, STYLES, strict=False):
        _mark_exit(axes, result, style, top)
    axes.set_yscale("log")
    axes.set_ylim(bottom, top)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(FixedLocator(TICKS if top / bottom > WIDE else FINE_TICKS))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlim(left=0)
    axes.set_xlabel("training step", fontsize=12)
    axes.set_ylabel("loss (nats per byte)", fontsize=12)
    axes.set_title(title, fontsize=12, loc="left", pad=14)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        title="Validation loss (thin: training loss, smoothed)",
        frameon=False,
        fontsize=11,
        title_fontsize=11,
        alignment="left",
        loc="upper right",
        bbox_to_anchor=(1.0, 0.93),
    )
    figure.savefig(path, format="png")


def smoothed(losses: list[float]) -> list[float]:
    """Running mean that starts at the first loss, without a pull toward zero."""
    means: list[float] = []
    total, weight = 0.0, 0.0
    for loss in losses:
        total = SMOOTHING * total + (1 - SMOOTHING) * loss
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        means.append(total / weight)
    return means


def _draw_run(axes: Axes, result: Result, style: Style, top: float, note: str) -> None:
    pairs = zip(result.validation_steps, result.validation_losses, strict=True)
    # A line to a point far above the scale would show a rise between validations as if measured.
    steps, losses = zip(*(pair for pair in pairs if pair[1] <= top), strict=True)
    finite = [loss for loss in result.train_losses if math.isfinite(loss)]
    axes.plot(
        range(len(finite)),
        smoothed(finite),
        color=style.color,
        linewidth=style.width / 2,
        alpha=0.5,
    )
    axes.plot(
        steps,
        losses,
        color=style.color,
        linewidth=style.width,
        linestyle=style.dash,
        marker=style.marker,
        label=f"{result.label}: {short_loss(result.validation_loss)}, {note}",
    )


def _mark_exit(axes: Axes, result: Result, style: Style, top: float) -> None:
    """A marker and a note where the training loss, smoothed as drawn, leaves the scale."""
    curve = smoothed(result.train_losses)
    step = next((step for step, loss in enumerate(curve) if not loss <= top), None)
    if step is None:
        return
    ending = "" if result.diverged_at is None else f", not finite at step {result.diverged_at}"
    late = step > axes.dataLim.xmax / 2
    axes.annotate(
        f"{result.label}: off the scale at step {step}{ending}",
        xy=(step, top),
        xytext=(-14 if late else 14, -4),
        textcoords="offset points",
        horizontalalignment="right" if late else "left",
        verticalalignment="top",
        color=style.color,
        fontsize=11,
    )
    axes.plot([step], [top], marker=style.marker, markersize=11, color=style.color, clip_on=False)
