"""int8_block: whole numbers from -127 to 127 and a scale per block.

int8 with scales along blocks of 128: for tensors that are only stored so, where a large element
should spoil its neighborhood, not its row. Source: Yao et al., "ZeroQuant" (arXiv:2206.01861),
section 4.1, group-wise symmetric quantization of weights.
"""

from __future__ import annotations

from bnbx.quant_types.int8 import VALUES
from bnbx.registry import QuantType

int8_block = QuantType(
    name="int8_block",
    summary="whole numbers up to 127, a scale per block",
    source="arXiv:2206.01861, section 4.1",
    bits=8,
    values=VALUES,
    unit=127.0,
    decode_only=(128,),
    ties="even",
    block_size=128,
)
