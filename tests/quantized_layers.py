"""What the tests of layers share: small models, and layers in codes beside their dense weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bnbx.nn import QuantLinear
from bnbx.registry import quant_types

TYPES = quant_types().names()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Relative to the largest element of a product: of how differently it may be summed."""


def layer(columns: int, rows: int, bias: bool = True, **settings: Any) -> QuantLinear:
    """A quantized layer."""
    torch.manual_seed(0)
    return QuantLinear(columns, rows, bias, **settings).to("cpu")


def product(x: Tensor, found: Any) -> Tensor:
    """What a layer should compute: in float64, with its decoded weight."""
    weight = found.dequantized_weight(torch.float32).double()
    bias = 0.0 if found.bias is None else found.bias.double()
    result: Tensor = x.double() @ weight.T + bias
    return result


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Equal up to the order of sums in a dtype."""
    assert found.dtype == dtype
    assert found.shape == expected.shape
    if expected.numel():
        off = (found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
        assert off <= TOLERANCE[dtype], off


class Experts(nn.Module):
    """The weights of four experts in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 64, 64) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return sum(nn.functional.linear(x, self.up[e]) for e in range(4))  # type: ignore[return-value]


class Block(nn.Module):
    """A layer of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Linear(64, 64)
        self.mlp = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
        self.norm = nn.LayerNorm(64)
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.mlp(self.norm(self.attention(x))) + self.experts(x)
        return found


class LanguageModel(nn.Module):
    """Embeddings, blocks, and an output layer that shares the weight of the embedding."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 64)
        self.positions = nn.Embedding(10, 64)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.lm_head = nn.Linear(64, 100, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.layers:
            x = block(x)
        found: Tensor = self.lm_head(x)
        return found


def language_model(**settings: Any) -> LanguageModel:
    """The same one every time."""
    torch.manual_seed(0)
    return LanguageModel(**settings)


def ids() -> Tensor:
    """What language models read."""
    return torch.randint(0, 100, (2, 10), generator=torch.Generator().manual_seed(1))
