"""LLM.int8() on CUDA without a GPU: machine code for every architecture, and the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

import nvrtc
from bnbx.kernels import int8, int8_cuda, int8_reference
from bnbx.kernels.cuda_module import OPTIONS, THREADS
from cuda_on_cpu import SCHEDULES, compile_source
from cuda_on_cpu.build import Mode
from cuda_on_cpu.launch import Module

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# rows, columns, outputs: less than a warp, a block and a tile, and more; columns of a multiple of
# eight go through torch's integer product.
SHAPES = ((1, 5, 3), (2, 64, 16), (33, 300, 65), (40, 512, 72))
# Three resident blocks of 256 threads on the smallest multiprocessor: 65536 registers, 64 KiB.
MOST_REGISTERS = 80
MOST_SHARED_BYTES = 20 * 1024
SMALL = ((1, 5, 3), (5, 70, 66))


@lru_cache(maxsize=4)
def module(mode: Mode) -> Module:
    return compile_source(int8_cuda.source(), mode)


def emulated(mode: Mode = "plain", schedule: int = 0, grid: int = 2) -> int8_cuda.Launcher:
    """A launcher that runs kernels here; a grid smaller than the work makes blocks go around."""

    def launch(name: str, blocks: int, arguments: Sequence[Any]) -> None:
        size = max(1, min(blocks, grid))
        kernel = module(mode).kernel(f"bnbx_int8_{name}")
        kernel(size, THREADS, list(arguments), schedule=schedule)

    return launch


def numbers(rows: int, columns: int, dtype: torch.dtype, outliers: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, columns, generator=generator)
    x[:, :: max(1, columns // max(1, outliers))] *= 20 if outliers else 1
    return x.to(dtype)


def weight(outs: int, columns: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    codes, absmax, _ = int8_reference.quantize_rows(
        torch.randn(outs, columns, generator=generator), 0.0
    )
    return codes, absmax


def in_order(x: Tensor, codes: Tensor, absmax: Tensor, bias: Tensor, threshold: float) -> Tensor:
    """The reference, with the outlier columns added up one after another, as the kernels do."""
    step = int8_reference.STEP
    x_codes, x_absmax, outliers = int8_reference.quantize_rows(x, threshold)
    x_codes = x_codes.masked_fill(outliers, 0)
    found = int8_reference.products(x_codes, codes).float() * (x_absmax * step * step)[:, None]
    apart = torch.zeros_like(found)
    for column in outliers.nonzero()[:, 0]:
        apart = apart + (codes[:, column].float() * step) * x[:, column, None].float()
    return ((found + apart) * absmax + bias.float()).to(x.dtype)


def assert_same(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.equal(a.view(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def run(
    x: Tensor, made: tuple[Tensor, Tensor], threshold: float, launch: int8_cuda.Launcher
) -> None:
    """Everything there is, against the reference."""
    assert_same(
        int8_cuda.quantize_rows(x, threshold, launch), int8_reference.quantize_rows(x, threshold)
    )
    bias = torch.linspace(-1, 1, len(made[0])).to(x.dtype)
    y, marks = int8_cuda.linear(x, *made, bias, threshold, launch)
    expected = in_order(x, *made, bias, threshold)
    assert_same([y], [expected])
    assert marks.shape == (x.shape[1] if threshold else 0,)
    assert_same(
        [int8_cuda.dequantize_rows(*made, x.dtype, launch)],
        [int8_reference.dequantize_rows(*made, x.dtype)],
    )


@pytest.mark.parametrize("arch", nvrtc.ARCHITECTURES)
def test_compiles_to_machine_code_without_spills(arch: int) -> None:
    if reason := nvrtc.available():
        pytest.skip(reason)
    cubin = nvrtc.compile_cubin(int8_cuda.source(), arch, options=OPTIONS)
    assert (cubin.spill_stores, cubin.spill_loads, cubin.stack_bytes) == (0, 0, 0), cubin.log
    assert cubin.registers <= MOST_REGISTERS, cubin.log
    assert cubin.shared_bytes <= MOST_SHARED_BYTES, cubin.log
    assert len(cubin.kernels) == 2 + 3 * len(DTYPES)


@pytest.mark.parametrize(
    ("dtype", "outliers"),
    [(torch.float32, 0), (torch.float32, 3), (torch.bfloat16, 40), (torch.float16, 3)],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_emulated_kernels_equal_the_reference(
    shape: tuple[int, int, int], dtype: torch.dtype, outliers: int
) -> None:
    rows, columns, outs = shape
    x, made = numbers(rows, columns, dtype, outliers), weight(outs, columns)
    for schedule, threshold in zip(SCHEDULES, (6.0, 0.0, 6.0, 1.0), strict=True):
        run(x, made, threshold, emulated(schedule=schedule))


@pytest.mark.parametrize("mode", ["check", "ubsan"])
@pytest.mark.parametrize("shape", SMALL)
def test_no_access_is_out_of_bounds_racing_or_misaligned(
    shape: tuple[int, int, int], mode: Mode
) -> None:
    rows, columns, outs = shape
    made = weight(outs, columns)
    for dtype, outliers in ((torch.float32, 2), (torch.bfloat16, 40)):
        run(numbers(rows, columns, dtype, outliers), made, 6.0, emulated(mode))


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_bad_numbers_do_the_same(threshold: float) -> None:
    x, made = numbers(5, 70, torch.float32, 2), weight(20, 70)
    x[1, 3], x[2, 4], x[3, 5] = float("nan"), float("inf"), -float("inf")
    x[4] = 0
    run(x, made, threshold, emulated())


def test_rows_may_be_part_of_a_wider_tensor() -> None:
    wide, made = numbers(6, 200, torch.bfloat16, 5), weight(16, 70)
    run(wide[:, 31:101], made, 6.0, emulated("ubsan"))
    codes, absmax = weight(9, 200)
    assert_same(
        [int8_cuda.dequantize_rows(codes[:, 7:90], absmax, torch.float16, emulated("ubsan"))],
        [int8_reference.dequantize_rows(codes[:, 7:90], absmax, torch.float16)],
    )


@pytest.mark.parametrize(("rows", "columns", "outs"), [(0, 8, 8), (3, 0, 4), (3, 8, 0)])
def test_empty_sizes(rows: int, columns: int, outs: int) -> None:
    run(torch.ones(rows, columns), weight(outs, columns), 6.0, emulated())


def test_few_rows_are_filled_up_for_the_integer_product() -> None:
    """The library takes no fewer than 17 rows, and sizes of a multiple of eight."""
    seen = []
    original = torch._int_mm

    def spy(a: Tensor, b: Tensor) -> Tensor:
        seen.append(len(a))
        return original(a, b)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "_int_mm", spy)
        codes, _ = weight(24, 64)
        for rows in (1, 16, 31, 32, 40):
            got = int8_cuda._products(codes[:1].expand(rows, 64).contiguous(), codes)
            expected = int8_reference.products(codes[:1].expand(rows, 64), codes)
            assert torch.equal(got, expected)
        int8_cuda._products(codes[:, :63].contiguous(), codes[:, :63].contiguous())
        int8_cuda._products(codes, codes[:23])
    assert seen == [32, 32, 32, 32, 40]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_on_a_gpu_the_bits_are_the_same(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, columns, outs = shape
    x, made = numbers(rows, columns, dtype, 3), weight(outs, columns)
    bias = torch.linspace(-1, 1, outs).to(dtype)
    there = [t.cuda() for t in (x, *made, bias)]
    for threshold in (0.0, 6.0):
        got = int8.quantize_rows(there[0], threshold)
        assert_same([t.cpu() for t in got], int8.quantize_rows(x, threshold))
        y, _ = int8.linear(there[0], there[1], there[2], there[3], threshold)
        assert_same([y.cpu()], [in_order(x, *made, bias, threshold)])
