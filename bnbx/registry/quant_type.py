"""The quant-type spec: a data type of 2 to 8 bits is a table of numbers and a block size.

A tensor of such a type is cut into blocks; each block keeps its largest magnitude (absmax) and a
code per element, the index of the table entry nearest to `element / absmax`. Everything a kernel
needs (decision thresholds, search tables, the code of zero) is derived from the table.
"""

from __future__ import annotations

import math
import struct
from functools import cached_property
from itertools import pairwise

from pydantic import Field, model_validator
from typing_extensions import Self

from bnbx.registry.spec import Spec

FLOAT32 = "float32"
BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)


def float32(value: float) -> float:
    """Round to the nearest float32, as a Python float."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


class QuantType(Spec):
    """A quant data type.

    Attributes:
        bits: width of a code.
        values: the 2**bits table entries in code order, each a float32 in [-1, 1].
        unsigned_values: the table used where values are known to be >= 0 (second moments);
            None if the type has no such form, then `values` serves.
        block_size: elements that share one absmax.
        state_default: this is the type that `bits=N` means for optimizer states.
    """

    bits: int = Field(ge=2, le=8)
    values: tuple[float, ...]
    unsigned_values: tuple[float, ...] | None = None
    block_size: int = 256
    state_default: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.name == FLOAT32:
            raise ValueError(f"the name {FLOAT32!r} stands for states without a quant type")
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size {self.block_size} is not one of {BLOCK_SIZES}")
        _check_table("values", self.values, self.bits, lowest=-1.0)
        if self.unsigned_values is not None:
            _check_table("unsigned_values", self.unsigned_values, self.bits, lowest=0.0)
        return self

    def codebook(self, *, signed: bool) -> Codebook:
        """The table for states of either sign, or for states that are never negative."""
        return self._signed if signed or self.unsigned_values is None else self._unsigned

    @cached_property
    def _signed(self) -> Codebook:
        return Codebook(self.values)

    @cached_property
    def _unsigned(self) -> Codebook:
        return Codebook(self.unsigned_values or self.values)


class Codebook:
    """One table with what follows from it.

    The code of x is `codes[n]` with n the number of thresholds that are < x: the nearest entry,
    and of two equally near ones the lower.
    """

    def __init__(self, values: tuple[float, ...]) -> None:
        self.values = values
        self.codes: tuple[int, ...] = tuple(sorted(range(len(values)), key=values.__getitem__))
        """Codes in ascending order of their values."""
        ascending = [values[code] for code in self.codes]
        self.thresholds: tuple[float, ...] = tuple(
            float32((low + high) / 2) for low, high in pairwise(ascending)
        )
        """Mid-points between neighbors, rounded to float32; ascending, one fewer than values."""
        self.zero_code: int = self.codes[sum(threshold < 0.0 for threshold in self.thresholds)]
        """The code that 0.0 encodes to."""


def _check_table(what: str, values: tuple[float, ...], bits: int, lowest: float) -> None:
    if len(values) != 2**bits:
        raise ValueError(f"{what}: {len(values)} numbers for {bits} bits; expected {2**bits}")
    for code, value in enumerate(values):
        if not lowest <= value <= 1.0:
            raise ValueError(f"{what}[{code}] = {value!r} is outside [{lowest:g}, 1]")
        if float32(value) != value:
            raise ValueError(f"{what}[{code}] = {value!r} is not a float32 number")
    if len(set(values)) < 2 or not math.isclose(max(map(abs, values)), 1.0, abs_tol=0.1):
        raise ValueError(f"{what}: expected at least two numbers, the largest magnitude near 1")
