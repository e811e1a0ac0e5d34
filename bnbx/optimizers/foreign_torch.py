"""State dicts of torch.optim: 32-bit states, each under one key, and a step that is a tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bnbx.errors import CheckpointError
from bnbx.optimizers.state import whole_step
from bnbx.optimizers.switches import IMPLEMENTATION
from bnbx.registry.formats import place_of
from bnbx.registry.optimizer import STEP, Optimizer

# Keys of groups: how a step is computed, not what.
WITHOUT_EFFECT = frozenset(IMPLEMENTATION)
INERT: Mapping[str, Any] = {}
SHARED_OPTIONS = frozenset({"maximize"})
ELSEWHERE: frozenset[str] = frozenset()


def flat(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """The states of one parameter; one that is None does not exist yet."""
    return {key: value for key, value in saved.items() if value is not None}


def state_keys(spec: Optimizer) -> set[str]:
    """All keys that a parameter's states may have."""
    places = [place_of(state, "torch") for state in spec.states]
    return {STEP, *(place[0] for place in places if place)}


def read(spec: Optimizer, saved: Mapping[str, Any], types: dict[str, str]) -> dict[str, Any]:
    """The states of one parameter in our format.

    Raises:
        CheckpointError: they are not what they should be.
    """
    del types  # nothing is quantized
    found: dict[str, Any] = {}
    if STEP in saved:
        found[STEP] = whole_step(saved[STEP])
    for state in spec.states:
        place = place_of(state, "torch")
        if place is not None and place[0] in saved:
            found[state.name] = floats(place[0], saved[place[0]])
    return found


def floats(key: str, value: Any) -> Tensor:
    """A state in float32, from whatever float it is saved in."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        what = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise CheckpointError(f"{key!r} is {what}; expected a tensor of floats")
    return value.to(torch.float32)
