"""Compares what intrinsics compute on the CPU with their definitions, in Python and numpy."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cuda_on_cpu import SCHEDULES, compile_source
from cuda_on_cpu.build import Mode
from cuda_on_cpu.samples import read

Floats = NDArray[np.float32]
Bits = NDArray[np.uint32]

WORD = 1 << 32
NAN = 0x7FFFFFFF


def results(source: str, inputs: tuple[NDArray[Any], ...], rows: int) -> Bits:
    """What the only kernel of the source writes: a row per intrinsic, a column per input."""
    (name,) = compile_source(source).names
    n = len(inputs[0])
    out = np.zeros((rows, n), np.uint32)
    compile_source(source).kernel(name)(-(-n // 128), 128, [*inputs, out, n])
    return out


# ---- integers ------------------------------------------------------------------------------------


def signed(value: int, bits: int = 32) -> int:
    value %= 1 << bits
    return value - (1 << bits) if value >> (bits - 1) else value


def first_set(value: int) -> int:
    return (value & -value).bit_length()


def reversed_bits(value: int) -> int:
    return int(f"{value:032b}"[::-1], 2)


def permuted_bytes(low: int, high: int, selector: int) -> int:
    source = (high << 32 | low).to_bytes(8, "little")
    return int.from_bytes(bytes(source[selector >> 4 * i & 7] for i in range(4)), "little")


def dot_of_bytes(x: int, y: int, is_signed: bool) -> int:
    kind = np.int8 if is_signed else np.uint8
    left, right = (np.array(v, "<u4").reshape(1).view(kind).astype(np.int64) for v in (x, y))
    return int(left @ right)


def wide(x: int, y: int) -> int:
    return x << 32 | y


# In the order of integers.cu; each takes two words and is taken modulo 2**32.
INTEGERS: dict[str, Callable[[int, int], int]] = {
    "__popc": lambda x, y: x.bit_count(),
    "__popcll": lambda x, y: wide(x, y).bit_count(),
    "__clz": lambda x, y: 32 - x.bit_length(),
    "__clzll": lambda x, y: 64 - wide(x, y).bit_length(),
    "__ffs": lambda x, y: first_set(x),
    "__ffsll": lambda x, y: first_set(wide(x, y)),
    "__brev": lambda x, y: reversed_bits(x),
    "__byte_perm": lambda x, y: permuted_bytes(x, y, x >> 7 ^ y),
    "__funnelshift_l": lambda x, y: wide(y, x) << y % 32 >> 32,
    "__funnelshift_r": lambda x, y: wide(y, x) >> y % 32,
    "__funnelshift_lc": lambda x, y: wide(y, x) << min(y % 64, 32) >> 32,
    "__funnelshift_rc": lambda x, y: wide(y, x) >> min(y % 64, 32),
    "__umulhi": lambda x, y: x * y >> 32,
    "__mulhi": lambda x, y: signed(x) * signed(y) >> 32,
    "__umul64hi": lambda x, y: wide(x, y) * (wide(x, y) ^ 0x123456789ABCDEF) >> 64,
    "__mul64hi": lambda x, y: (
        signed(wide(x, y), 64) * signed(wide(x, y) ^ 0x123456789ABCDEF, 64) >> 64
    ),
    "__dp4a, signed": lambda x, y: 7 + dot_of_bytes(x, y, is_signed=True),
    "__dp4a, unsigned": lambda x, y: 7 + dot_of_bytes(x, y, is_signed=False),
    "min of int": lambda x, y: min(signed(x), signed(y)),
    "max of unsigned": max,
    "min of unsigned and int": min,
    "max of long long": lambda x, y: max(signed(wide(x, y), 64), signed(y)),
    "abs": lambda x, y: abs(signed(x)),
    "shift of 64 bits": lambda x, y: wide(x, y) >> y % 64,
    "third of four bytes": lambda x, y: x >> 16 & 0xFF,
}


def words() -> tuple[Bits, Bits]:
    """Pairs of interesting words, and random ones of all magnitudes."""
    special = [0, 1, 2, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF, 0x01020304]
    pairs = np.array([(a, b) for a in special for b in special], np.uint32)
    random = np.random.default_rng(1)
    noise = random.integers(WORD, size=(500, 2)) >> random.integers(32, size=(500, 2))
    both = np.concatenate([pairs, noise.astype(np.uint32)])
    return np.ascontiguousarray(both[:, 0]), np.ascontiguousarray(both[:, 1])


def test_integer_intrinsics() -> None:
    x, y = words()
    got = results(read("integers"), (x, y), len(INTEGERS))
    for row, (name, reference) in zip(got, INTEGERS.items(), strict=True):
        expected = [reference(int(a), int(b)) % WORD for a, b in zip(x, y, strict=True)]
        np.testing.assert_array_equal(row, np.array(expected, np.uint32), err_msg=name)


# ---- floats --------------------------------------------------------------------------------------


def nearest_float(exact: Fraction) -> np.float32:
    """Rounded once, ties to even."""
    guess = np.float32(float(exact))
    around = [
        guess,
        np.nextafter(guess, np.float32(-np.inf)),
        np.nextafter(guess, np.float32(np.inf)),
    ]
    finite = [value for value in around if np.isfinite(value)]
    return min(
        finite,
        key=lambda value: (abs(Fraction(float(value)) - exact), int(value.view(np.uint32)) & 1),
    )


def fused_plus_one(x: Floats, y: Floats) -> Floats:
    result = x * y + np.float32(1)
    # Where all is finite and far from overflow, by exact arithmetic; elsewhere rounding is idle.
    for i in np.flatnonzero(np.isfinite(x) & np.isfinite(y) & (np.abs(result) < 1e38)):
        result[i] = nearest_float(Fraction(float(x[i])) * Fraction(float(y[i])) + 1)
    return result


def maximum(x: Floats, y: Floats) -> Floats:
    """A number beats a NaN, +0 beats -0."""
    zeros = (x == 0) & (y == 0)
    return np.where(zeros, np.where(np.signbit(x), y, x), np.fmax(x, y))


def minimum(x: Floats, y: Floats) -> Floats:
    return -maximum(-x, -y)


def saturated(x: Floats, low: int, high: int) -> Bits:
    exact = np.nan_to_num(x.astype(np.float64), nan=0.0, posinf=2.0**40, neginf=-(2.0**40))
    integers = np.clip(exact, low, high).astype(np.int64)
    return np.asarray(integers % WORD, np.uint32)


def as_int(x: Floats) -> Bits:
    return saturated(x, -(2**31), 2**31 - 1)


def classes(x: Floats) -> Bits:
    flags = np.isnan(x) + 2 * np.isinf(x) + 4 * np.isfinite(x) + 8 * np.signbit(x)
    return np.asarray(flags, np.uint32)


# In the order of floats.cu.
FLOATS: dict[str, Callable[[Floats, Floats], NDArray[Any]]] = {
    "fmaxf": maximum,
    "fminf": minimum,
    "fabsf": lambda x, y: np.abs(x),
    "__fadd_rn": lambda x, y: x + y,
    "__fmul_rn": lambda x, y: x * y,
    "__fdiv_rn": lambda x, y: x / y,
    "__fsqrt_rn": lambda x, y: np.sqrt(np.abs(x)),
    "sqrtf": lambda x, y: np.sqrt(np.abs(x)),
    "__fmaf_rn": fused_plus_one,
    "no contraction": lambda x, y: x * y + np.float32(1),
    "floorf": lambda x, y: np.floor(x),
    "rintf": lambda x, y: np.rint(x),
    "truncf": lambda x, y: np.trunc(x),
    "copysignf": np.copysign,
    "__saturatef": lambda x, y: np.where(np.isnan(x), np.float32(0), np.clip(x, 0, 1)) + 0,
    "__float2int_rn": lambda x, y: as_int(np.rint(x)),
    "__float2int_rz": lambda x, y: as_int(np.trunc(x)),
    "__float2int_ru": lambda x, y: as_int(np.ceil(x)),
    "__float2int_rd": lambda x, y: as_int(np.floor(x)),
    "__float2uint_rn": lambda x, y: saturated(np.rint(x), 0, WORD - 1),
    "__float2uint_rz": lambda x, y: saturated(np.trunc(x), 0, WORD - 1),
    "__int2float_rn": lambda x, y: x.view(np.int32).astype(np.float32),
    "__uint2float_rn": lambda x, y: x.view(np.uint32).astype(np.float32),
    "isnan, isinf, isfinite, signbit": lambda x, y: classes(x),
    "max": maximum,
    "through double": lambda x, y: (x.astype(np.float64) * y).astype(np.float32),
    "same bits": lambda x, y: x,
}


def floats() -> tuple[Floats, Floats]:
    """Pairs of special values, random bits, and numbers near the halves between integers."""
    special = [0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.5, 1e-45, -1e-45, 1e-38, 3.4e38, -3.4e38]
    special += [2.0**31, -(2.0**31), 2.0**32, 4294967040.0, np.inf, -np.inf, np.nan]
    pairs = np.array([(a, b) for a in special for b in special], np.float32)
    random = np.random.default_rng(2)
    bits = random.integers(WORD, size=(500, 2)).astype(np.uint32).view(np.float32)
    near = (
        random.integers(-99, 99, size=(500, 2)) / 2 + random.choice([0, 1e-6], (500, 2))
    ).astype(np.float32)
    both = np.concatenate([pairs, bits, near])
    return np.ascontiguousarray(both[:, 0]), np.ascontiguousarray(both[:, 1])


def bits_of(values: NDArray[Any]) -> Bits:
    """The bits, with all NaNs alike."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return np.where((bits & NAN) > 0x7F800000, NAN, bits).astype(np.uint32)


