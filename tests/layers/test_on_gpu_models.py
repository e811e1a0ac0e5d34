"""Embeddings and whole models on a GPU."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnbx
import on_gpu
from bnbx.nn import (
    Embedding,
    Embedding4bit,
    Embedding8bit,
    EmbeddingFP4,
    EmbeddingNF4,
    LinearNF4,
    OutlierAwareLinear,
    QuantEmbedding,
    QuantLinear,
    StableEmbedding,
    dequantize_,
    merge_lora,
    quantize_,
)
from layers.gpu_layers import (
    assert_same_dicts,
    int8_codes,
    numbers,
    pair,
)
from on_gpu import assert_there, same, there
from quantized_layers import DTYPES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Embedding size:bnbx.errors.BnbxWarning"),
]

EMBEDDINGS: dict[str, Callable[[int, int], Any]] = {
    "Embedding4bit": Embedding4bit,
    "EmbeddingNF4": EmbeddingNF4,
    "EmbeddingFP4": EmbeddingFP4,
    "Embedding8bit": Embedding8bit,
    "QuantEmbedding": lambda n, d: QuantEmbedding(n, d, quant_type="linear3", double=True),
}

# ---- embeddings


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(50, 64), (51, 100)], ids=str)
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embeddings(name: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    here, gpu = pair(EMBEDDINGS[name], *size, dtype=dtype)
    assert_same_dicts(gpu, here)
    ids = torch.tensor([[0, 49, 7], [7, 7, 1]])
    for each in (ids, ids.int(), ids[0, 0], ids[:0]):
        found = gpu(there(each))
        assert_there(found)
        if name in {"Embedding8bit", "QuantEmbedding"}:
            # Torch divides by a number otherwise on each device; means of scales, see above.
            room = 1e-2 if "Quant" in name else {torch.float32: 1e-6}.get(dtype, 1e-2)
            torch.testing.assert_close(found.cpu(), here(each), rtol=room, atol=room)
        else:
            assert same(found, here(each))


@pytest.mark.parametrize("kind", [Embedding, StableEmbedding])
def test_embeddings_in_floats_train(kind: Any) -> None:
    torch.manual_seed(0)
    here = kind(100, 64)
    gpu = copy.deepcopy(here).to(on_gpu.DEVICE)
    ids = torch.randint(0, 100, (4, 10))
    runs = []
    for layer, each in ((here, ids), (gpu, there(ids))):
        optimizer = bnbx.optim.create("adamw", layer.parameters(), min_8bit_size=0)
        for _ in range(3):
            optimizer.zero_grad()
            layer(each).sin().sum().backward()
            optimizer.step()
        assert optimizer.state[layer.weight]["m"].dtype == torch.float32
        assert optimizer.state[layer.weight]["m"].device == layer.weight.device
        runs.append(layer(each))
    torch.testing.assert_close(runs[1].cpu(), runs[0], rtol=1e-3, atol=1e-4)


def test_outlier_aware_layers() -> None:
    class Spared(OutlierAwareLinear):
        def quantize_weight(self, w: Tensor, outlier_idx: Tensor) -> Tensor:
            self.asked = outlier_idx.tolist()
            return w

        def forward_with_outliers(self, x: Tensor, outlier_idx: Tensor) -> Tensor:
            assert outlier_idx.device == x.device
            return nn.functional.linear(x, self.weight, self.bias)

    asked = []
    for device in ("cpu", on_gpu.DEVICE):
        torch.manual_seed(0)
        model: Any = nn.Sequential(Spared(128, 64), nn.ReLU(), Spared(64, 8)).to(device)
        with torch.no_grad():
            model[2].weight[:, 9] *= 50
        bnbx.nn.OutlierTracer.get_instance().initialize(model)
        x = numbers(32, 128)
        x[:, 3] = 20
        assert model(x.to(device)).device.type == torch.device(device).type
        asked.append([layer.asked for layer in (model[0], model[2])])
    assert 3 in asked[0][0]
    assert 9 in asked[0][1]
    assert asked[0] == asked[1]


# ---- whole models


def transformer() -> nn.Module:
    """A model that is the same on every device."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(100, 64),
        nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True),
        nn.Linear(64, 100),
    )


