"""Block-wise quantization with a table, a byte per code: bitsandbytes' 8-bit functions.

All calling conventions of versions 0.0.24 to 0.50 work.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bnbx.errors import InputError, OptionError
from bnbx.functional import checks, coded, ops
from bnbx.functional.maps import default_table
from bnbx.functional.results import kept, room, straight
from bnbx.functional.states import check_state, second_of, state_of
from bnbx.kernels.coding import FLOATS
from bnbx.kernels.coding_reference import mean_of
from bnbx.kernels.quant_state import QuantState


def quantize_blockwise(
    A: Tensor,  # noqa: N803 - the name it has since 0.0.24
    code: Tensor | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
    *,
    rand: Tensor | None = None,
    exact: bool = True,
) -> tuple[Tensor, QuantState]:
    """Quantize a tensor in blocks, each scaled by its largest magnitude.

    The order of 0.0.24, (A, code, absmax, rand, out), works too: a float tensor in the place of
    `out` is `rand`, and a tensor in the place of `blocksize` is `out`.

    Args:
        A: float32, bfloat16 or float16, any shape and strides.
        code: the table, 2**bits numbers in any order, bits = 1 to 8, the largest magnitude about
            1; by default the signed dynamic one of 8 bits (arXiv:1511.04561).
        absmax: memory for the scales, one per block; of quantized ones, for their codes.
        out: memory for the codes: uint8, the shape of A.
        blocksize: elements that share a scale: 16, 32, ... 4096.
        nested: whether to quantize the scales too, less their mean, in blocks of the same size.
        rand: float32 numbers in [0, 1) to round stochastically with: element i goes to the upper
            of its two neighbors if `rand[i % len(rand)]` is below its place between them.
        exact: False for the codes that bitsandbytes makes on a CPU: numbers over absmax are first
            rounded to one of 65536 evenly spaced points, and zero becomes 2e-5.

    Returns:
        The codes (uint8, the shape of A), and the state that dequantize_blockwise needs.

    Raises:
        InputError: another dtype, shape or block size; it is a TypeError and a ValueError.
        DeviceError: tensors on different devices.
    """
    if isinstance(blocksize, Tensor):
        rand, out, blocksize = out, blocksize, 4096
    elif isinstance(out, Tensor) and out.is_floating_point() and rand is None:
        rand, out = out, None
    checks.floats("A", A)
    size = checks.block_size(blocksize)
    table = default_table(A.device) if code is None else checks.dense("code", code)
    coded.check_table(table, to=A.device)
    _check_memory(A, absmax, out, size, nested)
    _check_rand(rand, exact)
    checks.together([("A", A), ("absmax", absmax), ("out", out), ("rand", rand)])
    table = (table if code is None else coded.copy_of(table)).to(A.device)
    memory = (out, None if nested else absmax)
    codes, scales = _quantized(A.detach(), table, size, rand, exact, *memory)
    offset = second = None
    if nested:
        offset = mean_of(scales)
        scales, second = quantize_blockwise(scales - offset, blocksize=size, exact=exact)
        scales = kept(absmax, scales)
    state = QuantState(
        absmax=scales, code=table, blocksize=size, dtype=A.dtype, offset=offset, state2=second
    )
    return codes, state


def _quantized(
    x: Tensor,
    table: Tensor,
    size: int,
    rand: Tensor | None,
    exact: bool,
    out: Tensor | None,
    absmax: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Codes and scales, in the memory that is given for them."""
    if straight(out, absmax):
        read = [x, table] if rand is None else [x, table, rand]
        codes = room(out, x.shape, torch.uint8, read)
        scales = room(absmax, (checks.blocks(x.numel(), size),), torch.float32, read)
        ops.quantize_blockwise_into(x, table, size, rand, exact, codes, scales)
    else:
        codes, scales = ops.quantize_blockwise(x, table, size, rand, exact)
    return kept(out, codes), kept(absmax, scales)


def _check_memory(
    x: Tensor, absmax: Tensor | None, out: Tensor | None, size: int, nested: bool
) -> None:
    if absmax is not None:
        checks.of_dtype("absmax", absmax, torch.uint8 if nested else torch.float32)
        checks.of_size("absmax", absmax, checks.blocks(x.numel(), size), "one per block")
    if out is not None:
        checks.of_dtype("out", out, torch.uint8)
        checks.of_shape("out", out, x.shape)


def _check_rand(rand: Tensor | None, exact: bool) -> None:
    if rand is None:
        return
    if not checks.of_dtype("rand", rand, torch.float32).numel():
        raise InputError("rand is empty; expected float32 numbers in [0, 1)")
    if not exact:
        raise OptionError("exact=False rounds to the nearest point; it does not go with rand")


def dequantize_blockwise(
    A: Tensor,  # noqa: N803
    quant_state: Any = None,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> Tensor:
    """The numbers of codes that quantize_blockwise made.

    Args:
        A: the codes: uint8, any shape.
        quant_state: the state that belongs to them; or the pair (absmax, code) of 0.0.24, whose
            blocks have `blocksize` elements.
        absmax: scales, one per block, where there is no quant_state.
        code: the table, where there is no quant_state; by default the signed dynamic one.
        out: memory for the numbers: float32, bfloat16 or float16, the shape of A.
        blocksize: elements that share a scale, where no QuantState says so.
        nested: that the scales are quantized too, which only a QuantState can say; True without
            one, or with one whose scales are not, is an error.

    Returns:
        A tensor of the shape of A; of the dtype that the state says, else float32, or `out`.

    Raises:
        InputError, QuantizedDataError: dtypes or sizes do not fit; nothing was read then.
        DeviceError: tensors on different devices.
    """
    checks.of_dtype("A", A, torch.uint8)
    if quant_state is not None:
        state = state_of(quant_state, A, blocksize)
    elif absmax is not None:
        state = QuantState(absmax=absmax, code=code, blocksize=blocksize, dtype=torch.float32)
    else:
        raise InputError("dequantize_blockwise needs quant_state or absmax")
    if nested and not state.nested:
        raise OptionError(
            "nested=True, but there is no state of quantized scales: quant_state has "
            "none, or is not given"
        )
    size = checks.block_size(blocksize if state.blocksize is None else state.blocksize)
    check_state("dequantize_blockwise", A, state)
    checks.of_size("absmax", state.absmax, checks.blocks(A.numel(), size), "one per block")
    table = default_table(A.device) if state.code is None else state.code
    coded.check_table(table, to=A.device)
    table, second = table.to(A.device), second_of(state)
    if out is None:
        dtype = torch.float32 if state.dtype is None else state.dtype
        if dtype not in FLOATS:
            raise InputError(f"the state says {dtype}; expected one of {FLOATS}")
        found: Tensor = ops.dequantize_blockwise(A, state.absmax, table, size, dtype, *second)
        return found
    checks.floats("out", out)
    checks.of_shape("out", out, A.shape)
    checks.together([("A", A), ("out", out)])
    ops.dequantize_blockwise_into(A, state.absmax, table, size, out, *second)
    return out
