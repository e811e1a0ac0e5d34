"""The built-in tables are those that other libraries wrote into files; bad tables are refused."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import oracles
from bnbx.errors import SpecError
from bnbx.quant_types.dynamic8 import dynamic8
from bnbx.quant_types.grids import linspace, midpoints
from bnbx.quant_types.linear8 import linear8
from bnbx.registry import QuantType, quant_types
from bnbx.registry.grid import float32
from bnbx.registry.quant_type import BLOCK_SIZES, Codebook

VALID: Mapping[str, Any] = dict(
    name="q", summary="a type", bits=2, values=(-1.0, -0.25, 0.5, 1.0), block_size=64
)


TIES: tuple[Literal["low", "even"], ...] = ("low", "even")


def quant_type(**changes: Any) -> QuantType:
    return QuantType(**{**VALID, **changes})


def bits_of(values: Sequence[float | None]) -> list[int]:
    return [int(bits) for bits in np.asarray(values, np.float32).view(np.uint32)]


# ---- the built-ins


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic8_is_the_table_of_bitsandbytes(signed: bool) -> None:
    table = dynamic8.codebook(signed=signed).values
    assert bits_of(table) == bits_of(oracles.bitsandbytes_dynamic_map(signed=signed))


@pytest.mark.parametrize("signed", [True, False])
def test_linear8_is_the_table_of_bitsandbytes(signed: bool) -> None:
    table = linear8.codebook(signed=signed).values
    assert bits_of(table) == bits_of(oracles.bitsandbytes_linear_map(signed=signed))


@pytest.mark.parametrize("start_end_count", [(-1, 1, 255), (0, 1, 256), (0.1, 1, 3), (0.1, 1, 129)])
def test_linspace_rounds_as_torch_does(start_end_count: tuple[float, float, int]) -> None:
    import torch

    start, end, count = start_end_count
    assert linspace(start, end, count) == torch.linspace(start, end, count).tolist()


def test_a_grid_of_one_is_its_start() -> None:
    assert linspace(0.1, 1.0, 1) == [float32(0.1)]
    assert midpoints([0.0, 0.5, 1.5]) == [0.25, 1.0]


@pytest.mark.parametrize("found", [dynamic8, linear8], ids=lambda t: t.name)
def test_types_for_8_bit_states_hold_zero_and_one_exactly(found: QuantType) -> None:
    for signed in (True, False):
        codebook = found.codebook(signed=signed)
        assert codebook.levels[codebook.zero_code] == 0.0
        assert max(codebook.levels) == 1.0
        assert (min(codebook.levels) < 0) is signed


# ---- what follows from a table


@pytest.mark.parametrize("found", list(quant_types()), ids=lambda t: t.name)
@pytest.mark.parametrize("signed", [True, False])
def test_a_value_of_the_table_is_kept(found: QuantType, signed: bool) -> None:
    """But for types that round to a grid first, which is their own affair."""
    codebook = found.codebook(signed=signed)
    if found.grid:
        pytest.skip("a grid comes between")
    written = [codebook.values[code] for code in codebook.codes]
    assert [codebook.values[code_of(codebook, value or 0.0)] for value in written] == written


@pytest.mark.parametrize("found", list(quant_types()), ids=lambda t: t.name)
@pytest.mark.parametrize("signed", [True, False])
def test_every_code_is_written_or_has_a_reason(found: QuantType, signed: bool) -> None:
    codebook = found.codebook(signed=signed)
    for code, value in enumerate(codebook.values):
        written = code in codebook.codes
        assert written != (value is None or code in found.decode_only) or found.grid
        level = codebook.levels[code]
        assert math.isnan(level) if value is None else abs(level) <= 1 or not written


def code_of(codebook: Codebook, x: float) -> int:
    return codebook.codes[sum(threshold < x for threshold in codebook.thresholds)]


def test_thresholds_of_a_small_table() -> None:
    codebook = Codebook((0.5, -1.0, 1.0, 0.0))
    assert codebook.codes == (1, 3, 0, 2)
    assert codebook.thresholds == (-0.5, 0.25, 0.75)
    assert codebook.zero_code == 3
    assert [code_of(codebook, x) for x in (-2, -0.5, -0.4, 0.25, 0.26, 9)] == [1, 1, 3, 3, 0, 2]


def test_a_tie_goes_to_the_lower_value() -> None:
    codebook = Codebook((-1.0, 0.0, 0.5, 1.0))
    assert [code_of(codebook, x) for x in (-0.5, 0.25, 0.75)] == [0, 1, 2]


def test_a_tie_goes_to_the_even_code() -> None:
    codebook = Codebook((-1.0, 0.0, 0.5, 1.0), "even")
    assert [code_of(codebook, x) for x in (-0.5, 0.25, 0.75)] == [0, 2, 2]
    beside = [float(np.nextafter(np.float32(x), np.float32(-9))) for x in (-0.5, 0.25, 0.75)]
    assert [code_of(codebook, x) for x in beside] == [0, 1, 2]
    beside = [float(np.nextafter(np.float32(x), np.float32(9))) for x in (-0.5, 0.25, 0.75)]
    assert [code_of(codebook, x) for x in beside] == [1, 2, 3]


def test_a_tie_at_zero_goes_to_the_even_code() -> None:
    values = (-0.5, 0.5, 1.0, -1.0)
    assert Codebook(values, "low").zero_code == 0
    assert Codebook(values, "even").zero_code == 0
    turned = (0.5, -0.5, -1.0, 1.0)
    assert Codebook(turned, "low").zero_code == 1
    assert Codebook(turned, "even").zero_code == 0
    assert code_of(Codebook(turned, "even"), float32(-1e-45)) == 1


def test_a_middle_that_is_no_float32_number_is_no_tie() -> None:
    """No number lies there, so rounding it is all there is to do."""
    low, high = 1.0, float(np.nextafter(np.float32(1), np.float32(2)))
    values = (-2.0, low, high, 2.0)
    for ties in TIES:
        codebook = Codebook(values, ties, unit=2.0)
        assert [code_of(codebook, x) for x in (low, high)] == [1, 2]


def test_bfloat16_rounds_as_the_table_of_its_numbers_does() -> None:
    """All 256 numbers from 1 up, of a float whose ties go to even: torch rounds to them, too."""
    import torch

    bits = torch.arange(0x3F80, 0x4080, dtype=torch.int32).to(torch.int16)
    values = tuple(bits.view(torch.bfloat16).double().tolist())
    codebook = Codebook(values, "even", unit=values[-1])
    x = torch.linspace(1.0, values[-1], 40_001)
    x = torch.cat([x, torch.tensor(codebook.thresholds), torch.tensor(values)])
    ranks = np.searchsorted(np.array(codebook.thresholds, np.float32), x.numpy())
    assert torch.equal(torch.tensor(values)[ranks], x.bfloat16().float())


def test_codes_that_are_only_read() -> None:
    codebook = Codebook((0.0, 0.5, 1.0, -0.0), decode_only=(3,))
    assert codebook.codes == (0, 1, 2)
    assert codebook.thresholds == (0.25, 0.75)
    assert codebook.levels[3] == 0.0
    assert codebook.zero_code == 0


def test_codes_that_stand_for_no_number() -> None:
    codebook = Codebook((0.0, None, 1.0, -1.0))
    assert codebook.codes == (3, 0, 2)
    assert math.isnan(codebook.levels[1])
    assert codebook.zero_code == 0


def test_levels_are_values_over_the_unit() -> None:
    """Thresholds stay in the table's own numbers."""
    codebook = Codebook((0.0, 1.0, 6.0, -6.0), unit=6.0)
    assert codebook.levels == (0.0, float32(1 / 6), 1.0, -1.0)
    assert codebook.thresholds == (-3.0, 0.5, 3.5)


