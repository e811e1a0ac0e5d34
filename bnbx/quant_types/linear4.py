"""linear4: 4 bits, evenly spaced.

The plain choice of 4 bits, here to compare with. The signed table has 15 numbers and a code
without one, the unsigned one 16 numbers. Source: arXiv:2110.02861, section 2; the numbers are
those of bitsandbytes' create_linear_map, at the same codes.
"""

from __future__ import annotations

from bnbx.quant_types.grids import linear_map
from bnbx.registry import QuantType

linear4 = QuantType(
    name="linear4",
    summary="15 evenly spaced values, 16 if unsigned",
    source="arXiv:2110.02861, section 2",
    bits=4,
    values=linear_map(True, 4, second_zero=False),
    unsigned_values=linear_map(False, 4),
    block_size=64,
)
