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
# Constants of templates/cpu_codebook.h.
FRACTION = 15
NEAR_TIE = (1 << FRACTION) - 4
BIAS = 256.5 + 2 / (1 << FRACTION)
SMALLEST = 2.0**-31 + 2.0**-54
# Of `Segments`.
FIRST_PAIR = 48  # the pair of binades [2**-31, 2**-29)
PAIRS = 16  # as many as a permute of 16 numbers can tell apart, or a shuffle of bytes
MOST_RUNS = 8  # as many numbers as 256 bits hold
NEVER = 0x7FFFFFFF  # no finite number's bits are above


@dataclass(frozen=True)
class Buckets:
    """Entries by the leading bits of a float: positive values first, then negative ones.

    With `a` the bits of |x| (of max(x, 0) if not `signed`), capped at `ceiling`:
    w = a - floor + 2**shift, or min(a, 1) where a < floor. The rank is
    (entries[w >> shift] + low) >> shift, with low the last `shift` bits of w, inverted for
    negative x.
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
    """Thresholds as a few evenly spaced runs, each cut off exactly by one threshold, its cut.

    The bits of |x| as an integer, plus `turn[b]` of their pair of binades b = exponent // 2 (from
    2**-31 up to 1), have the run of x as their leading byte: a cut is where the sum carries. The
    same run in another way: `lower[b]` is that at the beginning of the pair, and the next one
    begins above the bits `cuts[lower[b]]`. The rank of x, in a signed type counted from the zero
    code, is the whole part of min(slope * |x| + offset, high) above the bias, which is computed
    with FRACTION bits of fraction. Where these say that x is next to a tie, it may be wrong; in a
    signed type also where |x| is a cut, which the rest of the sum tells by being zero.
    """

    turn: U32
    lower: npt.NDArray[np.uint8]
    cuts: U32
    slope: F32
    offset: F32
    high: F32
    signed: bool
    zero: int
    """The code that ranks are counted from: 0 for an unsigned type."""


@dataclass(frozen=True)
class Tables:
    """All tables of one codebook; `pack` lays them out as the struct `Tables` in codebook.h."""

    levels: F32
    """Values over the unit, in code order, padded to 256 with zeros."""
    thresholds: F32
    """Ascending, padded to 256 with infinity."""
    order: npt.NDArray[np.uint8]
    """Code by rank, padded to 256."""
    unit: float
    """What thresholds are measured in: a block's absmax becomes this."""
    ordered: bool
    """True if the code is the rank."""
    zero_code: int
    buckets: Buckets | None
    segments: Segments | None

    @property
    def mirrored(self) -> bool:
        """True if codes 0 to 126 are the negatives of 254 to 128, and 127 is zero; 255 is free."""
        bits = self.levels.view(np.uint32)
        negatives = bits[:127] ^ np.uint32(1 << 31)
        return bool(bits[127] == 0 and np.array_equal(negatives[::-1], bits[128:255]))

    def pack(self) -> npt.NDArray[np.uint8]:
        """The tables as bytes, in the layout of the struct `Tables` of the kernels."""
        lines = self.segments or _NO_SEGMENTS
        planes = self.levels.view(np.uint8).reshape(256, 4).T
        parts: list[npt.NDArray[Any]] = [self.levels, planes, self.order, self.thresholds]
        parts += [lines.turn, lines.slope, lines.offset, lines.high, lines.lower, lines.cuts]
        parts += [self.buckets.entries] if self.buckets else []
        return np.concatenate([np.ascontiguousarray(part).view(np.uint8).ravel() for part in parts])


_NONE = np.zeros(16, np.float32)
_NO_SEGMENTS = Segments(
    turn=_NONE.view(np.uint32),
    lower=np.zeros(PAIRS, np.uint8),
    cuts=np.zeros(MOST_RUNS, np.uint32),
    slope=_NONE,
    offset=_NONE,
    high=_NONE,
    signed=False,
    zero=0,
)


@lru_cache(maxsize=256)
def _tables(text: str, *key: Any) -> Tables:
    del text  # which tells -0.0 from 0.0: they are equal, but read as other numbers
    codebook = Codebook(*key)
    levels = np.zeros(256, np.float32)
    levels[: len(codebook.values)] = codebook.levels
    thresholds = np.full(256, np.inf, np.float32)
    thresholds[: len(codebook.thresholds)] = codebook.thresholds
    order = np.zeros(256, np.uint8)
    order[: len(codebook.codes)] = codebook.codes
    exact = np.asarray(codebook.thresholds, np.float32)
    ordered = codebook.codes == tuple(range(len(codebook.codes)))
    buckets = find_buckets(exact)
    # Near ties kernels look into the buckets, which also tell them of negative numbers.
    even = ordered and buckets is not None
    return Tables(
        levels=levels,
        thresholds=thresholds,
        order=order,
        unit=codebook.unit,
        ordered=ordered,
        zero_code=codebook.zero_code,
        buckets=buckets,
        segments=find_segments(exact, codebook.zero_code, codebook.unit) if even else None,
    )


def tables(codebook: Codebook) -> Tables:
    """The tables of `codebook`, made once."""
    return _tables(repr(codebook.key), *codebook.key)


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
        if base == 0:  # then bucket 0, of what is below `floor`, would hold nothing but zero
            continue
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


