"""linear5: 5 bits, evenly spaced.

The plain choice of 5 bits, here to compare with. The signed table has 31 numbers and a code
without one, the unsigned one 32 numbers. Source: arXiv:2110.02861, section 2; the numbers are
those of bitsandbytes' create_linear_map, at the same codes.
"""

from __future__ import annotations

from bnbx.quant_types.grids import linear_map
from bnbx.registry import QuantType

linear5 = QuantType(
    name="linear5",
    summary="31 evenly spaced values, 32 if unsigned",
    source="arXiv:2110.02861, section 2",
    bits=5,
    values=linear_map(True, 5, second_zero=False),
    unsigned_values=linear_map(False, 5),
    block_size=64,
)
