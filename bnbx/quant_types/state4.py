"""state4: what 4-bit optimizer states are kept in: NF4, and a dynamic table without zero.

First moments are close to normally distributed, for which NF4 has the smallest error; second
moments span decades, and one that rounds to zero divides an update by eps: so their table leaves
zero out. Blocks of 128, 1.0625 bytes for both states of an element. Sources: Li et al., "Memory
Efficient Optimizers with 4-bit States" (arXiv:2309.01507), section 3, for the zero point;
"4-bit AdamW redesign" (Nubank and UC Berkeley, 2026, github.com/nubank/adamw4bit), which finds NF4
for m the largest single gain.
"""

from __future__ import annotations

from bnbx.quant_types.grids import dynamic_map
from bnbx.quant_types.nf4 import nf4
from bnbx.registry import QuantType
from bnbx.registry.grid import float32

DECADES = 3


def without_zero() -> tuple[float, ...]:
    """The unsigned dynamic table of 4 bits, its zero replaced by half of the smallest value."""
    zero, *values = dynamic_map(False, DECADES, 4)
    assert zero == 0
    return (float32(values[0] / 2), *values)


state4 = QuantType(
    name="state4",
    summary="NF4 for signed states, a dynamic table without zero for others",
    source="arXiv:2309.01507, arXiv:2305.14314, github.com/nubank/adamw4bit",
    bits=4,
    values=nf4.values,
    unsigned_values=without_zero(),
    block_size=128,
    state_default=True,
)
