"""What the tests of GlobalOptimManager share: a manager that knows nothing, and how to ask it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bnbx.optimizers.manager import GlobalOptimManager


@contextmanager
def forgetful_manager() -> Iterator[GlobalOptimManager]:
    """The manager, without overrides before and after."""
    found = GlobalOptimManager.get_instance()
    found.initialize()
    yield found
    found.initialize()


def tensor() -> Tensor:
    """A small parameter."""
    return torch.zeros(4, requires_grad=True)


def merged(manager: GlobalOptimManager, p: Any) -> dict[str, Any]:
    """The overrides of a parameter as `resolve` reads them: later layers win."""
    return {key: value for _, layer in manager.layers_for(p) for key, value in layer.items()}
