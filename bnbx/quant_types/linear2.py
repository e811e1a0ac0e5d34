"""linear2: 2 bits, evenly spaced.

The plain choice of 2 bits, here to compare with. The signed table has 3 numbers and a code
without one, the unsigned one 4 numbers. Source: arXiv:2110.02861, section 2; the numbers are
those of bitsandbytes' create_linear_map, at the same codes.
"""

from __future__ import annotations

from bnbx.quant_types.grids import linear_map
from bnbx.registry import QuantType

linear2 = QuantType(
    name="linear2",
    summary="3 evenly spaced values, 4 if unsigned",
    source="arXiv:2110.02861, section 2",
    bits=2,
    values=linear_map(True, 2, second_zero=False),
    unsigned_values=linear_map(False, 2),
    block_size=64,
)
