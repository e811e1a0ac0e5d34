"""The nearest-code search is exact, for any table of numbers.

The kernels' search is emulated here in numpy, line by line, and held against counting. What the
compiled code does is the matter of test_codebook_compiled.py.
"""

from __future__ import annotations

import ctypes
import re
from importlib.resources import files
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bnbx.kernels import codebook as module
from bnbx.kernels.codebook import SMALLEST, Buckets, Segments, Tables, search_segments, tables
from bnbx.quant_types.dynamic8 import dynamic8
from bnbx.quant_types.linear8 import linear8
from bnbx.registry.quant_type import Codebook
from codebooks import codebooks, full_codebooks, probes

F32 = npt.NDArray[np.float32]
Ranks = npt.NDArray[np.int64]
SEEDS = st.integers(0, 2**32 - 1)


def count(codebook: Codebook, x: F32) -> Ranks:
    """The rank of each x by its definition: the number of thresholds below it."""
    thresholds = np.array(codebook.thresholds, np.float32)
    return np.asarray((thresholds[None, :] < x[:, None]).sum(1), np.int64)


# ---- the search of codebook.h, line by line


def find_rank(found: Tables, x: F32) -> Ranks:
    if found.buckets is None:
        return by_halving(found.thresholds, x)
    return by_buckets(found.buckets, x)


def by_halving(thresholds: F32, x: F32) -> Ranks:
    rank = np.zeros(x.size, np.int64)
    for step in (128, 64, 32, 16, 8, 4, 2, 1):
        rank += np.where(thresholds[rank + step - 1] < x, step, 0)
    return rank


def by_buckets(buckets: Buckets, x: F32) -> Ranks:
    mask = (1 << buckets.shift) - 1
    bits = x.view(np.uint32).astype(np.int64)
    magnitude = bits & 0x7FFFFFFF
    a = magnitude if buckets.signed else np.where(bits == magnitude, magnitude, 0)
    a = np.minimum(a, buckets.ceiling)
    w = np.where(a < buckets.floor, np.minimum(a, 1), a - buckets.floor + (1 << buckets.shift))
    negative = bits >> 31 if buckets.signed else np.zeros_like(bits)
    low = (w & mask) ^ np.where(negative == 1, mask, 0)
    entries = buckets.entries.astype(np.int64)
    total: Ranks = entries[(w >> buckets.shift) + negative * buckets.half] + low
    assert (total < 2**32).all()
    return total >> buckets.shift


def in_segments(found: Tables, segments: Segments, x: F32) -> Ranks:
    """Where the fast search is not sure, the exact one decides."""
    rank, unsure = search_segments(segments, x)
    assert_same_runs(segments, x)
    return np.where(unsure, find_rank(found, x), rank)


def assert_same_runs(segments: Segments, x: F32) -> None:
    """By a comparison with the cut of a pair of binades, and by the sum that carries there."""
    bits = np.maximum(np.abs(x) if segments.signed else x, np.float32(SMALLEST)).view(np.uint32)
    pair = (bits >> 24) & 15
    lower = segments.lower[pair]
    cut = segments.cuts[lower]
    turned = bits + segments.turn[pair]
    apart = ((turned >> 24) & 15) != lower + (bits > cut)
    assert not (apart & ~(segments.signed & (bits == cut))).any()


def assert_exact(codebook: Codebook, seed: int) -> None:
    found = tables(codebook)
    x = probes(codebook.thresholds, seed, codebook.unit)
    expected = count(codebook, x)
    assert_equal_ranks(find_rank(found, x), expected, x)
    if found.segments is not None:
        assert found.ordered
        assert_equal_ranks(in_segments(found, found.segments, x), expected, x)
    assert_nearest(codebook, x, expected)


def assert_equal_ranks(ranks: Ranks, expected: Ranks, x: F32) -> None:
    wrong = ranks != expected
    assert not wrong.any(), list(zip(x[wrong], ranks[wrong], expected[wrong], strict=True))[:5]


