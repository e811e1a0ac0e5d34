"""dynamic3: the dynamic type in 3 bits, two decades (0.01 to 1).

As many decades as the bits allow, as in dynamic8, which explains the type. Source:
arXiv:1511.04561; the table is the one that bitsandbytes' create_dynamic_map gives.
"""

from __future__ import annotations

from bnbx.quant_types.grids import dynamic_map
from bnbx.registry import QuantType

dynamic3 = QuantType(
    name="dynamic3",
    summary="dynamic exponent and linear fraction in 3 bits",
    source="arXiv:1511.04561",
    bits=3,
    values=dynamic_map(True, 2, 3),
    unsigned_values=dynamic_map(False, 2, 3),
    block_size=64,
)
