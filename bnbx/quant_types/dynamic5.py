"""dynamic5: the dynamic type in 5 bits, four decades (10**-4 to 1).

As many decades as the bits allow, as in dynamic8, which explains the type. Source:
arXiv:1511.04561; the table is the one that bitsandbytes' create_dynamic_map gives.
"""

from __future__ import annotations

from bnbx.quant_types.grids import dynamic_map
from bnbx.registry import QuantType

dynamic5 = QuantType(
    name="dynamic5",
    summary="dynamic exponent and linear fraction in 5 bits",
    source="arXiv:1511.04561",
    bits=5,
    values=dynamic_map(True, 4, 5),
    unsigned_values=dynamic_map(False, 4, 5),
    block_size=64,
)
