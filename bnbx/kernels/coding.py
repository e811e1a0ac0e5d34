"""Quantize and dequantize on the fastest target there is: what functions and layers stand on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from bnbx.errors import QuantizedDataError, UnsupportedTensorError
from bnbx.kernels import coding_cpu, coding_cuda, coding_reference, dtypes, targets
from bnbx.kernels.coding_source import CodingPlan
from bnbx.kernels.encoding import Encoding, check_memory_for, check_parts
from bnbx.kernels.memory import check_memory, in_large_pages

FLOATS = dtypes.FLOATS  # what is quantized, for those who ask here


@lru_cache(maxsize=1024)
def target_for(encoding: Encoding, device: str) -> str:
    """The target that runs an encoding on a type of device; makes its kernel ready."""
    plan = CodingPlan(encoding, "float32")
    ready = {"cpu": lambda: coding_cpu.kernel(plan), "cuda": lambda: coding_cuda.ready(encoding)}
    return targets.choose(device, ready, "Quantizing runs").name


def encode(
    encoding: Encoding,
    x: Tensor,
    *,
    rand: Tensor | None = None,
    seed: int | None = None,
    out: Sequence[Tensor] = (),
) -> list[Tensor]:
    """Quantize.

    Args:
        encoding: see `bnbx.kernels.encoding`.
        x: float32, bfloat16 or float16, any shape and strides.
        rand: numbers in [0, 1) to round stochastically with: element i goes to the upper of its
            two neighbors if `rand[i % len(rand)]` is below its place between them.
        seed: the same with noise that is made from this number (32 bits) and the place of i.
        out: contiguous tensors to fill, the first of the parts; where scales are quantized too,
            the codes alone.

    Returns:
        The parts (see `bnbx.kernels.encoding`), on the device of x.

    Raises:
        UnsupportedTensorError: x has another dtype or layout.
        QuantizedDataError: `out` does not fit.
    """
    check_numbers("x", x)
    check_memory((x, rand, *out))
    if out:
        check_memory_for(encoding, x, out)
    if rand is not None and (
        rand.dtype != torch.float32 or rand.device != x.device or not rand.numel()
    ):
        raise UnsupportedTensorError(
            f"rand is {rand.dtype} of {rand.numel()} elements on {rand.device}; expected float32 "
            f"numbers in [0, 1) on {x.device}"
        )
    if encoding.second is None:
        return _encode(encoding, x, rand, seed, out)
    first = _encode(first_level(encoding), x, rand, seed, out[:1])
    return encode_scales(encoding, dict(zip(encoding.parts, first, strict=False)))


def first_level(encoding: Encoding) -> Encoding:
    """The encoding with its scales as they are."""
    return replace(encoding, second=None)


def encode_scales(encoding: Encoding, found: dict[str, Tensor]) -> list[Tensor]:
    """Quantize the scales of parts that are of `first_level(encoding)`, by name."""
    mean = coding_reference.mean_of(found["scale"])
    inner = coding_reference.second_encoding(encoding)
    scale, second_scale = _encode(inner, found["scale"] - mean)
    found |= {"scale": scale, "second_scale": second_scale, "mean": mean.reshape(1)}
    return [found[name] for name in encoding.parts]


def _encode(
    encoding: Encoding,
    x: Tensor,
    rand: Tensor | None = None,
    seed: int | None = None,
    out: Sequence[Tensor] = (),
) -> list[Tensor]:
    target = target_for(encoding, x.device.type)
    if target == "cpu":
        return coding_cpu.encode(encoding, x, rand, seed, out)
    if target == "cuda":
        return coding_cuda.encode(encoding, x, rand, seed, out)
    made = coding_reference.encode(encoding, x, rand, seed)
    return [*map(copied, out, made), *made[len(out) :]]


def copied(out: Tensor, made: Tensor) -> Tensor:
    """What was made elsewhere, in a contiguous tensor of as many elements."""
    return out.copy_(made.view(out.shape))


def finite(encoding: Encoding, parts: Sequence[Tensor], shape: Sequence[int]) -> bool:
    """Whether the parts stand for numbers only, no NaN; looks at scales, not at codes.

    A NaN or an infinity makes the scale of its whole block NaN, and the mean of scales that are
    quantized, which is that of all.
    """
    named = dict(zip(encoding.parts, parts, strict=True))
    factors = coding_reference.factors(encoding, parts, shape)
    found = factors.isfinite().all()
    if "center" in named:
        found = found & named["center"].isfinite().all()
    return bool(found)


def decode(
    encoding: Encoding,
    parts: Sequence[Tensor],
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Dequantize.

    Args:
        encoding: see `bnbx.kernels.encoding`.
        parts: of a tensor of `shape`.
        shape: of the result.
        dtype: of the result: float32, bfloat16 or float16.
        out: a contiguous tensor of this shape and dtype to fill.

    Raises:
        QuantizedDataError: the parts do not fit the encoding and the shape.
    """
    check_parts(encoding, shape, parts)
    check_memory((*parts, out))
    if dtype not in FLOATS:
        raise UnsupportedTensorError(f"dequantized to {dtype}; expected one of {FLOATS}")
    if out is not None and (
        out.dtype != dtype
        or out.shape != torch.Size(shape)
        or not out.is_contiguous()
        or out.device != parts[0].device
    ):
        raise QuantizedDataError(
            f"out is {out.dtype} of shape {tuple(out.shape)} on {out.device}; expected {dtype} of "
            f"shape {tuple(shape)} on {parts[0].device}, contiguous"
        )
    if out is None:
        out = torch.empty(tuple(shape), dtype=dtype, device=parts[0].device)
        out = in_large_pages(out) if out.device.type == "cpu" else out
    _decode(encoding, parts, shape, out, 0)
    return out


