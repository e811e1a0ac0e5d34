"""af4: AbnormalFloat, 4 bits of least expected absolute error on normal data in blocks of 64.

NF4 makes its codes equally likely, which is not what makes errors small, and does not know that
the largest of a block is always 1. Yoshida derives levels from the distribution of x / absmax
itself, which depends on the block size; these are for 64. Source: "NF4 Isn't Information
Theoretically Optimal (and that's Good)", arXiv:2306.06965; codes in the order of bitsandbytes'
get_4bit_type("af4"), the largest number first.
"""

from __future__ import annotations

from bnbx.registry import QuantType
from bnbx.registry.grid import float32

# The paper's table.
VALUES = (
    -1.0,
    -0.69441008,
    -0.51243739,
    -0.3736951,
    -0.25607552,
    -0.14982478,
    -0.04934812,
    0.0,
    0.04273164,
    0.12934483,
    0.21961274,
    0.31675666,
    0.42563882,
    0.55496234,
    0.72424863,
    1.0,
)

af4 = QuantType(
    name="af4",
    summary="4 bits of least absolute error on normal data in blocks of 64",
    source="arXiv:2306.06965",
    bits=4,
    values=tuple(map(float32, reversed(VALUES))),
    block_size=64,
)
