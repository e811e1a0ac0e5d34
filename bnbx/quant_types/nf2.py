"""nf2: 2 bits, quantiles of the normal distribution, with an exact zero.

The rule of nf4 (QLoRA, arXiv:2305.14314, section 3) in 2 bits: 2 positive quantiles of the normal
distribution, 1 negative one and zero. The paper gives 4 bits alone; the outermost probability
follows its formula (`normal_map`).
"""

from __future__ import annotations

from bnbx.quant_types.grids import normal_map
from bnbx.registry import QuantType

nf2 = QuantType(
    name="nf2",
    summary="quantiles of the normal distribution in 2 bits",
    source="arXiv:2305.14314, its rule for 2 bits",
    bits=2,
    values=normal_map(2),
    block_size=64,
)