def find_segments(thresholds: F32, zero: int, unit: float = 1.0) -> Segments | None:
    """Fit `Segments` to the thresholds; None if they have no such form, proven on all of them.

    Numbers are at most a little larger than `unit`.
    """
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
    pair = _pairs(cuts)
    if len(runs) > MOST_RUNS or pair is None or positive.min() <= SMALLEST:
        return None
    if cuts and unit > 1:  # beyond 2, binades are counted from the first one again
        return None
    bias = 0.0 if signed else BIAS
    lines = [_line(positive[start:end], start) for start, end in runs]
    slope = _sixteen([slope for slope, _ in lines])
    offset = _sixteen([offset + bias for _, offset in lines])
    high = _sixteen([end + bias for _, end in runs])
    lower = np.searchsorted(pair, np.arange(PAIRS)).astype(np.uint8)
    segments = Segments(
        turn=_turns(_bits(cuts), pair, lower, signed),
        lower=lower,
        cuts=np.array([*_bits(cuts), *[NEVER] * MOST_RUNS][:MOST_RUNS], np.uint32),
        slope=slope,
        offset=offset,
        high=high,
        signed=signed,
        zero=zero,
    )
    return segments if _proven(segments, thresholds, unit) else None


def _sixteen(values: list[float]) -> F32:
    return np.resize(np.asarray(values, np.float32), 16)


def _runs(positive: npt.NDArray[np.float64]) -> tuple[list[tuple[int, int]], list[float]]:
    """Longest evenly spaced runs [a, b) of thresholds, and the single thresholds between them."""
    runs: list[tuple[int, int]] = []
    cuts: list[float] = []
    start = 0
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


def _bits(cuts: list[float]) -> npt.NDArray[np.int64]:
    return np.asarray(cuts, np.float32).view(np.uint32).astype(np.int64)


def _pairs(cuts: list[float]) -> npt.NDArray[np.int64] | None:
    """The pair of binades of each cut; None if two share one, or a cut lies outside all pairs."""
    pair = (_bits(cuts) >> 24) - FIRST_PAIR
    if np.unique(pair).size != pair.size or ((pair < 0) | (pair >= PAIRS)).any():
        return None
    return pair


def _turns(
    bits: npt.NDArray[np.int64],
    pair: npt.NDArray[np.int64],
    lower: npt.NDArray[np.uint8],
    signed: bool,
) -> U32:
    """`Segments.turn` for cuts with these bits in these pairs of binades.

    A number that is a cut belongs to the run below, as ranks count thresholds below a number; in a
    signed type to the run above, as it does if it is negative.
    """
    runs = lower.astype(np.int64)
    turn = (runs - (np.arange(PAIRS) + FIRST_PAIR)) << 24
    turn[pair] = ((runs[pair] + 1) << 24) - bits - (0 if signed else 1)
    return turn.astype(np.uint32)


def _line(run: npt.NDArray[np.float64], first: int) -> tuple[float, float]:
    """Slope and offset with slope * threshold[i] + offset = first + i + 1/2."""
    if run.size == 0:
        return 0.0, float(first)
    length = float(run[-1] - run[0])  # zero for one threshold, or one several times over
    slope = (run.size - 1) / length if length > 0 else 0.4 / float(run[0])
    return slope, first + 0.5 - slope * float(run[0])


def search_segments(segments: Segments, x: F32) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """What kernels compute: the ranks of x, and where they are not sure of them."""
    a = np.maximum(np.abs(x) if segments.signed else x, np.float32(SMALLEST))
    turned = a.view(np.uint32) + segments.turn[(a.view(np.uint32) >> 24) % PAIRS]
    run = (turned >> 24) & 15
    product = a.astype(np.float64) * segments.slope[run]  # exact, so the sum is rounded once
    place = (product + segments.offset[run]).astype(np.float32)
    place = np.minimum(place, segments.high[run])
    if segments.signed:
        place = np.copysign(place, x) + np.float32(BIAS + segments.zero)
        place = np.maximum(place, np.float32(BIAS))
    bits = place.view(np.uint32)
    unsure = (bits & NEAR_TIE) == 0
    if segments.signed:
        unsure |= (turned & 0xFFFFFF) == 0
    return (bits >> FRACTION).astype(np.int64) & 255, unsure


def _proven(segments: Segments, thresholds: F32, unit: float) -> bool:
    """Whether every rank is right where the search is sure of it.

    Inside a run the computed place grows with x, so it is enough to look at both sides of every
    threshold, and at the ends. An unsure rank is that of a place just below or above it, so there
    it may be one too high, never too low: else a wrong rank could follow that seems sure.
    """
    up, down = (np.nextafter(thresholds, np.float32(limit)) for limit in (2 * unit, -2 * unit))
    most = np.float32(unit)
    ends = np.array([0, most, np.nextafter(most, 2 * most)], np.float32)
    x = np.concatenate([thresholds, up, down, ends, *([-ends] if segments.signed else [])])
    rank, unsure = search_segments(segments, x)
    excess = rank - np.searchsorted(thresholds, x, side="left")
    return bool(((excess == 0) | (unsure & (excess == 1))).all())
