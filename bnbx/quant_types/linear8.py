"""linear8: 8 bits, evenly spaced.

The plain choice, here mostly as a comparison: evenly spaced codes round small second moments to
zero, which is why 8-bit optimizers use dynamic8 (arXiv:2110.02861, table 3: 90 % of runs with
linear states were unstable). The table is the one that bitsandbytes' create_linear_map gives; the
signed one has 255 even steps and an added zero.
"""

from __future__ import annotations

from bnbx.quant_types.grids import linear_map
from bnbx.registry import QuantType

linear8 = QuantType(
    name="linear8",
    summary="256 evenly spaced values",
    source="arXiv:2110.02861, section 2",
    bits=8,
    values=linear_map(True, 8),
    unsigned_values=linear_map(False, 8),
    block_size=256,
)
