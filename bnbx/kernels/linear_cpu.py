"""Products with a quantized weight on a CPU: C++ compiled at run time, on torch's pool of threads.

What goes in has been checked by `bnbx.kernels.linear`; here are only memory and pointers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from bnbx.errors import CompileError
from bnbx.kernels import processor, threads
from bnbx.kernels.c_struct import ctypes_fields
from bnbx.kernels.coding_cpu import packed_tables
from bnbx.kernels.coding_source import PARTS
from bnbx.kernels.dtypes import DTYPE_NAMES
from bnbx.kernels.encoding import Encoding
from bnbx.kernels.library import INTEGER, POINTER, Functions, compiled
from bnbx.kernels.linear_source import JOB, LinearPlan, plan_for, render_linear

TEMPLATE = "linear.cpp.j2"
FUNCTIONS: Functions = {
    "bnbx_room_for": ((INTEGER, INTEGER), INTEGER),
    "bnbx_in_integers": ((POINTER, INTEGER), INTEGER),
    "bnbx_multiply": ((POINTER, INTEGER, POINTER), None),
    "bnbx_decode_columns": ((POINTER, INTEGER, POINTER), None),
    "bnbx_has_tiles": ((), INTEGER),
    "bnbx_room_for_tiles": ((INTEGER, INTEGER), INTEGER),
    "bnbx_multiply_tiles": ((POINTER, *(INTEGER,) * 5, POINTER), None),
}
WHOLE = 8  # width of codes that may be whole numbers
NARROW = 4  # widths up to this have tables that fit into registers
# How many rows of x it takes until panels are faster: (narrow codes, wide codes). Measured with
# `python benchmarks/linear.py --crossover`, 4096 x 4096, one thread of a Zen 5; milliseconds of CPU
# time by codes and by panels:
#
#     rows      1          4          8          12          16          64            512
#   float32
#     nf4       0.36 1.90  1.0 3.6    2.4 4.9    3.2 6.0     4.3  7.2    18 22         173 177
#     dynamic8  0.97 2.31  2.9 4.3    5.8 5.4    8.9 6.6     12   7.9    46 23         389 178
#   bfloat16
#     nf4       0.37 2.62  1.1 2.7    2.2 2.9    3.2 3.2     4.2  3.4    17  6.4       168 38
#     dynamic8  0.97 2.94  1.9 2.9    4.1 3.2    5.3 3.4     7.5  3.6    30  6.8       275 37
#   float16
#     nf4       0.37 2.27                                    4.3  18     17 70
#     dynamic8  0.95 2.55                                    7.5  18     34 69
#
# torch's float32 product leaves half of that processor unused; 64 is for those where it does not.
FEW_ROWS: dict[torch.dtype, tuple[float, float]] = {
    torch.float32: (64, 8),
    torch.bfloat16: (12, 6),
    torch.float16: (inf, inf),
}
# Where panels are float32 whatever x is; the same of one thread of a Zen 3, by AVX2:
#
#     rows      1          4          8          16         24         32         64
#   float32
#     nf4       1.5 4.6    3.0 9.1    5.9 11     12 14      18 17      23 20      45 32
#     nf5                  5.1 13     10  15     20 18      30 21      41 24
#     dynamic8             7.4 13     15  15     29 18      43 20      56 23
#   bfloat16
#     nf4       1.5 9.5    2.9 14     5.8 16     12 20      17 24      23 28      46 45
#     dynamic8             7.8 19     15  20     30 23      45 27      59 32      122 48
FEW_ROWS_OF_FLOATS: dict[torch.dtype, tuple[float, float]] = {
    torch.float32: (24, 9),
    torch.bfloat16: (64, 13),
    torch.float16: (64, 13),
}
# Where integers are multiplied (templates/cpu_linear_fixed.h), on that Zen 3:
#
#     rows         1            4           16           32           64           512
#   float32
#     int8_block   1.1  8.2     3.4 12      13  17       34  33       54  35       465 258
#   bfloat16
#     nf4          0.75 9.5     1.9 14      7.7 20                    35  53       242 279
#     int8_block   1.2  14      2.0 16      8.1 28       17  32       32  47       340 388
#   float16
#     int8_block   1.4  17                  15  28       31  30       61  49
FEW_ROWS_OF_INTEGERS: dict[torch.dtype, float] = {
    torch.float32: 32,
    torch.bfloat16: inf,
    torch.float16: 32,
}
# Rows of bfloat16 where many go by a matrix unit (linear_tiles.py): by codes and by tiles, least
# wall-clock times on an Emerald Rapids that others used too:
#
#     rows      1          4          6          8          10         12         16
#     nf4       0.66 3.4   1.4 3.5    2.2 3.6    2.6 3.6    3.5 3.7    4.0 3.8    5.2 4.3
#     dynamic8  3.6  6.8   4.7 7.7    8.3 7.4    9.6 7.8    12  7.4    11  5.5    14  5.3
FEW_ROWS_BY_TILES = (11, 6)
WORK = 16  # a product takes about so much less time than an element of what threads count by


class Job(ctypes.Structure):
    """The struct `Job` of linear.cpp.j2."""

    _fields_ = ctypes_fields(JOB, Parts=PARTS)


@lru_cache(maxsize=512)
def kernel(plan: LinearPlan) -> ctypes.CDLL:
    """The kernels of `plan`, compiled or read from the cache on first use.

    Raises:
        CompileError: there is no compiler, or it refuses the source.
    """
    return compiled(render_linear(plan, TEMPLATE), FUNCTIONS)


def ready(encoding: Encoding) -> None:
    """Make the kernel of an encoding.

    Raises:
        CompileError: there is no compiler, or it refuses the source.
    """
    kernel(plan_for(encoding, "float32"))


@lru_cache(maxsize=1024)
def has_tiles(encoding: Encoding, dtype: torch.dtype) -> bool:
    """Whether there are products by the processor's matrix unit; see `linear_tiles`."""
    if dtype != torch.bfloat16:
        return False
    try:
        return bool(compiled_for(encoding, dtype).library.bnbx_has_tiles())
    except CompileError:
        return False


