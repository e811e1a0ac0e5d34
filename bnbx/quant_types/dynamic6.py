"""dynamic6: the dynamic type in 6 bits, five decades (10**-5 to 1).

As many decades as the bits allow, as in dynamic8, which explains the type. Source:
arXiv:1511.04561; the table is the one that bitsandbytes' create_dynamic_map gives.
"""

from __future__ import annotations

from bnbx.quant_types.grids import dynamic_map
from bnbx.registry import QuantType

dynamic6 = QuantType(
    name="dynamic6",
    summary="dynamic exponent and linear fraction in 6 bits",
    source="arXiv:1511.04561",
    bits=6,
    values=dynamic_map(True, 5, 6),
    unsigned_values=dynamic_map(False, 5, 6),
    block_size=64,
)