def decode_rows(
    encoding: Encoding, parts: Sequence[Tensor], shape: Sequence[int], out: Tensor, first: int
) -> None:
    """Dequantize the rows from number `first` on of a tensor of two dimensions.

    For callers that have checked: nothing is checked here.

    Args:
        encoding: see `bnbx.kernels.encoding`.
        parts: of the whole tensor.
        shape: (rows, columns) of it.
        out: (some rows, columns), contiguous, float32, bfloat16 or float16; filled.
        first: the row that the first row of `out` is.
    """
    _decode(encoding, parts, shape, out, first * shape[1])


def _decode(
    encoding: Encoding, parts: Sequence[Tensor], shape: Sequence[int], out: Tensor, start: int
) -> None:
    target = target_for(encoding, out.device.type)
    if target == "cpu":
        coding_cpu.decode(encoding, parts, shape, out, start)
        return
    if target == "cuda":
        coding_cuda.decode(encoding, parts, shape, out, start)
        return
    every = coding_reference.decode(encoding, parts, shape, out.dtype).view(-1)
    out.view(-1).copy_(every[start : start + out.numel()])


def check_tensor(what: str, x: object) -> None:
    """Raise UnsupportedTensorError unless x is a tensor."""
    if not isinstance(x, Tensor):
        raise UnsupportedTensorError(f"{what} is {type(x).__name__}; expected a torch.Tensor")


def check_factor(what: str, x: Tensor) -> None:
    """Raise UnsupportedTensorError unless x, which is to be multiplied by a weight, is floats.

    The dtype of a weight in codes is that of their memory: T5 of transformers casts the input of
    `wo` to it, and what is rounded to integers then must not be taken for numbers.
    """
    check_tensor(what, x)
    if not x.is_floating_point():
        raise UnsupportedTensorError(
            f"{what} is {x.dtype}; expected float32, bfloat16 or float16: convert it first. Where "
            "a model casts inputs to the dtype of a layer's weight, as T5 does for `wo` and Mamba "
            f"for `lm_head`, leave that layer (of {x.shape[-1] if x.dim() else 0} inputs) dense: "
            "quantize_(model, skip=['wo'])"
        )


def check_numbers(what: str, x: Tensor) -> None:
    """Raise UnsupportedTensorError unless x is a plain tensor of floats that kernels read."""
    check_tensor(what, x)
    if x.dtype not in FLOATS:
        raise UnsupportedTensorError(
            f"{what} is {x.dtype}; expected float32, bfloat16 or float16: convert it first"
        )
    if x.layout is not torch.strided:
        raise UnsupportedTensorError(f"{what} is {x.layout}; expected a dense tensor")
