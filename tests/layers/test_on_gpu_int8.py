"""LLM.int8() on a GPU: the codes of the CPU, sums in integers, outliers in floats."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import bnbx
from layers.gpu_layers import (
    INT8,
    ROWS,
    assert_same_dicts,
    numbers,
    pair,
)
from on_gpu import assert_there, same, there
from quantized_layers import DTYPES, assert_near

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Embedding size:bnbx.errors.BnbxWarning"),
]


def outliers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = numbers(*shape)
    x[..., 5] *= 20
    x[..., 17] += 30
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(96, 40), (97, 33), (520, 64)], ids=str)
@pytest.mark.parametrize("name", INT8)
def test_int8_layers(name: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    """Codes are the same; products in integers are exact, and outliers are added up in order."""
    here, gpu = pair(INT8[name], *size, dtype=dtype)
    for rows in ROWS:
        x = outliers(rows, size[0], dtype=dtype)
        found, expected = gpu(there(x)), here(x)
        assert_there(found)
        assert found.dtype == dtype
        assert same(gpu.state.CB, here.state.CB)
        assert same(gpu.state.SCB, here.state.SCB)
        assert same(gpu.state.idx, here.state.idx)
        room = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
        off = (found.cpu().float() - expected.float()).abs().max()
        assert off <= room * expected.float().abs().max()
    assert_same_dicts(gpu, here)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", INT8)
def test_int8_gradients(name: str, dtype: torch.dtype, rows: int) -> None:
    here, gpu = pair(INT8[name], 96, 40, dtype=dtype)
    room = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    inputs, weights = outliers(rows, 96, dtype=dtype), numbers(rows, 40)
    grads = []
    for layer, x in ((here, inputs.clone()), (gpu, there(inputs))):
        x.requires_grad_()
        (layer(x).float() * weights.to(x.device)).sum().backward()
        grads.append([x.grad, layer.bias.grad, layer.weight.grad])
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert_there(b)
            scale = a.float().abs().max()
            assert (a.float() - b.cpu().float()).abs().max() <= room * scale


def test_int8_rows_without_outliers_have_the_bits_of_the_cpu() -> None:
    here, gpu = pair(INT8["codes, threshold 0.0"], 96, 40)
    for rows in ROWS:
        x = numbers(rows, 96)
        assert same(gpu(there(x)), here(x))


def test_matmul() -> None:
    a, b, bias = numbers(5, 96), numbers(40, 96), numbers(40)
    for threshold in (0.0, 2.5):
        expected = bnbx.matmul(a, b, threshold=threshold, bias=bias)
        found = bnbx.matmul(there(a), there(b), threshold=threshold, bias=there(bias))
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-4)
        out = torch.empty_like(found)
        assert bnbx.matmul(there(a), there(b), out, threshold=threshold, bias=there(bias)) is out
        assert same(out, found)


@pytest.mark.parametrize("rows", ROWS)
def test_matmul_4bit(rows: int) -> None:
    weight, x = numbers(40, 96), numbers(rows, 96)
    codes, state = bnbx.functional.quantize_4bit(
        there(weight), quant_type="nf4", compress_statistics=True
    )
    expected = x.double() @ bnbx.functional.dequantize_4bit(codes, state).cpu().double().t()
    found = bnbx.matmul_4bit(there(x), codes.t(), quant_state=state)
    assert_near(found.cpu(), expected, torch.float32)
    out = torch.empty_like(found)
    bnbx.matmul_4bit(there(x), codes.t(), quant_state=state, out=out)
    assert same(out, found)
