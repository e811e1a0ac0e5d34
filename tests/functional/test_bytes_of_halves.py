"""4-bit codes, scales and files are bitsandbytes' on a CPU, byte for byte, and so are numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bnbx import functional
from oracles import bitsandbytes_functional
from same_bits import BLOCKS, FLOATS, inputs, same_bits, same_dicts

TYPES = ("nf4", "fp4")


@pytest.fixture(scope="module")
def theirs() -> Any:
    return bitsandbytes_functional()


# Every kernel is compiled when it is first met: not all of the product.
KINDS = [(size, torch.float32) for size in BLOCKS]
KINDS += [(size, dtype) for size in (64, 2048) for dtype in FLOATS[1:]]


@pytest.mark.parametrize(("size", "dtype"), KINDS, ids=str)
@pytest.mark.parametrize("quant_type", TYPES)
def test_codes_and_scales(theirs: Any, quant_type: str, size: int, dtype: torch.dtype) -> None:
    for numel in (1, size - 1, size + 1, 3 * size):
        for name, x in inputs(numel, dtype):
            kind = dict(blocksize=size, quant_type=quant_type)
            codes, state = theirs.quantize_4bit(x, **kind)
            ours, found = functional.quantize_4bit(x, **kind)  # type: ignore[arg-type]
            assert same_bits(codes, ours), (name, numel)
            assert same_bits(state.absmax, found.absmax), (name, numel)
            assert same_bits(state.code, found.code)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("quant_type", TYPES)
def test_scales_that_are_quantized_too(theirs: Any, quant_type: str, dtype: torch.dtype) -> None:
    """In as many blocks as a second level needs to differ, with its codes made as theirs are."""
    for numel in (5, 64 * 256, 64 * 3000 + 17):
        for name, x in inputs(numel, dtype):
            kind = dict(quant_type=quant_type, compress_statistics=True)
            codes, state = theirs.quantize_4bit(x, **kind)
            ours, found = functional.quantize_4bit(x, exact=False, **kind)  # type: ignore[arg-type]
            assert same_bits(codes, ours), (name, numel)
            if bool(state.offset.isinf()):  # there the mean of such scales overflows
                assert name == "large"
                assert_right(x, ours, found)
                continue
            assert same_dicts(state.as_dict(), found.as_dict()), (name, numel)
            assert same_dicts(state.as_dict(packed=True), found.as_dict(packed=True))


def assert_right(x: Tensor, codes: Tensor, state: functional.QuantState) -> None:
    """Numbers come back as near as those of 4 bits do, and the mean is that of float64."""
    assert state.offset is not None
    _, plain = functional.quantize_4bit(x, quant_type=state.quant_type or "")
    assert float(state.offset) == pytest.approx(float(plain.absmax.double().mean()), rel=1e-6)
    found = functional.dequantize_4bit(codes, state).double()
    scale = plain.absmax.double().repeat_interleave(64)[: x.numel()]
    assert float(((found - x.double()).abs() / scale).max()) < 0.2


def test_exact_codes_of_scales_are_nearer(theirs: Any) -> None:
    """What exact=True is for: some scales come back closer, none farther off."""
    x = torch.randn(64 * 20000, generator=torch.Generator().manual_seed(0))
    _, plain = functional.quantize_4bit(x, quant_type="nf4")
    errors = []
    for exact in (False, True):
        _, state = functional.quantize_4bit(
            x, quant_type="nf4", compress_statistics=True, exact=exact
        )
        offset, second = state.offset, state.state2
        assert offset is not None
        scales = functional.dequantize_blockwise(state.absmax, second) + offset
        errors.append((scales - plain.absmax).abs())
    grid, nearest = errors
    assert bool((nearest <= grid * (1 + 1e-3) + 1e-6).all())
    assert 0 < int((nearest < grid).sum()) < 0.01 * grid.numel()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("compressed", [False, True])
def test_numbers(theirs: Any, quant_type: str, compressed: bool, dtype: torch.dtype) -> None:
    for size in (64, 2048):
        for name, x in inputs(9999, dtype):
            matrix = x[:9900].view(99, 100)
            codes, state = theirs.quantize_4bit(
                matrix, blocksize=size, quant_type=quant_type, compress_statistics=compressed
            )
            if compressed and bool(state.offset.isinf()):  # the mean of such scales overflows
                continue
            expected = theirs.dequantize_4bit(codes, state)
            found = functional.dequantize_4bit(codes, state)  # a state of theirs, as it is
            assert found.shape == matrix.shape
            # Code 8 of fp4 is zero in its table; some of its kernels make that -0.
            assert torch.equal(expected, found), (name, size)
            assert same_bits(expected + 0.0, found + 0.0)


@pytest.mark.parametrize("shape", [(1,), (2,), (64,), (1, 2), (2, 1), (0,), (0, 4), (4, 0), ()])
def test_shapes_that_bitsandbytes_loses(shape: tuple[int, ...]) -> None:
    """There, a vector comes back as (1, n), and what is one byte long comes back transposed."""
    x = torch.randn(shape)
    codes, state = functional.quantize_4bit(x, quant_type="nf4")
    assert codes.shape == ((x.numel() + 1) // 2, 1)
    found = functional.dequantize_4bit(codes, state)
    assert found.shape == x.shape
    assert not x.numel() or float((found - x).abs().max()) <= 0.16 * float(x.abs().max())


def test_codes_that_lie_as_a_row_give_a_transposed_matrix(theirs: Any) -> None:
    x = torch.randn(6, 10)
    codes, state = theirs.quantize_4bit(x, quant_type="nf4")
    found = functional.dequantize_4bit(codes.t(), state)
    assert same_bits(found, theirs.dequantize_4bit(codes.t(), state))
    assert found.shape == (10, 6)


@pytest.mark.parametrize("storage", [torch.uint8, torch.float16, torch.bfloat16, torch.float32])
def test_storage(theirs: Any, storage: torch.dtype) -> None:
    x = torch.randn(48, 40)
    kind = dict(quant_type="fp4", quant_storage=storage)
    codes, state = theirs.quantize_4bit(x, **kind)
    ours, found = functional.quantize_4bit(x, **kind)  # type: ignore[arg-type]
    assert same_bits(codes, ours)
    assert found == functional.QuantState.from_dict(state.as_dict(), "cpu")
    expected = theirs.dequantize_4bit(codes, state) + 0.0
    assert same_bits(functional.dequantize_4bit(ours, found) + 0.0, expected)


@pytest.mark.parametrize("numel", [1, 2, 3, 5, 9])
def test_storage_that_bytes_do_not_fill(numel: int) -> None:
    """Where bitsandbytes raises on a CPU and writes past the end on CUDA."""
    x = torch.randn(numel)
    for storage in (torch.bfloat16, torch.float32):
        codes, state = functional.quantize_4bit(x, quant_type="nf4", quant_storage=storage)
        assert codes.dtype == storage
        expected = functional.dequantize_4bit(*functional.quantize_4bit(x, quant_type="nf4"))
        assert same_bits(functional.dequantize_4bit(codes, state), expected)


def test_memory_is_filled() -> None:
    x = torch.randn(10, 13)
    codes, state = functional.quantize_4bit(x, quant_type="nf4")
    absmax, out = torch.empty(3), torch.empty_like(codes)
    made, found = functional.quantize_4bit(x, absmax, out, quant_type="nf4")
    assert made is out
    assert found.absmax is absmax
    assert same_bits(out, codes)
    assert same_bits(absmax, state.absmax)
    numbers = torch.empty(13, 10).t()
    assert functional.dequantize_4bit(codes, state, out=numbers) is numbers
    assert same_bits(numbers, functional.dequantize_4bit(codes, state))
    without = torch.empty(10, 13, dtype=torch.bfloat16)
    functional.dequantize_4bit(codes, absmax=absmax, out=without, quant_type="nf4")
    assert same_bits(without, numbers.bfloat16())


@pytest.mark.parametrize("name", TYPES)
def test_named_functions(name: str) -> None:
    x = torch.randn(300)
    quantize = getattr(functional, f"quantize_{name}")
    dequantize = getattr(functional, f"dequantize_{name}")
    codes, state = quantize(x, None, None, 128, True, torch.float16)
    expected, found = functional.quantize_4bit(
        x, None, None, 128, True, quant_type=name, quant_storage=torch.float16
    )
    assert same_bits(codes, expected)
    assert state == found
    assert same_bits(dequantize(codes, state), functional.dequantize_4bit(expected, found))
    other = "fp4" if name == "nf4" else "nf4"
    with pytest.raises(TypeError, match=f"of the type {name!r}"):
        getattr(functional, f"dequantize_{other}")(codes, state)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite(bad: float) -> None:
    """Their block reads as NaN throughout, and no other block is touched."""
    for place in (3, 70, 129):
        x = torch.randn(130)
        x[place] = bad
        codes, state = functional.quantize_4bit(x, quant_type="nf4")
        found = functional.dequantize_4bit(codes, state)
        block = torch.arange(130) // 64 == place // 64
        assert torch.equal(found.isnan(), block)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_products(theirs: Any, dtype: torch.dtype) -> None:
    weight = torch.randn(48, 130).to(dtype)
    codes, state = theirs.quantize_4bit(weight, quant_type="fp4", compress_statistics=True)
    dense = theirs.dequantize_4bit(codes, state).double()
    cases: list[tuple[tuple[int, ...], dict[str, Any]]] = [
        ((1, 130), {}),
        ((2, 3, 130), {}),
        ((130, 5), dict(transposed_A=True)),
        ((4, 48), dict(transposed_B=True)),
        ((48, 4), dict(transposed_A=True, transposed_B=True)),
    ]
    for shape, turned in cases:
        x = torch.randn(shape)
        left = x.to(dtype).double()
        left = left.t() if "transposed_A" in turned else left
        right = dense if "transposed_B" in turned else dense.t()
        expected = left @ right
        bound = 4 * torch.finfo(dtype).eps * (left.abs() @ right.abs()).max()
        for given in (codes, codes.t()):
            found = functional.gemv_4bit(x.to(dtype), given, state=state, **turned)
            assert found.dtype == dtype
            assert found.shape == expected.shape
            assert float((found.double() - expected).abs().max()) <= float(bound)
    out = torch.empty(1, 48, dtype=dtype)
    x = torch.randn(1, 130).to(dtype)
    assert functional.gemv_4bit(x, codes, out, state=state) is out
    assert same_bits(out, functional.gemv_4bit(x, codes, state=state))


def test_every_4bit_type_goes_through_these_doors() -> None:
    """And a state of layers with scales that bitsandbytes does not have is dequantized too."""
    from bnbx.kernels import coding
    from bnbx.kernels.encoding import make_encoding
    from bnbx.registry import quant_types

    x = torch.randn(20, 40)
    for spec in quant_types():
        if spec.bits != 4:
            continue
        encoding = make_encoding(spec)
        parts: list[Tensor] = coding.encode(encoding, x)
        expected = coding.decode(encoding, parts, x.shape)
        codes, state = functional.QuantState.from_parts(encoding, parts, x.shape, x.dtype)
        assert same_bits(functional.dequantize_4bit(codes, state), expected), spec.name
        if spec.scale == type(spec.scale)():
            made, found = functional.quantize_4bit(x, blocksize=64, quant_type=spec.name)
            again = functional.dequantize_4bit(made, found)
            assert float((again - x).abs().max()) < 0.3 * float(x.abs().max())
        else:
            with pytest.raises(ValueError, match=r"quantize\(tensor"):
                functional.quantize_4bit(x, quant_type=spec.name)


@pytest.mark.parametrize(("columns", "size"), [(96, 64), (160, 64), (192, 128)])
def test_rows_that_end_within_a_block(columns: int, size: int) -> None:
    """By brute force: on a CPU, bitsandbytes decodes such matrices with scales of other blocks."""
    x = torch.randn(64, columns)
    codes, state = functional.quantize_4bit(x, blocksize=size, quant_type="nf4")
    assert state.code is not None
    halves = torch.stack([codes[:, 0] >> 4, codes[:, 0] & 15], 1).flatten()
    scale = state.absmax.repeat_interleave(size)[: x.numel()]
    expected = (state.code[halves.long()] * scale).view(64, columns)
    assert same_bits(functional.dequantize_4bit(codes, state), expected)
