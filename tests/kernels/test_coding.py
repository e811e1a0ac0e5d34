"""Quantize and dequantize: the C++ target and the emulated CUDA one have the reference's bits.

What the reference itself computes is held to a search without tables, in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import emulated_coding
import nvrtc
from bnbx.errors import InputError, OptionError, QuantizedDataError, UnsupportedTensorError
from bnbx.kernels import coding, coding_cuda, coding_reference
from bnbx.kernels.coding_source import CodingPlan
from bnbx.kernels.dtypes import DTYPE_NAMES
from bnbx.kernels.encoding import Encoding, from_label, make_encoding
from bnbx.registry import QuantType, quant_types
from codebooks import codebooks
from compiled import shared_cache
from cuda_on_cpu import SCHEDULES
from cuda_on_cpu.build import Mode
from scale_kinds import ENCODINGS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((33, 70), (5,), (2, 4097), (0, 4), (0,))
EVERY = [pytest.param(encoding, id=name) for name, encoding in ENCODINGS.items()]
LONG = [pytest.param(make_encoding("nf4", size), id=f"nf4-{size}") for size in (128, 4096)]


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    with shared_cache(tmp_path_factory):
        yield


def numbers(shape: Sequence[int], seed: int = 0) -> Tensor:
    """Normal numbers, with rows of very different magnitude."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    return x * torch.exp(3 * torch.randn(*shape[:1], *[1] * (len(shape) - 1), generator=generator))


def awkward() -> Tensor:
    """Blocks with NaN, infinity, nothing but zeros, subnormal and very large numbers."""
    x = numbers((40, 70))
    x[3, 4], x[20, 5], x[21, 6] = torch.nan, torch.inf, -torch.inf
    x[30], x[31], x[32] = 0, 1e-40, -3e38
    return x


def assert_same(got: Sequence[Tensor], expected: Sequence[Tensor], names: Sequence[str]) -> None:
    for name, one, other in zip(names, got, expected, strict=True):
        assert one.shape == other.shape, name
        same = one.contiguous().view(-1).view(torch.uint8)
        assert torch.equal(same, other.contiguous().view(-1).view(torch.uint8)), name


def assert_same_numbers(got: Tensor, expected: Tensor) -> None:
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(0), expected.nan_to_num(0))


# ---- C++


@pytest.mark.parametrize("encoding", [*EVERY, *LONG])
def test_cpp_has_the_bits_of_the_reference(encoding: Encoding) -> None:
    other = DTYPES[1 + encoding.bits % 2]
    for turn, shape in enumerate(SHAPES):
        for dtype in (torch.float32, other):
            x = numbers(shape, turn).to(dtype)
            parts = coding.encode(encoding, x)
            assert_same(parts, coding_reference.encode(encoding, x), encoding.parts)
            expected = coding_reference.decode(encoding, parts, shape, dtype)
            assert_same_numbers(coding.decode(encoding, parts, shape, dtype), expected)


@pytest.mark.parametrize("encoding", EVERY[::2])
def test_cpp_treats_awkward_numbers_as_the_reference_does(encoding: Encoding) -> None:
    every = awkward()
    for x in (every, every[30:31], every[31:32], every[32:33]):
        parts = coding.encode(encoding, x)
        if encoding.second is None:
            assert_same(parts, coding_reference.encode(encoding, x), encoding.parts)
        found = coding.decode(encoding, parts, x.shape)
        assert_same_numbers(found, coding_reference.decode(encoding, parts, x.shape, x.dtype))


@pytest.mark.parametrize("encoding", EVERY[::4])
def test_cpp_rounds_stochastically_as_the_reference_does(encoding: Encoding) -> None:
    x = numbers((40, 70))
    rand = torch.rand(1000, generator=torch.Generator().manual_seed(1))
    for given_noise in ({"seed": 5}, {"rand": rand}):
        got = coding.encode(encoding, x, **given_noise)
        expected = coding_reference.encode(encoding, x, **given_noise)
        assert_same(got, expected, encoding.parts)


@pytest.mark.parametrize("encoding", [*EVERY, *LONG])
def test_rows_are_decoded_alone(encoding: Encoding) -> None:
    shape = (37, 70)
    parts = coding.encode(encoding, numbers(shape))
    every = coding.decode(encoding, parts, shape)
    for first, last in ((0, 37), (1, 2), (5, 36), (36, 37)):
        out = torch.full((last - first, 70), -7.0)
        coding.decode_rows(encoding, parts, shape, out, first)
        assert torch.equal(out, every[first:last])


