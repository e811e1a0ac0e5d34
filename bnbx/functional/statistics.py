"""Statistics of tensors: quantiles, sums by pairs of indices, and clipping to past norms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bnbx.errors import InputError, OptionError
from bnbx.functional import checks
from bnbx.functional.registration import operation

QUANTILES = 256
HISTORY = 100
LAST_STEP = (1 << 63) - 1


# ---- quantiles


def _quantiles_fake(x: Tensor, offset: float, count: int) -> Tensor:
    del offset
    return x.new_empty(count, dtype=torch.float32)


@operation(
    "estimate_quantiles(Tensor x, float offset, int count) -> Tensor",
    _quantiles_fake,
    gradient=False,
)
def _quantiles(x: Tensor, offset: float, count: int) -> Tensor:
    ascending = x.reshape(-1).float().sort().values
    last = ascending.numel() - 1
    shares = torch.linspace(offset, 1 - offset, count, dtype=torch.float64, device=x.device)
    places = shares * last
    low = places.floor().long().clamp(0, max(last - 1, 0))
    part = (places - low).float()
    found = ascending[low] + (ascending[(low + 1).clamp(max=last)] - ascending[low]) * part
    # Sorted, NaN comes last: as in torch.quantile, there is no quantile then.
    return torch.where(ascending[-1].isnan(), torch.nan, found)


def estimate_quantiles(
    A: Tensor,  # noqa: N803 - the name it has in bitsandbytes
    out: Tensor | None = None,
    offset: float = 1 / 512,
    num_quantiles: int = 256,
) -> Tensor:
    """Quantiles at even steps, from `offset` to 1 - `offset`.

    They are the exact ones, with linear interpolation between elements, where bitsandbytes 0.0.24
    estimates (with the SRAM-Quantiles algorithm).

    Args:
        A: float32, bfloat16 or float16, any shape, at least `num_quantiles` elements.
        out: memory for them: float32 (num_quantiles,).
        offset: the share of elements below the first quantile. The default, 1/512, is meant for
            256 quantiles; with fewer it becomes half a step, 1 / (2 * num_quantiles).
        num_quantiles: 2 to 256.

    Returns:
        (num_quantiles,), float32, ascending; `out` if that is given.

    Raises:
        InputError: another dtype or shape, or too few elements.
        OptionError: an offset or a number out of range.
    """
    checks.floats("A", A)
    num_quantiles = checks.whole("num_quantiles", num_quantiles, 2, QUANTILES)
    offset = checks.number("offset", offset)
    if not 0 <= offset < 0.5:
        raise OptionError(f"offset={offset!r}; expected a number from 0 to 0.5")
    if A.numel() < num_quantiles:
        raise InputError(f"A has {A.numel()} elements; expected at least {num_quantiles}")
    if num_quantiles < QUANTILES and offset == 1 / 512:
        offset = 1 / (2 * num_quantiles)
    found: Tensor = _quantiles(A.detach(), offset, num_quantiles)
    if out is None:
        return found
    checks.of_dtype("out", out, torch.float32)
    checks.of_shape("out", out, (num_quantiles,))
    checks.together([("A", A), ("out", out)])
    return out.copy_(found)


# ---- sums by pairs of indices


def _nothing_fake(*arguments: Any) -> None:
    return None


@operation(
    "histogram_scatter_add_2d(Tensor(a!) histogram, Tensor index1, Tensor index2, Tensor source)"
    " -> ()",
    _nothing_fake,
)
def _scatter_add(histogram: Tensor, index1: Tensor, index2: Tensor, source: Tensor) -> None:
    if not source.numel():
        return
    for name, index, size in zip(
        ("index1", "index2"), (index1, index2), histogram.shape, strict=True
    ):
        low, high = index.aminmax()
        if int(low) < 0 or int(high) >= size:
            raise InputError(
                f"{name} holds {int(low)} to {int(high)}; histogram has {size} places there"
            )
    place = (index1.long().reshape(-1), index2.long().reshape(-1))
    histogram.index_put_(place, source.reshape(-1), accumulate=True)


def histogram_scatter_add_2d(
    histogram: Tensor, index1: Tensor, index2: Tensor, source: Tensor
) -> None:
    """Add numbers to a table at pairs of places: histogram[index1[i], index2[i]] += source[i].

    Args:
        histogram: float32 (rows, columns); changed in place.
        index1: int32 or int64, any shape: rows, from 0.
        index2: int32 or int64, of as many elements: columns, from 0.
        source: float32, of as many elements.

    Raises:
        InputError: another dtype or shape, or a place that the table does not have; then nothing
            was added.
        DeviceError: they are not on one device.
    """
    checks.of_dtype("histogram", histogram, torch.float32)
    checks.of_dtype("index1", index1, torch.int32, torch.int64)
    checks.of_dtype("index2", index2, torch.int32, torch.int64)
    checks.of_dtype("source", source, torch.float32)
    if histogram.dim() != 2:
        raise InputError(f"histogram has shape {tuple(histogram.shape)}; expected (rows, columns)")
    checks.of_size("index1", index1, source.numel(), "one for each element of source")
    checks.of_size("index2", index2, source.numel(), "one for each element of source")
    named = zip(
        ("histogram", "index1", "index2", "source"),
        (histogram, index1, index2, source),
        strict=True,
    )
    checks.together(named)
    _scatter_add(histogram, index1, index2, source)


# ---- clipping to past norms


def _clip_fake(
    grad: Tensor, gnorm_vec: Tensor, step: int, percentile: int
) -> tuple[Tensor, Tensor, Tensor]:
    del grad, step, percentile
    return gnorm_vec.new_empty(()), gnorm_vec.new_empty(()), gnorm_vec.new_empty(())


@operation(
    "percentile_clipping(Tensor grad, Tensor(a!) gnorm_vec, int step, int percentile)"
    " -> (Tensor, Tensor, Tensor)",
    _clip_fake,
)
def _clip(
    grad: Tensor, gnorm_vec: Tensor, step: int, percentile: int
) -> tuple[Tensor, Tensor, Tensor]:
    square = grad.reshape(-1).double().square().sum().to(torch.float32)
    if step == 1:
        gnorm_vec.fill_(square)
    else:
        gnorm_vec[step % HISTORY] = square
    current = square.sqrt()
    allowed = gnorm_vec.sort().values[percentile].sqrt()
    over = current > allowed
    return current, allowed, torch.where(over, allowed / torch.where(over, current, 1.0), 1.0)


def percentile_clipping(
    grad: Tensor, gnorm_vec: Tensor, step: int, percentile: int = 5
) -> tuple[Tensor, Tensor, Tensor]:
    """How to scale a gradient so that its norm is no larger than a percentile of the last 100.

    Args:
        grad: float32, bfloat16 or float16, any shape; it stays as it is.
        gnorm_vec: float32 (100,): squared norms of the last steps; the present one is put in
            place, and in all places if `step` is 1.
        step: number of the step, 1 for the first.
        percentile: 0 to 99.

    Returns:
        The norm of the gradient, the largest norm allowed, and the factor, 1 or less, that makes
        the one as small as the other; all 0-d, float32. The factor goes to the optimizer_update
        functions as `gnorm_scale`.

    Raises:
        InputError: another dtype or shape.
        OptionError: a step or percentile out of range.
    """
    checks.floats("grad", grad)
    checks.of_dtype("gnorm_vec", gnorm_vec, torch.float32)
    checks.of_shape("gnorm_vec", gnorm_vec, (HISTORY,))
    checks.together([("grad", grad), ("gnorm_vec", gnorm_vec)])
    step = checks.whole("step", step, 1, LAST_STEP)
    percentile = checks.whole("percentile", percentile, 0, HISTORY - 1)
    found: tuple[Tensor, Tensor, Tensor] = _clip(grad.detach(), gnorm_vec, step, percentile)
    return found
