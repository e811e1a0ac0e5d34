"""linear6: 6 bits, evenly spaced.

The plain choice of 6 bits, here to compare with. The signed table has 63 numbers and a code
without one, the unsigned one 64 numbers. Source: arXiv:2110.02861, section 2; the numbers are
those of bitsandbytes' create_linear_map, at the same codes.
"""

from __future__ import annotations

from bnbx.quant_types.grids import linear_map
from bnbx.registry import QuantType

linear6 = QuantType(
    name="linear6",
    summary="63 evenly spaced values, 64 if unsigned",
    source="arXiv:2110.02861, section 2",
    bits=6,
    values=linear_map(True, 6, second_zero=False),
    unsigned_values=linear_map(False, 6),
    block_size=64,
)
