"""The built-in update rules: specs only, one file a rule, registered as any plugin's are."""

from __future__ import annotations

from collections.abc import Callable

from bnbx.optimizers.rules.adagrad import adagrad
from bnbx.optimizers.rules.adam import adam
from bnbx.optimizers.rules.adamw import adamw
from bnbx.optimizers.rules.ademamix import ademamix
from bnbx.optimizers.rules.adopt import adopt
from bnbx.optimizers.rules.cautious_adamw import cautious_adamw
from bnbx.optimizers.rules.cautious_lion import cautious_lion
from bnbx.optimizers.rules.lamb import lamb
from bnbx.optimizers.rules.lars import lars
from bnbx.optimizers.rules.lion import lion
from bnbx.optimizers.rules.rmsprop import rmsprop
from bnbx.optimizers.rules.schedule_free_adamw import schedule_free_adamw
from bnbx.optimizers.rules.sgd import sgd
from bnbx.registry import Optimizer, hookimpl

RULES = (
    adam,
    adamw,
    ademamix,
    lion,
    lamb,
    lars,
    sgd,
    rmsprop,
    adagrad,
    adopt,
    schedule_free_adamw,
    cautious_adamw,
    cautious_lion,
)

__all__ = [
    "RULES",
    "adagrad",
    "adam",
    "adamw",
    "ademamix",
    "adopt",
    "cautious_adamw",
    "cautious_lion",
    "lamb",
    "lars",
    "lion",
    "register_optimizers",
    "rmsprop",
    "schedule_free_adamw",
    "sgd",
]


@hookimpl
def register_optimizers(register: Callable[[Optimizer], None]) -> None:
    """Register each rule of this package."""
    for rule in RULES:
        register(rule)
