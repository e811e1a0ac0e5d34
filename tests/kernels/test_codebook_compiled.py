"""The compiled search is the one that the tables were proven for, wide vectors included.

The headers of the C++ template are built once with the traits of a codebook as variables, so that
any codebook can be tried without compiling again.
"""

from __future__ import annotations

import ctypes
import platform
from importlib.resources import files
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bnbx.kernels.codebook import Tables, tables
from bnbx.kernels.cpu import aligned
from bnbx.quant_types.dynamic8 import dynamic8
from bnbx.quant_types.linear8 import linear8
from bnbx.registry.quant_type import Codebook
from codebooks import _full, _made, codebooks, full_codebooks, probes
from compiled import compiled

F32 = npt.NDArray[np.float32]

AFTER = """
struct Type {
  static int BLOCK, SHIFT, HALF, ZERO_CODE, BITS;
  static u32 FLOOR, CEILING;
  static bool SIGNED, ORDERED, SEGMENTS, MIRRORED;
  static float UNIT;
};
int Type::BLOCK, Type::SHIFT, Type::HALF, Type::ZERO_CODE, Type::BITS;
u32 Type::FLOOR, Type::CEILING;
bool Type::SIGNED, Type::ORDERED, Type::SEGMENTS, Type::MIRRORED;
float Type::UNIT;

extern "C" void set_traits(const i64* traits) {
  Type::BLOCK = (int)traits[0], Type::SHIFT = (int)traits[1], Type::HALF = (int)traits[2];
  Type::ZERO_CODE = (int)traits[3], Type::FLOOR = (u32)traits[4], Type::CEILING = (u32)traits[5];
  Type::SIGNED = traits[6], Type::ORDERED = traits[7], Type::SEGMENTS = traits[8];
  Type::MIRRORED = traits[9], Type::BITS = (int)traits[10];
}
extern "C" void encode_plain(const float* x, const Tables* tables, u8* codes) {
  encode_block_plain<Type>(x, 1.0f, tables, codes);
}
extern "C" void encode_fast(const float* x, const Tables* tables, u8* codes) {
  encode_block<Type>(x, 1.0f, tables, codes);
}
extern "C" void decode_plain(const u8* codes, float absmax, const Tables* tables, float* x) {
  decode_block_plain<Type>(codes, absmax, tables, x);
}
extern "C" void decode_fast(const u8* codes, float absmax, const Tables* tables, float* x) {
  decode_block<Type>(codes, absmax, tables, x);
}
extern "C" void make_scales(const u32* largest, int count, float unit, Scale* scales) {
  Type::UNIT = unit;
  for (int i = 0; i < count; ++i) scales[i] = make_scale<Type>(largest[i]);
}
"""


# It has runs of even steps, but some so close that there are no buckets.
CLOSE = _full(
    _made("even", 0, 6, "mirrored about zero", "ascending", False), 2.0**-16, "low", 0, False
)


# What this processor has, and what one without its widest vectors would run.
WITHOUT = {"all": (), "avx2": ("-mno-avx512f",), "plain": ("-mno-avx512f", "-mno-avx2")}


