"""LLM.int8() on processors that lack some instructions of this one: each has kernels of its own."""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bnbx.kernels import int8_cpu, int8_reference
from compiled import shared_cache
from int8_libraries import PROCESSORS, library_for
from int8_numbers import SHAPES, numbers, weight
from same_bits import FLOATS, same_bits


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with shared_cache(tmp_path_factory):
        yield


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ctypes.CDLL:
    """The kernels, compiled for a processor that lacks some instructions."""
    found = library_for(request.param)
    monkeypatch.setattr(int8_cpu, "library", lambda: found)
    return found


@functools.cache
def of_the_reference(shape: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """The product without outliers, the one with, and the parts of x."""
    rows, columns, outs = shape
    x, made = numbers(rows, columns, dtype), weight(outs, columns)
    products = [int8_reference.linear(x, *made, None, threshold)[0] for threshold in (0.0, 6.0)]
    return [*products, *int8_reference.quantize_rows(x, 6.0)]


@pytest.mark.parametrize("library", PROCESSORS.values(), ids=PROCESSORS.keys(), indirect=True)
def test_any_processor_has_the_same_bits(library: ctypes.CDLL) -> None:
    for shape, dtype in [*itertools.product(SHAPES[:7], FLOATS), (SHAPES[7], FLOATS[0])]:
        x, made = numbers(shape[0], shape[1], dtype), weight(shape[2], shape[1])
        plain, apart, *parts = of_the_reference(shape, dtype)
        assert same_bits(int8_cpu.linear(x, *made, None, 0.0)[0], plain)
        torch.testing.assert_close(int8_cpu.linear(x, *made, None, 6.0)[0], apart)
        for got, expected in zip(int8_cpu.quantize_rows(x, 6.0), parts, strict=True):
            assert same_bits(got, expected)


# From 7 rows on a processor may go by its matrix unit, from 16 on by copies of the weight: rows
# that do not fill a panel, a block or a chunk, depths that do not fill a vector or are cut,
# outputs that do not fill a tile or a block.
MANY_ROWS = (
    *((15, 64, 16), (16, 32, 2), (17, 31, 9), (18, 33, 21), (19, 1, 15), (20, 95, 64)),
    *((65, 700, 81), (131, 4097, 3), (67, 8229, 18), (7, 130, 70), (33, 128, 112), (115, 8200, 50)),
    *((259, 70, 20), (9, 4200, 300)),
)


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have each product written between numbers that must stay."""
    multiply = int8_cpu._multiply

    def between(x: Any, made: Any, y: Tensor) -> None:
        room = torch.full((128 + y.numel() + 128,), 3.0, dtype=y.dtype)
        inside = room[128:-128].view(y.shape)
        multiply(x, made, inside)
        assert room[:128].eq(3).all()
        assert room[-128:].eq(3).all()
        y.copy_(inside)

    monkeypatch.setattr(int8_cpu, "_multiply", between)
    monkeypatch.setattr(int8_cpu, "LEAST_ROWS", max(rows for rows, _, _ in MANY_ROWS))


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("library", PROCESSORS.values(), ids=PROCESSORS.keys(), indirect=True)
def test_any_processor_has_the_same_bits_for_many_rows(library: ctypes.CDLL) -> None:
    for (rows, columns, outs), dtype in itertools.product(MANY_ROWS, FLOATS):
        x, (codes, absmax) = numbers(rows, columns, dtype), weight(outs, columns)
        codes[torch.rand(codes.shape) < 0.1] = -128  # from a stranger
        bias = torch.randn(outs)
        expected = int8_reference.linear(x, codes, absmax, bias, 0.0)[0]
        assert same_bits(int8_cpu.linear(x, codes, absmax, bias, 0.0)[0], expected)
        y, _ = int8_cpu.linear(x, codes, absmax, bias, 6.0)
        torch.testing.assert_close(y, int8_reference.linear(x, codes, absmax, bias, 6.0)[0])


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 9, 16, 23, 40])
@pytest.mark.parametrize("library", PROCESSORS.values(), ids=PROCESSORS.keys(), indirect=True)
def test_extreme_codes_are_added_exactly(library: ctypes.CDLL, rows: int) -> None:
    """Neighbors that are all as large as they get, in any signs: no 16 bits are too few."""
    columns, outs = 77, 35
    signs = torch.randint(0, 2, (rows, columns)) * 2 - 1
    codes = torch.tensor([127, -127, -128])[torch.randint(0, 3, (outs, columns))].to(torch.int8)
    codes[0], codes[1], codes[2] = -128, 127, -128 * (torch.arange(columns) % 2)
    signs[0] = 1
    y, _ = int8_cpu.linear(signs.float(), codes, torch.full((outs,), 127.0), None, 0.0)
    assert torch.equal(y.round().long(), signs @ codes.long().t())
