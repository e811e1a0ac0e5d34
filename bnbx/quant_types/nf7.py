"""nf7: 7 bits, quantiles of the normal distribution, with an exact zero.

The rule of nf4 (QLoRA, arXiv:2305.14314, section 3) in 7 bits: 64 positive quantiles of the
normal distribution, 63 negative ones and zero. The paper gives 4 bits alone; the outermost
probability follows its formula (`normal_map`).
"""

from __future__ import annotations

from bnbx.quant_types.grids import normal_map
from bnbx.registry import QuantType

nf7 = QuantType(
    name="nf7",
    summary="quantiles of the normal distribution in 7 bits",
    source="arXiv:2305.14314, its rule for 7 bits",
    bits=7,
    values=normal_map(7),
    block_size=64,
)
