"""Products as those of integers, with AVX2, and with AVX-512 where it is told to have slow pairs.

With AVX2 they are those of bfloat16 with codes of up to 4 bits, and of any dtype with 8-bit whole
numbers; where a processor has AVX-512, its compiler is told that it has not. With AVX-512 they are
those of bfloat16 with 4-bit codes.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bnbx.kernels import coding, linear_cpu
from bnbx.kernels.encoding import Encoding, make_encoding
from bnbx.kernels.linear_source import plan_for
from bnbx.registry import QuantType, quant_types
from compiled import shared_cache
from exact_weights import (
    KINDS,
    NOTHING,
    Weight,
    exact_encoding,
    exact_weight,
    small_numbers,
    with_codes,
)

pytestmark = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64") or not shutil.which("g++"),
    reason="needs g++ for x86",
)
COUNTS = (1, 2, 3, 4, 5, 7, 31, 33, 70)  # of rows: those that fill up what is laid out, and do not


AVX2, AVX512 = "-mno-avx512f", "-DBNBX_SLOW_PAIRS"


@pytest.fixture(scope="module", autouse=True, params=[AVX2, AVX512])
def flags(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """What the compiler is told."""
    if request.param == AVX512 and "avx512_vnni" not in processor_flags():
        pytest.skip("needs AVX-512 VNNI")

    def forget() -> None:
        linear_cpu.kernel.cache_clear()
        linear_cpu.compiled_for.cache_clear()
        linear_cpu.has_tiles.cache_clear()
        linear_cpu._in_integers.cache_clear()

    with shared_cache(tmp_path_factory), pytest.MonkeyPatch.context() as patch:
        patch.setenv("BNBX_CXX", f"g++ {request.param}")
        forget()
        yield request.param
        forget()


def processor_flags() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return []


def whole_encoding(bits: int, kind: str, block: int | None, second: int = 0) -> Encoding:
    """As `exact_encoding`, but every code is a number: integers stand for such levels only."""
    steps = 2 ** (bits - 1)
    numbers = range(-steps, steps) if bits < 8 else (*range(128), *range(-128, 0))
    values = tuple(number / steps for number in numbers)
    made = QuantType(
        name=f"whole{bits}_{kind}", summary="whole", bits=bits, values=values, scale=KINDS[kind]
    )
    like = exact_encoding(8, block=64, second=second or 16)
    return make_encoding(
        made,
        block if KINDS[kind].per == "block" else None,
        second=like.second if second else None,
        second_block=second or 256,
    )


WHOLE = {
    "2-blocks_of_16": whole_encoding(2, "float32", 16),
    "2-row": whole_encoding(2, "row", None),
    "3-blocks_of_32": whole_encoding(3, "bfloat16", 32),
    "3-blocks_of_4096": whole_encoding(3, "float32", 4096),
    "4-blocks_of_16": whole_encoding(4, "float32", 16),
    "4-blocks_of_32": whole_encoding(4, "e8m0", 32),
    "4-blocks_of_64": whole_encoding(4, "float32", 64),
    "4-blocks_of_128": whole_encoding(4, "float32", 128),
    "4-second": whole_encoding(4, "float32", 64, second=16),
    "4-e4m3_tensor": whole_encoding(4, "e4m3_tensor", 16),
    "4-tensor": whole_encoding(4, "tensor", None),
    "4-centered": whole_encoding(4, "centered", 64),
    "8-blocks_of_64": whole_encoding(8, "float32", 64),
    "8-blocks_of_256": whole_encoding(8, "bfloat16", 256),
    "8-blocks_of_32": whole_encoding(8, "float32", 32),
    "8-second": whole_encoding(8, "float32", 128, second=16),
    "8-row": whole_encoding(8, "row", None),
    "8-centered": whole_encoding(8, "centered", 64),
}
CASES = [(name, torch.bfloat16) for name in WHOLE]
CASES += [("8-row", torch.float32), ("8-blocks_of_64", torch.float32), ("8-row", torch.float16)]


def weight_of(encoding: Encoding, shape: tuple[int, int], seed: int = 0) -> Weight:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**encoding.bits, shape, generator=generator, dtype=torch.uint8)
    return with_codes(encoding, codes, generator)


def multiply(weight: Weight, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return linear_cpu.multiply(weight.encoding, weight.parts, weight.shape, x, bias)


def quantized(name: str, shape: tuple[int, int], block: int | None = None) -> Weight:
    encoding = make_encoding(name, block)
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    return Weight(encoding, shape, list(coding.encode(encoding, numbers)))


def error_in_roundings(got: Tensor, exact: Tensor) -> float:
    """How much larger the error is than that of the exact result, rounded to bfloat16."""
    least = (exact.to(torch.bfloat16).double() - exact).square().mean().sqrt()
    return float((got.double() - exact).square().mean().sqrt() / least)


def test_this_is_what_these_tests_are_about() -> None:
    """Integers need room for 32 rows."""
    encoding = make_encoding("nf4")
    rooms = [
        linear_cpu.kernel(plan_for(encoding, dtype)).bnbx_room_for(1024, 32)
        for dtype in ("bfloat16", "float32", "float16")
    ]
    assert rooms[0] > 32 * 1024 > rooms[1] == rooms[2]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_exact_products_are_exact(name: str, dtype: torch.dtype) -> None:
    """Also rows that are cut into tiles, and that are no whole groups."""
    for turn, shape in enumerate(((7, 128), (40, 384), (35, 64), (3, 8192 + 128), (5, 100))):
        weight = weight_of(WHOLE[name], shape, turn)
        bias = small_numbers(1, shape[0], dtype, seed=2)[0]
        for count in COUNTS:
            x = small_numbers(count, shape[1], dtype, seed=count)
            exact = x.double() @ weight.dense.T
            assert torch.equal(multiply(weight, x), exact.to(dtype)), (shape, count)
            with_bias = (exact + bias.double()).to(dtype)
            assert torch.equal(multiply(weight, x, bias), with_bias), (shape, count)


NARROW = [name for name in quant_types().names() if quant_types().get(name).bits <= 4]


@pytest.mark.parametrize("name", NARROW)
def test_less_is_lost_than_a_20th_of_a_rounding(name: str) -> None:
    """Of a normal distribution, of positive numbers, of heavy tails, and of rows with outliers.

    Independent errors add up as squares.
    """
    weight = quantized(name, (300, 1024))
    generator = torch.Generator().manual_seed(4)
    normal = torch.randn(9, 1024, generator=generator)
    outliers = normal.clone()
    outliers[:, ::97] *= 1000
    for x in (normal, normal.abs(), normal.pow(5), outliers):
        x = x.bfloat16()
        exact = x.double() @ weight.dense.T
        assert error_in_roundings(multiply(weight, x), exact) < (1 + 1 / 20**2) ** 0.5


@pytest.mark.parametrize("name", ["int8", "int8_block", "dynamic8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_products_with_8_bits_are_no_worse_than_those_of_floats(
    name: str, dtype: torch.dtype
) -> None:
    """Also where integers cannot hold what stands beside outliers: then they are floats."""
    weight = quantized(name, (100, 1024))
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(9, 1024, generator=generator)
    x[1] = x[1].abs()
    for row, factor in ((2, 50), (3, 1000), (4, 1e5)):
        x[row, ::97] *= factor
    x = x.to(dtype)
    exact, size = x.double() @ weight.dense.T, x.double().abs() @ weight.dense.abs().T
    rounding = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    got = multiply(weight, x).double()
    there = exact.abs() < 6e4
    assert ((got - exact).abs() <= 2.0**-20 * size + rounding * exact.abs())[there].all()


@pytest.mark.parametrize("outliers", [1, 2, 7])
def test_numbers_next_to_outliers_that_count_nothing_are_kept(outliers: int) -> None:
    """Level 7 of nf4 is 0: what is left are the other numbers, up to 2**40 times smaller."""
    encoding = make_encoding("nf4")
    generator = torch.Generator().manual_seed(5)
    codes = torch.randint(0, 16, (200, 256), generator=generator, dtype=torch.uint8)
    for place in range(outliers):
        codes[:, place::64] = 7
    weight = with_codes(encoding, codes, generator)
    for size in (2.0**3, 2.0**9, 2.0**14, 2.0**20, 2.0**22, 2.0**30, 2.0**40):
        for count in (1, 6):
            x = torch.randn(count, 256, generator=generator)
            for place in range(outliers):
                x[:, place::64] = size * (1 + place)
            x = x.bfloat16()
            exact = x.double() @ weight.dense.T
            assert error_in_roundings(multiply(weight, x), exact) < (1 + 1 / 20**2) ** 0.5, size


@pytest.mark.parametrize("where", ["weight of zero", "block of small scale", "small weights"])
def test_few_numbers_next_to_an_outlier_are_all_that_counts(where: str) -> None:
    """Where x is mostly zero, those that integers of the outlier's unit lose may be the result."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(48, 4096, generator=generator)
    x = torch.zeros(3, 4096)
    x[:, ::64] = 1e4
    if where == "weight of zero":  # of nf4, which has one
        weight[:, ::64] = 0
        for place in range(1, 5):
            x[:, place::64] = 0.3
    elif where == "block of small scale":
        weight.view(48, -1, 32)[:, ::4] *= 1e-5
        x.view(3, -1, 128)[:, :, 64] = 0
        x.view(3, -1, 128)[:, :, 100:108] = 0.3
    else:
        x += (torch.randn(x.shape, generator=generator) - 1.6).relu()
        weight[:, ::64] *= 1e-4
    encoding = make_encoding("nf4", 32 if where == "block of small scale" else None)
    parts = coding.encode(encoding, weight)
    x = x.bfloat16()
    dense = coding.decode(encoding, parts, weight.shape).double()
    exact = x.double() @ dense.T
    got = multiply(Weight(encoding, (48, 4096), list(parts)), x).double()
    assert (got - exact).norm() / exact.norm() < 2**-8


