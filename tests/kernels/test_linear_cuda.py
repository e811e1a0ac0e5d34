"""Products with quantized weights on CUDA without a GPU: machine code, and the very numbers.

See `exact_weights.py` for why results must be equal.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import emulated_linear
import nvrtc
from bnbx.kernels import coding, linear, linear_cuda
from bnbx.kernels.cuda_module import OPTIONS
from bnbx.kernels.encoding import Encoding, make_encoding
from bnbx.kernels.linear_source import plan_for
from cuda_on_cpu import SCHEDULES
from cuda_on_cpu.build import Mode
from exact_weights import NOTHING, Weight, exact_encoding, exact_weight, small_numbers, with_codes

# out, in: less than a span, rows that begin anywhere, whole spans, more than a tile.
SHAPES = ((5, 1), (9, 37), (33, 65), (20, 64), (3, 1100), (5, 1024))
ENCODINGS: dict[str, Encoding] = {
    "2-blocks_of_16": exact_encoding(2, block=16),
    "3-centered": exact_encoding(3, "centered", 32),
    "4": exact_encoding(4),
    "4-second": exact_encoding(4, block=16, second=16),
    "4-row_centered": exact_encoding(4, "row_centered"),
    "5-e8m0": exact_encoding(5, "e8m0", 32),
    "6-tensor": exact_encoding(6, "tensor"),
    "7-bfloat16": exact_encoding(7, "bfloat16", 4096),
    "8-e4m3_tensor": exact_encoding(8, "e4m3_tensor", 16),
    "8-row": exact_encoding(8, "row"),
}
# Every architecture, and every way in which kernels differ.
COMPILED = [
    *((name, nvrtc.ARCHITECTURES[turn % 7], "bfloat16") for turn, name in enumerate(ENCODINGS)),
    ("4", 75, "float32"),
    ("4-second", 90, "float16"),
]
# Two resident blocks of 256 threads on the smallest multiprocessor: 65536 registers, 64 KiB.
MOST_REGISTERS = 128
MOST_SHARED_BYTES = 32 * 1024


@pytest.mark.parametrize(("name", "arch", "dtype"), COMPILED)
def test_compiles_to_machine_code_without_spills(name: str, arch: int, dtype: str) -> None:
    if reason := nvrtc.available():
        pytest.skip(reason)
    source = linear_cuda.source(plan_for(ENCODINGS[name], dtype))
    cubin = nvrtc.compile_cubin(source, arch, options=OPTIONS)
    assert set(cubin.kernels) == {f"bnbx_{name}" for name in linear_cuda.NAMES}
    assert (cubin.spill_stores, cubin.spill_loads, cubin.stack_bytes) == (0, 0, 0), cubin.log
    assert cubin.registers <= MOST_REGISTERS, cubin.log
    assert cubin.shared_bytes <= MOST_SHARED_BYTES, cubin.log


def assert_exact(
    weight: Weight, dtype: torch.dtype = torch.float32, mode: Mode = "plain", schedule: int = 0
) -> None:
    """Products of one, two and five rows, and columns of the weight."""
    out, inner = weight.shape
    bias = small_numbers(1, out, dtype, seed=2)[0]
    for count in (1, 2, 5):
        x = small_numbers(count, inner, dtype, seed=count)
        some = None if count == 2 else bias
        exact = x.double() @ weight.dense.T + (0 if some is None else some.double())
        got = emulated_linear.multiply(
            weight.encoding, weight.parts, weight.shape, x, some, mode=mode, schedule=schedule
        )
        assert torch.equal(got, exact.to(dtype)), count
    for first, last in ((0, inner), (inner // 3, inner - inner // 4)):
        columns = torch.full((out, last - first), -7.0, dtype=dtype)
        emulated_linear.decode_columns(
            weight.encoding, weight.parts, weight.shape, first, columns, mode=mode
        )
        assert torch.equal(columns, weight.dense[:, first:last].to(dtype))


@pytest.mark.parametrize("name", ENCODINGS)
def test_emulated_kernels_give_the_very_numbers(name: str) -> None:
    for turn, shape in enumerate(SHAPES):
        weight = exact_weight(ENCODINGS[name], shape, turn)
        assert_exact(weight, schedule=SCHEDULES[turn % len(SCHEDULES)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_of_16_bits_are_multiplied_in_float32(dtype: torch.dtype) -> None:
    for turn, shape in enumerate(SHAPES[:4]):
        assert_exact(exact_weight(ENCODINGS["4"], shape, turn), dtype)


@pytest.mark.parametrize(
    ("name", "mode"),
    [("3-centered", "check"), ("4-second", "check"), ("4", "ubsan"), ("8-e4m3_tensor", "ubsan")],
)
def test_no_access_is_out_of_bounds_racing_or_misaligned(name: str, mode: Mode) -> None:
    for shape in SHAPES[:4]:
        assert_exact(exact_weight(ENCODINGS[name], shape), mode=mode)


def test_codes_may_begin_at_any_byte() -> None:
    weight = exact_weight(ENCODINGS["4"], (20, 64))
    codes = weight.parts[0]
    room = torch.zeros(len(codes) + 1, dtype=torch.uint8)
    room[1:] = codes
    moved = Weight(weight.encoding, weight.shape, [room[1:], *weight.parts[1:]])
    assert moved.parts[0].data_ptr() % 2 == 1
    assert_exact(moved, mode="ubsan")


def test_nothing_leaks_into_the_rows_beside() -> None:
    for bits in (3, 8):
        encoding = ENCODINGS["3-centered"] if bits == 3 else ENCODINGS["8-e4m3_tensor"]
        generator = torch.Generator().manual_seed(bits)
        codes = torch.randint(1, 2**bits, (12, 37), generator=generator, dtype=torch.uint8)
        codes[2, 36] = codes[5, 0] = codes[8, 17] = NOTHING
        weight = with_codes(encoding, codes, generator)
        y = emulated_linear.multiply(
            encoding, weight.parts, weight.shape, small_numbers(1, 37), None
        )
        assert y[0].isnan().nonzero()[:, 0].tolist() == [2, 5, 8]


def roundings(columns: int) -> int:
    """How many roundings a product goes through on its way into a sum, at most.

    A lane adds up one of 32 spans of 32 elements; then come lanes (5) and the bias, and before all
    that the factor, the center and the product itself.
    """
    return (columns // 1024 + 2) * 32 + 5 + 1 + 3


@pytest.mark.parametrize("name", ["nf4", "dynamic8"])
def test_other_numbers_stay_within_rounding(name: str) -> None:
    encoding, shape = make_encoding(name), (12, 1111)
    generator = torch.Generator().manual_seed(3)
    parts = coding.encode(encoding, torch.randn(shape, generator=generator))
    dense = coding.decode(encoding, parts, shape).double()
    x = torch.randn(3, 1111, generator=generator)
    got = emulated_linear.multiply(encoding, parts, shape, x, None)
    count, unit = roundings(1111) + 1, 2.0**-24
    bound = count * unit / (1 - count * unit) * (x.double().abs() @ dense.abs().T)
    assert ((got.double() - x.double() @ dense.T).abs() <= bound).all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_the_numbers_are_the_same(name: str, dtype: torch.dtype) -> None:
    def there(tensor: Tensor) -> Tensor:
        return tensor.cuda()

    for turn, shape in enumerate(SHAPES):
        weight = exact_weight(ENCODINGS[name], shape, turn)
        parts = [*map(there, weight.parts)]
        for count in (1, 2, 5, 40):
            x, grad = small_numbers(count, shape[1], dtype), small_numbers(count, shape[0], dtype)
            got = linear.linear(weight.encoding, parts, shape, x.cuda())
            exact = x.double() @ weight.dense.T
            near = torch.finfo(dtype).eps * exact.abs() if count > 8 else 0
            assert ((got.cpu().double() - exact.to(dtype).double()).abs() <= near).all()
            back = linear.grad_input(weight.encoding, parts, shape, grad.cuda())
            exact = grad.double() @ weight.dense
            near = torch.finfo(dtype).eps * exact.abs()
            assert ((back.cpu().double() - exact).abs() <= near).all()
