"""Layers in codes on a GPU: the codes of the CPU, products that are near, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import on_gpu
from bnbx.nn import (
    Linear8bitLt,
    LinearNF4,
    QuantLinear,
)
from layers.gpu_layers import (
    INT8,
    LINEAR,
    ROWS,
    assert_same_dicts,
    int8_codes,
    numbers,
    pair,
)
from on_gpu import assert_there, same, side_stream, there
from quantized_layers import DTYPES, TYPES, assert_near, product

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Embedding size:bnbx.errors.BnbxWarning"),
]

# ---- 4 bits, and any other type


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(128, 64), (129, 33), (63, 7), (512, 1)], ids=str)
@pytest.mark.parametrize("name", LINEAR)
def test_layers_are_quantized_to_the_same_codes_and_compute_the_same(
    name: str, size: tuple[int, int], dtype: torch.dtype
) -> None:
    if name == "bfloat16 memory" and size[0] * size[1] % 4:
        pytest.skip("codes that do not fill elements of the storage are refused")
    here, gpu = pair(LINEAR[name], *size, dtype=dtype)
    # The type and shape of codes are described in text, which is host memory, as in bitsandbytes.
    saved = {k: v for k, v in gpu.state_dict().items() if "quant_state.bitsandbytes" not in k}
    assert_there(gpu.weight, *saved.values())
    if name != "fitted":  # errors are summed in another order: a near tie may fall otherwise
        assert_same_dicts(gpu, here)
    for rows in ROWS:
        x = numbers(rows, size[0], dtype=dtype)
        found = gpu(there(x))
        assert_there(found)
        assert_near(found.cpu(), product(there(x), gpu).cpu(), dtype)
        if name != "fitted":
            assert_near(found.cpu(), product(x, here), dtype)
    for shape in ((size[0],), (2, 3, size[0]), (0, size[0])):
        assert gpu(there(numbers(*shape, dtype=dtype))).shape == (*shape[:-1], size[1])


@pytest.mark.parametrize("name", TYPES)
def test_every_type(name: str) -> None:
    here, gpu = pair(lambda: QuantLinear(97, 40, quant_type=name))
    assert_same_dicts(gpu, here)
    assert same(gpu.dequantized_weight(), here.dequantized_weight())
    for rows in (1, 40):
        x = numbers(rows, 97)
        assert_near(gpu(there(x)).cpu(), product(x, here), torch.float32)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["LinearNF4", "nvfp4", "int8"])
def test_gradients(name: str, dtype: torch.dtype, rows: int) -> None:
    _, gpu = pair(LINEAR[name], 96, 40, dtype=dtype)
    dense = gpu.to_dense(torch.float32)
    x = there(numbers(rows, 96, dtype=dtype)).requires_grad_()
    other = x.detach().float().requires_grad_()
    weights = there(numbers(rows, 40))
    (gpu(x).float() * weights).sum().backward()
    product_of_dense = nn.functional.linear(other, dense.weight) * weights
    product_of_dense.sum().backward()  # type: ignore[no-untyped-call]
    assert_near(x.grad, other.grad.double(), dtype)  # type: ignore[arg-type,union-attr]
    assert_near(gpu.bias.grad, weights.sum(0).double(), dtype)
    assert gpu.weight.grad is None


def test_strides_of_the_input_do_not_matter() -> None:
    _, gpu = pair(LinearNF4, 64, 32)
    wide = there(numbers(5, 128))
    for x in (wide[:, ::2], there(numbers(64, 5)).t(), wide[:, 64:], wide[:1, :64].expand(4, 64)):
        assert not x.is_contiguous()
        assert_near(gpu(x), product(x, gpu), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [LinearNF4, int8_codes])
def test_autocast(make: Callable[[int, int], Any], dtype: torch.dtype) -> None:
    _, gpu = pair(make, 64, 32)
    x = there(numbers(3, 64)).requires_grad_()
    with torch.autocast(on_gpu.DEVICE.type, dtype=dtype):
        result = gpu(x)
        assert result.dtype == dtype
    result.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype=dtype):  # of another device: nothing is cast
        if on_gpu.DEVICE.type != "cpu":
            assert gpu(x).dtype == torch.float32


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    network = nn.Sequential(LinearNF4(32, 64), nn.GELU(), Linear8bitLt(64, 32, threshold=6.0))
    network.to(on_gpu.DEVICE)
    x = there(numbers(4, 32)).requires_grad_()
    (plain,) = torch.autograd.grad(network(x).sum(), x)
    checkpoint(network, x, use_reentrant=reentrant).sum().backward()
    assert x.grad is not None
    assert same(x.grad, plain)


def test_two_runs_are_equal() -> None:
    _, gpu = pair(LinearNF4, 500, 301, dtype=torch.bfloat16)
    for rows in ROWS:
        x = there(numbers(rows, 500, dtype=torch.bfloat16)).requires_grad_()
        first, second = gpu(x), gpu(x)
        assert same(first, second)
        grads = [torch.autograd.grad(each.float().square().sum(), x)[0] for each in (first, second)]
        assert same(*grads)


def test_on_a_side_stream() -> None:
    _, gpu = pair(LinearNF4, 500, 301)
    for rows in ROWS:
        x = there(numbers(rows, 500))
        expected = gpu(x)
        later = torch.zeros_like(x)
        with side_stream():
            on_gpu.keep_busy()
            later.copy_(x)
            found = gpu(later)
        assert same(found, expected)


def test_products_do_not_wait_for_the_device() -> None:
    layers = [pair(make, 128, 64)[1] for make in (*LINEAR.values(), *INT8.values())]
    for rows in ROWS:
        x = there(numbers(rows, 128)).requires_grad_()
        for layer in layers:
            layer(x).sum().backward()
        with on_gpu.no_waiting():
            for layer in layers:
                layer(x).sum().backward()
