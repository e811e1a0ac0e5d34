"""The quant-type spec: a data type of 2 to 8 bits is a table of numbers and a way to scale them.

A tensor of such a type is cut into blocks; each block keeps its largest magnitude (absmax), or
what follows from it, and a code per element: the index of the table entry nearest to the element,
once the block is scaled so that its absmax becomes the table's `unit`. Everything a kernel needs
(decision thresholds, search tables, the code of zero) is derived from the table.
"""

from __future__ import annotations

import hashlib
import math
import struct
from functools import cached_property
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from typing_extensions import Self

from bnbx.registry.grid import float32, grid_threshold
from bnbx.registry.spec import Frozen, NotText, Spec

FLOAT32 = "float32"
BLOCK_SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
LEAST, MOST = 2.0**-16, 2.0**16  # of units
LARGEST = 2.0**128 - 2.0**104  # float32 number
Values = tuple[float | None, ...]


def _number(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is no number of a table; write None for a code without a number")
    return value


def _rounded(value: float | None) -> float | None:
    if value is not None and abs(value) > LARGEST:
        raise ValueError(f"{value!r} is beyond the largest float32 number")
    return None if value is None else float32(value)


# Kernels have them in float32, so that a spec has them so too, whoever writes 0.3 or 1/3.
Entry = Annotated[float | None, BeforeValidator(_number), NotText, AfterValidator(_rounded)]
Unit = Annotated[float, NotText, AfterValidator(_rounded)]
Ties = Literal["low", "even"]


class Scale(Frozen):
    """How the elements that share a scale are chosen, and what is kept of it.

    Attributes:
        per: what shares a scale: a block of `block_size` elements, a row (all but the last
            dimension number the rows), or the whole tensor.
        dtype: what the scale is kept in. In "float32" and "bfloat16" it is absmax. In "e4m3" (8
            bits, NVFP4) and "e8m0" (a power of two in 8 bits, OCP MX) it is the step: absmax
            over the table's `unit`.
        tensor_scale: one more float32 scale for the whole tensor, so that the scales of blocks
            use the range of their dtype; for "e4m3".
        centered: whether the mid-point of a block's range is subtracted first and kept too (an
            affine type).
    """

    per: Literal["block", "row", "tensor"] = "block"
    dtype: Literal["float32", "bfloat16", "e4m3", "e8m0"] = "float32"
    tensor_scale: bool = False
    centered: bool = False

    @classmethod
    def written(cls, value: object) -> str:
        """One for what shares a scale."""
        return f"Scale(per={value!r})" if isinstance(value, str) else 'Scale(per="block")'

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.tensor_scale and (self.dtype != "e4m3" or self.centered):
            raise ValueError("tensor_scale is for dtype 'e4m3' without centered")
        if self.centered and self.keeps_step:
            raise ValueError(f"centered is for scales in float32 or bfloat16, not {self.dtype!r}")
        return self

    @property
    def keeps_step(self) -> bool:
        """Whether what is kept is absmax over the table's unit, not absmax."""
        return self.dtype in ("e4m3", "e8m0")


class QuantType(Spec):
    """A quant data type.

    Attributes:
        bits: width of a code.
        values: the 2**bits table entries in code order, in [-unit, unit], which are rounded to
            float32; None for a code that stands for no number (it reads as NaN).
        unsigned_values: the table used where values are known to be >= 0 (second moments);
            None if the type has no such form, then `values` serves.
        unit: the number of the table that a block's absmax becomes: 1, or in tables that are
            written as whole numbers or as floats, the largest of them (127, 448, 6).
        decode_only: codes that are read, but never written: a second zero, say.
        ties: what becomes of a number midway between two entries: "low" takes the lower one,
            "even" the one with an even code.
        grid: if not 0, numbers over absmax are first rounded to one of this many evenly spaced
            points of [-1, 1], and get the code nearest to that point; some codes are then never
            written. A block whose inverse absmax is beyond float32 keeps signs alone. For codes
            that equal those of programs that work so.
        block_size: elements that share one scale, where scales are per block.
        scale: what else there is to say of scales. Optimizer states keep the absmax of every
            block in float32, whatever it says.
        state_default: this is the type that `bits=N` means for optimizer states.
        scale_default: this is the type that double quantization keeps scales in.
    """

    bits: int = Field(ge=2, le=8)
    values: tuple[Entry, ...]
    unsigned_values: tuple[Entry, ...] | None = None
    unit: Unit = Field(default=1.0, ge=LEAST, le=MOST)
    decode_only: tuple[int, ...] = ()
    ties: Ties = "low"
    grid: int = Field(default=0, ge=0, le=65536)
    block_size: int = 256
    scale: Scale = Scale()
    state_default: bool = False
    scale_default: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.name == FLOAT32:
            raise ValueError(f"the name {FLOAT32!r} stands for states without a quant type")
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size {self.block_size} is not one of {BLOCK_SIZES}")
        if self.grid and (self.unit != 1.0 or self.ties != "low" or self.scale != Scale()):
            raise ValueError("grid is for unit 1, ties 'low', and a float32 scale per block")
        if self.grid == 1:
            raise ValueError("grid: one point tells no numbers apart; expected 0, or 2 and more")
        for code in self.decode_only:
            if not 0 <= code < 2**self.bits:
                raise ValueError(f"decode_only: {code} is no code of {self.bits} bits")
        _check_table("values", self.values, self)
        if self.unsigned_values is not None:
            _check_table("unsigned_values", self.unsigned_values, self, signed=False)
        return self

    @cached_property
    def meaning(self) -> str:
        """8 hex digits of the SHA-256 of all that reading codes depends on.

        What was written by another type of this name, such as that of another version of a
        package, is known by them.
        """
        text = self.model_dump_json(include={"bits", "values", "unsigned_values", "unit", "scale"})
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def codebook(self, *, signed: bool) -> Codebook:
        """The table for states of either sign, or for states that are never negative."""
        return self._signed if signed or self.unsigned_values is None else self._unsigned

    @cached_property
    def _signed(self) -> Codebook:
        return Codebook(self.values, self.ties, self.decode_only, self.unit, self.grid)

    @cached_property
    def _unsigned(self) -> Codebook:
        values = self.unsigned_values or self.values
        return Codebook(values, self.ties, self.decode_only, self.unit, self.grid)


class Codebook:
    """One table with what follows from it.

    The code of x is `codes[n]` with n the number of thresholds that are < x: the nearest entry;
    thresholds that are themselves midway are set so that ties go where the type says.
    """

    def __init__(
        self,
        values: Values,
        ties: Ties = "low",
        decode_only: tuple[int, ...] = (),
        unit: float = 1.0,
        grid: int = 0,
    ) -> None:
        self.values = values
        self.unit = unit
        self.ties = ties
        self.decode_only = decode_only
        self.grid = grid
        numbers = {
            code: value
            for code, value in enumerate(values)
            if value is not None and code not in decode_only
        }
        codes = sorted(numbers, key=numbers.__getitem__)
        thresholds = [
            _on_grid(numbers[low], numbers[high], grid)
            if grid
            else _threshold(numbers[low], numbers[high], up=ties == "even" and high % 2 == 0)
            for low, high in pairwise(codes)
        ]
        if grid:  # of equal thresholds all but the last belong to codes that no point has
            above = dict(zip(thresholds, codes[1:], strict=True))
            codes, thresholds = [codes[0], *above.values()], list(above)
        self.codes: tuple[int, ...] = tuple(codes)
        """Codes that are written, in ascending order of their values."""
        self.thresholds: tuple[float, ...] = tuple(thresholds)
        """Mid-points between neighbors, rounded to float32; ascending, one fewer than codes."""
        self.zero_code: int = self.codes[sum(threshold < 0.0 for threshold in self.thresholds)]
        """The code that 0.0 encodes to."""

    @property
    def levels(self) -> tuple[float, ...]:
        """Values over the unit, in code order, rounded to float32; NaN for what is no number."""
        return tuple(math.nan if v is None else float32(v / self.unit) for v in self.values)

    @property
    def key(self) -> tuple[Values, Ties, tuple[int, ...], float, int]:
        """What tells codebooks apart."""
        return self.values, self.ties, self.decode_only, self.unit, self.grid


def _threshold(low: float, high: float, *, up: bool) -> float:
    """The mid-point; for ties to go `up`, the number just below it, where it is a tie at all."""
    middle = float32((low + high) / 2)
    return next_below(middle) if up and middle == (low + high) / 2 and low < high else middle


def _on_grid(low: float, high: float, points: int) -> float:
    return grid_threshold((low + high) / 2, points)


def next_below(value: float) -> float:
    """The float32 number below a float32 number."""
    bits = struct.unpack("<i", struct.pack("<f", value))[0]
    if value == 0.0:
        return -float(struct.unpack("<f", struct.pack("<i", 1))[0])
    return float(struct.unpack("<f", struct.pack("<i", bits - 1 if value > 0 else bits + 1))[0])


def _shown(value: float) -> str:
    """A float32 number in as few digits as tell it from all others, as its author wrote it."""
    texts = (f"{value:.{digits}g}" for digits in range(1, 10))
    return next(text for text in texts if float32(float(text)) == value)


def _check_table(what: str, values: Values, spec: QuantType, *, signed: bool = True) -> None:
    if len(values) != 2**spec.bits:
        raise ValueError(
            f"{what}: {len(values)} numbers for {spec.bits} bits; expected {2**spec.bits}"
        )
    lowest = -spec.unit if signed else 0.0
    written = []
    for code, value in enumerate(values):
        if value is None:
            continue
        reads = code in spec.decode_only
        if not reads and not lowest <= value <= spec.unit:
            beyond = abs(value) > spec.unit
            hint = (
                "; of a table in other numbers, `unit` is the largest magnitude" if beyond else ""
            )
            raise ValueError(
                f"{what}[{code}] = {_shown(value)} is outside [{lowest:g}, {spec.unit:g}]{hint}"
            )
        if not reads:
            written.append(value)
    near = math.isclose(max(map(abs, written), default=0.0), spec.unit, rel_tol=0.1)
    if len(set(written)) < 2 or not near:
        raise ValueError(
            f"{what}: expected at least two numbers, the largest magnitude near {spec.unit:g}, "
            "which is what the field `unit` says"
        )
