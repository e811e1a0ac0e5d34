"""Block-wise codes: bitsandbytes' bytes where asked for, the nearest numbers where not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bnbx import functional
from oracles import bitsandbytes_functional
from same_bits import FLOATS, inputs, same_bits

TABLES = {
    "dynamic": None,
    "unsigned dynamic": functional.create_dynamic_map(signed=False),
    "dynamic, 5 bits": functional.create_dynamic_map(True, 7, 5),
    "linear": functional.create_linear_map(),
    "fp8": functional.create_fp8_map(True, 4, 3, 8),
    "fp4": functional.create_fp8_map(True, 2, 1, 4),
    "normal": functional.create_normal_map(),
}


# Every kernel is compiled when it is first met: not all of the product.
KINDS = [(table, torch.float32) for table in TABLES]
KINDS += [(table, dtype) for table in ("dynamic", "linear") for dtype in FLOATS[1:]]


@pytest.fixture(scope="module")
def theirs() -> Any:
    return bitsandbytes_functional()


@pytest.mark.parametrize(("table", "dtype"), KINDS, ids=str)
def test_bytes_of_bitsandbytes(theirs: Any, table: str, dtype: torch.dtype) -> None:
    """With exact=False: its codes, and scales of both levels, whatever the numbers are."""
    code = TABLES[table]
    for size in (64, 4096):
        for numel in (1, size - 1, size + 1, 3 * size):
            for name, x in inputs(numel, dtype):
                for nested in (False, True):
                    kind = dict(code=code, blocksize=size, nested=nested)
                    codes, state = theirs.quantize_blockwise(x, **kind)
                    ours, found = functional.quantize_blockwise(x, exact=False, **kind)  # type: ignore[arg-type]
                    assert same_bits(codes, ours), (name, numel, size)
                    assert same_bits(state.absmax, found.absmax), (name, numel, size)
                    assert same_bits(state.code, found.code)
                    if nested:
                        assert found.state2 is not None
                        assert same_bits(state.offset, found.offset)
                        assert same_bits(state.state2.absmax, found.state2.absmax)


@pytest.mark.parametrize(("table", "dtype"), KINDS, ids=str)
def test_numbers(theirs: Any, table: str, dtype: torch.dtype) -> None:
    for size in (64, 4096):
        for nested in (False, True):
            x = torch.randn(33, 101).to(dtype)
            codes, state = theirs.quantize_blockwise(
                x, TABLES[table], blocksize=size, nested=nested
            )
            expected = theirs.dequantize_blockwise(codes, state)
            assert same_bits(functional.dequantize_blockwise(codes, state), expected)


@pytest.mark.parametrize("table", TABLES)
def test_exact_codes_are_the_nearest(table: str) -> None:
    """In float64, element by element: no other entry of the table is nearer."""
    code = TABLES[table]
    for name, x in inputs(4097, torch.float32):
        if name in ("tiny", "subnormal"):
            continue
        codes, state = functional.quantize_blockwise(x, code, blocksize=256)
        assert state.code is not None
        scale = state.absmax.repeat_interleave(256)[:4097]
        inverse = torch.where(scale > 0, 1 / scale.clamp(min=1e-38), 0.0)
        scaled = (x * inverse).double()
        distance = (scaled[:, None] - state.code.double()).abs()
        chosen = distance.gather(1, codes.long()[:, None])[:, 0]
        assert bool((chosen <= distance.amin(1) * (1 + 1e-7) + 1e-12).all()), name


def test_zero_stays_zero() -> None:
    x = torch.randn(300)
    x[::7] = 0
    x[256:] = 0
    found = functional.dequantize_blockwise(*functional.quantize_blockwise(x, blocksize=256))
    assert bool((found[x == 0] == 0).all())


@pytest.mark.parametrize("bits", range(1, 9))
def test_tables_of_any_length_and_order(bits: int) -> None:
    """Sorted or not, with or without repeats: the nearest entry, by brute force."""
    generator = torch.Generator().manual_seed(bits)
    code = torch.rand(2**bits, generator=generator) * 2 - 1
    code[int(code.abs().argmax())] = 1.0
    if bits > 2:
        code[1] = code[0]
    x = torch.randn(1000, generator=generator)
    codes, state = functional.quantize_blockwise(x, code, blocksize=64)
    assert int(codes.max()) < 2**bits
    scaled = x * (1 / state.absmax).repeat_interleave(64)[:1000]
    expected = (scaled[:, None].double() - code.double()).abs().amin(1)
    chosen = (scaled.double() - code[codes.long()].double()).abs()
    assert float((chosen - expected).abs().max()) < 1e-7
    found = functional.dequantize_blockwise(codes, state)
    assert same_bits(found, code[codes.long()] * state.absmax.repeat_interleave(64)[:1000])


@pytest.mark.parametrize("most", [0.5, 3.0])
def test_tables_that_do_not_reach_one(most: float) -> None:
    code = torch.linspace(-most, most, 16)
    x = torch.randn(2, 100)
    codes, state = functional.quantize_blockwise(x, code, blocksize=64)
    scale = state.absmax.repeat_interleave(64)[:200].view(2, 100)
    expected = ((x / scale)[..., None].double() - code.double()).abs().argmin(-1)
    assert torch.equal(codes.long(), expected)
    found = functional.dequantize_blockwise(codes, state)
    assert same_bits(found, code[expected] * scale)
    out = torch.empty(100, 2, dtype=torch.bfloat16).t()
    assert functional.dequantize_blockwise(codes, state, out=out) is out
    assert same_bits(out, found.bfloat16())


def test_stochastic_rounding_is_right_in_the_mean() -> None:
    """Each code is one of the two neighbors, and their mean is the number."""
    # Every block has absmax 1; -1 is beyond the end of the table.
    x = torch.linspace(-0.99, 1, 256).repeat(400)
    rand = torch.rand(x.numel(), generator=torch.Generator().manual_seed(0))
    codes, state = functional.quantize_blockwise(x, blocksize=256, rand=rand)
    found = functional.dequantize_blockwise(codes, state).view(400, 256)
    assert state.code is not None
    table = state.code.sort().values
    low = table[(torch.searchsorted(table, x[:256], right=True) - 1).clamp(0, 254)]
    high = table[torch.searchsorted(table, x[:256]).clamp(max=255)]
    assert bool(((found == low) | (found == high)).all())
    spread = (high - low).clamp(min=1e-6)
    assert float(((found.mean(0) - x[:256]) / spread).abs().max()) < 0.12  # 4.8 deviations
    plain = functional.dequantize_blockwise(*functional.quantize_blockwise(x, blocksize=256))
    assert float((plain.view(400, 256).mean(0) - x[:256]).abs().max()) > 1e-3


def test_order_of_old_versions() -> None:
    """0.0.24: (A, code, absmax, rand, out), and states that are pairs."""
    x = torch.randn(5000)
    table = functional.create_dynamic_map()
    rand = torch.rand(1024)
    absmax, out = torch.empty(2), torch.empty(5000, dtype=torch.uint8)
    codes, state = functional.quantize_blockwise(x, table, absmax, rand, out)  # type: ignore[arg-type]
    assert codes is out
    assert state.absmax is absmax
    expected, _ = functional.quantize_blockwise(x, table, rand=rand)
    assert same_bits(out, expected)
    assert not same_bits(out, functional.quantize_blockwise(x, table)[0])
    fourth, _ = functional.quantize_blockwise(x, table, None, rand)
    assert same_bits(fourth, expected)
    fifth, _ = functional.quantize_blockwise(x, table, None, None, torch.empty_like(out))  # type: ignore[arg-type]
    assert same_bits(fifth, functional.quantize_blockwise(x, table)[0])
    numbers = functional.dequantize_blockwise(codes, state)
    for pair in ((absmax, table), (table, absmax), [absmax, table]):
        assert same_bits(functional.dequantize_blockwise(codes, pair), numbers)
    assert same_bits(functional.dequantize_blockwise(codes, None, absmax, table), numbers)
    assert same_bits(functional.dequantize_blockwise(codes, absmax=absmax), numbers)


def test_memory_is_filled() -> None:
    x = torch.randn(6, 50)
    codes, state = functional.quantize_blockwise(x, blocksize=64)
    absmax, out = torch.empty(5), torch.empty(50, 6, dtype=torch.uint8).t()
    made, found = functional.quantize_blockwise(x, absmax=absmax, out=out, blocksize=64)
    assert made is out
    assert found.absmax is absmax
    assert torch.equal(out, codes)
    numbers = torch.empty(6, 50, dtype=torch.float16)
    assert functional.dequantize_blockwise(codes, state, out=numbers) is numbers
    assert same_bits(numbers, functional.dequantize_blockwise(codes, state).half())


def test_table_in_a_state_is_a_copy() -> None:
    table = functional.create_linear_map()
    codes, state = functional.quantize_blockwise(torch.randn(100), table)
    numbers = functional.dequantize_blockwise(codes, state)
    table.zero_()
    assert same_bits(functional.dequantize_blockwise(codes, state), numbers)
    assert state.code is not None
    state.code.mul_(0.5)  # and a change of it counts
    assert same_bits(functional.dequantize_blockwise(codes, state), numbers * 0.5)


def test_list_form_of_states() -> None:
    x = torch.randn(40, 64)
    codes, state = functional.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
    listed = [state[place] for place in range(6)]
    expected = functional.dequantize_4bit(codes, state)
    assert same_bits(functional.dequantize_4bit(codes, listed), expected)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (2, 3, 5)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    for nested in (False, True):
        codes, state = functional.quantize_blockwise(x, blocksize=64, nested=nested)
        assert codes.shape == x.shape
        found = functional.dequantize_blockwise(codes, state)
        assert found.shape == x.shape
        assert torch.allclose(found, x, atol=0.1)


def test_non_contiguous_input(theirs: Any) -> None:
    x = torch.randn(40, 30).t()[::2]
    expected, state = theirs.quantize_blockwise(x.contiguous(), blocksize=64)
    codes, found = functional.quantize_blockwise(x, blocksize=64, exact=False)
    assert same_bits(codes, expected)
    assert same_bits(state.absmax, found.absmax)
    strided: Tensor = torch.stack([codes, codes], -1)[..., 0]
    assert same_bits(
        functional.dequantize_blockwise(strided, found),
        functional.dequantize_blockwise(codes, found),
    )
