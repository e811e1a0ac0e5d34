"""Scales that fit: the same codes and parts as `coding.encode`, with a smaller squared error.

A block's absmax lets its largest element decide the scale of all others. A search over multiples
of it, then alternating least squares (for given codes the best scale is <x, q> / <q, q>; for a
given scale the best codes are the nearest) finds scales that waste less, without any data but the
weight itself. Clipping by search is as old as 4-bit quantization (arXiv:1810.05723, "ACIQ");
alternating between codes and scale is Lloyd's algorithm with a table that only stretches.

Every candidate is first rounded to what the encoding can keep (bfloat16, e4m3, a power of two,
8-bit codes of scales), and replaces absmax only if the error of that block, as decoded, is
smaller. What blocks share (the scale of the tensor, the scales of scales and their mean) stays
what `encode` made it, so each block may choose alone and none is ever worse.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from bnbx.errors import OptionError
from bnbx.kernels import fit_cpu, fit_cuda, fit_reference
from bnbx.kernels.coding import check_numbers, encode, target_for
from bnbx.kernels.coding_reference import (
    LARGEST_FLOAT,
    SMALLEST,
    factors,
    levels_on,
    scales_of,
    search_on,
    second_encoding,
)
from bnbx.kernels.encoding import Encoding, check_parts

METHODS = ("mse",)
MULTIPLES = tuple(2.0 * 0.93**i for i in range(24))
"""Of absmax: from 2, where the largest element does best on a smaller number of a table of floats,
to 0.38, below which only 2 bits of long-tailed weights want to be, and get by least squares."""
POWERS = (2.0, 0.5, 0.25)
"""The same, where scales are powers of two."""
FIRST_STEP = 0.04
STEPS = 3
MARGIN = 1e-5  # of an error: what float32 sums may be off by, many times over
PIECE = 1 << 20  # elements at a time, so that temporaries stay small; a multiple of 8
TARGETS: Mapping[str, ModuleType] = {"cpu": fit_cpu, "cuda": fit_cuda}  # others: fit_reference
MORE: Mapping[str, int] = {"cuda": 16}
"""Pieces at a time where kernels need no temporaries, and run in less time than launches take."""


def check_method(method: str | None) -> None:
    """Raise OptionError if there is no such method; None is absmax, which searches nothing."""
    if method is not None and method not in METHODS:
        raise OptionError(f"fit={method!r}; expected one of {METHODS}, or None for absmax")


def fit_scales(
    encoding: Encoding,
    x: Tensor,
    method: str = "mse",
    *,
    steps: int = STEPS,
    start: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Quantize with fitted scales.

    Args:
        encoding: any; see `bnbx.kernels.encoding`.
        x: float32, bfloat16 or float16, any shape, strides and device.
        method: "mse": the least sum of squared differences in each block.
        steps: rounds of refinement after the search; each tries a scale a little larger, one a
            little smaller, and the least-squares one.
        start: parts of a tensor of this shape that is near x, which to improve upon instead of
            those of `encode`; they are left as they are.

    Returns:
        The parts, as `encode` gives them. Of no block is the squared error of the decoded float32
        numbers larger than at the start; blocks with NaN or infinity are as there.

    Raises:
        OptionError: no such method; negative steps.
        UnsupportedTensorError: x has another dtype or layout.
        QuantizedDataError: `start` does not fit.
    """
    check_method(method)
    if steps < 0:
        raise OptionError(f"steps={steps!r}; expected a number of rounds, 0 or more")
    if start is None:
        parts = encode(encoding, x)
    else:
        check_numbers("x", x)
        check_parts(encoding, x.shape, start)
        parts = [part.clone() for part in start]
    if x.numel():
        with torch.no_grad():
            # Where codes are not the nearest for their scales: those, and absmax, are tried too.
            again = start is not None or encoding.second is not None
            fit = _Fit(encoding, parts, x.shape, steps, again=again)
            for first, stop, blocks, packed in _chunks(encoding, x.detach(), parts[0], fit.piece):
                fit.chunk(first, stop, blocks, packed)
    return parts


