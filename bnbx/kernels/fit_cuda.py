"""The sums that a fit of scales is made of, on CUDA: `fit.cu.j2`, compiled by NVRTC through CuPy.

A few lanes of a warp take a short block, all of them a longer one, and one that is longer than a
span is cut into spans, so that a whole tensor with one scale keeps the device as busy as many
blocks do. The sums of spans are added up by torch. Nothing here waits for the device.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnbx.kernels.coding_cuda import packed_tables
from bnbx.kernels.cuda_module import LANES, THREADS, CudaModule, Launch
from bnbx.kernels.encoding import Encoding
from bnbx.kernels.fit_cpu import SUMS, TAKEN, plain, render_fit

TEMPLATE = "fit.cu.j2"
NAMES = ("sums", "write")
SPAN = 1024  # elements of a long block that a warp takes; few enough for sums in float32


def source(encoding: Encoding) -> str:
    """CUDA source for an encoding."""
    return render_fit(encoding, TEMPLATE)


def empty_sums(x: Tensor) -> Tensor:
    """Memory for the sums of each span, (5, blocks, spans)."""
    spans = -(-x.shape[1] // SPAN)
    return torch.empty((SUMS, len(x), spans), dtype=torch.float32, device=x.device)


def joined(found: Tensor) -> Tensor:
    """The sums of blocks, (5, blocks), from those of their spans."""
    return found[:, :, 0] if found.shape[2] == 1 else found.sum(2, dtype=torch.float64).float()


def sums_launch(
    x: Tensor,
    factor: Tensor,
    inverse: Tensor,
    center: Tensor | None,
    norm: Tensor,
    codes: Tensor | None,
    tables: Any,
    found: Tensor,
) -> Launch:
    """The kernel that fills `found`, which `empty_sums` makes."""
    of_blocks = [None if each is None else plain(each) for each in (factor, inverse, center, norm)]
    packed = (codes, np.int64(0 if codes is None else codes.stride(0)))
    return _launch("sums", x, (*of_blocks, *packed, tables, found))


def write_launch(
    x: Tensor,
    inverse: Tensor,
    center: Tensor | None,
    changed: Tensor,
    codes: Tensor,
    tables: Any,
) -> Launch:
    """The kernel that packs the codes of the blocks that have changed."""
    of_blocks = [None if each is None else plain(each) for each in (inverse, center)]
    packed = (codes, np.int64(codes.stride(0)))
    return _launch("write", x, (*of_blocks, changed.contiguous(), *packed, tables))


def _launch(name: str, x: Tensor, arguments: tuple[Any, ...]) -> Launch:
    blocks, columns = x.shape
    lanes = 1
    while lanes < LANES and lanes * TAKEN < columns:
        lanes *= 2
    groups = blocks * -(-columns // SPAN)
    sizes = (np.int64(blocks), np.int64(columns), np.int64(SPAN), np.int32(lanes))
    return Launch(name, -(-groups * lanes // THREADS), (x.contiguous(), *sizes, *arguments))


@lru_cache(maxsize=512)
def _kernel(encoding: Encoding, index: int) -> CudaModule:
    if encoding.second is not None:  # how scales are quantized does not matter to it
        return _kernel(replace(encoding, second=None), index)
    what = f"fitted scales of {encoding.describe()}"
    return CudaModule(source(encoding), NAMES, torch.device("cuda", index), what)


def sums(
    encoding: Encoding,
    x: Tensor,
    factor: Tensor,
    inverse: Tensor,
    center: Tensor | None,
    norm: Tensor,
    codes: Tensor | None,
) -> Tensor:
    """Five numbers a block, (5, blocks); see `bnbx.kernels.fit_reference.sums`."""
    index, found = x.device.index, empty_sums(x)
    tables = packed_tables(encoding, index)["tables"]
    launch = sums_launch(x, factor, inverse, center, norm, codes, tables, found)
    _kernel(encoding, index).launch([launch])
    return joined(found)


def write(
    encoding: Encoding,
    x: Tensor,
    inverse: Tensor,
    center: Tensor | None,
    changed: Tensor,
    codes: Tensor,
) -> None:
    """Pack the codes of the blocks that have changed; see `bnbx.kernels.fit_reference.write`."""
    index = x.device.index
    tables = packed_tables(encoding, index)["tables"]
    _kernel(encoding, index).launch([write_launch(x, inverse, center, changed, codes, tables)])