def test_whatever_changes_a_table_changes_its_key() -> None:
    values = (0.0, 0.25, 0.5, 1.0)
    made = [
        Codebook(values),
        Codebook(values, "even"),
        Codebook(values, decode_only=(1,)),
        Codebook(values, unit=1.0625),
        Codebook((0.0, 0.25, None, 1.0)),
    ]
    assert len({codebook.key for codebook in made}) == len(made)
    assert all(Codebook(*codebook.key).thresholds == codebook.thresholds for codebook in made)


@pytest.mark.parametrize(
    ("values", "zero_code"),
    [
        ((-1.0, -0.5, 0.5, 1.0), 1),  # a tie between two, the lower
        ((-1.0, -0.5, 0.25, 1.0), 2),
        ((-1.0, -0.25, 0.5, 1.0), 1),
        ((0.25, 0.5, 0.75, 1.0), 0),
        ((-0.25, -0.5, -0.75, -1.0), 0),
        ((1.0, 0.0, -1.0, 0.5), 1),
        ((-1.0, -0.0, 0.5, 1.0), 1),
    ],
)
def test_zero_code(values: tuple[float, ...], zero_code: int) -> None:
    codebook = Codebook(values)
    assert codebook.zero_code == zero_code
    assert codebook.zero_code == code_of(codebook, 0.0)
    nearest = min(abs(value) for value in values)
    assert abs(values[zero_code]) == nearest