def test_the_number_of_threads_changes_nothing() -> None:
    threads = torch.get_num_threads()
    encodings = [e for e in ENCODINGS.values() if e.per == "tensor" or "tensor_scale" in e.parts]
    x = numbers((600, 700))
    try:
        for encoding in [*encodings, make_encoding("nf4", double=True)]:
            found = []
            for count in (1, 2):
                torch.set_num_threads(count)
                found.append(coding.encode(encoding, x))
            assert_same(found[0], found[1], encoding.parts)
    finally:
        torch.set_num_threads(threads)


@settings(max_examples=60)
@given(values=codebooks(), seed=st.integers(0, 2**16))
def test_any_table(values: tuple[float, ...], seed: int) -> None:
    bits = len(values).bit_length() - 1
    try:
        table = QuantType(name="table", summary="any", bits=bits, values=values, block_size=64)
    except ValueError:
        return  # not a table: its largest magnitude is not near 1
    encoding = make_encoding(table)
    assert from_label(encoding.label) == encoding
    x = numbers((3, 70), seed)
    parts = coding.encode(encoding, x)
    assert_same(parts, coding_reference.encode(encoding, x), encoding.parts)


# ---- the reference


@pytest.mark.parametrize("encoding", EVERY)
def test_codes_are_those_of_the_nearest_numbers(encoding: Encoding) -> None:
    """Of all numbers of the table, none is nearer to x / factor than the one that was chosen."""
    x = numbers((9, 130))
    parts = coding_reference.encode(encoding, x)
    if encoding.second is not None or encoding.quant_type.grid:
        return  # found for scales as they were, or rounded to a grid on purpose
    found = coding_reference.decode(encoding, parts, x.shape, torch.float32).double()
    rows, columns = encoding.grid(x.shape)
    per = columns if encoding.per != "block" else encoding.block_size
    block = torch.arange(rows * columns) // (per if encoding.per != "row" else columns)
    factor = coding_reference.factors(encoding, parts, x.shape).double()[block]
    flat = x.view(-1).double()
    if "center" in encoding.parts:
        center = parts[encoding.parts.index("center")].double()[block]
        flat = flat - center
        found = found - center.view_as(found)
    levels = encoding.tables.levels.astype(np.float64)
    written = torch.tensor(levels[list(encoding.codebook.codes)])
    best = (flat[:, None] - written * factor[:, None]).abs().amin(1)
    chosen = (flat - found.view(-1)).abs()
    # Each of scaling, threshold and level is rounded once to float32, relative to the factor.
    assert (chosen <= best + 8 * 2.0**-24 * factor.abs() * written.abs().max()).all()


@pytest.mark.parametrize("encoding", [e for e in EVERY if "double" not in str(e.id)][::4])
def test_stochastic_rounding_is_right_on_average(encoding: Encoding) -> None:
    x = torch.rand(1, 512, generator=torch.Generator().manual_seed(0)) - 0.5
    tries = 400
    parts = [coding.encode(encoding, x, seed=seed) for seed in range(tries)]
    found = torch.stack([coding.decode(encoding, each, x.shape) for each in parts]).double()
    low, high = found.amin(0), found.amax(0)
    inside = high > low  # others are numbers of the table, or were never drawn
    assert inside.float().mean() > 0.5
    deviation = ((x - low) * (high - x)).clamp(min=0).div(tries).sqrt()
    # Six deviations, and room for draws so rare that their number is far from normal.
    allowed = 6 * deviation + 12 * (high - low) / tries
    assert ((found.mean(0) - x).abs() <= allowed)[inside].all()


# ---- CUDA


@pytest.mark.parametrize("encoding", [*EVERY[::2], *LONG])
def test_emulated_cuda_has_the_bits_of_the_reference(encoding: Encoding) -> None:
    first = coding.first_level(encoding)
    dtype = DTYPES[encoding.bits % 3]
    for turn, shape in enumerate(SHAPES[:3]):
        x = numbers(shape, turn).to(dtype)
        schedule = SCHEDULES[turn % len(SCHEDULES)]
        parts = emulated_coding.encode(first, x, schedule=schedule)
        assert_same(parts, coding_reference.encode(first, x), first.parts)
        every = coding_reference.encode(encoding, x)
        expected = coding_reference.decode(encoding, every, shape, x.dtype).view(-1)
        got = emulated_coding.decode(encoding, every, shape, x.dtype, schedule=schedule)
        assert_same_numbers(got, expected)
    start, count = 70 * 3, 70 * 20
    got = emulated_coding.decode(
        encoding, parts := coding.encode(encoding, numbers((33, 70))), (33, 70), dtype, start, count
    )  # fmt: skip
    every_number = coding_reference.decode(encoding, parts, (33, 70), dtype).view(-1)
    assert_same_numbers(got, every_number[start : start + count])


