"""Low-rank adapters (LoRA, arXiv:2106.09685) on a frozen base, in bfloat16 or in few bits.

On a quantized base this is QLoRA (arXiv:2305.14314). Adapters are float32 and multiply in the dtype
of the activations, so that both bases see the same arithmetic but for their weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RANK = 8
SCALING = 2.0  # alpha / rank, with alpha = 2 * rank


class Adapted(nn.Module):
    """A frozen linear layer, plus `scaling * x @ a.T @ b.T`, which starts as nothing.

    Attributes:
        base: the layer.
        a: (rank, in).
        b: (out, rank), zeros at first.
    """

    base: nn.Linear

    def __init__(self, base: nn.Linear, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        spread = 1 / math.sqrt(base.in_features)
        self.a = nn.Parameter(torch.randn(RANK, base.in_features, generator=generator) * spread)
        self.b = nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        """The product of (..., in) activations with the adapted weight."""
        base: Tensor = self.base(x)
        update = F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))
        return base + SCALING * update


class Kept16(nn.Linear):
    """A layer that keeps its weight in bfloat16, and multiplies in the dtype of its input.

    Some processors multiply float32 several times faster than bfloat16.
    """

    @classmethod
    def of(cls, layer: nn.Linear) -> Kept16:
        """The same layer, so kept."""
        kept = cls(layer.in_features, layer.out_features, layer.bias is not None, "meta")
        kept.weight = nn.Parameter(layer.weight.detach().to(torch.bfloat16), requires_grad=False)
        kept.bias = layer.bias
        return kept.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """The product of (..., in) activations."""
        bias: Tensor | None = self.bias
        bias = bias if bias is None else bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


def linear_layers(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """Every linear layer: the module that it is in, its name there, and the layer itself."""
    return [
        (module, name, layer)
        for module in model.modules()
        for name, layer in module.named_children()
        if isinstance(layer, nn.Linear)
    ]


def adapt(model: nn.Module, seed: int) -> list[nn.Parameter]:
    """Freeze a model, and put adapters on every linear layer in it; returns what trains."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for module, name, layer in linear_layers(model):
        setattr(module, name, Adapted(layer, generator))
    return [parameter for adapted in adapters_of(model) for parameter in (adapted.a, adapted.b)]


def adapters_of(model: nn.Module) -> Iterator[Adapted]:
    """Every adapted layer, in order."""
    return (module for module in model.modules() if isinstance(module, Adapted))


def base_bytes(model: nn.Module) -> int:
    """Bytes of the weights under the adapters, scales of quantized ones included."""
    return sum(_bytes(adapted.base) for adapted in adapters_of(model))


def _bytes(layer: nn.Linear) -> int:
    state = getattr(layer.weight, "quant_state", None)
    return layer.weight.nbytes if state is None else state.encoding.bytes(state.shape)
