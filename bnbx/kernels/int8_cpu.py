"""LLM.int8() on the CPU: the compiled kernels of templates/int8.cpp.j2, on torch's pool of threads.

What goes in has been checked by `bnbx.kernels.int8`; here are only memory and pointers.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from bnbx.kernels import threads
from bnbx.kernels.c_struct import Field, ctypes_fields
from bnbx.kernels.dtypes import FLOATS
from bnbx.kernels.library import INTEGER, POINTER, Functions, compiled
from bnbx.kernels.source import fill

TEMPLATE = "int8.cpp.j2"
VECTOR = 64  # rows of codes are filled up to the widest vector
GROUP = 64  # outputs that a thread takes at a time
# Rows of input that are in codes at a time: those that take so much of a dense weight's bytes.
BLOCK_SHARE = 0.04
LEAST_ROWS = 64
SLICES_PER_THREAD = 4
ROWS_TOGETHER = 16  # rows of codes are made up to what the processor's matrix unit takes at a time

FUNCTIONS: Functions = {
    "bnbx_int8_rows": ((POINTER, INTEGER, POINTER), None),
    "bnbx_int8_decode": ((POINTER, INTEGER, POINTER), None),
    "bnbx_int8_columns": ((POINTER, INTEGER, POINTER), INTEGER),
    "bnbx_int8_product": ((POINTER, INTEGER, INTEGER, POINTER), None),
    "bnbx_int8_tiles": ((), INTEGER),
}


# What the kernels are given. A `number` is the place of a dtype in FLOATS.
ROWS = (
    Field("x", "const void*"),
    Field("number", "i64", "its dtype"),
    Field("rows", "i64"),
    Field("columns", "i64"),
    Field("stride", "i64"),
    Field("threshold", "double"),
    Field("codes", "i8*"),
    Field("code_stride", "i64"),
    Field("absmax", "float*", "null where only outliers are looked for"),
    Field("outlier", "u8*", "1 for each column that holds one; null without a threshold"),
)
DECODE = (
    Field("codes", "const i8*"),
    Field("absmax", "const float*"),
    Field("to", "void*"),
    Field("number", "i64", "its dtype"),
    Field("rows", "i64"),
    Field("columns", "i64"),
    Field("stride", "i64"),
    Field("to_stride", "i64"),
)
PRODUCT = (
    Field("x", "i8*", "codes, `stride` to a row, filled up to whole vectors here"),
    Field("stride", "i64"),
    Field("absmax", "const float*"),
    Field("sums", "i32*", "room for one per row"),
    Field("numbers", "const void*", "x itself, for its outlier columns"),
    Field("number", "i64", "their dtype"),
    Field("numbers_stride", "i64"),
    Field("rows", "i64"),
    Field("weight", "const i8*"),
    Field("weight_absmax", "const float*"),
    Field("bias", "const float*", "null for none"),
    Field("y", "void*"),
    Field("outs", "i64"),
    Field("depth", "i64"),
    Field("columns", "const i32*", "those of outliers"),
    Field("outliers", "i64"),
    Field("x_outliers", "float*", "room for (rows, outliers)"),
    Field("weight_outliers", "float*", "room for (slices, GROUP, outliers)"),
)


class Rows(ctypes.Structure):
    """The struct `Rows` of int8.cpp.j2."""

    _fields_ = ctypes_fields(ROWS)


class Decode(ctypes.Structure):
    """The struct `Decode` of int8.cpp.j2."""

    _fields_ = ctypes_fields(DECODE)


class Product(ctypes.Structure):
    """The struct `Product` of int8.cpp.j2."""

    _fields_ = ctypes_fields(PRODUCT)


def source() -> str:
    """C++ source of the kernels."""
    return fill(TEMPLATE, rows=ROWS, decode=DECODE, product=PRODUCT, group=GROUP)


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The compiled kernels, made or read from the cache on first use.

    Raises:
        CompileError: there is no compiler, or it refuses the source.
    """
    return compiled(source(), FUNCTIONS)


