"""fp4: a 4-bit float, sign, two bits of exponent and one of fraction, as bitsandbytes orders it.

Not E2M1: the exponent counts down, and the one subnormal number is 1/192 of the largest. Code 8
reads as zero, too; it is what bitsandbytes writes for positive numbers that are nearest to zero.
Source: bitsandbytes' get_4bit_type("fp4"); arXiv:2305.14314, where NF4 is compared with it.
"""

from __future__ import annotations

from bnbx.registry import QuantType
from bnbx.registry.grid import float32

# By code, in the unit in which the largest is 12.
POSITIVE = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
_half = [float32(value / 12) for value in POSITIVE]

fp4 = QuantType(
    name="fp4",
    summary="float of 4 bits: sign, 2 of exponent, 1 of fraction",
    source="bitsandbytes, arXiv:2305.14314",
    bits=4,
    values=(*_half, 0.0, *(-value for value in _half[1:])),
    block_size=64,
)
