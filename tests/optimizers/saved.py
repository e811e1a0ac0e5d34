"""What tests of checkpoints share: runs that depend on nothing but the step, files, refusals."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import pytest
import torch
from torch import Tensor

from bnbx.errors import CheckpointError
from bnbx.optimizers.engine import Optimizer8bit
from optimizers.compare import equal, parameters_of
from optimizers.variants import gradients, set_gradients


def train(optimizer: Any, params: list[Tensor], first: int, steps: int) -> list[Tensor]:
    """Steps `first` and on, whose gradients depend on nothing but their number; the last ones."""
    values: list[Tensor] = []
    for step in range(first, first + steps):
        torch.manual_seed(step)
        values = gradients(params)
        set_gradients(params, values)
        optimizer.step()
    return values


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The same, written as a file and read without trust in what wrote it."""
    with tempfile.TemporaryFile() as file:
        torch.save(state_dict, file)
        file.seek(0)
        loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def same_values(a: Any, b: Any) -> bool:
    """Whether two nests of tables, lists and tensors are the same."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_values(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same_values, a, b))
    return equal(a, b)


def refuse(optimizer: Optimizer8bit, saved: Any, message: str) -> None:
    """Assert that `saved` is refused with `message`, and that the optimizer is as it was."""
    params = parameters_of(optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    values = [p.detach().clone() for p in params]
    held = [optimizer.state.get(p) for p in params]
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        optimizer.load_state_dict(saved)
    assert same_values(before, optimizer.state_dict())
    assert all(equal(p.detach(), value) for p, value in zip(params, values, strict=True))
    assert all(optimizer.state.get(p) is saved for p, saved in zip(params, held, strict=True))