def test_float_intrinsics() -> None:
    x, y = floats()
    got = results(read("floats"), (x, y), len(FLOATS))
    with np.errstate(all="ignore"):
        for row, (name, reference) in zip(got, FLOATS.items(), strict=True):
            expected = reference(x, y)
            if expected.dtype == np.float32:
                np.testing.assert_array_equal(bits_of(row), bits_of(expected), err_msg=name)
            else:
                np.testing.assert_array_equal(row, expected, err_msg=name)


def test_maximum_of_two_nans_is_the_nan_of_the_hardware() -> None:
    nan = np.array([0xFFC00001], np.uint32).view(np.float32)
    assert results(read("floats"), (nan, nan), len(FLOATS))[0, 0] == NAN


# ---- collectives ---------------------------------------------------------------------------------


def by_lane(values: Bits, source: Callable[[int], int]) -> Bits:
    """Every lane gets the value of the lane of its warp that `source` names."""
    warps = values.reshape(-1, 32)
    return np.stack([warps[:, source(lane)] for lane in range(32)], axis=1).reshape(-1)


def by_warp(values: NDArray[Any], combine: Callable[[NDArray[Any]], int], width: int = 32) -> Bits:
    """Every lane gets what `combine` makes of its warp, or of its part of the warp."""
    parts = values.reshape(-1, width)
    return np.repeat([int(combine(part)) % WORD for part in parts], width).astype(np.uint32)


