"""mxfp4: floats of 4 bits (E2M1, up to 6), a power of two as the scale of 32.

The scale is the largest power of two in the block over 4, the largest one in the table, so what
lies above 6 of those steps becomes 6. Ties go to even codes; -0 is never written. Source: OCP
Microscaling Formats (MX) Specification 1.0, sections 5.3.3 and 6.3; torchao's MXTensor in its
scaling mode FLOOR has the same scales and codes, packed the other way round.
"""

from __future__ import annotations

from bnbx.quant_types.grids import minifloat
from bnbx.registry import QuantType, Scale

mxfp4 = QuantType(
    name="mxfp4",
    summary="E2M1, a power of two as the scale of 32",
    source="OCP MX 1.0, sections 5.3.3 and 6.3",
    bits=4,
    values=minifloat(2, 1),
    unit=6.0,
    decode_only=(0x8,),
    ties="even",
    block_size=32,
    scale=Scale(dtype="e8m0"),
)
