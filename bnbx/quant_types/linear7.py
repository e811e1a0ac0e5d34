"""linear7: 7 bits, evenly spaced.

The plain choice of 7 bits, here to compare with. The signed table has 127 numbers and a code
without one, the unsigned one 128 numbers. Source: arXiv:2110.02861, section 2; the numbers are
those of bitsandbytes' create_linear_map, at the same codes.
"""

from __future__ import annotations

from bnbx.quant_types.grids import linear_map
from bnbx.registry import QuantType

linear7 = QuantType(
    name="linear7",
    summary="127 evenly spaced values, 128 if unsigned",
    source="arXiv:2110.02861, section 2",
    bits=7,
    values=linear_map(True, 7, second_zero=False),
    unsigned_values=linear_map(False, 7),
    block_size=64,
)
