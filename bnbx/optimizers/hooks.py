"""The hooks around `load_state_dict`, which torch runs in its own and we in ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from bnbx.errors import CheckpointError


def before_loading(optimizer: Optimizer, state_dict: Any) -> dict[str, Any]:
    """A copy of a state dict, as the optimizer's pre-hooks leave it.

    Raises:
        CheckpointError: it is no dict.
    """
    if not isinstance(state_dict, Mapping):
        raise CheckpointError(f"the state dict is {type(state_dict).__name__}; expected a dict")
    found: dict[str, Any] = dict(state_dict)
    for hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        found = hook(optimizer, found) or found
    return found


def after_loading(optimizer: Optimizer) -> None:
    """Run the optimizer's post-hooks."""
    for hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        hook(optimizer)
