"""int8: whole numbers from -127 to 127 and a scale per row, for products in integers.

The vector-wise quantization of LLM.int8(): a row's absmax becomes 127, ties go to even numbers.
Codes are two's complement, as integer units read them; -128 is never written. Source: Dettmers et
al., arXiv:2208.07339, section 3.1; the bytes are those of bitsandbytes' int8_vectorwise_quant.
"""

from __future__ import annotations

from bnbx.registry import QuantType, Scale

VALUES = (*map(float, range(128)), *map(float, range(-128, 0)))

int8 = QuantType(
    name="int8",
    summary="whole numbers up to 127, a scale per row",
    source="arXiv:2208.07339, section 3.1",
    bits=8,
    values=VALUES,
    unit=127.0,
    decode_only=(128,),
    ties="even",
    scale=Scale(per="row"),
)