@pytest.mark.parametrize("outliers", [1, 2, 7])
def test_float32_beside_outliers_is_as_good_as_in_a_sum_of_floats(outliers: int) -> None:
    generator = torch.Generator().manual_seed(5)
    codes = torch.randint(0, 256, (50, 256), generator=generator, dtype=torch.uint8)
    for place in range(outliers):
        codes[:, place::64] = 0
    weight = with_codes(make_encoding("int8_block"), codes, generator)
    for size in (1.0, 2.0**5, 2.0**10, 2.0**20, 2.0**28):
        x = torch.randn(3, 256, generator=generator)
        for place in range(outliers):
            x[:, place::64] = size
        exact = x.double() @ weight.dense.T
        numbers = x.double().abs() @ weight.dense.abs().T
        assert ((multiply(weight, x).double() - exact).abs() <= 2.0**-21 * numbers).all(), size


def test_levels_far_apart_are_multiplied_as_floats() -> None:
    """Integers of 16 bits cannot tell the small ones: products are as those of float32."""
    values = (-1.0, -(5.0**-3), -(5.0**-6), 0.0, 5.0**-7, 5.0**-5, 5.0**-2, 1.0)
    spec = QuantType(name="apart", summary="far", bits=3, values=values, scale=KINDS["tensor"])
    weight = weight_of(make_encoding(spec), (50, 128))
    for count in (1, 9):
        x = torch.randn(count, 128, generator=torch.Generator().manual_seed(9)).bfloat16()
        assert torch.equal(multiply(weight, x), multiply(weight, x.float()).bfloat16())
        assert not linear_cpu._in_integers(weight.encoding, torch.bfloat16, 128)


