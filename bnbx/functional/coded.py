"""Codes and scales as the familiar functions take them: a table in a tensor, a byte or half a byte.

What runs behind the operations of `bnbx.functional.ops`, on real memory: arguments become an
`Encoding` and its parts, and `bnbx.kernels` does the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from bnbx.errors import DeviceError, InputError, QuantizedDataError
from bnbx.functional import checks
from bnbx.functional.maps import numbers_in
from bnbx.kernels import coding
from bnbx.kernels.coding_reference import search_on
from bnbx.kernels.encoding import Encoding, make_encoding
from bnbx.kernels.packing import pack
from bnbx.kernels.table_types import type_of_table
from bnbx.registry import QuantType, quant_types

GRID = 65536  # points that bitsandbytes' CPU code rounds to first
SMALLEST = 1e-38  # the least absmax that the last, shorter block of 4-bit codes gets
MOST_ENTRIES = 256

_types: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
Second = tuple[Tensor | None, Tensor | None, Tensor | None, int]
"""Of scales that are quantized too: their own scales, table, mean and block size."""
NO_SECOND: Second = (None, None, None, 256)


# ---- tables


def check_table(code: Tensor, to: torch.device | None = None) -> None:
    """Raise InputError unless `code` may be a table: 2 to 256 float numbers, a power of two.

    Raises:
        DeviceError: it is to be brought `to` a device, and has no numbers to bring.
    """
    checks.dense("code", code)
    if code.is_meta and to is not None and to.type != "meta":
        raise DeviceError(f"code is on the meta device, which holds no numbers; A is on {to}")
    count = code.numel()
    if not code.is_floating_point() or not 2 <= count <= MOST_ENTRIES or count & (count - 1):
        raise InputError(
            f"code is {code.dtype} of shape {tuple(code.shape)}; expected a table of 2**bits "
            f"floating-point numbers, bits = 1 to 8 (create_dynamic_map() makes one)"
        )


def type_of(code: Tensor) -> QuantType | None:
    """The type whose codes are bytes that number the entries of a table; None if it has none.

    A table whose largest magnitude is not about 1 has none, and is coded by `encode_plain`.
    """
    if code.device.type == "cpu" or code.is_inference():
        return _read(code)
    known: tuple[int, QuantType | None] | None = _types.get(code)  # type: ignore[no-untyped-call]
    if known is None or known[0] != code._version:
        numbers = numbers_in(code)
        # To read it waits for all that runs on the device.
        known = code._version, _read(code) if numbers is None else _of_numbers(numbers)
        _types[code] = known
    return known[1]


def copy_of(code: Tensor) -> Tensor:
    """A copy of a table that has been checked; which type it is, is found out once for both."""
    copy = code.clone()
    if torch.compiler.is_compiling() or code.device.type in ("cpu", "meta"):
        return copy
    if not (code.is_inference() or copy.is_inference()):
        _types[copy] = copy._version, type_of(code)
    return copy


def _read(code: Tensor) -> QuantType | None:
    check_table(code)
    numbers = code.detach().reshape(-1).float().cpu().contiguous()
    return _of_numbers(numbers.numpy().tobytes())


@lru_cache(maxsize=256)
def _of_numbers(packed: bytes) -> QuantType | None:
    numbers = torch.frombuffer(bytearray(packed), dtype=torch.float32)
    if not bool(numbers.isfinite().all()):
        raise InputError("code holds NaN or infinity; expected finite numbers")
    most = float(numbers.abs().max())
    if not 0.9 <= most <= 1.0 or bool((numbers == numbers[0]).all()):
        return None
    missing = (0, MOST_ENTRIES - numbers.numel())
    return type_of_table(torch.nn.functional.pad(numbers, missing, value=torch.nan))


@lru_cache(maxsize=64)
def on_grid(quant_type: QuantType) -> QuantType:
    """The type whose codes are those that bitsandbytes makes on a CPU.

    A registered one, if there is one: its kernel knows the table.
    """
    same = quant_types().find(lambda t: t.grid == GRID and t.values == quant_type.values)
    return same or quant_type.model_copy(update={"grid": GRID})


@lru_cache(maxsize=1024, typed=True)  # 64.0 is not 64
def encoding_of(
    quant_type: QuantType | str,
    block_size: int,
    second: QuantType | None = None,
    second_block: int = 256,
) -> Encoding:
    """The encoding; made once for equal arguments."""
    return make_encoding(quant_type, block_size, second=second, second_block=second_block)


# ---- a code a byte


def quantize_bytes(
    x: Tensor,
    code: Tensor,
    block_size: int,
    rand: Tensor | None,
    exact: bool = True,
    out: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """Codes (uint8, of the shape of x) and absmax (float32, one per block); `out` is for both."""
    found = type_of(code)
    if found is None:
        if rand is not None or not exact:
            raise InputError(
                "rand and exact=False need a table whose largest magnitude is 1; divide code by "
                "code.abs().max()"
            )
        made = encode_plain(x, code, block_size)
        return (coding.copied(out[0], made[0]), coding.copied(out[1], made[1])) if out else made
    found = found if exact else on_grid(found)
    codes, absmax = coding.encode(encoding_of(found, block_size), x, rand=rand, out=out)
    return codes, absmax


def dequantize_bytes(
    codes: Tensor,
    absmax: Tensor,
    code: Tensor,
    block_size: int,
    dtype: torch.dtype,
    second: Second = NO_SECOND,
    out: Tensor | None = None,
) -> Tensor:
    """Numbers of the shape of codes."""
    found = type_of(code)
    if found is None:
        scales = _plain_scales(absmax, second)
        result = decode_plain(codes, scales, code, block_size, dtype)
        return result if out is None else out.copy_(result)
    encoding, rest = _with_second(found, block_size, absmax, second)
    parts = [codes.contiguous(), *rest]
    return decode_into(encoding, parts, tuple(codes.shape), dtype, out)


def _with_second(
    quant_type: QuantType | str, block_size: int, absmax: Tensor, second: Second
) -> tuple[Encoding, list[Tensor]]:
    """The encoding, and its parts but for the codes."""
    scales, table, mean, size = second
    if scales is None:
        return encoding_of(quant_type, block_size), [absmax.reshape(-1).float().contiguous()]
    if table is None or mean is None or mean.numel() != 1:
        raise QuantizedDataError("scales that are quantized too, without a table and a mean")
    kind = type_of(table)
    if kind is None:
        raise QuantizedDataError("the table of quantized scales does not reach from -1 to 1")
    encoding = encoding_of(quant_type, block_size, kind, size)
    if absmax.dtype != torch.uint8:
        raise QuantizedDataError(f"quantized scales are {absmax.dtype}; expected uint8")
    rest = (scales.reshape(-1).float().contiguous(), mean.reshape(1).float())
    return encoding, [absmax.reshape(-1).contiguous(), *rest]


def decode_into(
    encoding: Encoding,
    parts: Sequence[Tensor],
    shape: Sequence[int],
    dtype: torch.dtype,
    out: Tensor | None,
) -> Tensor:
    """`coding.decode`, into memory of any strides."""
    if out is None or (out.is_contiguous() and out.dtype == dtype):
        return coding.decode(encoding, parts, shape, dtype, out=out)
    return out.copy_(coding.decode(encoding, parts, shape, dtype))


# ---- tables that no type has


def encode_plain(x: Tensor, code: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """As `quantize_bytes`, with torch operations, for any table."""
    blocks = torch.nn.functional.pad(x.reshape(-1).float(), (0, -x.numel() % block_size))
    blocks = blocks.view(-1, block_size)
    absmax = blocks.abs().amax(1) if blocks.numel() else blocks.new_zeros(0)
    absmax = torch.where(absmax.isfinite(), absmax, torch.nan)
    inverse = torch.where(absmax > 0, 1 / absmax.clamp(min=SMALLEST), 0.0)[:, None]
    codes = nearest(torch.where(inverse > 0, blocks * inverse, 0.0), code)
    return codes.view(-1)[: x.numel()].view(x.shape), absmax


def decode_plain(
    codes: Tensor, absmax: Tensor, code: Tensor, block_size: int, dtype: torch.dtype
) -> Tensor:
    """As `dequantize_bytes`, with torch operations, for any table."""
    numel = codes.numel()
    absmax = absmax.reshape(-1)
    checks.of_size("absmax", absmax, checks.blocks(numel, block_size), "one per block")
    scale = absmax.float().repeat_interleave(block_size)[:numel]
    return (entries(codes.reshape(-1), code) * scale).to(dtype).view(codes.shape)


def entries(codes: Tensor, code: Tensor) -> Tensor:
    """Table entries (float32) by codes; NaN beyond the end of the table."""
    missing = (0, MOST_ENTRIES - code.numel())
    table = torch.nn.functional.pad(code.reshape(-1).float(), missing, value=torch.nan)
    return table.to(codes.device)[codes.long()]


def nearest(x: Tensor, code: Tensor) -> Tensor:
    """Numbers of the nearest table entries, the lower one of two that are as near (uint8).

    NaN gets the code of the entry nearest to zero.
    """
    numbers, order = code.to(x.device).reshape(-1).float().sort(stable=True)
    between = numbers[:-1] * 0.5 + numbers[1:] * 0.5
    finite = torch.where(x.isnan(), 0.0, x.float()).contiguous()
    return order[torch.bucketize(finite, between)].to(torch.uint8)


def _plain_scales(absmax: Tensor, second: Second) -> Tensor:
    scales, table, mean, size = second
    if scales is None or table is None or mean is None:
        return absmax
    return dequantize_bytes(absmax, scales, table, size, torch.float32) + mean


# ---- two codes a byte


def quantize_halves(
    x: Tensor, quant_type: str, block_size: int, out: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor]:
    """Packed codes (bytes, 1) uint8 and absmax (blocks,) float32, the bytes of bitsandbytes.

    `out` is memory for both, without the second dimension of the codes.

    They are those of `coding.encode` but in a last, shorter block: there bitsandbytes divides by
    absmax where it multiplies by the inverse before, takes no absmax below 1e-38, and fills a last
    byte up with the code of zero.
    """
    encoding = encoding_of(quant_type, block_size)
    codes, absmax = coding.encode(encoding, x, out=out)
    numel = x.numel()
    count = numel % block_size
    if not count:
        return codes.unsqueeze(1), absmax
    tail = x.reshape(-1)[numel - count :].float()
    largest = tail.abs().amax()
    finite = largest.isfinite()
    largest = largest.clamp(min=SMALLEST)
    thresholds, order = search_on(encoding, x.device)
    ranks = torch.bucketize(torch.where(finite, tail / largest, 0.0), thresholds)
    ends = torch.nn.functional.pad(order[ranks], (0, count % 2), value=encoding.tables.zero_code)
    packed = pack(ends, encoding.quant_type)
    codes[codes.numel() - packed.numel() :] = packed
    absmax[-1] = torch.where(finite, largest, torch.nan)
    return codes.unsqueeze(1), absmax


def weight(
    codes: Tensor,
    absmax: Tensor,
    block_size: int,
    quant_type: str,
    shape: Sequence[int],
    second: Second,
) -> tuple[Encoding, list[Tensor]]:
    """Encoding and parts of a tensor in 4-bit codes, however their bytes are stored."""
    encoding, rest = _with_second(quant_type, block_size, absmax, second)
    flat = codes.reshape(-1)
    flat = flat if flat.dtype == torch.uint8 else flat.contiguous().view(torch.uint8)
    size = encoding.shapes(shape)["codes"][0][0]
    if not size <= flat.numel() < size + codes.element_size():
        raise QuantizedDataError(
            f"{flat.numel()} bytes of codes for shape {tuple(shape)} ({prod(shape)} elements); "
            f"expected {size}"
        )
    return encoding, [flat[:size].contiguous(), *rest]


@lru_cache(maxsize=64)
def levels_of(quant_type: str) -> tuple[float, ...]:
    """The table of a registered type of 4 bits that keeps a float32 absmax per block.

    Raises:
        UnknownNameError, InputError: it is none.
    """
    found = quant_types().get(quant_type)
    plain = found.scale == type(found.scale)()
    if found.bits != 4 or not plain:
        fitting = [t.name for t in quant_types() if t.bits == 4 and t.scale == type(t.scale)()]
        raise InputError(
            f"quant_type={quant_type!r} is no 4-bit type with a float32 absmax per block: there "
            f"are {', '.join(fitting)}; bnbx.functional.quantize(tensor, {quant_type!r}) takes any"
        )
    return found.codebook(signed=True).levels
