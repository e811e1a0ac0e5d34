"""Merge a low-rank update (LoRA, arXiv:2106.09685) into a quantized weight, and say what it costs.

Dequantize, add, quantize: that is how adapters are merged into 4-bit weights, and it loses more
than it adds. The dequantized weight lies exactly on the grid of its scales; a new absmax moves the
grid, and every element is rounded once more, mostly by more than the update is large. Here the old
scales are the starting point of the fit, so that a block moves to another grid only if that brings
it nearer to the exact sum: the merged weight is never further from it than the unmerged one.

An update that is small beside a step of the grid cannot survive in the same number of bits,
whatever the scales. `MergeReport` says how much did; a dense merge, or a wider type, keeps more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bnbx.errors import OptionError, UnknownNameError, UnsupportedTensorError
from bnbx.kernels.coding import FLOATS, check_numbers, decode, encode
from bnbx.kernels.encoding import Encoding, make_encoding
from bnbx.kernels.fit import fit_scales
from bnbx.layers.int8 import Linear8bitLt
from bnbx.layers.module import QuantizedModule
from bnbx.layers.parameter import QuantParameter
from bnbx.registry import quant_types
from bnbx.registry.quant_type import Scale

ROWS = 1024  # at a time, when norms are summed


@dataclass(frozen=True)
class MergeReport:
    """What a merge costs; norms are Frobenius norms.

    With W the dequantized weight, D = scaling * B @ A, M the merged weight and N the one that
    plain requantization with absmax gives:

    Attributes:
        error: ||M - (W + D)|| / ||W + D||.
        absmax_error: ||N - (W + D)|| / ||W + D||.
        update_error: ||M - (W + D)|| / ||D||; 1 is what leaving the update out would give.
        absmax_update_error: ||N - (W + D)|| / ||D||.
        survived: <M - W, D> / <D, D>: the part of the update that is in the merged weight, 1 if
            all of it is.
        update: ||D|| / ||W||.
        bytes: of the merged weight.
        dense_bytes: of the same weight in bfloat16.
    """

    error: float
    absmax_error: float
    update_error: float
    absmax_update_error: float
    survived: float
    update: float
    bytes: int
    dense_bytes: int

    def __str__(self) -> str:
        return (
            f"merged with a relative error of {self.error:.3g} (absmax: {self.absmax_error:.3g}); "
            f"{self.survived:.1%} of the update survived, {self.update_error:.3g} of its norm is "
            f"off (absmax: {self.absmax_update_error:.3g}); {self.bytes:,} bytes, "
            f"{self.dense_bytes:,} in bfloat16"
        )


@dataclass(frozen=True)
class Merged:
    """A merged weight.

    Attributes:
        encoding: the same as before.
        parts: of the merged weight.
        shape: of the weight.
        report: what it cost.
        dense: the exact sum in the dtype that was asked for; None if none was.
    """

    encoding: Encoding
    parts: list[Tensor]
    shape: tuple[int, ...]
    report: MergeReport
    dense: Tensor | None


Parts = tuple[Encoding, Sequence[Tensor], Sequence[int]]
Weight = QuantizedModule | Linear8bitLt | QuantParameter | Parts
EXPECTED = "merge_lora expects a quantized layer, its parameter or (encoding, parts, shape)"


@torch.no_grad()
def merge_lora(
    weight: Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float = 1.0,
    *,
    fit: str | None = "mse",
    in_place: bool = False,
    dense: torch.dtype | None = None,
) -> Merged:
    """Merge `scaling * lora_b @ lora_a` into a quantized weight; the type stays what it is.

    Takes three dense float32 copies of the weight while it runs. Print the report of what it
    returns before you trust a merge: see this module's text.

    Args:
        weight: a quantized layer, its parameter, or the (encoding, parts, shape) of a weight.
        lora_a: (rank, in), float32, bfloat16 or float16.
        lora_b: (out, rank).
        scaling: alpha / rank, or alpha / sqrt(rank).
        fit: how scales are chosen (see `fit_scales`); None for plain requantization with absmax.
        in_place: write the merged weight over the old one, in its own memory. If anything is
            wrong, nothing has been written.
        dense: also return the exact sum, in this dtype.

    Raises:
        OptionError: shapes that do not belong together, numbers that are not finite, no such fit.
        UnsupportedTensorError: lora_a or lora_b is no tensor of floats on the weight's device; or
            the weight is something that is not quantized.
        QuantizedDataError: parts, encoding and shape of the weight do not fit one another.
    """
    encoding, parts, shape = _parts_of(weight)
    _check(shape, parts[0].device, lora_a, lora_b, scaling, dense)
    before = decode(encoding, parts, shape)
    exact = torch.addmm(before, lora_b.float(), lora_a.float(), alpha=scaling)
    best = encode(encoding, exact)
    merged = decode(encoding, best, shape)
    off = absmax = _norm(merged, exact)
    # From the old parts, and if what their blocks share suits the sum less, from absmax.
    for start in (parts, None) if fit is not None else ():
        tried = fit_scales(encoding, exact, str(fit), start=start)
        merged = decode(encoding, tried, shape, out=merged)
        best, off = tried, _norm(merged, exact)
        if off <= absmax:
            break
    report = _report(encoding, before, exact, merged, off, absmax)
    total = None if dense is None else exact.to(dense)
    if in_place:
        for old, new in zip(parts, best, strict=True):
            old.copy_(new.view_as(old))  # layers keep codes as (n, 1)
    return Merged(encoding, best, tuple(shape), report, total)


def _parts_of(weight: Weight) -> tuple[Encoding, Sequence[Tensor], Sequence[int]]:
    """What a weight is to kernels; the parts are its own memory."""
    if isinstance(weight, tuple):
        return weight
    if isinstance(weight, Linear8bitLt):
        codes, scales = weight.weight.detach(), getattr(weight.weight, "SCB", None)
        scales = weight.state.SCB if scales is None else scales
        if codes.dtype != torch.int8 or scales is None:
            raise UnsupportedTensorError(f"{EXPECTED}; this Linear8bitLt has its weight in floats")
        return integer_rows(), [codes.view(torch.uint8), scales], tuple(codes.shape)
    state = weight.state_of_weight() if isinstance(weight, QuantizedModule) else None
    param = weight.weight if isinstance(weight, QuantizedModule) else weight
    if isinstance(param, QuantParameter):
        state = state or param.quant_state
    if state is None:
        raise UnsupportedTensorError(f"{EXPECTED}, not a {type(weight).__name__}")
    codes = param.detach()
    return state.check(codes), state.parts(codes), tuple(state.shape or ())


def integer_rows() -> Encoding:
    """The encoding of `Linear8bitLt`: the registered type of whole numbers that has it."""
    whole = (*map(float, range(128)), *map(float, range(-128, 0)))
    found = quant_types().find(lambda t: t.values == whole and t.scale == Scale(per="row"))
    if found is None:
        raise UnknownNameError("no registered type holds whole numbers with a scale per row")
    return make_encoding(found)


def _check(
    shape: Sequence[int],
    device: torch.device,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dense: torch.dtype | None,
) -> None:
    for name, x in (("lora_a", lora_a), ("lora_b", lora_b)):
        check_numbers(name, x)
        if x.device != device:
            raise UnsupportedTensorError(f"{name} is on {x.device}, the weight on {device}")
    rank = lora_a.shape[0] if lora_a.dim() else 0
    if len(shape) != 2:
        raise OptionError(f"a weight of shape {tuple(shape)}; low-rank updates are for (out, in)")
    if lora_a.shape != (rank, shape[1]) or lora_b.shape != (shape[0], rank):
        swapped = lora_b.dim() == 2 and lora_b.shape[1:] == shape[1:]
        raise OptionError(
            f"lora_a of shape {tuple(lora_a.shape)} and lora_b of shape {tuple(lora_b.shape)} do "
            f"not make an update of a weight of shape {tuple(shape)}; expected (rank, {shape[1]}) "
            f"and ({shape[0]}, rank)" + ("; they look swapped" if swapped else "")
        )
    if not math.isfinite(scaling):
        raise OptionError(f"scaling is {scaling!r}; expected a finite number")
    for name, x in (("lora_a", lora_a), ("lora_b", lora_b)):
        if not bool(x.isfinite().all()):
            raise OptionError(f"{name} has numbers that are not finite; nothing was merged")
    if dense is not None and dense not in FLOATS:
        raise OptionError(f"dense={dense!r}; expected one of {FLOATS}, or None")


def _report(
    encoding: Encoding, weight: Tensor, exact: Tensor, merged: Tensor, off: float, absmax: float
) -> MergeReport:
    update = _norm(exact, weight)
    along = sum(
        float(((m - w).double() * (e - w).double()).sum())
        for m, w, e in zip(*(torch.split(t, ROWS) for t in (merged, weight, exact)), strict=True)
    )
    whole = _norm(exact)
    return MergeReport(
        error=_ratio(off, whole),
        absmax_error=_ratio(absmax, whole),
        update_error=_ratio(off, update),
        absmax_update_error=_ratio(absmax, update),
        survived=along / update**2 if update else 1.0,
        update=_ratio(update, _norm(weight)),
        bytes=encoding.bytes(weight.shape),
        dense_bytes=2 * weight.numel(),
    )


def _norm(x: Tensor, less: Tensor | None = None) -> float:
    """Of x, or of the difference, summed in float64 a few rows at a time."""
    lesses = torch.split(less, ROWS) if less is not None else [None] * -(-len(x) // ROWS)
    pairs = zip(torch.split(x, ROWS), lesses, strict=False)
    return math.sqrt(
        sum(float((a if b is None else a - b).double().square().sum()) for a, b in pairs)
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else (math.inf if part else 0.0)
