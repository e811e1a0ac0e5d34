"""The operations on quantized tensors: `torch.ops.bnbx.quantize` and its kin.

Those that take an `encoding` take its label, with which `bnbx.kernels.encoding.from_label` finds
it; tensors in an encoding are lists of parts. Those that take a `code` take a table in a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bnbx.functional import checks, coded
from bnbx.functional.registration import operation
from bnbx.kernels import coding
from bnbx.kernels import linear as products
from bnbx.kernels.encoding import from_label
from bnbx.kernels.fit import fit_scales
from bnbx.kernels.operation import differentiate

SEED = ("seed",)  # drawn where its generator is, and read as a number
SECOND = "Tensor? absmax2=None, Tensor? code2=None, Tensor? offset=None, int blocksize2=256"

# ---- tensors in an encoding


def _parts_fake(
    x: Tensor,
    encoding: str,
    rand: Tensor | None = None,
    seed: Tensor | None = None,
    fit: str | None = None,
) -> list[Tensor]:
    del rand, seed, fit
    return from_label(encoding).empty(x.shape, x.device)


@operation(
    "quantize(Tensor x, str encoding, Tensor? rand=None, Tensor? seed=None, str? fit=None)"
    " -> Tensor[]",
    _parts_fake,
    anywhere=SEED,
    gradient=False,
)
def quantize(
    x: Tensor,
    encoding: str,
    rand: Tensor | None = None,
    seed: Tensor | None = None,
    fit: str | None = None,
) -> list[Tensor]:
    """The parts of x; rounded stochastically with `rand` or `seed`, see `coding.encode`."""
    if fit is not None:
        return fit_scales(from_label(encoding), x, fit)
    number = None if seed is None else int(seed) & 0xFFFFFFFF
    return coding.encode(from_label(encoding), x, rand=rand, seed=number)


def _nothing_fake(*arguments: Any, **named: Any) -> None:
    return None


@operation(
    "dequantize_into(Tensor[] parts, str encoding, Tensor(a!) out) -> ()",
    _nothing_fake,
)
def dequantize_into(parts: Sequence[Tensor], encoding: str, out: Tensor) -> None:
    """As `bnbx.layers.ops.dequantize`, into memory of any strides."""
    coded.decode_into(from_label(encoding), parts, tuple(out.shape), out.dtype, out)


def _like_fake(x: Tensor, *arguments: Any, **named: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@operation(
    "fake_quantize(Tensor x, str encoding, Tensor? rand=None, Tensor? seed=None) -> Tensor",
    _like_fake,
    anywhere=SEED,
)
def fake_quantize(
    x: Tensor, encoding: str, rand: Tensor | None = None, seed: Tensor | None = None
) -> Tensor:
    """Numbers as they come back from codes; the gradient passes through."""
    found = from_label(encoding)
    number = None if seed is None else int(seed) & 0xFFFFFFFF
    parts = coding.encode(found, x, rand=rand, seed=number)
    return coding.decode(found, parts, x.shape, x.dtype)


differentiate("fake_quantize", lambda ctx, grad: (grad, None, None, None))

# ---- a code a byte, with a table


def _bytes_fake(
    x: Tensor, code: Tensor, blocksize: int, rand: Tensor | None = None, exact: bool = True
) -> tuple[Tensor, Tensor]:
    del code, rand, exact
    absmax = x.new_empty(checks.blocks(x.numel(), blocksize), dtype=torch.float32)
    return torch.empty(x.shape, dtype=torch.uint8, device=x.device), absmax


@operation(
    "quantize_blockwise(Tensor x, Tensor code, int blocksize, Tensor? rand=None, bool exact=True)"
    " -> (Tensor, Tensor)",
    _bytes_fake,
    gradient=False,
)
def quantize_blockwise(
    x: Tensor, code: Tensor, blocksize: int, rand: Tensor | None = None, exact: bool = True
) -> tuple[Tensor, Tensor]:
    """Codes and absmax."""
    return coded.quantize_bytes(x, code, blocksize, rand, exact)


@operation(
    "quantize_blockwise_into(Tensor x, Tensor code, int blocksize, Tensor? rand, bool exact, "
    "Tensor(a!) codes, Tensor(b!) absmax) -> ()",
    _nothing_fake,
)
def quantize_blockwise_into(
    x: Tensor,
    code: Tensor,
    blocksize: int,
    rand: Tensor | None,
    exact: bool,
    codes: Tensor,
    absmax: Tensor,
) -> None:
    """As `quantize_blockwise`, into contiguous memory."""
    coded.quantize_bytes(x, code, blocksize, rand, exact, (codes, absmax))


def _from_bytes_fake(
    codes: Tensor,
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    dtype: torch.dtype,
    *second: Any,
    **named: Any,
) -> Tensor:
    return torch.empty(codes.shape, dtype=dtype, device=codes.device)


@operation(
    "dequantize_blockwise(Tensor codes, Tensor absmax, Tensor code, int blocksize, "
    f"ScalarType dtype, {SECOND}) -> Tensor",
    _from_bytes_fake,
)
def dequantize_blockwise(
    codes: Tensor,
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    dtype: torch.dtype,
    absmax2: Tensor | None = None,
    code2: Tensor | None = None,
    offset: Tensor | None = None,
    blocksize2: int = 256,
) -> Tensor:
    """Numbers of the shape of codes."""
    second = (absmax2, code2, offset, blocksize2)
    return coded.dequantize_bytes(codes, absmax, code, blocksize, dtype, second)


@operation(
    "dequantize_blockwise_into(Tensor codes, Tensor absmax, Tensor code, int blocksize, "
    f"Tensor(a!) out, {SECOND}) -> ()",
    _nothing_fake,
)
def dequantize_blockwise_into(
    codes: Tensor,
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    out: Tensor,
    absmax2: Tensor | None = None,
    code2: Tensor | None = None,
    offset: Tensor | None = None,
    blocksize2: int = 256,
) -> None:
    """As `dequantize_blockwise`, into memory of any strides."""
    second = (absmax2, code2, offset, blocksize2)
    coded.dequantize_bytes(codes, absmax, code, blocksize, out.dtype, second, out)


def _unscaled_fake(x: Tensor, code: Tensor) -> Tensor:
    del code
    return torch.empty(x.shape, dtype=torch.uint8, device=x.device)


@operation("quantize_no_absmax(Tensor x, Tensor code) -> Tensor", _unscaled_fake, gradient=False)
def quantize_no_absmax(x: Tensor, code: Tensor) -> Tensor:
    """Codes of the table's entries that are nearest to the numbers as they are."""
    coded.check_table(code)
    return coded.nearest(x, code)


