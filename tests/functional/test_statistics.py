"""Quantiles, sums by pairs of indices, clipping, and where tensors are."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bnbx import functional
from bnbx.optimizers.clipping import clip_factor
from oracles import bitsandbytes_functional


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("offset", [1 / 512, 0.02, 0.0])
def test_quantiles(offset: float, dtype: torch.dtype) -> None:
    x = torch.randn(41, 101).to(dtype)
    shares = np.linspace(offset, 1 - offset, 256)
    expected = np.quantile(x.double().numpy(), shares)
    found = functional.estimate_quantiles(x, offset=offset)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)
    out = torch.empty(256)
    assert functional.estimate_quantiles(x, out, offset) is out
    assert torch.equal(out, found)


def test_fewer_quantiles() -> None:
    x = torch.arange(1001.0)
    found = functional.estimate_quantiles(x, num_quantiles=5)
    assert torch.allclose(found, torch.tensor([100.0, 300.0, 500.0, 700.0, 900.0]))
    assert functional.estimate_quantiles(x[:2], num_quantiles=2).tolist() == [0.25, 0.75]
    x[3] = float("nan")
    assert bool(functional.estimate_quantiles(x).isnan().all())


def test_quantiles_find_evenly_filled_tables() -> None:
    """The table of quantiles uses every code about as often."""
    x = torch.randn(100_000)
    code = functional.estimate_quantiles(x)
    counts = torch.bincount(functional.quantize_no_absmax(x, code).long(), minlength=256)
    assert float(counts.float().std() / counts.float().mean()) < 0.2


def test_sums_by_pairs() -> None:
    generator = np.random.default_rng(0)
    for rows, columns in ((7, 7), (3, 11), (11, 3)):
        histogram = torch.ones(rows, columns)
        first = generator.integers(0, rows, 500)
        second = generator.integers(0, columns, 500)
        source = generator.normal(size=500).astype(np.float32)
        expected = np.ones((rows, columns), np.float64)
        np.add.at(expected, (first, second), source)
        index1 = torch.from_numpy(first).int()
        functional.histogram_scatter_add_2d(
            histogram, index1, torch.from_numpy(second), torch.from_numpy(source)
        )
        np.testing.assert_allclose(histogram.numpy(), expected, rtol=1e-4, atol=1e-4)
    empty = torch.empty(0, dtype=torch.int32)
    functional.histogram_scatter_add_2d(histogram, empty, empty, torch.empty(0))


@pytest.mark.parametrize(("place", "value"), [(0, 3), (0, -1), (1, 4), (1, -5)])
def test_places_that_are_not_there(place: int, value: int) -> None:
    first, second = torch.zeros(5, dtype=torch.int32), torch.zeros(5, dtype=torch.int32)
    (first, second)[place][2] = value
    histogram = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=f"index{place + 1}"):
        functional.histogram_scatter_add_2d(histogram, first, second, torch.ones(5))
    assert not histogram.any()


@pytest.mark.parametrize("percentile", [0, 5, 50, 99])
def test_clipping(percentile: int) -> None:
    """The same factor as the optimizers', and a history of squared norms."""
    ours, theirs = torch.zeros(100), torch.zeros(100)
    for step in range(1, 130):
        grad = torch.randn(300) * (1 + step % 7)
        norm, allowed, factor = functional.percentile_clipping(grad, ours, step, percentile)
        expected, theirs = clip_factor(grad, theirs, step, percentile, scale=torch.ones(1))
        assert torch.allclose(factor, expected)
        assert torch.allclose(ours, theirs)
        assert torch.allclose(norm, grad.norm())
        assert float(norm * factor) <= float(allowed) * (1 + 1e-6)
    assert functional.percentile_clipping(grad.half(), ours, 130)[2] <= 1


def test_pointers() -> None:
    x = torch.arange(5, dtype=torch.int32)
    pointer = functional.get_ptr(x)
    assert isinstance(pointer, ctypes.c_void_p)
    read = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_int32))
    assert [read[place] for place in range(5)] == [0, 1, 2, 3, 4]
    later = functional.get_ptr(x[2:])
    assert later is not None
    assert later.value == (pointer.value or 0) + 8
    assert functional.get_ptr(None) is None


def test_devices() -> None:
    here, there = torch.ones(1), torch.ones(1, device="meta")
    assert functional.is_on_gpu([here, None, here])
    assert functional.is_on_gpu([])
    with pytest.raises(RuntimeError, match="on meta"):
        functional.is_on_gpu([here, there])
    there.is_paged = True  # type: ignore[attr-defined]
    assert functional.is_on_gpu(iter([here, there]))


def test_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = bool(bitsandbytes_functional().has_avx512bf16())
    assert functional.has_avx512bf16() is expected
    monkeypatch.setattr(torch, "cpu", SimpleNamespace())  # an older torch does not say
    assert functional.has_avx512bf16() is expected


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("estimate_quantiles", (torch.ones(255),), "at least 256"),
        ("estimate_quantiles", (torch.ones(256).int(),), "float32"),
        ("estimate_quantiles", (torch.ones(256), None, 0.5), "offset"),
        ("estimate_quantiles", (torch.ones(256), None, 0.1, 257), "num_quantiles"),
        ("estimate_quantiles", (torch.ones(256), torch.ones(255)), "shape"),
        ("estimate_quantiles", (torch.ones(256), torch.ones(256).half()), "float32"),
        ("percentile_clipping", (torch.ones(3), torch.ones(99), 1), "shape"),
        ("percentile_clipping", (torch.ones(3), torch.ones(100).half(), 1), "float32"),
        ("percentile_clipping", (torch.ones(3), torch.ones(100), 0), "step"),
        ("percentile_clipping", (torch.ones(3), torch.ones(100), 1, 100), "percentile"),
        ("get_ptr", (3,), "torch.Tensor"),
    ],
)
def test_mistakes(name: str, arguments: tuple[Any, ...], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        getattr(functional, name)(*arguments)


@pytest.mark.parametrize(
    "bad",
    [
        dict(histogram=torch.zeros(3)),
        dict(histogram=torch.zeros(3, 4).half()),
        dict(index1=torch.zeros(5)),
        dict(index2=torch.zeros(4).int()),
        dict(source=torch.zeros(5).double()),
        dict(source=torch.zeros(6)),
        dict(index1=torch.zeros(5, device="meta").int()),
    ],
)
def test_sums_of_bad_tensors(bad: dict[str, Any]) -> None:
    good: dict[str, Any] = dict(
        histogram=torch.zeros(3, 4),
        index1=torch.zeros(5).int(),
        index2=torch.zeros(5).int(),
        source=torch.ones(5),
    )
    with pytest.raises(ValueError, match=r"shape|expected|device"):
        functional.histogram_scatter_add_2d(**{**good, **bad})
