"""The built-in update rules: specs only, one file a rule, registered as any plugin's are."""

from __future__ import annotations

from collections.abc import Callable

from bnbx.optimizers.rules.adam import adam
from bnbx.optimizers.rules.adamw import adamw
from bnbx.optimizers.rules.lion import lion
from bnbx.optimizers.rules.sgd import sgd
from bnbx.registry import Optimizer, hookimpl

__all__ = ["adam", "adamw", "lion", "register_optimizers", "sgd"]


@hookimpl
def register_optimizers(register: Callable[[Optimizer], None]) -> None:
    """Register each rule of this package."""
    for rule in (adam, adamw, lion, sgd):
        register(rule)
