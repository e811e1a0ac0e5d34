"""Functions of a whole tensor and a table: no absmax, or one in all (bitsandbytes 0.0.24)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bnbx.errors import InputError
from bnbx.functional import checks, coded, ops
from bnbx.functional.maps import default_table


def quantize_no_absmax(
    A: Tensor,  # noqa: N803
    code: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """Quantize a tensor as it is, without a scale.

    Args:
        A: float32, bfloat16 or float16, any shape.
        code: the table, 2**bits numbers in any order, bits = 1 to 8.
        out: memory for the codes: uint8, the shape of A.

    Returns:
        The code of the nearest table entry for each element, of two as near the lower entry's;
        uint8, the shape of A. NaN gets the code nearest to zero.

    Raises:
        InputError: another dtype or shape.
    """
    checks.floats("A", A)
    coded.check_table(code)
    checks.together([("A", A), ("code", code), ("out", out)])
    found = ops.quantize_no_absmax(A.detach(), code)
    return found if out is None else _into(found, out)


def dequantize_no_absmax(
    A: Tensor,  # noqa: N803
    code: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """The table entries that codes stand for.

    Args:
        A: codes, uint8, any shape.
        code: the table, 2**bits numbers.
        out: memory for the numbers: float32, bfloat16 or float16, the shape of A.

    Returns:
        The numbers, float32, or `out`. A code beyond the end of the table reads as NaN.

    Raises:
        InputError: another dtype or shape.
    """
    checks.of_dtype("A", A, torch.uint8)
    coded.check_table(code)
    checks.together([("A", A), ("code", code), ("out", out)])
    found: Tensor = ops.dequantize_no_absmax(A, code)
    if out is None:
        return found
    checks.floats("out", out)
    checks.of_shape("out", out, A.shape)
    return out.copy_(found)


def quantize_whole(
    x: Tensor, code: Tensor | None, out: Tensor | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """`quantize` with a table: codes, and (absmax, table)."""
    table = default_table(x.device) if code is None else code
    coded.check_table(table)
    checks.together([("A", x), ("code", code), ("out", out)])
    numbers = x.detach().float()
    absmax = numbers.abs().amax() if numbers.numel() else numbers.new_zeros(())
    scale = torch.where(absmax > 0, absmax, 1.0)
    codes = ops.quantize_no_absmax(numbers / scale, table)
    return (codes if out is None else _into(codes, out)), (absmax, table)


def dequantize_whole(
    codes: Tensor,
    quant_state: Any,
    absmax: Tensor | None,
    code: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """`dequantize` of codes and a table."""
    checks.of_dtype("A", codes, torch.uint8)
    if quant_state is not None:
        if not isinstance(quant_state, (tuple, list)) or len(quant_state) != 2:
            raise InputError(
                f"quant_state is {quant_state!r:.200}; expected (absmax, table), as "
                "quantize(A, table) returns it. States of quantize_blockwise go to "
                "dequantize_blockwise"
            )
        absmax, code = quant_state
    if absmax is None:
        raise InputError("dequantize needs quant_state or absmax")
    table = default_table(codes.device) if code is None else code
    scale = checks.one_number("absmax", absmax, "there is one for the whole tensor")
    checks.together([("A", codes), ("absmax", scale), ("code", code), ("out", out)])
    numbers = dequantize_no_absmax(codes, table) * scale.reshape(())
    if out is None:
        return numbers
    checks.floats("out", out)
    checks.of_shape("out", out, codes.shape)
    return out.copy_(numbers)


def _into(codes: Tensor, out: Tensor) -> Tensor:
    checks.of_dtype("out", out, torch.uint8)
    checks.of_shape("out", out, codes.shape)
    return out.copy_(codes)
