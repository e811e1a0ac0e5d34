"""bitsandbytes' abstract base: `Optimizer8bit(params, defaults)`, whose subclass does the update.

Such an optimizer has no rule of ours. It keeps whatever entries its `init_state` makes, and they
are saved and loaded as they are: no dtype is changed, since one of them may be codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from bnbx.errors import CheckpointError
from bnbx.optimizers.matching import merged_groups, saved_numbers
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
    states = {}
    for group, numbers in zip(groups, saved_numbers(groups, saved), strict=True):
        for p, number in zip(group["params"], numbers, strict=True):
            if number is not None and number in state_dict["state"]:
                states[p] = own_entry(state_dict["state"][number], p)
    return merged_groups(groups, saved), states
