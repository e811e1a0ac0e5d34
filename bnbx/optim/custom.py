"""bitsandbytes' abstract base: `Optimizer8bit(params, defaults)`, whose subclass does the update.

Such an optimizer has no rule of ours. It keeps whatever entries its `init_state` makes, and they
are saved and loaded as they are: no dtype is changed, since one of them may be codes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from bnbx.errors import CheckpointError
from bnbx.optimizers.state import own_entry
from bnbx.registry import Optimizer

CUSTOM = Optimizer(
    name="custom",
    summary="what the update_step of a subclass does",
    hyper={},
    element_code="p = p + 0 * g",  # never run
)
Loaded = tuple[list[dict[str, Any]], dict[Tensor, Any]]


def loaded(groups: list[dict[str, Any]], state_dict: Mapping[str, Any]) -> Loaded:
    """The groups and states of a state dict, for parameters of these groups.

    Raises:
        CheckpointError: it does not fit; nothing has changed.
    """
    if not {"state", "param_groups"} <= state_dict.keys():
        raise CheckpointError(
            f"the state dict has the keys {sorted(map(str, state_dict))}; expected 'state' and "
            "'param_groups'"
        )
    saved = state_dict["param_groups"]
    sizes = [[len(g["params"]) for g in each] for each in (groups, saved)]
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            f"the state dict has groups of {sizes[1]} parameters, the optimizer has {sizes[0]}"
        )
    states = {}
    for group, entry in zip(groups, saved, strict=True):
        for p, index in zip(group["params"], entry["params"], strict=True):
            if index in state_dict["state"]:
                values = state_dict["state"][index]
                states[p] = {key: own_entry(value, p) for key, value in values.items()}
    merged = [
        {**old, **copy.deepcopy({k: v for k, v in new.items() if k != "params"})}
        for old, new in zip(groups, saved, strict=True)
    ]
    return merged, states
