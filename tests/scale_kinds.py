"""Encodings to test over: every registered type as it is, and every way in which scales are kept.

The types made here are not registered, so that each kind of scale is tested whatever is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bnbx.kernels.coding import decode
from bnbx.kernels.encoding import Encoding, make_encoding
from bnbx.registry import QuantType, quant_types
from bnbx.registry.quant_type import Scale

HALVES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FLOAT4 = (*HALVES, None, *(-value for value in HALVES[1:]))
SCALES: dict[str, Scale] = {
    "plain": Scale(),
    "bfloat16": Scale(dtype="bfloat16"),
    "e4m3": Scale(dtype="e4m3"),
    "e4m3_tensor": Scale(dtype="e4m3", tensor_scale=True),
    "e8m0": Scale(dtype="e8m0"),
    "centered": Scale(centered=True),
    "row": Scale(per="row"),
    "row_centered": Scale(per="row", centered=True),
    "tensor": Scale(per="tensor"),
}


def even(bits: int, **options: Any) -> QuantType:
    """A type with evenly spaced numbers and an exact zero."""
    most = 2 ** (bits - 1) - 1
    values = torch.linspace(-1, 1, 2 * most + 1).tolist()
    options = {"name": f"even{bits}", "block_size": 64, **options}
    return QuantType(summary="even", bits=bits, values=(*values, None), **options)


def float4(name: str, **options: Any) -> QuantType:
    """E2M1 with its numbers as they are, for scales that are steps too."""
    return QuantType(name=name, summary="E2M1", bits=4, values=FLOAT4, unit=6.0, **options)


def every_type() -> Iterator[tuple[str, Encoding]]:
    """Registered types, those that can also with their scales quantized."""
    for name in quant_types().names():
        encoding = make_encoding(name)
        yield name, encoding
        if encoding.quant_type.scale == Scale():
            yield f"{name}-double", make_encoding(name, double=True)


def every_kind() -> Iterator[tuple[str, Encoding]]:
    """Kinds of scales and widths of codes."""
    for kind, scale in SCALES.items():
        yield f"float4-{kind}", make_encoding(float4(f"float4_{kind}", scale=scale, block_size=32))
    for bits in (2, 3, 4, 5, 8):
        yield f"even{bits}", make_encoding(even(bits))
    yield "even3-double", make_encoding(even(3), double=True)
    yield "even2-centered", make_encoding(even(2, scale=Scale(centered=True)))


KINDS = dict(every_kind())
ENCODINGS = {**dict(every_type()), **KINDS}


def blocks_of(encoding: Encoding, x: Tensor) -> Tensor:
    """The blocks of a tensor, one a row, the last filled up with zeros."""
    flat = x.reshape(encoding.grid(x.shape))
    if encoding.per != "block":
        return flat
    return torch.nn.functional.pad(flat[0], (0, -x.numel() % encoding.block_size)).view(
        -1, encoding.block_size
    )


def block_errors(encoding: Encoding, parts: list[Tensor], x: Tensor) -> Tensor:
    """The squared error of each block, in float64."""
    off = decode(encoding, parts, x.shape).double() - x.double()
    return blocks_of(encoding, off).square().sum(1)
