"""linear4: 4 bits, evenly spaced.

The plain choice of 4 bits, here to compare with. The signed table has 15 even steps and a second
zero, the unsigned one 16 steps. Source: arXiv:2110.02861, section 2; the tables are those that
bitsandbytes' create_linear_map gives.
"""

from __future__ import annotations

from bnbx.quant_types.grids import linear_map
from bnbx.registry import QuantType

linear4 = QuantType(
    name="linear4",
    summary="15 evenly spaced values, 16 if unsigned",
    source="arXiv:2110.02861, section 2",
    bits=4,
    values=linear_map(True, 4),
    unsigned_values=linear_map(False, 4),
    block_size=64,
)
