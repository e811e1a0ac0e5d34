"""The built-in quant types: numbers only, one file a type, registered as any plugin's are."""

from __future__ import annotations

from collections.abc import Callable

from bnbx.quant_types.af4 import af4
from bnbx.quant_types.dynamic2 import dynamic2
from bnbx.quant_types.dynamic3 import dynamic3
from bnbx.quant_types.dynamic4 import dynamic4
from bnbx.quant_types.dynamic5 import dynamic5
from bnbx.quant_types.dynamic6 import dynamic6
from bnbx.quant_types.dynamic7 import dynamic7
from bnbx.quant_types.dynamic8 import dynamic8
from bnbx.quant_types.dynamic8_grid import dynamic8_grid
from bnbx.quant_types.fp4 import fp4
from bnbx.quant_types.fp8_e4m3 import fp8_e4m3
from bnbx.quant_types.fp8_e5m2 import fp8_e5m2
from bnbx.quant_types.int8 import int8
from bnbx.quant_types.int8_affine import int8_affine
from bnbx.quant_types.int8_block import int8_block
from bnbx.quant_types.linear2 import linear2
from bnbx.quant_types.linear3 import linear3
from bnbx.quant_types.linear4 import linear4
from bnbx.quant_types.linear5 import linear5
from bnbx.quant_types.linear6 import linear6
from bnbx.quant_types.linear7 import linear7
from bnbx.quant_types.linear8 import linear8
from bnbx.quant_types.mxfp4 import mxfp4
from bnbx.quant_types.mxfp6 import mxfp6
from bnbx.quant_types.mxfp8 import mxfp8
from bnbx.quant_types.nf2 import nf2
from bnbx.quant_types.nf3 import nf3
from bnbx.quant_types.nf4 import nf4
from bnbx.quant_types.nf5 import nf5
from bnbx.quant_types.nf6 import nf6
from bnbx.quant_types.nf7 import nf7
from bnbx.quant_types.nf8 import nf8
from bnbx.quant_types.nvfp4 import nvfp4
from bnbx.quant_types.state4 import state4
from bnbx.registry import QuantType, hookimpl

__all__ = [
    "af4",
    "dynamic2",
    "dynamic3",
    "dynamic4",
    "dynamic5",
    "dynamic6",
    "dynamic7",
    "dynamic8",
    "dynamic8_grid",
    "fp4",
    "fp8_e4m3",
    "fp8_e5m2",
    "int8",
    "int8_affine",
    "int8_block",
    "linear2",
    "linear3",
    "linear4",
    "linear5",
    "linear6",
    "linear7",
    "linear8",
    "mxfp4",
    "mxfp6",
    "mxfp8",
    "nf2",
    "nf3",
    "nf4",
    "nf5",
    "nf6",
    "nf7",
    "nf8",
    "nvfp4",
    "register_quant_types",
    "state4",
]

TYPES = (
    af4,
    dynamic2,
    dynamic3,
    dynamic4,
    dynamic5,
    dynamic6,
    dynamic7,
    dynamic8,
    dynamic8_grid,
    fp4,
    fp8_e4m3,
    fp8_e5m2,
    int8,
    int8_affine,
    int8_block,
    linear2,
    linear3,
    linear4,
    linear5,
    linear6,
    linear7,
    linear8,
    mxfp4,
    mxfp6,
    mxfp8,
    nf2,
    nf3,
    nf4,
    nf5,
    nf6,
    nf7,
    nf8,
    nvfp4,
    state4,
)


@hookimpl
def register_quant_types(register: Callable[[QuantType], None]) -> None:
    """Register each type of this package."""
    for quant_type in TYPES:
        register(quant_type)
