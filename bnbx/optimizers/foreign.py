"""State dicts of other libraries: translated to ours, and written in their format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bnbx.errors import CheckpointError, NotYetError

if TYPE_CHECKING:
    from bnbx.optimizers.engine import Optimizer8bit


def translated(optimizer: Optimizer8bit, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict in our format.

    Raises:
        CheckpointError: it is of no library that is known here.
    """
    raise CheckpointError(
        "this is no state dict of a bnbx optimizer (of torch.optim or bitsandbytes, "
        f"perhaps): it has the keys {sorted(map(str, state_dict))}; expected 'state', "
        "'param_groups' and 'bnbx'"
    )


def written(
    optimizer: Optimizer8bit, state_dict: dict[str, Any], save_as: str
) -> dict[str, Any]:
    """The state dict in the format of another library."""
    raise NotYetError(f"save_as={save_as!r}")
