"""Parts of a quantized tensor without the others: rows of an embedding, an expert of a mixture.

Where rows begin at whole bytes and blocks, rows of the parts are gathered and decoded as any
tensor is. Where they do not, each number is looked up by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from bnbx.errors import QuantizedDataError
from bnbx.kernels import coding
from bnbx.kernels.coding_reference import factor_of, levels_on, second_levels_on
from bnbx.kernels.encoding import Encoding, check_parts, make_encoding
from bnbx.kernels.packing import codes_at

Parts = dict[str, Tensor]


def decode_rows(
    encoding: Encoding,
    parts: Sequence[Tensor],
    shape: Sequence[int],
    ids: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Rows of a matrix, as `coding.decode` gives them.

    Args:
        encoding: of the matrix; see `bnbx.kernels.encoding`.
        parts: of the matrix.
        shape: of the matrix: (rows, columns).
        ids: which rows, int64 or int32, any shape.
        dtype: of the result: float32, bfloat16 or float16.

    Returns:
        (*ids.shape, columns).

    Raises:
        QuantizedDataError: the parts do not fit the encoding and the shape.
        IndexError: a row that the matrix does not have. On a GPU, where to look would be to wait,
            it ends in an assertion on the device, as with `torch.nn.functional.embedding`.
    """
    if len(shape) != 2:
        raise QuantizedDataError(f"rows are of a matrix, not of shape {tuple(shape)}")
    check_parts(encoding, shape, parts)
    count, columns = shape
    flat = ids.reshape(-1).long()
    if flat.device.type == "cpu" and flat.numel():
        low, high = (int(end) for end in flat.aminmax())
        if low < 0 or high >= count:
            wrong = low if low < 0 else high
            raise IndexError(f"row {wrong} of a quantized matrix with {count} rows")
    elif flat.numel():
        flat = torch.where(flat < 0, count, flat)  # none is counted from the end
    named = dict(zip(encoding.parts, parts, strict=True))
    size = encoding.block_size
    if not flat.numel() or not columns:
        found = torch.empty(flat.numel(), columns, dtype=dtype, device=parts[0].device)
    elif encoding.per == "row" or (encoding.per == "block" and columns % size == 0):
        found = _decode_gathered(encoding, named, shape, flat, dtype)
    else:
        found = _decode_each(encoding, named, flat, columns).to(dtype)
    return found.view(*ids.shape, columns)


def _decode_gathered(
    encoding: Encoding, named: Parts, shape: Sequence[int], ids: Tensor, dtype: torch.dtype
) -> Tensor:
    """Rows that begin at whole bytes and blocks."""
    count, columns = shape
    blocks = 1 if encoding.per == "row" else columns // encoding.block_size
    codes = named["codes"].view(count, -1)[ids]
    place = ids[:, None] * blocks + torch.arange(blocks, device=ids.device)
    gathered = {"codes": codes, "scale": _scales(encoding, named, place)}
    if "center" in named:
        gathered["center"] = named["center"][place]
    if "tensor_scale" in named:
        gathered["tensor_scale"] = named["tensor_scale"]
    without = Encoding(encoding.quant_type, encoding.block_size, encoding.signed)
    some = (len(ids), columns)
    sizes = without.shapes(some)
    ready = [gathered[name].reshape(sizes[name][0]).contiguous() for name in without.parts]
    return coding.decode(without, ready, some, dtype)


def _scales(encoding: Encoding, named: Parts, place: Tensor) -> Tensor:
    """Scales of some blocks, as they are kept, but float32 where they are quantized."""
    kept = named["scale"][place]
    if encoding.second_tables is None:
        return kept
    levels = second_levels_on(encoding, kept.device)
    second = named["second_scale"][place // encoding.second_block]
    return levels[kept.long()] * second + named["mean"]


def _decode_each(encoding: Encoding, named: Parts, ids: Tensor, columns: int) -> Tensor:
    """Rows that begin anywhere, number by number; float32."""
    place = ids[:, None] * columns + torch.arange(columns, device=ids.device)
    packed = named["codes"].reshape(-1)
    codes = codes_at(packed, encoding.quant_type, place)
    block = place // encoding.block_size if encoding.per == "block" else torch.zeros_like(place)
    kept = _scales(encoding, named, block)
    factor = kept if encoding.second else factor_of(encoding, kept, named.get("tensor_scale"))
    levels = levels_on(encoding, packed.device)
    values = levels[codes.long()] * factor
    return values + named["center"][block] if "center" in named else values


def take(
    encoding: Encoding, parts: Sequence[Tensor], shape: Sequence[int], index: int
) -> tuple[Encoding, list[Tensor]] | None:
    """One entry along the first dimension, still in codes; None if blocks or bytes cross its ends.

    Codes are views; scales that are quantized too become float32.

    Raises:
        QuantizedDataError: the parts do not fit the encoding and the shape.
        IndexError: there is no such entry.
    """
    check_parts(encoding, shape, parts)
    if not -shape[0] <= index < shape[0]:
        raise IndexError(f"entry {index} of a quantized tensor of shape {tuple(shape)}")
    inner = tuple(shape[1:])
    blocks = encoding.blocks(inner)
    whole = encoding.per == "row" and len(inner) > 0
    if encoding.per == "block":
        size = prod(inner)
        whole = size > 0 and size % encoding.block_size == 0
    if not whole:
        return None
    index %= shape[0]
    named = dict(zip(encoding.parts, parts, strict=True))
    place = slice(index * blocks, (index + 1) * blocks)
    found = {"codes": named["codes"].reshape(shape[0], -1)[index]}
    if encoding.second is None:
        found["scale"] = named["scale"][place]
    else:
        each = torch.arange(place.start, place.stop, device=parts[0].device)
        found["scale"] = _scales(encoding, named, each)
    if "center" in named:
        found["center"] = named["center"][place]
    if "tensor_scale" in named:
        found["tensor_scale"] = named["tensor_scale"]
    without = make_encoding(
        encoding.quant_type, encoding.block_size or None, signed=encoding.signed
    )
    return without, [found[name] for name in without.parts]
