"""`bnbx plot`: where the numbers of quant types lie, and how far data are from them: a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from bnbx.describe.data import LABELS, data_sets
from bnbx.describe.facts import Facts
from bnbx.describe.text import percent, short
from bnbx.registry.quant_type import Codebook

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A7A00")
"""Those of Okabe and Ito, told apart with any color vision, the darker ones first."""
MOST_TYPES = len(COLORS)

GRAY = "#777777"
POINTS = 8192
SMALLEST_SHOWN = 1e-8
F64 = npt.NDArray[np.float64]


def draw(types: Sequence[Facts], path: Path) -> None:
    """Write the PNG: one type by itself, or up to MOST_TYPES side by side."""
    rows = 0.62 * len(types) + 0.9
    layout = ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12)
    figure = Figure(figsize=(10, 4.4 + rows), dpi=150, layout=layout)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=(rows, 3.9), width_ratios=(1.35, 1))
    _draw_levels(figure.add_subplot(grid[0, :]), types)
    _draw_relative(figure.add_subplot(grid[1, 0]), types)
    _draw_errors(figure.add_subplot(grid[1, 1]), types)
    names = ", ".join(facts.spec.name for facts in types)
    title = f"{names}: {types[0].spec.summary}" if len(types) == 1 else names
    figure.suptitle(title, x=0.012, ha="left", fontsize=14, fontweight="bold")
    figure.savefig(path, format="png")


def relative_errors(codebook: Codebook, magnitudes: F64) -> F64:
    """How far magnitudes (n,), over absmax, are from what they read as, over themselves: (2, n).

    The first row is for positive numbers, the second for negative ones.
    """
    levels = np.array([codebook.levels[code] for code in codebook.codes])
    thresholds = np.array(codebook.thresholds) / codebook.unit
    signed = np.stack([magnitudes, -magnitudes])
    read = levels[np.searchsorted(thresholds, signed, side="left")]
    return np.asarray(np.abs(read - signed) / magnitudes, np.float64)


def over_octaves(errors: F64, low: float) -> F64:
    """Running mean over a factor of two, of errors at POINTS magnitudes from `low` to 1."""
    half = round(POINTS * math.log(2) / math.log(1 / low) / 2)
    total = np.concatenate([[0.0], np.cumsum(errors)])
    places = np.arange(len(errors))
    start, end = np.maximum(places - half, 0), np.minimum(places + half + 1, len(errors))
    return np.asarray((total[end] - total[start]) / (end - start), np.float64)


# ---- panels


def _draw_levels(axes: Axes, types: Sequence[Facts]) -> None:
    for row, (facts, color) in enumerate(zip(types, COLORS, strict=False)):
        base = -row
        place, density = _density(facts)
        axes.fill_between(place, base, base + 0.8 * density, color="#DDDDDD", linewidth=0)
        levels = [x.level for x in facts.levels if x.written and x.level is not None]
        width = 1.8 if len(levels) <= 40 else 1.0 if len(levels) <= 80 else 0.5
        alpha = 1.0 if len(levels) <= 80 else 0.75
        axes.vlines(levels, base, base + 0.62, color=color, linewidth=width, alpha=alpha)
    axes.set_ylim(-len(types) + 0.92, 0.95)
    axes.set_xlim(-1.03, 1.03)
    axes.set_yticks(
        [0.3 - row for row in range(len(types))],
        [f"{f.spec.name}\n{short(f.bits_per_element)} bits" for f in types],
        fontsize=11,
    )
    for label, color in zip(axes.get_yticklabels(), COLORS, strict=False):
        label.set_color(color)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    _title(axes, "Numbers", "over a block's absmax; gray: how often trained weights lie there")


def _draw_relative(axes: Axes, types: Sequence[Facts]) -> None:
    least = min(facts.smallest for facts in types) / 4
    low = max(10.0 ** math.floor(math.log10(least)), SMALLEST_SHOWN)
    magnitudes = np.geomspace(low, 1, POINTS)
    bottom = 1.0
    for row, (facts, color) in enumerate(zip(types, COLORS, strict=False)):
        each = relative_errors(facts.encoding.codebook, magnitudes)
        mean = over_octaves(each.mean(0), low)
        bottom = min(bottom, float(mean.min()))
        if len(types) == 1:
            bottom /= 4
            for sign, dash, label in zip(each, ("-", ":"), ("positive", "negative"), strict=True):
                axes.plot(
                    magnitudes, sign, dash, color=color, linewidth=0.9, alpha=0.6, label=label
                )
        label = "mean over an octave" if len(types) == 1 else facts.spec.name
        width = 2.2 if len(types) == 1 else 3.2 - 0.25 * row  # a curve that covers another
        axes.plot(magnitudes, mean, color=color, linewidth=width, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, 1)
    axes.set_ylim(10 ** math.floor(math.log10(bottom)), 2)
    axes.xaxis.set_major_locator(LogLocator(numticks=9))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g} %"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("magnitude, over the block's absmax", fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    alone = len(types) == 1
    what = "of a number of this magnitude" if alone else "by magnitude, the mean over an octave"
    _title(axes, "Relative error", what)
    axes.legend(
        fontsize=10,
        loc="lower left",
        ncols=1 + (len(types) > 4),
        edgecolor="none",
        framealpha=0.85,
    )


def _draw_errors(axes: Axes, types: Sequence[Facts]) -> None:
    height = 0.78 / len(types)
    most = max(error.rms for facts in types for error in facts.errors.values())
    for row, (facts, color) in enumerate(zip(types, COLORS, strict=False)):
        for group, error in enumerate(facts.errors.values()):
            place = group + (row - (len(types) - 1) / 2) * height
            axes.barh(place, error.rms, height * 0.9, color=color)
            size = 10.5 if len(types) < 5 else 8
            axes.text(
                error.rms + 0.015 * most,
                place,
                percent(error.rms),
                va="center",
                fontsize=size,
                color=color,
            )
    axes.set_yticks(range(len(LABELS)), [LABELS[key] for key in types[0].errors], fontsize=11)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.24 * most)
    axes.xaxis.set_major_locator(NullLocator())
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    _title(axes, "Error on data", "root mean square, as a share of the data's own")


def _title(axes: Axes, title: str, rest: str) -> None:
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=22)
    axes.text(
        0, 1, rest, transform=axes.transAxes, fontsize=10, color=GRAY, va="bottom", ha="left"
    ).set_y(1.02)


def _density(facts: Facts) -> tuple[F64, F64]:
    """Where trained weights lie over their absmax: places, and how often, over the most."""
    x = data_sets()["weights"].numpy().astype(np.float64)
    size = facts.encoding.block_size
    rows = x.reshape(-1, size) if size and x.size % size == 0 else x
    scaled = (rows / np.abs(rows).max(1, keepdims=True)).ravel()
    counts, edges = np.histogram(scaled[np.abs(scaled) < 1], bins=80, range=(-1, 1))
    return (edges[:-1] + edges[1:]) / 2, counts / counts.max()
