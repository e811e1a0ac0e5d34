"""4-bit quantization, two codes a byte: bitsandbytes' functions, for every 4-bit type."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bnbx.errors import InputError, QuantizedDataError
from bnbx.functional import checks, coded, ops
from bnbx.functional.maps import default_table, table
from bnbx.functional.results import kept, room, straight
from bnbx.functional.states import SECOND_BLOCK, check_state, second_of, state_of
from bnbx.kernels.coding import FLOATS
from bnbx.kernels.coding_reference import mean_of
from bnbx.kernels.quant_state import QuantState
from bnbx.layers.ops import dequantize
from bnbx.registry import quant_types

BLOCK = 64
STORAGES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _table_of(quant_type: Any) -> tuple[float, ...]:
    if not isinstance(quant_type, str):
        raise InputError(f"quant_type={quant_type!r:.200}; expected the name of a 4-bit type")
    return coded.levels_of(quant_type)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _second_name() -> str | None:
    found = quant_types().find(lambda t: t.scale_default)
    return None if found is None else found.name


def quantize_4bit(
    A: Tensor,  # noqa: N803 - the name it has in bitsandbytes
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_type: str = "fp4",
    quant_storage: torch.dtype = torch.uint8,
    *,
    exact: bool = True,
) -> tuple[Tensor, QuantState]:
    """Quantize a tensor in blocks to 4 bits, two codes a byte, the first in the higher half.

    Args:
        A: float32, bfloat16 or float16, any shape and strides.
        absmax: memory for the scales, one per block: float32; uint8 with compress_statistics.
        out: memory for the codes, as they are returned.
        blocksize: elements that share a scale: 16, 32, ... 4096; 64 by default.
        compress_statistics: whether to quantize the scales too, less their mean, in blocks of 256
            (double quantization, arXiv:2305.14314, section 3).
        quant_type: a registered type of 4 bits with a float32 scale per block.
        quant_storage: the dtype of the tensor that holds the bytes: uint8, float16, bfloat16 or
            float32. The last of its elements is filled up with zeros.
        exact: False for the codes of scales that bitsandbytes makes on a CPU, with
            compress_statistics; see `quantize_blockwise`. All other bytes are the same anyway.

    Returns:
        The codes (elements, 1), and the state that dequantize_4bit needs.

    Raises:
        InputError: another dtype, shape, block size or type; it is a TypeError and a ValueError.
        UnknownNameError: no such type.
        DeviceError: tensors on different devices.
    """
    checks.floats("A", A)
    size = checks.block_size(BLOCK if blocksize is None else blocksize)
    levels = _table_of(quant_type)
    if quant_storage not in STORAGES:
        raise InputError(f"quant_storage={quant_storage!r}; expected one of {STORAGES}")
    _check_memory(A, absmax, out, size, compress_statistics, quant_storage)
    checks.together([("A", A), ("absmax", absmax), ("out", out)])
    memory = (out, None if compress_statistics else absmax)
    codes, scales = _quantized(A.detach(), size, quant_type, quant_storage, *memory)
    offset = second = None
    if compress_statistics:
        scales, offset, second = _compressed(scales, exact)
        scales = kept(absmax, scales)
    state = QuantState(
        scales, A.shape, table(levels, A.device), size, quant_type, A.dtype, offset, second
    )
    return codes, state


def _compressed(scales: Tensor, exact: bool) -> tuple[Tensor, Tensor, QuantState]:
    """Codes of scales less their mean, the mean, and the state of the codes."""
    offset = mean_of(scales)
    numbers = default_table(scales.device)
    codes, second_scales = ops.quantize_blockwise(
        scales - offset, numbers, SECOND_BLOCK, None, exact
    )
    second = QuantState(
        absmax=second_scales,
        code=numbers,
        blocksize=SECOND_BLOCK,
        quant_type=_second_name(),
        dtype=torch.float32,
    )
    return codes, offset, second


def _quantized(
    x: Tensor,
    size: int,
    quant_type: str,
    storage: torch.dtype,
    out: Tensor | None,
    absmax: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Codes as they are stored, and scales, in the memory that is given for them."""
    if straight(out, absmax):
        codes = room(out, (_elements(x, storage), 1), storage, [x])
        scales = room(absmax, (checks.blocks(x.numel(), size),), torch.float32, [x])
        packed, count = codes.view(-1).view(torch.uint8), checks.blocks(x.numel(), 2)
        packed[count:] = 0
        ops.quantize_4bit_into(x, size, quant_type, packed[:count], scales)
    else:
        packed, scales = ops.quantize_4bit(x, size, quant_type)
        codes = _stored(packed, storage)
    return kept(out, codes), kept(absmax, scales)


def _elements(x: Tensor, storage: torch.dtype) -> int:
    """How many elements hold the codes of x."""
    return checks.blocks(checks.blocks(x.numel(), 2), storage.itemsize)


def _check_memory(
    x: Tensor,
    absmax: Tensor | None,
    out: Tensor | None,
    size: int,
    compressed: bool,
    storage: torch.dtype,
) -> None:
    if out is not None:
        checks.of_dtype("out", out, storage)
        checks.of_size("out", out, _elements(x, storage), "two codes a byte")
    if absmax is not None:
        checks.of_dtype("absmax", absmax, torch.uint8 if compressed else torch.float32)
        checks.of_size("absmax", absmax, checks.blocks(x.numel(), size), "one per block")


def _stored(packed: Tensor, storage: torch.dtype) -> Tensor:
    """Bytes (n, 1) as elements of another dtype (m, 1)."""
    if storage == torch.uint8:
        return packed
    missing = -packed.numel() % storage.itemsize
    return torch.nn.functional.pad(packed.reshape(-1), (0, missing)).view(storage).unsqueeze(1)


