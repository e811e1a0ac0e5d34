"""The parts of LLM.int8(), held against bitsandbytes' bytes and against brute force."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bnbx import functional
from bnbx.kernels.int8_reference import products
from oracles import bitsandbytes_functional
from same_bits import FLOATS, same_bits

SHAPES = [(1, 1), (1, 7), (5, 64), (33, 300)]


@pytest.fixture(scope="module")
def theirs() -> Any:
    return bitsandbytes_functional()


def codes(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-128, 128, shape, generator=generator).to(torch.int8)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("threshold", [0.0, 2.5, 100.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows(theirs: Any, shape: tuple[int, int], threshold: float, dtype: torch.dtype) -> None:
    x = (2 * torch.randn(shape)).to(dtype)
    expected = theirs.int8_vectorwise_quant(x.clone(), threshold)
    found = functional.int8_vectorwise_quant(x, threshold)
    assert all(map(same_bits, found, expected))
    numbers = functional.int8_vectorwise_dequant(*found[:2])
    assert same_bits(numbers, theirs.int8_vectorwise_dequant(*expected[:2]))
    if not threshold:
        assert float((numbers - x.float()).abs().max()) <= 0.51 * float(x.abs().max()) / 127


def test_rows_of_any_shape() -> None:
    x = torch.randn(2, 3, 40)
    made, absmax, columns = functional.int8_vectorwise_quant(x)
    flat = functional.int8_vectorwise_quant(x.view(6, 40))
    assert made.shape == x.shape
    assert columns is None
    assert torch.equal(made.view(6, 40), flat[0])
    assert torch.equal(absmax, flat[1])
    assert same_bits(
        functional.int8_vectorwise_dequant(made, absmax.view(2, 3)).view(6, 40),
        functional.int8_vectorwise_dequant(*flat[:2]),
    )
    vector = functional.int8_vectorwise_quant(torch.tensor([1.0, -2.0]))
    assert vector[0].tolist() == [64, -127]
    assert functional.int8_vectorwise_quant(torch.empty(0, 4))[0].shape == (0, 4)
    assert functional.int8_vectorwise_quant(torch.empty(4, 0))[1].tolist() == [0.0] * 4


def test_rows_without_numbers() -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, float("nan")], [float("inf"), 2.0], [3.0, -1.0]])
    made, absmax, _ = functional.int8_vectorwise_quant(x)
    assert made.tolist() == [[0, 0], [0, 0], [0, 0], [127, -42]]
    assert absmax.nan_to_num(-1).tolist()[:2] == [0.0, -1.0]


@pytest.mark.parametrize("threshold", [0.0, 1.5])
def test_rows_and_columns(threshold: float) -> None:
    x = torch.randn(6, 9).half()
    by_row, by_column, rows, columns, outliers = functional.int8_double_quant(
        x, threshold=threshold
    )
    expected = functional.int8_vectorwise_quant(x, threshold)
    assert torch.equal(by_row, expected[0])
    assert torch.equal(rows, expected[1])
    kept = x.float()
    if threshold:
        kept = kept.masked_fill(kept.abs() >= threshold, 0)
        assert outliers is not None
        assert same_bits(outliers, expected[2])
        assert outliers.tolist() == (x.abs() >= threshold).any(0).nonzero()[:, 0].tolist()
    else:
        assert outliers is None
    assert torch.equal(columns, kept.abs().amax(0))
    back = by_column.float() * columns / 127
    assert bool(((back - kept).abs() <= 0.501 * columns / 127).all())
    memory: dict[str, Any] = dict(
        col_stats=torch.empty(9),
        row_stats=torch.empty(6),
        out_col=torch.empty(6, 9, dtype=torch.int8),
        out_row=torch.empty(9, 6, dtype=torch.int8).t(),
    )
    made = functional.int8_double_quant(x, threshold=threshold, **memory)
    assert made[0] is memory["out_row"]
    assert made[1] is memory["out_col"]
    assert made[2] is memory["row_stats"]
    assert made[3] is memory["col_stats"]
    for new, old in zip(made[:4], (by_row, by_column, rows, columns), strict=True):
        assert torch.equal(new, old)
    assert functional.double_quant is functional.int8_double_quant


@pytest.mark.parametrize("rows", [1, 2, 17])
@pytest.mark.parametrize("columns", [0, 1, 2, 3, 64, 3000])
def test_products_are_exact(rows: int, columns: int) -> None:
    """Also of one column, where torch's and with it bitsandbytes' are wrong."""
    for outs in (0, 1, 5, 16):
        a, b = codes(rows, columns), codes(outs, columns)
        expected = (a.long() @ b.long().t()).int()
        found = functional.int8_linear_matmul(a, b)
        assert same_bits(found, expected), outs
        assert same_bits(products(a, b), expected)
        out = torch.empty_like(expected)
        assert functional.int8_linear_matmul(a, b, out) is out
        assert same_bits(out, expected)
        wide = functional.int8_linear_matmul(a, b, dtype=torch.float32)
        assert same_bits(wide, expected.float())
    assert functional.int8_linear_matmul(codes(2, 3, 4), codes(5, 4)).shape == (2, 3, 5)


@pytest.mark.parametrize("biased", [False, True])
def test_scaling_back(theirs: Any, biased: bool) -> None:
    a = torch.randint(-100000, 100000, (6, 11), dtype=torch.int32)
    rows, columns = torch.rand(6), torch.rand(11)
    bias = torch.randn(11).half() if biased else None
    expected = theirs.int8_mm_dequant(a, rows, columns, bias=bias)
    found = functional.int8_mm_dequant(a, rows, columns, bias=bias)
    assert same_bits(found, expected)
    exact = a.double() * rows.double()[:, None] * columns.double() / 127**2
    exact = exact if bias is None else exact + bias
    assert torch.allclose(found.double(), exact, rtol=1e-3, atol=1e-3)
    for dtype in FLOATS:
        out = torch.empty(6, 11, dtype=dtype)
        assert functional.int8_mm_dequant(a, rows, columns, out, bias) is out
        assert torch.allclose(out.double(), exact, rtol=1e-2, atol=1e-2)
    assert functional.int8_mm_dequant(a.view(2, 3, 11), rows, columns).shape == (2, 3, 11)


def test_a_whole_product(theirs: Any) -> None:
    x, w = torch.randn(9, 256).half(), torch.randn(31, 256).half()
    a, b = functional.int8_vectorwise_quant(x), functional.int8_vectorwise_quant(w)
    found = functional.int8_mm_dequant(functional.int8_linear_matmul(a[0], b[0]), a[1], b[1])
    expected = x.double() @ w.double().t()
    assert float((found - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("int8_linear_matmul", (codes(2, 3), codes(4, 5)), "in"),
        ("int8_linear_matmul", (codes(2, 3), codes(4, 3).float()), "int8"),
        ("int8_linear_matmul", (codes(2, 3), codes(3)), "in"),
        ("int8_linear_matmul", (codes(1, 131_072), codes(1, 131_072)), "overflow"),
        ("int8_linear_matmul", (codes(2, 3), codes(4, 3), torch.empty(2, 4)), "int32"),
        ("int8_mm_dequant", (codes(2, 3), torch.ones(2), torch.ones(3)), "int32"),
        ("int8_mm_dequant", (codes(2, 3).int(), torch.ones(3), torch.ones(3)), "per row"),
        ("int8_mm_dequant", (codes(2, 3).int(), torch.ones(2), torch.ones(2)), "per column"),
        ("int8_mm_dequant", (codes(2, 3).int(), torch.ones(2).half(), torch.ones(3)), "float32"),
        ("int8_vectorwise_quant", (codes(2, 3),), "float32 or bfloat16 or float16"),
        ("int8_vectorwise_quant", (torch.tensor(1.0),), "dimensions"),
        ("int8_vectorwise_quant", (torch.ones(2, 2), -1.0), "threshold"),
        ("int8_vectorwise_quant", (torch.ones(2, 2), float("nan")), "threshold"),
        ("int8_vectorwise_dequant", (codes(2, 3), torch.ones(3)), "per row"),
        ("int8_vectorwise_dequant", (torch.ones(2, 3), torch.ones(2)), "int8"),
        ("int8_double_quant", (torch.ones(2, 3), torch.ones(2)), "shape"),
        ("int8_double_quant", (torch.ones(2, 3), None, None, torch.ones(2, 3)), "int8"),
    ],
)
def test_mistakes(name: str, arguments: tuple[Any, ...], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        getattr(functional, name)(*arguments)


@pytest.mark.parametrize("shape", [(777, 1001), (40_000, 37), (3, 200_001), (0, 5), (5, 0)])
def test_columns_are_the_rows_of_the_turned_matrix(shape: tuple[int, int]) -> None:
    """However many of them are turned at a time."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).half()
    _, codes, _, absmax, _ = functional.int8_double_quant(x)
    expected, scales, _ = functional.int8_vectorwise_quant(x.t())
    assert torch.equal(codes, expected.t())
    assert torch.equal(absmax, scales)
    assert codes.is_contiguous()


def test_scaling_back_rows_without_columns() -> None:
    found = functional.int8_mm_dequant(
        torch.empty(2, 0, dtype=torch.int32), torch.ones(2), torch.ones(0)
    )
    assert found.shape == (2, 0)
