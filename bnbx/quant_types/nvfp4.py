"""nvfp4: floats of 4 bits (E2M1, up to 6), an E4M3 scale per 16, a float32 scale per tensor.

The tensor's scale is its absmax over 6 * 448, so that the largest scale of a block is 448. Finer
than mxfp4: shorter blocks, and scales with a fraction. Ties go to even codes; -0 is never written.
Source: NVIDIA, "Pretraining Large Language Models with NVFP4" (arXiv:2509.25149), on quantization;
torchao's NVFP4Tensor has the same scales and codes, but for scales below 2**-6, which it raises to
that, and is packed the other way round.
"""

from __future__ import annotations

from bnbx.quant_types.grids import minifloat
from bnbx.registry import QuantType, Scale

nvfp4 = QuantType(
    name="nvfp4",
    summary="E2M1, an E4M3 scale per 16, and one per tensor",
    source="arXiv:2509.25149",
    bits=4,
    values=minifloat(2, 1),
    unit=6.0,
    decode_only=(0x8,),
    ties="even",
    block_size=16,
    scale=Scale(dtype="e4m3", tensor_scale=True),
)
