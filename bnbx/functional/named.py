"""The 4-bit functions under the names of bitsandbytes' two types."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bnbx.errors import InputError
from bnbx.functional import checks
from bnbx.functional.halves import dequantize_4bit, quantize_4bit
from bnbx.functional.states import state_of
from bnbx.kernels.quant_state import QuantState
from bnbx.registry import quant_types

NF4, FP4 = "nf4", "fp4"


def quantize_nf4(
    A: Tensor,  # noqa: N803 - the name it has in bitsandbytes
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """`quantize_4bit` to nf4, quantiles of the normal distribution (arXiv:2305.14314).

    Raises:
        InputError, DeviceError: as there.
    """
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, NF4, quant_storage)


def quantize_fp4(
    A: Tensor,  # noqa: N803
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """`quantize_4bit` to fp4: floating point with two bits of exponent and one of fraction.

    Raises:
        InputError, DeviceError: as there.
    """
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, FP4, quant_storage)


def dequantize_nf4(
    A: Tensor,  # noqa: N803
    quant_state: Any = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
) -> Tensor:
    """`dequantize_4bit` from nf4.

    Raises:
        InputError: the state is of another type; and as there.
        QuantizedDataError, DeviceError: as there.
    """
    return _dequantize(NF4, A, quant_state, absmax, out, blocksize)


def dequantize_fp4(
    A: Tensor,  # noqa: N803
    quant_state: Any = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
) -> Tensor:
    """`dequantize_4bit` from fp4.

    Raises:
        InputError: the state is of another type; and as there.
        QuantizedDataError, DeviceError: as there.
    """
    return _dequantize(FP4, A, quant_state, absmax, out, blocksize)


def get_4bit_type(
    typename: str, device: torch.device | str | int | None = None, blocksize: int = 64
) -> Tensor:
    """The numbers of a 4-bit type by code, over the largest: (16,), float32.

    A code that stands for no number, as a linear type has one, is NaN.

    Args:
        typename: any registered type of 4 bits.
        device: of the result; the default device if None.
        blocksize: of the blocks that they are for; the same numbers serve all of them.

    Raises:
        UnknownNameError: no such type.
        InputError: it has another number of bits.
        OptionError: no such block size.
    """
    spec = quant_types().get(typename)
    if spec.bits != 4:
        raise InputError(f"{typename!r} has {spec.bits} bits; expected a type of 4 bits")
    checks.block_size(blocksize)
    levels = spec.codebook(signed=True).levels
    return torch.tensor(levels, dtype=torch.float32, device=device)


def _dequantize(
    name: str,
    codes: Tensor,
    quant_state: Any,
    absmax: Tensor | None,
    out: Tensor | None,
    blocksize: int | None,
) -> Tensor:
    if quant_state is not None:
        quant_state = state_of(quant_state, codes)
        if quant_state.quant_type != name:
            raise InputError(
                f"dequantize_{name}: the state is of the type {quant_state.quant_type!r}; "
                "dequantize_4bit takes any"
            )
    return dequantize_4bit(codes, quant_state, absmax, out, blocksize, name)
