"""int8_affine: whole numbers from -127 to 127, a scale and a mid-point per block.

For data that lie to one side of zero: the mid-point of a block's range is subtracted before, so
that both ends are used (asymmetric quantization). The mid-point is kept in float32, which takes
the place of a zero point; zero itself is exact only by chance. Source: Jacob et al.,
arXiv:1712.05877, section 2.1, where the zero point is a whole number.
"""

from __future__ import annotations

from bnbx.quant_types.int8 import VALUES
from bnbx.registry import QuantType, Scale

int8_affine = QuantType(
    name="int8_affine",
    summary="whole numbers up to 127, a scale and a mid-point per block",
    source="arXiv:1712.05877, section 2.1",
    bits=8,
    values=VALUES,
    unit=127.0,
    decode_only=(128,),
    ties="even",
    block_size=128,
    scale=Scale(centered=True),
)
