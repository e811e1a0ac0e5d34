"""LLM.int8() on the CPU: the compiled kernels of templates/int8.cpp.j2, on torch's pool of threads.

What goes in has been checked by `bnbx.kernels.int8`; here are only memory and pointers.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from bnbx.kernels import threads
from bnbx.kernels.library import INTEGER, POINTER, Functions, compiled
from bnbx.kernels.source import fill

TEMPLATE = "int8.cpp.j2"
NUMBERS = (torch.float32, torch.bfloat16, torch.float16)  # in the order that the source counts them
VECTOR = 64  # rows of codes are filled up to the widest vector
GROUP = 64  # outputs that a thread takes at a time, as in the source
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


def _structure(name: str, fields: str) -> type[ctypes.Structure]:
    """A struct of the source: pointers (`*x`), 64-bit integers, and doubles (`.x`)."""
    kinds = {"*": POINTER, ".": ctypes.c_double}
    found = [(f.lstrip("*."), kinds.get(f[0], INTEGER)) for f in fields.split()]
    return type(name, (ctypes.Structure,), {"_fields_": found})


Rows = _structure(
    "Rows", "*x number rows columns stride .threshold *codes code_stride *absmax *outlier"
)
Decode = _structure("Decode", "*codes *absmax *to number rows columns stride to_stride")
Product = _structure(
    "Product",
    "*x stride *absmax *sums *numbers number numbers_stride rows *weight *weight_absmax *bias *y "
    "outs depth *columns outliers *x_outliers *weight_outliers",
)


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The compiled kernels, made or read from the cache on first use.

    Raises:
        CompileError: there is no compiler, or it refuses the source.
    """
    return compiled(fill(TEMPLATE), FUNCTIONS)


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
        NUMBERS.index(x.dtype),
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
        NUMBERS.index(dtype),
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
        NUMBERS.index(numbers.dtype),
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