tables = st.integers(2, 8).flatmap(
    lambda bits: st.lists(
        st.floats(-1, 1, width=32), min_size=2**bits, max_size=2**bits, unique=True
    )
)


@given(tables)
def test_thresholds_are_midpoints_rounded_once(table: list[float]) -> None:
    codebook = Codebook(tuple(table))
    ascending = sorted(table)
    assert [table[code] for code in codebook.codes] == ascending
    assert list(codebook.thresholds) == sorted(codebook.thresholds)
    for low, high, threshold in zip(ascending, ascending[1:], codebook.thresholds, strict=False):
        assert threshold == float32((low + high) / 2)
        assert low <= threshold <= high


@given(st.floats(allow_nan=False, width=32) | st.floats(-1e38, 1e38))
def test_float32_rounds_to_nearest(value: float) -> None:
    assert struct.pack("<d", float32(value)) == struct.pack("<d", float(np.float32(value)))


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(bits=1, values=(0.0, 1.0)), "bits: Input should be greater than or equal to 2"),
        (dict(bits=9), "bits: Input should be less than or equal to 8"),
        (dict(values=(0.0, 1.0)), "values: 2 numbers for 2 bits; expected 4"),
        (dict(bits=3), "values: 4 numbers for 3 bits; expected 8"),
        (dict(values=()), "values: 0 numbers for 2 bits; expected 4"),
        (dict(values=(-1.5, 0.0, 0.5, 1.0)), "values[0] = -1.5 is outside [-1, 1]"),
        (dict(values=(-1.0, 0.0, 0.5, 1.5)), "values[3] = 1.5 is outside [-1, 1]"),
        (
            dict(values=(-1.0, math.nan, 0.5, 1.0)),
            "values.1: nan is no number of a table; write None for a code without a number",
        ),
        (dict(values=(-1.0, 0.0, 0.5, math.inf)), "values.3: inf is no number of a table"),
        (dict(values=(-1.0, 0.0, 0.5, "1.0")), "values.3: '1.0' is a text; expected a number"),
        (
            dict(values=(-6.0, 0.0, 0.5, 6.0)),
            "values[0] = -6 is outside [-1, 1]; of a table in other numbers, `unit` is the largest "
            "magnitude",
        ),
        (dict(values=(1.0,) * 4), "values: expected at least two numbers"),
        (dict(values=(-0.5, 0.0, 0.25, 0.5)), "the largest magnitude near 1"),
        (
            dict(unsigned_values=(-0.5, 0.0, 0.5, 1.0)),
            "unsigned_values[0] = -0.5 is outside [0, 1]",
        ),
        (dict(unsigned_values=(0.0, 1.0)), "unsigned_values: 2 numbers for 2 bits; expected 4"),
        (dict(unsigned_values=(0.0,) * 4), "unsigned_values: expected at least two numbers"),
        (dict(block_size=0), f"block_size 0 is not one of {BLOCK_SIZES}"),
        (dict(block_size=100), f"block_size 100 is not one of {BLOCK_SIZES}"),
        (dict(block_size=8192), f"block_size 8192 is not one of {BLOCK_SIZES}"),
        (dict(values="text"), "values: Input should be a valid tuple"),
        (dict(values=(None,) * 4), "values: expected at least two numbers"),
        (dict(values=(1e30, 0.0, 0.5, 1.0)), "values[0] = 1e+30 is outside [-1, 1]"),
        (dict(values=(-1.1, 0.0, 0.5, 1.0)), "values[0] = -1.1 is outside [-1, 1]"),
        (dict(values=(-1.0000001, 0.0, 0.5, 1.0)), "values[0] = -1.0000001 is outside [-1, 1]"),
        (
            dict(values=(1e300, 0.0, 0.5, 1.0), decode_only=(0,)),
            "values.0: 1e+300 is beyond the largest float32 number",
        ),
        (dict(decode_only=(0, 3)), "the largest magnitude near 1"),
        (dict(decode_only=(4,)), "decode_only: 4 is no code of 2 bits"),
        (dict(decode_only=(-1,)), "decode_only: -1 is no code of 2 bits"),
        (dict(decode_only=(0, 1, 2)), "expected at least two numbers"),
        (dict(unit=2.0), "the largest magnitude near 2"),
        (dict(unit=0.5), "values[0] = -1 is outside [-0.5, 0.5]"),
        (dict(unit="2"), "unit: '2' is a text; expected a number, without quotes"),
        (dict(unit=1e300), "unit: "),
        (dict(unit=math.nan), "unit: Input should be a finite number"),
        (dict(unit=0.0), "unit: Input should be greater than or equal to"),
        (dict(unit=2.0**17), "unit: Input should be less than or equal to"),
        (dict(ties="up"), "ties: Input should be 'low' or 'even'"),
        (dict(scale=dict(per="column")), "per: Input should be 'block', 'row' or 'tensor'"),
        (dict(scale=dict(dtype="float16")), "dtype: Input should be 'float32'"),
        (dict(scale=dict(tensor_scale=True)), "tensor_scale is for dtype 'e4m3'"),
        (
            dict(scale=dict(tensor_scale=True, dtype="e4m3", centered=True)),
            "tensor_scale is for dtype 'e4m3' without centered",
        ),
        (dict(scale=dict(dtype="e8m0", centered=True)), "centered is for scales in float32"),
        (dict(scale="row"), "scale: 'row' is no Scale; write Scale(per='row')"),
        (dict(extra=1), "extra: no such field; there are name, summary, source, bits, values, "),
        (dict(unsigned=1), "unsigned: no such field; did you mean 'unsigned_values'?; there are"),
    ],
)
def test_bad_types(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        quant_type(**changes)
    assert str(caught.value).startswith("QuantType spec 'q': ")
    assert message in str(caught.value)


def test_tables_are_rounded_to_float32() -> None:
    """Kernels have them in float32; equal tables are equal specs, however they were written."""
    found = quant_type(values=(-1, -0.3, 1e-60, 1), unsigned_values=(0, 0.1, None, 1.1), unit=1.1)
    assert found.values == (-1.0, float32(-0.3), 0.0, 1.0)
    assert found.unsigned_values == (0.0, float32(0.1), None, float32(1.1))
    assert found.unit == float32(1.1)
    tables = {name: getattr(found, name) for name in ("values", "unsigned_values", "unit")}
    assert quant_type(**tables) == found
    assert QuantType.from_json(found.to_json()).digest == found.digest


def test_float32_is_no_name_for_a_quant_type() -> None:
    """It is what `state_types` calls a state that is not quantized."""
    with pytest.raises(SpecError, match="float32"):
        quant_type(name="float32")


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_block_sizes(block_size: int) -> None:
    assert quant_type(block_size=block_size).block_size == block_size


def test_without_an_unsigned_table_the_signed_one_serves() -> None:
    one = quant_type()
    assert one.codebook(signed=False).values == one.codebook(signed=True).values == one.values
    two = quant_type(unsigned_values=(0.0, 0.25, 0.5, 1.0))
    assert two.codebook(signed=True).values == two.values
    assert two.codebook(signed=False).values == two.unsigned_values
    assert two.codebook(signed=True) is two.codebook(signed=True)


def test_the_largest_magnitude_may_be_a_little_under_one() -> None:
    values = (-0.921875, 0.0, 0.5, 0.75)
    assert quant_type(values=values).values == values
