"""The functions of bitsandbytes on a GPU: the bytes of the CPU, and of its own kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import on_gpu
from bnbx import functional
from bnbx.errors import DeviceError
from on_gpu import assert_there, same, there
from same_bits import FLOATS

pytestmark = pytest.mark.gpu

SIZES = (1, 63, 1000, 4097)


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("blocksize", [64, 256, 4096])
def test_quantize_blockwise(blocksize: int, dtype: torch.dtype) -> None:
    for size in SIZES:
        x = numbers(size, dtype=dtype)
        here, state = functional.quantize_blockwise(x, blocksize=blocksize)
        codes, other = functional.quantize_blockwise(there(x), blocksize=blocksize)
        assert other.code is not None
        assert_there(codes, other.absmax, other.code)
        assert same(codes, here)
        assert same(other.absmax, state.absmax)
        found = functional.dequantize_blockwise(codes, other)
        assert same(found, functional.dequantize_blockwise(here, state))
        out = torch.empty_like(found)
        assert functional.dequantize_blockwise(codes, other, out=out) is out
        assert same(out, found)


def test_quantize_blockwise_with_memory_tables_and_noise() -> None:
    x, rand = numbers(1000), torch.rand(77)
    table = functional.create_linear_map(signed=True, total_bits=4)
    for options in (dict(code=table), dict(rand=rand), dict(code=table, rand=rand)):
        moved: Any = {name: there(value) for name, value in options.items()}
        given: Any = options
        here, state = functional.quantize_blockwise(x, blocksize=64, **given)
        codes, other = functional.quantize_blockwise(there(x), blocksize=64, **moved)
        assert same(codes, here)
        assert same(other.absmax, state.absmax)
        out = torch.zeros(1000, dtype=torch.uint8, device=on_gpu.DEVICE)
        absmax = torch.zeros(16, device=on_gpu.DEVICE)
        functional.quantize_blockwise(there(x), absmax=absmax, out=out, blocksize=64, **moved)
        assert same(out, here)
        assert same(absmax, state.absmax)
    nested: Any = functional.quantize_blockwise(there(x), blocksize=64, nested=True)[1]
    assert_there(nested.absmax, nested.offset, nested.state2.absmax)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "af4"])
def test_quantize_4bit(quant_type: str, dtype: torch.dtype) -> None:
    for size in SIZES:
        x = numbers(size, dtype=dtype)
        here, state = functional.quantize_4bit(x, quant_type=quant_type)
        codes, other = functional.quantize_4bit(there(x), quant_type=quant_type)
        assert_there(codes, other.absmax)
        assert same(codes, here)
        assert same(other.absmax, state.absmax)
        found = functional.dequantize_4bit(codes, other)
        assert found.dtype == dtype
        assert same(found, functional.dequantize_4bit(here, state))


def test_quantize_4bit_with_statistics_and_storage() -> None:
    x = numbers(128, 256)
    here, state = functional.quantize_4bit(x, compress_statistics=True, quant_type="nf4")
    codes, other = functional.quantize_4bit(
        there(x), compress_statistics=True, quant_type="nf4", quant_storage=torch.bfloat16
    )
    assert codes.dtype == torch.bfloat16
    assert same(codes.view(torch.uint8).view(-1), here.view(-1))
    found = functional.dequantize_4bit(codes, other)
    expected = functional.dequantize_4bit(here, state)
    torch.testing.assert_close(found.cpu(), expected, rtol=0.05, atol=0.01)
    saved = {
        k: v.cpu() if isinstance(v, Tensor) else v for k, v in other.as_dict(packed=True).items()
    }
    again: Any = functional.QuantState.from_dict(saved, on_gpu.DEVICE)
    assert_there(again.absmax, again.code)
    assert same(functional.dequantize_4bit(codes, again), found)


@pytest.mark.parametrize("rows", [1, 3])
def test_gemv_4bit(rows: int) -> None:
    weight, x = numbers(40, 96), numbers(rows, 96)
    codes, state = functional.quantize_4bit(there(weight), quant_type="nf4")
    expected = x.double() @ functional.dequantize_4bit(codes, state).cpu().double().t()
    if rows == 1:
        found = functional.gemv_4bit(there(x), codes.t(), state=state)
        torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_int8_functions(dtype: torch.dtype) -> None:
    x, w = numbers(33, 100, dtype=dtype), numbers(40, 100, dtype=dtype)
    x[:, 7] *= 20
    for threshold in (0.0, 6.0):
        here = functional.int8_vectorwise_quant(x.clone(), threshold)
        gpu = functional.int8_vectorwise_quant(there(x), threshold)
        assert all(map(same, gpu, here))
    codes, stats, _ = functional.int8_vectorwise_quant(there(x))
    others, scales, _ = functional.int8_vectorwise_quant(there(w))
    assert same(
        functional.int8_vectorwise_dequant(codes, stats),
        functional.int8_vectorwise_dequant(codes.cpu(), stats.cpu()),
    )
    product = functional.int8_linear_matmul(codes, others)
    assert_there(product)
    assert same(product, functional.int8_linear_matmul(codes.cpu(), others.cpu()))
    assert same(product.cpu().long(), codes.cpu().long() @ others.cpu().long().t())
    found = functional.int8_mm_dequant(product, stats, scales)
    expected = functional.int8_mm_dequant(product.cpu(), stats.cpu(), scales.cpu())
    torch.testing.assert_close(found.cpu(), expected, rtol=2e-3, atol=1e-3)
    both = functional.int8_double_quant(there(x), threshold=6.0)
    assert all(map(same, both, functional.int8_double_quant(x.clone(), threshold=6.0)))


def test_tables_of_a_tensor() -> None:
    x = numbers(3000)
    table = functional.create_dynamic_map()
    codes = functional.quantize_no_absmax(there(x).clamp(-1, 1), there(table))
    assert same(codes, functional.quantize_no_absmax(x.clamp(-1, 1), table))
    assert same(
        functional.dequantize_no_absmax(codes, there(table)),
        functional.dequantize_no_absmax(codes.cpu(), table),
    )
    whole, state = functional.quantize(there(x))
    expected, other = functional.quantize(x)
    assert same(whole, expected)
    assert same(functional.dequantize(whole, state), functional.dequantize(expected, other))


def test_statistics() -> None:
    x = numbers(3000)
    assert same(functional.estimate_quantiles(there(x)), functional.estimate_quantiles(x))
    histograms = [torch.zeros(16, 16), torch.zeros(16, 16, device=on_gpu.DEVICE)]
    index = torch.randint(0, 16, (2, 500))
    for histogram in histograms:
        device = histogram.device
        functional.histogram_scatter_add_2d(
            histogram, index[0].to(device), index[1].to(device), torch.ones(500, device=device)
        )
    assert same(histograms[1], histograms[0])
    norms = [torch.zeros(100), torch.zeros(100, device=on_gpu.DEVICE)]
    for step in range(1, 5):
        found, expected = (
            functional.percentile_clipping((x * step).to(each.device), each, step, 50)
            for each in norms[::-1]
        )
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-6, atol=0)


# ---- wrong devices


def test_tensors_on_two_devices_are_refused() -> None:
    if on_gpu.DEVICE.type == "cpu":
        pytest.skip("there is one device")
    x = there(numbers(1000))
    with pytest.raises(DeviceError):
        functional.quantize_blockwise(x, rand=torch.rand(5))
    with pytest.raises(RuntimeError, match="device"):
        functional.optimizer_update_32bit(
            "lion", numbers(1000), x, torch.zeros_like(x), 0.9, 1e-8, 1, 1e-2
        )
    codes, state = functional.quantize_4bit(numbers(64, 64), quant_type="nf4")
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        functional.dequantize_4bit(codes.to(on_gpu.DEVICE), state)


# ---- bitsandbytes' own kernels


@pytest.fixture(scope="module")
def theirs() -> Any:
    return pytest.importorskip("bitsandbytes", reason="the extra `peers` has it")


def assert_almost_the_same(found: Tensor, expected: Tensor, share: float = 5e-3) -> None:
    """Of codes: its kernels divide fast, not exactly, so that near ties may fall otherwise."""
    assert found.shape == expected.shape
    assert float((found != expected).float().mean()) <= share


def _codes(packed: Tensor, quant_type: str) -> Tensor:
    """A code each, with one zero.

    FP4 has two. Which of them a number becomes, the backends of bitsandbytes for the CPU and for
    CUDA have the other way round; ours are those of its CPU, everywhere.
    """
    codes = torch.stack([packed >> 4, packed & 15])
    return torch.where(codes == 8, 0, codes) if quant_type == "fp4" else codes


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bytes_of_bitsandbytes_4bit(theirs: Any, quant_type: str, dtype: torch.dtype) -> None:
    x = there(numbers(256, 320, dtype=dtype))
    expected, state = theirs.functional.quantize_4bit(x, quant_type=quant_type)
    found, ours = functional.quantize_4bit(x, quant_type=quant_type)
    assert same(ours.absmax, state.absmax)
    assert_almost_the_same(_codes(found, quant_type), _codes(expected, quant_type))
    numbers_of = functional.dequantize_4bit(
        expected, functional.QuantState.from_dict(state.as_dict(packed=True), x.device)
    )
    torch.testing.assert_close(
        numbers_of, theirs.functional.dequantize_4bit(expected, state), rtol=1e-2, atol=1e-6
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bytes_of_bitsandbytes_blockwise(theirs: Any, dtype: torch.dtype) -> None:
    x = there(numbers(256, 320, dtype=dtype))
    for blocksize in (256, 4096):
        expected, state = theirs.functional.quantize_blockwise(x, blocksize=blocksize)
        found, ours = functional.quantize_blockwise(x, blocksize=blocksize)
        assert same(ours.absmax, state.absmax)
        assert same(ours.code, state.code)
        assert_almost_the_same(found, expected)
        torch.testing.assert_close(
            functional.dequantize_blockwise(expected, ours),
            theirs.functional.dequantize_blockwise(expected, state),
            rtol=1e-2,
            atol=1e-6,
        )


def test_bytes_of_bitsandbytes_int8(theirs: Any) -> None:
    x = there(numbers(33, 128, dtype=torch.float16))
    x[:, 7] *= 20
    for threshold in (0.0, 6.0):
        expected = theirs.functional.int8_vectorwise_quant(x.clone(), threshold)
        found = functional.int8_vectorwise_quant(x.clone(), threshold)
        assert same(found[1], expected[1])
        assert (found[0].int() - expected[0].int()).abs().max() <= 1
        assert_almost_the_same(found[0], expected[0], 0.02)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_layers_of_bitsandbytes_are_loaded(theirs: Any, quant_type: str, compress: bool) -> None:
    from bnbx.nn import Linear4bit

    options: Any = dict(quant_type=quant_type, compress_statistics=compress)
    layer = theirs.nn.Linear4bit(128, 64, **options).to(on_gpu.DEVICE)
    ours = Linear4bit(128, 64, **options).to(on_gpu.DEVICE)
    ours.load_state_dict(layer.state_dict())
    x = there(numbers(3, 128))
    torch.testing.assert_close(ours(x), layer(x), rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_int8_layers_of_bitsandbytes_are_loaded(theirs: Any, threshold: float) -> None:
    from bnbx.nn import Linear8bitLt

    options: Any = dict(has_fp16_weights=False, threshold=threshold)
    layer = theirs.nn.Linear8bitLt(128, 64, **options).half().to(on_gpu.DEVICE)
    ours = Linear8bitLt(128, 64, **options).half().to(on_gpu.DEVICE)
    ours.load_state_dict(layer.state_dict())
    x = there(numbers(3, 128, dtype=torch.float16))
    x[:, 7] *= 20
    found, expected = ours(x), layer(x)
    assert (found - expected).abs().max() <= 0.05 * expected.abs().max()