def assert_nearest(codebook: Codebook, x: F32, ranks: Ranks) -> None:
    """No value is nearer than the chosen one, but for the rounding of a threshold to float32."""
    ascending = np.array([codebook.values[code] for code in codebook.codes], np.float64)
    assert (np.diff(ascending) >= 0).all()
    thresholds = np.array([*codebook.thresholds, codebook.thresholds[-1]], np.float32)
    distance = np.abs(x.astype(np.float64) - ascending[ranks])
    nearest = np.abs(x.astype(np.float64)[:, None] - ascending[None, :]).min(1)
    beside = np.maximum(np.abs(thresholds[ranks]), np.abs(thresholds[np.maximum(ranks - 1, 0)]))
    assert (distance - nearest <= np.spacing(beside) * 1.001).all()


def assert_ties(codebook: Codebook) -> None:
    """A number in the middle between two entries goes where the codebook says."""
    numbers = np.array([codebook.values[code] for code in codebook.codes], np.float64)
    low, high = numbers[:-1], numbers[1:]
    middle = (low + high) / 2
    ties = (low < middle) & (middle < high) & (middle.astype(np.float32) == middle)
    up = np.array([codebook.ties == "even" and code % 2 == 0 for code in codebook.codes[1:]])
    ranks = count(codebook, middle.astype(np.float32))
    assert (ranks == np.arange(middle.size) + up)[ties].all()


# Evenly spaced but for one threshold, whose neighbor the fast search must not take for its own.
ONE_OFF = (*sorted(abs(float(x)) for x in np.linspace(-1, 0.95, 64, dtype=np.float32)[:-1]), 1.0)


@settings(max_examples=200)
@given(codebooks(), SEEDS)
@example(ONE_OFF, 0)
@example(dynamic8.values, 0)
@example(dynamic8.codebook(signed=False).values, 0)
@example(linear8.values, 0)
@example(linear8.codebook(signed=False).values, 0)
@example(tuple(float(x) for x in np.linspace(-1, 1, 256, dtype=np.float32)), 0)
@example((-1.0, 0.0, 0.0, 0.0), 0)
@example((0.0, 0.0, 0.0, 1.0), 0)
@example((0.0, 1e-45, 3e-45, 1.0), 0)
@example((0.5, 0.5, 0.5, 1.0), 0)
def test_the_search_counts_thresholds(values: tuple[float, ...], seed: int) -> None:
    assert_exact(Codebook(values), seed)


INT8 = tuple(float(x) if x > -128 else None for x in np.arange(256, dtype=np.uint8).view(np.int8))
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@settings(max_examples=200)
@given(full_codebooks(), SEEDS)
@example(Codebook(INT8, "even", unit=127.0), 0)
@example(Codebook(tuple(range(-127, 129)), unit=128.0), 0)
@example(Codebook(E2M1, "even", (8,), 6.0), 0)
@example(Codebook((-0.5, 0.5, 1.0, -1.0), "even"), 0)
@example(Codebook((0.5, -0.5, -1.0, 1.0), "even"), 0)
@example(Codebook(tuple(2.0 * x for x in dynamic8.values if x is not None), unit=2.0), 0)
def test_the_search_counts_thresholds_in_any_unit(codebook: Codebook, seed: int) -> None:
    assert_exact(codebook, seed)
    assert_ties(codebook)


ONE_SIGN = [
    (-0.5, 0.5, 0.75, 1.0),
    (-0.25, 0.5, 0.75, 1.0),
    (-0.0, 0.25, 0.5, 1.0),
    (0.25, 0.5, 0.75, 1.0),
    dynamic8.codebook(signed=False).values,
    linear8.codebook(signed=False).values,
]


@pytest.mark.parametrize("values", ONE_SIGN, ids=lambda values: str(values[:2]))
def test_numbers_below_every_threshold_get_the_lowest_code(values: tuple[float, ...]) -> None:
    """Also where no threshold is negative: a state may be, and a table may have one such value."""
    codebook = Codebook(values)
    assert min(codebook.thresholds) >= 0
    assert_exact(codebook, 0)
    x = probes(codebook.thresholds)
    assert set(count(codebook, x[x < 0])) == {0}


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic8_has_the_fast_searches(signed: bool) -> None:
    found = tables(dynamic8.codebook(signed=signed))
    assert found.ordered
    assert found.buckets is not None
    assert found.buckets.signed is signed
    assert found.segments is not None
    assert found.segments.signed is signed
    x = probes(dynamic8.codebook(signed=signed).thresholds)
    x = x if signed else np.abs(x)
    _, unsure = search_segments(found.segments, x)
    assert unsure.any()  # the probes include ties
    assert unsure[-400:].mean() < 0.02  # which random numbers hardly meet


