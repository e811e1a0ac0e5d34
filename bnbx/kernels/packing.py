"""How codes lie in bytes: several to a byte where their width divides 8, first code highest.

That is the order in which bitsandbytes packs 4-bit codes. A code of a width that does not divide
8 takes a byte.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bnbx.registry.quant_type import QuantType


def codes_per_byte(quant_type: QuantType) -> int:
    """How many codes a byte holds: 4, 2 or 1."""
    return 8 // quant_type.bits if 8 % quant_type.bits == 0 else 1


def packed_size(quant_type: QuantType, numel: int) -> int:
    """Bytes that the codes of `numel` elements take."""
    return -(-numel // codes_per_byte(quant_type))


def pack(codes: Tensor, quant_type: QuantType) -> Tensor:
    """Codes (numel,) uint8 to bytes (packed_size,) uint8; a last byte is filled up with zeros."""
    count = codes_per_byte(quant_type)
    if count == 1:
        return codes
    rows = torch.nn.functional.pad(codes, (0, -codes.numel() % count)).view(-1, count)
    packed = torch.zeros_like(rows[:, 0])
    for place in range(count):
        packed |= rows[:, place] << (8 - quant_type.bits * (place + 1))
    return packed


def unpack(packed: Tensor, quant_type: QuantType, numel: int | None = None) -> Tensor:
    """Bytes (packed_size,) uint8 to codes (numel,) uint8; None for all that the bytes hold."""
    count, bits = codes_per_byte(quant_type), quant_type.bits
    if count == 1:
        return packed
    shifts = [8 - bits * (place + 1) for place in range(count)]
    codes = torch.stack([(packed >> shift) & (2**bits - 1) for shift in shifts], 1)
    return codes.view(-1)[:numel]
