"""What layers return is like any tensor: users write into it in place, and sizes may be zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnbx
from bnbx.errors import InputError
from bnbx.nn import Linear4bit, Linear8bitLt, QuantEmbedding, QuantLinear

LAYERS: dict[str, Callable[[int, int], Any]] = {
    "any type": lambda columns, rows: QuantLinear(columns, rows, quant_type="int8"),
    "4 bits": lambda columns, rows: Linear4bit(columns, rows, bias=False),
    "int8, frozen": lambda columns, rows: Linear8bitLt(columns, rows, has_fp16_weights=False),
    "int8, outliers": lambda columns, rows: Linear8bitLt(
        columns, rows, has_fp16_weights=False, threshold=6.0
    ),
    "int8, trained": Linear8bitLt,
}


def _first_to_zero(y: Tensor) -> None:
    y[..., 0] = 0


IN_PLACE: dict[str, Callable[[Tensor], Any]] = {
    "relu_": torch.relu_,
    "add_": lambda y: y.add_(1),
    "setitem": _first_to_zero,
    "dropout": lambda y: nn.functional.dropout(y, 0.5, inplace=True),
}


@pytest.mark.parametrize("change", IN_PLACE)
@pytest.mark.parametrize("name", LAYERS)
def test_output_can_be_changed_in_place(name: str, change: str) -> None:
    layer = LAYERS[name](64, 32).to("cpu")
    found = []
    for shape in ((2, 3, 64), (6, 64)):  # both are the same six rows
        torch.manual_seed(0)
        x = torch.randn(6, 64).reshape(shape).requires_grad_()
        y = layer(x)
        IN_PLACE[change](y)
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        found.append((y.detach().reshape(6, 32), grad.reshape(6, 64)))
    for many, few in zip(*found, strict=True):
        torch.testing.assert_close(many, few)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_with_activations_in_place_trains(compiled: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(inplace=True), nn.Linear(64, 8))
    bnbx.quantize_(model, "nf4")
    x = torch.randn(2, 3, 64, requires_grad=True)
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    run(x).sum().backward()
    grad, x.grad = x.grad, None
    bnbx.dequantize_(model)
    model(x).sum().backward()
    torch.testing.assert_close(grad, x.grad)


def test_rows_of_an_embedding_can_be_changed_in_place() -> None:
    found = QuantEmbedding(10, 64).to("cpu")
    ids = torch.tensor([[1, 2], [3, 4]])
    rows = found(ids)
    before = rows.clone()
    rows += 1
    assert torch.equal(rows, before + 1)
    assert torch.equal(found(ids), before)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("shape", [(2, 3), (5,), ()])
@pytest.mark.parametrize(("columns", "rows"), [(4, 0), (0, 4)])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_zero_sizes(
    name: str, columns: int, rows: int, shape: tuple[int, ...]
) -> None:
    layer = LAYERS[name](columns, rows).to("cpu")
    dense = nn.Linear(columns, rows)
    for each in (dense, layer):
        x = torch.ones(*shape, columns, requires_grad=True)
        y = each(x)
        assert y.shape == (*shape, rows)
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape
    if layer.bias is not None and layer.bias.grad is not None:
        torch.testing.assert_close(layer.bias.grad, dense.bias.grad)


@pytest.mark.parametrize("lost", ["weight", "scales", "bias", "x"])
@pytest.mark.parametrize("name", ["any type", "int8, frozen", "int8, outliers"])
def test_no_product_reads_memory_that_was_freed(name: str, lost: str) -> None:
    layer, x = LAYERS[name](64, 32).to("cpu"), torch.randn(2, 64)
    scales = getattr(layer.weight, "SCB", None)
    scales = layer.weight.quant_state.absmax if scales is None else scales
    tensors = {"weight": layer.weight.data, "scales": scales, "bias": layer.bias.data, "x": x}
    tensors[lost].untyped_storage().resize_(0)
    with torch.no_grad(), pytest.raises(InputError, match="it was freed or made smaller"):
        layer(x)
