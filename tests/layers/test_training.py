"""Training on a frozen base in codes: optimizers take `model.parameters()`, adapters learn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnbx.optim
from bnbx.errors import UnsupportedTensorError
from bnbx.nn import QuantParameter, quantize_
from quantized_layers import ids, language_model


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small only wait for one another's threads on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class LoRA(nn.Module):
    """A low-rank update of a layer."""

    def __init__(self, base: Any, rank: int = 4) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / 8)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.base(x) + x @ self.a.T @ self.b.T
        return found


def _adapted() -> nn.Module:
    model = language_model()
    quantize_(model, "nf4", double=True)
    model.requires_grad_(False)
    torch.manual_seed(1)
    block: Any
    for block in model.layers:
        block.attention = LoRA(block.attention)
        block.mlp[0] = LoRA(block.mlp[0])
    return model


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_adapters_learn_and_nothing_else_moves(bits: int) -> None:
    model = _adapted()
    named = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in named.items()}
    optimizer = bnbx.optim.create("adamw", named.items(), bits=bits, lr=2e-2, min_8bit_size=0)
    losses = []
    for _ in range(30):
        logits = model(ids())[:, :-1]
        loss: Any = nn.functional.cross_entropy(logits.flatten(0, 1), ids()[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    for name, p in named.items():
        assert torch.equal(p.detach(), before[name]) != p.requires_grad, name
        assert (p in optimizer.state) == p.requires_grad, name


def test_weights_in_codes_have_no_state_and_are_explained() -> None:
    model = _adapted()
    optimizer = bnbx.optim.AdamW8bit(model.named_parameters(), lr=1e-2)
    model(ids()).sum().backward()
    optimizer.step()
    codes = [name for name, p in model.named_parameters() if isinstance(p, QuantParameter)]
    assert codes
    explained = bnbx.optim.explain(optimizer)
    for name in codes:
        assert explained[name].state_bytes == {}
        assert "frozen" in explained[name].why
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()


def test_integers_that_are_no_frozen_parameter_are_refused_as_ever() -> None:
    with pytest.raises(UnsupportedTensorError, match=r"torch.uint8; expected one of torch.float32"):
        bnbx.optim.AdamW8bit([torch.zeros(3, dtype=torch.uint8)])


def test_optimizers_of_torch_take_them_too() -> None:
    model = _adapted()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(ids()).sum().backward()
    optimizer.step()
    bnbx.optim.AdamW8bit(model.parameters()).step()
