"""Renders the kernels that quantize and dequantize, for C++ and CUDA.

Everything in a source comes from a `CodingPlan`: the traits of the codebook, how scales are kept,
the dtype of the numbers. A table that no registered type has comes with traits that say nothing
of it, so that all such tables of a width share one kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bnbx.kernels.c_code import comment
from bnbx.kernels.c_struct import PHASES, Field
from bnbx.kernels.dtypes import C_TYPES
from bnbx.kernels.encoding import Encoding
from bnbx.kernels.source import codebook_traits, fill
from bnbx.registry import quant_types

MIN_CHUNK = 256
CHUNK = 1024  # elements that a worker takes at a time; a whole number of blocks and of bytes
# What of a tensor kernels are given: the parts of an encoding by their names, then its tables.
PARTS = (
    Field("codes", "u8*"),
    Field("scale", "void*"),
    Field("center", "float*"),
    Field("tensor_scale", "float*"),
    Field("second_scale", "float*"),
    Field("mean", "float*"),
    Field("tables", "const Tables*", "of the codes"),
    Field("second_tables", "const Tables*", "of quantized scales"),
)
# What a CPU's kernel is given.
JOB = (
    Field("parts", "Parts"),
    Field("numbers", "Number*", "read by encode, written by decode"),
    Field("start", "i64", "first of the elements to decode, which goes to numbers[0]"),
    Field("count", "i64", "of the elements to encode or to decode"),
    Field("columns", "i64"),
    Field("rand", "const float*", "to round stochastically with, or null: then noise by seed"),
    Field("rand_count", "i64"),
    Field("ascending", "const float*", "the table's numbers in ascending order"),
    Field("written", "i64", "how many those are"),
    Field("seed", "u32"),
    Field("largest", "u32", "magnitude in the whole tensor, as float bits; found by measure"),
    Field("high", "i32", "end of its range, as an integer in the order of floats"),
    Field("low", "i32", "the other end, inverted"),
    *PHASES,
)


@dataclass(frozen=True)
class CodingPlan:
    """What a kernel is to do: an encoding, the dtype of the numbers, and how they are rounded."""

    encoding: Encoding
    dtype: str
    stochastic: bool = False

    @property
    def chunk(self) -> int:
        """Elements that a worker takes at a time."""
        return max(self.encoding.block_size, CHUNK)

    def describe(self) -> str:
        """One line."""
        rounding = ", rounded stochastically" if self.stochastic else ""
        return f"{self.encoding.describe()}, {self.dtype} numbers{rounding}"


def arguments(held: Mapping[str, Any]) -> list[Any]:
    """PARTS as the arguments of a CUDA kernel, of what there is by name."""
    return [held.get(part.name) for part in PARTS]


def code_traits(encoding: Encoding) -> dict[str, Any]:
    """What `scale_traits.j2` and `traits.j2` ask of an encoding."""
    scale = encoding.quant_type.scale
    found, bits = encoding.tables, encoding.bits
    block = encoding.block_size or MIN_CHUNK
    traits = codebook_traits("Codebook", found, bits, block)
    if not quant_types().holds(encoding.quant_type):
        traits |= _UNKNOWN
    return {
        "codebook": "Codebook",
        "traits": traits,
        "scale": "SECOND" if encoding.second else scale.dtype.upper(),
        "centered": str(scale.centered).lower(),
        "tensor_scale": str(scale.tensor_scale).lower(),
        "grid": str(encoding.quant_type.grid > 0).lower(),
        "second_block": encoding.second_block,
    }


# Traits with which thresholds are found by halving, whatever the table.
_UNKNOWN = {
    "shift": 0,
    "half": 0,
    "entries": 0,
    "zero_code": 0,
    "floor": "0u",
    "ceiling": "0u",
    "signed": "false",
    "ordered": "false",
    "segments": "false",
}


def render_coding(plan: CodingPlan, template: str) -> str:
    """Source text of `plan` from the template of a target ("coding.cpp.j2")."""
    encoding = plan.encoding
    spec = encoding.quant_type
    return fill(
        template,
        title=comment(f"quantize and dequantize: {plan.describe()}"),
        subtitle=comment(f"{spec.summary} ({spec.source or 'no source given'})."),
        code=code_traits(encoding),
        number=C_TYPES[plan.dtype],
        chunk=plan.chunk,
        per=encoding.per.upper(),
        stochastic=plan.stochastic,
        parts=PARTS,
        job=JOB,
    )
