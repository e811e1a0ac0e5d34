"""The parts of LLM.int8() (arXiv:2208.07339): quantize rows, multiply integers, scale back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bnbx.errors import InputError, OptionError
from bnbx.functional import checks
from bnbx.functional.registration import operation
from bnbx.kernels import int8
from bnbx.kernels.int8 import MOST_COLUMNS
from bnbx.kernels.int8_reference import products
from bnbx.kernels.memory import as_rows
from bnbx.layers import int8_ops

STEPS = 6.200124e-05  # of two codes: 1 / 127**2, in the digits that bitsandbytes has
PANEL = 1 << 18  # numbers that are turned at a time on a CPU, whose cache holds so many
LEAST_COLUMNS = 16  # of them: fewer bytes side by side are written slowly
INT_MM = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 6)  # right on any CPU since then


# ---- products of integers


def _matmul_fake(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((*a.shape[:-1], b.shape[0]), dtype=torch.int32)


@operation("int8_linear_matmul(Tensor a, Tensor b) -> Tensor", _matmul_fake, gradient=False)
def _matmul(a: Tensor, b: Tensor) -> Tensor:
    rows = a.reshape(a.shape[:-1].numel(), a.shape[-1])
    # torch's own is wrong for one column (2.13, on a CPU).
    if a.device.type == "cpu" and INT_MM and rows.numel() and b.numel() and len(rows[0]) > 1:
        found = torch._int_mm(rows, b.t())
    else:
        found = products(rows, b)
    return found.reshape(*a.shape[:-1], b.shape[0])


def int8_linear_matmul(
    A: Tensor,  # noqa: N803 - the name it has in bitsandbytes
    B: Tensor,  # noqa: N803
    out: Tensor | None = None,
    dtype: torch.dtype = torch.int32,
) -> Tensor:
    """The product A @ B.T of integers, exactly.

    Args:
        A: int8 (..., in).
        B: int8 (out, in).
        out: memory for the product: (..., out), of `dtype`.
        dtype: of the result; the sums are int32 whatever it is.

    Returns:
        (..., out).

    Raises:
        InputError: another dtype or shape.
        DeviceError: tensors on different devices.
    """
    checks.of_dtype("A", A, torch.int8)
    checks.of_dtype("B", B, torch.int8)
    if B.dim() != 2 or A.dim() == 0 or A.shape[-1] != B.shape[1]:
        raise InputError(
            f"A has shape {tuple(A.shape)}, B {tuple(B.shape)}; expected (..., in) and (out, in)"
        )
    if B.shape[1] > MOST_COLUMNS:
        raise InputError(f"{B.shape[1]} columns; sums of more than {MOST_COLUMNS} can overflow")
    checks.together([("A", A), ("B", B), ("out", out)])
    product: Tensor = _matmul(A, B)
    found = product if dtype == torch.int32 else product.to(dtype)
    if out is None:
        return found
    checks.of_dtype("out", out, dtype)
    checks.of_shape("out", out, found.shape)
    return out.copy_(found)


def _scaled_fake(
    a: Tensor, row_stats: Tensor, col_stats: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    del row_stats, col_stats, bias
    return torch.empty(a.shape, dtype=dtype, device=a.device)


@operation(
    "int8_mm_dequant(Tensor a, Tensor row_stats, Tensor col_stats, Tensor? bias, ScalarType dtype)"
    " -> Tensor",
    _scaled_fake,
    gradient=False,
)
def _scaled(
    a: Tensor, row_stats: Tensor, col_stats: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    scale = row_stats.reshape(-1, 1) * col_stats.reshape(1, -1)
    found = as_rows(a) * scale * STEPS
    if bias is not None:
        found += bias
    return found.to(dtype).view(a.shape)


def int8_mm_dequant(
    A: Tensor,  # noqa: N803
    row_stats: Tensor,
    col_stats: Tensor,
    out: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The numbers that a product of int8 codes stands for.

    Args:
        A: int32 (..., columns), from int8_linear_matmul.
        row_stats: the scales (absmax) of the left side's rows, float32, as many as A has rows.
        col_stats: those of the right side's rows, float32 (columns,).
        out: memory for the result, of the shape of A: float16, bfloat16 or float32.
        bias: (columns,), floating point, to add.

    Returns:
        A tensor of the shape of A, float16, or `out`.

    Raises:
        InputError: another dtype or shape.
        DeviceError: tensors on different devices.
    """
    checks.of_dtype("A", A, torch.int32)
    checks.of_dtype("row_stats", row_stats, torch.float32)
    checks.of_dtype("col_stats", col_stats, torch.float32)
    if A.dim() == 0:
        raise InputError("A has no dimensions; expected (..., columns)")
    columns = A.shape[-1]
    checks.of_size("row_stats", row_stats, math.prod(A.shape[:-1]), "one per row of A")
    checks.of_size("col_stats", col_stats, columns, "one per column of A")
    named = [("A", A), ("row_stats", row_stats), ("col_stats", col_stats), ("out", out)]
    if bias is not None:
        checks.floats("bias", bias)
        checks.of_size("bias", bias, columns, "one per column of A")
    checks.together([*named, ("bias", bias)])
    if out is None:
        found: Tensor = _scaled(A, row_stats, col_stats, bias, torch.float16)
        return found
    checks.floats("out", out)
    checks.of_shape("out", out, A.shape)
    return out.copy_(_scaled(A, row_stats, col_stats, bias, out.dtype))


# ---- quantization of rows and columns


