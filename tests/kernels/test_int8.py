"""LLM.int8() kernels: the bytes of bitsandbytes, exact sums, and the same bits on every target."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bnbx.errors import BnbxWarning, OptionError, UnsupportedTensorError
from bnbx.kernels import int8, int8_cpu, int8_reference
from compiled import shared_cache
from int8_numbers import SHAPES, numbers, weight
from oracles import bitsandbytes_functional
from same_bits import FLOATS, same_bits


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with shared_cache(tmp_path_factory):
        yield


# ---- rows to codes


@pytest.mark.parametrize("threshold", [0.0, 6.0, 1.5])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_are_those_of_bitsandbytes(
    shape: tuple[int, int, int], dtype: torch.dtype, threshold: float
) -> None:
    x = numbers(shape[0], shape[1], dtype)
    expected = bitsandbytes_functional().int8_vectorwise_quant(x.clone(), threshold=threshold)
    codes, absmax, outliers = int8.quantize_rows(x, threshold)
    assert torch.equal(codes, expected[0])
    assert same_bits(absmax, expected[1])
    columns = outliers.nonzero()[:, 0]
    if threshold:
        assert torch.equal(columns, expected[2])
    else:
        assert len(columns) == 0


def test_every_float16_is_rounded_as_bitsandbytes_does() -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    finite = every[every.isfinite()]
    rows = torch.stack([finite, finite.flip(0) / 7, (finite * 0.01).clamp(-3, 3)])
    expected = bitsandbytes_functional().int8_vectorwise_quant(rows)
    codes, absmax, _ = int8.quantize_rows(rows)
    assert torch.equal(codes, expected[0])
    assert same_bits(absmax, expected[1])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_targets_have_the_same_codes(dtype: torch.dtype, threshold: float) -> None:
    x = numbers(40, 1111, dtype)
    x[3] = 0
    x[4, 7], x[5, 8], x[6, 9] = float("nan"), float("inf"), -float("inf")
    x[7] *= 1e-30 if dtype != torch.float16 else 1e-3
    x[8] = torch.finfo(dtype).tiny / 4
    for got, expected in zip(
        int8_cpu.quantize_rows(x, threshold),
        int8_reference.quantize_rows(x, threshold),
        strict=True,
    ):
        assert same_bits(got, expected)


@given(
    st.lists(st.floats(width=32, allow_subnormal=True), min_size=1, max_size=40),
    st.sampled_from([0.0, 1e-30, 6.0, 1e30, float("inf")]),
)
def test_any_row_has_the_same_codes_on_both_targets(row: list[float], threshold: float) -> None:
    x = torch.tensor([row, row[::-1]])
    x[x.isnan()] = torch.nan  # hypothesis draws payloads, which are the processor's to keep or not
    for got, expected in zip(
        int8_cpu.quantize_rows(x, threshold),
        int8_reference.quantize_rows(x, threshold),
        strict=True,
    ):
        assert same_bits(got, expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_numbers_come_back_within_half_a_step(dtype: torch.dtype) -> None:
    x = numbers(17, 333, dtype)
    codes, absmax, _ = int8.quantize_rows(x)
    back = int8.dequantize_rows(codes, absmax)
    assert bool(((back - x.float()).abs() <= absmax[:, None] / 127 * 0.501).all())
    assert codes.abs().amax(1).eq(127).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_numbers_of_codes_are_those_of_bitsandbytes(dtype: torch.dtype) -> None:
    codes, absmax = weight(33, 700)
    expected = bitsandbytes_functional().int8_vectorwise_dequant(codes, absmax).to(dtype)
    assert same_bits(int8.dequantize_rows(codes, absmax, dtype), expected)
    assert same_bits(int8_reference.dequantize_rows(codes, absmax, dtype), expected)
    part = codes[:, 5:300]
    assert same_bits(int8.dequantize_rows(part, absmax, dtype), expected[:, 5:300].contiguous())


def test_leading_sizes_and_strides_do_not_matter() -> None:
    x = numbers(24, 96, torch.float32)
    codes, absmax, _ = int8.quantize_rows(x)
    shaped = int8.quantize_rows(x.view(2, 3, 4, 96))
    assert torch.equal(shaped[0].view(24, 96), codes)
    assert torch.equal(shaped[1], absmax)
    assert torch.equal(int8.quantize_rows(x.t().contiguous().t())[0], codes)
    wide = torch.zeros(24, 200)
    wide[:, 50:146] = x
    assert torch.equal(int8.quantize_rows(wide[:, 50:146])[0], codes)
    assert torch.equal(int8.quantize_rows(x[0])[0], codes[0])
    back = int8.dequantize_rows(shaped[0], absmax)
    assert torch.equal(back.view(24, 96), int8.dequantize_rows(codes, absmax))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (2, 0, 3)])
def test_nothing_gives_nothing(shape: tuple[int, ...]) -> None:
    codes, absmax, outliers = int8.quantize_rows(torch.empty(shape), 6.0)
    assert codes.shape == shape
    assert absmax.tolist() == [0.0] * (torch.Size(shape[:-1]).numel())
    assert outliers.shape == shape[-1:]
    assert int8.dequantize_rows(codes, absmax).shape == shape


# ---- the product


def exactly(x: Tensor, codes: Tensor, absmax: Tensor, bias: Tensor, threshold: float) -> Tensor:
    """The product in float64, with sums of integers that are exact there."""
    x_codes, x_absmax, outliers = int8_reference.quantize_rows(x, threshold)
    x_codes = x_codes.masked_fill(outliers, 0)
    sums = x_codes.double() @ codes.t().double() * (x_absmax.double() / 127)[:, None]
    apart = x.double()[:, outliers] @ codes.t().double()[outliers]
    return (sums + apart) * (absmax.double() / 127) + bias.double()


@pytest.mark.parametrize("threshold", [0.0, 6.0, 0.5])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_product_is_exact_but_for_rounding(
    shape: tuple[int, int, int], dtype: torch.dtype, threshold: float
) -> None:
    rows, columns, outs = shape
    x, (codes, absmax) = numbers(rows, columns, dtype), weight(outs, columns)
    bias = torch.randn(outs).to(dtype)
    expected = exactly(x, codes, absmax, bias, threshold)
    size = (x.double().abs() @ codes.t().double().abs() * absmax.double() / 127).clamp(min=1)
    for target in (int8_cpu, int8_reference):
        y, outliers = target.linear(x, codes, absmax, bias, threshold)
        off = (y.double() - expected).abs()
        rounding = torch.finfo(dtype).eps / 2 * expected.abs() + 2e-6 * size
        assert bool((off <= rounding).all()), float((off / rounding).max())
        marks = int8_reference.quantize_rows(x, threshold)[2]
        assert torch.equal(outliers, marks if threshold else marks[:0])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_targets_have_the_same_bits(
    shape: tuple[int, int, int], dtype: torch.dtype, bias: bool
) -> None:
    rows, columns, outs = shape
    x, made = numbers(rows, columns, dtype), weight(outs, columns)
    offset = torch.randn(outs).to(dtype) if bias else None
    expected = int8_reference.linear(x, *made, offset, 0.0)[0]
    assert same_bits(int8_cpu.linear(x, *made, offset, 0.0)[0], expected)


def test_extreme_codes_do_not_overflow() -> None:
    """All sums as large as they get, in the longest row there may be; -128 too, from a stranger."""
    columns = int8.MOST_COLUMNS
    x = torch.ones(2, columns)
    x[1] = -1
    for code in (127, -127, -128):
        codes = torch.full((3, columns), code, dtype=torch.int8)
        y, _ = int8.linear(x, codes, torch.full((3,), 127.0))
        expected = torch.tensor(float(code * columns)) * torch.tensor([[1.0] * 3, [-1.0] * 3])
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_threads_do_not_change_bits(threshold: float, monkeypatch: pytest.MonkeyPatch) -> None:
    x, made = numbers(150, 700, torch.float32), weight(300, 700)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = int8.linear(x, *made, None, threshold)[0]
        torch.set_num_threads(3)
        monkeypatch.setattr("bnbx.kernels.threads.ELEMENTS_PER_THREAD", 100)
        together = int8.linear(x, *made, None, threshold)[0]
        blocks = int8.linear(x.expand(2, 150, 700), *made, None, threshold)[0]
    finally:
        torch.set_num_threads(before)
    assert same_bits(together, alone)
    assert same_bits(blocks[1], alone)


def test_a_column_of_an_outlier_is_one_for_all_blocks_of_rows() -> None:
    x, made = torch.randn(int8_cpu.LEAST_ROWS * 3, 256), weight(16, 256)
    x[-1, 100] = 40.0
    expected = int8_reference.linear(x, *made, None, 6.0)[0]
    torch.testing.assert_close(int8_cpu.linear(x, *made, None, 6.0)[0], expected)
    assert int8_cpu.linear(x, *made, None, 6.0)[1].nonzero().tolist() == [[100]]


def test_product_agrees_with_bitsandbytes() -> None:
    """Whose factor 1 / 127**2 is off by 2e-5, and which rounds to float16 twice."""
    functional = bitsandbytes_functional()
    x, made = numbers(50, 768, torch.float16), weight(96, 768)
    x_codes, x_absmax, columns = functional.int8_vectorwise_quant(x.clone(), threshold=6.0)
    bias = torch.randn(96).half()
    expected, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(
        x, x_codes, made[0], x_absmax, made[1], columns, bias
    )
    y, _ = int8.linear(x, *made, bias, 6.0)
    torch.testing.assert_close(y, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_bad_numbers_stay_in_their_row(threshold: float) -> None:
    x, made = numbers(9, 130, torch.float32), weight(20, 130)
    good = int8.linear(x, *made, None, threshold)[0]
    x[2, 5] = float("nan")
    y = int8.linear(x, *made, None, threshold)[0]
    assert y[2].isnan().all()
    assert same_bits(y[[0, 1, *range(3, 9)]], good[[0, 1, *range(3, 9)]])
    x[2, 5] = float("inf")
    y = int8.linear(x, *made, None, threshold)[0]
    assert not y[2].isfinite().any()
    others = [0, 1, *range(3, 9)]
    if threshold:  # an outlier like any other: what a dense product gives; its column is in floats
        assert (y[2] == float("inf")).equal(made[0][:, 5] > 0)
        torch.testing.assert_close(y[others], good[others], rtol=0.02, atol=0.02)
    else:
        assert same_bits(y[others], good[others])


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize(("columns", "outs"), [(0, 4), (4, 0), (0, 0)])
def test_empty_sizes(rows: int, columns: int, outs: int) -> None:
    bias = torch.arange(float(outs))
    for target in (int8_cpu, int8_reference):
        y, outliers = target.linear(
            torch.ones(rows, columns),
            torch.ones(outs, columns, dtype=torch.int8),
            torch.ones(outs),
            bias,
            6.0,
        )
        assert y.shape == (rows, outs)
        assert outliers.shape == (columns,)
        if not columns:
            assert torch.equal(y, bias.expand(rows, outs))


def test_input_is_left_alone() -> None:
    x, made = numbers(20, 100, torch.float32), weight(10, 100)
    before = x.clone()
    int8.linear(x, *made, None, 6.0)
    int8.quantize_rows(x, 6.0)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradient_is_the_product_with_the_decoded_weight(dtype: torch.dtype) -> None:
    codes, absmax = weight(70, 130)
    grad = torch.randn(2, 9, 70).to(dtype)
    dense = int8.dequantize_rows(codes, absmax, dtype)
    torch.testing.assert_close(int8.grad_input(grad, codes, absmax), grad @ dense)
    assert int8.grad_input(grad[:, :0], codes, absmax).shape == (2, 0, 130)


@pytest.mark.parametrize("rows", [1, 16, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_beside_the_result_is_a_twentieth_of_a_dense_weight(
    rows: int, dtype: torch.dtype
) -> None:
    outs = columns = 2048
    made = weight(outs, columns)
    x = torch.randn(rows, columns).to(dtype)
    x[:, :2] *= 30
    int8.linear(x, *made, None, 6.0)
    with torch.profiler.profile(profile_memory=True) as profile:
        int8.linear(x, *made, None, 6.0)
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    result = rows * outs * dtype.itemsize
    assert result <= most <= result + 0.05 * outs * columns * dtype.itemsize


# ---- errors


def test_errors_name_what_is_wrong() -> None:
    codes, absmax = weight(4, 8)
    x = torch.ones(2, 8)
    with pytest.raises(OptionError, match=r"threshold is -1\.0; expected a magnitude"):
        int8.linear(x, codes, absmax, None, -1.0)
    with pytest.raises(OptionError, match="threshold is nan"):
        int8.quantize_rows(x, float("nan"))
    with pytest.raises(UnsupportedTensorError, match=r"x is torch\.float64"):
        int8.linear(x.double(), codes, absmax)
    with pytest.raises(UnsupportedTensorError, match=r"\(2, 7\); expected \(\.\.\., 8\)"):
        int8.linear(x[:, :7], codes, absmax)
    with pytest.raises(UnsupportedTensorError, match="x is a scalar"):
        int8.linear(torch.tensor(1.0), codes, absmax)
    with pytest.raises(UnsupportedTensorError, match=r"weight is torch\.float32.*quantized first"):
        int8.linear(x, codes.float(), absmax)
    with pytest.raises(UnsupportedTensorError, match=r"absmax is torch\.float32 of shape \(3,\)"):
        int8.linear(x, codes, absmax[:3])
    with pytest.raises(UnsupportedTensorError, match=r"bias is .* expected floats of shape \(4,\)"):
        int8.linear(x, codes, absmax, torch.ones(5))
    with pytest.raises(UnsupportedTensorError, match="absmax on meta: move one"):
        int8.linear(x, codes, absmax.to("meta"))
    with pytest.raises(UnsupportedTensorError, match="dequantized to"):
        int8.dequantize_rows(codes, absmax, torch.int32)
    with pytest.raises(
        UnsupportedTensorError, match=r"grad has shape \(2, 8\); expected \(\.\.\., 4"
    ):
        int8.grad_input(x, codes, absmax)
    long = torch.ones(1, int8.MOST_COLUMNS + 1)
    with pytest.raises(UnsupportedTensorError, match="may overflow 32 bits; at most 131071"):
        int8.linear(long, long.to(torch.int8), torch.ones(1))


def test_without_a_compiler_torch_operations_do_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, made = numbers(9, 130, torch.float32), weight(20, 130)
    expected = int8.linear(x, *made)[0]
    monkeypatch.setenv("BNBX_CXX", "")
    int8_cpu.library.cache_clear()
    int8.choose.cache_clear()
    try:
        with pytest.warns(BnbxWarning, match="plain torch operations, with the same results"):
            y = int8.linear(x, *made)[0]
        assert same_bits(y, expected)
        int8.linear(x, *made)  # and says so once
    finally:
        int8_cpu.library.cache_clear()
        int8.choose.cache_clear()