def _chunks(
    encoding: Encoding, x: Tensor, codes: Tensor, piece: int
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Blocks from `start` to `stop` (blocks, elements), and views (blocks, bytes) of their codes.

    A last block that is shorter comes alone.
    """
    rows, columns = encoding.grid(x.shape)
    flat, packed = x.reshape(rows, columns), codes.view(rows, -1)
    if encoding.per == "block":
        size = encoding.block_size
        whole = columns // size
        of_whole = whole * size * encoding.bits // 8
        yield from _split(
            0,
            flat[0, : whole * size].reshape(whole, size),
            packed[0, :of_whole].view(whole, size * encoding.bits // 8),
            piece,
        )
        if columns % size:
            yield whole, whole + 1, flat[:, whole * size :], packed[:, of_whole:]
    else:
        yield from _split(0, flat, packed, piece)


def _split(
    start: int, blocks: Tensor, packed: Tensor, piece: int
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    count = max(1, piece // max(1, blocks.shape[1]))
    for some, some_packed in zip(
        torch.split(blocks, count), torch.split(packed, count), strict=True
    ):
        yield start, start + len(some), some, some_packed
        start += len(some)


@dataclass
class _Choice:
    """What has been found best for each block of a chunk; `sums` are those of `fit_reference`."""

    sums: Tensor
    kept: Tensor
    factor: Tensor
    center: Tensor | None
    changed: Tensor

    def improve(self, other: _Choice) -> None:
        """Take over the blocks in which the other's error is smaller."""
        better = other.sums[0] < self.sums[0]
        self.sums = torch.where(better, other.sums, self.sums)
        self.kept = torch.where(better, other.kept, self.kept)
        self.factor = torch.where(better, other.factor, self.factor)
        if self.center is not None and other.center is not None:
            self.center = torch.where(better, other.center, self.center)
        self.changed |= better


class _Fit:
    """One tensor that is being fitted: `chunk` writes into its parts."""

    def __init__(
        self,
        encoding: Encoding,
        parts: Sequence[Tensor],
        shape: Sequence[int],
        steps: int,
        *,
        again: bool,
    ) -> None:
        self.encoding = encoding
        self.found = dict(zip(encoding.parts, parts, strict=True))
        self.factors = factors(encoding, parts, shape)
        device = parts[0].device
        chosen = target_for(encoding, device.type)
        self.target = TARGETS.get(chosen, fit_reference)
        self.piece = PIECE * MORE.get(chosen, 1)
        powers = encoding.quant_type.scale.dtype == "e8m0"
        self.steps = 0 if powers else steps
        self.multiples = (POWERS if powers else MULTIPLES) + ((1.0,) if again else ())
        self.again = again
        # Absmax is a multiple of the factor by which levels are multiplied.
        self.per_factor = encoding.codebook.unit if encoding.keeps_step else 1.0
        self.natural = 1.0 if encoding.keeps_step else encoding.codebook.unit
        if encoding.second is not None:
            inner = second_encoding(encoding)
            self.second_thresholds, self.second_order = search_on(inner, device)
            self.second_levels = levels_on(inner, device)
            self.second_inverse = scales_of(inner, self.found["second_scale"], None)[2]

    def chunk(self, start: int, stop: int, blocks: Tensor, packed: Tensor) -> None:
        """Fit the blocks from `start` to `stop`, and write what is better."""
        if blocks.shape[1] <= self.piece:
            blocks = blocks.float()  # once, and not in each attempt
        center = self.found["center"][start:stop] if "center" in self.found else None
        largest = _largest(blocks, center, self.piece)
        norm = 1.0 / largest.clamp(min=SMALLEST)
        kept, factor = self.found["scale"][start:stop], self.factors[start:stop]
        sums = self._sums(blocks, factor, center, norm, packed)
        sums[0] *= 1 - MARGIN
        best = _Choice(sums, kept, factor, center, torch.zeros_like(largest, dtype=torch.bool))

        def attempt(factor: Tensor, center: Tensor | None) -> None:
            kept, rounded = self._rounded(factor, start, stop)
            found = self._sums(blocks, rounded, center, norm)
            best.improve(_Choice(found, kept, rounded, center, best.changed))

        if self.again:
            attempt(factor, center)
        for multiple in self.multiples:
            attempt(largest * (multiple / self.per_factor), center)
        for step in range(self.steps):
            for change in (1 + FIRST_STEP * 0.5**step, 1 - FIRST_STEP * 0.5**step):
                attempt(best.factor * change, best.center)
            attempt(*_least_squares(best, norm, blocks.shape[1]))
        self.found["scale"][start:stop] = best.kept
        if best.center is not None:
            self.found["center"][start:stop] = best.center
        inverse = self._inverse(best.factor)
        for x, codes in self._pieces(blocks, packed):
            self.target.write(self.encoding, x, inverse, best.center, best.changed, codes)

    def _pieces(self, blocks: Tensor, packed: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Long blocks in pieces, float32, and their codes."""
        place = 0
        for x in torch.split(blocks, self.piece, 1):
            size = -(-x.shape[1] * self.encoding.bits // 8)
            yield x.float(), packed[:, place : place + size]
            place += size

    def _sums(
        self,
        blocks: Tensor,
        factor: Tensor,
        center: Tensor | None,
        norm: Tensor,
        packed: Tensor | None = None,
    ) -> Tensor:
        """The sums for these scales, with the nearest codes or with those that are packed."""
        inverse = self._inverse(factor)
        if packed is not None:
            found = [
                self.target.sums(self.encoding, x, factor, inverse, center, norm, codes)
                for x, codes in self._pieces(blocks, packed)
            ]
        else:
            found = [
                self.target.sums(self.encoding, x.float(), factor, inverse, center, norm, None)
                for x in torch.split(blocks, self.piece, 1)
            ]
        return found[0] if len(found) == 1 else torch.stack(found).sum(0)

    def _rounded(self, factor: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """What is kept of factors, and the factors that it reads as."""
        if self.encoding.second is None:
            scale = self.found.get("tensor_scale")
            kept, read, _ = scales_of(self.encoding, factor * self.per_factor, scale)
            return kept, read
        place = torch.arange(start, stop, device=factor.device) // self.encoding.second_block
        scaled = (factor - self.found["mean"]) * self.second_inverse[place]
        kept = self.second_order[torch.bucketize(scaled, self.second_thresholds)]
        read = self.second_levels[kept.int()] * self.found["second_scale"][place]
        return kept, read + self.found["mean"]

    def _inverse(self, factor: Tensor) -> Tensor:
        usable = (factor > 0) & factor.isfinite()
        inverse = (self.natural / torch.where(usable, factor, 1.0)).clamp(max=LARGEST_FLOAT)
        return torch.where(usable, inverse, 0.0)


def _least_squares(best: _Choice, norm: Tensor, size: int) -> tuple[Tensor, Tensor | None]:
    """The best factor, and center, for the codes at hand."""
    _, qx, qq, q, x = best.sums
    if best.center is None:
        return qx / qq / norm, None
    factor = (qx - q * x / size) / (qq - q * q / size)
    return factor / norm, (x - factor * q) / size / norm


def _largest(blocks: Tensor, center: Tensor | None, piece: int) -> Tensor:
    found = torch.zeros(len(blocks), dtype=torch.float32, device=blocks.device)
    for x in torch.split(blocks, piece, 1):
        x = x.float() if center is None else x.float() - center[:, None]
        found = torch.maximum(found, x.abs().amax(1))
    return found
