"""Whole models, quantized in place and back: NaN in weights, and dtypes that do not match."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bnbx.errors import BnbxWarning, UnsupportedTensorError
from bnbx.nn import Linear8bitLt, dequantize_, quantize_
from bnbx.registry import quant_types
from quantized_layers import language_model


def test_biases_get_the_dtype_of_dequantized_weights() -> None:
    model: Any = nn.Sequential(nn.Linear(64, 64), Linear8bitLt(64, 8, has_fp16_weights=False)).to(
        "cpu"
    )
    quantize_(model, "nf4", skip=["1"])
    biases = [layer.bias for layer in model]
    biases[0].sum().backward()
    dequantize_(model, torch.bfloat16)
    assert model(torch.ones(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    for layer, bias in zip(model, biases, strict=True):
        assert layer.bias is bias
        assert bias.dtype == torch.bfloat16
    assert model[0].bias.grad.dtype == torch.bfloat16
    kept: Any = nn.Linear(64, 64)
    quantize_(kept)
    dequantize_(kept)
    assert kept.bias.dtype == torch.float32


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("name", quant_types().names())
def test_weights_that_become_nan_are_told(name: str, double: bool) -> None:
    if double and quant_types().get(name).scale.dtype != "float32":
        pytest.skip("scales of this type are not quantized")
    for number in (torch.nan, torch.inf):
        model: Any = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, bias=False), nn.ReLU())
        model[2].extra = nn.Parameter(torch.ones(2, 64, 64))
        for weight in (model[1].weight, model[2].extra):
            weight.data.view(-1)[7] = number
        with pytest.warns(BnbxWarning, match=r"NaN or infinity in '1.weight', '2.extra': all"):
            report = quantize_(model, name, double=double, parameters=["extra"])
        remarks = {entry.name: entry.remark for entry in report.quantized}
        assert [key for key, remark in remarks.items() if remark] == ["1.weight", "2.extra"]
        assert "; holds NaN" in str(report)
        assert not model[1].dequantized_weight().isfinite().all()
        assert model[0].dequantized_weight().isfinite().all()


def test_good_weights_are_not_warned_of(recwarn: pytest.WarningsRecorder) -> None:
    for name in quant_types().names():
        quantize_(language_model(), name, parameters=["*experts.up"])
    with torch.device("meta"):
        quantize_(nn.Linear(64, 64))
    assert not recwarn


class _T5Block(nn.Module):
    """As `T5DenseActDense` of transformers casts."""

    def __init__(self) -> None:
        super().__init__()
        self.wi = nn.Linear(64, 128, bias=False)
        self.wo = nn.Linear(128, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.wi(x).relu()
        found: torch.Tensor = self.wo(hidden.to(self.wo.weight.dtype))
        return found


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_model_that_casts_to_the_dtype_of_codes_is_told_what_to_do(
    compute_dtype: torch.dtype | None, autocast: bool
) -> None:
    """Converted back, what was rounded to integers would pass for numbers."""
    x = torch.randn(2, 64)
    model = nn.ModuleList([_T5Block(), _T5Block()])
    quantize_(model, "nf4", compute_dtype=compute_dtype)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        pytest.raises(UnsupportedTensorError, match=r"x is torch.uint8.*skip=\['wo'\]"),
    ):
        model[0](x)
    other = nn.ModuleList([_T5Block(), _T5Block()])
    report = quantize_(other, "nf4", skip=["wo"], compute_dtype=compute_dtype)
    assert [each.name for each in report.quantized] == ["0.wi.weight", "1.wi.weight"]
    assert other[1](x).shape == (2, 64)
