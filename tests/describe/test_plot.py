"""Pictures of quant types: what they draw is right, and they are drawn for every type."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from bnbx.cli import MOST_PLOTTED
from bnbx.describe import plot
from bnbx.describe.facts import facts_of
from bnbx.quant_types.dynamic8 import dynamic8
from bnbx.quant_types.fp8_e4m3 import fp8_e4m3
from bnbx.quant_types.int8 import int8
from bnbx.quant_types.nf4 import nf4
from bnbx.registry import quant_types


def test_relative_errors_are_those_of_the_nearest_numbers() -> None:
    magnitudes = np.geomspace(1e-4, 1, 500)
    for found in (nf4, int8, fp8_e4m3, dynamic8):
        codebook = found.codebook(signed=True)
        errors = plot.relative_errors(codebook, magnitudes)
        table = np.array([codebook.levels[code] for code in codebook.codes])
        for row, sign in zip(errors, (1, -1), strict=True):
            nearest = np.abs(sign * magnitudes[:, None] - table).min(1)
            assert np.allclose(row, nearest / magnitudes, rtol=1e-4, atol=1e-6)


def test_a_running_mean_over_an_octave() -> None:
    errors = np.full(plot.POINTS, 0.25)
    assert np.allclose(plot.over_octaves(errors, 1e-4), 0.25)
    low = 2.0**-8
    errors = np.linspace(-8, 0, plot.POINTS)  # the logarithm of the magnitude
    mean = plot.over_octaves(errors, low)
    inner = slice(plot.POINTS // 8, -plot.POINTS // 8)
    assert np.allclose(mean[inner], errors[inner], atol=1e-3)
    assert mean[0] == pytest.approx(-7.75, abs=0.01)
    assert mean[-1] == pytest.approx(-0.25, abs=0.01)


def test_there_are_as_many_colors_as_types_in_a_picture() -> None:
    assert len(set(plot.COLORS)) == len(plot.COLORS) == MOST_PLOTTED


@pytest.mark.parametrize("names", [quant_types().names()[:8], ("dynamic8",)])
def test_pictures_are_drawn(names: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    plot.draw([facts_of(name) for name in names], path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    assert width == 1500
    assert height == int(150 * (4.4 + 0.62 * len(names) + 0.9))
    assert len(data) > 50_000


def test_gray_is_how_often_weights_lie_there() -> None:
    place, density = plot._density(facts_of("nf4"))
    assert density.max() == 1
    assert density.min() >= 0
    assert abs(place[density.argmax()]) < 0.1
    rows = plot._density(facts_of("int8"))[1]
    assert rows.shape == density.shape
    assert rows.sum() < density.sum()  # a row's absmax is larger, so most lie nearer to zero
