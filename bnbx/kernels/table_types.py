"""Types by their tables: a file or a caller that gives numbers, but no name for them."""

from __future__ import annotations

import torch
from torch import Tensor

from bnbx.errors import BnbxError, QuantizedDataError
from bnbx.registry import QuantType, quant_types

NAME = "table"
LONGEST = 256
_by_table: dict[bytes, QuantType] = {}


def type_of_table(code: Tensor | None) -> QuantType:
    """A type of 2 to 8 bits with this table (2**bits,), float32 numbers from -1 to 1.

    It is the registered type for scales, if that has the table; else one without a name.

    Raises:
        QuantizedDataError: it is no such table.
    """
    if code is None:
        raise QuantizedDataError("a quantization state with neither a quant type nor a table")
    if code.dim() != 1 or code.numel() > LONGEST:
        raise QuantizedDataError(
            f"a table of shape {tuple(code.shape)}; expected (2**bits,), {LONGEST} numbers at most"
        )
    numbers = code.detach().float().cpu().contiguous()
    key = bytes(numbers.view(torch.uint8).tolist())
    if key in _by_table:
        return _by_table[key]
    values = tuple(None if v != v else v for v in numbers.tolist())  # noqa: PLR0124 - NaN
    usual = quant_types().find(lambda t: t.scale_default)
    if usual is not None and usual.values == values:
        found = usual
    else:
        try:
            bits = len(values).bit_length() - 1
            found = QuantType(name=NAME, summary="a table", bits=bits, values=values)
        except BnbxError as error:
            raise QuantizedDataError(f"a table of {len(values)} numbers: {error}") from None
    _by_table[key] = found
    return found
