"""What exists: specs of optimizers and quant types, and the catalogs that hold them. No torch."""

from __future__ import annotations

from bnbx.registry.catalog import Catalog
from bnbx.registry.formats import GroupFormat
from bnbx.registry.hookspecs import hookimpl
from bnbx.registry.hyper import Hyper, flag, fraction, number, positive, rate, steps
from bnbx.registry.optimizer import Constraint, Optimizer, State
from bnbx.registry.plugins import plugins
from bnbx.registry.quant_type import QuantType, Scale

__all__ = [
    "Catalog",
    "Constraint",
    "GroupFormat",
    "Hyper",
    "Optimizer",
    "QuantType",
    "Scale",
    "State",
    "flag",
    "fraction",
    "hookimpl",
    "number",
    "optimizers",
    "plugins",
    "positive",
    "quant_types",
    "rate",
    "steps",
]


def optimizers() -> Catalog[Optimizer]:
    """The catalog of optimizers."""
    return plugins().optimizers


def quant_types() -> Catalog[QuantType]:
    """The catalog of quant types."""
    return plugins().quant_types
