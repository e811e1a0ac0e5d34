"""nf8: 8 bits, quantiles of the normal distribution, with an exact zero.

The rule of nf4 (QLoRA, arXiv:2305.14314, section 3) in 8 bits: 128 positive quantiles of the
normal distribution, 127 negative ones and zero. The paper gives 4 bits alone; the outermost
probability follows its formula (`normal_map`).
"""

from __future__ import annotations

from bnbx.quant_types.grids import normal_map
from bnbx.registry import QuantType

nf8 = QuantType(
    name="nf8",
    summary="quantiles of the normal distribution in 8 bits",
    source="arXiv:2305.14314, its rule for 8 bits",
    bits=8,
    values=normal_map(8),
    block_size=64,
)
