"""LLM.int8() with torch operations: any device, the same bits as the native targets.

Every operation is one correctly rounded float32 operation. The products of outlier columns are
added up one after another in the native targets, in a matrix product here: that part is as close
as float32 is.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST = 127
STEP = torch.tensor(1.0, dtype=torch.float32, device="cpu") / MOST  # a float32 number
EXACT = 1024  # so many products of codes add up to less than 2**24, exactly in float32


def quantize_rows(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """See `bnbx.kernels.int8.quantize_rows`."""
    rows, columns = x.shape
    numbers = x.float()
    magnitude = numbers.abs()
    outliers = magnitude >= _limit(threshold, x.device)
    kept = magnitude.masked_fill(outliers, 0.0)
    absmax = kept.amax(1) if columns else kept.new_zeros(rows)
    inverse = absmax.reciprocal() * MOST
    inverse = torch.where(absmax.isfinite() & inverse.isfinite(), inverse, 0.0)
    scaled = torch.where(outliers | (inverse == 0)[:, None], 0.0, numbers * inverse[:, None])
    codes = scaled.round().to(torch.int8)
    outlier = outliers.any(0)
    if rows > 1:
        codes = codes.masked_fill(outlier, 0)
    return codes, absmax, outlier


def dequantize_rows(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """See `bnbx.kernels.int8.dequantize_rows`."""
    return (codes.float() * absmax[:, None] * STEP.to(codes.device)).to(dtype)


def linear(
    x: Tensor, weight: Tensor, weight_absmax: Tensor, bias: Tensor | None, threshold: float
) -> tuple[Tensor, Tensor]:
    """See `bnbx.kernels.int8.linear`."""
    step = STEP.to(x.device)
    codes, absmax, outlier = quantize_rows(x, threshold)
    found = products(codes, weight).float() * (absmax * step * step)[:, None]
    if threshold > 0:
        columns = outlier.nonzero()[:, 0]
        found = found + x[:, columns].float() @ (weight[:, columns].t().float() * step)
    found = found * weight_absmax
    y = (found if bias is None else found + bias.float()).to(x.dtype)
    return y, outlier if threshold > 0 else outlier[:0]


def products(codes: Tensor, weight: Tensor) -> Tensor:
    """The sums of products of codes, int32 (rows, outs), exactly."""
    total = torch.zeros((len(codes), len(weight)), dtype=torch.int32, device=codes.device)
    for at in range(0, codes.shape[1], EXACT):
        part = codes[:, at : at + EXACT].float() @ weight[:, at : at + EXACT].t().float()
        total += part.to(torch.int32)
    return total


def _limit(threshold: float, device: torch.device) -> Tensor:
    """What magnitudes are compared with; no number is an outlier where the threshold is 0."""
    limit = threshold if threshold > 0 else torch.nan
    return torch.tensor(limit, dtype=torch.float32, device=device)
