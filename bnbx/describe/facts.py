"""Facts of one quant type, computed from its spec: what `describe` prints and the page lists."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bnbx.describe.data import data_sets
from bnbx.kernels import coding_reference
from bnbx.kernels.encoding import Encoding, make_encoding
from bnbx.registry import QuantType, quant_types
from bnbx.registry.quant_type import Codebook

MATRIX = (4096, 4096)
"""The tensor that bits per element are counted on."""


@dataclass(frozen=True)
class Error:
    """How far numbers are from what they read as, as shares of their own size."""

    mean: float
    """Mean of |x - read| over mean of |x|."""
    rms: float
    """The same with the root of mean squares."""

    @property
    def decibels(self) -> float:
        """Signal to noise; infinite without noise."""
        return -20 * math.log10(self.rms) if self.rms > 0 else math.inf


@dataclass(frozen=True)
class Level:
    """One row of a type's table."""

    code: int
    level: float | None
    """What the code reads as where absmax is 1; None for no number."""
    value: float | None
    """The same as the spec has it, in the type's unit."""
    above: float | None
    """x / absmax above which this code is written; None for the lowest, or one never written."""
    written: bool


@dataclass(frozen=True)
class Facts:
    """A quant type, with what follows from its spec."""

    spec: QuantType
    package: str
    encoding: Encoding
    bits_per_element: float
    levels: tuple[Level, ...]
    errors: dict[str, Error]

    @property
    def written(self) -> int:
        """How many codes are written."""
        return sum(level.written for level in self.levels)

    @property
    def smallest(self) -> float:
        """The smallest magnitude that is not zero."""
        return min(abs(x.level) for x in self.levels if x.written and x.level)

    @property
    def zero(self) -> bool:
        """Whether zero reads as zero."""
        codebook = self.encoding.codebook
        return codebook.values[codebook.zero_code] == 0 and not self.spec.scale.centered


def facts_of(name: str | QuantType, block_size: int | None = None) -> Facts:
    """The facts of a registered type, or of a spec.

    Args:
        name: of a registered type, or a spec.
        block_size: elements that share a scale; the type's own by default.

    Raises:
        UnknownNameError: no such type.
        OptionError: the type has no such block size.
    """
    encoding = make_encoding(name, block_size)
    spec = encoding.quant_type
    known = quant_types().holds(spec)
    return Facts(
        spec=spec,
        package=quant_types().package(spec.name) if known else "",
        encoding=encoding,
        bits_per_element=bits_per_element(encoding),
        levels=levels_of(encoding.codebook),
        errors=dict(_errors(encoding)),
    )


@lru_cache(maxsize=256)
def _errors(encoding: Encoding) -> tuple[tuple[str, Error], ...]:
    return tuple((key, error_of(encoding, x)) for key, x in data_sets().items())


def bits_per_element(encoding: Encoding) -> float:
    """Bits of codes and scales per element of a large matrix."""
    return 8 * encoding.bytes(MATRIX) / math.prod(MATRIX)


def levels_of(codebook: Codebook) -> tuple[Level, ...]:
    """The table, ascending; codes without a number come last."""
    lower = dict(zip(codebook.codes[1:], codebook.thresholds, strict=True))

    def row(code: int) -> Level:
        value = codebook.values[code]
        level = None if value is None else codebook.levels[code]
        above = lower[code] / codebook.unit if code in lower else None
        return Level(code, level, value, above, code in codebook.codes)

    def place(code: int) -> tuple[float, int]:
        value = codebook.values[code]
        rank = codebook.codes.index(code) if code in codebook.codes else -1
        return (math.inf, code) if value is None else (value, rank)

    return tuple(row(code) for code in sorted(range(len(codebook.values)), key=place))


def error_of(encoding: Encoding, x: Tensor) -> Error:
    """What is lost of `x` (float32)."""
    parts = coding_reference.encode(encoding, x)
    read = coding_reference.decode(encoding, parts, x.shape, torch.float32).double()
    exact = x.double()
    lost = exact - read
    return Error(
        mean=float(lost.abs().mean() / exact.abs().mean()),
        rms=float((lost.square().mean() / exact.square().mean()).sqrt()),
    )


def scale_words(spec: QuantType, block_size: int) -> str:
    """How scales are kept, in a few words."""
    scale = spec.scale
    shared = {"block": f"block of {block_size}", "row": "row", "tensor": "tensor"}[scale.per]
    kind = {
        "float32": "float32 absmax",
        "bfloat16": "bfloat16 absmax",
        "e4m3": "E4M3 step",
        "e8m0": "power of two",
    }[scale.dtype]
    words = f"{kind} per {shared}"
    words += " and float32 mid-point" if scale.centered else ""
    return words + (", float32 per tensor" if scale.tensor_scale else "")


def as_json(facts: Facts) -> dict[str, Any]:
    """The facts as JSON holds them."""
    spec = facts.spec
    return {
        "name": spec.name,
        "summary": spec.summary,
        "source": spec.source,
        "package": facts.package,
        "bits": spec.bits,
        "block_size": facts.encoding.block_size or None,
        "scale": spec.scale.model_dump(),
        "unit": spec.unit,
        "ties": spec.ties,
        "grid": spec.grid,
        "bits_per_element": facts.bits_per_element,
        "codes_written": facts.written,
        "zero_is_exact": facts.zero,
        "smallest": facts.smallest,
        "errors": {
            key: {"mean": error.mean, "rms": error.rms} for key, error in facts.errors.items()
        },
        "table": [
            {
                "code": level.code,
                "level": level.level,
                "value": level.value,
                "written_above": level.above,
                "written": level.written,
            }
            for level in facts.levels
        ],
        "unsigned": None
        if spec.unsigned_values is None
        else [
            {"code": level.code, "level": level.level, "written_above": level.above}
            for level in levels_of(spec.codebook(signed=False))
        ],
    }
