"""linear3: 3 bits, evenly spaced.

The plain choice of 3 bits, here to compare with. The signed table has 7 numbers and a code
without one, the unsigned one 8 numbers. Source: arXiv:2110.02861, section 2; the numbers are
those of bitsandbytes' create_linear_map, at the same codes.
"""

from __future__ import annotations

from bnbx.quant_types.grids import linear_map
from bnbx.registry import QuantType

linear3 = QuantType(
    name="linear3",
    summary="7 evenly spaced values, 8 if unsigned",
    source="arXiv:2110.02861, section 2",
    bits=3,
    values=linear_map(True, 3, second_zero=False),
    unsigned_values=linear_map(False, 3),
    block_size=64,
)
