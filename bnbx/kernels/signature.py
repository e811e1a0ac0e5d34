"""The arguments of a kernel, in order: the one list that renderer and launcher share.

A launch hands over a table with a row per tensor (pointers and sizes, 64 bits each), the scalars
of the step (float32), its inputs (float64), and the tables of each codebook (`Plan.codebooks`).
Where a plan is measured, there is room for what the first pass finds: a `Part` for each chunk, and
the values of each tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

from bnbx.kernels.c_struct import PHASES, Field
from bnbx.kernels.plan import Plan
from bnbx.registry.rule import Expression

RESIDUAL = "residual"
RESIDUAL_TYPES = {"kahan": "Parameter", "residual": "i8"}
# What a CPU's kernel is given. The same for all plans, since jobs of several kernels run together.
JOB = (
    Field("rows", "const Row*"),
    Field("scalars", "const void*", "Scalars"),
    Field("inputs", "const double*"),
    Field("tables", "const void* const*"),
    Field("parts", "void*", "a Part for each chunk"),
    Field("values", "void*", "a Values for each row"),
    *PHASES,
)


@dataclass(frozen=True)
class Column:
    """A field of a row: its name and what it points to ("" for a plain 64-bit integer)."""

    name: str
    points_to: str
    writable: bool = True

    @property
    def field(self) -> Field:
        """The field in C++ and CUDA. A rule's names end in no underscore: none is a type's name."""
        if not self.points_to:
            return Field(self.name, "i64")
        return Field(f"{self.name}_", f"{'' if self.writable else 'const '}{self.points_to}*")


@dataclass(frozen=True)
class Signature:
    """Columns of the row table, scalars, inputs, and the sizes in bytes of what is measured.

    `seeded` says that the inputs end with the seed of the step's noise.
    """

    columns: tuple[Column, ...]
    scalars: tuple[tuple[str, Expression], ...]
    inputs: tuple[str, ...]
    seeded: bool
    part_bytes: int
    values_bytes: int


def absmax_name(state: str) -> str:
    """Key of the absmax tensor that belongs to a quantized state."""
    return f"{state}_absmax"


def make_signature(plan: Plan) -> Signature:
    """The signature that follows from a plan."""
    columns = [Column("p", "Parameter"), Column("g", "Gradient", writable=False)]
    if plan.master in RESIDUAL_TYPES:
        columns.append(Column(RESIDUAL, RESIDUAL_TYPES[plan.master]))
    for storage in plan.storages:
        name = storage.state.name
        if storage.quant_type is None:
            columns.append(Column(name, "float"))
        else:
            columns += [Column(name, "u8"), Column(absmax_name(name), "float")]
    columns.append(Column("Gradient_scale", "float", writable=False))
    columns += [Column("Numel", ""), Column("FirstChunk", "")]
    norms, whole = len(plan.lowered.norms), len(plan.whole)
    return Signature(
        columns=tuple(columns),
        scalars=tuple(plan.lowered.scalars.items()),
        inputs=plan.lowered.inputs,
        seeded=plan.master != "none",
        part_bytes=8 * (norms + -(-whole // 2)),
        values_bytes=4 * (len(plan.lowered.tensor_scalars) + 2 * whole),
    )
