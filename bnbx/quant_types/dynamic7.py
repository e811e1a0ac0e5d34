"""dynamic7: the dynamic type in 7 bits, six decades (10**-6 to 1).

As many decades as the bits allow, as in dynamic8, which explains the type. Source:
arXiv:1511.04561; the table is the one that bitsandbytes' create_dynamic_map gives.
"""

from __future__ import annotations

from bnbx.quant_types.grids import dynamic_map
from bnbx.registry import QuantType

dynamic7 = QuantType(
    name="dynamic7",
    summary="dynamic exponent and linear fraction in 7 bits",
    source="arXiv:1511.04561",
    bits=7,
    values=dynamic_map(True, 6, 7),
    unsigned_values=dynamic_map(False, 6, 7),
    block_size=64,
)