@pytest.mark.parametrize(("name", "dtype"), [("nf4", torch.bfloat16), ("int8", torch.float32)])
def test_large_results_are_finite(name: str, dtype: torch.dtype) -> None:
    encoding = make_encoding(name)
    numbers = torch.randn(40, 256, generator=torch.Generator().manual_seed(3)) * 1e30
    weight = Weight(encoding, (40, 256), list(coding.encode(encoding, numbers)))
    x = (1e4 * torch.randn(3, 256, generator=torch.Generator().manual_seed(4))).to(dtype)
    got, exact = multiply(weight, x).double(), x.double() @ weight.dense.T
    assert ((got - exact).abs() <= 2.0**-8 * exact.abs().max()).all()


def test_a_row_is_the_same_among_others_that_are_integers() -> None:
    weight = quantized("nf4", (70, 384))
    x = torch.randn(75, 384, generator=torch.Generator().manual_seed(6))
    x[3, 7], x[8, 250], x[40] = 1e4, -3e3, 0
    x = x.bfloat16()
    together = multiply(weight, x)
    for i, row in enumerate(x):
        assert torch.equal(multiply(weight, row[None])[0], together[i]), i
    for count in (2, 3, 34):
        assert torch.equal(multiply(weight, x[:count]), together[:count])


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan"), 1e-39, 1e38])
def test_numbers_that_integers_cannot_stand_for(number: float) -> None:
    """They are multiplied as floats, and so may be the rows beside them."""
    weight = quantized("nf4", (30, 128))
    for row, count in ((0, 1), (2, 3), (5, 40), (39, 40)):
        x = torch.randn(count, 128, generator=torch.Generator().manual_seed(7))
        x[row] = 0
        x[row, 77] = number
        x = x.bfloat16()
        got, exact = multiply(weight, x).double(), x.double() @ weight.dense.T
        assert torch.equal(got.isnan(), exact.isnan())
        near = 2.0**-7 * exact.abs() + 2.0**-8 * (torch.arange(count) != row)[:, None] + 2.0**-133
        there = exact.abs() < 3e38
        assert ((got - exact).abs() <= near)[there].all()
        assert torch.equal(got.isinf(), exact.abs() > 3.4e38)


