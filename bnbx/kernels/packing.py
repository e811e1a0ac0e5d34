"""How codes lie in bytes: one after the other without gaps, the first in the highest bits.

That is the order in which bitsandbytes packs 4-bit codes. Eight codes of any width fill whole
bytes; a last byte is filled up with zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bnbx.registry.quant_type import QuantType


def packed_size(quant_type: QuantType, numel: int) -> int:
    """Bytes that the codes of `numel` elements take."""
    return -(-numel * quant_type.bits // 8)


def bytes_of(quant_type: QuantType, numel: int) -> int:
    """Bytes between the codes of one block of `numel` elements and those of the next.

    `numel` is a multiple of 8, so that codes fill whole bytes.
    """
    assert numel % 8 == 0, numel
    return numel * quant_type.bits // 8


def codes_at(packed: Tensor, quant_type: QuantType, places: Tensor) -> Tensor:
    """The codes of some elements, uint8 of the shape of `places` (int64, on the same device)."""
    first = places * quant_type.bits
    byte, shift = first // 8, 16 - quant_type.bits - first % 8
    after = (byte + 1).clamp(max=packed.numel() - 1)
    word = (packed[byte].long() << 8) | packed[after].long()
    codes: Tensor = (word >> shift) & (2**quant_type.bits - 1)
    return codes.to(torch.uint8)


def filled_with(code: int, quant_type: QuantType) -> list[int]:
    """The bytes that repeat where every element has this code."""
    one = torch.full((8,), code, dtype=torch.uint8, device="cpu")
    period: list[int] = pack(one, quant_type).tolist()
    return period[:1] if len(set(period)) == 1 else period


def pack(codes: Tensor, quant_type: QuantType) -> Tensor:
    """Codes (..., numel) uint8 to bytes (..., packed_size) uint8; each row begins in a byte."""
    bits, numel = quant_type.bits, codes.shape[-1]
    if bits == 8:
        return codes
    together = 8 if 8 % bits else 8 // bits  # codes that fill whole bytes
    rows = torch.nn.functional.pad(codes, (0, -numel % together))
    rows = rows.view(*codes.shape[:-1], -(-numel // together), together)
    word = torch.zeros_like(rows[..., 0], dtype=torch.int64)
    for place in range(together):
        word |= rows[..., place].long() << (bits * (together - 1 - place))
    count = together * bits // 8
    parts = [(word >> (8 * (count - 1 - i))) & 0xFF for i in range(count)]
    packed = torch.stack(parts, -1).to(torch.uint8).flatten(-2)
    return packed[..., : packed_size(quant_type, numel)].contiguous()


def unpack(packed: Tensor, quant_type: QuantType, numel: int | None = None) -> Tensor:
    """Bytes (..., packed_size) uint8 to codes (..., numel) uint8; None for all that they hold."""
    bits = quant_type.bits
    if bits == 8:
        return packed
    size = packed.shape[-1]
    together = 8 if 8 % bits else 8 // bits
    count = together * bits // 8
    rows = torch.nn.functional.pad(packed, (0, -size % count))
    rows = rows.view(*packed.shape[:-1], -(-size // count), count)
    word = torch.zeros_like(rows[..., 0], dtype=torch.int64)
    for i in range(count):
        word |= rows[..., i].long() << (8 * (count - 1 - i))
    shifts = [bits * (together - 1 - place) for place in range(together)]
    codes = torch.stack([(word >> shift) & (2**bits - 1) for shift in shifts], -1)
    held = size * 8 // bits if numel is None else numel
    return codes.flatten(-2)[..., :held].to(torch.uint8).contiguous()
