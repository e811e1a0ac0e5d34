"""The built-in quant types: numbers only, one file a type, registered as any plugin's are."""

from __future__ import annotations

from collections.abc import Callable

from bnbx.quant_types.dynamic8 import dynamic8
from bnbx.quant_types.linear8 import linear8
from bnbx.quant_types.nf4 import nf4
from bnbx.quant_types.state4 import state4
from bnbx.registry import QuantType, hookimpl

__all__ = ["dynamic8", "linear8", "nf4", "register_quant_types", "state4"]


@hookimpl
def register_quant_types(register: Callable[[QuantType], None]) -> None:
    """Register each type of this package."""
    for quant_type in (dynamic8, linear8, nf4, state4):
        register(quant_type)
