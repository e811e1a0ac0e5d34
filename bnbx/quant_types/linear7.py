"""linear7: 7 bits, evenly spaced.

The plain choice of 7 bits, here to compare with. The signed table has 127 even steps and a second
zero, the unsigned one 128 steps. Source: arXiv:2110.02861, section 2; the tables are those that
bitsandbytes' create_linear_map gives.
"""

from __future__ import annotations

from bnbx.quant_types.grids import linear_map
from bnbx.registry import QuantType

linear7 = QuantType(
    name="linear7",
    summary="127 evenly spaced values, 128 if unsigned",
    source="arXiv:2110.02861, section 2",
    bits=7,
    values=linear_map(True, 7),
    unsigned_values=linear_map(False, 7),
    block_size=64,
)
