"""Quantize and dequantize with torch operations: any device, the same bits as the native targets.

Every operation is one correctly rounded float32 operation, so that what C++ and CUDA compute can
be held against it bit for bit. `templates/scales.h` says the same of scales in C.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bnbx.kernels.encoding import Encoding
from bnbx.kernels.master import noise
from bnbx.kernels.packing import pack, unpack
from bnbx.kernels.sent_once import sent_once

SMALLEST = 1e-38  # a block's absmax below this is scaled as if it were this; 1 / SMALLEST is finite
LARGEST_FLOAT = torch.finfo(torch.float32).max
LARGEST_BFLOAT16 = torch.finfo(torch.bfloat16).max
E4M3_MOST = 448.0


def encode(
    encoding: Encoding, x: Tensor, rand: Tensor | None = None, seed: int | None = None
) -> list[Tensor]:
    """The parts of `x`; see `bnbx.kernels.coding.encode`."""
    rows, columns = encoding.grid(x.shape)
    blocks = _blocks(encoding, x.reshape(rows, columns).float())
    found: dict[str, Tensor] = {}
    if encoding.quant_type.scale.centered:
        padding = _padding(encoding, blocks, columns)
        center = _center(blocks, padding)
        blocks = torch.where(padding, 0.0, blocks - center[:, None])
        found["center"] = center
    largest = _largest(blocks)
    tensor_scale = None
    if encoding.quant_type.scale.tensor_scale:
        finite = torch.where(blocks.isfinite(), blocks, 0.0)
        tensor_scale = tensor_scale_of(encoding, _largest(finite.reshape(1, -1)))
        found["tensor_scale"] = tensor_scale
    kept, _, inverse = scales_of(encoding, largest, tensor_scale)
    usable = inverse > 0
    scaled = torch.where(usable[:, None], blocks * inverse[:, None], 0.0)
    if encoding.quant_type.grid:  # a block without an inverse keeps signs alone
        signs = torch.where(blocks > 0, 2.0, -2.0)
        scaled = torch.where(inverse[:, None].isinf(), signs, scaled)
    codes = _codes(encoding, scaled, rand, seed, columns)
    zero = torch.full_like(codes, encoding.tables.zero_code)
    codes = torch.where(usable[:, None], codes, zero)
    flat = codes.reshape(-1)[: x.numel()].reshape(rows, columns)
    packed = pack(flat, encoding.quant_type)
    sizes = encoding.shapes(x.shape)
    found["codes"] = packed.reshape(sizes["codes"][0])
    found["scale"] = kept
    if encoding.second is not None:
        mean = mean_of(kept)
        inner = second_encoding(encoding)
        found["scale"], found["second_scale"] = encode(inner, kept - mean)
        found["mean"] = mean.reshape(1)
    return [found[name].reshape(sizes[name][0]) for name in encoding.parts]


def decode(
    encoding: Encoding,
    parts: Sequence[Tensor],
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """The numbers that the parts stand for; see `bnbx.kernels.coding.decode`."""
    found = dict(zip(encoding.parts, parts, strict=True))
    rows, columns = encoding.grid(shape)
    if rows * columns == 0:
        return torch.empty(tuple(shape), dtype=dtype, device=parts[0].device)
    levels = levels_on(encoding, parts[0].device)
    packed = found["codes"].reshape(rows, -1)
    codes = unpack(packed, encoding.quant_type, columns)
    values = _blocks(encoding, levels[codes.long()])
    values = values * factors(encoding, parts, shape)[:, None]
    if "center" in found:
        values = values + found["center"][:, None]
    return values.reshape(-1)[: rows * columns].to(dtype).reshape(tuple(shape))


def factors(encoding: Encoding, parts: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """What levels are multiplied by, in float32, one per block."""
    found = dict(zip(encoding.parts, parts, strict=True))
    if encoding.second is None:
        return factor_of(encoding, found["scale"], found.get("tensor_scale"))
    inner = second_encoding(encoding)
    size = (encoding.blocks(shape),)
    second = decode(inner, [found["scale"], found["second_scale"]], size, torch.float32)
    return second + found["mean"]


def second_encoding(encoding: Encoding) -> Encoding:
    """The encoding of an encoding's scales."""
    assert encoding.second is not None
    return Encoding(encoding.second, encoding.second_block)


