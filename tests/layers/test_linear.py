"""The quantized linear layer computes the product with its decoded weight, and its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bnbx.errors import BnbxWarning, OptionError, QuantizedDataError, UnknownNameError
from bnbx.errors import UnsupportedTensorError as UnsupportedError
from bnbx.nn import (
    Linear4bit,
    LinearFP4,
    LinearNF4,
    QuantEmbedding,
    QuantLinear,
    QuantParameter,
)
from bnbx.registry import QuantType
from quantized_layers import DTYPES, TYPES, assert_near, layer, product


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("name", TYPES)
def test_product_with_every_type(name: str, rows: int) -> None:
    found = layer(96, 40, quant_type=name)
    x = torch.randn(rows, 96)
    assert_near(found(x), product(x, found), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["nf4", "linear3", "int8", "mxfp4", "nvfp4"])
def test_product_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    found = layer(128, 33, quant_type=name, dtype=dtype)
    assert found.weight.quant_state.dtype == dtype
    for shape in ((128,), (1, 128), (2, 3, 128), (40, 128), (0, 128), (2, 0, 128)):
        x = torch.randn(shape, dtype=dtype)
        assert_near(found(x), product(x, found), dtype)


@pytest.mark.parametrize("columns", [1, 3, 63, 65, 127])
@pytest.mark.parametrize("name", ["nf4", "linear3", "int8", "nvfp4"])
def test_odd_sizes(name: str, columns: int) -> None:
    found = layer(columns, 7, quant_type=name)
    x = torch.randn(3, columns)
    assert_near(found(x), product(x, found), torch.float32)


def test_strides_of_the_input_do_not_matter() -> None:
    found = layer(64, 32, double=True)
    wide = torch.randn(5, 128)
    for x in (wide[:, ::2], torch.randn(64, 5).t(), wide[:, :64], torch.randn(1, 64).expand(4, 64)):
        assert not x.is_contiguous()
        assert_near(found(x), product(x, found), torch.float32)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_those_of_the_dense_layer(bias: bool, double: bool) -> None:
    found = layer(96, 40, bias, double=double)
    dense = found.to_dense()
    x = torch.randn(2, 3, 96, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    for network, start in ((found, x), (dense, other)):
        network(start).square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-4)
    if bias:
        assert found.bias.grad is not None
        torch.testing.assert_close(found.bias.grad, dense.bias.grad, rtol=1e-4, atol=1e-4)
    assert found.weight.grad is None


def test_second_gradients() -> None:
    """Of a function that is not linear in the product, so that they are not all zero."""
    found = layer(32, 16)
    dense = found.to_dense()

    def second(network: nn.Module) -> torch.Tensor:
        x = torch.linspace(-1, 1, 32).requires_grad_()
        (first,) = torch.autograd.grad(network(x).sin().sum(), x, create_graph=True)
        (result,) = torch.autograd.grad(first.square().sum(), x)
        return result

    assert second(dense).abs().max() > 1e-3
    torch.testing.assert_close(second(found), second(dense), rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    network = nn.Sequential(layer(32, 64), nn.GELU(), layer(64, 32))
    x = torch.randn(4, 32, requires_grad=True)
    (plain,) = torch.autograd.grad(network(x).sum(), x)
    for reentrant in (False, True):
        found = _through_checkpoint(network, x, reentrant)
        torch.testing.assert_close(found, plain, rtol=0, atol=0)


def _through_checkpoint(network: nn.Module, x: torch.Tensor, reentrant: bool) -> torch.Tensor:
    start = x.detach().clone().requires_grad_()
    checkpoint(network, start, use_reentrant=reentrant).sum().backward()
    assert start.grad is not None
    return start.grad


def test_backward_keeps_no_dense_weight() -> None:
    """Nothing that autograd keeps is as large as the weight in floats."""
    found = layer(256, 256)
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.nbytes)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks:
        found(torch.randn(1, 256, requires_grad=True)).sum()
    assert kept
    assert sum(kept) < 256 * 256


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_what_it_does_to_the_dense_layer(dtype: torch.dtype) -> None:
    found, x = layer(64, 32), torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        result = found(x)
        assert result.dtype == found.to_dense()(x).dtype == dtype
        assert found(x.to(dtype)).dtype == dtype
    assert_near(result, product(x.to(dtype), found), dtype)
    result.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def test_compute_dtype_is_that_of_the_product_and_not_of_the_result() -> None:
    found, x = layer(64, 32, compute_dtype=torch.bfloat16), torch.randn(3, 64)
    result = found(x)
    assert result.dtype == torch.float32
    assert torch.equal(result, result.bfloat16().float())  # the product was rounded
    assert_near(result.bfloat16(), product(x.bfloat16(), found), torch.bfloat16)
    found.compute_type_is_set = False  # as lightning sets it: float32 input is used as it is
    assert not torch.equal(found(x), result)
    assert_near(found(x), product(x, found), torch.float32)


def test_float64_input_needs_a_compute_dtype() -> None:
    x = torch.randn(3, 64, dtype=torch.float64)
    with pytest.raises(UnsupportedError, match="float64"):
        layer(64, 32)(x)
    assert layer(64, 32, compute_dtype=torch.float32)(x).dtype == torch.float64


@pytest.mark.parametrize("wrong", ["bfloat16", torch.float64, torch.int8, 16])
def test_compute_dtype_is_checked_wherever_it_is_set(wrong: Any) -> None:
    for kind in (QuantLinear, Linear4bit, LinearNF4, LinearFP4):
        with pytest.raises(OptionError, match=r"compute_dtype=.*; expected one of torch.float32"):
            kind(64, 32, compute_dtype=wrong)
    found = layer(64, 32)
    with pytest.raises(OptionError, match=r"compute_dtype=.*or None to use inputs as they are"):
        found.compute_dtype = wrong
    for dtype in (torch.float32, torch.bfloat16, torch.float16, None):
        found.compute_dtype = dtype
        found.compute_type_is_set = True
        assert found(torch.ones(1, 64)).dtype == torch.float32


def test_what_is_no_tensor_is_named() -> None:
    for found in (layer(64, 32), QuantLinear(64, 32, device="meta")):
        with pytest.raises(UnsupportedError, match=r"x is list; expected a torch.Tensor"):
            found([1, 2])
    table = QuantEmbedding(8, 64).to("cpu")
    with pytest.raises(UnsupportedError, match=r"ids is list; expected a torch.Tensor"):
        table([1, 2])


def test_slow_compute_dtype_is_told() -> None:
    found = Linear4bit(64, 32, compute_dtype=torch.float32).to("cpu")
    with pytest.warns(BnbxWarning, match="Input type into Linear4bit is torch.float16.*slow"):
        found(torch.randn(2, 64, dtype=torch.float16))


def test_layer_that_is_not_quantized_yet_says_what_to_do() -> None:
    found = QuantLinear(64, 32)
    assert "not quantized yet" in repr(found)
    with pytest.raises(QuantizedDataError, match=r'not quantized yet.*\.to\("cpu"\)'):
        found(torch.randn(1, 64))


def test_wrong_inputs_are_errors_that_name_them() -> None:
    found = layer(64, 32)
    with pytest.raises(UnsupportedError, match=r"\(2, 63\); expected \(..., 64\)"):
        found(torch.randn(2, 63))
    with pytest.raises(UnsupportedError, match="int64"):
        found(torch.ones(2, 64, dtype=torch.long))
    with pytest.raises(UnknownNameError, match="did you mean 'nf4'"):
        QuantLinear(4, 4, quant_type="nf44")
    with torch.device("meta"), pytest.raises(OptionError, match="fit='mes'; expected one of"):
        QuantLinear(4, 4, fit="mes")
    with pytest.raises(OptionError, match="block size 48"):
        QuantLinear(4, 4, block_size=48)
    with pytest.raises(OptionError, match="scale per row"):
        QuantLinear(4, 4, quant_type="int8", block_size=64)
    with pytest.raises(OptionError, match="quant_storage"):
        QuantLinear(4, 4, quant_storage="uint8")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="do not fill"):
        layer(3, 3, quant_storage=torch.float32)
    with pytest.raises(UnsupportedError, match="float64"):
        QuantLinear(4, 4, dtype=torch.float64).to("cpu")


def test_a_spec_that_nobody_registered_is_a_type_too() -> None:
    spec = QuantType(name="thirds", summary="", bits=2, values=(-1.0, -0.25, 0.25, 1.0))
    found = layer(64, 32, quant_type=spec, double=True)
    assert torch.unique(found.dequantized_weight()).numel() > 4
    x = torch.randn(2, 64)
    assert_near(found(x), product(x, found), torch.float32)
    again = QuantLinear(64, 32)
    again.load_state_dict(found.state_dict())
    assert torch.equal(again(x), found(x))


def test_fitted_scales_are_nearer_to_the_weight() -> None:
    torch.manual_seed(0)
    weight = torch.randn(32, 64)

    def error(fit: str | None) -> float:
        found = QuantLinear(64, 32, quant_type="linear3", fit=fit)
        found.weight.data.copy_(weight)
        return float((found.to("cpu").dequantized_weight() - weight).square().mean())

    assert error("mse") < 0.9 * error(None)


def test_moving_keeps_the_bias_and_quantizes_once() -> None:
    found = QuantLinear(64, 32, dtype=torch.bfloat16)
    weight = found.weight
    assert not weight.bnb_quantized
    assert found.to("cpu") is found
    assert found.weight is weight
    assert weight.bnb_quantized
    assert isinstance(weight, QuantParameter)
    codes = weight.detach().clone()
    found.to("cpu").float()
    assert torch.equal(found.weight.detach(), codes)
    assert found.bias.dtype == found.dequantized_weight().dtype == torch.float32
    assert found(torch.randn(2, 64)).dtype == torch.float32


def test_layer_on_the_meta_device_knows_shapes() -> None:
    found = QuantLinear(64, 32, device="meta")
    assert found(torch.empty(3, 64, device="meta")).shape == (3, 32)


def test_dense_layer_again() -> None:
    found = layer(64, 32).eval()
    dense = found.to_dense(torch.bfloat16)
    assert type(dense) is nn.Linear
    assert dense.weight.dtype == torch.bfloat16
    assert not dense.training
    assert torch.equal(dense.weight, found.dequantized_weight(torch.bfloat16))