def tokens() -> Tensor:
    return torch.randint(0, 100, (2, 10), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", [{}, dict(double=True), dict(fit="mse")], ids=str)
@pytest.mark.parametrize("name", ["nf4", "int8", "mxfp4"])
def test_models_are_quantized_where_they_are(name: str, options: dict[str, Any]) -> None:
    if name == "mxfp4" and "double" in options:
        pytest.skip("its scales are not float32")
    here, gpu = transformer(), transformer().to(on_gpu.DEVICE)
    exact = gpu(there(tokens())).detach()
    reports = [quantize_(model, name, **options) for model in (here, gpu)]
    assert str(reports[0]) == str(reports[1]) or "fit" in options
    assert_there(*gpu.parameters())
    if "fit" not in options:
        assert_same_dicts(gpu, here)
    found = gpu(there(tokens()))
    assert (found - exact).norm() < 0.3 * exact.norm()
    found.sum().backward()
    dequantize_(gpu)
    assert_there(*gpu.parameters())
    if not options:
        dequantize_(here)
        assert_same_dicts(gpu, here)
    assert (gpu(there(tokens())) - exact).norm() < 0.3 * exact.norm()


def test_models_that_are_quantized_as_they_move() -> None:
    here, gpu = transformer(), transformer()
    quantize_(here, "nf4")
    quantize_(gpu, "nf4")
    gpu.to(on_gpu.DEVICE)
    assert_there(*gpu.parameters(), *gpu.state_dict().values())
    assert_same_dicts(gpu, here)


def test_fitted_scales_are_no_worse_and_near_those_of_the_cpu() -> None:
    dense = numbers(64, 130) * (0.01 + numbers(64, 1).abs())
    errors = []
    cases = itertools.product(("cpu", on_gpu.DEVICE), (None, "mse"))
    for device, fit in cases:
        layer: Any = QuantLinear(130, 64, bias=False, quant_type="nf4", fit=fit)
        layer.weight.data.copy_(dense)
        layer.to(device)
        errors.append(float((layer.dequantized_weight().cpu() - dense).norm()))
    assert errors[0] == pytest.approx(errors[2], rel=1e-6)
    assert errors[3] < 0.99 * errors[2]
    assert errors[1] == pytest.approx(errors[3], rel=1e-3)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("make", [LinearNF4, int8_codes])
def test_updates_are_merged(make: Callable[[int, int], Any], in_place: bool) -> None:
    here, gpu = pair(make, 136, 24)
    a, b = numbers(4, 136), numbers(24, 4) * 0.02
    found = merge_lora(gpu, there(a), there(b), 0.5, in_place=in_place, dense=torch.float32)
    expected = merge_lora(here, a, b, 0.5, in_place=in_place, dense=torch.float32)
    assert_there(*found.parts, found.dense)  # type: ignore[arg-type]
    assert found.report.error == pytest.approx(expected.report.error, rel=1e-2)
    assert found.report.survived == pytest.approx(expected.report.survived, rel=1e-2)
    torch.testing.assert_close(found.dense.cpu(), expected.dense, rtol=1e-5, atol=1e-5)  # type: ignore[union-attr]


def test_adapters_on_a_quantized_base_train() -> None:
    """As QLoRA does: the base stays as it is, the loss falls."""
    torch.manual_seed(0)

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = LinearNF4(64, 64)
            self.a, self.b = nn.Linear(64, 8, bias=False), nn.Linear(8, 64, bias=False)
            nn.init.zeros_(self.b.weight)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.base(x) + self.b(self.a(x))
            return found

    model = nn.Sequential(Adapted(), nn.GELU(), Adapted()).to(on_gpu.DEVICE)
    before = {k: v.clone() for k, v in model.state_dict().items() if "base.weight" in k}
    optimizer = bnbx.optim.PagedAdamW8bit(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, min_8bit_size=0
    )
    x = there(numbers(32, 64))
    y = x.roll(1, 1)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast(on_gpu.DEVICE.type, dtype=torch.bfloat16):
            loss = (model(x).float() - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    for key, value in before.items():
        assert same(model.state_dict()[key], value), key
