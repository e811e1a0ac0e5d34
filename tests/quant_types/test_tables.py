"""Tables are those of their sources: bitsandbytes' maps, torch's and torchao's floats, papers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import oracles
from bnbx.quant_types.af4 import af4
from bnbx.quant_types.fp4 import fp4
from bnbx.quant_types.fp8_e4m3 import fp8_e4m3
from bnbx.quant_types.fp8_e5m2 import fp8_e5m2
from bnbx.quant_types.grids import dynamic_map, linear_map, minifloat, normal_map
from bnbx.quant_types.int8 import int8
from bnbx.quant_types.mxfp4 import mxfp4
from bnbx.quant_types.mxfp6 import mxfp6
from bnbx.quant_types.mxfp8 import mxfp8
from bnbx.quant_types.nf4 import nf4
from bnbx.quant_types.nvfp4 import nvfp4
from bnbx.registry import QuantType, quant_types
from bnbx.registry.quant_type import Scale, Values

WIDTHS = range(2, 9)


def bits_of(values: Any) -> list[int]:
    return [int(bits) for bits in np.asarray(values, np.float32).view(np.uint32)]


def nonzero(values: Any) -> list[float]:
    return [float(value) for value in values if value != 0]


def numbers(values: Values) -> list[float]:
    return [np.nan if value is None else value for value in values]


# ---- dynamic and linear


DYNAMIC = [(s, e, b) for b in WIDTHS for e in range(b + 2) for s in (True, False)]


@pytest.mark.parametrize(("signed", "exponent_bits", "bits"), DYNAMIC)
def test_dynamic_maps_are_those_of_bitsandbytes(
    signed: bool, exponent_bits: int, bits: int
) -> None:
    create = oracles.bitsandbytes_functional().create_dynamic_map
    if exponent_bits < 1 or (not signed and exponent_bits != bits - 1):
        with pytest.raises((AssertionError, UnboundLocalError)):
            create(signed, exponent_bits, bits)
        with pytest.raises(ValueError, match=f"a dynamic map of {bits} bits.*expected"):
            dynamic_map(signed, exponent_bits, bits)
        return
    table = dynamic_map(signed, exponent_bits, bits)
    # bitsandbytes fills narrower maps up to 256 numbers with zeros.
    assert bits_of(nonzero(table)) == bits_of(nonzero(create(signed, exponent_bits, bits)))
    assert table.count(0.0) == 1
    assert len(table) == 2**bits


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
def test_linear_maps_are_those_of_bitsandbytes(bits: int, signed: bool) -> None:
    table = linear_map(signed, bits)
    expected = oracles.bitsandbytes_functional().create_linear_map(signed, bits)
    assert bits_of(nonzero(table)) == bits_of(nonzero(expected))
    assert 0.0 in table
    assert len(table) == 2**bits


@pytest.mark.parametrize("bits", WIDTHS)
def test_types_of_each_width_are_the_members_of_their_families(bits: int) -> None:
    dynamic, linear = (quant_types().get(f"{name}{bits}") for name in ("dynamic", "linear"))
    assert dynamic.values == dynamic_map(True, bits - 1, bits)
    assert dynamic.unsigned_values == dynamic_map(False, bits - 1, bits)
    assert linear.values == linear_map(True, bits, second_zero=bits == 8)
    assert linear.unsigned_values == linear_map(False, bits)
    if bits != nf4.bits:
        assert quant_types().get(f"nf{bits}").values == normal_map(bits)


def test_a_linear_step_is_even() -> None:
    for bits in WIDTHS:
        values = linear_map(True, bits, second_zero=False)
        assert values[2 ** (bits - 1)] is None
        written = [value for value in values if value is not None]
        assert len(written) == 2**bits - 1
        assert np.allclose(np.diff(written), 2 / (2**bits - 2), atol=2e-7)


# ---- normal floats


def test_nf4_is_the_table_of_the_paper() -> None:
    expected = oracles.bitsandbytes_functional().get_4bit_type("nf4", device="cpu")
    assert bits_of(nf4.values) == bits_of(expected)


def test_the_rule_of_normal_floats_gives_nf4() -> None:
    """The paper's table was computed in float32, so it is off by the rounding of that."""
    paper = normal_map(4, offset=0.9677083)
    assert np.abs(np.array(paper) - numbers(nf4.values)).max() <= 2**-23
    assert np.abs(np.array(normal_map(4)) - numbers(nf4.values)).max() <= 2**-22


@pytest.mark.parametrize("bits", WIDTHS)
def test_normal_floats_are_quantiles(bits: int) -> None:
    """By torch's distribution function: probabilities are evenly spaced on either side."""
    table = torch.tensor(normal_map(bits), dtype=torch.float64)
    half = 2 ** (bits - 1)
    assert table[half - 1] == 0
    assert table[-1] == 1
    assert table[0] == -1
    top = 1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2
    largest = torch.special.ndtri(torch.tensor(top, dtype=torch.float64))
    probability = torch.special.ndtr(table * largest)
    assert np.allclose(np.diff(probability[half - 1 :]), (top - 0.5) / half, rtol=1e-4)
    if half > 2:
        assert np.allclose(np.diff(probability[:half]), (top - 0.5) / (half - 1), rtol=1e-4)


# ---- floats


@pytest.mark.parametrize(("name", "found"), [("fp4", fp4), ("af4", af4)])
def test_4_bit_tables_are_those_of_bitsandbytes(name: str, found: QuantType) -> None:
    expected = oracles.bitsandbytes_functional().get_4bit_type(name, device="cpu")
    assert bits_of(found.values) == bits_of(expected)


@pytest.mark.parametrize(
    ("found", "dtype"), [(fp8_e4m3, torch.float8_e4m3fn), (fp8_e5m2, torch.float8_e5m2)]
)
def test_8_bit_floats_are_those_of_torch(found: QuantType, dtype: torch.dtype) -> None:
    expected = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    for code, value in enumerate(found.values):
        if value is None:
            assert not expected[code].isfinite()
        else:
            assert bits_of([value]) == bits_of(expected[code : code + 1])
    assert found.unit == torch.finfo(dtype).max


@pytest.mark.parametrize(
    ("table", "unpacked"), [((2, 1), "f4"), ((2, 3), "f6_e2m3"), ((3, 2), "f6_e3m2")]
)
def test_small_floats_are_those_of_torchao(table: tuple[int, int], unpacked: str) -> None:
    kernels = oracles.torchao_microscaling("kernels")
    values = minifloat(*table)
    codes = torch.arange(len(values), dtype=torch.uint8)
    assert bits_of(values) == bits_of(getattr(kernels, f"{unpacked}_unpacked_to_f32")(codes))


def test_microscaling_types_are_made_of_small_floats() -> None:
    assert mxfp4.values == nvfp4.values == minifloat(2, 1)
    assert mxfp6.values == minifloat(2, 3)
    assert mxfp8.values == fp8_e4m3.values
    assert [t.unit for t in (mxfp4, mxfp6, mxfp8)] == [6, 7.5, 448]
    assert [t.block_size for t in (mxfp4, mxfp6, mxfp8, nvfp4)] == [32, 32, 32, 16]
    assert {t.scale for t in (mxfp4, mxfp6, mxfp8)} == {Scale(dtype="e8m0")}
    assert nvfp4.scale == Scale(dtype="e4m3", tensor_scale=True)


def test_whole_numbers_are_in_twos_complement() -> None:
    expected = torch.arange(256, dtype=torch.uint8).view(torch.int8)
    assert list(int8.values) == expected.tolist()
    assert int8.decode_only == (128,)
