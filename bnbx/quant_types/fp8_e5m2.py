"""fp8_e5m2: an 8-bit float of 5 bits of exponent and 2 of fraction, up to 57344.

More range and fewer steps than fp8_e4m3; made for gradients. Codes are the bits of
torch.float8_e5m2; ties go to even ones. Infinity, NaN and -0 are never written. Source:
Micikevicius et al., "FP8 Formats for Deep Learning" (arXiv:2209.05433), table 1.
"""

from __future__ import annotations

from bnbx.quant_types.grids import minifloat
from bnbx.registry import QuantType

fp8_e5m2 = QuantType(
    name="fp8_e5m2",
    summary="float of 8 bits: sign, 5 of exponent, 2 of fraction",
    source="arXiv:2209.05433",
    bits=8,
    values=minifloat(5, 2, infinity=True),
    unit=57344.0,
    decode_only=(0x80,),
    ties="even",
    block_size=128,
)
