"""dynamic8: 8 bits that split themselves between exponent and fraction.

A code's leading zeros choose a decade (10**-6 to 1), the remaining bits a linear fraction inside
it: the larger the magnitude, the finer the steps, over seven decades. The usual type of 8-bit
optimizer states. Source: Dettmers, "8-Bit Approximations for Parallelism in Deep Learning"
(arXiv:1511.04561) and "8-bit Optimizers via Block-wise Quantization" (arXiv:2110.02861), section
2; the table is the one that bitsandbytes' create_dynamic_map gives.
"""

from __future__ import annotations

from bnbx.quant_types.grids import dynamic_map
from bnbx.registry import QuantType

dynamic8 = QuantType(
    name="dynamic8",
    summary="dynamic exponent and linear fraction in 8 bits",
    source="arXiv:1511.04561, arXiv:2110.02861",
    bits=8,
    values=dynamic_map(True, 7, 8),
    unsigned_values=dynamic_map(False, 7, 8),
    block_size=256,
    state_default=True,
    scale_default=True,
)
