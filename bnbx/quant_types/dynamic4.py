"""dynamic4: the dynamic type in 4 bits, three decades (10**-3 to 1).

As many decades as the bits allow, as in dynamic8, which explains the type. Source:
arXiv:1511.04561; the table is the one that bitsandbytes' create_dynamic_map gives.
"""

from __future__ import annotations

from bnbx.quant_types.grids import dynamic_map
from bnbx.registry import QuantType

dynamic4 = QuantType(
    name="dynamic4",
    summary="dynamic exponent and linear fraction in 4 bits",
    source="arXiv:1511.04561",
    bits=4,
    values=dynamic_map(True, 3, 4),
    unsigned_values=dynamic_map(False, 3, 4),
    block_size=64,
)
