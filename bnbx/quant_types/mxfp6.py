"""mxfp6: floats of 6 bits (E2M3, up to 7.5), a power of two as the scale of 32.

As mxfp4, with two more bits of fraction. Codes lie without gaps, four in three bytes. Source: OCP
Microscaling Formats (MX) Specification 1.0, sections 5.3.2 and 6.3.
"""

from __future__ import annotations

from bnbx.quant_types.grids import minifloat
from bnbx.registry import QuantType, Scale

mxfp6 = QuantType(
    name="mxfp6",
    summary="E2M3, a power of two as the scale of 32",
    source="OCP MX 1.0, sections 5.3.2 and 6.3",
    bits=6,
    values=minifloat(2, 3),
    unit=7.5,
    decode_only=(0x20,),
    ties="even",
    block_size=32,
    scale=Scale(dtype="e8m0"),
)
