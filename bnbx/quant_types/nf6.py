"""nf6: 6 bits, quantiles of the normal distribution, with an exact zero.

The rule of nf4 (QLoRA, arXiv:2305.14314, section 3) in 6 bits: 32 positive quantiles of the
normal distribution, 31 negative ones and zero. The paper gives 4 bits alone; the outermost
probability follows its formula (`normal_map`).
"""

from __future__ import annotations

from bnbx.quant_types.grids import normal_map
from bnbx.registry import QuantType

nf6 = QuantType(
    name="nf6",
    summary="quantiles of the normal distribution in 6 bits",
    source="arXiv:2305.14314, its rule for 6 bits",
    bits=6,
    values=normal_map(6),
    block_size=64,
)
