"""Derives, from the table of a quant type, what kernels need to encode and decode quickly.

Decoding reads `levels`. Encoding is an exact nearest-code search without a loop: the leading bits
of a float choose a bucket that holds at most one decision threshold, and one table entry tells on
which side of it the rest of the bits fall (`Buckets`). Where the thresholds have no such short
table, a binary search serves. `Segments` is a faster form for codebooks that are linear in pieces,
such as the dynamic type: a multiply-add gives the code, and values close to a tie go to the exact
search.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from bnbx.registry.quant_type import Codebook

MAX_ENTRIES = 8192
F32 = npt.NDArray[np.float32]
U32 = npt.NDArray[np.uint32]
ONE_BITS = 0x3F800000


@dataclass(frozen=True)
class Buckets:
    """Entries by the leading bits of a float: positive values first, then negative ones.

    With `a` the bits of |x|, capped at `ceiling`:  w = a - floor + 2**shift, or w = min(a, 1) where
    a < floor;  entry = entries[w >> shift];  rank = (entry + low) >> shift  with low the last `shift` bits of w,
    inverted for negative x.
    """

    shift: int
    floor: int
    ceiling: int
    entries: U32
    signed: bool

    @property
    def half(self) -> int:
        """Entries for one sign."""
        return len(self.entries) // (2 if self.signed else 1)


@dataclass(frozen=True)
class Segments:
    """Thresholds as a few evenly spaced runs, each cut off exactly by one threshold.

    `index[e]` and `cut[e]`, by binade e = max(exponent + 31, 0), give the run of x:
    index + (|x| > cut). Its code is min(round(slope * |x| + offset), high), unless that lies
    within `margin` of a tie. For signed types the codes count away from the zero code.
    """

    index: npt.NDArray[np.int32]
    cut: F32
    slope: F32
    offset: F32
    high: F32
    margin: float
    signed: bool


@dataclass(frozen=True)
class Tables:
    """All tables of one codebook; `pack` lays them out as the struct `Tables` in common.h."""

    levels: F32
    """Values in code order, padded to 256 with zeros."""
    thresholds: F32
    """Ascending, padded to 256 with infinity."""
    order: npt.NDArray[np.uint8]
    """Code by rank, padded to 256."""
    ordered: bool
    """True if the code is the rank."""
    zero_code: int
    buckets: Buckets | None
    segments: Segments | None

    def pack(self) -> npt.NDArray[np.uint8]:
        """The tables as bytes, in the layout of the struct `Tables` of the kernels."""
        lines = self.segments or _NO_SEGMENTS
        planes = self.levels.view(np.uint8).reshape(256, 4).T
        parts: list[npt.NDArray[Any]] = [self.levels, planes, self.order, self.thresholds]
        parts += [lines.index, lines.cut, lines.slope, lines.offset, lines.high]
        parts += [self.buckets.entries] if self.buckets else []
        return np.concatenate([np.ascontiguousarray(part).view(np.uint8).ravel() for part in parts])


_NO_SEGMENTS = Segments(
    np.zeros(32, np.int32), *(np.zeros(n, np.float32) for n in (32, 16, 16, 16)), 0.0, False
)


@lru_cache(maxsize=64)
def _tables(values: tuple[float, ...]) -> Tables:
    codebook = Codebook(values)
    levels = np.zeros(256, np.float32)
    levels[: len(values)] = values
    thresholds = np.full(256, np.inf, np.float32)
    thresholds[: len(values) - 1] = codebook.thresholds
    order = np.zeros(256, np.uint8)
    order[: len(values)] = codebook.codes
    exact = np.asarray(codebook.thresholds, np.float32)
    ordered = codebook.codes == tuple(range(len(values)))
    return Tables(
        levels=levels,
        thresholds=thresholds,
        order=order,
        ordered=ordered,
        zero_code=codebook.zero_code,
        buckets=find_buckets(exact),
        segments=find_segments(exact, codebook.zero_code) if ordered else None,
    )


def tables(codebook: Codebook) -> Tables:
    """The tables of `codebook`, made once."""
    return _tables(codebook.values)


def find_buckets(thresholds: F32) -> Buckets | None:
    """The smallest bucket table in which no bucket holds two thresholds; None if it is too long."""
    signed = bool((thresholds < 0).any())
    bits = np.abs(thresholds).view(np.uint32)
    nonzero = bits[bits > 0]
    if nonzero.size == 0:
        return None
    ceiling = max(ONE_BITS, int(nonzero.max())) + 1
    for shift in range(22, 7, -1):
        base = int(nonzero.min()) >> shift
        half = (ceiling >> shift) - base + 2
        if half * (2 if signed else 1) > MAX_ENTRIES:
            return None
        place = np.where(bits > 0, (bits >> shift).astype(np.int64) - base + 1, 0)
        place += half * (thresholds < 0)
        if np.unique(place).size == place.size:
            entries = _entries(thresholds, bits, place, half, shift, signed)
            return Buckets(shift, base << shift, ceiling, entries, signed)
    return None


def _entries(
    thresholds: F32, bits: U32, place: npt.NDArray[np.int64], half: int, shift: int, signed: bool
) -> U32:
    """`rank << shift` plus what makes the sum with the low bits carry just past the threshold."""
    mask = (1 << shift) - 1
    below = np.zeros(half * (2 if signed else 1), np.int64)  # thresholds under the whole bucket
    negatives = int((thresholds < 0).sum())
    upper = place < half
    counts = np.bincount(place[upper], minlength=half)
    below[:half] = negatives + np.cumsum(counts) - counts
    if signed:
        counts = np.bincount(place[~upper] - half, minlength=half)
        below[half:] = negatives - np.cumsum(counts)
    entries = below << shift
    low = (bits & mask).astype(np.int64)
    entries[place] += np.where(upper, mask - low, low)
    return entries.astype(np.uint32)


def find_segments(thresholds: F32, zero: int) -> Segments | None:
    """Fit `Segments` to the thresholds; None if they have no such form, proven on all of them."""
    positive = thresholds[thresholds > 0].astype(np.float64)
    negative = -thresholds[thresholds < 0].astype(np.float64)[::-1]
    signed = negative.size > 0
    if signed:
        common = min(positive.size, negative.size)
        mirrored = np.array_equal(positive[:common], negative[:common])
        if not mirrored or common < negative.size or zero != negative.size:
            return None
    elif zero != 0 or positive.size != thresholds.size:
        return None
    runs, cuts = _runs(positive)
    binades = _binades(cuts)
    if len(runs) > 16 or binades is None:
        return None
    lines = [_line(positive[a:b], a) for a, b in runs]
    high = [float(b) for _, b in runs]
    slope, offset, top = (
        np.resize(np.asarray(column, np.float32), 16) for column in (*zip(*lines), high)
    )
    index, cut = binades
    segments = Segments(index, cut, slope, offset, top, 0.0, signed)
    margin = _margin(segments, positive.astype(np.float32))
    if margin is None:
        return None
    return Segments(index, cut, slope, offset, top, margin, signed)


def _runs(positive: npt.NDArray[np.float64]) -> tuple[list[tuple[int, int]], list[float]]:
    """Longest evenly spaced runs [a, b) of thresholds, and the single thresholds between them."""
    runs, cuts, start = [], [], 0
    while True:
        end = min(start + 2, positive.size)
        while end < positive.size and _even(positive[start : end + 1]):
            end += 1
        runs.append((start, end))
        if end >= positive.size:
            return runs, cuts
        cuts.append(float(positive[end]))
        start = end + 1


def _even(run: npt.NDArray[np.float64]) -> bool:
    steps = np.arange(run.size)
    spacing = (run[-1] - run[0]) / (run.size - 1)
    return bool(np.abs((run - run[0]) / spacing - steps).max() < 1e-3) if spacing > 0 else False


def _binades(cuts: list[float]) -> tuple[npt.NDArray[np.int32], F32] | None:
    """Per binade: how many cuts lie below it, and the one inside it (infinity if none)."""
    exponent = [max(int(np.frexp(cut)[1]) - 1 + 31, 0) for cut in cuts]
    if len(set(exponent)) != len(exponent) or any(e > 31 for e in exponent):
        return None
    index = np.array([sum(e < binade for e in exponent) for binade in range(32)], np.int32)
    cut = np.full(32, np.inf, np.float32)
    cut[exponent] = cuts
    return index, cut


def _line(run: npt.NDArray[np.float64], first: int) -> tuple[float, float]:
    """Slope and offset with slope * threshold[i] + offset = first + i + 1/2."""
    if run.size == 0:
        return 0.0, float(first)
    if run.size == 1:
        slope = 0.4 / float(run[0])
        return slope, first + 0.5 - slope * float(run[0])
    slope = (run.size - 1) / float(run[-1] - run[0])
    return slope, first + 0.5 - slope * float(run[0])


def search_segments(segments: Segments, x: F32) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """What a kernel computes for x >= 0: the code above zero, and the distance to a tie."""
    binade = np.maximum((x.view(np.uint32) >> 23).astype(np.int64) - 96, 0)
    run = segments.index[binade] + (x > segments.cut[binade])
    product = x.astype(np.float64) * segments.slope[run]  # exact: 48 bits
    value = (product + segments.offset[run]).astype(np.float32)
    nearest = np.rint(value)
    code = np.minimum(nearest, segments.high[run])
    return code.astype(np.int64), 0.5 - np.abs(value - nearest)


def _margin(segments: Segments, positive: F32) -> float | None:
    """The distance to a tie within which codes may be wrong; None if no margin mends them.

    Within a run the computed value grows with x, so it is enough to look at both sides of every
    threshold.
    """
    x = np.concatenate([positive, np.nextafter(positive, np.float32(2)), np.float32([0, 1])])
    expected = np.searchsorted(positive, x, side="left")
    code, distance = search_segments(segments, x)
    wrong = distance[code != expected]
    margin = max(float(wrong.max()) * 2 if wrong.size else 0.0, 2.0**-13)
    return margin if margin <= 2.0**-9 and np.abs(code - expected).max() <= 1 else None
