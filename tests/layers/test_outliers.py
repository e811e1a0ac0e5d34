"""Outlier dimensions: where they are found, and the layer that spares them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnbx.errors import OptionError, SingletonError
from bnbx.nn import OutlierAwareLinear, OutlierTracer, find_outlier_dims


class Other(OutlierAwareLinear):
    """One that says what it is asked."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.asked: list[list[int]] = []

    def quantize_weight(self, w: Tensor, outlier_idx: Tensor) -> Tensor:
        self.asked.append(outlier_idx.tolist())
        return w * 2

    def forward_with_outliers(self, x: Tensor, outlier_idx: Tensor) -> Tensor:
        return super().forward_with_outliers(x, outlier_idx) + 1


def _with_outliers(*columns: int) -> Tensor:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) / 10
    weight[:, list(columns)] *= 30
    return weight


def test_dimensions_that_vary_far_more_than_others_are_found() -> None:
    assert find_outlier_dims(_with_outliers(5, 77)).tolist() == [5, 77]
    assert find_outlier_dims(_with_outliers(5, 77).T, reduction_dim=1).tolist() == [5, 77]
    assert find_outlier_dims(_with_outliers()).tolist() == []
    assert find_outlier_dims(_with_outliers(5, 77), topk=1).numel() == 1


def test_layers_are_told_theirs_as_the_model_runs() -> None:
    first, middle, last = Other(128, 64), nn.Linear(64, 128), Other(128, 64)
    model = nn.Sequential(first, middle, last)
    with torch.no_grad():
        last.weight.copy_(_with_outliers(9))
    tracer = OutlierTracer.get_instance()
    assert tracer is OutlierTracer.get_instance()
    tracer.initialize(model)
    assert tracer.is_initialized()
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(1))
    x[:, 3] = 20
    x[1, 8] = 7  # rare, but large
    dense = [layer.weight.detach().clone() for layer in (first, middle, last)]
    result = model(x)
    assert first.asked == [[3, 8]]  # of the input, since there is no weight before it
    assert last.asked == [[9]]
    assert torch.equal(first.weight, dense[0] * 2)
    assert torch.equal(tracer.get_outliers(last.weight), torch.tensor([9]))  # type: ignore[arg-type]
    plain = nn.functional.linear(x, dense[0] * 2, first.bias) + 1
    plain = nn.functional.linear(middle(plain), dense[2] * 2, last.bias) + 1
    torch.testing.assert_close(result, plain)
    model(x)
    assert (first.asked, last.asked) == ([[3, 8]], [[9]])


def test_columns_with_outliers_are_spared() -> None:
    layer = OutlierAwareLinear(128, 64)
    with torch.no_grad():
        layer.weight.copy_(_with_outliers(5, 77))
    before = layer.weight.detach().clone()
    OutlierTracer.get_instance().initialize(nn.Sequential(nn.Linear(128, 128), layer))
    columns = torch.tensor([5, 77])
    layer.outlier_dim = columns
    layer(torch.randn(2, 128))
    assert layer.is_quantized
    assert torch.equal(layer.weight[:, columns], before[:, columns])
    rest = torch.ones(128, dtype=torch.bool)
    rest[columns] = False
    step = before[:, rest].abs().amax(1, keepdim=True) / 127
    off = (layer.weight - before)[:, rest].abs()
    assert off.max() > 0
    assert (off <= step * 0.5001).all()


def test_layer_that_nobody_traced_says_what_to_do() -> None:
    OutlierTracer.get_instance().initialize(nn.Sequential())
    with pytest.raises(OptionError, match=r"initialize\(model\)"):
        OutlierAwareLinear(8, 8)(torch.randn(1, 8))
    with pytest.raises(SingletonError, match="get_instance"):
        OutlierTracer()


def test_the_tracer_keeps_no_model_alive_and_removes_its_hooks() -> None:
    one, two = nn.Linear(8, 8), nn.Linear(8, 8)
    tracer = OutlierTracer.get_instance()
    tracer.initialize(nn.Sequential(one))
    tracer.initialize(nn.Sequential(two))
    assert not one._forward_pre_hooks
    two(torch.randn(3, 8))
    assert not two._forward_pre_hooks
    assert tracer.get_outliers(two.weight) is not None
    assert tracer.get_outliers(one.weight) is None
