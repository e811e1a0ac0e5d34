"""Renders the kernels of products with a quantized weight, for C++ and CUDA.

A source depends on how codes and scales lie in memory, not on which numbers the codes stand for:
all types of one width that keep their scales alike share one kernel, and hand it their table.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from bnbx.kernels.c_code import comment
from bnbx.kernels.c_struct import Field
from bnbx.kernels.coding_source import PARTS, code_traits
from bnbx.kernels.dtypes import C_TYPES
from bnbx.kernels.encoding import Encoding
from bnbx.kernels.source import fill

# What a CPU's kernel is given.
JOB = (
    Field("parts", "Parts"),
    Field("rows", "i64", "of the weight"),
    Field("columns", "i64"),
    Field("inputs", "i64", "rows of x"),
    Field("x", "const Number*", "inputs * columns"),
    Field("bias", "const Number*", "rows of them, or null"),
    Field("y", "Number*", "inputs * rows; or the columns that are decoded"),
    Field("first", "i64", "of these"),
    Field("last", "i64", "one past them"),
    Field("room", "float*", "for rows of x as they are multiplied: see bnbx_room_for"),
)
# Of CUDA's kernels: rows of x that there is one for, and rows of the weight that a warp takes.
INPUTS, ROWS = (1, 2, 4), 2
# Of a CPU's tiles: outputs of a panel are a multiple of SIDE, or of SIDE_ACROSS for gradients, and
# MOST_OUTPUTS at most.
SIDE, SIDE_ACROSS, MOST_OUTPUTS = 32, 128, 384


@dataclass(frozen=True)
class LinearPlan:
    """What a kernel is made for; see `Encoding` for all but the last.

    Attributes:
        bits: width of a code.
        per: what shares a scale.
        block: elements that do, where blocks of them do.
        scale: the `ScaleKind` of templates/scales.h.
        centered: whether blocks have a center.
        tensor_scale: whether there is a scale for all scales.
        second_block: scales that share a scale of their own, where they are quantized.
        dtype: of the numbers that the weight is multiplied with, and of the result.
    """

    bits: int
    per: str
    block: int
    scale: str
    centered: str
    tensor_scale: str
    second_block: int
    dtype: str

    def describe(self) -> str:
        """One line."""
        sharing = f"blocks of {self.block}" if self.per == "block" else f"a scale per {self.per}"
        scales = "quantized" if self.scale == "SECOND" else self.scale.lower()
        return f"{self.bits}-bit codes, {sharing}, {scales} scales, {self.dtype} numbers"


WHOLE = 256  # a plan's block where scales are not per block


@lru_cache(maxsize=1024)
def plan_for(encoding: Encoding, dtype: str) -> LinearPlan:
    """The plan for a weight in an encoding, multiplied with numbers of a dtype."""
    code = code_traits(encoding)
    return LinearPlan(
        encoding.bits,
        encoding.per,
        encoding.block_size or WHOLE,
        code["scale"],
        code["centered"],
        code["tensor_scale"],
        encoding.second_block if encoding.second else WHOLE,
        dtype,
    )


def render_linear(plan: LinearPlan, template: str) -> str:
    """Source text of `plan` from the template of a target ("linear.cpp.j2")."""
    code = {
        "codebook": "Codebook",
        "scale": plan.scale,
        "centered": plan.centered,
        "tensor_scale": plan.tensor_scale,
        "grid": "false",  # of quantizing, which no product does
        "second_block": plan.second_block,
    }
    return fill(
        template,
        title=comment(f"products with a quantized weight: {plan.describe()}"),
        plan=plan,
        code=code,
        number=C_TYPES[plan.dtype],
        per=plan.per.upper(),
        parts=PARTS,
        job=JOB,
        inputs=INPUTS,
        rows=ROWS,
        side=SIDE,
        side_across=SIDE_ACROSS,
        most_outputs=MOST_OUTPUTS,
    )