@pytest.mark.parametrize("encoding", EVERY[::5])
def test_emulated_cuda_treats_awkward_numbers_as_the_reference_does(encoding: Encoding) -> None:
    first = coding.first_level(encoding)
    x = awkward()
    parts = emulated_coding.encode(first, x)
    assert_same(parts, coding_reference.encode(first, x), first.parts)


@pytest.mark.parametrize("encoding", EVERY[::8])
def test_emulated_cuda_rounds_stochastically_as_the_reference_does(encoding: Encoding) -> None:
    first = coding.first_level(encoding)
    x = numbers((9, 70))
    parts = emulated_coding.encode(first, x, seed=7)
    assert_same(parts, coding_reference.encode(first, x, seed=7), first.parts)
    rand = torch.rand(100, generator=torch.Generator().manual_seed(1))
    parts = emulated_coding.encode(first, x, rand)
    assert_same(parts, coding_reference.encode(first, x, rand), first.parts)


@pytest.mark.parametrize("mode", ["check", "ubsan"])
@pytest.mark.parametrize("encoding", EVERY[1::8])
def test_no_access_is_out_of_bounds_racing_or_misaligned(encoding: Encoding, mode: Mode) -> None:
    first = coding.first_level(encoding)
    x = numbers((5, 131))
    parts = emulated_coding.encode(first, x, mode=mode)
    assert_same(parts, coding_reference.encode(first, x), first.parts)
    every = coding_reference.encode(encoding, x)
    got = emulated_coding.decode(encoding, every, x.shape, x.dtype, mode=mode)
    assert_same_numbers(got, coding_reference.decode(encoding, every, x.shape, x.dtype).view(-1))


@pytest.mark.parametrize(
    ("encoding", "arch", "dtype", "stochastic"),
    [
        pytest.param(*each.values, arch, DTYPES[turn % 3], turn % 5 == 0, id=f"{each.id}-sm_{arch}")
        for number, each in enumerate(EVERY)
        for turn, arch in enumerate(nvrtc.ARCHITECTURES)
        if turn == number % len(nvrtc.ARCHITECTURES) or number % 40 == 0
    ],
)
def test_compiles_to_machine_code_without_spills(
    encoding: Encoding, arch: int, dtype: torch.dtype, stochastic: bool
) -> None:
    if reason := nvrtc.available():
        pytest.skip(reason)
    plan = CodingPlan(encoding, DTYPE_NAMES[dtype], stochastic and encoding.second is None)
    cubin = nvrtc.compile_cubin(coding_cuda.source(plan), arch)
    assert (cubin.spill_stores, cubin.spill_loads, cubin.stack_bytes) == (0, 0, 0), cubin.log
    assert cubin.registers <= 128, cubin.log


@pytest.mark.gpu
@pytest.mark.parametrize("encoding", [*EVERY, *LONG])
def test_on_a_gpu_the_bits_are_the_same(encoding: Encoding) -> None:
    first = coding.first_level(encoding)
    for turn, shape in enumerate(SHAPES):
        x = numbers(shape, turn).to(DTYPES[turn % 3])
        parts = coding.encode(first, x.cuda())
        assert_same([p.cpu() for p in parts], coding_reference.encode(first, x), first.parts)
        every = coding_reference.encode(encoding, x)
        got = coding.decode(encoding, [part.cuda() for part in every], shape, x.dtype)
        assert_same_numbers(got.cpu(), coding_reference.decode(encoding, every, shape, x.dtype))


# ---- what is refused, before any memory is touched


def test_what_is_not_floats_is_refused() -> None:
    encoding = make_encoding("nf4")
    for bad in (torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.int32)):
        with pytest.raises(UnsupportedTensorError, match=str(bad.dtype)):
            coding.encode(encoding, bad)
    with pytest.raises(UnsupportedTensorError, match="dense"):
        coding.encode(encoding, torch.eye(3).to_sparse())
    with pytest.raises(UnsupportedTensorError, match="rand"):
        coding.encode(encoding, torch.zeros(3), rand=torch.zeros(0))


