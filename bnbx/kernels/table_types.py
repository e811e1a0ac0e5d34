"""Types by their tables: a file or a caller that gives numbers, but no name for them."""

from __future__ import annotations

import struct
from functools import lru_cache

import torch
from torch import Tensor

from bnbx.errors import BnbxError, QuantizedDataError
from bnbx.kernels.memory import lost
from bnbx.registry import QuantType, quant_types

NAME = "table"
MOST_ENTRIES = 256


def type_of_table(code: Tensor | None) -> QuantType:
    """A type of 2 to 8 bits with this table (2**bits,), float32 numbers from -1 to 1.

    It is the registered type for scales, if that has the table; else one without a name.

    Raises:
        QuantizedDataError: it is no such table.
    """
    if code is None:
        raise QuantizedDataError("a quantization state with neither a quant type nor a table")
    if wrong := lost(code):
        raise QuantizedDataError(f"a table {wrong}")
    if code.dim() != 1 or code.numel() > MOST_ENTRIES:
        raise QuantizedDataError(
            f"a table of shape {tuple(code.shape)}; expected (2**bits,), {MOST_ENTRIES} numbers at "
            "most"
        )
    numbers = code.detach().float().cpu().contiguous()
    return _of_bytes(bytes(numbers.view(torch.uint8).tolist()))


@lru_cache(maxsize=256)  # fitted tables are many, and each is of use for a while
def _of_bytes(packed: bytes) -> QuantType:
    """The type of a table by the bytes of its numbers, which tell -0.0 from 0.0."""
    numbers = struct.unpack(f"{len(packed) // 4}f", packed)
    values = tuple(None if v != v else v for v in numbers)  # noqa: PLR0124 - NaN
    usual = quant_types().find(lambda t: t.scale_default)
    if usual is not None and usual.values == values:
        return usual
    try:
        bits = len(values).bit_length() - 1
        return QuantType(name=NAME, summary="a table", bits=bits, values=values)
    except BnbxError as error:
        raise QuantizedDataError(f"a table of {len(values)} numbers: {error}") from None
