"""dynamic2: the dynamic type in 2 bits, one decade (0.1 to 1).

As many decades as the bits allow, as in dynamic8, which explains the type. Degenerate: with two
bits there is one decade, whose signed table is -0.55, 0, 0.55 and 1. It is kept because it is
what the rule gives; nf2 and linear2 hold symmetric data better. Source: arXiv:1511.04561; the
table is the one that bitsandbytes' create_dynamic_map gives.
"""

from __future__ import annotations

from bnbx.quant_types.grids import dynamic_map
from bnbx.registry import QuantType

dynamic2 = QuantType(
    name="dynamic2",
    summary="dynamic exponent and linear fraction in 2 bits",
    source="arXiv:1511.04561",
    bits=2,
    values=dynamic_map(True, 1, 2),
    unsigned_values=dynamic_map(False, 1, 2),
    block_size=64,
)
