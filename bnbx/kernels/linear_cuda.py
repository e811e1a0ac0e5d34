"""Products with a quantized weight on CUDA: compiled by NVRTC through CuPy, on torch's stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnbx.kernels.coding_cuda import held_parts
from bnbx.kernels.coding_source import arguments
from bnbx.kernels.cuda_module import THREADS, WARPS, CudaModule, Launch
from bnbx.kernels.dtypes import DTYPE_NAMES
from bnbx.kernels.encoding import Encoding
from bnbx.kernels.linear_source import INPUTS, ROWS, LinearPlan, plan_for, render_linear

TEMPLATE = "linear.cu.j2"
NAMES = (*(f"multiply_{count}" for count in INPUTS), "decode_columns")
# Fewer are multiplied as codes are read; more take two launches, and a panel as many (H100).
FEW_ROWS = 5


def source(plan: LinearPlan) -> str:
    """CUDA source of `plan`."""
    return render_linear(plan, TEMPLATE)


def multiply_launches(
    shape: tuple[int, int],
    x: Tensor,
    bias: Tensor | None,
    y: Tensor,
    held: Mapping[str, Any],
) -> list[Launch]:
    """The kernels that multiply all rows of x, both (rows, in) and y (rows, out) contiguous."""
    found = []
    sizes = tuple(map(np.int64, shape))
    parts = arguments(held)
    blocks = -(-shape[0] // (WARPS * ROWS))
    most, count = max(INPUTS), x.shape[0]
    for first in range(0, count, most):
        rows = min(count - first, most)
        some, to = (x, y) if rows == count else (x[first : first + rows], y[first : first + rows])
        kernel = next(inputs for inputs in INPUTS if inputs >= rows)
        given = (*sizes, some, np.int64(rows), bias, to, *parts)
        found.append(Launch(f"multiply_{kernel}", blocks, given))
    return found


def decode_launch(
    shape: tuple[int, int], first: int, out: Tensor, held: Mapping[str, Any]
) -> Launch:
    """The kernel that fills `out` (rows of the weight, some columns) from column `first` on."""
    sizes = map(np.int64, (*shape, first, out.shape[1]))
    return Launch("decode_columns", -(-out.numel() // THREADS), (*sizes, out, *arguments(held)))


@lru_cache(maxsize=512)
def _kernel(plan: LinearPlan, index: int) -> CudaModule:
    return CudaModule(source(plan), NAMES, torch.device("cuda", index), plan.describe())


def ready(encoding: Encoding) -> None:
    """Make the kernel of an encoding on torch's current device.

    Raises:
        TargetError: CuPy is missing, or NVRTC refuses the source.
    """
    _kernel(plan_for(encoding, "float32"), torch.cuda.current_device())


def few_rows(encoding: Encoding, dtype: torch.dtype, inner: int) -> float:
    """Fewer rows than these are multiplied as codes are read, more by panels."""
    del encoding, dtype, inner  # the same for all of them
    return FEW_ROWS


def fast_panels(dtype: torch.dtype) -> bool:
    """Whether torch is fast with panels for numbers of a dtype."""
    del dtype  # with any
    return True


def multiply(
    encoding: Encoding,
    parts: Sequence[Tensor],
    shape: tuple[int, int],
    x: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """The product x (rows, in) @ weight.T + bias, with the weight decoded in registers."""
    index = x.device.index
    x = x.contiguous()
    bias = bias if bias is None else bias.contiguous()
    y = x.new_empty((x.shape[0], shape[0]))
    held = held_parts(encoding, parts, index)
    compiled = _kernel(plan_for(encoding, DTYPE_NAMES[x.dtype]), index)
    compiled.launch(multiply_launches(shape, x, bias, y, held))
    return y


def decode_columns(
    encoding: Encoding, parts: Sequence[Tensor], shape: tuple[int, int], first: int, out: Tensor
) -> None:
    """Fill `out` (rows of the weight, some columns) with the columns from number `first` on."""
    index = out.device.index
    each = decode_launch(shape, first, out, held_parts(encoding, parts, index))
    plan = plan_for(encoding, DTYPE_NAMES[out.dtype])
    _kernel(plan, index).launch([each])
