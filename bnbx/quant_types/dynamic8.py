"""dynamic8: 8 bits that split themselves between exponent and fraction.

A code's leading zeros choose a decade (10**-6 to 1), the remaining bits a linear fraction inside
it: the larger the magnitude, the finer the steps, over seven decades. The usual type of 8-bit
optimizer states. Source: Dettmers, "8-Bit Approximations for Parallelism in Deep Learning"
(arXiv:1511.04561) and "8-bit Optimizers via Block-wise Quantization" (arXiv:2110.02861), section
2; the table is the one that bitsandbytes' create_dynamic_map gives.
"""

from __future__ import annotations

from bnbx.quant_types.grids import linspace, midpoints
from bnbx.registry import QuantType
from bnbx.registry.quant_type import float32

DECADES = 7


def table(*, signed: bool) -> tuple[float, ...]:
    """The 256 values in ascending order."""
    values = [0.0, 1.0]
    for decade in range(DECADES):
        steps = 2**decade if signed else 2 ** (decade + 1)
        scale = float32(10 ** (decade - DECADES + 1))
        fractions = [float32(scale * m) for m in midpoints(linspace(0.1, 1.0, steps + 1))]
        values += fractions
        values += [-value for value in fractions] if signed else []
    return tuple(sorted(values))


dynamic8 = QuantType(
    name="dynamic8",
    summary="dynamic exponent and linear fraction in 8 bits",
    source="arXiv:1511.04561, arXiv:2110.02861",
    bits=8,
    values=table(signed=True),
    unsigned_values=table(signed=False),
    block_size=256,
    state_default=True,
    scale_default=True,
)
