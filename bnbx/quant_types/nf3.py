"""nf3: 3 bits, quantiles of the normal distribution, with an exact zero.

The rule of nf4 (QLoRA, arXiv:2305.14314, section 3) in 3 bits: 4 positive quantiles of the normal
distribution, 3 negative ones and zero. The paper gives 4 bits alone; the outermost probability
follows its formula (`normal_map`).
"""

from __future__ import annotations

from bnbx.quant_types.grids import normal_map
from bnbx.registry import QuantType

nf3 = QuantType(
    name="nf3",
    summary="quantiles of the normal distribution in 3 bits",
    source="arXiv:2305.14314, its rule for 3 bits",
    bits=3,
    values=normal_map(3),
    block_size=64,
)