def mask_of(flags: NDArray[Any]) -> int:
    return sum(1 << lane for lane, flag in enumerate(flags) if flag)


def equal_lanes(values: Bits) -> Bits:
    warps = values.reshape(-1, 32)
    masks = [mask_of(warp == mine) for warp in warps for mine in warp]
    return np.array(masks, np.uint32)


def halves(masks: Bits) -> Bits:
    """Of each mask the half that its lane belongs to."""
    return masks & np.resize(np.repeat([0xFFFF, 0xFFFF0000], 16), masks.shape).astype(np.uint32)


def segment(lane: int, width: int) -> int:
    return lane // width * width


def expected_collectives(x: Bits) -> list[Bits]:
    """In the order of collectives.cu."""
    n = len(x)
    centered = x.astype(np.int64) - 500
    return [
        by_lane(x, lambda lane: 5),
        by_lane(x, lambda lane: segment(lane, 8) + (lane + 3) % 8),
        by_lane(x, lambda lane: lane if lane < 3 else lane - 3),
        by_lane(x, lambda lane: lane if lane % 8 < 3 else lane - 3),
        by_lane(x, lambda lane: lane if lane > 28 else lane + 3),
        by_lane(x, lambda lane: lane if lane % 16 > 12 else lane + 3),
        by_lane(x, lambda lane: lane ^ 17),
        by_lane(x, lambda lane: lane if (lane ^ 9) >= segment(lane, 8) + 8 else lane ^ 9),
        by_warp(x & 1, mask_of),
        by_warp(x == x[0], lambda warp: int(warp.any())),
        by_warp(x < 900, lambda warp: int(warp.all())),
        equal_lanes(x % 4),
        np.full(n, (x & 1).sum(), np.uint32),
        np.full(n, (x == 1000).any(), np.uint32),
        np.full(n, (x < 1000).all(), np.uint32),
        by_lane(x, lambda lane: segment(lane, 16) + 3),
        by_lane(x, lambda lane: lane ^ 1),
        by_lane(x, lambda lane: min(lane + 1, 31)),
        halves(equal_lanes(x % 4)),
        by_warp(x, lambda part: int(part.sum()), width=16),
        by_warp(centered, lambda warp: int(warp.min())),
        by_warp(centered, lambda warp: int(warp.max())),
        by_warp(centered % WORD, lambda warp: int(warp.max())),
        by_warp(x | 3, np.bitwise_and.reduce),
        by_warp(x, np.bitwise_or.reduce),
        by_warp(x, np.bitwise_xor.reduce),
    ]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("mode", ["plain", "check", "ubsan"])
