"""Products with quantized weights on the CPU: every code and scale is read, in its place, once.

Weights from `exact_weights.py` have products that are exact in float32, so results must be equal.
On other numbers the error is held to a bound; see `roundings`.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bnbx.errors import BnbxWarning, CompileError, QuantizedDataError, UnsupportedTensorError
from bnbx.kernels import coding, linear, linear_cpu, linear_panels
from bnbx.kernels.compiler import find_compiler
from bnbx.kernels.encoding import Encoding, make_encoding
from bnbx.kernels.linear_source import plan_for, render_linear
from bnbx.registry import quant_types
from compiled import shared_cache
from exact_weights import NOTHING, Weight, exact_encoding, exact_weight, small_numbers, with_codes

# out, in: rows that begin in the middle of bytes, groups and blocks; tails; more than one tile.
SHAPES = ((5, 1), (9, 37), (7, 128), (33, 65), (4, 300), (40, 24), (3, 2500))
ENCODINGS: dict[str, Encoding] = {
    "2-blocks_of_16": exact_encoding(2, block=16),
    "2-row": exact_encoding(2, "row"),
    "3-blocks_of_4096": exact_encoding(3, block=4096),
    "3-centered": exact_encoding(3, "centered", 32),
    "4": exact_encoding(4),
    "4-second": exact_encoding(4, block=16, second=16),
    "4-e4m3_tensor": exact_encoding(4, "e4m3_tensor", 16),
    "4-row_centered": exact_encoding(4, "row_centered"),
    "4-blocks_of_4096": exact_encoding(4, block=4096),
    "5-blocks_of_16": exact_encoding(5, block=16),
    "5-e8m0": exact_encoding(5, "e8m0", 32),
    "6-tensor": exact_encoding(6, "tensor"),
    "6-centered": exact_encoding(6, "centered", 16),
    "7-bfloat16": exact_encoding(7, "bfloat16"),
    "8": exact_encoding(8, block=16),
}
# Instruction sets that this machine may be told it lacks, and encodings to try without them.
LACKING = {
    "-mno-avx512f": tuple(ENCODINGS),
    "-mno-avx512vbmi": ("3-blocks_of_4096", "5-e8m0"),
    "-mno-avx512f -mno-avx2 -mno-fma": ("3-centered", "4-second"),
}
# Of processors that are rare, or that nobody built: their sources compile.
COMBINED = (
    "-march=x86-64",
    "-mavx2 -mfma",
    "-mavx2 -mfma -mf16c -mavx512f -mno-avx512bw",
    "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mno-avx512vbmi",
    "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vbmi -mavx512bf16",
)
NARROWER = [(flags, name) for flags, names in LACKING.items() for name in names]


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with shared_cache(tmp_path_factory):
        yield


def forget() -> None:
    """Let the next kernel be looked for with the compiler that there is then."""
    linear_cpu.kernel.cache_clear()
    linear_cpu.compiled_for.cache_clear()
    linear_cpu.has_tiles.cache_clear()


def assert_exact(weight: Weight, dtype: torch.dtype = torch.float32) -> None:
    """Products of one to five rows by the kernel, and columns of the weight."""
    out, inner = weight.shape
    bias = small_numbers(1, out, dtype, seed=2)[0]
    for count in (1, 2, 3, 4, 5):
        x = small_numbers(count, inner, dtype, seed=count)
        expected = (x.double() @ weight.dense.T + bias.double()).to(dtype)
        got = linear_cpu.multiply(weight.encoding, weight.parts, weight.shape, x, bias)
        assert torch.equal(got, expected), count
    for first, last in ((0, inner), (inner // 3, inner - inner // 4)):
        columns = torch.full((out, last - first), -7.0, dtype=dtype)
        linear_cpu.decode_columns(weight.encoding, weight.parts, weight.shape, first, columns)
        assert torch.equal(columns, weight.dense[:, first:last].to(dtype))


@pytest.mark.parametrize("name", ENCODINGS)
def test_kernels_give_the_very_numbers(name: str) -> None:
    for turn, shape in enumerate(SHAPES):
        assert_exact(exact_weight(ENCODINGS[name], shape, turn))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_of_16_bits_are_multiplied_in_float32(dtype: torch.dtype) -> None:
    for turn, shape in enumerate(SHAPES):
        assert_exact(exact_weight(ENCODINGS["4"], shape, turn), dtype)


@pytest.mark.parametrize(("flags", "name"), NARROWER)
def test_so_do_those_for_lesser_processors(
    flags: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if platform.machine().lower() not in ("x86_64", "amd64") or not shutil.which("g++"):
        pytest.skip("needs g++ for x86")
    with monkeypatch.context() as patch:
        patch.setenv("BNBX_CXX", f"g++ {flags}")
        forget()
        try:
            for turn, shape in enumerate(SHAPES):
                assert_exact(exact_weight(ENCODINGS[name], shape, turn))
        finally:
            forget()


def test_the_weights_of_these_tests_are_of_all_widths() -> None:
    assert {encoding.bits for encoding in ENCODINGS.values()} == set(range(2, 9))


# ---- numbers as they come


def roundings(columns: int) -> int:
    """How many roundings a product goes through on its way into a sum, at most.

    A lane of at least 4 adds up one of 8 elements (two chains) at most; then come chains (3), lanes
    (4), tiles (one in 2048 elements) and the bias, and before all that the factor, the center, the
    product itself and the sum of a group.
    """
    return columns // 8 + 2 + columns // 2048 + 3 + 4 + 1 + 4


def assert_close(got: Tensor, x: Tensor, dense: Tensor, count: int) -> None:
    """Each product goes through so many roundings; the dense weight has the first of them too."""
    unit = 2.0**-24
    most = (count + 1) * unit / (1 - (count + 1) * unit)
    last = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[got.dtype]
    expected = x.double() @ dense.T
    bound = (
        most * (x.double().abs() @ dense.abs().T) * (1 + last) + last * expected.abs() + 2.0**-24
    )
    assert ((got.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("name", quant_types().names())
def test_every_registered_type_stays_within_rounding(name: str) -> None:
    shape, encoding = (20, 333), make_encoding(name)
    generator = torch.Generator().manual_seed(3)
    parts = coding.encode(encoding, torch.randn(shape, generator=generator))
    dense = coding.decode(encoding, parts, shape).double()
    for count in (1, 4):
        x = torch.randn(count, 333, generator=generator)
        assert_close(linear.linear(encoding, parts, shape, x), x, dense, roundings(333))


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="flags of x86")
@pytest.mark.parametrize("flags", COMBINED)
def test_sources_compile_with_any_instructions(flags: str, tmp_path: Path) -> None:
    compiler = find_compiler()
    for name in ("nf3", "nf4", "nf5", "nf7"):
        source = tmp_path / f"{name}.cpp"
        plan = plan_for(make_encoding(name), "bfloat16")
        source.write_text(render_linear(plan, linear_cpu.TEMPLATE), encoding="utf-8")
        command = [*compiler.command, "-std=c++17", "-fsyntax-only", "-w", *flags.split()]
        subprocess.run([*command, str(source)], check=True)


@pytest.mark.parametrize("name", [f"nf{bits}" for bits in range(2, 9)])
def test_every_byte_of_a_level_arrives(name: str) -> None:
    """One number of x alone is not 0: products are the dense weight's, to the last bit."""
    shape, encoding = (3, 150), make_encoding(name)
    generator = torch.Generator().manual_seed(7)
    parts = coding.encode(encoding, torch.randn(shape, generator=generator))
    dense, x = coding.decode(encoding, parts, shape), torch.eye(150)
    assert torch.equal(linear_cpu.multiply(encoding, parts, shape, x, None), dense.T)
    for row, expected in zip(x, dense.T, strict=True):
        found = linear_cpu.multiply(encoding, parts, shape, row[None], None)
        assert torch.equal(found[0], expected)
    columns = torch.empty(3, 99)
    linear_cpu.decode_columns(encoding, parts, shape, 50, columns)
    assert torch.equal(columns, dense[:, 50:149])


