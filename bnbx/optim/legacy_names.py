"""What bitsandbytes calls each rule, and what its `betas` mean there.

Its optimizers and checkpoints know a rule by one string, and put whatever decay rates the rule has
into `betas`. Meant to become a field of the specs (`legacy`), which checkpoints of bitsandbytes
need too; until then this is the one table.
"""

from __future__ import annotations

from collections.abc import Mapping

from bnbx.errors import UnknownNameError
from bnbx.registry import Optimizer, optimizers
from bnbx.registry.names import nearest

# By bitsandbytes' name: the rule, and the hyperparameters that `betas` hold. Its "adam" is AdamW.
LEGACY: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "adam": ("adamw", ("beta1", "beta2")),
    "momentum": ("sgd", ("momentum", "dampening")),
    "lars": ("lars", ("momentum", "dampening")),
    "lamb": ("lamb", ("beta1", "beta2")),
    "lion": ("lion", ("beta1", "beta2")),
    "rmsprop": ("rmsprop", ("alpha", "momentum")),
    "adagrad": ("adagrad", ()),
    "ademamix": ("ademamix", ("beta1", "beta2", "beta3")),
}


def rule_of(name: object) -> Optimizer:
    """The rule that bitsandbytes calls `name`, else the registered rule of that name.

    Raises:
        UnknownNameError: there is neither.
    """
    if isinstance(name, str) and name in LEGACY:
        return optimizers().get(LEGACY[name][0])
    if isinstance(name, str) and name in optimizers():
        return optimizers().get(name)
    known = dict.fromkeys([*LEGACY, *optimizers().names()])
    raise UnknownNameError(
        f"optimizer_name={name!r}: no rule of this name{nearest(str(name), known)}; "
        f"bitsandbytes' names: {', '.join(LEGACY)}; rules: {', '.join(optimizers().names())}"
    )


def name_of(spec: Optimizer) -> str:
    """What bitsandbytes calls a rule; its own name if bitsandbytes does not have it."""
    return next((name for name, (rule, _) in LEGACY.items() if rule == spec.name), spec.name)


def betas_of(spec: Optimizer) -> tuple[str, ...]:
    """The hyperparameters that `betas` hold for a rule."""
    members = dict(LEGACY.values())
    return members.get(spec.name, spec.packs.get("betas", ()))
