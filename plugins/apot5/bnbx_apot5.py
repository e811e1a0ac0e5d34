"""apot5 for bnbx: sums of two powers of two, in 5 bits (arXiv:1909.13144, equation 5, k = n = 2).

Each of two bits of a magnitude chooses 0 or a power of two; powers of one sum come from 1, 1/4 and
1/16, those of the other from 1/2, 1/8 and 1/32. So numbers are dense near zero, as in a float, and
not as sparse near the largest. Code 16, a negative zero, reads as zero and is not written.
"""

from __future__ import annotations

from collections.abc import Callable

from bnbx.registry import QuantType, hookimpl

FIRST = (0.0, 1.0, 1 / 4, 1 / 16)
SECOND = (0.0, 1 / 2, 1 / 8, 1 / 32)
LARGEST = 1 + 1 / 2
_magnitudes = tuple((first + second) / LARGEST for first in FIRST for second in SECOND)

apot5 = QuantType(
    name="apot5",
    summary="sums of two powers of two, in 5 bits",
    source="arXiv:1909.13144, equation 5",
    bits=5,
    values=(*_magnitudes, 0.0, *(-value for value in _magnitudes[1:])),
    decode_only=(16,),
    block_size=64,
)


@hookimpl
def register_quant_types(register: Callable[[QuantType], None]) -> None:
    """Register the type."""
    register(apot5)
