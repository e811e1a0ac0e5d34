"""LLM.int8() on a GPU: the kernels of templates/int8.cu.j2 around torch's integer product.

The functions take the launcher as an argument, so that tests run the same calls in an emulator. No
call waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnbx.kernels import int8_reference
from bnbx.kernels.cuda_module import CudaModule, Launch
from bnbx.kernels.dtypes import DTYPE_NAMES
from bnbx.kernels.source import fill

TEMPLATE = "int8.cu.j2"
ROWS, OUTS = 32, 64  # a tile of results
LEAST_ROWS = 32  # of codes in a product: cuBLAS takes more than 16
MULTIPLE = 8  # of codes in a row, and of outputs
NAMES = (
    "int8_columns",
    "int8_clear",
    *(
        f"int8_{name}_{dtype}"
        for name in ("rows", "decode", "finish")
        for dtype in DTYPE_NAMES.values()
    ),
)

# Runs a kernel: its name, how many blocks it has work for, its arguments (tensors and numbers).
Launcher = Callable[[str, int, tuple[Any, ...]], None]


def source() -> str:
    """CUDA source of the kernels."""
    return fill(TEMPLATE, rows=ROWS, outs=OUTS)


@lru_cache(maxsize=16)
def kernels(device: int) -> CudaModule:
    """The compiled kernels on a device.

    Raises:
        TargetError: CuPy is missing, or NVRTC refuses the source.
    """
    return CudaModule(source(), NAMES, torch.device("cuda", device), "LLM.int8()")


def launch(name: str, blocks: int, arguments: tuple[Any, ...]) -> None:
    """Run a kernel on torch's current stream of the device that the tensors are on."""
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    kernels(device.index).launch([Launch(f"int8_{name}", blocks, arguments)])


def quantize_rows(
    x: Tensor, threshold: float, launch: Launcher = launch
) -> tuple[Tensor, Tensor, Tensor]:
    """See `bnbx.kernels.int8.quantize_rows`; x is (rows, columns) with neighbors side by side."""
    codes, absmax, outlier = _quantize(x, threshold, launch)
    if threshold > 0 and len(x) > 1:
        _clear(codes, *_columns(outlier, launch), launch)
    return codes, absmax, outlier.bool()


def dequantize_rows(
    codes: Tensor, absmax: Tensor, dtype: torch.dtype, launch: Launcher = launch
) -> Tensor:
    """See `bnbx.kernels.int8.dequantize_rows`; codes is (rows, columns), neighbors side by side."""
    to = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    sizes = (*map(np.int64, codes.shape), np.int64(codes.stride(0)))
    if to.numel():
        launch(f"decode_{DTYPE_NAMES[dtype]}", len(codes), (codes, absmax, *sizes, to))
    return to


def linear(
    x: Tensor,
    weight: Tensor,
    weight_absmax: Tensor,
    bias: Tensor | None,
    threshold: float,
    launch: Launcher = launch,
) -> tuple[Tensor, Tensor]:
    """See `bnbx.kernels.int8.linear`; x is (rows, columns) with neighbors side by side."""
    rows, outs, columns = len(x), *weight.shape
    y = torch.empty((rows, outs), dtype=x.dtype, device=x.device)
    codes, absmax, outlier = _quantize(x, threshold, launch)
    list_, count = outlier, torch.zeros(1, dtype=torch.int32, device=x.device)
    if threshold > 0:
        list_, count = _columns(outlier, launch)
        _clear(codes, list_, count, launch)
    if y.numel():
        sums = _products(codes, weight)
        offset = absmax if bias is None else bias.float()
        tiles = -(-rows // ROWS) * -(-outs // OUTS)
        sizes = map(np.int64, (rows, outs, columns))
        launch(
            f"finish_{DTYPE_NAMES[x.dtype]}",
            tiles,
            (
                *(sums, x, np.int64(x.stride(0)), absmax, weight, weight_absmax, offset),
                *(np.int32(bias is not None), list_, count, *sizes, y),
            ),
        )
    return y, outlier.bool() if threshold > 0 else outlier[:0].bool()


def _quantize(x: Tensor, threshold: float, launch: Launcher) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, absmax, and marks (int32) of the columns with outliers, which still have codes."""
    rows, columns = x.shape
    codes = torch.empty((rows, columns), dtype=torch.int8, device=x.device)
    absmax = torch.zeros(rows, dtype=torch.float32, device=x.device)
    outlier = torch.zeros(columns, dtype=torch.int32, device=x.device)
    sizes = (np.int64(rows), np.int64(columns), np.int64(x.stride(0)), np.float32(threshold))
    if codes.numel():
        launch(f"rows_{DTYPE_NAMES[x.dtype]}", rows, (x, *sizes, codes, absmax, outlier))
    return codes, absmax, outlier


def _columns(outlier: Tensor, launch: Launcher) -> tuple[Tensor, Tensor]:
    """The marked columns, in order, and how many they are: both on the device."""
    list_ = torch.empty_like(outlier)
    count = torch.zeros(1, dtype=torch.int32, device=outlier.device)
    if outlier.numel():
        launch("columns", 1, (outlier, np.int64(outlier.numel()), list_, count))
    return list_, count


def _clear(codes: Tensor, list_: Tensor, count: Tensor, launch: Launcher) -> None:
    if codes.numel():
        sizes = map(np.int64, codes.shape)
        launch("clear", len(codes), (codes, *sizes, list_, count))


def _products(codes: Tensor, weight: Tensor) -> Tensor:
    """The sums of products, int32 (rows, outs): by cuBLAS where it takes the sizes."""
    if codes.shape[1] % MULTIPLE or len(weight) % MULTIPLE or not codes.shape[1]:
        return int8_reference.products(codes, weight)
    rows = len(codes)
    if rows < LEAST_ROWS:
        codes = torch.nn.functional.pad(codes, (0, 0, 0, LEAST_ROWS - rows))
    sums: Tensor = torch._int_mm(codes, weight.t())
    return sums[:rows]