def mean_of(scales: Tensor) -> Tensor:
    """The mean (0-d) that is taken from scales before they are quantized.

    It is torch's float32 mean, to the bit, unless the sum of scales, which are finite or NaN, is
    beyond float32.
    """
    if not scales.numel():
        return torch.zeros((), dtype=torch.float32, device=scales.device)
    mean = scales.mean()
    # The sum of smaller ones is not; what vanishes would not count. No branch: devices would wait.
    smaller = (scales * 2.0**-64).mean() * 2.0**64
    return torch.where(mean < torch.inf, mean, smaller.clamp(max=LARGEST_FLOAT))


# ---- tables


@sent_once
def levels_on(encoding: Encoding, device: torch.device) -> Tensor:
    """The numbers that codes are decoded to, before they are scaled (256,); not to be changed."""
    return torch.from_numpy(encoding.tables.levels.copy()).to(device)


def second_levels_on(encoding: Encoding, device: torch.device) -> Tensor:
    """The same of the codes of scales."""
    return levels_on(second_encoding(encoding), device)


@sent_once
def search_on(encoding: Encoding, device: torch.device) -> tuple[Tensor, Tensor]:
    """Thresholds, and codes in the order of their numbers; not to be changed."""
    written = len(encoding.codebook.codes)
    thresholds = torch.from_numpy(encoding.tables.thresholds[: written - 1].copy())
    order = torch.from_numpy(encoding.tables.order[:written].copy())
    return thresholds.to(device), order.to(device)


# ---- scales


def tensor_scale_of(encoding: Encoding, largest: Tensor) -> Tensor:
    """The scale (1,) of a tensor with this largest finite magnitude: e4m3 scales then reach 448."""
    most = E4M3_MOST * encoding.codebook.unit
    found = largest / torch.full((), most, dtype=torch.float32, device=largest.device)
    return torch.where(found > 0, found, 1.0)


