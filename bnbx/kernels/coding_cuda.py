"""Quantize and dequantize on CUDA: compiled by NVRTC through CuPy, on torch's current stream.

Nothing here waits for the device. What a scale needs to know of the whole tensor is found
by a launch of its own, and read by the next one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnbx.kernels.coding_cpu import ascending_numbers
from bnbx.kernels.coding_source import CodingPlan, arguments, render_coding
from bnbx.kernels.cuda_module import PIECE, WARPS, CudaModule, Launch
from bnbx.kernels.dtypes import DTYPE_NAMES
from bnbx.kernels.encoding import Encoding
from bnbx.kernels.sent_once import sent_once

TEMPLATE = "coding.cu.j2"
NOTHING = (0, -(2**31), -(2**31))  # the struct Whole of a tensor before it is measured
NAMES = ("measure", "encode", "decode")


def source(plan: CodingPlan) -> str:
    """CUDA source of `plan`."""
    return render_coding(plan, TEMPLATE)


def _blocks(pieces: int) -> int:
    return max(-(-pieces // WARPS), 1)


def encode_launches(
    plan: CodingPlan,
    shape: Sequence[int],
    numbers: Any,
    whole: Any,
    parts: Mapping[str, Any],
    noise: tuple[Any, int, Any, int, int],
) -> list[Launch]:
    """The kernels that quantize, in order; memory as the launcher holds it, None for none.

    `noise` is rand, how many that are, the table's numbers ascending, how many, and the seed.
    """
    encoding = plan.encoding
    rows, columns = encoding.grid(shape)
    count = rows * columns
    rand, rand_count, ascending, written, seed = noise
    found = []
    if _measures(encoding):
        pieces = -(-count // PIECE)
        found.append(Launch("measure", _blocks(pieces), (numbers, np.int64(count), whole)))
    units = rows if encoding.per == "row" else -(-columns // PIECE)
    sizes = map(np.int64, (rows, columns))
    noisy = (rand, np.int64(rand_count), ascending, np.int64(written), np.int64(seed))
    found.append(
        Launch("encode", _blocks(units), (numbers, *sizes, whole, *noisy, *arguments(parts)))
    )
    return found


def decode_launch(
    plan: CodingPlan,
    shape: Sequence[int],
    numbers: Any,
    start: int,
    count: int,
    parts: Mapping[str, Any],
) -> Launch:
    """The kernel that dequantizes `count` elements from number `start` on."""
    _, columns = plan.encoding.grid(shape)
    pieces = -(-count // PIECE) + 1
    if plan.encoding.per == "row":
        pieces = count // max(columns, 1) * -(-columns // PIECE)
    sizes = map(np.int64, (columns, start, count))
    return Launch("decode", _blocks(pieces), (numbers, *sizes, *arguments(parts)))


def _measures(encoding: Encoding) -> bool:
    """Whether scales depend on the whole tensor."""
    return encoding.quant_type.scale.tensor_scale or encoding.per == "tensor"


@sent_once
def _nothing(index: int) -> Tensor:
    return torch.tensor(NOTHING, dtype=torch.int32, device=torch.device("cuda", index))


@lru_cache(maxsize=512)
def _kernel(plan: CodingPlan, index: int) -> CudaModule:
    return CudaModule(source(plan), NAMES, torch.device("cuda", index), plan.describe())


@sent_once
def packed_tables(encoding: Encoding, index: int) -> dict[str, Tensor]:
    """The tables of an encoding as kernels read them, by name, on the device of this index."""
    device = torch.device("cuda", index)
    second = encoding.second_tables
    found = {"tables": torch.from_numpy(encoding.tables.pack()).to(device)}
    if second is not None:
        found["second_tables"] = torch.from_numpy(second.pack()).to(device)
    return found


@sent_once
def _ascending(encoding: Encoding, index: int) -> Tensor:
    return torch.from_numpy(ascending_numbers(encoding)).to(torch.device("cuda", index))


def ready(encoding: Encoding) -> None:
    """Make the kernel of an encoding on torch's current device.

    Raises:
        TargetError: CuPy is missing, or NVRTC refuses the source.
    """
    _kernel(CodingPlan(encoding, "float32"), torch.cuda.current_device())


def held_parts(encoding: Encoding, parts: Sequence[Tensor], index: int) -> dict[str, Tensor]:
    """The parts by name, with the encoding's tables on the device of this index."""
    return dict(zip(encoding.parts, parts, strict=True)) | packed_tables(encoding, index)


def encode(
    encoding: Encoding,
    x: Tensor,
    rand: Tensor | None = None,
    seed: int | None = None,
    out: Sequence[Tensor] = (),
) -> list[Tensor]:
    """The parts of `x`, whose scales are not quantized yet; see `bnbx.kernels.coding.encode`."""
    assert encoding.second is None
    x = x.contiguous()
    parts = encoding.empty(x.shape, x.device, out)
    plan = CodingPlan(encoding, DTYPE_NAMES[x.dtype], rand is not None or seed is not None)
    whole = _nothing(x.device.index).clone() if _measures(encoding) else None
    rand = None if rand is None else rand.contiguous()
    numbers = _ascending(encoding, x.device.index) if plan.stochastic else None
    counts = [0 if given is None else given.numel() for given in (rand, numbers)]
    noise = (rand, counts[0], numbers, counts[1], seed or 0)
    held = held_parts(encoding, parts, x.device.index)
    _run(plan, x, encode_launches(plan, x.shape, x, whole, held, noise))
    return parts


def decode(
    encoding: Encoding, parts: Sequence[Tensor], shape: Sequence[int], out: Tensor, start: int
) -> None:
    """Decode the elements from number `start` on to `out`; see `coding.decode_rows`."""
    if out.numel() == 0:
        return
    plan = CodingPlan(encoding, DTYPE_NAMES[out.dtype])
    held = held_parts(encoding, parts, out.device.index)
    _run(plan, out, [decode_launch(plan, shape, out, start, out.numel(), held)])


def _run(plan: CodingPlan, near: Tensor, launches: Sequence[Launch]) -> None:
    _kernel(plan, near.device.index).launch(launches)
