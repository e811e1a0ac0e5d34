"""Quantized weights whose products are exact in float32, in whatever order they are added up.

Levels, scales and centers are small multiples of powers of two. So a kernel either gives the very
number, or it read a code, a scale or an x that it should not have.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from bnbx.kernels import coding_reference
from bnbx.kernels.encoding import Encoding, make_encoding
from bnbx.kernels.packing import pack
from bnbx.registry import QuantType
from bnbx.registry.quant_type import Scale

KINDS: dict[str, Scale] = {
    "float32": Scale(),
    "bfloat16": Scale(dtype="bfloat16"),
    "e4m3": Scale(dtype="e4m3"),
    "e4m3_tensor": Scale(dtype="e4m3", tensor_scale=True),
    "e8m0": Scale(dtype="e8m0"),
    "centered": Scale(centered=True),
    "row": Scale(per="row"),
    "row_centered": Scale(per="row", centered=True),
    "tensor": Scale(per="tensor"),
}
ONE_AND_TWO = {"e4m3": (0x38, 0x40), "e8m0": (127, 128)}  # as these scales are kept
NOTHING = 0  # the code that stands for no number


def _type(name: str, bits: int, scale: Scale, coarse: int) -> QuantType:
    """Numbers -1, ..., of `coarse` bits at most, some of them several times; code 0 is none."""
    steps = 2 ** (min(bits, coarse) - 1)
    values: list[float | None] = [(code % (2 * steps) - steps) / steps for code in range(2**bits)]
    values[steps], values[NOTHING] = -1.0, None
    summary = "multiples of a power of two"
    return QuantType(name=name, summary=summary, bits=bits, values=tuple(values), scale=scale)


def exact_encoding(
    bits: int, kind: str = "float32", block: int | None = None, *, second: int = 0
) -> Encoding:
    """An encoding of this width and kind of scales, which are quantized in blocks of `second`."""
    scale = KINDS[kind]
    size = (block or 64) if scale.per == "block" else None
    inner = _type("exact_second", 8, Scale(), 4) if second else None
    made = _type(f"exact{bits}_{kind}", bits, scale, 8)
    return make_encoding(made, size, second=inner, second_block=second or 256)


@dataclass(frozen=True)
class Weight:
    """A quantized weight, and what it stands for in float64."""

    encoding: Encoding
    shape: tuple[int, int]
    parts: list[Tensor]

    @property
    def dense(self) -> Tensor:
        """By the reference; float64."""
        found = coding_reference.decode(self.encoding, self.parts, self.shape, torch.float32)
        return found.double()


def exact_weight(encoding: Encoding, shape: tuple[int, int], seed: int = 0) -> Weight:
    """A weight with random codes, all of which are numbers."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(1, 2**encoding.bits, shape, generator=generator, dtype=torch.uint8)
    return with_codes(encoding, codes, generator)


def with_codes(encoding: Encoding, codes: Tensor, generator: torch.Generator) -> Weight:
    """A weight with these codes (out, in) and random scales."""
    shape = (codes.shape[0], codes.shape[1])
    sizes = encoding.shapes(shape)
    rows, columns = encoding.grid(shape)

    def chosen(name: str, *values: float) -> Tensor:
        size, dtype = sizes[name]
        which = torch.randint(0, len(values), (prod(size),), generator=generator)
        return torch.tensor(values)[which].to(dtype).reshape(size)

    dtype = encoding.quant_type.scale.dtype
    scales = range(1, 256) if encoding.second else ONE_AND_TWO.get(dtype, (1, 2))
    every = {
        "scale": lambda: chosen("scale", *scales),
        "center": lambda: chosen("center", -0.5, 0.0, 0.25),
        "tensor_scale": lambda: chosen("tensor_scale", 0.5),
        "second_scale": lambda: chosen("second_scale", 1.0, 2.0),
        "mean": lambda: chosen("mean", 0.5),
    }
    packed = pack(codes.reshape(rows, columns), encoding.quant_type)
    parts = [packed.reshape(sizes["codes"][0])]
    parts += [every[name]() for name in encoding.parts[1:]]
    return Weight(encoding, shape, parts)


def small_numbers(
    rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 1
) -> Tensor:
    """Whole numbers from -4 to 4."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, (rows, columns), generator=generator).to(dtype)