def few_rows(encoding: Encoding, dtype: torch.dtype, inner: int) -> float:
    """Fewer rows than these are multiplied faster as codes are read than by panels."""
    if _in_integers(encoding, dtype, inner):
        return FEW_ROWS_OF_INTEGERS[dtype]
    narrow, wide = FEW_ROWS_BY_TILES if has_tiles(encoding, dtype) else _limits()[dtype]
    return narrow if encoding.bits <= NARROW else wide


@lru_cache(maxsize=1024)
def _in_integers(encoding: Encoding, dtype: torch.dtype, inner: int) -> bool:
    """Whether the kernel does so; it is not made to be asked where it cannot."""
    narrow = encoding.bits <= NARROW and dtype == torch.bfloat16
    if not processor.lacks_16_bits() or not (narrow or encoding.bits == WHOLE):
        return False
    try:
        found = compiled_for(encoding, dtype)
    except CompileError:
        return False
    return bool(found.library.bnbx_in_integers(found.tables, inner))


def fast_panels(dtype: torch.dtype) -> bool:
    """Whether torch is fast with panels for numbers of a dtype."""
    return min(_limits()[dtype]) < inf


def _limits() -> dict[torch.dtype, tuple[float, float]]:
    return FEW_ROWS_OF_FLOATS if processor.lacks_16_bits() else FEW_ROWS


class _Compiled(NamedTuple):
    """The kernels for an encoding, the addresses of its tables, and which part each of PARTS is."""

    library: ctypes.CDLL
    tables: int
    second: int | None
    order: tuple[int | None, ...]
    memory: object
    """Of the tables, so that it stays."""


@lru_cache(maxsize=1024)
def compiled_for(encoding: Encoding, dtype: torch.dtype) -> _Compiled:
    """The kernels for products of an encoding with numbers of a dtype."""
    codes, scales = packed_tables(encoding)
    second = scales.ctypes.data if scales is not None else None
    number = {name: i for i, name in enumerate(encoding.parts)}
    *order, _, _ = (number.get(field.name) for field in PARTS)  # the last two are the tables
    found = kernel(plan_for(encoding, DTYPE_NAMES[dtype]))
    return _Compiled(found, codes.ctypes.data, second, tuple(order), (codes, scales))


def job_for(
    encoding: Encoding, parts: Sequence[Tensor], shape: tuple[int, int], y: Tensor
) -> tuple[ctypes.CDLL, Job]:
    """The kernels, and a job with the weight and the result y."""
    found = compiled_for(encoding, y.dtype)
    addresses = [None if i is None else parts[i].data_ptr() for i in found.order]
    job = Job(*addresses, found.tables, found.second, *shape, y=y.data_ptr())
    return found.library, job


def multiply(
    encoding: Encoding,
    parts: Sequence[Tensor],
    shape: tuple[int, int],
    x: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """The product x (rows, in) @ weight.T + bias, with the weight decoded in registers."""
    x = x.contiguous()
    bias = bias if bias is None else bias.contiguous()
    y = x.new_empty((x.shape[0], shape[0]))
    compiled, job = job_for(encoding, parts, shape, y)
    room = x.new_empty(compiled.bnbx_room_for(shape[1], x.shape[0]), dtype=torch.float32)
    job.inputs, job.x, job.room = x.shape[0], x.data_ptr(), room.data_ptr()
    job.bias = None if bias is None else bias.data_ptr()
    rows = min(x.shape[0], 32 if _in_integers(encoding, x.dtype, shape[1]) else 4)  # in one go
    count, parallel = threads.threads_for(shape[0] * shape[1] * rows // WORK)
    compiled.bnbx_multiply(ctypes.byref(job), count, parallel)
    return y


def decode_columns(
    encoding: Encoding, parts: Sequence[Tensor], shape: tuple[int, int], first: int, out: Tensor
) -> None:
    """Fill `out` (rows of the weight, some columns) with the columns from number `first` on."""
    compiled, job = job_for(encoding, parts, shape, out)
    job.first, job.last = first, first + out.shape[1]
    count, parallel = threads.threads_for(out.numel())
    compiled.bnbx_decode_columns(ctypes.byref(job), count, parallel)