def _entries_fake(codes: Tensor, code: Tensor) -> Tensor:
    del code
    return torch.empty(codes.shape, dtype=torch.float32, device=codes.device)


@operation("dequantize_no_absmax(Tensor codes, Tensor code) -> Tensor", _entries_fake)
def dequantize_no_absmax(codes: Tensor, code: Tensor) -> Tensor:
    """The table's entries, float32."""
    coded.check_table(code)
    return coded.entries(codes, code)


# ---- two codes a byte


def _halves_fake(x: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
    del quant_type
    numel = x.numel()
    packed = x.new_empty((-(-numel // 2), 1), dtype=torch.uint8)
    return packed, x.new_empty(checks.blocks(numel, blocksize), dtype=torch.float32)


@operation(
    "quantize_4bit(Tensor x, int blocksize, str quant_type) -> (Tensor, Tensor)",
    _halves_fake,
    gradient=False,
)
def quantize_4bit(x: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
    """Packed codes (bytes, 1) uint8 and absmax."""
    return coded.quantize_halves(x, quant_type, blocksize)


@operation(
    "quantize_4bit_into(Tensor x, int blocksize, str quant_type, Tensor(a!) codes, "
    "Tensor(b!) absmax) -> ()",
    _nothing_fake,
)
def quantize_4bit_into(
    x: Tensor, blocksize: int, quant_type: str, codes: Tensor, absmax: Tensor
) -> None:
    """As `quantize_4bit`, into contiguous memory; codes are (bytes,)."""
    coded.quantize_halves(x, quant_type, blocksize, (codes, absmax))


def _from_halves_fake(
    codes: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    *second: Any,
    **named: Any,
) -> Tensor:
    return codes.new_empty(shape, dtype=dtype)


@operation(
    "dequantize_4bit(Tensor codes, Tensor absmax, int blocksize, str quant_type, SymInt[] shape, "
    f"ScalarType dtype, {SECOND}) -> Tensor",
    _from_halves_fake,
)
def dequantize_4bit(
    codes: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    absmax2: Tensor | None = None,
    code2: Tensor | None = None,
    offset: Tensor | None = None,
    blocksize2: int = 256,
) -> Tensor:
    """Numbers of this shape."""
    second = (absmax2, code2, offset, blocksize2)
    encoding, parts = coded.weight(codes, absmax, blocksize, quant_type, shape, second)
    return coding.decode(encoding, parts, shape, dtype)


@operation(
    "dequantize_4bit_into(Tensor codes, Tensor absmax, int blocksize, str quant_type, "
    f"Tensor(a!) out, {SECOND}) -> ()",
    _nothing_fake,
)
def dequantize_4bit_into(
    codes: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    out: Tensor,
    absmax2: Tensor | None = None,
    code2: Tensor | None = None,
    offset: Tensor | None = None,
    blocksize2: int = 256,
) -> None:
    """As `dequantize_4bit`, into memory of any strides."""
    second = (absmax2, code2, offset, blocksize2)
    encoding, parts = coded.weight(codes, absmax, blocksize, quant_type, out.shape, second)
    coded.decode_into(encoding, parts, tuple(out.shape), out.dtype, out)


def _gemv_fake(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    transposed: bool,
    *second: Any,
    **named: Any,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], shape[0] if transposed else shape[1]))


@operation(
    "gemv_4bit(Tensor x, Tensor codes, Tensor absmax, int blocksize, str quant_type, "
    f"SymInt[] shape, bool transposed, {SECOND}) -> Tensor",
    _gemv_fake,
)
def gemv_4bit(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    transposed: bool,
    absmax2: Tensor | None = None,
    code2: Tensor | None = None,
    offset: Tensor | None = None,
    blocksize2: int = 256,
) -> Tensor:
    """The product x @ weight, or x @ weight.T where `transposed`; the gradient is that of x."""
    second = (absmax2, code2, offset, blocksize2)
    encoding, parts = coded.weight(codes, absmax, blocksize, quant_type, shape, second)
    product = products.linear if transposed else products.grad_input
    return product(encoding, parts, shape, x)


def _gemv_setup(ctx: Any, inputs: Any, output: Any) -> None:
    del output
    _, codes, absmax, *ctx.plain, absmax2, code2, offset, ctx.blocksize2 = inputs
    ctx.save_for_backward(codes, absmax, absmax2, code2, offset)


def _gemv_backward(ctx: Any, grad: Tensor) -> Any:
    codes, absmax, *second = ctx.saved_tensors
    blocksize, quant_type, shape, transposed = ctx.plain
    plain = (blocksize, quant_type, shape, not transposed)
    return gemv_4bit(grad, codes, absmax, *plain, *second, ctx.blocksize2), *[None] * 10


differentiate("gemv_4bit", _gemv_backward, _gemv_setup)