def _columns_fake(x: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    del threshold
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    return codes, x.new_empty(x.shape[1], dtype=torch.float32)


@operation(
    "int8_quantize_columns(Tensor x, float threshold) -> (Tensor, Tensor)",
    _columns_fake,
    gradient=False,
)
def _columns(x: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Codes and absmax of columns, some at a time: turned, they are rows."""
    codes, absmax = _columns_fake(x, threshold)
    at_once = PANEL if x.device.type == "cpu" else x.numel()
    width = max(LEAST_COLUMNS, at_once // max(len(x), 1))
    for at in range(0, x.shape[1], width):
        some = slice(at, at + width)
        numbers = x[:, some].contiguous().float()
        if threshold > 0:
            numbers = numbers.masked_fill(numbers.abs() >= threshold, 0.0)
        turned, absmax[some], _ = int8.quantize_rows(numbers.t())
        codes[:, some] = turned.t()
    return codes, absmax


def _matrix(x: Any) -> Tensor:
    """A tensor (rows, columns) of the same numbers."""
    checks.floats("A", x)
    if x.dim() == 0:
        raise InputError("A has no dimensions; expected (..., columns)")
    rows = x.numel() // x.shape[-1] if x.shape[-1] else x.shape[:-1].numel()
    found: Tensor = x.detach().reshape(rows, x.shape[-1])
    return found


def _places(columns: Tensor) -> Tensor:
    """The numbers of the columns that have outliers."""
    if columns.is_meta:
        raise InputError("A is on meta: without numbers, there is no telling where outliers are")
    return columns.nonzero().view(-1)


def _checked_threshold(threshold: float) -> float:
    limit = checks.number("threshold", threshold)
    if not limit >= 0:
        raise OptionError(f"threshold={threshold!r}; expected 0 (no outliers) or more")
    return limit


def int8_vectorwise_quant(
    A: Tensor,  # noqa: N803
    threshold: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantize the rows of a tensor to int8, outliers left out.

    Args:
        A: float16, bfloat16 or float32 (..., columns).
        threshold: elements of this magnitude or more are outliers; 0 for none. They do not count
            for the scale of their row; their whole columns get the code 0 where there is more than
            one row, for these are multiplied in full precision.

    Returns:
        The codes (int8, the shape of A); the scales, absmax of each row (rows,), float32; and
        None, or with a threshold the numbers of columns with outliers (int64, ascending). A row
        with NaN or infinity has that as its absmax, and codes 0.

    Raises:
        InputError: another dtype or layout.
        OptionError: a negative threshold.
    """
    limit = _checked_threshold(threshold)
    codes, absmax, columns = int8_ops.quantize(_matrix(A), limit)
    found = _places(columns) if limit > 0 else None
    return codes.view(A.shape), absmax, found


def int8_double_quant(
    A: Tensor,  # noqa: N803
    col_stats: Tensor | None = None,
    row_stats: Tensor | None = None,
    out_col: Tensor | None = None,
    out_row: Tensor | None = None,
    threshold: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Quantize both the rows and the columns of a tensor to int8, outliers left out.

    Args:
        A: float16, bfloat16 or float32 (..., columns).
        col_stats: memory for the scales of columns: float32 (columns,).
        row_stats: memory for the scales of rows: float32 (rows,).
        out_col: memory for the codes by columns: int8, the shape of A.
        out_row: memory for the codes by rows: int8, the shape of A.
        threshold: as in int8_vectorwise_quant.

    Returns:
        Codes by rows and by columns (int8, the shape of A), scales of rows and of columns
        (float32), and None, or with a threshold the numbers of columns with outliers (int64).

    Raises:
        InputError: another dtype, layout or shape.
        OptionError: a negative threshold.
    """
    limit, matrix = _checked_threshold(threshold), _matrix(A)
    memory = {
        "out_row": (out_row, torch.int8, A.shape),
        "out_col": (out_col, torch.int8, A.shape),
        "row_stats": (row_stats, torch.float32, matrix.shape[:1]),
        "col_stats": (col_stats, torch.float32, matrix.shape[1:]),
    }
    for name, (given, dtype, shape) in memory.items():
        if given is not None:
            checks.of_dtype(name, given, dtype)
            checks.of_shape(name, given, shape)
    codes_by_row, rows, outliers = int8_ops.quantize(matrix, limit)
    codes_by_column, columns = _columns(matrix, limit)
    made: Sequence[Tensor] = (codes_by_row, codes_by_column, rows, columns)
    kept = [
        new.view(shape) if given is None else given.copy_(new.view(shape))
        for new, (given, _, shape) in zip(made, memory.values(), strict=True)
    ]
    found = _places(outliers) if limit > 0 else None
    return kept[0], kept[1], kept[2], kept[3], found


def int8_vectorwise_dequant(
    A: Tensor,  # noqa: N803
    stats: Tensor,
) -> Tensor:
    """The numbers of codes that int8_vectorwise_quant made.

    Args:
        A: the codes: int8 (..., columns).
        stats: the scales, absmax of each row: float32, as many as there are rows.

    Returns:
        float32, the shape of A.

    Raises:
        InputError: another dtype or shape.
        DeviceError: tensors on different devices.
    """
    checks.of_dtype("A", A, torch.int8)
    checks.of_dtype("stats", stats, torch.float32)
    if A.dim() == 0:
        raise InputError("A has no dimensions; expected (..., columns)")
    checks.of_size("stats", stats, math.prod(A.shape[:-1]), "one per row of A")
    checks.together([("A", A), ("stats", stats)])
    found: Tensor = int8_ops.dequantize(A, stats, torch.float32)
    return found