@pytest.fixture(scope="module", params=WITHOUT)
def library(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> ctypes.CDLL:
    if request.param != "all" and platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("has no such instructions to do without")
    folder = tmp_path_factory.mktemp("codebook")
    templates = files("bnbx.kernels") / "templates"
    names = (
        "cpu_target.h",
        "numbers.h",
        "codebook.h",
        *(f"cpu_codebook{x}.h" for x in ("", "_avx512", "_avx2")),
    )
    headers = [(templates / name).read_text(encoding="utf-8") for name in names]
    source, binary = folder / "search.cpp", folder / "search.so"
    source.write_text("\n".join([*headers, AFTER]), encoding="utf-8")
    return ctypes.CDLL(str(compiled(source, binary, WITHOUT[request.param])))


def traits(found: Tables, block: int, bits: int) -> npt.NDArray[np.int64]:
    """As the renderer writes them into a kernel."""
    buckets = found.buckets
    shape = (buckets.shift, buckets.half, buckets.floor, buckets.ceiling) if buckets else (0,) * 4
    shift, half, floor, ceiling = shape
    signed = buckets is not None and buckets.signed
    flags = (signed, found.ordered, found.segments is not None, found.mirrored)
    return np.array([block, shift, half, found.zero_code, floor, ceiling, *flags, bits], np.int64)


def pointer(array: npt.NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def encode(library: ctypes.CDLL, codebook: Codebook, x: F32, name: str) -> npt.NDArray[np.uint8]:
    """Codes of x; each number fills a vector of its own, so that no other decides its path."""
    found, bits = tables(codebook), (len(codebook.values) - 1).bit_length()
    repeated = np.repeat(x, 64)
    library.set_traits(pointer(traits(found, repeated.size, bits)))
    packed, codes = aligned(found.pack()), np.zeros(repeated.size, np.uint8)
    library[name](pointer(repeated), pointer(packed), pointer(codes))
    by_number = codes.reshape(-1, 64)
    assert (by_number == by_number[:, :1]).all()
    return by_number[:, 0]


def expected_codes(codebook: Codebook, x: F32) -> npt.NDArray[np.uint8]:
    thresholds = np.array(codebook.thresholds, np.float32)
    ranks = np.searchsorted(thresholds, x, side="left")
    return np.array(codebook.codes, np.uint8)[ranks]


@pytest.mark.parametrize("name", ["encode_plain", "encode_fast"])
@settings(max_examples=60)
@given(values=codebooks(), seed=st.integers(0, 2**32 - 1))
@example(values=(-0.5, 0.5, 0.75, 1.0), seed=0)
@example(values=(-0.25, 0.5, 0.75, 1.0), seed=0)
@example(values=(0.25, 0.5, 0.75, 1.0), seed=0)
@example(values=dynamic8.values, seed=0)
@example(values=dynamic8.codebook(signed=False).values, seed=0)
@example(values=linear8.values, seed=0)
@example(values=linear8.codebook(signed=False).values, seed=0)
def test_compiled_codes_are_the_nearest(
    library: ctypes.CDLL, name: str, values: tuple[float, ...], seed: int
) -> None:
    codebook = Codebook(values)
    x = probes(codebook.thresholds, seed)
    codes = encode(library, codebook, x, name)
    expected = expected_codes(codebook, x)
    wrong = codes != expected
    assert not wrong.any(), list(zip(x[wrong], codes[wrong], expected[wrong], strict=True))[:5]


@pytest.mark.parametrize("name", ["encode_plain", "encode_fast"])
@settings(max_examples=60)
@given(codebook=full_codebooks(), seed=st.integers(0, 2**32 - 1))
@example(codebook=Codebook(tuple(range(-127, 129)), unit=128.0), seed=0)
@example(codebook=CLOSE, seed=0)
def test_compiled_codes_are_the_nearest_in_any_unit(
    library: ctypes.CDLL, name: str, codebook: Codebook, seed: int
) -> None:
    x = probes(codebook.thresholds, seed, codebook.unit)
    codes = encode(library, codebook, x, name)
    expected = expected_codes(codebook, x)
    wrong = codes != expected
    assert not wrong.any(), list(zip(x[wrong], codes[wrong], expected[wrong], strict=True))[:5]


def moved(code: int) -> Codebook:
    """dynamic8, mirrored about code 127 but for one number."""
    values = list(dynamic8.codebook(signed=True).values)
    values[code] = float(np.float32(values[code] or 1e-9)) * 1.0001
    return Codebook(tuple(values))


def test_a_table_is_mirrored_whole_or_not_at_all() -> None:
    assert tables(dynamic8.codebook(signed=True)).mirrored
    assert not tables(dynamic8.codebook(signed=False)).mirrored
    for code in (0, 126, 127, 128, 254):
        assert not tables(moved(code)).mirrored, code
    assert tables(moved(255)).mirrored  # it has no negative


@pytest.mark.parametrize("name", ["decode_plain", "decode_fast"])
@pytest.mark.parametrize("size", [16, 32, 512])
@example(codebook=dynamic8.codebook(signed=True), absmax=3.0)
@example(codebook=linear8.codebook(signed=True), absmax=3.0)
@example(codebook=moved(0), absmax=3.0)
@example(codebook=moved(127), absmax=3.0)
@example(codebook=moved(255), absmax=3.0)
@given(codebook=full_codebooks(), absmax=st.floats(0, 2.0**127, width=32))
def test_compiled_levels_are_scaled_once(
    library: ctypes.CDLL, name: str, size: int, codebook: Codebook, absmax: float
) -> None:
    found = tables(codebook)
    codes = np.resize(np.arange(len(codebook.values), dtype=np.uint8), 512)
    np.random.default_rng(0).shuffle(codes)
    codes = codes[:size].copy()
    bits = (len(codebook.values) - 1).bit_length()
    library.set_traits(pointer(traits(found, codes.size, bits)))
    packed, x = aligned(found.pack()), np.zeros(codes.size, np.float32)
    library[name](pointer(codes), ctypes.c_float(absmax), pointer(packed), pointer(x))
    expected = found.levels[codes] * np.float32(absmax)
    same = (x.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(x) & np.isnan(expected))
    assert same.all()


@pytest.mark.parametrize("unit", [1.0, 6.0, 127.0, 448.0, 2.0**-16, 2.0**16])
def test_scales_of_every_kind_of_block(library: ctypes.CDLL, unit: float) -> None:
    """NaN for a block that is not finite, zero for one too small to have an inverse."""
    normal = [0x00800000, 0x00800001, 0x00C00000, 0x3F800000, 0x40490FDB, 0x7E800001, 0x7F7FFFFF]
    cases = {
        **dict.fromkeys([0, 1, 0x007FFFFF], (0.0, 0.0)),
        **dict.fromkeys([0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF], (np.nan, 0.0)),
    }
    for bits in normal:
        absmax = np.uint32(bits).view(np.float32)
        with np.errstate(over="ignore"):
            inverse = np.float32(unit) / absmax
        cases[bits] = (float(absmax), float(inverse)) if np.isfinite(inverse) else (0.0, 0.0)
    largest, scales = np.array(list(cases), np.uint32), np.zeros((len(cases), 2), np.float32)
    library.make_scales(pointer(largest), len(cases), ctypes.c_float(unit), pointer(scales))
    assert np.array_equal(scales, np.array(list(cases.values()), np.float32), equal_nan=True)
    assert (scales[largest == 0x00800000, 0] == 0).all() == (unit > 2)