FOUR_BITS = [name for name in quant_types().names() if quant_types().get(name).bits == 4]


@pytest.mark.parametrize("name", FOUR_BITS)
def test_pairs_of_bfloat16_lose_less_than_the_result_is_rounded_by(name: str) -> None:
    """Rows of whole groups, where the processor has instructions for such pairs.

    A level may be off by 2**-17 of it, as the sum of two numbers of 8 bits.
    """
    shape, encoding = (20, 3 * 128), make_encoding(name)
    generator = torch.Generator().manual_seed(3)
    parts = coding.encode(encoding, torch.randn(shape, generator=generator))
    dense = coding.decode(encoding, parts, shape).double()
    x = torch.randn(1, shape[1], generator=generator).bfloat16()
    got = linear_cpu.multiply(encoding, parts, shape, x, None).double()
    exact, size = x.double() @ dense.T, x.double().abs() @ dense.abs().T
    bound = (2.0**-17 + roundings(shape[1]) * 2.0**-24) * size * (1 + 2.0**-8)
    assert ((got - exact).abs() <= bound + 2.0**-8 * exact.abs()).all()


@pytest.mark.parametrize("number", [float("inf"), float("nan"), 1e-39])
def test_numbers_that_pairs_cannot_take_are_multiplied_as_floats(number: float) -> None:
    shape, encoding = (16, 256), make_encoding("fp4")  # levels that one bfloat16 is enough for
    parts = coding.encode(encoding, 2.0**120 * torch.randn(shape))
    dense = coding.decode(encoding, parts, shape).double()
    for place in (0, 100, 255):
        x = torch.zeros(1, shape[1], dtype=torch.bfloat16)
        x[0, place] = number
        got = linear_cpu.multiply(encoding, parts, shape, x, None).double()
        exact = x.double() @ dense.T
        assert torch.equal(got.isnan(), exact.isnan())
        assert torch.allclose(got, exact, rtol=2.0**-8, atol=0, equal_nan=True)
        assert got.ne(0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_few_rows_and_many_agree(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """On weights that dtype holds, by panels, by codes, and for the gradient."""
    monkeypatch.setattr(linear_panels, "LEAST_BYTES", 4096)
    shape = (150, 96)
    assert linear_panels.panel_size(shape, 0, dtype.itemsize) < 150
    assert linear_panels.panel_size(shape, 1, dtype.itemsize) < 96
    weight = exact_weight(exact_encoding(4), shape)
    bias = small_numbers(1, 150, dtype, seed=2)[0]
    for count in (1, 7, 12, 64, 100):
        x, grad = small_numbers(count, 96, dtype), small_numbers(count, 150, dtype)
        for some in (None, bias):
            exact = x.double() @ weight.dense.T + (0 if some is None else some.double())
            by_panels = linear_panels.multiply(weight.encoding, weight.parts, shape, x, some)
            got = linear.linear(weight.encoding, weight.parts, shape, x, some)
            assert torch.equal(got, exact.to(dtype)) or count >= 12
            step = 2 * torch.finfo(dtype).eps  # of panels: rounded before the bias and after
            for found in (by_panels, got):
                near = step * (exact.abs() + 4) if some is not None else step / 2 * exact.abs()
                assert ((found.double() - exact).abs() <= near).all()
        back = linear.grad_input(weight.encoding, weight.parts, shape, grad)
        exact = grad.double() @ weight.dense
        assert ((back.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs()).all()


def test_the_number_of_threads_changes_nothing() -> None:
    encoding, shape = make_encoding("nf4"), (1100, 1025)
    generator = torch.Generator().manual_seed(4)
    parts = coding.encode(encoding, torch.randn(shape, generator=generator))
    threads = torch.get_num_threads()
    for count in (1, 3):
        x = torch.randn(count, 1025, generator=generator)
        found = []
        for number in (1, 2, 3, 3):
            torch.set_num_threads(number)
            found.append(linear.linear(encoding, parts, shape, x))
        torch.set_num_threads(threads)
        assert all(torch.equal(found[0], other) for other in found[1:])


# ---- numbers that are none


def test_nothing_leaks_into_the_rows_beside() -> None:
    """Rows of 37 share bytes, groups and blocks with their neighbors."""
    for bits in (3, 4, 8):
        encoding, generator = exact_encoding(bits), torch.Generator().manual_seed(bits)
        codes = torch.randint(1, 2**bits, (12, 37), generator=generator, dtype=torch.uint8)
        codes[2, 36] = codes[5, 0] = codes[8, 17] = NOTHING
        weight = with_codes(encoding, codes, generator)
        for count in (1, 2):
            x = small_numbers(count, 37)
            y = linear_cpu.multiply(encoding, weight.parts, weight.shape, x, None)
            assert y.isnan().any(0).nonzero()[:, 0].tolist() == [2, 5, 8]
            assert torch.equal(y.isnan(), (x.double() @ weight.dense.T).isnan())


def test_a_block_that_is_not_finite_shows_in_its_rows_alone() -> None:
    encoding, shape = make_encoding("nf4"), (8, 100)
    w = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    w[3, 40] = torch.inf
    parts = coding.encode(encoding, w)
    dense = coding.decode(encoding, parts, shape)
    assert dense.isnan().any()
    for count in (1, 2, 80):
        x = torch.ones(count, 100)
        got = linear.linear(encoding, parts, shape, x)
        assert torch.equal(got.isnan(), (x @ dense.T).isnan())


def test_infinity_and_nan_of_x_go_where_they_go_in_a_dense_product() -> None:
    weight = exact_weight(exact_encoding(4), (30, 96))
    x = small_numbers(3, 96)
    x[0, 5], x[1, 90] = torch.inf, torch.nan
    expected = x @ weight.dense.float().T
    got = linear.linear(weight.encoding, weight.parts, weight.shape, x)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(0), expected.nan_to_num(0))


# ---- what goes in


@pytest.mark.parametrize("shape", [(10,), (1, 10), (2, 3, 10), (0, 10), (2, 0, 10)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    weight = exact_weight(exact_encoding(4), (6, 10))
    x = small_numbers(1, 60)[0][: torch.Size(shape).numel()].reshape(shape)
    got = linear.linear(weight.encoding, weight.parts, (6, 10), x, torch.ones(6))
    assert torch.equal(got, x @ weight.dense.float().T + 1)
    back = linear.grad_input(weight.encoding, weight.parts, (6, 10), got)
    assert torch.equal(back, got @ weight.dense.float())


@pytest.mark.parametrize("shape", [(0, 10), (6, 0), (0, 0)])
def test_empty_weights(shape: tuple[int, int]) -> None:
    weight = exact_weight(exact_encoding(4), shape)
    bias = torch.arange(shape[0]).float()
    got = linear.linear(weight.encoding, weight.parts, shape, torch.ones(2, shape[1]), bias)
    assert torch.equal(got, bias.expand(2, -1))
    back = linear.grad_input(weight.encoding, weight.parts, shape, torch.ones(3, shape[0]))
    assert torch.equal(back, torch.zeros(3, shape[1]))


@pytest.mark.parametrize("count", [3, 80])
def test_any_strides(count: int) -> None:
    weight = exact_weight(exact_encoding(4), (20, 50))
    wide = small_numbers(2 * count, 120)
    tall = small_numbers(50, count, seed=3)
    bias = small_numbers(1, 40)[0, ::2]
    for x in (wide[::2, 11:111:2], tall.t()):
        got = linear.linear(weight.encoding, weight.parts, (20, 50), x, bias)
        assert torch.equal(got, x @ weight.dense.float().T + bias)
    grad = wide[::2, 5:45:2]
    back = linear.grad_input(weight.encoding, weight.parts, (20, 50), grad)
    assert torch.equal(back, grad @ weight.dense.float())


def test_autocast_and_gradients_of_the_caller_do_not_matter() -> None:
    weight = exact_weight(exact_encoding(4), (20, 50))
    for count in (2, 80):
        x = small_numbers(count, 50).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            got = linear.linear(weight.encoding, weight.parts, (20, 50), x, torch.ones(20))
            back = linear.grad_input(weight.encoding, weight.parts, (20, 50), got)
        assert torch.equal(got, x.detach() @ weight.dense.float().T + 1)
        assert torch.equal(back, got @ weight.dense.float())
        assert not got.requires_grad


def test_without_a_compiler_torch_does_it_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = exact_weight(exact_encoding(4), (20, 50))

    def missing(encoding: Encoding) -> None:
        raise CompileError(f"no compiler for {encoding.bits} bits, says this test")

    monkeypatch.setitem(
        linear.NATIVE,
        "cpu",
        replace(linear.NATIVE["cpu"], ready=missing),
    )
    linear.target_for.cache_clear()
    try:
        with pytest.warns(BnbxWarning, match="no compiler for 4 bits.*\n.*quantized weight"):
            got = linear.linear(weight.encoding, weight.parts, (20, 50), torch.ones(1, 50))
        assert torch.equal(got, weight.dense.float().sum(1)[None])
        back = linear.grad_input(weight.encoding, weight.parts, (20, 50), got)
        assert torch.equal(back, got @ weight.dense.float())
    finally:
        linear.target_for.cache_clear()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(2, 9), r"x has shape \(2, 9\); expected \(\.\.\., 10\)"),
        (torch.ones(()), r"x has shape \(\); expected"),
        (torch.ones(2, 10).double(), "x is torch.float64; expected float32, bfloat16 or float16"),
        (torch.ones(2, 10, device="meta"), "x is on meta, the weight on cpu"),
        (torch.ones(2, 10).to_sparse(), "x is torch.sparse_coo"),
        ([1.0], "x is list"),
    ],
)
def test_inputs_that_do_not_fit(x: Tensor, message: str) -> None:
    weight = exact_weight(exact_encoding(4), (6, 10))
    with pytest.raises(UnsupportedTensorError, match=message):
        linear.linear(weight.encoding, weight.parts, (6, 10), x)


@pytest.mark.parametrize(
    "bias", [torch.ones(5), torch.ones(6, 1), torch.ones(6).bfloat16(), torch.ones(6).to("meta")]
)
def test_biases_that_do_not_fit(bias: Tensor) -> None:
    weight = exact_weight(exact_encoding(4), (6, 10))
    with pytest.raises(UnsupportedTensorError, match=r"bias is .* expected torch.float32 of"):
        linear.linear(weight.encoding, weight.parts, (6, 10), torch.ones(2, 10), bias)


def test_weights_that_do_not_fit() -> None:
    weight = exact_weight(exact_encoding(4), (6, 10))
    encoding, (codes, scale), x = weight.encoding, weight.parts, torch.ones(2, 10)
    for parts, shape in (
        ([codes[:-1], scale], (6, 10)),
        ([codes, scale.half()], (6, 10)),
        ([codes], (6, 10)),
        ([], (6, 10)),
        ([codes, scale.to("meta")], (6, 10)),
        ([codes, scale], (-6, -10)),
        ([codes, scale], (7, 10)),
        ([codes.repeat_interleave(2)[::2], scale], (6, 10)),
    ):
        with pytest.raises(QuantizedDataError):
            linear.linear(encoding, parts, shape, x)
    with pytest.raises(UnsupportedTensorError, match=r"the shape \(out, in\), not \(60,\)"):
        linear.linear(encoding, weight.parts, (60,), x)
    with pytest.raises(UnsupportedTensorError, match=r"grad has shape \(2, 10\); expected"):
        linear.grad_input(encoding, weight.parts, (6, 10), x)
