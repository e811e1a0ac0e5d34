"""mxfp8: floats of 8 bits (E4M3, up to 448), a power of two as the scale of 32.

As mxfp4, with the elements of fp8_e4m3. Source: OCP Microscaling Formats (MX) Specification 1.0,
sections 5.3.1 and 6.3.
"""

from __future__ import annotations

from bnbx.quant_types.grids import minifloat
from bnbx.registry import QuantType, Scale

mxfp8 = QuantType(
    name="mxfp8",
    summary="E4M3, a power of two as the scale of 32",
    source="OCP MX 1.0, sections 5.3.1 and 6.3",
    bits=8,
    values=minifloat(4, 3, nan=1),
    unit=448.0,
    decode_only=(0x80,),
    ties="even",
    block_size=32,
    scale=Scale(dtype="e8m0"),
)
