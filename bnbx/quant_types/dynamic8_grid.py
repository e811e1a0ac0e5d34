"""dynamic8_grid: dynamic8 as bitsandbytes writes it on a CPU, byte for byte.

Its quantizer first rounds x / absmax to one of 65536 evenly spaced points of [-1, 1], and takes the
code nearest to that point. So zero becomes 1.5e-5 of absmax, the seven codes nearest to it are
never written, a block of zeros gets code 0, and of a block whose inverse absmax is beyond float32
(absmax below 2**-128) signs alone are kept. Reads as dynamic8. Choose dynamic8, which is nearer,
unless the bytes must be those. Source: bitsandbytes 0.50.2, found by running it.
"""

from __future__ import annotations

from bnbx.quant_types.dynamic8 import dynamic8
from bnbx.registry import QuantType

dynamic8_grid = QuantType(
    name="dynamic8_grid",
    summary="dynamic8 in the codes that bitsandbytes writes on a CPU",
    source="bitsandbytes 0.50.2",
    bits=8,
    values=dynamic8.values,
    unsigned_values=dynamic8.unsigned_values,
    grid=65536,
    block_size=256,
)