def test_a_code_that_is_no_number() -> None:
    weight = exact_weight(exact_encoding(4), (9, 128))
    weight.parts[0][70] = NOTHING  # two codes of row 1
    for count in (1, 5):
        got = multiply(weight, small_numbers(count, 128, torch.bfloat16))
        assert got.isnan().any(0).nonzero()[:, 0].tolist() == [1]


def test_the_number_of_threads_changes_nothing() -> None:
    weight = quantized("nf4", (1100, 1024))
    threads = torch.get_num_threads()
    for count in (1, 3, 40):
        x = torch.randn(count, 1024, generator=torch.Generator().manual_seed(8)).bfloat16()
        found = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(multiply(weight, x))
        torch.set_num_threads(threads)
        assert all(torch.equal(found[0], other) for other in found[1:])


def test_nothing_is_read_or_written_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The room that kernels ask for is all that they write to."""
    room: list[Tensor] = []
    empty: Any = Tensor.new_empty

    def guarded(tensor: Tensor, size: Any, **options: Any) -> Any:
        if options.get("dtype") != torch.float32:
            return empty(tensor, size, **options)
        around = torch.full((size + 32,), 7.0)
        room.append(around)
        return around[16:-16]

    weight = quantized("nf4", (33, 384))
    monkeypatch.setattr(Tensor, "new_empty", guarded)
    for count in COUNTS:
        multiply(weight, torch.randn(count, 384).bfloat16())
    assert len(room) == len(COUNTS)
    for each in room:
        assert torch.cat((each[:16], each[-16:])).eq(7).all()