def dequantize_4bit(
    A: Tensor,  # noqa: N803
    quant_state: Any = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    quant_type: str = "fp4",
) -> Tensor:
    """The numbers of codes that quantize_4bit made.

    Args:
        A: the codes, in any of the dtypes of `quant_storage`. Where they lie as one row (1, n), a
            matrix is returned transposed: so do transposed weights.
        quant_state: the state that belongs to them; also one of bitsandbytes, or its list form.
        absmax: scales, one per block, where there is no quant_state.
        out: memory for the numbers: float32, bfloat16 or float16, any strides; where there is no
            quant_state, its shape and dtype say what is wanted.
        blocksize: elements that share a scale, where there is no quant_state; 64 by default.
        quant_type: the type, where there is no quant_state.

    Returns:
        A tensor of the shape and dtype that the state says, or `out`.

    Raises:
        InputError, QuantizedDataError: dtypes or sizes do not fit; nothing was read then.
        UnknownNameError: no such type.
        DeviceError: tensors on different devices.
    """
    checks.of_dtype("A", A, *STORAGES)
    if quant_state is not None:
        state = state_of(quant_state, A)
    elif absmax is None or out is None:
        raise InputError("dequantize_4bit needs quant_state, or both absmax and out")
    else:
        checks.floats("out", out)
        size = BLOCK if blocksize is None else blocksize
        state = QuantState(absmax, out.shape, None, size, quant_type, out.dtype)
    shape = _shape_of(state)
    if out is not None:
        checks.floats("out", out)
        checks.of_shape("out", out, shape)
        checks.together([("A", A), ("out", out)])
        if is_plain(state):
            ops.dequantize_4bit_into(A, *_scales(A, state), out, *second_of(state))
        else:
            ops.dequantize_into(state.parts(_bytes(A)), state.label, out)
        return _turned(out, A)
    dtype = state.dtype
    if dtype not in FLOATS:
        raise InputError(f"the state says {dtype}; expected one of {FLOATS}")
    if is_plain(state):
        found = ops.dequantize_4bit(A, *_scales(A, state), shape, dtype, *second_of(state))
    else:
        found = dequantize(state.parts(_bytes(A)), state.label, shape, dtype)
    return _turned(found, A)


def is_plain(state: QuantState) -> bool:
    """Whether a state is one that bitsandbytes could have: absmax, and a second level at most."""
    scales: Any = state.absmax
    known = not isinstance(scales, Tensor) or scales.is_floating_point() or state.nested
    return known and state.center is None and state.tensor_scale is None and state.signed


def _scales(codes: Tensor, state: QuantState) -> tuple[Tensor, int, str]:
    """Scales, block size and type of a plain state, in the order of operations."""
    check_state("dequantize_4bit", codes, state)
    size = checks.block_size(BLOCK if state.blocksize is None else state.blocksize)
    _table_of(state.quant_type)
    return state.absmax, size, str(state.quant_type)


def _shape_of(state: QuantState) -> torch.Size:
    if state.shape is None:
        raise QuantizedDataError("the state does not know the shape of its tensor")
    return checks.shape_of("the state", state.shape)


def _bytes(codes: Tensor) -> Tensor:
    flat = codes.reshape(-1).contiguous()
    return flat if flat.dtype == torch.uint8 else flat.view(torch.uint8)


def _turned(found: Tensor, codes: Tensor) -> Tensor:
    """Transposed, where the codes are."""
    lying = codes.dim() == 2 and codes.shape[0] == 1 and codes.shape[1] > 1
    return found.t() if lying and found.dim() == 2 else found


def gemv_4bit(
    A: Tensor,  # noqa: N803
    B: Tensor,  # noqa: N803
    out: Tensor | None = None,
    transposed_A: bool = False,  # noqa: N803
    transposed_B: bool = False,  # noqa: N803
    state: Any = None,
) -> Tensor:
    """The product of a tensor and a quantized weight, A @ weight.T.

    Args:
        A: (..., in), float32, bfloat16 or float16; one row or many. It gets a gradient.
        B: the codes of the weight (out, in), from quantize_4bit.
        out: memory for the product: (..., out), of the dtype of A.
        transposed_A: that A is (in, rows), to be transposed first.
        transposed_B: that the weight of the state is (in, out): the product is A @ weight.
        state: the state of B, also one of bitsandbytes.

    Returns:
        (..., out), of the dtype of A.

    Raises:
        InputError, QuantizedDataError: dtypes or sizes do not fit; nothing was read then.
        DeviceError: tensors on different devices.
    """
    checks.floats("A", A)
    checks.of_dtype("B", B, *STORAGES)
    if state is None:
        raise InputError("gemv_4bit needs the state that quantize_4bit returned with B")
    found = state_of(state, B)
    shape = _shape_of(found)
    if not is_plain(found):
        raise InputError(
            f"gemv_4bit takes types with a float32 scale per block, not {found.quant_type}"
        )
    if transposed_A and A.dim() != 2:
        raise InputError(f"transposed_A, but A has shape {tuple(A.shape)}; expected (in, rows)")
    x = A.t() if transposed_A else A
    if len(shape) != 2 or x.dim() == 0 or x.shape[-1] != shape[0 if transposed_B else 1]:
        raise InputError(
            f"A has shape {tuple(x.shape)}, the weight {tuple(shape)}: expected (..., in) and "
            f"({'in, out' if transposed_B else 'out, in'})"
        )
    checks.together([("A", A), ("B", B), ("out", out)])
    scales, second = _scales(B, found), second_of(found)
    product: Tensor = ops.gemv_4bit(x, B, *scales, shape, not transposed_B, *second)
    if out is None:
        return product
    checks.of_dtype("out", out, A.dtype)
    checks.of_shape("out", out, product.shape)
    return out.copy_(product)