def test_collectives(mode: Mode, schedule: int) -> None:
    x = np.random.default_rng(3).integers(1000, size=96).astype(np.uint32)
    expected = np.stack(expected_collectives(x))
    out = np.zeros_like(expected)
    kernel = compile_source(read("collectives"), mode).kernel("collectives")
    kernel(1, 96, [x, out], schedule=schedule)
    np.testing.assert_array_equal(out, expected)


def test_collectives_of_older_hardware() -> None:
    """Below compute capability 8.0 there are no warp reductions."""
    x = np.arange(32, dtype=np.uint32)
    expected = np.stack(expected_collectives(x))
    expected[19:] = 0
    out = np.zeros_like(expected)
    compile_source(read("collectives"), cuda_arch=750).kernel("collectives")(1, 32, [x, out])
    np.testing.assert_array_equal(out, expected)


# ---- atomics -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["plain", "check", "ubsan"])
def test_atomics(mode: Mode) -> None:
    x = np.random.default_rng(4).integers(2**16, 2**20, size=2 * 40).astype(np.uint32)
    start = np.array([3, 5, 2**31, 0, 0xFFFFFFFF, 0, 9, 0, 0, 1, 0], np.uint32)
    words, total = start.copy(), torch.zeros(1)
    compile_source(read("atomics"), mode).kernel("atomics")(2, 40, [x, words, total])
    added = int(x.sum())
    expected = [
        (3 + added) % WORD,
        (5 - added) % WORD,
        x.min(),
        x.max(),
        np.bitwise_and.reduce(x),
        np.bitwise_or.reduce(x),
        9 ^ np.bitwise_xor.reduce(x),
        80 % 7,  # atomicInc wraps past 6
        -80 % 7,
        77,
        160,
    ]
    assert words.tolist() == [int(value) for value in expected]
    assert total.item() == 80 * 0.25
