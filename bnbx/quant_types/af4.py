"""af4: AbnormalFloat, 4 bits with levels from the distribution of x / absmax in blocks of 64.

NF4 takes quantiles of a normal distribution, which is not that of normal numbers over the absmax of
their block; these levels are derived from that one. On normal data in blocks of 64 their mean error
is 3 % above NF4's all the same (`bnbx describe af4`, `bnbx describe nf4`). Source: Yoshida, "NF4
Isn't Information Theoretically Optimal (and that's Good)", arXiv:2306.06965; numbers and order of
codes, the largest number first, of bitsandbytes' get_4bit_type("af4").
"""

from __future__ import annotations

from bnbx.registry import QuantType
from bnbx.registry.grid import float32

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
    summary="AbnormalFloat of 4 bits, for blocks of 64",
    source="arXiv:2306.06965",
    bits=4,
    values=tuple(map(float32, reversed(VALUES))),
    block_size=64,
)