@pytest.mark.parametrize("encoding", EVERY)
def test_parts_that_do_not_fit_are_refused(encoding: Encoding) -> None:
    shape = (6, 70)
    parts = coding.encode(encoding, numbers(shape))
    for place, name in enumerate(encoding.parts):
        longer = torch.cat([parts[place].view(-1)] * 2)
        for bad in (longer, parts[place].view(-1)[:0], parts[place].view(-1).double()):
            wrong = [*parts]
            wrong[place] = bad
            with pytest.raises(QuantizedDataError, match=name):
                coding.decode(encoding, wrong, shape)
    with pytest.raises(QuantizedDataError, match="parts"):
        coding.decode(encoding, parts[:1], shape)
    with pytest.raises(QuantizedDataError, match="out"):
        coding.decode(encoding, parts, shape, out=torch.zeros(3))
    with pytest.raises(UnsupportedTensorError, match="float64"):
        coding.decode(encoding, parts, shape, torch.float64)


def test_encodings_that_cannot_be_are_refused() -> None:
    with pytest.raises(OptionError, match="block size 100"):
        make_encoding("nf4", 100)
    with pytest.raises(QuantizedDataError, match="does not name"):
        from_label("nf4/what")
    steps = [t.name for t in quant_types() if t.scale.keeps_step]
    for name in steps:
        with pytest.raises(OptionError, match="only float32"):
            make_encoding(name, double=True)


# ---- scales that are quantized too


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scales_whose_sum_is_beyond_float32(dtype: torch.dtype) -> None:
    """Their mean is not: finite numbers come back finite, with the same bits on each target."""
    encoding = make_encoding("nf4", double=True)
    x = (torch.randn(64 * 300, generator=torch.Generator().manual_seed(0)) * 6e37).to(dtype)
    parts = coding.encode(encoding, x)
    assert_same(parts, coding_reference.encode(encoding, x), encoding.parts)
    found = coding.decode(encoding, parts, x.shape)
    assert bool(found.isfinite().all())
    plain = make_encoding("nf4")
    scales = coding.encode(plain, x)[1]
    assert bool(scales.sum().isinf())
    assert float(parts[3]) == pytest.approx(float(scales.double().mean()), rel=1e-6)
    error = (found.double() - x.double()).abs() / scales.double().repeat_interleave(64)
    assert float(error.max()) < 0.2


def test_means_of_scales() -> None:
    """A mean in float32 is torch's, to the bit; no mean of finite scales is infinite."""
    most = torch.finfo(torch.float32).max
    for numel in (1, 2, 1000, 100_003):
        scales = numbers((numel,)).abs()
        assert torch.equal(coding_reference.mean_of(scales), scales.mean())
        mean = coding_reference.mean_of(torch.full((numel,), most))
        assert float(mean) == pytest.approx(most, rel=1e-6)
    assert float(coding_reference.mean_of(torch.full((1000,), 1e-45))) > 0
    assert bool(coding_reference.mean_of(torch.tensor([1.0, torch.nan])).isnan())
    assert float(coding_reference.mean_of(torch.empty(0))) == 0.0


# ---- tensors of more than 2**31 elements


@pytest.mark.slow
def test_more_elements_than_32_bits_count() -> None:
    available = next(
        int(line.split()[1])
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable")
    )
    if available < 9 * 2**20:
        pytest.skip(f"needs 9 GiB of memory, there are {available / 2**20:.1f}")
    numel = 2**31 + 200
    x = torch.zeros(numel, dtype=torch.bfloat16)
    x[-128:] = torch.linspace(-1, 1, 128)
    encoding = make_encoding("nf4")
    parts = coding.encode(encoding, x)
    tail = coding_reference.encode(encoding, x[2**31 :])
    assert torch.equal(parts[0][2**30 :], tail[0])
    assert torch.equal(parts[1][2**25 :], tail[1])
    out = torch.empty(1, 200, dtype=torch.bfloat16)
    coding._decode(encoding, parts, x.shape, out, 2**31)
    assert torch.equal(out[0], coding_reference.decode(encoding, tail, (200,), torch.bfloat16))
    assert prod(out.shape) == 200


def test_tensors_without_memory_are_refused() -> None:
    encoding = make_encoding("nf4")
    x = numbers((6, 70))
    parts = coding.encode(encoding, x)
    for lost in (x, *parts):
        size = lost.untyped_storage().nbytes()
        for left in (0, size // 2):
            lost.untyped_storage().resize_(left)
            with pytest.raises(InputError, match="freed or made smaller"):
                _ = (
                    coding.encode(encoding, x)
                    if lost is x
                    else coding.decode(encoding, parts, x.shape)
                )
        lost.untyped_storage().resize_(size)
