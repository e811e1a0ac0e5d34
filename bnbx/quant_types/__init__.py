"""The built-in quant types: numbers only, one file a type, registered as any plugin's are."""

from __future__ import annotations

from collections.abc import Callable

from bnbx.registry import QuantType, hookimpl
from bnbx.registry.built_in import specs_in


@hookimpl
def register_quant_types(register: Callable[[QuantType], None]) -> None:
    """Register each type of this package."""
    for quant_type in specs_in(__name__, QuantType):
        register(quant_type)
