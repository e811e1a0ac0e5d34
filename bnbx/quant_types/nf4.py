"""nf4: 4 bits, quantiles of the normal distribution, with an exact zero.

Source: Dettmers et al., "QLoRA" (arXiv:2305.14314), section 3 and appendix E: eight quantiles of
the negative half and nine of the positive one, normalized to [-1, 1], zero in common.
"""

from __future__ import annotations

from bnbx.registry import QuantType
from bnbx.registry.grid import float32

# The paper's table, to float32.
VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

nf4 = QuantType(
    name="nf4",
    summary="quantiles of the normal distribution in 4 bits",
    source="arXiv:2305.14314",
    bits=4,
    values=tuple(map(float32, VALUES)),
    block_size=64,
)