def scales_of(
    encoding: Encoding, largest: Tensor, tensor_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What is kept of absmax (blocks,), the factor that it reads as, and what x is multiplied by.

    The last is 0 where a block has no number: NaN or infinity in it, or no scale that it can have.
    """
    unit = torch.full((), encoding.codebook.unit, dtype=torch.float32, device=largest.device)
    finite = largest.isfinite()
    dtype = encoding.quant_type.scale.dtype
    if dtype in ("float32", "bfloat16"):
        most = LARGEST_FLOAT if dtype == "float32" else LARGEST_BFLOAT16
        raised = torch.maximum(largest, unit * SMALLEST if encoding.codebook.unit > 1 else largest)
        kept = torch.where(largest > 0, raised, largest).clamp(max=most).to(getattr(torch, dtype))
        kept = torch.where(finite, kept, torch.nan)  # the one NaN, whatever the conversion makes
        factor = kept.float()
        large = factor >= SMALLEST
        inverse = (unit * (1.0 / torch.where(large, factor, 1.0))).clamp(max=LARGEST_FLOAT)
        limit = torch.tensor(1 / SMALLEST, dtype=torch.float32, device="cpu")
        inverse = torch.where(large, inverse, limit)
        inverse = 1.0 / factor if encoding.quant_type.grid else inverse
        return kept, factor, torch.where(factor.isfinite(), inverse, 0.0)
    if dtype == "e8m0":
        exponent = (largest.view(torch.int32) >> 23) - (unit.view(torch.int32) >> 23)
        byte = torch.where(finite, (exponent + 127).clamp(0, 254), 255)
        # 2**(127 - byte); for byte 254 that is a subnormal number.
        inverse = torch.where(byte < 254, (254 - byte) << 23, 1 << 22).int().view(torch.float32)
        kept = byte.to(torch.uint8)
        return kept, factor_of(encoding, kept, None), torch.where(finite, inverse, 0.0)
    scale = 1.0 if tensor_scale is None else tensor_scale
    step = (torch.where(finite, largest, torch.nan) / unit / scale).clamp(max=E4M3_MOST)
    kept = step.to(torch.float8_e4m3fn).view(torch.uint8)
    factor = factor_of(encoding, kept, tensor_scale)
    usable = finite & (factor > 0)
    inverse = (1.0 / torch.where(usable, factor, 1.0)).clamp(max=LARGEST_FLOAT)
    return kept, factor, torch.where(usable, inverse, 0.0)


def factor_of(encoding: Encoding, kept: Tensor, tensor_scale: Tensor | None) -> Tensor:
    """Scales as they are kept, as float32 factors."""
    dtype = encoding.quant_type.scale.dtype
    if dtype == "e8m0":
        byte = kept.int()
        power = torch.where(byte > 0, byte << 23, 1 << 22).int().view(torch.float32)
        return torch.where(byte == 255, torch.nan, power)
    if dtype == "e4m3":
        kept = kept.view(torch.float8_e4m3fn)
    return kept.float() if tensor_scale is None else kept.float() * tensor_scale


# ---- blocks and codes


def _blocks(encoding: Encoding, x: Tensor) -> Tensor:
    """Rows (rows, columns) as blocks (blocks, elements of one), filled up with zeros."""
    if encoding.per != "block":
        return x
    size = encoding.block_size
    return torch.nn.functional.pad(x, (0, -x.shape[1] % size)).view(-1, size)


def _padding(encoding: Encoding, blocks: Tensor, columns: int) -> Tensor:
    """Where `_blocks` has filled up."""
    if encoding.per != "block":
        return torch.zeros((1, 1), dtype=torch.bool, device=blocks.device)
    return (torch.arange(blocks.numel(), device=blocks.device) >= columns).view_as(blocks)


def _largest(blocks: Tensor) -> Tensor:
    """The largest magnitude of each row; NaN if there is one."""
    if blocks.shape[1] == 0:
        return torch.zeros(blocks.shape[0], dtype=torch.float32, device=blocks.device)
    return (blocks.view(torch.int32) & 0x7FFFFFFF).amax(1).view(torch.float32)


def _center(blocks: Tensor, padding: Tensor) -> Tensor:
    """The mid-point of each row's range, without the padding; NaN if it has no finite range."""
    if blocks.shape[1] == 0:
        return torch.zeros(blocks.shape[0], dtype=torch.float32, device=blocks.device)
    high = torch.where(padding, -torch.inf, blocks).amax(1)
    center = 0.5 * high + 0.5 * torch.where(padding, torch.inf, blocks).amin(1)
    return torch.where(center.isfinite(), center, torch.nan)


def _codes(
    encoding: Encoding, scaled: Tensor, rand: Tensor | None, seed: int | None, columns: int
) -> Tensor:
    device = scaled.device
    written = len(encoding.codebook.codes)
    thresholds, order = search_on(encoding, device)
    ranks = torch.bucketize(scaled, thresholds)
    if rand is None and seed is None:
        return order[ranks]
    ascending = _natural(encoding)[order.long()].to(device)
    below = ranks - (ascending[ranks] > scaled).long()
    low = below.clamp(min=0, max=written - 2)
    span = ascending[low + 1] - ascending[low]
    part = (scaled - ascending[low]) / torch.where(span > 0, span, 1.0)
    place = torch.arange(scaled.numel(), device=device).view_as(scaled)
    if rand is None:
        uniform = (noise(int(seed or 0), place) >> 8).float() * (1 / 16777216)
    else:
        uniform = rand.reshape(-1).float()[place % rand.numel()]
    return order[low + (uniform < part).long()]


def _natural(encoding: Encoding) -> Tensor:
    """The numbers of the table, in code order, in the unit of thresholds."""
    values = encoding.codebook.values
    numbers = [torch.nan if v is None else v for v in values]
    return torch.tensor(numbers, dtype=torch.float32, device="cpu")
