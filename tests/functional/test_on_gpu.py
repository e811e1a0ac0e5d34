"""Functions on a GPU: codes, scales, numbers and optimizer steps are those of the CPU."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor

import on_gpu
from bnbx.functional import QuantTensor, dequantize, fake_quantize, quantize
from bnbx.registry import quant_types
from on_gpu import assert_there, keep_busy, same, side_stream, there
from same_bits import FLOATS, inputs

pytestmark = pytest.mark.gpu


TYPES = quant_types().names()
PLAIN = [t.name for t in quant_types() if t.scale == type(t.scale)()]
SHAPES = ((12, 70), (1,), (0, 5), (3, 5, 7), (129, 257))


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


# ---- any type


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", TYPES)
def test_every_type(name: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        x = numbers(*shape, dtype=dtype)
        here, gpu = quantize(x, name), quantize(there(x), name)
        assert_there(*gpu.parts)
        assert all(map(same, gpu.parts, here.parts)), shape
        found = gpu.dequantize()
        assert_there(found)
        assert same(found, here.dequantize()), shape
        for other in FLOATS:
            assert same(gpu.dequantize(other), here.dequantize(other))
        out = torch.empty(shape, dtype=dtype, device=on_gpu.DEVICE)
        assert dequantize(gpu, out=out) is out
        assert same(out, found)


@pytest.mark.parametrize("name", TYPES)
def test_numbers_of_many_kinds(name: str) -> None:
    for what, x in inputs(1111, torch.float32):
        here, gpu = quantize(x, name), quantize(there(x), name)
        assert all(map(same, gpu.parts, here.parts)), what
        assert same(gpu.dequantize(), here.dequantize()), what


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", TYPES)
def test_bad_numbers_stay_in_their_block(name: str, bad: float) -> None:
    x = numbers(12, 700)
    x[3, 5] = bad
    here, gpu = quantize(x, name), quantize(there(x), name)
    assert all(map(same, gpu.parts, here.parts))
    assert same(gpu.dequantize(), here.dequantize())


@pytest.mark.parametrize("name", ["nf4", "linear3", "int8", "mxfp4"])
def test_strides(name: str) -> None:
    x = numbers(64, 130)
    for each in (x.t(), x[:, ::2], x[:, 1:], x[::3]):
        moved = there(x)
        view = torch.as_strided(moved, each.shape, each.stride(), each.storage_offset())
        assert all(map(same, quantize(view, name).parts, quantize(each, name).parts))


@pytest.mark.parametrize("name", ["nf4", "linear8", "int8_block"])
def test_scales_that_are_quantized_too(name: str) -> None:
    """Torch adds up their mean in another order on each device: codes are equal, scales near."""
    x = numbers(129, 256)
    here, gpu = quantize(x, name, double=True), quantize(there(x), name, double=True)
    assert same(gpu.parts[0], here.parts[0])
    torch.testing.assert_close(gpu.dequantize().cpu(), here.dequantize(), rtol=0.05, atol=0.01)


@pytest.mark.parametrize("name", ["nf4", "dynamic8", "linear3", "int8"])
def test_stochastic_rounding_is_the_same_noise(name: str) -> None:
    """The generator stays on the CPU, where its seed is drawn."""
    x = numbers(12, 700)
    made = []
    for each in (x, there(x)):
        generator = torch.Generator().manual_seed(5)
        made.append(quantize(each, name, stochastic=True, generator=generator))
    assert all(map(same, made[1].parts, made[0].parts))
    again = quantize(there(x), name, stochastic=True, generator=torch.Generator().manual_seed(6))
    assert not same(again.parts[0], made[1].parts[0])
    assert_there(quantize(there(x), name, stochastic=True).parts[0])


def test_stochastic_rounding_by_a_generator_of_the_device() -> None:
    x = there(numbers(12, 700))
    generators = [torch.Generator(on_gpu.DEVICE).manual_seed(5) for _ in range(2)]
    first, second = (quantize(x, "nf4", stochastic=True, generator=each) for each in generators)
    assert same(first.parts[0], second.parts[0])


@pytest.mark.parametrize("name", ["nf4", "linear8", "mxfp4"])
def test_fake_quantize(name: str) -> None:
    x = numbers(12, 70)
    gpu = there(x).requires_grad_()
    found = fake_quantize(gpu, name)
    assert same(found, fake_quantize(x, name))
    found.square().sum().backward()  # type: ignore[no-untyped-call]
    assert same(gpu.grad, 2 * found.detach())


def test_fitted_scales() -> None:
    x = numbers(64, 130)
    plain, fitted = quantize(there(x), "nf4"), quantize(there(x), "nf4", fit="mse")
    errors = [float((q.dequantize().cpu() - x).norm()) for q in (plain, fitted)]
    assert errors[1] < 0.99 * errors[0]


def test_quant_tensors_move_and_are_copied() -> None:
    x = numbers(129, 257)
    here = quantize(x, "nf4")
    gpu = here.to(on_gpu.DEVICE)
    assert isinstance(gpu, QuantTensor)
    assert_there(*gpu.parts, gpu.dequantize())
    assert same(gpu.dequantize(), here.dequantize())
    back = gpu.to("cpu")
    assert all(map(same, back.parts, here.parts))
    file = io.BytesIO()
    torch.save(gpu, file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    for other in (copy.deepcopy(gpu), pickle.loads(pickle.dumps(gpu)), saved):
        assert_there(*other.parts)
        assert same(other.dequantize(), here.dequantize())


def test_a_long_tensor() -> None:
    """More blocks of threads than the device holds at once."""
    x = torch.randn(5_000_011)
    here, gpu = quantize(x, "dynamic8"), quantize(there(x), "dynamic8")
    assert all(map(same, gpu.parts, here.parts))
    assert same(gpu.dequantize(), here.dequantize())


def test_on_a_busy_side_stream() -> None:
    x = there(numbers(300, 257))
    expected = quantize(x, "nf4").dequantize()
    later = torch.zeros_like(x)
    with side_stream():
        keep_busy()
        later.copy_(x)
        found = quantize(later, "nf4").dequantize()
    assert same(found, expected)


@pytest.mark.parametrize("name", ["nf4", "dynamic8", "nvfp4", "int8"])
def test_there_and_back_does_not_wait_for_the_device(name: str) -> None:
    x = there(numbers(300, 257))
    quantize(x, name).dequantize()
    with on_gpu.no_waiting():
        quantize(x, name).dequantize()
