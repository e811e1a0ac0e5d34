"""Which parameter of a state dict is which of an optimizer's, and what its groups become.

By name where both sides have names, whatever the groups they lie in: parameters of equal shapes
would otherwise get each other's states unseen. Else by place, as in torch.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

from bnbx.errors import BnbxWarning, CheckpointError
from bnbx.optimizers.foreign import user_level
from bnbx.optimizers.overrides import NAMES, names_of

Group = Mapping[str, Any]
MOST_NAMES = 5  # of parameters, in a message


def merged_groups(
    current: Sequence[Group], saved: Sequence[Group], kept: Collection[str] = ()
) -> list[dict[str, Any]]:
    """The saved groups' values with the current groups' parameters, and their `kept` values."""
    kept = {"params", NAMES, *kept}
    return [
        {**old, **copy.deepcopy({k: v for k, v in new.items() if k not in kept})}
        for old, new in zip(current, saved, strict=True)
    ]


def saved_numbers(current: Sequence[Group], saved: Sequence[Group]) -> list[list[Any]]:
    """By group, the number in the state dict of each parameter; None for one it does not have.

    Warns of parameters, of either side, that have no peer among those with names.

    Raises:
        CheckpointError: the groups do not fit.
    """
    numbers = [list(group["params"]) for group in saved]
    if len(current) == len(saved):
        found = _by_name(current, saved, numbers)
        if found is not None:
            return found
    sizes = [[len(group["params"]) for group in groups] for groups in (current, saved)]
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            f"the state dict has groups of {sizes[1]} parameters, the optimizer has {sizes[0]}"
        )
    return numbers


def _by_name(
    current: Sequence[Group], saved: Sequence[Group], numbers: list[list[Any]]
) -> list[list[Any]] | None:
    """The numbers by name; None where they cannot be told so, or no name is the same."""
    named = [
        [names_of(group) if group["params"] else [] for group in groups]
        for groups in (current, saved)
    ]
    if any(names is None for side in named for names in side):
        return None
    sides = [[names or [] for names in side] for side in named]
    keys = [_keys(side, within_group=False) for side in sides]
    if not all(map(_unique, keys)):  # such as of two models
        keys = [_keys(side, within_group=True) for side in sides]
    if not all(map(_unique, keys)):
        return None
    ours, theirs = (dict.fromkeys(key for group in side for key in group) for side in keys)
    if ours.keys().isdisjoint(theirs):  # all were renamed, by a wrapper of the model perhaps
        return None
    _warn_of_others(ours, theirs)
    flat = [key for group in keys[1] for key in group]
    known = dict(zip(flat, (n for group in numbers for n in group), strict=True))
    return [[known.get(key) for key in group] for group in keys[0]]


def _keys(side: list[list[str]], within_group: bool) -> list[list[Hashable]]:
    """What tells parameters apart: their name, or the group and the name in it."""
    return [
        [(number, name) if within_group else name for name in names]
        for number, names in enumerate(side)
    ]


def _unique(side: list[list[Hashable]]) -> bool:
    keys = [key for group in side for key in group]
    return len(set(keys)) == len(keys)


def _warn_of_others(ours: Mapping[Hashable, Any], theirs: Mapping[Hashable, Any]) -> None:
    new = [key for key in ours if key not in theirs]
    gone = [key for key in theirs if key not in ours]
    words = []
    if new:
        words.append(f"the state dict does not have {_words(new)}, which begin without states")
    if gone:
        words.append(f"the optimizer does not have {_words(gone)}, whose states are left out")
    if words:
        warnings.warn(
            f"states go by the parameters' names, and some are on one side only: "
            f"{'; '.join(words)}. Rename them in the state dict's {NAMES!r}, or remove those to go "
            "by place",
            BnbxWarning,
            stacklevel=user_level(),
        )


def _words(keys: Sequence[Hashable]) -> str:
    names = [repr(key[1] if isinstance(key, tuple) else key) for key in keys[:MOST_NAMES]]
    more = f" and {len(keys) - MOST_NAMES} more" if len(keys) > MOST_NAMES else ""
    return ", ".join(names) + more
