"""The built-in update rules: specs only, one file a rule, registered as any plugin's are."""

from __future__ import annotations

from collections.abc import Callable

from bnbx.registry import Optimizer, hookimpl
from bnbx.registry.built_in import specs_in


@hookimpl
def register_optimizers(register: Callable[[Optimizer], None]) -> None:
    """Register each rule of this package."""
    for rule in specs_in(__name__, Optimizer):
        register(rule)
