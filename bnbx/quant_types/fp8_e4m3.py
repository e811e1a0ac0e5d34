"""fp8_e4m3: an 8-bit float of 4 bits of exponent and 3 of fraction, up to 448; no infinity.

Codes are the bits of torch.float8_e4m3fn; ties go to even ones, as its conversion does. -0 is read
but not written: what rounds to zero is +0. Source: Micikevicius et al., "FP8 Formats for Deep
Learning" (arXiv:2209.05433), table 1; blocks of 128 as in DeepSeek-V3 (arXiv:2412.19437), section
3.3.2.
"""

from __future__ import annotations

from bnbx.quant_types.grids import minifloat
from bnbx.registry import QuantType

fp8_e4m3 = QuantType(
    name="fp8_e4m3",
    summary="float of 8 bits: sign, 4 of exponent, 3 of fraction",
    source="arXiv:2209.05433",
    bits=8,
    values=minifloat(4, 3, nan=1),
    unit=448.0,
    decode_only=(0x80,),
    ties="even",
    block_size=128,
)
