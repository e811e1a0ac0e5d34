"""nf5: 5 bits, quantiles of the normal distribution, with an exact zero.

The rule of nf4 (QLoRA, arXiv:2305.14314, section 3) in 5 bits: 16 positive quantiles of the
normal distribution, 15 negative ones and zero. The paper gives 4 bits alone; the outermost
probability follows its formula (`normal_map`).
"""

from __future__ import annotations

from bnbx.quant_types.grids import normal_map
from bnbx.registry import QuantType

nf5 = QuantType(
    name="nf5",
    summary="quantiles of the normal distribution in 5 bits",
    source="arXiv:2305.14314, its rule for 5 bits",
    bits=5,
    values=normal_map(5),
    block_size=64,
)
