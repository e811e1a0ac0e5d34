"""What every registered type keeps to, whoever registered it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bnbx.errors import OptionError, SpecError
from bnbx.kernels import coding_reference
from bnbx.kernels.encoding import Encoding, make_encoding
from bnbx.kernels.packing import unpack
from bnbx.registry import QuantType, quant_types
from bnbx.registry.grid import float32, grid_threshold, index_of, point
from bnbx.registry.quant_type import BLOCK_SIZES, Codebook, Scale, next_below

EVERY = list(quant_types())
BOTH = [
    pytest.param(found, signed, id=f"{found.name}-{'signed' if signed else 'unsigned'}")
    for found in EVERY
    for signed in (True, False)
    if signed or found.unsigned_values is not None
]
PER_BLOCK = [found for found in EVERY if found.scale.per == "block"]
WITHOUT_ZERO = {"state4-unsigned", "dynamic8_grid-signed", "dynamic8_grid-unsigned"}


def codes_of(encoding: Encoding, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    parts = coding_reference.encode(encoding, x)
    columns = x.shape[-1] if encoding.per == "row" else x.numel()
    packed = parts[0].view(x.shape[0], -1) if encoding.per == "row" else parts[0].view(-1)
    return unpack(packed, encoding.quant_type, columns).view(-1), parts


def decode(encoding: Encoding, parts: list[Tensor], x: Tensor) -> Tensor:
    return coding_reference.decode(encoding, parts, x.shape, torch.float32)


@pytest.mark.parametrize("found", EVERY, ids=lambda t: t.name)
def test_a_type_says_where_it_comes_from(found: QuantType) -> None:
    assert found.source
    assert found.summary
    assert QuantType.from_json(found.to_json()) == found


@pytest.mark.parametrize(("found", "signed"), BOTH)
def test_tables_are_whole_and_thresholds_lie_between_neighbors(
    found: QuantType, signed: bool
) -> None:
    codebook = found.codebook(signed=signed)
    assert len(codebook.values) == 2**found.bits
    written = np.array([codebook.values[code] for code in codebook.codes], np.float64)
    assert (np.diff(written) >= 0).all()
    assert len(codebook.thresholds) == len(codebook.codes) - 1
    assert (np.diff(codebook.thresholds) > 0).all()
    assert np.abs(written).max() <= found.unit
    assert np.abs(written).max() >= 0.9 * found.unit
    assert signed or written.min() >= 0
    if not found.grid:
        assert (written[:-1] <= np.array(codebook.thresholds)).all()
        assert (np.array(codebook.thresholds) <= written[1:]).all()


@pytest.mark.parametrize(("found", "signed"), BOTH)
def test_zero_is_exact_where_it_is_said_to_be(found: QuantType, signed: bool) -> None:
    codebook = found.codebook(signed=signed)
    name = f"{found.name}-{'signed' if signed else 'unsigned'}"
    assert (codebook.values[codebook.zero_code] == 0) is (name not in WITHOUT_ZERO)


@pytest.mark.parametrize(("found", "signed"), BOTH)
def test_every_number_that_is_written_comes_back(found: QuantType, signed: bool) -> None:
    """Whole blocks of each number beside the largest, so that the scale is a power of two."""
    encoding = make_encoding(found, signed=signed)
    codebook = encoding.codebook
    size = encoding.block_size or 128
    written = [code for code in codebook.codes if codebook.values[code] is not None]
    numbers = torch.tensor([codebook.values[code] for code in written], dtype=torch.float32)
    x = torch.zeros(len(numbers), size)
    x[:, 0] = found.unit
    x[:, 1::2] = numbers[:, None]
    if found.scale.centered:
        x[:, 2] = -found.unit
    codes, parts = codes_of(encoding, x)
    codes, read = codes.view_as(x), decode(encoding, parts, x)
    values = np.array([math.nan if v is None else v for v in codebook.values])
    kept = torch.from_numpy(values[codes.numpy()])[:, 1::2]
    if found.grid:  # rounded to a point first, so it may become a neighbor of what it was
        assert (kept - numbers[:, None]).abs().max() <= 2 / found.grid
        return
    assert torch.equal(kept, numbers[:, None].double().expand_as(kept))
    assert torch.allclose(read[:, 1::2], numbers[:, None].expand_as(kept), rtol=1e-6)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("found", PER_BLOCK, ids=lambda t: t.name)
def test_every_block_size(found: QuantType, block_size: int) -> None:
    """Sizes of parts, and an error within half of the widest gap; the last block is shorter."""
    encoding = make_encoding(found, block_size)
    count = 2 * block_size + 5
    generator = torch.Generator().manual_seed(block_size)
    x = torch.randn(count, generator=generator)
    codes, parts = codes_of(encoding, x)
    assert codes.numel() == count
    sizes = [size for size, _ in encoding.shapes((count,)).values()]
    assert [tuple(part.shape) for part in parts] == sizes
    read = decode(encoding, parts, x)
    levels = np.array([encoding.codebook.levels[code] for code in encoding.codebook.codes])
    worst = max(np.diff(levels).max() / 2, 1 - levels.max(), 1 + levels.min()) + 2e-5
    if found.scale.dtype == "e4m3":  # scales are off by up to 1/16
        worst *= 1.07
    if found.scale.dtype == "e8m0":  # absmax lies between a power of two, and twice that
        power = 2.0 ** math.floor(math.log2(found.unit))
        worst = max(worst * found.unit / power, 1 - found.unit / (2 * power))
    for begin in range(0, count, block_size):
        block = x[begin : begin + block_size]
        room = block.max() - block.min() if found.scale.centered else block.abs().max()
        assert (read[begin : begin + block_size] - block).abs().max() <= worst * room


@pytest.mark.parametrize("found", EVERY, ids=lambda t: t.name)
def test_codes_ascend_with_numbers(found: QuantType) -> None:
    encoding = make_encoding(found)
    x = torch.linspace(-1, 1, encoding.block_size or 4096).view(1, -1)
    _, parts = codes_of(encoding, x)
    read = decode(encoding, parts, x)
    assert (read.diff() >= 0).all()


@pytest.mark.parametrize("found", EVERY, ids=lambda t: t.name)
def test_a_scale_of_its_own(found: QuantType) -> None:
    """Numbers times a power of two have the same codes."""
    encoding = make_encoding(found)
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(1))
    codes, _ = codes_of(encoding, x)
    for power in (-20.0, -4.0, 5.0, 30.0):
        assert torch.equal(codes_of(encoding, x * 2**power)[0], codes), power


@pytest.mark.parametrize("found", EVERY, ids=lambda t: t.name)
def test_zeros_stay_zeros(found: QuantType) -> None:
    encoding = make_encoding(found)
    x = torch.zeros(3, 100)
    _, parts = codes_of(encoding, x)
    assert torch.equal(decode(encoding, parts, x), x)


@pytest.mark.parametrize("found", EVERY, ids=lambda t: t.name)
def test_tiny_and_huge_numbers_stay_finite(found: QuantType) -> None:
    encoding = make_encoding(found)
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(2))
    x[0] = 1.0
    for scale in (1e-45, 1e-40, 1e-38, 1e-37, 1e-36, 1e-34, 1e-30, 1e37):
        y = x * scale
        _, parts = codes_of(encoding, y)
        read = decode(encoding, parts, y)
        assert read.isfinite().all()
        # What lies below the largest number of a table may be rounded up: 5 to 6, at most.
        assert float(read.abs().max()) <= 1.21 * float(y.abs().max()) + 1e-37
        if scale >= 1e-30:
            assert float((read - y).abs().max()) <= 0.52 * float(y.abs().max())


@pytest.mark.parametrize("found", [t for t in EVERY if t not in PER_BLOCK], ids=lambda t: t.name)
def test_types_without_blocks_refuse_a_block_size(found: QuantType) -> None:
    with pytest.raises(OptionError, match="block_size is for types with a scale per block"):
        make_encoding(found, 64)


# ---- small numbers in large units


@pytest.mark.parametrize("name", ["int8", "int8_block", "fp8_e5m2"])
@pytest.mark.parametrize("scale", [1e-37, 3e-36, 1e-35])
def test_the_inverse_of_a_small_absmax_may_not_overflow(name: str, scale: float) -> None:
    """127 / 1e-37 is beyond float32: a larger absmax is kept then, so what is read is right."""
    encoding = make_encoding(name)
    x = torch.linspace(-1, 1, 128).view(1, -1) * scale
    _, parts = codes_of(encoding, x)
    read = decode(encoding, parts, x)
    step = encoding.codebook.unit * 1e-38 / (100 if name == "fp8_e5m2" else 127)
    assert float((read - x).abs().max()) <= max(step, 0.13 * scale)


# ---- the grid


@pytest.mark.parametrize("points", [2, 3, 16, 257, 65_536])
def test_thresholds_on_a_grid_are_where_the_code_changes(points: int) -> None:
    """By trying both sides of each: the point of the number, and the code of the point."""
    values = (-1.0, -0.25, 0.0, 0.3125, 0.5, 0.75, 0.875, 1.0)
    codebook = Codebook(values, grid=points)
    table = np.array(values)

    def code_of(x: float) -> int:
        place = np.float32(np.float32(np.float32(x) + np.float32(1)) * np.float32((points - 1) / 2))
        index = min(max(math.floor(float(place) + 0.5), 0), points - 1)
        assert index == index_of(x, points)
        return int(np.abs(point(index, points) - table).argmin())

    for rank, threshold in enumerate(codebook.thresholds):
        above = float(np.nextafter(np.float32(threshold), np.float32(3)))
        assert code_of(threshold) == codebook.codes[rank]
        assert code_of(above) == codebook.codes[rank + 1]
    grid = [float(x) for x in np.linspace(-1, 1, 999, dtype=np.float32)]
    assert {code_of(x) for x in grid} <= set(codebook.codes)


def test_points_are_evenly_spaced_from_end_to_end() -> None:
    points = [point(index, 65_536) for index in range(65_536)]
    assert points[0] == -1
    assert points[-1] == 1
    assert points == sorted(points)
    assert all(index_of(point(i, 65_536), 65_536) == i for i in range(0, 65_536, 7))
    assert grid_threshold(-2.0, 16) < -1
    assert next_below(grid_threshold(2.0, 16)) > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(grid=1), "one point tells no numbers apart"),
        (dict(grid=-1), "greater than or equal to 0"),
        (dict(grid=65_537), "less than or equal to 65536"),
        (dict(grid=16, ties="even"), "grid is for unit 1, ties 'low'"),
        (dict(grid=16, unit=2.0, values=(-2.0, 0.0, 1.0, 2.0)), "grid is for unit 1"),
        (dict(grid=16, scale=Scale(dtype="bfloat16")), "a float32 scale per block"),
    ],
)
def test_grids_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    fields: dict[str, Any] = dict(name="q", summary="s", bits=2, values=(-1.0, 0.0, 0.5, 1.0))
    with pytest.raises(SpecError, match=message):
        QuantType(**{**fields, **changes})
    assert float32(0.1) == float(np.float32(0.1))