def quantize_rows(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """See `bnbx.kernels.int8.quantize_rows`; x is (rows, columns) with neighbors side by side."""
    rows, columns = x.shape
    codes = torch.empty((rows, columns), dtype=torch.int8, device="cpu")
    absmax = torch.empty(rows, dtype=torch.float32, device="cpu")
    outlier = torch.zeros(columns, dtype=torch.bool, device="cpu")
    _quantize(x, threshold, codes, absmax, outlier)
    if threshold > 0 and rows > 1:
        codes[:, outlier.nonzero()[:, 0]] = 0
    return codes, absmax, outlier


def _quantize(
    x: Tensor, threshold: float, codes: Tensor | None, absmax: Tensor | None, outlier: Tensor
) -> None:
    job = Rows(
        x.data_ptr(),
        FLOATS.index(x.dtype),
        *x.shape,
        x.stride(0),
        threshold,
        None if codes is None else codes.data_ptr(),
        0 if codes is None else codes.stride(0),
        None if absmax is None else absmax.data_ptr(),
        outlier.data_ptr(),
    )
    library().bnbx_int8_rows(ctypes.byref(job), *threads.threads_for(x.numel()))


def dequantize_rows(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """See `bnbx.kernels.int8.dequantize_rows`; codes is (rows, columns), neighbors side by side."""
    to = torch.empty(codes.shape, dtype=dtype, device="cpu")
    job = Decode(
        codes.data_ptr(),
        absmax.data_ptr(),
        to.data_ptr(),
        FLOATS.index(dtype),
        *codes.shape,
        codes.stride(0),
        codes.shape[1],
    )
    library().bnbx_int8_decode(ctypes.byref(job), *threads.threads_for(codes.numel()))
    return to


def linear(
    x: Tensor, weight: Tensor, weight_absmax: Tensor, bias: Tensor | None, threshold: float
) -> tuple[Tensor, Tensor]:
    """See `bnbx.kernels.int8.linear`; x is (rows, columns) with neighbors side by side."""
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device="cpu")
    bias = None if bias is None else bias.float()
    columns = torch.empty(0, dtype=torch.int32, device="cpu")
    outlier = torch.zeros(x.shape[1] if threshold > 0 else 0, dtype=torch.bool, device="cpu")
    share = int(BLOCK_SHARE * weight.shape[0] * x.element_size())
    together = max(LEAST_ROWS, share // ROWS_TOGETHER * ROWS_TOGETHER)
    if threshold > 0 and x.shape[0] > together:  # a column is one of outliers for all rows
        _quantize(x, threshold, None, None, outlier)
    together = min(together, len(x))
    width = -(-x.shape[1] // VECTOR) * VECTOR + VECTOR
    room = -(-together // ROWS_TOGETHER) * ROWS_TOGETHER
    codes = torch.empty((room, width), dtype=torch.int8, device="cpu")
    absmax = torch.empty(together, dtype=torch.float32, device="cpu")
    for first in range(0, len(x), max(1, together)):
        block = x[first : first + together]
        _quantize(block, threshold, codes, absmax, outlier)
        if threshold > 0 and first == 0:
            columns = _columns(outlier)
        made = (codes, absmax, block, columns)
        _multiply(made, (weight, weight_absmax, bias), y[first : first + together])
    return y, outlier


def _columns(outlier: Tensor) -> Tensor:
    """The columns (count,) int32 that are marked."""
    room = torch.empty(outlier.numel() + 1, dtype=torch.int32, device="cpu")
    count = library().bnbx_int8_columns(outlier.data_ptr(), outlier.numel(), room.data_ptr())
    return room[:count]


def _multiply(
    x: tuple[Tensor, Tensor, Tensor, Tensor],
    weight: tuple[Tensor, Tensor, Tensor | None],
    y: Tensor,
) -> None:
    codes, absmax, numbers, columns = x
    weight_codes, weight_absmax, bias = weight
    rows, (outs, depth), outliers = len(numbers), weight_codes.shape, len(columns)
    count, parallel = threads.threads_for(weight_codes.numel() * max(1, rows // 16))
    slices = min(count * SLICES_PER_THREAD, -(-outs // GROUP)) if count > 1 else 1
    sums = torch.empty(rows, dtype=torch.int32, device="cpu")
    x_outliers = torch.empty(rows * outliers, dtype=torch.float32, device="cpu")
    weight_outliers = torch.empty(slices * GROUP * outliers, dtype=torch.float32, device="cpu")
    job = Product(
        codes.data_ptr(),
        codes.stride(0),
        absmax.data_ptr(),
        sums.data_ptr(),
        numbers.data_ptr(),
        FLOATS.index(numbers.dtype),
        numbers.stride(0),
        rows,
        weight_codes.data_ptr(),
        weight_absmax.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        outs,
        depth,
        columns.data_ptr(),
        outliers,
        x_outliers.data_ptr(),
        weight_outliers.data_ptr(),
    )
    library().bnbx_int8_product(ctypes.byref(job), slices, count, parallel)
