"""The two hooks through which specs enter, for built-ins and strangers alike."""

from __future__ import annotations

from collections.abc import Callable

import pluggy

from bnbx.registry.optimizer import Optimizer
from bnbx.registry.quant_type import QuantType

hookspec = pluggy.HookspecMarker("bnbx")
hookimpl = pluggy.HookimplMarker("bnbx")


@hookspec
def register_optimizers(register: Callable[[Optimizer], None]) -> None:
    """Call `register(spec)` for each optimizer that the plugin brings."""


@hookspec
def register_quant_types(register: Callable[[QuantType], None]) -> None:
    """Call `register(spec)` for each quant type that the plugin brings."""