def test_every_registered_type_has_a_bucket_table() -> None:
    from bnbx.registry import quant_types

    for quant_type in quant_types():
        for signed in (True, False):
            buckets = tables(quant_type.codebook(signed=signed)).buckets
            assert buckets is not None
            assert len(buckets.entries) <= module.MAX_ENTRIES


# ---- what is handed to kernels

CTYPES = {
    "float": ctypes.c_float,
    "u8": ctypes.c_ubyte,
    "i32": ctypes.c_int32,
    "u32": ctypes.c_uint32,
}


def struct_of_kernels() -> Any:
    """The struct Tables of codebook.h, as a C compiler lays it out."""
    text = (files("bnbx.kernels") / "templates/codebook.h").read_text(encoding="utf-8")
    found = re.search(r"struct Tables \{(.*?)\n\};", text, re.DOTALL)
    assert found is not None
    body = re.sub(r"//.*", "", found[1])
    fields: list[tuple[str, Any]] = []
    for declaration in body.split(";")[:-1]:
        c_type, names = declaration.split(maxsplit=1)
        for name in names.split(","):
            kind: Any = CTYPES[c_type]
            for size in reversed(re.findall(r"\[(\d+)\]", name)):
                kind = kind * int(size)
            fields.append((name.split("[")[0].strip(), kind))
    return type("Tables", (ctypes.Structure,), {"_fields_": fields})


def test_the_packed_tables_are_the_struct_of_the_kernels() -> None:
    struct = struct_of_kernels()
    for quant_type in (dynamic8, linear8):
        for signed in (True, False):
            found = tables(quant_type.codebook(signed=signed))
            packed = found.pack()
            assert packed.dtype == np.uint8
            one_entry = ctypes.sizeof(struct)
            assert found.buckets is not None
            assert packed.size == one_entry + 4 * (len(found.buckets.entries) - 1)
            read = struct.from_buffer_copy(packed.tobytes())
            assert np.array_equal(np.array(read.levels), found.levels)
            assert np.array_equal(np.array(read.order), found.order)
            assert np.array_equal(np.array(read.thresholds), found.thresholds)
            planes = np.array(read.planes, np.uint8)
            rebuilt = np.ascontiguousarray(planes.T).view(np.float32).ravel()
            assert np.array_equal(rebuilt, found.levels)
            lines = found.segments
            for field in ("turn", "slope", "offset", "high"):
                expected = np.zeros(16) if lines is None else getattr(lines, field)
                assert np.array_equal(np.array(getattr(read, field)), expected)
            offset = struct.entries.offset
            entries = packed[offset:].view(np.uint32)
            assert np.array_equal(entries, found.buckets.entries)


def test_a_codebook_without_fast_searches_packs_to_the_fields_before_the_entries() -> None:
    values = (0.0, 0.0, 0.0, 1.0)
    found = tables(Codebook(values))
    assert found.buckets is None
    assert found.pack().size == struct_of_kernels().entries.offset


@given(full_codebooks())
def test_tables_are_padded_to_256(codebook: Codebook) -> None:
    found = tables(codebook)
    size, written = len(codebook.values), len(codebook.codes)
    assert [len(part) for part in (found.levels, found.thresholds, found.order)] == [256] * 3
    numbers = np.array([np.nan if v is None else v for v in codebook.values])
    levels = (numbers / codebook.unit).astype(np.float32)
    assert np.array_equal(found.levels[:size], levels, equal_nan=True)
    assert not found.levels[size:].any()
    assert tuple(found.thresholds[: written - 1]) == codebook.thresholds
    assert np.isposinf(found.thresholds[written - 1 :]).all()
    assert tuple(found.order[:written]) == codebook.codes
    assert found.ordered is (list(codebook.codes) == list(range(written)))
    assert found.zero_code == codebook.zero_code
    assert found.unit == codebook.unit
    assert len(found.pack()) % 4 == 0


def test_tables_are_made_once() -> None:
    assert tables(Codebook(dynamic8.values)) is tables(dynamic8.codebook(signed=True))
